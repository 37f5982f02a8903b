"""A whole federation as a loop in this process: many small ones in little time.

The sites' own rounds (`local_training`) and the server's own sums (`strategy.combine`),
without engine, messages, journal and checkpoints. Everybody answers every round.
Secure aggregation is left out, since it changes no sum.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedgex.client.local_training import train_round
from fedgex.common import tasks
from fedgex.common.cohort import Cohort
from fedgex.common.harmonise import Patients, to_patients
from fedgex.common.phases import take_part
from fedgex.common.statistics import (
    CrossProducts,
    GeneMoments,
    Standardisation,
    pool,
)
from fedgex.common.study import PRETRAINING, Study
from fedgex.common.tasks import Parameters
from fedgex.common.vocabulary import Vocabulary, agree
from fedgex.server import public_start
from fedgex.server.strategy import Update, combine


@dataclass(frozen=True, kw_only=True)
class Start:
    """What all sites know before the first round."""

    vocabulary: Vocabulary
    standardisation: Standardisation
    parameters: Parameters
    public: Patients | None
    """The server's own patients, standardised."""


def vocabulary(study: Study, sites: Mapping[str, Cohort]) -> Vocabulary:
    """Return the study's genes, or those that the sites agree on."""
    rule = study.vocabulary
    if rule.genes:
        return Vocabulary(tuple(sorted(rule.genes)))
    panels = {}
    for name, cohort in sites.items():
        known = (~np.isnan(cohort.expression)).sum(axis=0)
        enough = rule.min_patient_share * len(cohort.patients)
        least = max(study.minimum_cohort, enough)
        panels[name] = [
            gene for gene, n in zip(cohort.genes, known, strict=True) if n >= least
        ]
    return agree(panels, rule.min_share)


def start(
    study: Study,
    genes: Vocabulary,
    sites: Mapping[str, Cohort],
    public: Cohort | None,
) -> Start:
    """Return genes, their scale and the first parameters.

    Parameters
    ----------
    sites
        Patients who train, by site.
    public
        The server's own patients; for studies that take something from these.
    """
    covariance = None
    if public is not None and study.public.statistics:
        scale = public_start.standardisation(public, genes)
        covariance = public_start.covariance(public, genes, scale)
    else:
        raw = Standardisation(mean=np.zeros(len(genes)), sd=np.ones(len(genes)))
        moments = pool(
            GeneMoments.of(_values(cohort, genes, raw)).suppressed(study.minimum_cohort)
            for cohort in sites.values()
        )
        scale = Standardisation(mean=moments.mean, sd=moments.sd)
        if study.linear_rank:
            products = pool(
                CrossProducts.of(_values(cohort, genes, scale)).suppressed(
                    study.minimum_cohort
                )
                for cohort in sites.values()
            )
            covariance = products.covariance()
    whole = tasks.initial(study, len(genes))
    if covariance is not None:
        whole |= tasks.linear_start(study, covariance)
    patients = None if public is None else to_patients(public, genes, scale)
    if patients is not None and study.public.epochs:
        whole = public_start.fit_phase(study, PRETRAINING, patients, whole)
    return Start(
        vocabulary=genes, standardisation=scale, parameters=whole, public=patients
    )


def federate(
    study: Study, begun: Start, sites: Mapping[str, Patients]
) -> dict[str, NDArray[np.float32]]:
    """Train every phase over all sites and return the whole model.

    A site with fewer patients than the study's minimum for a phase sits it out, and a
    phase that no site can train is left out.
    """
    whole = dict(begun.parameters)
    with tempfile.TemporaryDirectory(prefix="fedgex-") as temporary:
        folder = Path(temporary)
        for phase, settings in study.phases.items():
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


def _values(
    cohort: Cohort, genes: Vocabulary, scale: Standardisation
) -> NDArray[np.float32]:
    values: NDArray[np.float32] = to_patients(cohort, genes, scale).values.numpy()
    return values
