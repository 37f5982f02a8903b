"""The arithmetic of a federation, without messages, files or clocks.

    agree_vocabulary -> standardisation -> initial_model
    then, each round: begin_phase -> round_update at every site -> next_model

The server calls these functions with what sites sent, the simulator and notebooks with
patients of their own. What a site refuses by its policy, and who is asked again, is not
decided here. V genes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from numpy.typing import NDArray

from fedgex.common.arrays import Arrays, check, clipped, square_norm
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.cross_products import CrossProducts, by_type
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.moments import (
    FEWEST_TO_COMPARE,
    GeneMoments,
    Standardisation,
    foreign_scales,
    pool,
)
from fedgex.common.data.vocabulary import Vocabulary, agree, least_count
from fedgex.common.errors import ConfigError, UpdateError
from fedgex.common.models import losses, tasks, training
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.models.parameters import parameters
from fedgex.common.models.tasks import Parameters, PhaseModel
from fedgex.common.seeds import derive
from fedgex.common.study import PRETRAINING, SitePrivacy, Study

logger = logging.getLogger(__name__)

Array = NDArray[np.floating]
Aggregate = Callable[
    [Mapping[str, Array], Arrays],
    tuple[dict[str, Array], dict[str, NDArray[np.generic]]],
]
"""From the round's global parameters, and the optimiser's state, to the next ones."""

MIN_PUBLIC_PATIENTS = 30
"""Fewest public patients behind a mean, a sum or a head that is fitted."""
MAX_GENES_NAMED = 5
"""Genes that an error names; it counts the others."""
ROUNDING = 1e-3
"""Share by which a change may be longer than the clip: what rounding can add."""


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """A site's result of one round."""

    update: dict[str, NDArray[np.float32]]
    """Uploaded parameters, or their change."""
    report: training.FitReport | None
    """None under patient-level privacy: every number of it depends on patients."""
    pre_training_loss: float | None
    """Loss of the global parameters on the site's own patients, before training; None
    under patient-level privacy, or where it was not asked for."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One site's accepted update."""

    site: str
    arrays: Mapping[str, Array]
    """Uploaded arrays; a server reads each from disk on access."""
    num_examples: int | None
    """None if the site withholds it."""
    num_loss_terms: int | None
    """None if the site withholds it."""
    measured: NDArray[np.bool_]
    """Genes of the vocabulary that the site measures, shape (V,)."""


# ---- what a site computes of its patients ----


def observed_genes(
    cohort: Cohort, *, min_count: int, min_share: float
) -> tuple[str, ...]:
    """Return the genes with a value in enough of a cohort's samples, in its order.

    Parameters
    ----------
    min_count, min_share
        Fewest samples, and least share of the samples, with a value of the gene.
    """
    counts = (~np.isnan(cohort.expression)).sum(axis=0)
    enough = counts >= max(min_count, least_count(min_share, len(cohort.patients)))
    return tuple(compress(cohort.genes, enough))


def gene_moments(
    cohort: Cohort, vocabulary: Vocabulary, min_cell_count: int
) -> GeneMoments:
    """Return the moments of a cohort's genes, suppressed where patients are few."""
    raw = to_patients(cohort, vocabulary)
    return GeneMoments.of(raw.values.numpy()).suppressed(min_cell_count)


def cross_products(
    study: Study,
    patients: Patients,
    min_cell_count: int,
    scale: Standardisation | None = None,
) -> dict[str, CrossProducts]:
    """Return cross-products of the study's cancer types, see `cross_products.by_type`.

    Parameters
    ----------
    scale
        By which the sums are standardised; None: the patients are.
    """
    values, types = patients.values.numpy(), patients.cancer_type
    return by_type(values, types, study.linear_types, min_cell_count, scale)


# ---- before the first round ----


def agree_vocabulary(
    study: Study, panels: Mapping[str, Collection[str]], public: Cohort | None = None
) -> Vocabulary:
    """Return the study's genes, or those that enough sites measure.

    Parameters
    ----------
    panels
        Genes that each site reports, see `observed_genes`.
    public
        The server's public cohort; where the study takes its statistics from it, only
        genes observed in it count.

    Raises
    ------
    ConfigError
        If no gene is measured by enough sites.
    """
    rule = study.vocabulary
    if rule.genes:
        return Vocabulary(tuple(sorted(rule.genes)))
    if public is not None and study.public.statistics:
        observed = set(
            observed_genes(
                public,
                min_count=MIN_PUBLIC_PATIENTS,
                min_share=rule.min_patient_share,
            )
        )
        panels = {name: observed & set(genes) for name, genes in panels.items()}
    return agree({name: list(genes) for name, genes in panels.items()}, rule.min_share)


def foreign_sites(study: Study, moments: Mapping[str, GeneMoments]) -> dict[str, float]:
    """Return the sites whose values are on another scale than the others', with ratio.

    To be left out of the run. None where the study's scale is not logarithmic; see
    `moments.foreign_scales`.
    """
    return {} if study.scale.logarithm is None else foreign_scales(moments)


