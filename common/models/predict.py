"""Predictions of fine-tuned models: log-hazard, survival, cancer type.

N patients, C classes, K follow-up intervals. Everything is on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgex.common.data.dataset import Patients
from fedgex.common.models.restoration import embed_all
from fedgex.common.models.survival import survival_probability
from fedgex.common.models.tasks import Classifier, SurvivalModel
from fedgex.common.study import Study


@torch.no_grad()
def log_hazard(study: Study, model: SurvivalModel, patients: Patients) -> Tensor:
    """Return each patient's log-hazard, shape (N,); NaN for types not in the study.

    Higher means an earlier death, compared with patients of the same cancer type.
    """
    types = patients.type_index(study.survival.cancer_types)
    clinical = patients.clinical if study.survival.clinical else 0 * patients.clinical
    embedding = embed_all(model.encoder, patients)
    risk = model.head.log_hazard(embedding, clinical, types.clamp(min=0))
    return torch.where(types >= 0, risk, torch.nan)


@torch.no_grad()
def survival(
    study: Study, model: SurvivalModel, patients: Patients, log_hazard: Tensor
) -> Tensor:
    """Return the probability of living past each interval's end, shape (N, K).

    Only the discrete-time loss trains the baseline that this needs.

    Parameters
    ----------
    log_hazard
        From `log_hazard`, of the same patients, shape (N,); NaN stays NaN.
    """
    types = patients.type_index(study.survival.cancer_types).clamp(min=0)
    baseline = model.head.baseline_logits(types)  # (N, K)
    return survival_probability(baseline + log_hazard[:, None])


@torch.no_grad()
def class_probabilities(
    model: Classifier, patients: Patients, among: Tensor | None = None
) -> Tensor:
    """Return the probability of each class from all measured genes, shape (N, C).

    Parameters
    ----------
    among
        Classes that are possible, shape (C,), bool; None: all. The others get 0.
    """
    logits: Tensor = model.head(embed_all(model.encoder, patients))
    if among is not None:
        logits = logits.masked_fill(~among, -torch.inf)
    return logits.softmax(dim=1)
