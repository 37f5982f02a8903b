"""Selection of the smallest gene panel that separates cancer types, from pooled sums.

The sites send what they send for the linear start, cross-products by cancer type (see
`cross_products.by_type`), and no more; the server pools them and chooses genes. To find
the number of genes that is enough, each site counts its own patients whom a panel
classifies correctly. V genes, K types, N patients, P pairs of types.

Types are taken as normal, each with a mean of its own and all with one covariance. Two
types k and l at Mahalanobis distance D_kl are then confused, at most, as often as the
Bhattacharyya bound says, and all of them, with shares p, at most

    bound = sum over k < l of (p_k p_l)^(1/2) exp(-D_kl^2 / 8)

The panel grows by the gene that lowers the bound most. Genes that separate types which
are far apart already lower it little, so no pair is forgotten. With r_k and v the means
and variance of a gene after its regression, within types, on the genes chosen so far,
the gene adds (r_k - r_l)^2 / v to D_kl^2: what a gene only repeats does not count.

References
----------
Fukunaga, Introduction to Statistical Pattern Recognition, 2nd ed. 1990, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.errors import ConfigError
from fedgex.common.evaluation.imputers import RIDGE


@dataclass(frozen=True, kw_only=True, eq=False)
class Types:
    """Distribution of the genes in each cancer type, estimated from pooled sums."""

    names: tuple[str, ...]
    """K of them."""
    shares: NDArray[np.float64]
    """Of each type among the patients, shape (K,)."""
    means: NDArray[np.float64]
    """Of standardised genes, shape (K, V)."""
    within: NDArray[np.float64]
    """Covariance within types plus `RIDGE` on the diagonal, shape (V, V)."""
    known: NDArray[np.bool_]
    """Genes of which something is known in each type, shape (V,)."""

    @classmethod
    def of(cls, groups: Mapping[str, CrossProducts], types: Sequence[str]) -> Self:
        """Estimate the types from the sums over each type's patients.

        Parameters
        ----------
        groups
            Pooled over the sites, see `cross_products.pool_types`.
        types
            To separate; one that is not in `groups` is left out.

        Raises
        ------
        ConfigError
            If `groups` has fewer than two of the types.
        """
        names = tuple(name for name in types if name in groups)
        if len(names) < 2:
            raise ConfigError(
                f"cross-products describe {len(names)} of the cancer types "
                f"{', '.join(types)}; expected two or more. Lower minimum_cohort, or "
                "let more sites share cross-products."
            )
        sums = [groups[name] for name in names]
        pairs = sum(np.maximum(each.pair_counts, 0) for each in sums)
        deviations = sum(each.about_mean() for each in sums)
        within = deviations / np.maximum(pairs, 1)
        counts = np.array([each.counts for each in sums])  # (K, V)
        most = counts.max(axis=1)
        return cls(
            names=names,
            shares=most / most.sum(),
            means=np.array([each.mean for each in sums]),
            within=_positive(within) + RIDGE * np.eye(len(within)),
            known=counts.min(axis=0) > 0,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Genes in the order in which they were chosen: every beginning is a panel."""

    genes: NDArray[np.intp]
    """Positions in the vocabulary, shape (size,)."""
    bound: NDArray[np.float64]
    """Largest share of patients misclassified by the first n genes, shape (size,)."""


def select(types: Types, size: int) -> Selection:
    """Choose genes that separate the types, greedily.

    Costs V (P + size) operations a gene.

    Raises
    ------
    ConfigError
        If `size` is not 1 to the number of genes known in each type.
    """
    if not 1 <= size <= types.known.sum():
        raise ConfigError(
            f"a panel of {size} genes was asked for; expected 1 to the "
            f"{types.known.sum()} genes that are known in each cancer type."
        )
    one, other = np.triu_indices(len(types.names), 1)
    weight = np.sqrt(types.shares[one] * types.shares[other])  # (P,)
    means, variance = types.means.copy(), np.diag(types.within).copy()
    candidate = types.known.copy()
    distance = np.zeros(len(one))
    roots = np.zeros((size, len(variance)))  # rows of the Cholesky factor, as chosen
    genes, bounds = np.zeros(size, dtype=np.intp), np.zeros(size)
    for n in range(size):
        gain = (means[one] - means[other]) ** 2 / np.where(candidate, variance, 1)
        bound = weight @ np.exp(-(distance[:, None] + gain) / 8)  # (V,)
        best = int(np.argmin(np.where(candidate, bound, np.inf)))
        genes[n], bounds[n] = best, bound[best]
        distance += gain[:, best]
        sd = np.sqrt(variance[best])
        roots[n] = (types.within[best] - roots[:n, best] @ roots[:n]) / sd
        means -= np.outer(means[:, best] / sd, roots[n])
        variance -= roots[n] ** 2
        candidate[best] = False
    return Selection(genes=genes, bound=bounds)


def classify(
    types: Types, panel: NDArray[np.intp], standardised: NDArray[np.floating[Any]]
) -> NDArray[np.intp]:
    """Return the type of each patient by the linear discriminant of a panel's genes.

    Parameters
    ----------
    panel
        Positions in the vocabulary.
    standardised
        Shape (N, V); NaN counts as the federation's mean, 0.

    Returns
    -------
    NDArray
        Positions in `types.names`, shape (N,).
    """
    means = types.means[:, panel]  # (K, G)
    weights = cho_solve(cho_factor(types.within[np.ix_(panel, panel)]), means.T)
    constant = np.log(types.shares) - (means.T * weights).sum(axis=0) / 2
    scores = np.nan_to_num(standardised[:, panel].astype(np.float64)) @ weights
    best: NDArray[np.intp] = (scores + constant).argmax(axis=1)
    return best


def n_right(
    types: Types,
    panel: NDArray[np.intp],
    standardised: NDArray[np.floating[Any]],
    cancer_type: Sequence[str | None],
) -> int:
    """Count a site's patients whom a panel classifies correctly."""
    names = np.array(types.names)
    truth = np.array([name or "" for name in cancer_type])
    return int((names[classify(types, panel, standardised)] == truth).sum())


def enough(right: Mapping[int, float], share: float) -> int:
    """Return the smallest panel that classifies nearly as well as the largest.

    Parameters
    ----------
    right
        Patients classified correctly over all sites, or their share, by panel size.
    share
        Of the largest panel's correct patients that suffices, above 0 and up to 1.
    """
    return min(size for size in right if right[size] >= share * right[max(right)])


def _positive(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a covariance without eigenvalues so negative that the ridge is too small.

    A pairwise one has them where panels differ. Most have none, which a Cholesky
    factorisation shows in a tenth of the time.
    """
    try:
        np.linalg.cholesky(covariance + RIDGE / 2 * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        variances, axes = np.linalg.eigh(covariance)
        positive: NDArray[np.float64] = (axes * np.maximum(variances, 0)) @ axes.T
        return positive
    return covariance
