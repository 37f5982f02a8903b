"""One round of training: ask the sites, check what comes back, decide if it counts.

An update is checked tensor by tensor and lies on disk until it is combined, so that
memory grows neither with the sites nor with what they send.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedgex.common import failpoints, keys
from fedgex.common.arrays import check
from fedgex.common.errors import FederationError, UpdateError
from fedgex.common.federation import Update
from fedgex.common.files import explained
from fedgex.common.records import pieces
from fedgex.common.statistics import FEWEST_TO_COMPARE
from fedgex.common.study import RoundRule, Study
from fedgex.server import privacy
from fedgex.server.aggregation import Array
from fedgex.server.asking import Line, Request, Sealed, ask
from fedgex.server.strategy import Spooled

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Numbers of a tensor that are converted to float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site that takes part in the run."""

    name: str
    measured: NDArray[np.bool_]
    """Genes of the vocabulary that it measures, shape (V,)."""
    n_patients: int | None
    """None if the site withholds it."""


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """Who contributed to a round with what, and who did not and why."""

    updates: list[Update]
    sites: dict[str, dict[str, Any]]
    """State, reason and numbers of every site, as in the journal."""
    sealed: dict[str, Sealed] = field(default_factory=dict)
    """What sites signed, of those whose signature holds."""
    bytes_up: int
    bytes_down: int
    seconds: float


def train_round(
    line: Line,
    sites: list[Site],
    request: Request,
    incoming: Mapping[str, Array],
    study: Study,
    *,
    absent: Mapping[str, Mapping[str, Any]],
    spool_dir: Path,
) -> RoundOutcome:
    """Run one round of training, and spool every acceptable update to disk.

    Parameters
    ----------
    incoming
        Parameters that must come back trained, no more and no fewer.
    absent
        State and reason of the sites that are not asked at all.
    spool_dir
        Folder for the updates; the caller empties it.

    Raises
    ------
    FederationError
        If fewer sites than the quorum, or not all mandatory ones, contributed.
    FedgexError
        If an update cannot be written.
    """
    started = time.monotonic()
    by_name = {site.name: site for site in sites}
    outcome: dict[str, dict[str, Any]] = {name: dict(a) for name, a in absent.items()}
    updates: list[Update] = []
    norms: dict[str, float] = {}
    sealed: dict[str, Sealed] = {}
    bytes_up = bytes_down = 0
    rule = study.rounds
    for answer in ask(line, by_name, request, deadline_s=rule.deadline_s):
        name, state, reason = answer.site, answer.state, answer.reason
        bytes_up += answer.bytes_up
        bytes_down += answer.bytes_down
        numbers: dict[str, Any] = {}
        if answer.sealed is not None:
            sealed[name] = answer.sealed
        if answer.content is not None:
            path = spool_dir / f"{name}.safetensors"
            try:
                numbers, norm = _accept(answer.content, incoming, study, path)
                require_signed_count(answer.sealed, numbers["num_examples"])
            except UpdateError as error:
                state, reason, numbers = "quarantined", str(error), {}
                path.unlink(missing_ok=True)
            else:
                norms[name] = norm
                updates.append(
                    Update(
                        site=name,
                        arrays=Spooled(path),
                        num_examples=_whole(numbers["num_examples"]),
                        num_loss_terms=_whole(numbers["num_loss_terms"]),
                        measured=by_name[name].measured,
                    )
                )
        del answer  # before the next is fetched
        outcome[name] = {"state": state, "reason": reason, **numbers}
    # Under site-level privacy one site must not decide whether another counts.
    alike = study.privacy.site is not None
    far = {} if alike else _far_beyond(norms, rule.max_norm_ratio)
    for name, reason in far.items():
        outcome[name] = {"state": "quarantined", "reason": reason}
    for name, site in outcome.items():
        if site["state"] != "contributed":
            logger.warning(
                "%s site=%s state=%s %s",
                request.group,
                name,
                site["state"],
                site["reason"],
            )
    failpoints.reach("server.collected")
    require_quorum(outcome, rule, request.group)
    kept = [u for u in updates if outcome[u.site]["state"] == "contributed"]
    return RoundOutcome(
        updates=sorted(kept, key=lambda update: update.site),
        sites=dict(sorted(outcome.items())),
        sealed=sealed,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        seconds=time.monotonic() - started,
    )


def require_quorum(
    outcome: Mapping[str, Mapping[str, Any]],
    rule: RoundRule,
    group: str,
    *,
    invited: int | None = None,
) -> None:
    """Refuse to go on without the quorum or a mandatory site.

    Parameters
    ----------
    outcome
        State and reason of each site, those that contributed included.
    invited
        Number of sites that there should be; as many as `outcome` has, if absent.

    Raises
    ------
    FederationError
        With the reason of everybody who did not contribute.
    """
    contributed = {n for n, s in outcome.items() if s["state"] == "contributed"}
    missing = set(rule.mandatory_sites) - contributed
    if len(contributed) >= rule.quorum and not missing:
        return
    others = "; ".join(
        f"{name}: {site['state']} ({site['reason']})"
        for name, site in sorted(outcome.items())
        if name not in contributed
    )
    raise FederationError(
        f"{group}: {len(contributed)} of {invited or len(outcome)} sites contributed, "
        f"the quorum is {rule.quorum}"
        + (f", and mandatory {sorted(missing)} did not" if missing else "")
        + f". {others}. Mend the sites, then resume from the last checkpoint."
    )


