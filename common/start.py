"""The linear start: a mixture of factor models from the sites' pooled cross-products.

In cancer type k, a patient's standardised expression is

    x = mean_k + loadings z + noise,    z ~ N(0, C_k)

with loadings and noise common to all types, so that the genes of a patient are summed
up once, whatever the type. Where sites measure different genes, their sums are first
completed by what the model expects. V genes, K types, R factors.

References
----------
Ghahramani & Hinton, The EM algorithm for mixtures of factor analyzers, 1996 (there each
component has loadings of its own). Dempster, Laird & Rubin, Maximum likelihood from
incomplete data via the EM algorithm, 1977.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedgex.common.imputers import factor_analysis
from fedgex.common.statistics import CrossProducts, pool, pool_types

OWN_FROM = 12
"""Patients of a type at which its variance along the factor of largest spread over
genes is half its own, half that within all types; along a factor of a tenth of that
spread ten times as many are needed. Chosen on validation institutions, as below."""
NOISE_FACTOR = 2.0
"""The noise of unseen patients over that of those whom the factors were fitted to."""
COMPLETIONS = 8
"""Times that the sums of sites which lack genes are completed, and the model fitted."""
COMPLETING_STEPS = 3
"""Of each of these fits; more of them fit what was completed, not unseen patients."""
COMPLETED_NOISE = 1.4
"""The noise of completed sums over that of the patients that it was fitted to."""
LEAST_VARIANCE = 1e-3
"""Of a factor within a type, as a share of its variance over all."""
NO_SPREAD = 1e-9
"""A factor beyond what the data tell has no loadings."""
NEVER = -1e6
"""Log share of a type of which nothing is known."""


def pool_completed(
    sites: Callable[[], Iterable[Mapping[str, CrossProducts]]],
    types: Sequence[str],
    rank: int,
) -> dict[str, CrossProducts]:
    """Return each group's cross-products over all sites, as if all had every gene.

    Where sites measure different genes, each pair of genes is known of other sites,
    with other cancers, and such a covariance restores badly. So the model is fitted,
    each site's sums are replaced by what it expects of them had the site measured every
    gene, and so on: expectation maximisation. The patients of a group are taken to have
    the same genes; then their sums tell all that they themselves would, so that no site
    is asked again. Where nobody lacks a gene nothing is completed.

    Parameters
    ----------
    sites
        Returns the sites' sums by group, each time from the first, see
        `statistics.by_type`.
    types
        Types to tell apart; none: all patients are one group.
    rank
        Factors, R; 0: nothing is completed.
    """
    has = [sums.counts > 0 for groups in sites() for sums in groups.values()]
    groups = pool_types(sites())
    known = np.logical_or.reduce(has)
    if not rank or all((own == known).all() for own in has):
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
    """Return what the model expects of a group's sums had it every gene.

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
    spread = np.linalg.inv(weighted @ W[o] + precision)
    B = W[~o] @ spread @ weighted
    off = own - mean[o]
    moved = B @ off
    about = second - np.outer(own, mean[o]) - np.outer(mean[o], off)
    there = np.outer(mean[~o], own) + B @ (about + np.outer(off, mean[o]))
    both = np.outer(mean[~o], mean[~o] + moved) + np.outer(moved, mean[~o])
    both += B @ about @ B.T + W[~o] @ spread @ W[~o].T + np.diag(noise[~o])
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

    Factors beyond what the data tell have no loadings, and get zeros.
    """
    weighted = loadings / noise[:, None]
    gram: NDArray[np.float64] = loadings.T @ weighted
    found: NDArray[np.float64] = np.linalg.pinv(gram, hermitian=True) @ weighted.T
    return found
