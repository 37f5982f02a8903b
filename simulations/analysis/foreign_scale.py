"""A site whose numbers are on another scale than its settings name.

What the site's own checks find, and how far its first update stands out.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedgex.client.settings import SiteSettings
from fedgex.client.training.local_round import train_round
from fedgex.common.codes import Code
from fedgex.common.data import scales
from fedgex.common.data.cohort import Cohort, read_parquet
from fedgex.common.data.dataset import Patients
from fedgex.common.data.scales import Scale
from fedgex.common.errors import DataError, Finding
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.models.losses import eligible
from fedgex.common.models.tasks import Parameters
from fedgex.common.study import PRETRAINING, Study

ABOUT_NUMBERS = frozenset(
    {
        Code.NOT_A_NUMBER,
        Code.INFINITE,
        Code.NEGATIVE_EXPRESSION,
        Code.SCALE_IMPOSSIBLE,
        Code.SCALE_FAINT,
        Code.SCALE_NOT_CONVERTIBLE,
        Code.LIBRARY_SIZE_UNUSABLE,
        Code.COUNTS_PER_MILLION,
    }
)
"""Findings about the numbers in an expression file: their kind and their scale."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An export on another scale than the one that the site names."""

    description: str
    scale: Scale
    rounded: bool = False
    """Rounded to integers."""


MISTAKES = {
    "log10": Mistake(description="log10(x + 1)", scale=Scale.LOG10P1),
    "ln": Mistake(description="ln(x + 1)", scale=Scale.LN1P),
    "counts": Mistake(
        description="integers, not logarithms", scale=Scale.LINEAR, rounded=True
    ),
}


def at_the_door(
    own: Path, study: Study, declared: Scale, mistake: Mistake
) -> tuple[Cohort | None, list[Finding]]:
    """Check a site's files with numbers on another scale than they name.

    Parameters
    ----------
    own
        The site's folder, with expression on the scale that it declares.

    Returns
    -------
    tuple
        The cohort, None if it is refused; and the findings on the scale.
    """
    with tempfile.TemporaryDirectory(prefix="fedgex-") as temporary:
        folder = Path(temporary) / own.name
        shutil.copytree(own, folder)
        path = folder / "expression.parquet"
        table = read_parquet(path)
        values = scales.convert(table.to_numpy(), declared, mistake.scale)
        if mistake.rounded:
            values = np.rint(values)
        pd.DataFrame(values, table.index, table.columns).to_parquet(path)
        settings = SiteSettings.load(folder / "site.toml")
        cohort: Cohort | None = None
        findings: Sequence[Finding]
        try:
            cohort, findings = read_cohort(
                settings.data,
                settings.policy.minimum_cohort,
                study.scale,
                tuple(study.phases),
            )
        except DataError as error:
            findings = error.findings
    return cohort, [each for each in findings if each.code in ABOUT_NUMBERS]


def verdict(cohort: Cohort | None, findings: Sequence[Finding]) -> str:
    """Return the outcome of the site's own checks, in words."""
    found = "; ".join(f"{each.code}: {each.found}" for each in findings)
    if cohort is None:
        return f"refused ({found})"
    return f"enters with a warning ({found})" if found else "enters, nothing noticed"


def first_norms(
    study: Study, incoming: Parameters, sites: Mapping[str, Patients]
) -> dict[str, float]:
    """Return the Euclidean norm of each site's first update of pretraining."""
    norms = {}
    for site, of_site in sorted(sites.items()):
        patients = eligible(study, PRETRAINING, of_site)
        if len(patients) < study.minimum_cohort:
            continue
        with tempfile.TemporaryDirectory(prefix="fedgex-") as state:
            changed = train_round(
                study,
                PRETRAINING,
                1,
                patients,
                incoming,
                site=site,
                min_cell_count=study.minimum_cohort,
                state_dir=Path(state),
            ).update
        squares = [np.square(a.astype(np.float64)).sum() for a in changed.values()]
        norms[site] = math.sqrt(sum(squares))
    return norms
