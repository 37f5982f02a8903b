"""Mixture of factor analyzers, fitted to the sites' pooled cross-products.

In cancer type k, a patient's standardised expression is

    x = mean_k + loadings z + noise,    z ~ N(0, C_k)

with loadings and noise common to all types, so that sums over a patient's genes are
computed once for all types. Where sites measure different genes, their sums are first
completed by their expectation. V genes, K types, R factors.

References
----------
Ghahramani & Hinton, The EM algorithm for mixtures of factor analyzers, 1996 (there each
component has loadings of its own). Dempster, Laird & Rubin, Maximum likelihood from
incomplete data via the EM algorithm, 1977.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedgex.common.constants import (
    GATE_HIGH,
    GATE_LOW,
    LEAST_LOADING_SCALE,
    LEAST_LOG_WEIGHT,
    NEVER,
    TYPE_NOISE,
)
from fedgex.common.data.cross_products import CrossProducts, pool_types
from fedgex.common.data.moments import pool
from fedgex.common.evaluation.imputers import factor_analysis

OWN_FROM = 12
"""Patients at which half of a type's variance along the factor of the largest loading
scale is its own, half that within all types; a factor of a tenth of that scale needs
ten times as many. Chosen on validation institutions, as are the next five."""
NOISE_FACTOR = 2.0
"""Noise of unseen patients over that of the patients of the fit."""
COMPLETIONS = 8
"""Iterations of completing the sums of sites that lack genes, and refitting."""
COMPLETING_STEPS = 3
"""EM steps of each such fit; more overfit the completed sums."""
COMPLETED_NOISE = 1.4
"""Noise of completed sums over that of the patients of the fit."""
LEAST_VARIANCE = 1e-3
"""Least variance of a factor within a type, as a share of its variance over all."""


class Posterior(NamedTuple):
    """Posterior of factors and components given a patient's measured genes."""

    factors: Tensor
    """Mean of the factors over the components, shape (B, R)."""
    log_weights: Tensor
    """Log responsibility of each component, shape (B, K)."""
    loading_scale: Tensor
    """RMS loading of each factor over that of all factors, shape (R,)."""

    @property
    def features(self) -> Tensor:
        """Scaled factors and log responsibilities, shape (B, R + K)."""
        certain = self.log_weights.clamp(min=LEAST_LOG_WEIGHT)
        return torch.cat([self.scaled, certain], dim=-1)

    @property
    def scaled(self) -> Tensor:
        """Factors times loading scale, (B, R): a ridge on them is one on genes."""
        return self.factors * self.loading_scale


