"""A whole federation as a loop in this process: many small ones in little time.

The sites' own rounds (`local_training`) and the server's own sums (`strategy.combine`),
without engine, messages, journal and checkpoints. Everybody answers every round.
Secure aggregation is left out, since it changes no sum. For what trains many of them:
patients as a split left them, and processes side by side.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedgex.client.data.cohort import load_cohort
from fedgex.client.local_training import train_round
from fedgex.client.settings import SiteSettings
from fedgex.common import memory, tasks
from fedgex.common import start as linear_start
from fedgex.common.cohort import Cohort
from fedgex.common.harmonise import Patients, to_patients
from fedgex.common.phases import take_part
from fedgex.common.processes import end_with_parent
from fedgex.common.statistics import (
    CrossProducts,
    GeneMoments,
    Standardisation,
    by_type,
    pool,
)
from fedgex.common.study import PRETRAINING, Study
from fedgex.common.tasks import Parameters
from fedgex.common.vocabulary import Vocabulary, agree
from fedgex.server import public_start
from fedgex.server.public import well_known
from fedgex.server.strategy import Update, combine

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What all sites know before the first round."""

    vocabulary: Vocabulary
    standardisation: Standardisation
    parameters: Parameters
    public: Patients | None
    """The server's own patients, standardised."""


def read(folder: Path, study: Study) -> Cohort:
    """Read and check the patients in a folder of a split, the first sample of each."""
    settings = SiteSettings.load(folder / "site.toml")
    cohort, _ = load_cohort(settings, study.scale, tuple(study.phases))
    _, first = np.unique(np.asarray(cohort.patients), return_index=True)
    return take(cohort, np.sort(first))


