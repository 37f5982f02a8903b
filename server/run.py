"""One study from the first message to the last checkpoint.

    who is here -> which genes -> their moments -> (cross-products) -> rounds of each
    phase -> judgement

After every round the model is judged on the hold-out and a checkpoint written. A run
that was killed goes on from its last checkpoint and ends in the same bits, because
sites and server derive every seed from the names of study, site, phase and round.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import logging
import operator
import re
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fedgex.common import checkpoint, keys, tasks
from fedgex.common.checkpoint import Checkpoint
from fedgex.common.cohort import load_cohort
from fedgex.common.errors import CheckpointError, FederationError, UpdateError
from fedgex.common.harmonise import Patients, to_patients
from fedgex.common.memory import resident_mb
from fedgex.common.records import text, to_arrays, to_record
from fedgex.common.statistics import (
    CrossProducts,
    GeneMoments,
    Standardisation,
    pool,
    unpack,
)
from fedgex.common.study import NAME_PATTERN, Study
from fedgex.common.vocabulary import Vocabulary, agree
from fedgex.server import evaluation, rounds
from fedgex.server.journal import Journal, read
from fedgex.server.rounds import Answer, Site
from fedgex.server.settings import ServerSettings
from fedgex.server.strategy import combine

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")

MIN_CROSS_PRODUCT_SITES = 2
"""With fewer, the covariance that everyone receives would be one site's own."""


