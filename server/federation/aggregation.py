"""Aggregation statistics over sites: pure functions on NumPy arrays.

S sites, always in order of name, so that the order of arrival changes no bit; V genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedgex.common.data.vocabulary import least_count

Array = NDArray[np.floating]
Weight = NDArray[np.float64]
"""A site's weight: shape () for an array, or (V,) for the rows of genes."""


def weighted_mean(
    arrays: Iterable[Array], weights: Sequence[Weight], global_parameter: Array
) -> Array:
    """Average one parameter over the sites, holding one site's array at a time.

    With weights of shape (V,), each gene's row is averaged over the sites whose weight
    for it is above zero (those that measured the gene); a row that no site measured
    keeps its global value:

        new[g] = sum_s w_s[g] x_s[g] / sum_s w_s[g]

    Parameters
    ----------
    arrays
        The parameter at each site, S arrays of the shape of `global_parameter`.
    weights
        Weight of each site, in the same order, at least zero.
    global_parameter
        The parameter at the start of the round; its dtype is kept.
    """
    total = np.zeros(global_parameter.shape, dtype=np.float64)
    for array, weight in zip(arrays, weights, strict=True):
        total += _along_rows(weight, global_parameter) * array
    sums = _along_rows(np.sum(np.stack(weights), axis=0), global_parameter)
    mean = np.divide(
        total, sums, out=global_parameter.astype(np.float64), where=sums > 0
    )
    return mean.astype(global_parameter.dtype)


def median(
    arrays: Iterable[Array], weights: Sequence[Weight], global_parameter: Array
) -> Array:
    """Return the median over the sites of each number (Yin et al. 2018).

    Sites with weight zero are excluded; other weights do not matter.
    """
    return _order_statistic(
        arrays, weights, global_parameter, lambda x: np.asarray(np.median(x, axis=0))
    )


def trimmed_mean(
    arrays: Iterable[Array],
    weights: Sequence[Weight],
    global_parameter: Array,
    trim_share: float,
) -> Array:
    """Return the mean over the sites after cutting off a share at either end.

    After Yin et al. 2018, definition 2, but that the number of sites cut off is rounded
    up, as far as one is left: of few sites, such as those that measure a rare gene, one
    is cut off at either end, not none. Sites with weight zero are excluded; other
    weights do not matter.
    """

    def trimmed(x: NDArray[np.float64]) -> NDArray[np.float64]:
        n = len(x)
        cut = min(least_count(trim_share, n), (n - 1) // 2)
        return np.asarray(np.sort(x, axis=0)[cut : n - cut].mean(axis=0))

    return _order_statistic(arrays, weights, global_parameter, trimmed)


def _order_statistic(
    arrays: Iterable[Array],
    weights: Sequence[Weight],
    global_parameter: Array,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> Array:
    """Apply a statistic over sites, grouping rows by the sites that measured them."""
    stacked = np.stack([array.astype(np.float64) for array in arrays])  # (S, ...)
    eligible = np.stack(weights) > 0  # (S,) or (S, V)
    if eligible.ndim == 1:
        return statistic(stacked[eligible]).astype(global_parameter.dtype)
    result = global_parameter.copy()
    patterns, rows_of = np.unique(eligible, axis=1, return_inverse=True)
    for i, sites in enumerate(patterns.T):
        if sites.any():
            rows = rows_of == i
            result[rows] = statistic(stacked[sites][:, rows]).astype(
                global_parameter.dtype
            )
    return result


def _along_rows(weight: Weight, like: Array) -> NDArray[np.float64]:
    """Shape a weight () or (V,) so that it multiplies the rows of an array."""
    return np.asarray(weight).reshape(weight.shape + (1,) * (like.ndim - weight.ndim))