def standardisation(moments: Mapping[str, GeneMoments]) -> Standardisation:
    """Return mean and SD of each gene over all sites' patients, as they are published.

    Parameters
    ----------
    moments
        Of each site; their order does not matter.

    Raises
    ------
    UpdateError
        If there is no site.
    """
    return Standardisation.published(pool(moments[name] for name in sorted(moments)))


def refuse_unknown(
    study: Study, vocabulary: Vocabulary, scale: Standardisation
) -> None:
    """Refuse to train if too few of the study's genes are known of any site.

    Raises
    ------
    ConfigError
        If more than `vocabulary.max_unknown_share` of them are not.
    """
    unknown = list(compress(vocabulary.genes, ~scale.known))
    most = study.vocabulary.max_unknown_share
    if len(unknown) > most * len(vocabulary):
        raise ConfigError(
            f"no site has values of {len(unknown)} of the study's {len(vocabulary)} "
            f"genes ({_named(unknown)}); expected {most:.0%} at most "
            "(vocabulary.max_unknown_share). Compare the names with the hospitals' "
            "files, and leave these genes out of the study."
        )


def public_standardisation(public: Cohort, vocabulary: Vocabulary) -> Standardisation:
    """Return mean and SD of each gene over the public patients.

    Raises
    ------
    ConfigError
        If the cohort lacks genes of the study, or has them of too few patients.
    """
    moments = gene_moments(public, vocabulary, 1)
    enough = moments.count >= MIN_PUBLIC_PATIENTS
    if lacking := list(compress(vocabulary.genes, ~enough)):
        raise ConfigError(
            f"the public cohort has fewer than {MIN_PUBLIC_PATIENTS} patients with a "
            f"value of {len(lacking)} of the study's {len(vocabulary)} genes "
            f"({_named(lacking)}); expected every gene. "
            "Leave these genes out of the study, or take another public cohort."
        )
    return Standardisation(mean=moments.mean, sd=moments.sd)


def _named(genes: Sequence[str]) -> str:
    """Return the first genes by name, and the number of the others."""
    n_others = len(genes) - MAX_GENES_NAMED
    others = f" and {n_others} others" if n_others > 0 else ""
    return ", ".join(genes[:MAX_GENES_NAMED]) + others


def initial_model(
    study: Study,
    vocabulary: Vocabulary,
    scale: Standardisation,
    *,
    groups: Mapping[str, CrossProducts] | None = None,
    public: Cohort | None = None,
    contributors: Mapping[str, int | None] | None = None,
) -> Checkpoint:
    """Return the model before the first round.

    Parameters
    ----------
    groups
        Pooled cross-products for the factor model, see `factor_model.pool_completed`;
        None: no site sent any.
    public
        The server's public cohort; the backbone is pretrained on it if the study says
        so.
    contributors
        Sites of whose patients `scale` and `groups` are, with the number of these.
    """
    state_dict = tasks.initial(study, len(vocabulary))
    if groups is not None:
        state_dict |= tasks.mixture(study, groups)
    if public is not None and study.public.epochs:
        patients = to_patients(public, vocabulary, scale)
        state_dict = fit_public(study, PRETRAINING, patients, state_dict)
    model = Checkpoint(
        study=study,
        vocabulary=vocabulary,
        standardisation=scale,
        phase=next(iter(study.phases)),
        round=0,
        parameters=state_dict,
    )
    return model.with_contributors(contributors or {})


# ---- each round ----


def begin_phase(
    study: Study, phase: str, state_dict: Parameters, public: Patients | None
) -> dict[str, NDArray[np.float32]]:
    """Return the model as a phase begins, fine-tuned on the public patients.

    A phase that has begun is returned as it is. The backbone itself is pretrained on
    the public patients by `initial_model`.

    Parameters
    ----------
    public
        None in a phase's later rounds, and where the study has no public cohort.
    """
    initial_state = tasks.begin(study, phase, state_dict)
    if phase == PRETRAINING or public is None or not study.public.epochs:
        return initial_state
    return fit_public(study, phase, public, initial_state)


def fit_public(
    study: Study, phase: str, patients: Patients, state_dict: Parameters
) -> dict[str, NDArray[np.float32]]:
    """Return the model with a phase's modules trained on the public patients.

    As at a site, with the phase's own settings; the learning rate falls over the epochs
    as it does over the rounds. The model stays as it is with fewer than
    MIN_PUBLIC_PATIENTS eligible patients.
    """
    patients = losses.eligible(study, phase, patients)
    if len(patients) < MIN_PUBLIC_PATIENTS:
        return dict(state_dict)
    model = tasks.load(study, patients.values.shape[1], phase, state_dict)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    final_loss = training.fit_at_once(
        losses.trained_parameters(study, phase, model),
        losses.phase_loss(study, model, patients),
        len(patients),
        study.phases.get(phase, study.pretraining),
        epochs=study.public.epochs,
        seed=derive(study.seed, "public", phase),
    )
    logger.info(
        "public phase=%s patients=%d epochs=%d train_loss=%.4f",
        phase,
        len(patients),
        study.public.epochs,
        final_loss,
    )
    trained = parameters(tasks.named(phase, model))
    return {**state_dict, **tasks.upload_state(study, phase, trained)}