def conduct(grid: Grid, settings: ServerSettings) -> None:
    """Begin a run, or go on with it, and bring it to its end.

    Raises
    ------
    FederationError
        If too few sites come, a round misses its quorum, or another process conducts
        the run.
    CheckpointError
        If the run's folder belongs to another study.
    """
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with (settings.run_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FederationError(
                f"another process conducts the run in {settings.run_dir}; wait for it, "
                "or stop it."
            ) from error
        journal = Journal(settings.run_dir / "journal.jsonl")
        try:
            _Run(grid, settings, journal).conduct()
        except Exception as error:
            journal.write("run-failed", reason=str(error))
            raise


class _Run:
    """The state that the steps of a run share."""

    def __init__(self, grid: Grid, settings: ServerSettings, journal: Journal) -> None:
        self.grid, self.settings, self.journal = grid, settings, journal
        self.study = settings.read_study()
        self.checkpoints = settings.run_dir / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self.holdout: Patients | None = None

    def conduct(self) -> None:
        answers = self._gather()
        found = checkpoint.latest(self.checkpoints)
        last = checkpoint.load(found) if found else self._begin(answers)
        if last.study.hash != self.study.hash:
            raise CheckpointError(
                f"{self.checkpoints} belongs to study {last.study.hash[:12]}, this is "
                f"{self.study.hash[:12]}; choose another folder, or the same study."
            )
        sites = _sites(answers, last.vocabulary)
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
        )
        self._catch_up(last)
        if self.settings.holdout is not None:
            self.holdout = to_patients(
                load_cohort(self.settings.holdout),
                last.vocabulary,
                last.standardisation,
            )
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

    # ---- before the first round ----

    def _gather(self) -> dict[str, tuple[int, Mapping[str, Any]]]:
        """Wait for the sites, and ask each who it is: name -> (node, what it said)."""
        end = time.monotonic() + self.settings.start_deadline_s
        nodes = list(self.grid.get_node_ids())
        while len(nodes) < self.settings.n_sites and time.monotonic() < end:
            time.sleep(self.settings.poll_s)
            nodes = list(self.grid.get_node_ids())
        present: dict[str, tuple[int, Mapping[str, Any]]] = {}
        for answer in self._ask(sorted(nodes), RecordDict(), keys.PREPARE):
            if answer.content is None:
                self._report(f"node {answer.node}", answer)
                continue
            try:
                name, said = _introduction(answer.content, self.study.minimum_cohort)
            except (KeyError, UpdateError) as error:
                reason = f"the reply cannot be used: {error}"
                bad = Answer(node=answer.node, state="quarantined", reason=reason)
                self._report(f"node {answer.node}", bad)
                continue
            if name in present:
                raise FederationError(
                    f'two nodes call themselves "{name}"; give each site its own name.'
                )
            present[name] = (answer.node, said)
        needed = max(self.study.rounds.quorum, 1)
        if len(present) < needed:
            raise FederationError(
                f"{len(present)} of {self.settings.n_sites} sites are ready, the "
                f"quorum is {needed}; the journal says who refused and why."
            )
        return dict(sorted(present.items()))

    def _begin(self, answers: dict[str, tuple[int, Mapping[str, Any]]]) -> Checkpoint:
        """Agree on genes and standardisation, and write checkpoint 0."""
        panels = {name: list(said[keys.GENES]) for name, (_, said) in answers.items()}
        vocabulary = agree(panels, self.study.vocabulary.min_share)
        sites = _sites(answers, vocabulary)
        genes = RecordDict({keys.VOCABULARY: _vocabulary_record(vocabulary)})
        moments = self._ask_sites(
            sites, genes, keys.STATISTICS, lambda a: _moments(a, len(vocabulary))
        )
        pooled = pool(moments.values())
        standardisation = Standardisation(mean=pooled.mean, sd=pooled.sd)
        parameters = tasks.initial(self.study, len(vocabulary))
        if self.study.cross_products:
            covariance = self._cross_products(sites, vocabulary, standardisation)
            parameters |= tasks.linear_start(self.study, covariance)
        start = Checkpoint(
            study=self.study,
            vocabulary=vocabulary,
            standardisation=standardisation,
            phase=next(iter(self.study.phases)),
            round=0,
            parameters=parameters,
            trained_on={
                "sites": [site.name for site in sites],
                "patients": sum(site.n_patients for site in sites),
            },
        )
        checkpoint.save(start, self.checkpoints / _name(self.study, start))
        return start

    def _cross_products(
        self, sites: list[Site], vocabulary: Vocabulary, scale: Standardisation
    ) -> NDArray[np.float64]:
        """Pool the cross-products of the sites that permit it; keep the covariance.

        Raises
        ------
        FederationError
            If fewer than two sites send them.
        """
        content = RecordDict(
            {
                keys.VOCABULARY: _vocabulary_record(vocabulary),
                keys.STANDARDISATION: _standardisation_record(scale),
            }
        )
        spool = self.settings.run_dir / "spool"

        def to_disk(answer: RecordDict) -> Path:
            arrays = to_arrays(answer.array_records[keys.PRODUCTS])
            _products(arrays, len(vocabulary))  # refused now, not when added up
            path = spool / f"{len(list(spool.iterdir()))}.safetensors"
            save_file(arrays, path)
            return path

        spool.mkdir(exist_ok=True)
        by_site = self._ask_sites(sites, content, keys.CROSS_PRODUCTS, to_disk)
        if len(by_site) < MIN_CROSS_PRODUCT_SITES:
            raise FederationError(
                f"the study asks for cross-products and {len(by_site)} sites sent "
                f"them, expected {MIN_CROSS_PRODUCT_SITES} or more, so that none "
                "stands alone; set share_cross_products = true at more sites, or "
                "cross_products = false in the study."
            )
        total = functools.reduce(
            operator.add,
            (_products(load_file(by_site[name]), len(vocabulary)) for name in by_site),
        )
        shutil.rmtree(spool)
        covariance = total.covariance()
        path = self.settings.run_dir / "covariance.safetensors"
        save_file({"covariance": covariance}, path)
        return covariance

    # ---- rounds ----

    def _round(
        self, sites: list[Site], last: Checkpoint, phase: str, number: int
    ) -> Checkpoint:
        """Run one round, judge its model, and write the checkpoint and the journal."""
        started = time.monotonic()
        study = self.study
        whole = tasks.begin(study, phase, last.parameters)
        sent = tasks.sent(study, phase, whole)
        incoming = tasks.updated(study, phase, sent)
        content = RecordDict(
            {
                keys.STUDY: _study_record(study),
                keys.VOCABULARY: _vocabulary_record(last.vocabulary),
                keys.STANDARDISATION: _standardisation_record(last.standardisation),
                keys.MODEL: to_record(sent),
                keys.ROUND: ConfigRecord({keys.PHASE: phase, keys.NUMBER: number}),
            }
        )
        spool = self.settings.run_dir / "spool"
        outcome = rounds.train_round(
            self.grid,
            sites,
            content,
            {name: array.shape for name, array in incoming.items()},
            study.rounds,
            floor=study.minimum_cohort,
            group=f"{phase}-{number}",
            spool_dir=spool,
            poll_s=self.settings.poll_s,
        )
        combined, server = combine(
            study.strategy,
            incoming,
            outcome.updates,
            number,
            last.server if last.phase == phase else {},
        )
        shutil.rmtree(spool)
        whole |= combined
        holdout: dict[str, Any] = {}
        if self.holdout is not None:
            holdout = evaluation.judge_round(study, phase, whole, self.holdout)
        metrics = {
            "phase": phase,
            "round": number,
            "rounds": study.phases[phase].rounds,
            "train_loss": _mean(outcome.sites, "train_loss"),
            "judged_loss": _mean(outcome.sites, "judged_loss"),
            "sites": outcome.sites,
            "holdout": holdout,
            "bytes_up": outcome.bytes_up,
            "bytes_down": outcome.bytes_down,
        }
        new = dataclasses.replace(
            last,
            phase=phase,
            round=number,
            parameters=whole,
            server=server,
            metrics=metrics,
        )
        checkpoint.save(new, self.checkpoints / _name(study, new))
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
        """Judge the finished model and the linear references on the whole hold-out."""
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
        text = json.dumps(judged, sort_keys=True)
        (self.settings.run_dir / "judgement.json").write_text(text)

    # ---- asking ----

    def _ask(
        self, nodes: list[int], content: RecordDict, message_type: str
    ) -> list[Answer]:
        content[keys.STUDY] = _study_record(self.study)
        return list(
            rounds.ask(
                self.grid,
                nodes,
                content,
                message_type,
                group=message_type,
                deadline_s=self.study.rounds.deadline_s,
                poll_s=self.settings.poll_s,
            )
        )

    def _ask_sites(
        self,
        sites: list[Site],
        content: RecordDict,
        message_type: str,
        parse: Callable[[RecordDict], Parsed],
    ) -> dict[str, Parsed]:
        """Return the sites' answers; those that gave none are in the journal."""
        names = {site.node: site.name for site in sites}
        parsed: dict[str, Parsed] = {}
        for answer in self._ask(list(names), content, message_type):
            name = names[answer.node]
            if answer.content is None:
                self._report(name, answer)
                continue
            try:
                parsed[name] = parse(answer.content)
            except (KeyError, UpdateError) as error:
                reason = f"the reply cannot be used: {error}"
                bad = Answer(node=answer.node, state="quarantined", reason=reason)
                self._report(name, bad)
        return dict(sorted(parsed.items()))

    def _report(self, who: str, answer: Answer) -> None:
        logger.warning("%s state=%s reason=%s", who, answer.state, answer.reason)
        self.journal.write(
            "not-answered", site=who, state=answer.state, reason=answer.reason
        )


