"""Fit a model to rows: the training loop, and the loss of restoration.

Shared by the hospitals and by the server, which pretrains on its public cohort. Plain
PyTorch, no networking; N rows (one per patient), V genes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedgex.common.data.dataset import Patients
from fedgex.common.models.gexbert import GexBert
from fedgex.common.models.masking import draw_hidden
from fedgex.common.models.restoration import mixed_precision, restoration_loss
from fedgex.common.seeds import derive, generator, seeded
from fedgex.common.study import LocalTraining, Pretraining


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Counts and loss of one round of training at a site."""

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
        Trained parameters; all others stay fixed.
    loss
        Loss of a batch, see `Loss`.
    n_rows
        Patients, N; batches are drawn without replacement from their positions.
    learning_rate
        Learning rate of this round, see `round_learning_rate`.
    proximal_mu
        Weight of half the squared distance to the global parameters
        (FedProx, Li et al. 2020, eq. 2).
    seed
        Seed of the batches, the hidden cells and the dropout.
    """
    trained = list(parameters)
    global_parameters = [p.detach().clone() for p in trained] if proximal_mu else []
    optimizer = new_optimizer(trained, training, learning_rate)
    rng = generator(seed, "batches")

    def pull() -> Tensor | float:
        pairs = zip(trained, global_parameters, strict=False)
        return sum(proximal_mu / 2 * (p - start).square().sum() for p, start in pairs)

    total, terms = 0.0, 0
    with seeded(seed, "torch"):
        for _ in range(training.local_epochs):
            batches = _batches(n_rows, training, rng)
            summed = _pass(trained, loss, batches, optimizer, training, rng, pull)
            total, terms = total + summed[0], terms + summed[1]
    return FitReport(
        num_examples=n_rows,
        num_loss_terms=terms // training.local_epochs,
        train_loss=total / terms if terms else math.nan,
    )


def fit_at_once(
    parameters: Iterable[nn.Parameter],
    loss: Loss,
    n_rows: int,
    training: LocalTraining,
    *,
    epochs: int,
    seed: int,
) -> float:
    """Train in place for many epochs with one optimiser; return the last one's loss.

    For training outside a federation. The learning rate falls over the epochs as it
    does over the rounds; see `fit` for the parameters.
    """
    trained = list(parameters)
    schedule = training.model_copy(update={"rounds": epochs})
    optimizer = new_optimizer(trained, training, training.learning_rate)
    rng = generator(seed, "batches")
    total, terms = 0.0, 0
    with seeded(seed, "torch"):
        for epoch in range(1, epochs + 1):
            for group in optimizer.param_groups:
                group["lr"] = round_learning_rate(schedule, epoch)
            batches = _batches(n_rows, training, rng)
            total, terms = _pass(trained, loss, batches, optimizer, training, rng)
    return total / terms if terms else math.nan


@torch.no_grad()
def evaluate(loss: Loss, n_rows: int, batch_size: int, seed: int) -> float:
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


def _pass(
    trained: list[nn.Parameter],
    loss: Loss,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    training: LocalTraining,
    rng: torch.Generator,
    pull: Callable[[], Tensor | float] = lambda: 0.0,
) -> tuple[float, int]:
    """Take a step for each batch; return the sum of the loss's terms, and their number.

    Parameters
    ----------
    pull
        Added to the loss of each batch, and not to the sum that is returned.
    """
    total, terms = 0.0, 0
    for rows in batches:
        value, n_terms = loss(rows, rng)
        total += value.item() * n_terms
        terms += n_terms
        optimizer.zero_grad(set_to_none=True)
        (value + pull()).backward()
        nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
    return total, terms


def _batches(
    n_rows: int, training: LocalTraining, rng: torch.Generator
) -> Iterable[Tensor]:
    """Return the rows of one epoch, in an order of its own."""
    batches: Iterable[Tensor]
    batches = torch.randperm(n_rows, generator=rng).split(training.batch_size)
    return batches


def new_optimizer(
    parameters: list[nn.Parameter], training: LocalTraining, learning_rate: float
) -> torch.optim.Optimizer:
    """Return a phase's optimiser, with fresh state."""
    decay = training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=decay)
    return torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=decay, betas=(0.9, 0.98)
    )
