"""Conduct a study from the first message to the last checkpoint.

    initialization -> rounds of each phase -> evaluation

Each round ends with an evaluation on the hold-out, a checkpoint and a receipt. A killed
run resumes from its last checkpoint with the same bits, because sites and server derive
every seed from the names of study, site, phase and round.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedgex.common import federation, keys
from fedgex.common.arrays import Arrays
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.errors import CheckpointError, FederationError
from fedgex.common.messages.fields import Round
from fedgex.common.messages.requests import TrainRequest
from fedgex.common.models import checkpoint, tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import PRETRAINING, Study
from fedgex.common.system import failpoints
from fedgex.common.system.files import exclusive_lock, write_atomic
from fedgex.common.system.malloc import resident_mb
from fedgex.common.transport.records import to_record
from fedgex.common.trust.receipt import parameters_digest
from fedgex.common.trust.signed import Signed
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
    SiteOutcome,
)
from fedgex.server.federation.rounds import RoundOutcome, Site
from fedgex.server.federation.strategy import combine, step
from fedgex.server.journal import Journal, read
from fedgex.server.settings import ServerSettings

logger = logging.getLogger(__name__)

Parameters = Mapping[str, Array]
Combined = tuple[dict[str, Array], dict[str, NDArray[np.generic]]]
"""The next parameters, and the server optimiser's state, see `federation.Aggregate`."""
Combine = Callable[[RoundOutcome, Parameters, Arrays], Combined]
"""`federation.Aggregate` of a round's outcome."""