def _introduction(answer: RecordDict, floor: int) -> tuple[str, ConfigRecord]:
    """Return a site's name, which names files too, and all that it said of itself."""
    said = answer.config_records[keys.SITE]
    name, patients, genes = (
        text(said, keys.NAME),
        said[keys.NUM_PATIENTS],
        said[keys.GENES],
    )
    if not re.fullmatch(NAME_PATTERN, name):
        raise UpdateError("its name is not of lower-case letters, digits and hyphens")
    if not isinstance(patients, int) or patients < floor:
        raise UpdateError(f"the site has fewer than {floor} patients")
    if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
        raise UpdateError("its genes are no list of names")
    return name, said


def _moments(answer: RecordDict, n_genes: int) -> GeneMoments:
    arrays = to_arrays(answer.array_records[keys.MOMENTS])
    counted = answer.metric_records[keys.METRICS][keys.NUM_PATIENTS]
    if not isinstance(counted, int):
        raise UpdateError(f'"{keys.NUM_PATIENTS}" is no whole number')
    counts = _whole(arrays["count"])
    if counts.shape != (n_genes,):
        raise UpdateError(f"moments of shape {counts.shape}, expected ({n_genes},)")
    return GeneMoments(
        count=counts,
        total=arrays["total"].astype(np.float64),
        square_total=arrays["square-total"].astype(np.float64),
        n_patients=counted,
    )


def _products(arrays: Mapping[str, NDArray[Any]], n_genes: int) -> CrossProducts:
    products = unpack(arrays["products"].astype(np.float64))
    if products.shape != (n_genes, n_genes):
        raise UpdateError(f"cross-products of {len(products)}, not of {n_genes} genes")
    counts = unpack(_whole(arrays["pair-counts"]))
    return CrossProducts(products=products, pair_counts=counts)


def _whole(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Return counts that are of an integer type, as int64."""
    if counts.dtype.kind not in "iu":
        raise UpdateError(f"counts are of type {counts.dtype}, expected whole numbers")
    return counts.astype(np.int64)


def _sites(
    answers: dict[str, tuple[int, Mapping[str, Any]]], vocabulary: Vocabulary
) -> list[Site]:
    sites = []
    for name, (node, said) in answers.items():
        genes = set(said[keys.GENES])
        measured = np.array([gene in genes for gene in vocabulary.genes])
        patients = int(said[keys.NUM_PATIENTS])
        sites.append(Site(name=name, node=node, measured=measured, n_patients=patients))
    return sites


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


def _study_record(study: Study) -> ConfigRecord:
    return ConfigRecord(
        {
            keys.JSON: study.to_json(),
            keys.HASH: study.hash,
            keys.VERSION: version("fedgex"),
        }
    )


def _vocabulary_record(vocabulary: Vocabulary) -> ConfigRecord:
    return ConfigRecord(
        {keys.GENES: list(vocabulary.genes), keys.HASH: vocabulary.hash}
    )


def _standardisation_record(scale: Standardisation) -> Any:
    return to_record({"mean": scale.mean, "sd": scale.sd})


def _mean(sites: Mapping[str, Mapping[str, Any]], key: str) -> float:
    """Return the mean of a number over the sites that contributed, by patients."""
    there = [site for site in sites.values() if site["state"] == "contributed"]
    weights = [site["num_examples"] for site in there]
    return float(np.average([site[key] for site in there], weights=weights))


def _numbers(values: NDArray[np.floating]) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]