def take(cohort: Cohort, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Cohort:
    """Return some of a cohort's samples."""
    return dataclasses.replace(
        cohort,
        patients=tuple(np.asarray(cohort.patients)[rows]),
        expression=cohort.expression[rows],
        clinical=cohort.clinical.iloc[rows],
    )


def joined(cohorts: Sequence[Cohort]) -> Cohort:
    """Return the samples of all cohorts as one, on the genes that any has."""
    genes = tuple(sorted({gene for cohort in cohorts for gene in cohort.genes}))
    on_genes = Vocabulary(genes)
    return Cohort(
        patients=tuple(p for cohort in cohorts for p in cohort.patients),
        genes=genes,
        expression=np.concatenate(
            [on_genes.place(cohort.genes, cohort.expression) for cohort in cohorts]
        ),
        clinical=pd.concat([cohort.clinical for cohort in cohorts], ignore_index=True),
    )


def shortened(study: Study, rounds: int | None) -> Study:
    """Return the study with at most so many rounds a phase, which is another.

    Parameters
    ----------
    rounds
        None: as many as the study has.
    """
    if rounds is None:
        return study
    fewer = {
        phase: settings.model_copy(update={"rounds": min(settings.rounds, rounds)})
        for phase, settings in study.phases.items()
    }
    return study.model_copy(update=fewer)


def vocabulary(
    study: Study, sites: Mapping[str, Cohort], public: Cohort | None
) -> Vocabulary:
    """Return the study's genes, or those that the sites agree on.

    Parameters
    ----------
    public
        The server's own patients; where the study takes its statistics from them, no
        other genes count than theirs.
    """
    rule = study.vocabulary
    if rule.genes:
        return Vocabulary(tuple(sorted(rule.genes)))
    panels: dict[str, list[str]] = {}
    for name, cohort in sites.items():
        counts = (~np.isnan(cohort.expression)).sum(axis=0)
        enough = rule.min_patient_share * len(cohort.patients)
        least = max(study.minimum_cohort, enough)
        panels[name] = [
            gene for gene, n in zip(cohort.genes, counts, strict=True) if n >= least
        ]
    if public is not None and study.public.statistics:
        known = well_known(public, rule.min_patient_share)
        panels = {
            name: [g for g in genes if g in known] for name, genes in panels.items()
        }
    return agree(panels, rule.min_share)


def start(
    study: Study,
    genes: Vocabulary,
    sites: Mapping[str, Cohort],
    public: Cohort | None,
    scale: Standardisation | None = None,
) -> Start:
    """Return genes, their scale and the first parameters.

    Parameters
    ----------
    sites
        Patients who train, by site.
    public
        The server's own patients; for studies that take something from these.
    scale
        Of the genes; None: that of the sites, or of the public patients.
    """
    groups = None
    if public is not None and study.public.statistics:
        scale = public_start.standardisation(public, genes)
        groups = public_start.cross_products(study, public, genes, scale)
    else:
        scale = scale or standardisation(study, genes, sites)
        if study.linear_rank:
            patients_of = [to_patients(c, genes, scale) for c in sites.values()]
            groups = linear_start.pool_completed(
                lambda: (_by_type(study, patients) for patients in patients_of),
                study.linear_types,
                study.linear_rank,
            )
    whole = tasks.initial(study, len(genes))
    if groups is not None and study.linear_rank:
        whole |= tasks.linear_start(study, groups)
    patients = None if public is None else to_patients(public, genes, scale)
    if patients is not None and study.public.epochs:
        whole = public_start.fit_phase(study, PRETRAINING, patients, whole)
    return Start(
        vocabulary=genes, standardisation=scale, parameters=whole, public=patients
    )


def standardisation(
    study: Study, genes: Vocabulary, sites: Mapping[str, Cohort]
) -> Standardisation:
    """Return the scale of the genes that the sites agree on."""
    raw = Standardisation(mean=np.zeros(len(genes)), sd=np.ones(len(genes)))
    moments = pool(
        GeneMoments.of(to_patients(cohort, genes, raw).values.numpy()).suppressed(
            study.minimum_cohort
        )
        for cohort in sites.values()
    )
    return Standardisation(mean=moments.mean, sd=moments.sd)


def federate(
    study: Study,
    begun: Start,
    sites: Mapping[str, Patients],
    *,
    without: Collection[str] = (),
) -> dict[str, NDArray[np.float32]]:
    """Train every phase over all sites and return the whole model.

    A site with fewer patients than the study's minimum for a phase sits it out, and a
    phase that no site can train is left out.

    Parameters
    ----------
    without
        Phases to leave out.
    """
    whole = dict(begun.parameters)
    with tempfile.TemporaryDirectory(prefix="fedgex-") as temporary:
        folder = Path(temporary)
        for phase, settings in study.phases.items():
            if phase in without:
                continue
            able = {
                name: patients
                for name, patients in sorted(sites.items())
                if len(take_part(study, phase, patients)) >= study.minimum_cohort
            }
            if not able:
                continue
            whole = public_start.begin(study, phase, whole, begun.public)
            memory: Mapping[str, NDArray[np.generic]] = {}
            for number in range(1, settings.rounds + 1):
                incoming = tasks.updated(study, phase, tasks.sent(study, phase, whole))
                updates = [
                    _update(study, phase, number, name, patients, whole, folder)
                    for name, patients in able.items()
                ]
                combined, memory = combine(
                    study.strategy,
                    incoming,
                    updates,
                    number,
                    memory,
                    study.privacy.site,
                )
                whole |= combined
    return whole


def each_done(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with its result as soon as it is done.

    Parameters
    ----------
    work
        Run in processes of its own, so that it has to be pickled; in this one if there
        is one worker.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job)
        return
    with processes(workers) as pool:
        running = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(running):
            yield running[future], future.result()


def processes(workers: int) -> ProcessPoolExecutor:
    """Return processes of one thread each, which end with this one."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, _begin, (os.getpid(),))


def _begin(parent: int) -> None:
    end_with_parent(parent)
    torch.set_num_threads(1)
    memory.keep_freed()


def _update(
    study: Study,
    phase: str,
    number: int,
    name: str,
    patients: Patients,
    whole: Parameters,
    folder: Path,
) -> Update:
    result = train_round(
        study,
        phase,
        number,
        patients,
        tasks.sent(study, phase, whole),
        site=name,
        floor=study.minimum_cohort,
        state_dir=folder / name,
    )
    path = folder / f"{name}.safetensors"
    save_file(dict(result.update), path)
    report = result.report  # none under privacy
    return Update(
        site=name,
        path=path,
        num_examples=None if report is None else report.num_examples,
        num_loss_terms=None if report is None else report.num_loss_terms,
        measured=patients.measured.any(dim=0).numpy(),
    )


def _by_type(study: Study, patients: Patients) -> dict[str, CrossProducts]:
    values, types = patients.values.numpy(), patients.cancer_type
    return by_type(values, types, study.linear_types, study.minimum_cohort)
