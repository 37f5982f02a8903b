"""What a study takes from the server's public cohort, so that no site has to tell it.

Means, standard deviations, the linear start, and a beginning for each phase. V genes.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from fedgex.common import federation, fitting, phases, tasks
from fedgex.common.cohort import Cohort
from fedgex.common.errors import ConfigError
from fedgex.common.harmonise import Patients, to_patients
from fedgex.common.parameters import parameters
from fedgex.common.seeds import derive
from fedgex.common.statistics import (
    CrossProducts,
    GeneMoments,
    Standardisation,
    by_type,
)
from fedgex.common.study import PRETRAINING, Study
from fedgex.common.tasks import Parameters
from fedgex.common.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

NAMED = 5
"""Genes that an error names; it counts the others."""


def standardisation(cohort: Cohort, vocabulary: Vocabulary) -> Standardisation:
    """Return mean and standard deviation of each gene over the public patients.

    Raises
    ------
    ConfigError
        If the cohort lacks genes of the study, or has them of too few patients.
    """
    raw = Standardisation(mean=np.zeros(len(vocabulary)), sd=np.ones(len(vocabulary)))
    moments = GeneMoments.of(to_patients(cohort, vocabulary, raw).values.numpy())
    known = moments.count >= federation.MIN_PUBLIC_PATIENTS
    lacking = [g for g, k in zip(vocabulary.genes, known, strict=True) if not k]
    if lacking:
        others = f" and {len(lacking) - NAMED} others" if len(lacking) > NAMED else ""
        raise ConfigError(
            f"the public cohort has fewer than {federation.MIN_PUBLIC_PATIENTS} "
            f"patients with a value of {len(lacking)} of the study's {len(vocabulary)} "
            f"genes ({', '.join(lacking[:NAMED])}{others}); expected every gene. Leave "
            "these "
            "genes out of the study, or take another public cohort."
        )
    return Standardisation(mean=moments.mean, sd=moments.sd)


def cross_products(
    study: Study, cohort: Cohort, vocabulary: Vocabulary, scale: Standardisation
) -> dict[str, CrossProducts]:
    """Return the cross-products of the study's types, see `statistics.by_type`."""
    patients = to_patients(cohort, vocabulary, scale)
    values, types = patients.values.numpy(), patients.cancer_type
    return by_type(values, types, study.linear_types, federation.MIN_PUBLIC_PATIENTS)


def begin(
    study: Study, phase: str, whole: Parameters, public: Patients | None
) -> dict[str, NDArray[np.float32]]:
    """Return the model as a phase begins, fine-tuned on the public patients.

    The backbone itself is pretrained on them before the first round of all.

    Parameters
    ----------
    whole
        Every parameter of the model so far.
    public
        None where the study takes nothing from a public cohort.
    """
    begun = tasks.begin(study, phase, whole)
    if phase == PRETRAINING or public is None or not study.public.epochs:
        return begun
    return fit_phase(study, phase, public, begun)


def fit_phase(
    study: Study, phase: str, patients: Patients, whole: Parameters
) -> dict[str, NDArray[np.float32]]:
    """Return the model with a phase's modules trained on the public patients.

    As at a site, with the phase's own settings; the learning rate falls over the epochs
    as it does over the rounds. Everything follows from the study's seed. The model
    stays as it is where too few public patients can take part, or the head of the phase
    stays at the sites.

    Parameters
    ----------
    patients
        The public ones.
    whole
        Every parameter of the model as the phase begins, see `tasks.begin`.
    """
    patients = phases.take_part(study, phase, patients)
    local = phase != PRETRAINING and f"{phase}.head" not in tasks.travelling(
        study, phase
    )
    if local or len(patients) < federation.MIN_PUBLIC_PATIENTS:
        return dict(whole)
    modules = tasks.load(study, patients.values.shape[1], phase, whole)
    for module in modules.values():
        module.to("cuda" if torch.cuda.is_available() else "cpu")
    final_loss = fitting.fit_at_once(
        phases.trained_parameters(study, phase, modules),
        phases.phase_loss(study, phase, modules, patients),
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
    return {**whole, **tasks.updated(study, phase, parameters(modules))}
