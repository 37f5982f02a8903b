"""What patient-level privacy costs in training: private steps against plain ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from fedgex.common.models.training import fit, pretraining_loss
from fedgex.common.privacy.secure_random import SecretRandom
from fedgex.common.seeds import generator
from fedgex.common.study import MaskingRule, PatientPrivacy, Pretraining
from fedgex.common.system.malloc import resident_mb

from .rows import (
    LEARNING_RATE,
    SEED,
    Row,
    Sizes,
    begin_peak,
    below,
    cpu_seconds,
    in_new_process,
    new_backbone,
    synthetic,
)

OPACUS = ("hooks", "functorch")
"""Opacus' ways to a patient's gradient beside the one in use, expanded weights. Its
ghost clipping (1.6) fails on tables whose indices are an expanded view."""
PRIVATE_STEPS = 4
"""Steps that are timed together."""
NOISE = 1.0
"""Noise multiplier; it costs what any other does."""


def cost_of_privacy(sizes: Sizes) -> list[Row]:
    """Compare private steps with plain ones: same model, patients and batch."""
    rows = []
    for way in ("fedgex", *OPACUS):
        pairs = in_new_process(_time_privacy, sizes, way)
        plain, private = (
            in_new_process(_private_memory, sizes, each) for each in ("plain", way)
        )
        time_ratio = median(private / plain for plain, private in pairs)
        above = (private[0] / plain[0], private[1] / plain[1])
        ms = [1000 * median(side) / PRIVATE_STEPS for side in zip(*pairs, strict=True)]
        told = (
            f"{ms[1]:.0f} / {ms[0]:.0f} CPU ms a step of {sizes.private_batch} "
            f"patients, {sizes.genes} genes"
        )
        mb = f"{private[1]:.0f} / {plain[1]:.0f} MB"
        if way == "fedgex":
            rows += [
                below("private / plain training, time", time_ratio, 1.5, told),
                below("private / plain training, peak memory", above[1], 2, mb),
                below(
                    "private / plain training, memory of the steps only",
                    above[0],
                    2,
                    f"{private[0]:.0f} / {plain[0]:.0f} MB above the process at rest",
                ),
            ]
        else:
            detail = f"{told}; memory {above[1]:.2f} x, {mb}"
            name = f"the same by Opacus' {way}, time"
            rows.append(
                Row(name=name, value=time_ratio, goal="", met=None, detail=detail)
            )
    return rows


def _time_privacy(sizes: Sizes, way: str) -> list[tuple[float, float]]:
    """Return seconds of plain steps and of private ones, pair by pair."""
    plain, private = _steps("plain", sizes), _steps(way, sizes)
    pairs = [
        (cpu_seconds(plain), cpu_seconds(private)) for _ in range(sizes.repeats + 1)
    ]
    return pairs[1:]  # the first pair warms up


def _private_memory(sizes: Sizes, way: str) -> tuple[float, float]:
    """Return MB that steps took above the process at rest, and with it."""
    _steps(way, replace(sizes, genes=16))()  # loads what is loaded once
    steps = _steps(way, sizes)
    before = begin_peak()
    steps()
    peak = resident_mb("VmHWM")
    return peak - before, peak


def _steps(way: str, sizes: Sizes) -> Callable[[], object]:
    """Return some steps that everybody takes part in, half of the cells hidden."""
    n, genes = sizes.private_batch, sizes.genes
    backbone, patients = new_backbone("tiny", genes), synthetic(n, genes)
    masking = MaskingRule(min_rate=0.5, max_rate=0.5, panel=0, mnar=0)
    phase = Pretraining(
        rounds=1, batch_size=n, masking=masking, local_epochs=PRIVATE_STEPS
    )
    if way == "plain":
        plain = pretraining_loss(backbone, patients, phase)
        return lambda: fit(
            backbone.parameters(),
            plain,
            n,
            phase,
            learning_rate=LEARNING_RATE,
            seed=SEED,
        )
    # Opacus takes seconds to import, and memory that plain training does not have.
    from fedgex.client.training.dp_sgd import RestorationLoss, fit_privately

    loss = RestorationLoss(backbone, patients, phase)
    if way != "fedgex":
        return _opacus_steps(way, loss, n)
    rule = PatientPrivacy(noise_multiplier=NOISE, delta=1e-5, clip=1.0, sample_rate=1.0)
    return lambda: fit_privately(
        loss, n, phase, rule, noise_multiplier=NOISE, learning_rate=LEARNING_RATE
    )


def _opacus_steps(way: str, loss: Any, n: int) -> Callable[[], None]:
    """Return the same steps by another of Opacus' ways."""
    from opacus.grad_sample import wrap_model

    from fedgex.client.training.dp_sgd import SecretOptimizer, take_step

    each = wrap_model(loss, grad_sample_mode=way, loss_reduction="sum")
    optimizer = SecretOptimizer(
        torch.optim.AdamW(loss.parameters(), lr=LEARNING_RATE),
        SecretRandom(),
        noise_multiplier=NOISE,
        max_grad_norm=1.0,
        expected_batch_size=n,
    )
    rows, rng = torch.arange(n), generator(SEED, "bench", "opacus")

    def steps() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(PRIVATE_STEPS):
                take_step(each, optimizer, rows, loss.draw(rows, rng))

    return steps
