"""Compute a site's reply to each request of a study, within its policy.

Small cells are suppressed below the stricter `minimum_cohort` of study and site. A
number that the policy does not permit is None in the reply and listed as withheld.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedgex.client.ledger import debit, released_sums
from fedgex.client.ledger.released_sums import People
from fedgex.client.settings import SiteSettings
from fedgex.client.training import local_round, standardisation
from fedgex.client.training import panel as site_panel
from fedgex.common import federation, keys
from fedgex.common.codes import Code
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import to_patients
from fedgex.common.data.genes import spelt_as
from fedgex.common.data.scales import Scale
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError, DataError
from fedgex.common.ingestion.cohort import assay, read_cohort
from fedgex.common.ingestion.expression import known_genes
from fedgex.common.messages.codec import Fields
from fedgex.common.messages.fields import CohortSize, Introduction, TrainingMetrics
from fedgex.common.messages.replies import (
    CrossProductsReply,
    PrepareReply,
    StatisticsReply,
    TrainReply,
)
from fedgex.common.messages.requests import (
    CrossProductsRequest,
    KeysRequest,
    PrepareRequest,
    StatisticsRequest,
    TrainRequest,
)
from fedgex.common.study import Study
from fedgex.common.transport.records import floats, to_arrays, to_record

GOVERNED_BY = {
    keys.NUM_EXAMPLES: keys.NUM_PATIENTS,
    keys.NUM_LOSS_TERMS: keys.NUM_PATIENTS,
}
"""The policy's metric for numbers that have none of their own name."""
OPTIONAL = (keys.NUM_PATIENTS, *TrainingMetrics.keys())
"""Numbers that a policy may withhold."""

Numbers = TypeVar("Numbers", bound=Fields)


def introduce(request: PrepareRequest, settings: SiteSettings) -> PrepareReply:
    """Report name, panel and number of patients.

    A gene observed in fewer samples than the small-cell threshold, or than the study's
    share of them, counts as not measured. Under patient-level privacy every column of
    the study's genes counts as measured, and patients are not counted. Labels that are
    neither known genes nor the study's do not leave.

    When a restarted server asks again, the panel must be that of the run's start.
    """
    study = request.study
    cohort = _cohort(settings, study)
    run = "" if request.run is None else request.run.run
    before = site_panel.read_panel(_state_dir(settings, study))
    if run and before is not None and before.run == run:
        _refuse_drift(settings, study, cohort)
    scale = settings.data.scale.value
    if study.privacy.patient is None:
        reported = federation.observed_genes(
            cohort,
            min_count=_min_cell_count(settings, study),
            min_share=study.vocabulary.min_patient_share,
        )
        reported = known_genes(reported, settings.data, study.vocabulary.genes)
        panel = site_panel.Panel(scale, cohort.genes, reported, run)
    else:
        asked = set(study.vocabulary.genes)
        assayed = spelt_as(assay(settings.data), asked)
        reported = tuple(g for g in assayed if not asked or g in asked)
        reported = known_genes(reported, settings.data, study.vocabulary.genes)
        panel = site_panel.Panel(scale, assayed, reported, run)
    site_panel.remember_panel(_state_dir(settings, study), panel)
    introduction = Introduction(
        name=settings.name,
        version=version("fedgex"),
        genes=reported,
        shares_cross_products=settings.policy.share_cross_products,
        num_patients=cohort.n_patients,
    )
    return PrepareReply(site=_permitted(introduction, settings, study))


def moments(request: StatisticsRequest, settings: SiteSettings) -> StatisticsReply:
    """Return count, sum and sum of squares of each gene of the vocabulary.

    A gene measured in fewer patients than the small-cell threshold is suppressed. In a
    simulation, where nothing leaves, sums are not compared with those of other runs.
    """
    study = request.study
    _refuse_sums(study)
    cohort, least = _cohort(settings, study), _min_cell_count(settings, study)
    if request.run is None:
        sums = federation.gene_moments(cohort, request.vocabulary, least)
    else:
        people = _people(settings, study, cohort, request.vocabulary)
        sums = released_sums.moments(people, settings.state_dir, least)
    size = CohortSize(num_patients=sums.n_patients)
    return StatisticsReply(sums=sums, metrics=_permitted(size, settings, study))


def cross_products(
    request: CrossProductsRequest, settings: SiteSettings
) -> CrossProductsReply:
    """Return cross-products by cancer type of the study, other types pooled.

    Raises
    ------
    ConfigError
        If the policy does not permit them.
    """
    study = request.study
    _refuse_sums(study)
    if not settings.policy.share_cross_products:
        raise ConfigError(
            "the study asks for cross-products, which expose the row space of a small "
            "site; set share_cross_products = true in policy.toml to permit them."
        )
    cohort = _cohort(settings, study)
    _accept(request, settings, cohort)
    least, scale = _min_cell_count(settings, study), request.standardisation
    if request.run is None:
        patients = to_patients(cohort, request.vocabulary)
        products = federation.cross_products(study, patients, least, scale)
    else:
        people = _people(settings, study, cohort, request.vocabulary)
        products = released_sums.products(
            people, settings.state_dir, least, study.linear_types, scale
        )
    return CrossProductsReply(products=products)