def global_parameters(
    study: Study, phase: str, state_dict: Parameters
) -> dict[str, NDArray[np.float32]]:
    """Return the parameters that a round trains: these must come back from a site."""
    return tasks.upload_state(
        study, phase, tasks.download_state(study, phase, state_dict)
    )


def round_update(
    study: Study,
    phase: str,
    number: int,
    model: PhaseModel,
    patients: Patients,
    global_parameters: Parameters,
    *,
    site: str,
    fit: Callable[[], None] | None = None,
    evaluate: bool = True,
) -> RoundResult:
    """Evaluate and train a phase's model in place, and return what the site uploads.

    Parameters
    ----------
    number
        Number of the round in its phase, from 1.
    model
        That of the phase with the global parameters, see `tasks.load`.
    patients
        Those of the site that are eligible for the phase, see `losses.eligible`.
    site
        Name of the site, from which its seeds are derived.
    fit
        Trains the model under patient-level privacy; then nothing is reported.
    evaluate
        Whether the model is evaluated on the patients before it is trained.
    """
    settings = study.phases[phase]
    report, pre_training_loss = None, None
    if fit is not None:
        fit()
    else:
        loss = losses.phase_loss(study, model, patients)
        seed = derive(study.seed, site, phase, number)
        if evaluate:
            pre_training_loss = training.evaluate(
                loss, len(patients), settings.batch_size, seed
            )
        report = training.fit(
            losses.trained_parameters(study, phase, model),
            loss,
            len(patients),
            settings,
            learning_rate=training.round_learning_rate(settings, number),
            proximal_mu=study.strategy.proximal_mu,
            seed=seed,
        )
    trained = tasks.upload_state(study, phase, parameters(tasks.named(phase, model)))
    return RoundResult(
        update=_to_upload(study, trained, global_parameters),
        report=report,
        pre_training_loss=pre_training_loss,
    )


def update_norm(
    study: Study, global_parameters: Mapping[str, Array], arrays: Mapping[str, Array]
) -> float:
    """Return the Euclidean norm of an update's change, if the update can be used.

    Parameters
    ----------
    global_parameters
        The round's global parameters: those that must come back, no more and no fewer.
    arrays
        What a site sent, in the form of `strategy.update`.

    Raises
    ------
    UpdateError
        If an array is missing, unexpected, misshapen or not finite, or under site-level
        privacy the change is longer than the clip.
    """
    check({name: a.shape for name, a in global_parameters.items()}, arrays, exact=True)
    start = global_parameters if study.strategy.update == "parameters" else None
    squares = sum(
        square_norm(arrays[name], None if start is None else start[name])
        for name in arrays
    )
    norm, site = float(np.sqrt(squares)), study.privacy.site
    if site is not None and norm > longest_change(site):
        raise UpdateError(
            f"its change of the model has norm {norm:.6g}, more than the "
            f"{site.clip:g} of privacy.site.clip"
        )
    return norm


def longest_change(rule: SitePrivacy) -> float:
    """Return the greatest norm of a site's change that is accepted."""
    return rule.clip * (1 + ROUNDING)


def far_beyond(study: Study, norms: Mapping[str, float]) -> dict[str, str]:
    """Return the sites whose update changes far more than the others', and why.

    None of fewer than FEWEST_TO_COMPARE, and none under site-level privacy, where one
    site must not decide whether another counts.

    Parameters
    ----------
    norms
        Norm of each site's change, see `update_norm`.
    """
    if len(norms) < FEWEST_TO_COMPARE or study.privacy.site is not None:
        return {}
    ratio, found = study.rounds.max_norm_ratio, {}
    for name, norm in norms.items():
        median = float(np.median([n for other, n in norms.items() if other != name]))
        if norm > ratio * median:
            found[name] = (
                f"its change of the model has norm {norm:.3g}, more than {ratio:g} "
                f"times the others' median of {median:.3g}"
            )
    return found


def next_model(
    last: Checkpoint,
    initial_state: Parameters,
    phase: str,
    number: int,
    aggregate: Aggregate,
) -> Checkpoint:
    """Return the model after a round.

    Parameters
    ----------
    last
        The model after the round before.
    initial_state
        Its parameters as this round began, see `begin_phase`.
    aggregate
        Combines the accepted updates: the study's strategy, or, where only a sum is
        known, its step from the mean. The optimiser's state is empty in the first round
        of a phase.
    """
    memory = last.server if last.phase == phase else {}
    params = global_parameters(last.study, phase, initial_state)
    combined, memory = aggregate(params, memory)
    return dataclasses.replace(
        last,
        phase=phase,
        round=number,
        parameters={**initial_state, **combined},
        server=memory,
    )


def _to_upload(
    study: Study, trained: Parameters, global_parameters: Parameters
) -> dict[str, NDArray[np.float32]]:
    site, form = study.privacy.site, dict(trained)
    if study.strategy.update == "delta":
        form = {name: array - global_parameters[name] for name, array in form.items()}
    return form if site is None else clipped(form, site.clip)