def withheld(content: RecordDict) -> frozenset[str]:
    """Return the metrics that the site's policy keeps back, as the reply says."""
    record = content.config_records.get(keys.WITHHELD, ConfigRecord())
    names = record.get(keys.METRICS, [])
    return frozenset(map(str, names)) if isinstance(names, list) else frozenset()


def _accept(
    content: RecordDict, incoming: Mapping[str, Array], study: Study, path: Path
) -> tuple[dict[str, float | None], float]:
    """Check an update and spool it; return its numbers, None for those withheld.

    Returns
    -------
    tuple
        The numbers, and the Euclidean norm of the update's change.

    Raises
    ------
    UpdateError
        If it lacks a record, or holds anything that cannot be aggregated.
    FedgexError
        If it cannot be written.
    """
    if keys.UPDATE not in content.array_records:
        raise UpdateError(f'the reply has no "{keys.UPDATE}"')
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(pieces(content.array_records[keys.UPDATE]))
    arrays = Spooled(path)
    check({name: a.shape for name, a in incoming.items()}, arrays, exact=True)
    numbers = read_numbers(content, study)
    begun = incoming if study.strategy.update == "parameters" else None
    squares = sum(
        _square_norm(arrays[name], None if begun is None else begun[name])
        for name in arrays
    )
    norm, site = float(np.sqrt(squares)), study.privacy.site
    if site is not None and norm > privacy.longest(site):
        raise UpdateError(
            f"its change of the model has norm {norm:.6g}, more than the "
            f"{site.clip:g} of privacy.site.clip"
        )
    return numbers, norm


def read_numbers(content: RecordDict, study: Study) -> dict[str, float | None]:
    """Return the metrics of a reply to `train`, None for those withheld.

    Raises
    ------
    UpdateError
        If one is no number, withheld though updates are weighted by it, or too small.
    """
    numbers = _numbers(content, keys.WEIGHTED_BY.get(study.strategy.weights))
    patients = numbers["num_examples"]
    if patients is not None and patients < study.minimum_cohort:
        raise UpdateError(f"trained on fewer than {study.minimum_cohort} patients")
    return numbers


def require_signed_count(sealed: Sealed | None, counted: float | None) -> None:
    """Refuse an update that counts by another number than the site signed."""
    signed = None if sealed is None else sealed.part.patients
    if isinstance(signed, int) and signed != counted:
        raise UpdateError("its number of patients is not the one that it signed")


def _numbers(content: RecordDict, weighted_by: str | None) -> dict[str, float | None]:
    """Return the metrics of a reply, None for those withheld.

    Parameters
    ----------
    weighted_by
        Metric that weighs the updates, and that no site may therefore withhold.
    """
    metrics = content.metric_records.get(keys.METRICS)
    if metrics is None:
        raise UpdateError(f'the reply has no "{keys.METRICS}"')
    unsaid = withheld(content)
    numbers: dict[str, float | None] = {}
    for key in (
        keys.NUM_EXAMPLES,
        keys.NUM_LOSS_TERMS,
        keys.TRAIN_LOSS,
        keys.JUDGED_LOSS,
        keys.SECONDS,
    ):
        value = metrics.get(key)
        if key in unsaid and value is None and key != weighted_by:
            numbers[key.replace("-", "_")] = None
            continue
        if not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
            raise UpdateError(f'"{key}" is not a number of 0 or more')
        numbers[key.replace("-", "_")] = value
    return numbers


def _square_norm(array: NDArray[Any], begun: Array | None) -> float:
    """Return the squared norm of an array, or of its difference from another."""
    flat = array.reshape(-1)
    start = None if begun is None else begun.reshape(-1)
    total = 0.0
    for i in range(0, flat.size, CHUNK):
        part = flat[i : i + CHUNK].astype(np.float64)
        if start is not None:
            part -= start[i : i + CHUNK]
        total += float(part @ part)
    return total


def _far_beyond(norms: Mapping[str, float], ratio: float) -> dict[str, str]:
    """Return the sites whose update changes far more than the others', and why."""
    if len(norms) < FEWEST_TO_COMPARE:
        return {}
    found = {}
    for name, norm in norms.items():
        median = float(np.median([n for other, n in norms.items() if other != name]))
        if norm > ratio * median:
            found[name] = (
                f"its change of the model has norm {norm:.3g}, more than {ratio:g} "
                f"times the others' median of {median:.3g}"
            )
    return found


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