def train(request: TrainRequest, settings: SiteSettings) -> TrainReply:
    """Evaluate the global model on the site's patients, and train it for one round.

    Under patient-level privacy the round is debited before it is computed, and after
    all that can be refused was checked.
    """
    started, study, order = time.monotonic(), request.study, request.round
    cohort = _unchanged_cohort(settings, study)
    _accept(request, settings, cohort)
    local_round.refuse_large_delta(study, cohort.n_patients)
    result = local_round.train_round(
        study,
        order.phase,
        order.number,
        to_patients(cohort, request.vocabulary, request.standardisation),
        floats(to_arrays(request.model)),
        site=settings.name,
        min_cell_count=_min_cell_count(settings, study),
        state_dir=_state_dir(settings, study) / _run_name(request),
        charge=partial(debit.charge, request, settings, cohort.patients),
    )
    report = result.report
    metrics = TrainingMetrics(
        num_examples=None if report is None else report.num_examples,
        num_loss_terms=None if report is None else report.num_loss_terms,
        train_loss=None if report is None else report.train_loss,
        pre_training_loss=result.pre_training_loss,
        seconds=time.monotonic() - started,
    )
    return TrainReply(
        update=to_record(result.update), metrics=_permitted(metrics, settings, study)
    )


def reported_genes(request: KeysRequest, settings: SiteSettings) -> NDArray[np.bool_]:
    """Return the mask of vocabulary genes that the site reported, shape (V,).

    Raises
    ------
    ConfigError, DataError
        If the site cannot take part in the round.
    """
    study, vocabulary = request.study, request.vocabulary
    cohort = _unchanged_cohort(settings, study)
    _accept(request, settings, cohort)
    patients = to_patients(cohort, vocabulary)
    local_round.require_min_patients(
        study, request.round.phase, patients, _min_cell_count(settings, study)
    )
    panel = site_panel.read_panel(_state_dir(settings, study))
    return np.isin(vocabulary.genes, () if panel is None else panel.reported)


def _accept(
    request: CrossProductsRequest, settings: SiteSettings, cohort: Cohort
) -> None:
    own = federation.gene_moments(
        cohort, request.vocabulary, _min_cell_count(settings, request.study)
    )
    standardisation.accept(request, settings, own)


def _people(
    settings: SiteSettings, study: Study, cohort: Cohort, vocabulary: Vocabulary
) -> People:
    """Return today's patients, to be compared with those behind earlier sums."""
    first = cohort.first_samples()
    patients = to_patients(cohort, vocabulary)
    filed = _cohort(settings, study, settings.data.scale)
    return People(
        patients=[cohort.keys[row] for row in first],
        values=patients.values.numpy(),
        as_filed=vocabulary.place(filed.genes, filed.expression[first]),
        genes=vocabulary.genes,
        scale=study.scale.value,
        cancer_type=patients.cancer_type,
    )


def _permitted(numbers: Numbers, settings: SiteSettings, study: Study) -> Numbers:
    """Withhold what the policy does not permit; all numbers under patient privacy."""
    metrics = () if study.privacy.patient is not None else settings.policy.metrics
    withheld = [key for key in OPTIONAL if GOVERNED_BY.get(key, key) not in metrics]
    values = {k: v for k, v in numbers.encode().items() if k not in withheld}
    return numbers.decode(values)


def _refuse_sums(study: Study) -> None:
    """Refuse sums over patients under patient-level privacy: they carry no noise."""
    if study.privacy.patient is not None:
        raise ConfigError(
            "the study promises patient-level privacy, and sums over patients were "
            "asked for; its means and standard deviations come from the public cohort."
        )


def _refuse_drift(settings: SiteSettings, study: Study, cohort: Cohort) -> None:
    """Refuse data that differ from what `introduce` reported."""
    panel = site_panel.read_panel(_state_dir(settings, study))
    genes = set(cohort.genes)
    if panel is not None and study.privacy.patient is not None:
        genes |= set(panel.reported)  # whether they have values depends on patients
    if panel is None or panel.holds(settings.data.scale.value, genes):
        return
    raise DataError(
        [
            Code.PANEL_CHANGED.finding(
                where=settings.data.expression.name,
                found="other genes, or another scale, than when the run began",
                expected="the same columns and data.scale until the run ends",
                action="Put the file back; a new export is for the next run.",
            )
        ]
    )


def _min_cell_count(settings: SiteSettings, study: Study) -> int:
    """Return the small-cell threshold: the stricter of site and study."""
    return max(settings.policy.minimum_cohort, study.minimum_cohort)


def _state_dir(settings: SiteSettings, study: Study) -> Path:
    return settings.state_dir / study.hash[:16]


def _run_name(request: TrainRequest) -> str:
    """Return the run's name; empty in a simulation, which has none."""
    return "" if request.run is None else request.run.run


def _unchanged_cohort(settings: SiteSettings, study: Study) -> Cohort:
    cohort = _cohort(settings, study)
    _refuse_drift(settings, study, cohort)
    return cohort


def _cohort(settings: SiteSettings, study: Study, scale: Scale | None = None) -> Cohort:
    """Return the site's patients; scale: None for the study's."""
    tasks = tuple(task for task in study.phases if task in settings.policy.tasks)
    data = settings.data
    named = [value for _, value in data if isinstance(value, Path)]
    changed = tuple(p.stat().st_mtime_ns if p.exists() else None for p in named)
    cohort = _read(settings, scale or study.scale, tasks, changed)
    return replace(cohort, genes=spelt_as(cohort.genes, study.vocabulary.genes))


@lru_cache(maxsize=256)
def _read(
    settings: SiteSettings,
    scale: Scale,
    tasks: tuple[str, ...],
    changed: tuple[int | None, ...],
) -> Cohort:
    """Read and check a site's files; cached until they change."""
    return read_cohort(settings.data, settings.policy.minimum_cohort, scale, tasks)[0]
