"""Each patient's own gradient, at about the cost of the sum of all.

PyTorch's backward pass sums over patients. Here layers note what went in and what
gradient came back, and never form that sum; what remains is made by patient, clipped
and then summed (Goodfellow 2015; Bu et al. 2023, "book-keeping"). Opacus' hooks make
the gradients beside the sum, which costs more; its expanded weights cost about as
much as this (docs/benchmarks.md), but both hold whole gene tables for each patient, and
its ghost clipping cannot take the model. Tests hold that hooks and this agree.

B patients, T tokens each, V rows of a table, D width.

References
----------
Goodfellow (2015), arXiv 1510.01799. Bu et al. (2023), arXiv 2210.00038.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedgex.common.errors import ConfigError


@dataclass(frozen=True)
class _Dense:
    """A parameter's gradient for each patient."""

    each: Tensor
    """Shape (B, *shape)."""

    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.each.flatten(1), dim=1)
        return norm

    def add_to(self, total: Tensor, factor: Tensor) -> None:
        total += (factor @ self.each.flatten(1)).view_as(total)

    def without(self, bad: Tensor) -> _Dense:
        each = self.each.clone()
        each[bad] = 0
        return _Dense(each)


@dataclass(frozen=True)
class _Rows:
    """A table's gradient for each patient: some rows, each of them once."""

    rows: Tensor
    """Shape (B, T)."""
    each: Tensor
    """Their gradients, shape (B, T, D)."""

    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.each.flatten(1), dim=1)
        return norm

    def add_to(self, total: Tensor, factor: Tensor) -> None:
        scaled = self.each * factor[:, None, None]
        total.index_add_(0, self.rows.flatten(), scaled.flatten(0, 1))

    def without(self, bad: Tensor) -> _Rows:
        each = self.each.clone()
        each[bad] = 0
        return _Rows(self.rows, each)


@dataclass
class Gradients:
    """The gradients of the patients of one batch, by parameter."""

    by_parameter: dict[nn.Parameter, _Dense | _Rows] = field(default_factory=dict)

    def add_clipped(self, total: dict[nn.Parameter, Tensor], clip: float) -> None:
        """Scale each patient's whole gradient down to `clip`, and add them up.

        One that is not finite counts as zero.
        """
        found = self.by_parameter
        norm = torch.stack([g.norm() for g in found.values()]).norm(dim=0)
        bad = ~norm.isfinite()
        if bad.any():
            found = {p: g.without(bad) for p, g in found.items()}
            norm = norm.masked_fill(bad, 0.0)
        factor = clip / norm.clamp(min=clip)  # (B,)
        for p, gradient in found.items():
            gradient.add_to(total[p], factor)

    def note(self, p: nn.Parameter, gradient: _Dense | _Rows) -> None:
        """Keep a gradient; a layer that is used twice would need both added first."""
        if p in self.by_parameter:
            raise ConfigError(
                "a layer is used twice in one pass; expected once, for the norm of a "
                "patient's gradient. Give each use a layer of its own."
            )
        self.by_parameter[p] = gradient


@contextmanager
def taken_apart(module: nn.Module) -> Iterator[Gradients]:
    """Let each backward pass inside fill `Gradients` instead of `.grad`.

    Raises
    ------
    ConfigError
        If a parameter to be trained belongs to another layer than a linear one, a
        layer norm or an embedding.
    """
    made = Gradients()
    layers = [m for m in module.modules() if _is_trained(m)]
    try:
        for layer in layers:
            layer.forward = partial(_forward_of(layer), layer, made)
        yield made
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _is_trained(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _forward_of(layer: nn.Module) -> Callable[..., Tensor]:
    for kind, forward in FORWARDS.items():
        if type(layer) is kind and all(
            p.requires_grad for p in layer.parameters(recurse=False)
        ):
            return forward
    raise ConfigError(
        f"a {type(layer).__name__} cannot be trained privately; expected nn.Linear, "
        "nn.LayerNorm or nn.Embedding, trained or frozen as a whole."
    )


def _linear(layer: nn.Linear, made: Gradients, x: Tensor) -> Tensor:
    result: Tensor = _Linear.apply(x, layer.weight, layer.bias, made)  # type: ignore[no-untyped-call]
    return result


def _norm(layer: nn.LayerNorm, made: Gradients, x: Tensor) -> Tensor:
    result: Tensor = _LayerNorm.apply(x, layer.weight, layer.bias, layer.eps, made)  # type: ignore[no-untyped-call]
    return result


def _embedding(layer: nn.Embedding, made: Gradients, rows: Tensor) -> Tensor:
    result: Tensor = _Embedding.apply(rows, layer.weight, made)  # type: ignore[no-untyped-call]
    return result


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.Embedding: _embedding,
}


class _Linear(torch.autograd.Function):
    """y = x W' + b; the gradient of W for a patient is the sum over tokens of g x'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, made: Gradients) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.made = weight, bias, made
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        g = g.float()
        tokens = g.flatten(1, -2) if g.dim() > 2 else g[:, None]  # (B, T, out)
        inputs = x.flatten(1, -2) if x.dim() > 2 else x[:, None]  # (B, T, in)
        ctx.made.note(ctx.weight, _Dense(tokens.mT @ inputs.float()))
        if ctx.bias is not None:
            # A product with ones is faster than a sum over tokens.
            one = tokens.new_ones(1, 1, 1).expand(len(tokens), 1, tokens.shape[1])
            ctx.made.note(ctx.bias, _Dense((one @ tokens).squeeze(1)))
        back = (g @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None


class _LayerNorm(torch.autograd.Function):
    """y = z w + b with z of mean 0 and variance 1 along the last axis."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float, made: Gradients
    ) -> Tensor:
        x = x.float()
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        ctx.weight, ctx.bias, ctx.made = weight, bias, made
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, mean, scale, weight, bias = ctx.saved_tensors
        tokens = tuple(range(1, g.dim() - 1))
        z = ((x - mean) * scale).mul_(g)
        ctx.made.note(ctx.weight, _Dense(z.sum(tokens) if tokens else z))
        ctx.made.note(ctx.bias, _Dense(g.sum(tokens) if tokens else g))
        back, _, _ = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, weight.shape, mean, scale, weight, bias,
            [True, False, False],
        )  # fmt: skip
        return back, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a table."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Any, made: Gradients) -> Tensor:
        ctx.rows, ctx.weight, ctx.made = rows, weight, made
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        rows = ctx.rows.flatten(1) if ctx.rows.dim() > 1 else ctx.rows[:, None]
        each = g.float().reshape(*rows.shape, -1)  # (B, T, D)
        ctx.made.note(ctx.weight, _table(rows, each, len(ctx.weight)))
        return None, None, None


def _table(rows: Tensor, each: Tensor, n_rows: int) -> _Dense | _Rows:
    """Return a table's gradients by rows, or whole where a patient has a row twice."""
    ordered = rows.sort(1).values
    if not (ordered[:, 1:] == ordered[:, :-1]).any():
        return _Rows(rows, each)
    whole = each.new_zeros(len(rows), n_rows, each.shape[-1])
    return _Dense(whole.scatter_add_(1, rows[..., None].expand_as(each), each))
