"""What a study takes from the server's public cohort, so that no site has to tell it.

Means, standard deviations, the linear start, and a backbone that was pretrained before
the first round. V genes.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedgex.common import fitting, tasks
from fedgex.common.cohort import Cohort, load_cohort
from fedgex.common.errors import ConfigError
from fedgex.common.harmonise import to_patients
from fedgex.common.model import GexBert
from fedgex.common.parameters import parameters
from fedgex.common.seeds import derive
from fedgex.common.statistics import CrossProducts, GeneMoments, Standardisation
from fedgex.common.study import PRETRAINING, Study
from fedgex.common.tasks import BACKBONE, Parameters
from fedgex.common.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

FOLDER = "public"
"""Folder of the consortium's state directory with the public cohort."""
MIN_PATIENTS = 30
"""With fewer, a mean and a standard deviation say little."""
NAMED = 5
"""Genes that an error names; it counts the others."""


def is_wanted(study: Study) -> bool:
    """Return whether the study takes anything from a public cohort."""
    return study.public.statistics or study.public.epochs > 0


def require(study: Study, folder: Path | None) -> None:
    """Refuse a study that wants a public cohort where there is none.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if not is_wanted(study) or (folder is not None and folder.is_dir()):
        return
    where = "no folder is named" if folder is None else f"{folder} does not exist"
    raise ConfigError(
        f'the study "{study.name}" takes statistics or pretraining from a public '
        f"cohort, and {where}. Put a public cohort there (docs/server-operation.md; "
        "in a scenario, [public] institutions), or leave study.public out."
    )


def load(study: Study, folder: Path | None) -> Cohort | None:
    """Read the public cohort; None if the study takes nothing from one.

    Raises
    ------
    ConfigError
        If there is none, or it has too few patients.
    """
    require(study, folder)
    if not is_wanted(study) or folder is None:
        return None
    cohort = load_cohort(folder)
    if cohort.n_patients < MIN_PATIENTS:
        raise ConfigError(
            f"the public cohort in {folder} has {cohort.n_patients} patients; expected "
            f"{MIN_PATIENTS} or more. Put a larger one there, or leave study.public "
            "out."
        )
    return cohort


def well_known(cohort: Cohort, min_share: float) -> frozenset[str]:
    """Return the genes that enough samples have a value of.

    Parameters
    ----------
    min_share
        Least share of the samples, as the study's `vocabulary.min_patient_share`.
    """
    counts = (~np.isnan(cohort.expression)).sum(axis=0)
    enough = counts >= max(MIN_PATIENTS, min_share * len(cohort.patients))
    return frozenset(g for g, k in zip(cohort.genes, enough, strict=True) if k)


def standardisation(cohort: Cohort, vocabulary: Vocabulary) -> Standardisation:
    """Return mean and standard deviation of each gene over the public patients.

    Raises
    ------
    ConfigError
        If the cohort lacks genes of the study, or has them of too few patients.
    """
    raw = Standardisation(mean=np.zeros(len(vocabulary)), sd=np.ones(len(vocabulary)))
    moments = GeneMoments.of(to_patients(cohort, vocabulary, raw).values.numpy())
    known = moments.count >= MIN_PATIENTS
    lacking = [g for g, k in zip(vocabulary.genes, known, strict=True) if not k]
    if lacking:
        others = f" and {len(lacking) - NAMED} others" if len(lacking) > NAMED else ""
        raise ConfigError(
            f"the public cohort has fewer than {MIN_PATIENTS} patients with a value of "
            f"{len(lacking)} of the study's {len(vocabulary)} genes "
            f"({', '.join(lacking[:NAMED])}{others}); expected every gene. Leave these "
            "genes out of the study, or take another public cohort."
        )
    return Standardisation(mean=moments.mean, sd=moments.sd)


def covariance(
    cohort: Cohort, vocabulary: Vocabulary, scale: Standardisation
) -> NDArray[np.float64]:
    """Return the covariance of the standardised genes, shape (V, V)."""
    patients = to_patients(cohort, vocabulary, scale)
    return CrossProducts.of(patients.values.numpy()).covariance()


def pretrain(
    study: Study,
    cohort: Cohort,
    vocabulary: Vocabulary,
    scale: Standardisation,
    whole: Parameters,
) -> dict[str, NDArray[np.float32]]:
    """Return the model with its backbone pretrained on the public patients.

    As at a site, with the pretraining's own settings; the learning rate falls over the
    epochs as it does over the rounds. Everything follows from the study's seed.

    Parameters
    ----------
    whole
        Every parameter of the model; the linear start is not trained.
    """
    patients = to_patients(cohort, vocabulary, scale)
    modules = tasks.load(study, len(vocabulary), PRETRAINING, whole)
    backbone = modules[BACKBONE]
    assert isinstance(backbone, GexBert)
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    loss = fitting.pretraining_loss(backbone, patients, study.pretraining)
    final_loss = fitting.fit_at_once(
        backbone.parameters(),
        loss,
        len(patients),
        study.pretraining,
        epochs=study.public.epochs,
        seed=derive(study.seed, "public", PRETRAINING),
    )
    logger.info(
        "public-pretraining patients=%d epochs=%d train_loss=%.4f",
        len(patients),
        study.public.epochs,
        final_loss,
    )
    return {**whole, **parameters(modules)}
