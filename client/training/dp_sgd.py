"""Patient-level DP-SGD (Abadi et al. 2016).

Opacus computes and clips per-patient gradients; Poisson sampling, masking and Gaussian
noise use a CSPRNG (`SecretRandom`). The number of steps, the divisor and the noise
scale are the study's and do not depend on the patients. Draws that a step's patients
share are made once per step, so that removing a patient changes nothing for the others.

Opacus' expanded weights are its cheapest per-patient gradients (docs/benchmarks.md).
They do not support mixed precision: gradients are float32. Their norms, the sum of the
clipped ones and the noise are float64.

N rows (one per patient), B rows drawn for a step, V genes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.linalg import vector_norm

from fedgex.common import parsing
from fedgex.common.data.dataset import Patients
from fedgex.common.models import survival
from fedgex.common.models.gexbert import Encoder, GexBert
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.models.masking import draw_hidden
from fedgex.common.models.restoration import draw_panel, embed, embed_all, restore
from fedgex.common.models.tasks import Classifier, PhaseModel
from fedgex.common.models.training import new_optimizer
from fedgex.common.privacy import accounting
from fedgex.common.privacy.secure_random import SecretRandom
from fedgex.common.study import (
    Classification,
    LocalTraining,
    PatientPrivacy,
    Pretraining,
    Study,
    Survival,
)
from fedgex.common.system import files

CHUNK = 1 << 16
"""Numbers of each patient's gradient that are summed in float64 at a time."""
ROUNDING = 1e-12
"""Share by which patients are clipped shorter, more than float64 loses in the sum."""
COUNTS = "class-counts.json"
"""File of the noised number of patients of each class."""


