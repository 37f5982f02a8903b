"""Which standardisation a site accepts: one for each run, and on its own genes' scale.

In a study's model and sums every value is taken relative to it, so that another one in
the middle of a run would ask another question, and a site whose numbers are on another
scale than it declares would train on values that nobody else has.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedgex.client.settings import SiteSettings
from fedgex.common.codes import Code
from fedgex.common.data.moments import GeneMoments, foreign_scale
from fedgex.common.errors import DataError, FedgexError
from fedgex.common.messages.requests import CrossProductsRequest
from fedgex.common.system.files import exclusive_lock, explained, write_atomic

FOLDER, LOCK = "standardisations", "lock"
"""Folder in the state directory with the digest of each run's, and its lock."""


class ScaleError(FedgexError):
    """A run's standardisation is another than its first."""

    code = Code.STANDARDISATION_CHANGED


def accept(
    request: CrossProductsRequest,
    settings: SiteSettings,
    own: GeneMoments,
) -> None:
    """Accept a request's standardisation, and keep its digest if it is a run's first.

    A simulation has no run, and its site's state may serve many: none is kept there.

    Parameters
    ----------
    own
        Moments of the site's genes, those of few patients suppressed.

    Raises
    ------
    DataError
        If the site's genes are on a foreign scale relative to it.
    ScaleError
        If it is not the first of the run.
    """
    scale = request.standardisation
    if request.study.scale.logarithm is not None:
        mean = np.where(own.count > 0, own.mean, np.nan)
        _refuse_foreign(foreign_scale(mean, scale.mean), settings)
    if request.run is None:
        return
    content = request.vocabulary.hash.encode() + scale.mean.tobytes()
    digest = hashlib.sha256(content + scale.sd.tobytes()).hexdigest()
    folder = settings.state_dir / FOLDER
    path = folder / f"{request.run.contract}-{request.run.run}"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with exclusive_lock(folder / LOCK):
        if not path.exists():
            write_atomic(path, digest.encode())
        elif path.read_text() != digest:
            raise ScaleError(
                f"the message standardises with other numbers than the first of "
                f"{request.run.run} did; expected one standardisation for a run. If "
                "the server lost its folder, have it begin a new run."
            )


def _refuse_foreign(ratio: float | None, settings: SiteSettings) -> None:
    if ratio is None:
        return
    raise DataError(
        [
            Code.FOREIGN_TO_STUDY.finding(
                where=settings.data.expression.name,
                found=f"the means of its genes are {ratio:.2f} times the study's",
                expected="about 1, as other hospitals and other cancers have",
                action=f"Correct data.scale, {settings.data.scale.value} now, or the "
                "export; then the site takes part again.",
            )
        ]
    )
