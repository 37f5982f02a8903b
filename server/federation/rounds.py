"""One round of training: request updates, check them, and require the quorum.

Updates are checked tensor by tensor and spooled to disk until aggregation, so that
memory grows neither with the number of sites nor with the size of their updates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgex.common import federation, keys
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import FederationError, UpdateError
from fedgex.common.federation import Update
from fedgex.common.messages.codec import boundary
from fedgex.common.messages.fields import TrainingMetrics
from fedgex.common.messages.replies import TrainReply
from fedgex.common.study import RoundRule, Study
from fedgex.common.system import failpoints
from fedgex.common.system.files import explained
from fedgex.common.transport.records import pieces
from fedgex.server.federation.aggregation import Array
from fedgex.server.federation.dispatch import Answer, request_all
from fedgex.server.federation.participants import (
    Channel,
    Outcomes,
    Request,
    SignedReply,
    SiteOutcome,
)
from fedgex.server.federation.strategy import Spooled

logger = logging.getLogger(__name__)


ARRAY_BYTES = 1 << 10
"""Bytes of an array of an update besides its numbers, at most: its name and shape."""
OTHER_BYTES = 1 << 20
"""Bytes of a reply besides its arrays, at most: numbers, shares, the signed part."""
MOST_PATIENTS = 1_000_000
"""Patients of a site that withholds their number, at most."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site of the run."""

    name: str
    measured: NDArray[np.bool_]
    """Mask of the vocabulary genes that it measures, shape (V,)."""
    n_patients: int | None
    """None if the site withholds it."""


def genes_of_one_site(vocabulary: Vocabulary, sites: Sequence[Site]) -> list[str]:
    """Return the genes that one of several sites measures, and no other.

    What the model knows of them, their mean and SD too, is of that site's patients.
    """
    if len(sites) < 2:
        return []
    measuring = np.sum([site.measured for site in sites], axis=0)
    return list(compress(vocabulary.genes, measuring == 1))


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """Accepted updates of a round, and every site's outcome."""

    updates: list[Update]
    sites: dict[str, SiteOutcome]
    """Outcomes in order of site name."""
    signed: dict[str, SignedReply] = field(default_factory=dict)
    """Replies with a verified signature."""
    bytes_up: int
    bytes_down: int
    seconds: float


def train_round(
    channel: Channel,
    sites: list[Site],
    request: Request,
    global_parameters: Mapping[str, Array],
    study: Study,
    *,
    absent: Outcomes,
    spool_dir: Path,
) -> RoundOutcome:
    """Run one round of training, and spool every acceptable update to disk.

    Parameters
    ----------
    global_parameters
        Parameters of the round; an update must hold exactly these.
    absent
        Outcomes of the sites that get no request.
    spool_dir
        Folder for the updates; the caller empties it.

    Raises
    ------
    FederationError
        Without a quorum, or without a mandatory site.
    FedgexError
        If an update cannot be written.
    """
    started = time.monotonic()
    by_name = {site.name: site for site in sites}
    outcomes = dict(absent)
    updates: list[Update] = []
    norms: dict[str, float] = {}
    signed: dict[str, SignedReply] = {}
    bytes_up = bytes_down = 0
    rule = study.rounds
    for answer in request_all(
        channel,
        by_name,
        request,
        deadline_s=rule.deadline_s,
        enough=lambda: has_quorum(outcomes, rule),
    ):
        name, outcome = answer.site, answer.outcome
        bytes_up += answer.bytes_up
        bytes_down += answer.bytes_down
        if answer.signed is not None:
            signed[name] = answer.signed
        if answer.content is not None:
            path = spool_dir / f"{name}.safetensors"
            try:
                with boundary():
                    metrics, norms[name] = _accept(
                        answer, global_parameters, study, path
                    )
                require_plausible(metrics, by_name[name])
            except UpdateError as error:
                outcome = SiteOutcome(state="quarantined", reason=str(error))
                path.unlink(missing_ok=True)
            else:
                outcome = SiteOutcome(state="contributed", metrics=metrics)
                updates.append(
                    Update(
                        site=name,
                        arrays=Spooled(path),
                        num_examples=metrics.num_examples,
                        num_loss_terms=metrics.num_loss_terms,
                        measured=by_name[name].measured,
                    )
                )
        del answer  # before the next is fetched
        outcomes[name] = outcome
    for name, reason in federation.far_beyond(study, norms).items():
        outcomes[name] = SiteOutcome(state="quarantined", reason=reason)
    for name, each in outcomes.items():
        if not each.contributed:
            where = request.group, name, each.state, each.reason
            logger.warning("%s site=%s state=%s %s", *where)
    failpoints.reach("server.collected")
    require_quorum(outcomes, rule, request.group)
    kept = [u for u in updates if outcomes[u.site].contributed]
    return RoundOutcome(
        updates=sorted(kept, key=lambda update: update.site),
        sites=dict(sorted(outcomes.items())),
        signed=signed,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        seconds=time.monotonic() - started,
    )


