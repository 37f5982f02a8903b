"""One study from the first message to the last checkpoint.

    initialization (server/federation/initialization.py) -> rounds of each phase ->
    judgement

After every round the model is judged on the hold-out and a checkpoint written, with the
receipt of who contributed. A run that was killed goes on from its last checkpoint and
ends in the same bits, because sites and server derive every seed from the names of
study, site, phase and round.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedgex.common import federation, keys
from fedgex.common.arrays import Arrays
from fedgex.common.data.cohort import load_cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.errors import CheckpointError, FederationError
from fedgex.common.federation import Aggregate
from fedgex.common.messages.fields import Round
from fedgex.common.messages.requests import TrainRequest
from fedgex.common.models import checkpoint, tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import PRETRAINING, Study
from fedgex.common.system import failpoints
from fedgex.common.system.files import exclusive_lock, write_atomic
from fedgex.common.system.malloc import resident_mb
from fedgex.common.transport.records import to_record
from fedgex.server import evaluation
from fedgex.server.federation import (
    central_noise,
    public_cohort,
    receipts,
    rounds,
    secure_rounds,
)
from fedgex.server.federation.aggregation import Array
from fedgex.server.federation.initialization import Initialization
from fedgex.server.federation.participants import (
    Channel,
    Outcomes,
    Participants,
    Request,
)
from fedgex.server.federation.rounds import RoundOutcome, Site
from fedgex.server.federation.strategy import combine, step
from fedgex.server.journal import Journal, read
from fedgex.server.settings import ServerSettings

logger = logging.getLogger(__name__)

Parameters = Mapping[str, Array]
Combined = tuple[dict[str, Array], dict[str, NDArray[np.generic]]]
"""The next parameters, and the server optimiser's state, see `federation.Aggregate`."""


def conduct(grid: Grid, settings: ServerSettings, participants: Participants) -> None:
    """Begin a run, or go on with it, and bring it to its end.

    Raises
    ------
    FederationError
        If too few sites come, a round misses its quorum, or another process conducts
        the run.
    CheckpointError
        If the run's folder belongs to another study, or its receipts do not hold.
    ConfigError, TrustError
        If the settings, or the public cohort that the study wants, cannot be used.
    """
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    busy = "another process conducts this run; wait for it, or stop it."
    with exclusive_lock(settings.run_dir / "lock", busy, FederationError):
        journal = Journal(settings.run_dir / "journal.jsonl")
        channel = Channel(
            grid=grid,
            participants=participants,
            journal=journal,
            poll_s=settings.poll_s,
        )
        with journal.failures():
            _Run(channel, settings).conduct()


