"""Train on one hospital's patients: plain PyTorch, no networking.

N rows (one per patient), V genes, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedgex.common import survival
from fedgex.common.harmonise import Patients
from fedgex.common.model import ClassificationHead, Encoder, GexBert, SurvivalHead
from fedgex.common.objectives import (
    draw_hidden,
    embed,
    embed_all,
    mixed_precision,
    restoration_loss,
)
from fedgex.common.seeds import derive, generator, seeded
from fedgex.common.study import Classification, LocalTraining, Pretraining, Survival


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What one round of training at a site came to."""

    num_examples: int
    """Patients trained on."""
    num_loss_terms: int
    """Terms of the loss in one pass: hidden cells, patients, or observed events."""
    train_loss: float
    """Mean loss over the round's batches, weighted by their terms."""


Loss = Callable[[Tensor, torch.Generator], tuple[Tensor, int]]
"""Mean loss of a batch of rows, and the number of terms it is a mean over."""


def pretraining_loss(model: GexBert, patients: Patients, phase: Pretraining) -> Loss:
    """Return the loss of masked restoration."""
    device = next(model.parameters()).device
    measured = patients.measured

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, int]:
        hidden = draw_hidden(patients.values[rows], measured[rows], phase.masking, rng)
        values, seen, gone = (
            t.to(device) for t in (patients.values[rows], measured[rows], hidden)
        )
        with mixed_precision(device):
            return restoration_loss(model, values, seen, gone)

    return loss


def classification_loss(
    encoder: Encoder,
    head: ClassificationHead,
    patients: Patients,
    phase: Classification,
) -> Loss:
    """Return the cross-entropy of the cancer type, from a random panel each batch.

    The size of the panel is drawn evenly on the log scale, from `min_genes` to all.
    Patients must be of the phase's classes.

    Logits are shifted by the log share of each class at this site, so that a class is
    only told from others that the site has, and a site of one cancer does not teach
    the head to say nothing else (logit adjustment, Menon et al. 2021; for label skew in
    federations, Zhang et al. 2022, FedLC).
    """
    device = next(encoder.parameters()).device
    measured = patients.measured
    target = patients.type_index(phase.classes).to(device)
    share = torch.bincount(target, minlength=len(phase.classes)) / len(target)
    log_share = share.log()  # minus infinity for a class that is not here

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, int]:
        n_genes = measured.shape[1]
        low = math.log(min(phase.min_genes, n_genes))
        share = float(torch.rand((), generator=rng))
        size = round(math.exp(low + (math.log(n_genes) - low) * share))
        panel = torch.randperm(n_genes, generator=rng)[:size]
        visible = torch.zeros_like(measured[rows])
        visible[:, panel] = measured[rows][:, panel]
        with mixed_precision(device):
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


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Loss,
    n_rows: int,
    training: LocalTraining,
    *,
    learning_rate: float,
    proximal_mu: float = 0.0,
    seed: int,
) -> FitReport:
    """Train in place for the round's local epochs.

    The optimiser starts anew each time, so that a site keeps nothing between rounds and
    a repeated round gives the same bits.

    Parameters
    ----------
    parameters
        What is trained; everything else stays as it is.
    loss
        Loss of a batch, see `Loss`.
    n_rows
        Patients, N; batches are drawn without replacement from their positions.
    learning_rate
        Of this round, see `round_learning_rate`.
    proximal_mu
        Weight of half the squared distance to the incoming parameters
        (FedProx, Li et al. 2020, eq. 2).
    seed
        Of the batches, the hidden cells and the dropout.
    """
    trained = list(parameters)
    incoming = [p.detach().clone() for p in trained] if proximal_mu else []
    optimizer = _optimizer(trained, training, learning_rate)
    rng = generator(seed, "batches")
    total, terms, steps = 0.0, 0, 0
    with seeded(seed, "torch"):
        for rows in _batches(n_rows, training, rng):
            value, n_terms = loss(rows, rng)
            total += value.item() * n_terms
            terms += n_terms
            steps += 1
            for p, start in zip(trained, incoming, strict=False):
                value = value + proximal_mu / 2 * (p - start).square().sum()
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
            optimizer.step()
    return FitReport(
        num_examples=n_rows,
        num_loss_terms=terms // training.local_epochs,
        train_loss=total / terms if terms else math.nan,
    )


@torch.no_grad()
def judge(loss: Loss, n_rows: int, batch_size: int, seed: int) -> float:
    """Return the mean loss of the present parameters over all patients."""
    rng = generator(derive(seed, "judge"), "batches")
    total, terms = 0.0, 0
    for rows in torch.arange(n_rows).split(batch_size):
        value, n_terms = loss(rows, rng)
        total += value.item() * n_terms
        terms += n_terms
    return total / terms if terms else math.nan


def round_learning_rate(training: LocalTraining, server_round: int) -> float:
    """Return the learning rate of a round: a half cosine from peak to final share."""
    progress = (server_round - 1) / max(training.rounds - 1, 1)
    share = training.final_learning_rate
    fall = (1 + math.cos(math.pi * progress)) / 2
    return training.learning_rate * (share + (1 - share) * fall)


def _batches(
    n_rows: int, training: LocalTraining, rng: torch.Generator
) -> Iterator[Tensor]:
    for _ in range(training.local_epochs):
        yield from torch.randperm(n_rows, generator=rng).split(training.batch_size)


def _optimizer(
    parameters: list[nn.Parameter], training: LocalTraining, learning_rate: float
) -> torch.optim.Optimizer:
    decay = training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=decay)
    return torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=decay, betas=(0.9, 0.98)
    )
