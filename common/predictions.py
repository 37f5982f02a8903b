"""What fine-tuned modules say of patients: log-hazard, survival, cancer type.

N patients, C classes, K follow-up intervals. Everything is on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgex.common.harmonise import Patients
from fedgex.common.model import Encoder
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.objectives import embed_all
from fedgex.common.study import CLASSIFICATION, SURVIVAL, Study
from fedgex.common.survival import survival_probability
from fedgex.common.tasks import Modules


@torch.no_grad()
def log_hazard(study: Study, modules: Modules, patients: Patients) -> Tensor:
    """Return each patient's log-hazard, shape (N,); NaN for types not in the study.

    Higher means an earlier death, compared with patients of the same cancer type.
    """
    encoder, head = modules[f"{SURVIVAL}.encoder"], _survival_head(modules)
    assert isinstance(encoder, Encoder)
    types = patients.type_index(study.survival.cancer_types)
    clinical = patients.clinical if study.survival.clinical else 0 * patients.clinical
    risk = head.log_hazard(embed_all(encoder, patients), clinical, types.clamp(min=0))
    return torch.where(types >= 0, risk, torch.nan)


@torch.no_grad()
def survival(
    study: Study, modules: Modules, patients: Patients, log_hazard: Tensor
) -> Tensor:
    """Return the probability of living past each interval's end, shape (N, K).

    Only the discrete-time loss trains the baseline that this needs.

    Parameters
    ----------
    log_hazard
        From `log_hazard`, of the same patients, shape (N,); NaN stays NaN.
    """
    types = patients.type_index(study.survival.cancer_types).clamp(min=0)
    baseline = _survival_head(modules).baseline_logits(types)  # (N, K)
    return survival_probability(baseline + log_hazard[:, None])


@torch.no_grad()
def class_probabilities(
    modules: Modules, patients: Patients, among: Tensor | None = None
) -> Tensor:
    """Return the probability of each class from all measured genes, shape (N, C).

    Parameters
    ----------
    among
        Classes that are possible, shape (C,), bool; None: all. The others get 0.
    """
    encoder, head = (
        modules[f"{CLASSIFICATION}.{part}"] for part in ("encoder", "head")
    )
    assert isinstance(encoder, Encoder)
    assert isinstance(head, ClassificationHead)
    logits: Tensor = head(embed_all(encoder, patients))
    if among is not None:
        logits = logits.masked_fill(~among, -torch.inf)
    return logits.softmax(dim=1)


def _survival_head(modules: Modules) -> SurvivalHead:
    head = modules[f"{SURVIVAL}.head"]
    assert isinstance(head, SurvivalHead)
    return head