def conduct(grid: Grid, settings: ServerSettings, participants: Participants) -> None:
    """Start or resume a run, and conduct it to its end.

    Raises
    ------
    FederationError
        If a step lacks its quorum, or another process conducts the run.
    CheckpointError
        If the run's folder belongs to another study, or a receipt is invalid.
    ConfigError, TrustError
        If the settings, or the study's public cohort, cannot be used.
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
    """State shared by the steps of a run."""

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
        judging, cohort = public_cohort.load_both(
            self.study, self.settings.holdout, self.settings.public, begins=begins
        )
        initialization = Initialization(
            channel=self.channel, settings=self.settings, public_cohort=cohort
        )
        initialization.connect()
        self.absent = initialization.absent
        if last is None:
            last = initialization.initial_checkpoint()
            checkpoint.save(last, self.checkpoints / _name(self.study, last))
        sites = initialization.sites(last.vocabulary)
        self.journal.write(
            "run-started",
            study=self.study.name,
            study_hash=self.study.hash,
            sites=[site.name for site in sites],
            unknown_genes=list(last.unknown_genes),
            genes_of_one_site=rounds.genes_of_one_site(last.vocabulary, sites),
            plan=[
                {"phase": phase, "rounds": training.rounds}
                for phase, training in self.study.phases.items()
            ],
            resumed_from=found.name if found else None,
            epsilon=central_noise.spent(self.study, last.phase, last.round),
        )
        self._catch_up(last)
        place = (last.vocabulary, last.standardisation)
        if judging is not None:
            for gap in public_cohort.gaps(self.study, judging):
                logger.warning("hold-out: %s", gap)
            self.holdout = to_patients(judging, *place)
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
        unjudged: dict[str, str] = {}
        if self.holdout is not None:
            try:
                self._evaluate(last, self.holdout)
            except Exception as error:  # the model is finished all the same
                logger.exception("the finished model is not judged")
                unjudged["holdout_reason"] = f"{type(error).__name__}: {error}"
        self.journal.write(
            "run-finished",
            **unjudged,
            checkpoint=_name(self.study, last),
            peak_rss_mb=resident_mb("VmHWM"),
        )

    def _begins_on_public(self, last: Checkpoint) -> bool:
        """Return whether a later phase begins with training on the public cohort."""
        order = list(self.study.phases)
        n_started = order.index(last.phase) + (last.round > 0)
        to_come = set(order[n_started:]) - {PRETRAINING}
        return self.study.public.epochs > 0 and bool(to_come)

    def _reopened(self, last: Checkpoint) -> Checkpoint:
        """Verify that a checkpoint belongs to this run, and return it."""
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
        """Run one round, evaluate its model, and write checkpoint and journal."""
        failpoints.reach("server.before_round")
        started, study = time.monotonic(), self.study
        known = self.public if number == 1 else None
        initial_state = federation.begin_phase(study, phase, last.parameters, known)
        sent = tasks.download_state(study, phase, initial_state)
        incoming = federation.global_parameters(study, phase, initial_state)
        request = Request(
            type=keys.TRAIN,
            message=lambda: TrainRequest(
                study=study,
                vocabulary=last.vocabulary,
                standardisation=last.standardisation,
                model=to_record(sent),
                round=Round(phase=phase, number=number),
            ),
            group=f"{phase}-{number}",
            phase=phase,
            round=number,
            most_bytes=rounds.reply_bytes(incoming),
        )
        train = self._plain if study.secure_aggregation is None else self._secure
        outcome, aggregate = train(sites, request, incoming)

        def next_model(of: RoundOutcome) -> Checkpoint:
            with np.errstate(over="ignore", invalid="ignore"):  # `_finite` looks
                return federation.next_model(
                    last, initial_state, phase, number, lambda *g: aggregate(of, *g)
                )

        outcome, new = self._finite(outcome, next_model, request.group)
        new = new.with_contributors(
            {s.name: s.n_patients for s in sites if outcome.sites[s.name].contributed}
        )
        shutil.rmtree(self.spool, ignore_errors=True)
        failpoints.reach("server.combined")
        receipt = receipts.make(
            last, new, outcome, self.participants, parameters_digest(sent)
        )
        return self._commit(new, receipt, outcome, started)

    def _finite(
        self,
        outcome: RoundOutcome,
        next_model: Callable[[RoundOutcome], Checkpoint],
        group: str,
    ) -> tuple[RoundOutcome, Checkpoint]:
        """Return the round's model, without updates that overflow by themselves.

        Raises
        ------
        FederationError
            If a number of the model is not finite and no site is the cause, or the
            others are no quorum.
        """
        new = next_model(outcome)
        if _is_finite(new):
            return outcome, new
        reason = "its update makes the next model overflow"
        failed = SiteOutcome(state="quarantined", reason=reason)
        bad = {
            update.site: failed
            for update in outcome.updates
            if not _is_finite(
                next_model(dataclasses.replace(outcome, updates=[update]))
            )
        }
        kept = dataclasses.replace(
            outcome,
            updates=[update for update in outcome.updates if update.site not in bad],
            sites={**outcome.sites, **bad},
        )
        rounds.require_quorum(kept.sites, self.study.rounds, group)
        new = next_model(kept)
        if not _is_finite(new):
            raise FederationError(
                f"{group}: the next model holds NaN or infinity, and no single update "
                "is the cause. Nothing was written; lower the study's learning rates, "
                "or resume from the last checkpoint with fewer sites."
            )
        return kept, new

    def _plain(
        self, sites: list[Site], request: Request, global_parameters: Parameters
    ) -> tuple[RoundOutcome, Combine]:
        """Request training, and aggregate the sites' updates."""
        outcome = rounds.train_round(
            self.channel,
            sites,
            request,
            global_parameters,
            self.study,
            absent=self.absent,
            spool_dir=self.spool,
        )
        rule, noise = self.study.strategy, self.study.privacy.site

        def aggregate(
            outcome: RoundOutcome, global_parameters: Parameters, state: Arrays
        ) -> Combined:
            updates = outcome.updates
            return combine(
                rule, global_parameters, updates, request.round, state, noise
            )

        return outcome, aggregate

    def _secure(
        self, sites: list[Site], request: Request, global_parameters: Parameters
    ) -> tuple[RoundOutcome, Combine]:
        """Request training, and aggregate from the securely summed updates."""
        outcome, mean = secure_rounds.train_round(
            self.channel,
            sites,
            request,
            global_parameters,
            self.study,
            absent=self.absent,
            folder=self.settings.run_dir / "secure",
        )
        rule, noise = self.study.strategy, self.study.privacy.site
        n = sum(site.contributed for site in outcome.sites.values())

        def aggregate(
            outcome: RoundOutcome, global_parameters: Parameters, state: Arrays
        ) -> Combined:
            return step(rule, global_parameters, mean, n, request.round, state, noise)

        return outcome, aggregate

    def _unlike_from(self, new: Checkpoint) -> float | None:
        """Return the run's threshold of unlikeness; the factor model is fixed."""
        known: float | None = new.metrics.get("unlike_from")
        if self.holdout is None or known is not None:
            return known
        return evaluation.unlike_from(self.study, dict(new.parameters), self.holdout)

    def _commit(
        self,
        new: Checkpoint,
        receipt: Signed,
        outcome: RoundOutcome,
        started: float,
    ) -> Checkpoint:
        """Evaluate the new model, and store it with its receipt."""
        holdout: dict[str, Any] = {}
        unjudged: dict[str, str] = {}
        unlike_from: float | None = None
        if self.holdout is not None:
            try:
                holdout = evaluation.evaluate_round(
                    self.study, new.phase, dict(new.parameters), self.holdout
                )
                unlike_from = self._unlike_from(new)
            except Exception as error:  # what hospitals trained is not lost for it
                logger.exception("%s %d is not judged", new.phase, new.round)
                unjudged["holdout_reason"] = f"{type(error).__name__}: {error}"
        metrics = {
            "phase": new.phase,
            "round": new.round,
            "rounds": self.study.phases[new.phase].rounds,
            "train_loss": _mean(outcome.sites, "train_loss"),
            "judged_loss": _mean(outcome.sites, "pre_training_loss"),
            "sites": {name: each.to_json() for name, each in outcome.sites.items()},
            "holdout": holdout,
            **unjudged,
            "unlike_from": unlike_from,
            "epsilon": central_noise.spent(self.study, new.phase, new.round),
            "bytes_up": outcome.bytes_up,
            "bytes_down": outcome.bytes_down,
        }
        new = dataclasses.replace(new, metrics=metrics, receipt=receipt.to_json())
        folder = self.checkpoints / _name(self.study, new)
        checkpoint.save(new, folder, new.receipt)
        # Not of refusals: with a log that was cut, a site refuses too.
        answered = {
            name: signed
            for name, signed in outcome.signed.items()
            if outcome.sites[name].state != "refused"
        }
        self.participants.committed(receipt, answered)
        self.journal.write(
            "round",
            **metrics,
            seconds=time.monotonic() - started,
            seconds_sites=outcome.seconds,
        )
        return new

    def _catch_up(self, last: Checkpoint) -> None:
        """Write the last round's journal line, if the run was killed before it."""
        written = [e for e in read(self.journal.path) if e["event"] == "round"]
        at = {(e["phase"], e["round"]) for e in written}
        if last.round and (last.phase, last.round) not in at:
            self.journal.write(
                "round", **last.metrics, seconds=None, seconds_sites=None
            )

    def _evaluate(self, last: Checkpoint, holdout: Patients) -> None:
        """Evaluate the finished model and the linear references on the hold-out."""
        study, n_genes = self.study, len(last.vocabulary)
        path = self.settings.run_dir / "covariance.safetensors"
        covariance = load_file(path)["covariance"] if path.exists() else None
        imputers = evaluation.linear_references(covariance, n_genes)
        imputers["model"] = evaluation.model_imputer(study, last.parameters, n_genes)
        results: dict[str, Any] = {"imputation": {}, "per_gene": {}}
        for name, imputer in imputers.items():
            scores = evaluation.evaluate_imputer(
                imputer, holdout, study.evaluation, study.seed
            )
            results["imputation"][name] = evaluation.as_numbers(scores)
            results["per_gene"][name] = {
                key: {
                    "mse": _numbers(score.gene_mse),
                    "pearson": _numbers(score.gene_pearson),
                }
                for key, score in scores.get("mcar", {}).items()
            }
        content = json.dumps(results, sort_keys=True).encode()
        write_atomic(self.settings.run_dir / "judgement.json", content, mode=0o644)


def _is_finite(model: Checkpoint) -> bool:
    """Whether every number of parameters and optimiser is finite."""
    arrays = (*model.parameters.values(), *model.server.values())
    return all(np.isfinite(array).all() for array in arrays)


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

    Weighted by patients, unless a site withholds their number; None without a report.
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