def reply_bytes(global_parameters: Mapping[str, Array]) -> int:
    """Return how long an answer to training can be."""
    numbers = sum(array.nbytes for array in global_parameters.values())
    return numbers + ARRAY_BYTES * len(global_parameters) + OTHER_BYTES


def require_plausible(metrics: TrainingMetrics, site: Site) -> None:
    """Refuse numbers that would weight an update by more patients than a site has.

    Raises
    ------
    UpdateError
        If it counts more patients than it named before the run, or more terms of the
        loss than these can have.
    """
    known = site.n_patients
    patients = MOST_PATIENTS if known is None else known
    n_genes = len(site.measured)
    for name, number, most in (
        ("patients", metrics.num_examples, patients),
        ("terms of the loss", metrics.num_loss_terms, patients * n_genes),
    ):
        if number is not None and number > most:
            why = (
                "it withholds how many patients it has"
                if known is None
                else f"it named {known} patients before the first round; start the run "
                "again if it has more now"
            )
            raise UpdateError(
                f"trained on {number} {name}, expected at most {most}: {why}"
            )


def has_quorum(outcomes: Outcomes, rule: RoundRule) -> bool:
    """Whether enough sites contributed, and the mandatory ones."""
    contributed = {name for name, each in outcomes.items() if each.contributed}
    return len(contributed) >= rule.quorum and contributed >= set(rule.mandatory_sites)


def require_quorum(
    outcomes: Outcomes,
    rule: RoundRule,
    group: str,
    *,
    invited: int | None = None,
) -> None:
    """Refuse to continue without the quorum or a mandatory site.

    Parameters
    ----------
    outcomes
        Outcomes of all sites.
    invited
        Number of expected sites; by default that of `outcomes`.

    Raises
    ------
    FederationError
        With the reason of each site that did not contribute.
    """
    if has_quorum(outcomes, rule):
        return
    contributed = {name for name, each in outcomes.items() if each.contributed}
    missing = set(rule.mandatory_sites) - contributed
    others = "; ".join(
        f"{name}: {each.state} ({each.reason})"
        for name, each in sorted(outcomes.items())
        if name not in contributed
    )
    raise FederationError(
        f"{group}: {len(contributed)} of {invited or len(outcomes)} sites contributed, "
        f"the quorum is {rule.quorum}"
        + (f", and mandatory {sorted(missing)} did not" if missing else "")
        + f". {others}. Mend the sites, then resume from the last checkpoint."
    )


def read_reply(answer: Answer, study: Study) -> TrainReply:
    """Return a site's reply to `train`.

    Raises
    ------
    UpdateError
        If it withholds the number that weights updates, if a number differs from the
        signed one, or if it has too few patients.
    """
    assert answer.content is not None
    reply = TrainReply.from_records(answer.content)
    metrics, by = reply.metrics, keys.WEIGHTED_BY.get(study.strategy.weights)
    if by in (reply.withheld or ()):
        raise UpdateError(f'"{by}" is withheld, and updates are weighted by it')
    patients = metrics.num_examples
    if patients is not None and patients < study.minimum_cohort:
        raise UpdateError(f"trained on fewer than {study.minimum_cohort} patients")
    signed = None if answer.signed is None else answer.signed.part.patients
    if isinstance(signed, int) and signed != patients:
        raise UpdateError("its number of patients is not the one that it signed")
    return reply


def _accept(
    answer: Answer, global_parameters: Mapping[str, Array], study: Study, path: Path
) -> tuple[TrainingMetrics, float]:
    """Check and spool an update; return its metrics, and the norm of its change.

    Raises
    ------
    UpdateError
        If it lacks a record, or cannot be aggregated.
    FedgexError
        If it cannot be written.
    """
    reply = read_reply(answer, study)
    if reply.update is None:
        raise UpdateError(f'the reply has no "{keys.UPDATE}"')
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(pieces(reply.update))
    return reply.metrics, federation.update_norm(
        study, global_parameters, Spooled(path)
    )
