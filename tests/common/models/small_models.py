"""Models small enough for a test."""

import torch
from torch import Tensor

from fedgex.common.models.factor_model import (
    MixtureOfFactorAnalyzers,
)

V = 23
"""Genes; no other dimension of the model below is of this size."""
R = 3
"""Rank of the factor models below."""


def mixture(n_components: int = 4) -> MixtureOfFactorAnalyzers:
    """Return a mixture drawn at random, every gene under a noise of its own."""
    start = MixtureOfFactorAnalyzers(V, R, n_components)
    rng = torch.Generator().manual_seed(5)
    start.loadings.copy_(torch.randn(V, R, generator=rng))
    start.noise.copy_(torch.rand(V, generator=rng) + 0.1)
    start.means.copy_(torch.randn(n_components, V, generator=rng) / 2)
    roots = torch.randn(n_components, R, 2 * R, generator=rng)
    start.precisions.copy_(roots @ roots.mT)
    shares = torch.rand(n_components, generator=rng) + 0.2
    start.log_shares.copy_((shares / shares.sum()).log())
    return start


def drawn(n_patients: int, n_given: int, n_asked: int) -> tuple[Tensor, ...]:
    """Return genes (B, T), values (B, T) and asked (B, Q), each row without repeats."""
    rng = torch.Generator().manual_seed(n_given + 100 * n_asked)
    order = torch.stack([torch.randperm(V, generator=rng) for _ in range(n_patients)])
    values = torch.randn(n_patients, n_given, generator=rng)
    return order[:, :n_given], values, order.flip(1)[:, :n_asked]