class _Run:
    """The state that the steps of a run share."""

    def __init__(self, channel: Channel, settings: ServerSettings) -> None:
        self.channel, self.settings = channel, settings
        self.journal, self.participants = channel.journal, channel.participants
        self.study = self.participants.study
        self.checkpoints = settings.run_dir / "checkpoints"
        self.spool = settings.run_dir / "spool"
        self.checkpoints.mkdir(exist_ok=True)
        self.holdout: Patients | None = None
        self.public: Patients | None = None

    def conduct(self) -> None:
        found = checkpoint.latest(self.checkpoints)
        last = None if found is None else self._reopened(checkpoint.load(found))
        begins = last is None or self._begins_on_public(last)
        cohort = (
            public_cohort.load(self.study, self.settings.public) if begins else None
        )
        opening = Initialization(
            channel=self.channel, settings=self.settings, public_cohort=cohort
        )
        opening.connect()
        self.absent = opening.absent
        if last is None:
            last = opening.initial_checkpoint()
            checkpoint.save(last, self.checkpoints / _name(self.study, last))
        sites = opening.sites(last.vocabulary)
        self.journal.write(
            "run-started",
            study=self.study.name,
            study_hash=self.study.hash,
            sites=[site.name for site in sites],
            plan=[
                {"phase": phase, "rounds": training.rounds}
                for phase, training in self.study.phases.items()
            ],
            resumed_from=found.name if found else None,
            epsilon=central_noise.spent(self.study, last.phase, last.round),
        )
        self._catch_up(last)
        place = (last.vocabulary, last.standardisation)
        if self.settings.holdout is not None:
            self.holdout = to_patients(load_cohort(self.settings.holdout), *place)
        if cohort is not None:
            self.public = to_patients(cohort, *place)
        for phase, training in self.study.phases.items():
            if _is_past(self.study, phase, last):
                continue
            self.journal.write("phase-started", phase=phase, rounds=training.rounds)
            first = last.round + 1 if last.phase == phase else 1
            for number in range(first, training.rounds + 1):
                last = self._round(sites, last, phase, number)
            self.journal.write("phase-finished", phase=phase)
        if self.holdout is not None:
            self._judge(last, self.holdout)
        self.journal.write(
            "run-finished",
            checkpoint=_name(self.study, last),
            peak_rss_mb=resident_mb("VmHWM"),
        )

    def _begins_on_public(self, last: Checkpoint) -> bool:
        """Return whether a phase is yet to begin on the public cohort."""
        order = list(self.study.phases)
        begun = order.index(last.phase) + (last.round > 0)
        to_come = set(order[begun:]) - {PRETRAINING}
        return self.study.public.epochs > 0 and bool(to_come)

    def _reopened(self, last: Checkpoint) -> Checkpoint:
        """Return the checkpoint to go on from, once it is known to be of this run."""
        if last.study.hash != self.study.hash:
            raise CheckpointError(
                f"{self.checkpoints} belongs to study {last.study.hash[:12]}, this is "
                f"{self.study.hash[:12]}; choose another folder, or the same study."
            )
        receipts.verify(self.checkpoints, last, self.participants)
        return last

    # ---- rounds ----

    def _round(
        self, sites: list[Site], last: Checkpoint, phase: str, number: int
    ) -> Checkpoint:
        """Run one round, judge its model, and write the checkpoint and the journal."""
        failpoints.reach("server.before_round")
        started, study = time.monotonic(), self.study
        known = self.public if number == 1 else None
        begun = federation.begin_phase(study, phase, last.parameters, known)
        request = Request(
            type=keys.TRAIN,
            message=lambda: TrainRequest(
                study=study,
                vocabulary=last.vocabulary,
                standardisation=last.standardisation,
                model=to_record(tasks.download_state(study, phase, begun)),
                round=Round(phase=phase, number=number),
            ),
            group=f"{phase}-{number}",
            phase=phase,
            round=number,
        )
        train = self._plain if study.secure_aggregation is None else self._secure
        incoming = federation.global_parameters(study, phase, begun)
        outcome, aggregate = train(sites, request, incoming)
        new = federation.next_model(last, begun, phase, number, aggregate)
        shutil.rmtree(self.spool, ignore_errors=True)
        failpoints.reach("server.combined")
        return self._commit(last, new, outcome, started)

    def _plain(
        self, sites: list[Site], request: Request, incoming: Parameters
    ) -> tuple[RoundOutcome, Aggregate]:
        """Have the sites train, and combine the update of each."""
        outcome = rounds.train_round(
            self.channel,
            sites,
            request,
            incoming,
            self.study,
            absent=self.absent,
            spool_dir=self.spool,
        )
        rule, noise = self.study.strategy, self.study.privacy.site

        def aggregate(incoming: Parameters, state: Arrays) -> Combined:
            updates = outcome.updates
            return combine(rule, incoming, updates, request.round, state, noise)

        return outcome, aggregate

    def _secure(
        self, sites: list[Site], request: Request, incoming: Parameters
    ) -> tuple[RoundOutcome, Aggregate]:
        """Have the sites train, and see nothing but the sum of their updates."""
        outcome, mean = secure_rounds.train_round(
            self.channel,
            sites,
            request,
            incoming,
            self.study,
            absent=self.absent,
            folder=self.settings.run_dir / "secure",
        )
        rule, noise = self.study.strategy, self.study.privacy.site
        n = sum(site.contributed for site in outcome.sites.values())

        def aggregate(incoming: Parameters, state: Arrays) -> Combined:
            return step(rule, incoming, mean, n, request.round, state, noise)

        return outcome, aggregate

    def _commit(
        self,
        last: Checkpoint,
        new: Checkpoint,
        outcome: RoundOutcome,
        started: float,
    ) -> Checkpoint:
        """Judge the new model, and put it on the disk together with its receipt."""
        holdout: dict[str, Any] = {}
        if self.holdout is not None:
            holdout = evaluation.judge_round(
                self.study, new.phase, dict(new.parameters), self.holdout
            )
        metrics = {
            "phase": new.phase,
            "round": new.round,
            "rounds": self.study.phases[new.phase].rounds,
            "train_loss": _mean(outcome.sites, "train_loss"),
            "judged_loss": _mean(outcome.sites, "pre_training_loss"),
            "sites": {name: each.to_json() for name, each in outcome.sites.items()},
            "holdout": holdout,
            "epsilon": central_noise.spent(self.study, new.phase, new.round),
            "bytes_up": outcome.bytes_up,
            "bytes_down": outcome.bytes_down,
        }
        receipt = receipts.make(last, new, outcome, self.participants)
        new = dataclasses.replace(new, metrics=metrics, receipt=receipt.to_json())
        folder = self.checkpoints / _name(self.study, new)
        checkpoint.save(new, folder, new.receipt)
        self.participants.committed(receipt, outcome.signed)
        self.journal.write(
            "round",
            **metrics,
            seconds=time.monotonic() - started,
            seconds_sites=outcome.seconds,
        )
        return new

    def _catch_up(self, last: Checkpoint) -> None:
        """Write the last round's line if the run was killed between the two."""
        written = [e for e in read(self.journal.path) if e["event"] == "round"]
        at = {(e["phase"], e["round"]) for e in written}
        if last.round and (last.phase, last.round) not in at:
            self.journal.write(
                "round", **last.metrics, seconds=None, seconds_sites=None
            )

    def _judge(self, last: Checkpoint, holdout: Patients) -> None:
        """Judge the finished model and the linear references on the hold-out."""
        study, n_genes = self.study, len(last.vocabulary)
        path = self.settings.run_dir / "covariance.safetensors"
        covariance = load_file(path)["covariance"] if path.exists() else None
        imputers = evaluation.linear_references(covariance, n_genes)
        imputers["model"] = evaluation.model_imputer(study, last.parameters, n_genes)
        judged: dict[str, Any] = {"imputation": {}, "per_gene": {}}
        for name, imputer in imputers.items():
            scores = evaluation.judge_imputer(
                imputer, holdout, study.evaluation, study.seed
            )
            judged["imputation"][name] = evaluation.as_numbers(scores)
            judged["per_gene"][name] = {
                key: {
                    "mse": _numbers(score.gene_mse),
                    "pearson": _numbers(score.gene_pearson),
                }
                for key, score in scores.get("mcar", {}).items()
            }
        content = json.dumps(judged, sort_keys=True).encode()
        write_atomic(self.settings.run_dir / "judgement.json", content, mode=0o644)


def _is_past(study: Study, phase: str, last: Checkpoint) -> bool:
    order = list(study.phases)
    at, now = order.index(phase), order.index(last.phase)
    return at < now or (at == now and last.round >= study.phases[phase].rounds)


def _name(study: Study, at: Checkpoint) -> str:
    """Return a checkpoint's folder: total rounds so far, phase, round of the phase."""
    total = at.round
    for phase, training in study.phases.items():
        if phase == at.phase:
            break
        total += training.rounds
    return f"{total:05d}-{at.phase}-{at.round:05d}"


def _mean(sites: Outcomes, name: str) -> float | None:
    """Return the mean of a number over the sites that contributed and reported it.

    By patients, or plain if one of them withholds how many it has; None if no site
    reported it.
    """
    reported = [
        (value, each.metrics.num_examples)
        for each in sites.values()
        if each.metrics is not None
        and (value := getattr(each.metrics, name)) is not None
    ]
    if not reported:
        return None
    values, patients = zip(*reported, strict=True)
    return float(np.average(values, weights=None if None in patients else patients))


def _numbers(values: NDArray[np.floating]) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]
