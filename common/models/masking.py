"""Masking patterns for expression: single cells, all of a gene, or low values first.

Each function returns what is hidden, a subset of what was measured. A patient with two
or more measured genes has at least one of them hidden and at least one left; a patient
with fewer has none hidden. Equal seeds of the generator hide equal cells.

A pattern of pretraining is a function here, its entry in `PATTERNS`, and its weight in
`study.MaskingRule`.

Shapes: B patients, V genes of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fedgex.common.errors import ConfigError
from fedgex.common.study import MaskingRule

Pattern = Literal["mcar", "panel", "mnar"]
"""Missing completely at random; the genes outside a panel; low expression drops out
(missing not at random)."""

SLOPE = 2.0
"""How much the log-odds of dropping out rise when a gene falls by one SD."""

BISECTIONS = 40
"""Halvings of the bracket around the intercept: more than float32 can tell apart."""


def draw_hidden(
    values: Tensor, measured: Tensor, rule: MaskingRule, generator: torch.Generator
) -> Tensor:
    """Draw one pattern by its weight, and one rate, and hide cells by them.

    Parameters
    ----------
    values
        Standardised expression, shape (B, V); NaN where not measured.
    measured
        Cells with a value, boolean, shape (B, V).

    Returns
    -------
    Tensor
        Hidden cells, boolean, shape (B, V).
    """
    names, weights = zip(*rule.weights.items(), strict=True)
    drawn = int(torch.multinomial(torch.tensor(weights), 1, generator=generator))
    share = float(torch.rand((), generator=generator))
    rate = rule.min_rate + (rule.max_rate - rule.min_rate) * share
    return PATTERNS[names[drawn]](values, measured, rate, generator)


def mcar(measured: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Hide each measured cell with probability `rate`, independently.

    Parameters
    ----------
    measured
        Boolean, shape (B, V).
    rate
        Between 0 and 1, both excluded.
    generator
        Source of randomness.

    Returns
    -------
    Tensor
        Hidden cells, boolean, shape (B, V).

    Raises
    ------
    ConfigError
        If the rate is not between 0 and 1.
    """
    _check(rate)
    draw = _uniform(measured.shape, measured, generator)
    return _some_but_not_all(draw - rate, measured)


def random_panel(measured: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Hide the same genes for every patient, each with probability `rate`.

    A patient of whom this would hide all or no measured genes differs by one gene.
    Parameters and errors are those of `mcar`.
    """
    _check(rate)
    draw = _uniform(measured.shape[1:], measured, generator)
    return _some_but_not_all((draw - rate).expand(measured.shape), measured)


def low_expression(
    values: Tensor, measured: Tensor, rate: float, generator: torch.Generator
) -> Tensor:
    """Hide low values more often than high ones (missing not at random).

    P(hidden) = 1 / (1 + exp(SLOPE * value - a)), with the intercept a of each patient
    solved so that the mean of P over the patient's measured genes is `rate`.

    Parameters
    ----------
    values
        Standardised expression, shape (B, V); ignored where not measured, NaN included.
    measured, rate, generator
        As for `mcar`, errors too.

    Returns
    -------
    Tensor
        Hidden cells, boolean, shape (B, V).
    """
    _check(rate)
    probability = _dropout(values, measured, rate)
    draw = _uniform(measured.shape, measured, generator)
    return _some_but_not_all(draw - probability, measured)


PATTERNS: dict[str, Callable[[Tensor, Tensor, float, torch.Generator], Tensor]] = {
    "mcar": lambda values, measured, rate, rng: mcar(measured, rate, rng),
    "panel": lambda values, measured, rate, rng: random_panel(measured, rate, rng),
    "mnar": low_expression,
}
"""Patterns of pretraining by the name of their weight in `study.MaskingRule`, each of
values, measured cells, rate and generator."""


def panel(measured: Tensor, n_genes: int, generator: torch.Generator) -> Tensor:
    """Leave `n_genes` random genes and hide all others, for every patient alike.

    The genes are drawn among those that any patient has. Panels drawn with equal seeds
    are nested: the 100 genes of one contain the 50 of another.

    Parameters
    ----------
    measured
        Boolean, shape (B, V).
    n_genes
        Genes to leave; fewer than are measured.
    generator
        Source of randomness.

    Returns
    -------
    Tensor
        Hidden cells, boolean, shape (B, V). A patient who lacks genes of the panel is
        left with fewer than `n_genes`.

    Raises
    ------
    ConfigError
        If `n_genes` is below 1, or leaves nothing to hide.
    """
    candidates = measured.any(dim=0).nonzero().squeeze(1)
    if not 1 <= n_genes < len(candidates):
        raise ConfigError(
            f"a panel of {n_genes} genes was asked for where {len(candidates)} are "
            f"measured; expected 1 to {len(candidates) - 1}."
        )
    order = torch.randperm(
        len(candidates), generator=generator, device=generator.device
    ).to(measured.device)
    hidden = measured.clone()
    hidden[:, candidates[order[:n_genes]]] = False
    return hidden


def _check(rate: float) -> None:
    if not 0 < rate < 1:
        raise ConfigError(f"missing rate is {rate}; expected above 0 and below 1.")


def _uniform(shape: torch.Size, measured: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn where the generator lives, so that a GPU run hides what a CPU run hides.
    draw = torch.rand(shape, generator=generator, device=generator.device)
    return draw.to(measured.device)


def _some_but_not_all(margin: Tensor, measured: Tensor) -> Tensor:
    """Hide cells of negative margin, always the least one and never the greatest."""
    least = margin.masked_fill(~measured, math.inf).argmin(dim=1, keepdim=True)
    greatest = margin.masked_fill(~measured, -math.inf).argmax(dim=1, keepdim=True)
    hidden = (margin < 0).scatter(1, least, True).scatter(1, greatest, False)
    return hidden & measured & (measured.sum(dim=1, keepdim=True) > 1)


def _dropout(values: Tensor, measured: Tensor, rate: float) -> Tensor:
    """Return P(hidden) by cell, shape (B, V); see `low_expression`."""
    score = SLOPE * values.masked_fill(~measured, 0.0)
    n_measured = measured.sum(dim=1, keepdim=True).clamp(min=1)
    log_odds = math.log(rate / (1 - rate))
    # With a = min(score) + log-odds no P is above the rate; with the max, none below.
    low = score.amin(dim=1, keepdim=True) + log_odds
    high = score.amax(dim=1, keepdim=True) + log_odds
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        share = (torch.sigmoid(middle - score) * measured).sum(1, keepdim=True)
        too_many = share > rate * n_measured
        low = torch.where(too_many, low, middle)
        high = torch.where(too_many, middle, high)
    return torch.sigmoid((low + high) / 2 - score)