class PatientLoss(Protocol):
    """A module that returns one loss per patient, independent of the other patients.

    Its parameters that require a gradient are trained.
    """

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Draw the cells (B, V) that a step hides or shows, for the patients at `rows`.

        Draws that patients share do not depend on who or how many they are.
        """

    def __call__(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """Return the loss of each patient, shape (B,)."""


class RestorationLoss(nn.Module):
    """Each patient's mean squared error over its own hidden cells."""

    def __init__(
        self, backbone: GexBert, patients: Patients, phase: Pretraining
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self._patients, self._measured = patients, patients.measured
        self._masking = phase.masking

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Draw the hidden cells; all patients share pattern and rate."""
        values = self._patients.values[rows]
        return draw_hidden(values, self._measured[rows], self._masking, rng)

    def forward(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """Return one loss per patient; 0 without hidden cells."""
        device = _device(self)
        values, measured, hidden = (
            t.to(device)
            for t in (self._patients.values[rows], self._measured[rows], drawn)
        )
        restored = restore(self.backbone, values, measured & ~hidden, hidden)
        error = torch.where(hidden, restored - values, 0.0)
        return error.square().sum(1) / hidden.sum(1).clamp(min=1)


class ClassificationLoss(nn.Module):
    """Each patient's cross-entropy, from a panel that the step's patients share.

    Logits are adjusted as in `losses.classification_loss`, by noised class shares.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ClassificationHead,
        patients: Patients,
        phase: Classification,
        log_share: Tensor,
    ) -> None:
        """Set up for patients of the phase's classes; `log_share` has one a class."""
        super().__init__()
        self.encoder, self.head = encoder, head
        self._patients, self._measured = patients, patients.measured
        self._target = patients.type_index(phase.classes)
        self._min_genes, self._log_share = phase.min_genes, log_share

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Draw the visible cells."""
        return draw_panel(self._measured[rows], self._min_genes, rng)

    def forward(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """Return one loss a patient."""
        device = _device(self)
        embedding = embed(self.encoder, self._patients.values[rows], drawn)
        logits = self.head(embedding) + self._log_share.to(device)
        target = self._target[rows].to(device)
        # A class that is absent by its noised count would have infinite loss.
        known = self._log_share.to(device)[target].isfinite()
        loss = F.cross_entropy(
            torch.where(known[:, None], logits, 0.0), target, reduction="none"
        )
        return torch.where(known, loss, 0.0)


class SurvivalLoss(nn.Module):
    """Each patient's negative log-likelihood of discrete-time hazards."""

    def __init__(
        self, encoder: Encoder, head: SurvivalHead, patients: Patients, phase: Survival
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self._patients, self._measured = patients, patients.measured
        self._types = patients.type_index(phase.cancer_types)
        clinical = patients.clinical
        self._clinical = clinical if phase.clinical else torch.zeros_like(clinical)
        self._at_risk, self._died = survival.intervals(
            patients.duration, patients.event, phase.interval_ends
        )
        frozen = phase.backbone == "frozen"
        self._frozen = embed_all(encoder, patients) if frozen else None

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Show all that is measured."""
        return self._measured[rows]

    def forward(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """Return one loss a patient."""
        device = _device(self)
        if self._frozen is None:
            embedding = embed(self.encoder, self._patients.values[rows], drawn)
        else:
            embedding = self._frozen[rows.to(device)]
        clinical, types, at_risk, died = (
            t[rows].to(device)
            for t in (self._clinical, self._types, self._at_risk, self._died)
        )
        logits = self.head(embedding, clinical, types)
        return F.binary_cross_entropy_with_logits(
            logits, died.float(), weight=at_risk.float(), reduction="none"
        ).sum(1)


def phase_loss(
    study: Study,
    number: int,
    model: PhaseModel,
    patients: Patients,
    *,
    state_dir: Path,
) -> PatientLoss:
    """Return the per-patient loss of a phase.

    Parameters
    ----------
    number
        Of the round in its phase, from 1.
    state_dir
        Folder of the noised class counts between rounds.
    """
    if isinstance(model, GexBert):
        return RestorationLoss(model, patients, study.pretraining)
    if isinstance(model, Classifier):
        rule, settings = study.privacy.patient, study.classification
        assert rule is not None
        share = noised_log_share(patients, settings.classes, rule, state_dir, number)
        return ClassificationLoss(model.encoder, model.head, patients, settings, share)
    return SurvivalLoss(model.encoder, model.head, patients, study.survival)


def fit_privately(
    loss: PatientLoss,
    n_rows: int,
    training: LocalTraining,
    rule: PatientPrivacy,
    *,
    noise_multiplier: float,
    learning_rate: float,
    proximal_mu: float = 0.0,
) -> None:
    """Train in place for the steps of one round, with patient-level privacy.

    A step sums the clipped gradients of the sampled patients, adds noise of standard
    deviation `noise_multiplier * rule.clip` to each number, and divides by the expected
    batch size; an empty sample is a step of pure noise. No loss is reported, since it
    would need noise too.

    Parameters
    ----------
    loss
        Module of the losses, see `PatientLoss`.
    n_rows
        Patients, N.
    learning_rate
        Of this round, see `training.round_learning_rate`.
    proximal_mu
        As for `training.fit`; the proximal term uses no patient, so it needs no noise.

    References
    ----------
    Abadi et al. (2016), arXiv 1607.00133, algorithm 1.
    """
    assert isinstance(loss, nn.Module)
    trained = [p for p in loss.parameters() if p.requires_grad]
    incoming = [p.detach().clone() for p in trained]

    def pull(_: DPOptimizer) -> None:
        for p, start in zip(trained, incoming, strict=True):
            assert p.grad is not None
            p.grad += proximal_mu * (p.detach() - start)

    secret = SecretRandom()
    optimizer = SecretOptimizer(
        new_optimizer(trained, training, learning_rate),
        secret,
        noise_multiplier=noise_multiplier,
        max_grad_norm=rule.clip,
        expected_batch_size=training.batch_size,
    )
    if proximal_mu:
        optimizer.attach_step_hook(pull)
    each = GradSampleModuleExpandedWeights(loss, loss_reduction="sum")
    for _ in range(accounting.steps(training, rule)):
        rows = secret.bernoulli(n_rows, rule.sample_rate).nonzero().squeeze(1)
        drawn = loss.draw(rows, torch.Generator().manual_seed(secret.seed()))
        take_step(each, optimizer, rows, drawn)
    each.cleanup()


class SecretOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Opacus' optimiser with noise from a CSPRNG, and the sum in float64.

    In float32, Opacus' own norms and sums round, so that at a small clip a patient's
    part is longer than the clip on which the noise is measured. A patient with a
    non-finite gradient is dropped from the step. The sum is divided by
    the expected batch size here: Opacus' own division is quadratic in the number of
    parameter tensors.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, secret: SecretRandom, **settings: Any
    ) -> None:
        super().__init__(optimizer, loss_reduction="sum", **settings)
        self._secret = secret

    def clip_and_accumulate(self) -> None:
        """Clip per-patient gradients and add them to the step's sum."""
        samples = [g.flatten(1) for g in self.grad_samples]  # each (B, numbers)
        norms = [vector_norm(g, dim=1, dtype=torch.float64) for g in samples]
        norm = torch.stack(norms).square().sum(0).sqrt()  # (B,)
        bad = ~norm.isfinite()
        factor = (self.max_grad_norm * (1 - ROUNDING) / norm).clamp(max=1.0)
        factor = factor.nan_to_num(0.0)
        for p, g in zip(self.params, samples, strict=True):
            if bad.any():
                g[bad] = 0
            parts = g.split(CHUNK, dim=1)
            total = torch.cat([factor @ part.double() for part in parts])
            total = total.view_as(p)
            before = p.summed_grad
            p.summed_grad = total if before is None else before + total

    def add_noise(self) -> None:
        """Add Gaussian noise to the step's sum; divide by the expected batch size."""
        std = self.noise_multiplier * self.max_grad_norm
        sizes = [p.numel() for p in self.params]
        noise = self._secret.normal((sum(sizes),), std).split(sizes)
        for p, part in zip(self.params, noise, strict=True):
            noised = p.summed_grad + part.view_as(p).to(p.device)
            p.grad = (noised / self.expected_batch_size).to(p.dtype)


def take_step(
    each: GradSampleModuleExpandedWeights,
    optimizer: SecretOptimizer,
    rows: Tensor,
    drawn: Tensor,
) -> None:
    """Take one private step, accumulating over batches of patients.

    Parameters
    ----------
    each
        The `PatientLoss` whose per-patient gradients Opacus collects.
    rows, drawn
        Of the step, shape (B,) and (B, V); B may be 0.
    """
    size = optimizer.expected_batch_size
    parts = list(zip(rows.split(size), drawn.split(size), strict=True))
    for i, (few, shown) in enumerate(parts):
        optimizer.zero_grad(set_to_none=True)
        if len(few):
            each(few, shown).sum().backward()
        else:  # an empty tensor splits into one empty part
            for p in optimizer.params:
                p.grad_sample = p.new_empty(0, *p.shape)
        optimizer.signal_skip_step(i + 1 < len(parts))
        optimizer.step()


def noised_log_share(
    patients: Patients,
    classes: tuple[str, ...],
    rule: PatientPrivacy,
    state_dir: Path,
    number: int,
) -> Tensor:
    """Return the log of each class's noised share at this site, shape (classes,).

    Patients are counted once, in the first round, whose debit includes the count. A
    class with a noised count of at most one is absent (minus infinity), unless all are.
    A site that missed the first round uses equal shares.

    Parameters
    ----------
    number
        Of the round in its phase, from 1.
    """
    path = state_dir / COUNTS
    if path.exists():
        kept = parsing.json_value(path.read_bytes(), "counts")
        counted = torch.tensor(kept, dtype=torch.float64)
    elif number > 1:
        return torch.full((len(classes),), -math.log(len(classes)))
    else:
        target = patients.type_index(classes)
        counted = torch.bincount(target, minlength=len(classes)).double()
        counted += SecretRandom().normal((len(classes),), rule.label_noise)
        with files.explained(path):
            state_dir.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, json.dumps(counted.tolist()).encode())
    counted = torch.where(counted > 1, counted, 0.0)
    if not counted.any():
        return torch.full((len(classes),), -math.log(len(classes)))
    return (counted / counted.sum()).log().float()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
