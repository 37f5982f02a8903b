"""Eligible patients, loss and trained parameters of each phase.

Shared by the hospitals and by the server, which may begin a phase on its public cohort.
N rows (one per patient), V genes, D width. The loop that lowers the losses, and the
loss of restoration, are in common/models/training.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedgex.common.data.dataset import Patients
from fedgex.common.models import survival
from fedgex.common.models.gexbert import Encoder, GexBert
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.models.restoration import (
    draw_panel,
    embed,
    embed_all,
    mixed_precision,
)
from fedgex.common.models.tasks import Classifier, PhaseModel, is_tuned
from fedgex.common.models.training import Loss, pretraining_loss
from fedgex.common.study import (
    CLASSIFICATION,
    PRETRAINING,
    Classification,
    Study,
    Survival,
)


def eligible(study: Study, phase: str, patients: Patients) -> Patients:
    """Return the patients eligible for a phase.

    All for pretraining; those of the named cancer types for fine-tuning; for survival
    moreover those with known follow-up above zero days.
    """
    if phase == PRETRAINING:
        return patients
    if phase == CLASSIFICATION:
        fit_for = patients.type_index(study.classification.classes) >= 0
    else:
        fit_for = patients.type_index(study.survival.cancer_types) >= 0
        fit_for &= (patients.duration > 0) & ~patients.event.isnan()
    return patients.take(fit_for.nonzero().squeeze(1))


def phase_loss(study: Study, model: PhaseModel, patients: Patients) -> Loss:
    """Return the loss of a phase for its eligible patients."""
    if isinstance(model, GexBert):
        return pretraining_loss(model, patients, study.pretraining)
    if isinstance(model, Classifier):
        return classification_loss(
            model.encoder, model.head, patients, study.classification
        )
    return survival_loss(model.encoder, model.head, patients, study.survival)


def trained_parameters(
    study: Study, phase: str, model: PhaseModel
) -> list[nn.Parameter]:
    """Return what a phase trains: the backbone, or the head and a tuned encoder."""
    if isinstance(model, GexBert) or is_tuned(study, phase):
        return list(model.parameters())
    return list(model.head.parameters())


def classification_loss(
    encoder: Encoder,
    head: ClassificationHead,
    patients: Patients,
    phase: Classification,
) -> Loss:
    """Return the cross-entropy of the cancer type, from a random panel each batch.

    Patients must be of the phase's classes; for the panel see `restoration.draw_panel`.

    Logits are shifted by the log share of each class at this site, so that a class is
    only separated from others that the site has, and a site of one cancer does not
    teach the head to predict nothing else (logit adjustment, Menon et al. 2021; for
    label skew in federations, Zhang et al. 2022, FedLC).
    """
    device = next(encoder.parameters()).device
    measured = patients.measured
    target = patients.type_index(phase.classes).to(device)
    share = torch.bincount(target, minlength=len(phase.classes)) / len(target)
    log_share = share.log()  # minus infinity for a class that is not here

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, int]:
        visible = draw_panel(measured[rows], phase.min_genes, rng)
        learns = phase.backbone == "tuned" and torch.is_grad_enabled()
        with mixed_precision(device):
            with torch.set_grad_enabled(learns):
                embedding = embed(encoder, patients.values[rows], visible)
            logits = head(embedding).float()
        return F.cross_entropy(logits + log_share, target[rows.to(device)]), len(rows)

    return loss


def survival_loss(
    encoder: Encoder, head: SurvivalHead, patients: Patients, phase: Survival
) -> Loss:
    """Return the survival loss: discrete-time, or Cox stratified by cancer type.

    Patients must be of the phase's cancer types, with known follow-up. While the
    backbone is frozen, patients are embedded once.
    """
    device = next(encoder.parameters()).device
    types = patients.type_index(phase.cancer_types).to(device)
    clinical = patients.clinical if phase.clinical else 0 * patients.clinical
    clinical = clinical.to(device)
    duration, event = patients.duration.to(device), patients.event.to(device)
    at_risk, died = survival.intervals(duration, event, phase.interval_ends)
    frozen = embed_all(encoder, patients) if phase.backbone == "frozen" else None
    measured = patients.measured

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, int]:
        if frozen is None:
            with mixed_precision(device):
                embedding = embed(
                    encoder, patients.values[rows], measured[rows]
                ).float()
        else:
            embedding = frozen[rows.to(device)]
        rows = rows.to(device)
        if phase.loss == "cox":
            risk = head.log_hazard(embedding, clinical[rows], types[rows])
            n_events = int(event[rows].sum())
            value = survival.cox_loss(risk, duration[rows], event[rows], types[rows])
            return value, n_events
        logits = head(embedding, clinical[rows], types[rows])
        return survival.discrete_time_loss(logits, at_risk[rows], died[rows]), len(rows)

    return loss
