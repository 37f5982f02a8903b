"""The linear start: a mixture of factor models from the sites' pooled cross-products.

In cancer type k, a patient's standardised expression is

    x = mean_k + loadings z + noise,    z ~ N(0, C_k)

with loadings and noise common to all types, so that the genes of a patient are summed
up once, whatever the type. V genes, K types, R factors.

References
----------
Ghahramani & Hinton, The EM algorithm for mixtures of factor analyzers, 1996 (there each
component has loadings of its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedgex.common.imputers import factor_analysis
from fedgex.common.statistics import CrossProducts, pool

OWN_FROM = 12
"""Patients of a type at which its variance along the factor of largest spread over
genes is half its own, half that within all types; along a factor of a tenth of that
spread it takes ten times as many. Chosen on validation institutions, as those below."""
NOISE_FACTOR = 2.0
"""The noise of unseen patients over that of those whom the factors were fitted to."""
LEAST_VARIANCE = 1e-3
"""Of a factor within a type, as a share of its variance over all."""
NO_SPREAD = 1e-9
"""A factor beyond what the data tell has no loadings."""
NEVER = -1e6
"""Log share of a type of which nothing is known."""


def fit(
    groups: Mapping[str, CrossProducts], types: Sequence[str], rank: int
) -> dict[str, NDArray[np.float32]]:
    """Return the parameters of `model.LinearStart`, by name.

    Parameters
    ----------
    groups
        Pooled cross-products of each type's patients and of the others.
    types
        Types to tell apart, K of them; none: a single component of mean 0 (K is 1). One
        of which `groups` tell nothing gets no share.
    rank
        Factors, R.
    """
    whole = pool(groups.values()).covariance()
    loadings, noise = (a.astype(np.float64) for a in factor_analysis(whole, rank))
    known = [n for n in types if n in groups and groups[n].counts.max() > 0]
    K = max(len(types), 1)
    means = np.zeros((K, len(whole)))
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
        spread = np.sqrt((loadings**2).sum(axis=0))  # (R,)
        own_from = OWN_FROM * spread.max() / np.maximum(spread, NO_SPREAD)
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
    found = {
        "loadings": loadings,
        "noise": NOISE_FACTOR * noise,
        "means": means,
        "precisions": precisions,
        "log_shares": log_shares,
    }
    return {name: array.astype(np.float32) for name, array in found.items()}


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

    Factors beyond what the data tell have no loadings, and get zeros.
    """
    weighted = loadings / noise[:, None]
    gram: NDArray[np.float64] = loadings.T @ weighted
    found: NDArray[np.float64] = np.linalg.pinv(gram, hermitian=True) @ weighted.T
    return found