class MixtureOfFactorAnalyzers(nn.Module):
    """Mixture of factor analyzers, one component a cancer type, with fixed parameters.

    In component k, x = mean_k + loadings z + noise, z ~ N(0, C_k), see above.
    The parameters come from the pooled cross-products before the first round; the
    network learns the residual. Given the measured genes, with G = sum_g w_g w_g' /
    noise_g and A_k = C_k^-1 + G (Bishop 2006, eqs. 12.42 and 9.13, with a noise for
    each gene),

        z_k        = A_k^-1 t_k,    t_k = sum_g w_g (x_g - mean_kg) / noise_g
        log p_k(x) = -(log det C_k + log det A_k + sum_g (x_g - mean_kg)^2 / noise_g
                       - t_k' z_k) / 2 + what is the same for all k

    and component k has the responsibility share_k p_k(x) / sum_j share_j p_j(x).

    V genes, K components, R factors.
    """

    loadings: Tensor
    noise: Tensor
    means: Tensor
    precisions: Tensor
    log_shares: Tensor

    def __init__(self, n_genes: int, rank: int, n_components: int) -> None:
        super().__init__()
        K, V = n_components, n_genes
        self.register_buffer("loadings", torch.zeros(V, rank))
        self.register_buffer("noise", torch.ones(V))
        self.register_buffer("means", torch.zeros(K, V))
        self.register_buffer("precisions", torch.eye(rank).repeat(K, 1, 1))  # C_k^-1
        self.register_buffer("log_shares", torch.full((K,), -math.log(K)))

    @torch.no_grad()
    def forward(
        self,
        genes: Tensor,
        values: Tensor,
        keep: Tensor | None,
        noise_share: float = 1.0,
    ) -> Posterior:
        """Return the posterior given genes, values and keep, each of shape (B, T).

        Parameters
        ----------
        noise_share
            Of the noise that is taken to be in the values.
        """
        with torch.autocast(values.device.type, enabled=False):
            off = values.float().unsqueeze(1) - self.means[:, genes].transpose(0, 1)
            if _alike(genes) and (keep is None or _alike(keep)):
                # Terms that depend on the panel only are computed once: b is 1, else B.
                genes, keep = genes[:1], None if keep is None else keep[:1]
            w = self.loadings[genes]  # (b, T, R)
            precise = 1 / (noise_share * self.noise[genes])  # (b, T)
            if keep is not None:
                precise = precise * keep
            weighted = (w * precise.unsqueeze(-1)).mT  # (b, R, T)
            target = off @ weighted.mT  # (B, K, R)
            root, _ = torch.linalg.cholesky_ex(
                (weighted @ w).unsqueeze(1) + self.precisions
            )  # (b, K, R, R)
            if len(root) == 1:
                factors = torch.cholesky_solve(target.permute(1, 2, 0), root[0])
                factors = factors.permute(2, 0, 1)  # (B, K, R)
            else:
                factors = torch.cholesky_solve(target.unsqueeze(-1), root).squeeze(-1)
            distance = (off.square() * precise.unsqueeze(1)).sum(-1)
            distance = distance - (target * factors).sum(-1)  # (B, K)
            log_density = -(_log_det(root) - self._log_det_precisions() + distance / 2)
            log_weights = (self.log_shares + log_density).log_softmax(-1)
            weights = log_weights.exp()
            mean = (weights.unsqueeze(-1) * factors).sum(1)  # (B, R)
            size = self.loadings.square().sum(0)  # (R,)
            loading_scale = (size / size.mean().clamp(min=1e-12)).sqrt()
            return Posterior(
                factors=mean, log_weights=log_weights, loading_scale=loading_scale
            )

    def evidence(self, genes: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
        """Return log responsibilities as if types were equally common, shape (B, K).

        Shares of types differ between hospitals more than their profiles.
        """
        log_weights = self(genes, values, keep, TYPE_NOISE).log_weights
        unknown = self.log_shares < LEAST_LOG_WEIGHT
        shares = self.log_shares.masked_fill(unknown, 0.0)
        evidence: Tensor = (log_weights - shares).log_softmax(-1)
        return evidence.clamp(min=LEAST_LOG_WEIGHT)

    def restore(self, known: Posterior, genes: Tensor) -> Tensor:
        """Return the mean of the genes asked for, (B, Q)."""
        with torch.autocast(genes.device.type, enabled=False):
            means = self.means[:, genes].transpose(0, 1)  # (B, K, Q)
            of_type = (known.log_weights.exp().unsqueeze(1) @ means).squeeze(1)
            linear = (self.loadings[genes] @ known.factors.unsqueeze(-1)).squeeze(-1)
            restored: Tensor = of_type + linear
            return restored

    @torch.no_grad()
    def mnar_gate(self, known: Posterior, genes: Tensor, keep: Tensor | None) -> Tensor:
        """Return the gate on informative missingness, 0 to 1, shape (B,).

        The factor model assumes cells missing at random. The gate opens as the mean
        restored gene falls from `GATE_LOW` to `GATE_HIGH` SDs (of the patient's
        restored genes) below the mean measured one.
        """
        V = self.loadings.shape[0]
        everything = torch.arange(V, device=genes.device).expand(len(genes), -1)
        restored = self.restore(known, everything)  # (B, V)
        there = torch.ones_like(genes) if keep is None else keep.long()
        measured = torch.zeros_like(everything).scatter_add(1, genes, there).bool()
        n_measured = measured.sum(1)
        high = (restored * measured).sum(1) / n_measured.clamp(min=1)
        low = (restored * ~measured).sum(1) / (V - n_measured).clamp(min=1)
        drop = (high - low) / restored.std(1).clamp(min=1e-6)
        gate = ((drop - GATE_LOW) / (GATE_HIGH - GATE_LOW)).clamp(0, 1)
        some = (n_measured > 0) & (n_measured < V)
        return torch.where(some, gate, 0.0)

    def _log_det_precisions(self) -> Tensor:
        """Return half the log determinant of each C_k^-1, shape (K,)."""
        return _log_det(torch.linalg.cholesky_ex(self.precisions)[0])


def _alike(rows: Tensor) -> bool:
    """Return whether all rows are the same; none are."""
    return bool((rows == rows[:1]).all())


def _log_det(root: Tensor) -> Tensor:
    """Return half the log determinant of L L', from L of shape (..., R, R)."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def pool_completed(
    sites: Callable[[], Iterable[Mapping[str, CrossProducts]]],
    types: Sequence[str],
    rank: int,
) -> dict[str, CrossProducts]:
    """Return each group's cross-products over all sites, as if all had every gene.

    Where sites measure different genes, each pair of genes comes from other sites, with
    other cancers, and the pairwise covariance restores badly. So sums are completed by
    expectation maximisation: fit the model, replace each site's sums by their
    expectation had it measured every gene, and repeat. The patients of a group are
    assumed to have the same genes; then their sums are sufficient statistics, and no
    site is asked again.

    Parameters
    ----------
    sites
        Returns the sites' sums by group, each time from the first, see
        `cross_products.by_type`.
    types
        Types with a component each; none: all patients are one group.
    rank
        Factors, R; 0: nothing is completed.
    """
    has = [sums.counts > 0 for groups in sites() for sums in groups.values()]
    groups = pool_types(sites())
    known = np.logical_or.reduce(has)
    # A group of which nothing is known, all its sums being suppressed, is as it is.
    if not rank or all((own == known).all() for own in has if own.any()):
        return groups
    for _ in range(COMPLETIONS):
        model = fit(groups, types, rank, COMPLETING_STEPS)
        groups = pool_types(
            {name: _completed(sums, name, model, types) for name, sums in site.items()}
            for site in sites()
        )
    return groups


def _completed(
    sums: CrossProducts,
    name: str,
    model: Mapping[str, NDArray[np.float32]],
    types: Sequence[str],
) -> CrossProducts:
    """Return the expectation of a group's sums had it measured every gene.

    With o the genes that it has, m the others, and B = W_m A^-1 W_o' / noise_o, where
    A = C^-1 + W_o' W_o / noise_o, a patient's x_m is mean_m + B (x_o - mean_o) with the
    covariance W_m A^-1 W_m' + noise_m.
    """
    o = sums.counts > 0
    n = int(sums.counts.max())
    if o.all() or n <= 0:
        return sums
    W = model["loadings"].astype(np.float64)
    noise = model["noise"] * (COMPLETED_NOISE / NOISE_FACTOR)
    mean, precision = np.zeros(len(W)), np.eye(W.shape[1])  # of all patients together
    if name in types:
        k = list(types).index(name)
        if model["log_shares"][k] > NEVER:
            mean = model["means"][k].astype(np.float64)
            precision = model["precisions"][k].astype(np.float64)
    pairs = sums.pair_counts[np.ix_(o, o)]
    own = sums.mean[o]
    second = sums.products[np.ix_(o, o)] / np.maximum(pairs, 1)
    second = np.where(pairs > 0, second, np.outer(own, own))
    weighted = (W[o] / noise[o, None]).T  # (R, o)
    covariance = np.linalg.inv(weighted @ W[o] + precision)
    B = W[~o] @ covariance @ weighted
    off = own - mean[o]
    moved = B @ off
    about = second - np.outer(own, mean[o]) - np.outer(mean[o], off)
    there = np.outer(mean[~o], own) + B @ (about + np.outer(off, mean[o]))
    both = np.outer(mean[~o], mean[~o] + moved) + np.outer(moved, mean[~o])
    both += B @ about @ B.T + W[~o] @ covariance @ W[~o].T + np.diag(noise[~o])
    products = np.empty_like(sums.products)
    products[np.ix_(o, o)] = second
    products[np.ix_(~o, o)] = there
    products[np.ix_(o, ~o)] = there.T
    products[np.ix_(~o, ~o)] = both
    totals = np.empty_like(sums.totals)
    totals[o], totals[~o] = own, mean[~o] + moved
    return CrossProducts(
        products=n * products,
        pair_counts=np.full_like(sums.pair_counts, n),
        totals=n * totals,
    )


def fit(
    groups: Mapping[str, CrossProducts],
    types: Sequence[str],
    rank: int,
    n_steps: int = 30,
) -> dict[str, NDArray[np.float32]]:
    """Return the parameters of `MixtureOfFactorAnalyzers`, by name.

    Parameters
    ----------
    groups
        Pooled cross-products of each type's patients and of the others.
    types
        Types with a component each, K of them; none: a single component of mean 0 (K is
        1). A type that is not in `groups` gets no share.
    rank
        Factors, R.
    n_steps
        Of the factor analysis.
    """
    total = pool(groups.values()).covariance()
    loadings, noise = (
        a.astype(np.float64) for a in factor_analysis(total, rank, n_steps)
    )
    known = [n for n in types if n in groups and groups[n].counts.max() > 0]
    K = max(len(types), 1)
    means = np.zeros((K, len(total)))
    precisions = np.tile(np.eye(rank), (K, 1, 1))
    log_shares = np.full(K, NEVER if types else 0.0)
    if known:
        to_factors = _to_factors(loadings, noise)

        def of_factors(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
            own: NDArray[np.float64] = covariance - np.diag(noise)
            return to_factors @ own @ to_factors.T

        deviations = {name: groups[name].about_mean() for name in known}
        pairs = {name: np.maximum(groups[name].pair_counts, 0) for name in known}
        every = sum(pairs.values())
        within = of_factors(sum(deviations.values()) / np.maximum(every, 1))
        counts = {name: pairs[name].max() for name in known}
        loading_scale = np.sqrt((loadings**2).sum(axis=0))  # (R,)
        own_from = (
            OWN_FROM
            * loading_scale.max()
            / np.maximum(loading_scale, LEAST_LOADING_SCALE)
        )
        for k, name in enumerate(types):
            if name not in known:
                continue
            own = of_factors(deviations[name] / np.maximum(pairs[name], 1))
            share = counts[name] / (counts[name] + own_from)  # (R,)
            variances, axes = np.linalg.eigh(_mixed(own, within, share))
            variances = np.maximum(variances, LEAST_VARIANCE)
            means[k] = groups[name].mean
            precisions[k] = (axes / variances) @ axes.T
            log_shares[k] = np.log(counts[name] / sum(counts.values()))
    parameters = {
        "loadings": loadings,
        "noise": NOISE_FACTOR * noise,
        "means": means,
        "precisions": precisions,
        "log_shares": log_shares,
    }
    return {name: array.astype(np.float32) for name, array in parameters.items()}


def _mixed(
    own: NDArray[np.float64], within: NDArray[np.float64], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return D own D + E within E, with D^2 the share of `own`, (R,), and E^2 the rest.

    Positive semidefinite if both are.
    """
    d, e = np.sqrt(share), np.sqrt(1 - share)
    return d[:, None] * own * d + e[:, None] * within * e


def _to_factors(
    loadings: NDArray[np.float64], noise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weighted least-squares map from genes to factors, shape (R, V).

    Factors that the data do not support have no loadings, and get zeros.
    """
    weighted = loadings / noise[:, None]
    gram: NDArray[np.float64] = loadings.T @ weighted
    found: NDArray[np.float64] = np.linalg.pinv(gram, hermitian=True) @ weighted.T
    return found
