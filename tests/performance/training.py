"""Training: its throughput against a bare loop, and what more genes cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedgex.common.data.dataset import Patients
from fedgex.common.models.gexbert import GexBert, select
from fedgex.common.models.masking import draw_hidden
from fedgex.common.models.training import fit, pretraining_loss
from fedgex.common.seeds import generator
from fedgex.common.study import MaskingRule, Pretraining
from fedgex.common.system.malloc import resident_mb

from .rows import (
    LEARNING_RATE,
    SEED,
    Row,
    Sizes,
    at_least,
    begin_peak,
    below,
    cpu_seconds,
    in_new_process,
    new_backbone,
    synthetic,
)


def throughput(sizes: Sizes) -> list[Row]:
    """Compare patients a second of `fit` with those of `bare_loop`."""
    pairs = in_new_process(_time_training, sizes)
    ratio = median(bare / ours for ours, bare in pairs)
    ours, bare = (sizes.patients / median(side) for side in zip(*pairs, strict=True))
    return [
        at_least(
            "training throughput, fedgex / bare PyTorch loop",
            ratio,
            0.95,
            f"{ours:.0f} / {bare:.0f} patients a CPU second, {sizes.genes} genes",
        )
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What the model is shown in one step; B patients, T genes given, Q asked for."""

    genes: Tensor
    """Shape (B, T)."""
    values: Tensor
    """Shape (B, T)."""
    keep: Tensor | None
    """Shape (B, T)."""
    asked: Tensor
    """Shape (B, Q)."""
    cells: Tensor
    """False where `asked` is padding, shape (B, Q)."""
    target: Tensor
    """Values of the cells asked for, in their order, shape (cells,)."""


def bare_batches(patients: Patients, phase: Pretraining, seed: int) -> list[Batch]:
    """Return the very batches that `fit` draws under a seed, ready for the model."""
    rng = generator(seed, "batches")
    batches = []
    for _ in range(phase.local_epochs):
        for rows in torch.randperm(len(patients), generator=rng).split(
            phase.batch_size
        ):
            values, measured = patients.values[rows], patients.measured[rows]
            hidden = draw_hidden(values, measured, phase.masking, rng)
            genes, keep = select(measured & ~hidden)
            asked, cells = select(hidden)
            cells = torch.ones_like(asked, dtype=torch.bool) if cells is None else cells
            given = values.gather(1, genes)
            batches.append(
                Batch(
                    genes=genes,
                    values=given if keep is None else torch.where(keep, given, 0.0),
                    keep=keep,
                    asked=asked,
                    cells=cells,
                    target=values.gather(1, asked)[cells],
                )
            )
    return batches


def bare_loop(backbone: GexBert, batches: list[Batch], phase: Pretraining) -> None:
    """Train in place with nothing but the steps that training consists of."""
    optimizer = torch.optim.AdamW(
        backbone.parameters(),
        lr=LEARNING_RATE,
        weight_decay=phase.weight_decay,
        betas=(0.9, 0.98),
    )
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        restored = backbone(batch.genes, batch.values, batch.keep, batch.asked)
        loss = F.mse_loss(restored[batch.cells], batch.target)
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), phase.max_grad_norm)
        optimizer.step()


def _time_training(sizes: Sizes) -> list[tuple[float, float]]:
    """Return seconds of an epoch of `fit` and of the bare loop, pair by pair."""
    patients, phase = synthetic(sizes.patients, sizes.genes), Pretraining(rounds=1)
    start = new_backbone("tiny", sizes.genes)
    pairs = []
    for repeat in range(sizes.repeats + 1):
        batches = bare_batches(patients, phase, repeat)
        ours, bare = copy.deepcopy(start), copy.deepcopy(start)
        loss = pretraining_loss(ours, patients, phase)

        def one_fit(
            backbone: GexBert = ours, loss: Any = loss, seed: int = repeat
        ) -> None:
            fit(
                backbone.parameters(),
                loss,
                len(patients),
                phase,
                learning_rate=LEARNING_RATE,
                seed=seed,
            )

        def one_bare(backbone: GexBert = bare, batches: list[Batch] = batches) -> None:
            bare_loop(backbone, batches, phase)

        if repeat % 2:
            seconds = cpu_seconds(one_fit)
            pairs.append((seconds, cpu_seconds(one_bare)))
        else:
            seconds = cpu_seconds(one_bare)
            pairs.append((cpu_seconds(one_fit), seconds))
    return pairs[1:]  # the first pair warms up


# ---- cost of genes ----


def cost_of_genes(sizes: Sizes) -> list[Row]:
    """Compare one training step per patient between numbers of genes."""
    seconds = in_new_process(_time_steps, sizes)
    memory = [
        in_new_process(_step_memory, genes, batch) / batch
        for genes, batch in sizes.steps
    ]
    base = sizes.steps[0][0]
    rows = []
    for i, (genes, batch) in enumerate(sizes.steps[1:], start=1):
        more = genes / base
        slower = median(s[i] / s[0] for s in seconds)
        larger = memory[i] / memory[0]
        step = f"for {more:.2f} x the genes, batch of {batch}"
        rows += [
            below(
                f"step time per patient and gene, {genes:,} / {base:,} genes",
                slower / more,
                1.2,
                f"{1000 * median(s[i] for s in seconds):.1f} CPU ms a patient, "
                f"{slower:.2f} x {step}",
            ),
            below(
                f"step memory per patient and gene, {genes:,} / {base:,} genes",
                larger / more,
                1.2,
                f"{memory[i]:.1f} MB a patient, {larger:.2f} x {step}",
            ),
        ]
    return rows


def _time_steps(sizes: Sizes) -> list[list[float]]:
    """Return seconds per patient of one step, for each repeat and number of genes."""
    steps = [(_step(genes, batch), batch) for genes, batch in sizes.steps]
    timed = [
        [cpu_seconds(step) / batch for step, batch in steps]
        for _ in range(sizes.repeats + 1)
    ]
    return timed[1:]  # the first warms up


def _step_memory(genes: int, batch: int) -> float:
    """Return MB that one step takes above the model and its patients."""
    _step(16, 2)()  # loads what PyTorch loads once
    step = _step(genes, batch)
    before = begin_peak()
    step()
    return resident_mb("VmHWM") - before


def _step(genes: int, batch: int) -> Callable[[], None]:
    """Return one training step of the tiny preset, half of the cells hidden."""
    backbone, patients = new_backbone("tiny", genes), synthetic(batch, genes)
    masking = MaskingRule(min_rate=0.5, max_rate=0.5, panel=0, mnar=0)
    phase = Pretraining(rounds=1, batch_size=batch, masking=masking)
    loss = pretraining_loss(backbone, patients, phase)

    def step() -> None:
        fit(
            backbone.parameters(),
            loss,
            batch,
            phase,
            learning_rate=LEARNING_RATE,
            seed=SEED,
        )

    return step
