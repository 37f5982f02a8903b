"""Reference imputers to hold restoration against: mean, neighbours, and Gaussians.

All work on standardised expression, N patients by V genes, NaN where missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh
from scipy.special import softmax
from sklearn.impute import KNNImputer

from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.moments import GeneMoments, pool
from fedgex.common.errors import ConfigError

Float = TypeVar("Float", bound=np.floating[Any])

RIDGE = 0.05
"""Added to the variance of each standardised gene: the part that no other gene
explains; it keeps a covariance of few patients invertible."""


class Imputer(Protocol):
    """Anything that fills missing cells."""

    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Return a copy of values (N, V) with every NaN filled, and nothing else."""


class MeanImputer:
    """Imputation by each gene's mean: the baseline of every other imputer."""

    def __init__(self, mean: NDArray[np.float64] | float = 0.0) -> None:
        self.mean = mean
        """Shape (V,), or 0, the mean of standardised genes."""

    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Fill with the mean."""
        return _fill(values, np.broadcast_to(self.mean, values.shape))


class NearestNeighbours:
    """Mean of the k nearest training patients who have the gene (Troyanskaya 2001).

    Distance is Euclidean over the genes that both have, scaled up for those missing.
    Needs the training patients themselves, so it is a pooled reference only.

    References
    ----------
    Troyanskaya et al., Bioinformatics 17:520, 2001.
    """

    def __init__(self, training: NDArray[np.floating[Any]], k: int = 10) -> None:
        """Remember training patients, standardised, shape (N, V), NaN where missing."""
        self._imputer = KNNImputer(n_neighbors=k, keep_empty_features=True)
        self._imputer.fit(training)

    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Fill with the neighbours' mean; 0 for a gene that no training patient has."""
        return _fill(values, self._imputer.transform(values))


class GaussianImputer:
    """Conditional mean given the measured genes: the best linear imputer there is.

    With covariance S = covariance + ridge * I and measured genes O, missing genes M,

        E[x_M | x_O] = m_M + S_MO S_OO^-1 (x_O - m_O).

    The covariance may come from `CrossProducts`, so the imputer can be computed across
    hospitals without any patient leaving one.
    """

    def __init__(
        self,
        covariance: NDArray[np.float64],
        *,
        mean: NDArray[np.float64] | float = 0.0,
        ridge: float = RIDGE,
    ) -> None:
        """Take covariance (V, V) and mean (V,), and invert once.

        Negative eigenvalues, which pairwise-complete covariances can have, become 0
        before the ridge is added.

        Raises
        ------
        ConfigError
            If the covariance plus ridge cannot be inverted.
        """
        variances, axes = np.linalg.eigh(covariance)
        variances = np.maximum(variances, 0) + ridge
        if variances[0] <= variances[-1] * len(variances) * np.finfo(float).eps:
            raise ConfigError(
                "the covariance has directions of zero variance; expected a positive "
                "ridge, or a PPCA rank below that of the data."
            )
        self.mean = np.broadcast_to(np.asarray(mean, dtype=np.float64), variances.shape)
        self.covariance: NDArray[np.float64] = (axes * variances) @ axes.T
        self._precision: NDArray[np.float64] = (axes / variances) @ axes.T
        self._log_det = float(np.log(variances).sum())

    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Fill with the conditional mean; a patient without any values gets the mean.

        A gene that was never measured has covariance 0 with all others and so gets its
        mean, 0.
        """
        return _fill(values, self.condition(values)[0])

    def condition(
        self, values: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return E[x | measured], (N, V), and log p(measured), (N,).

        For each pattern of missing cells the smaller of the two sets is solved for.
        With L = S^-1, z = x - m at measured genes and 0 elsewhere, and c the
        conditional mean of x - m,

            c_M = S_MO S_OO^-1 z_O              = -L_MM^-1 (L z)_M
            log det S_OO                        = log det S + log det L_MM
            z_O' S_OO^-1 z_O                    = z' L c

        (partitioned inverse, e.g. Bishop 2006, section 2.3.1).
        """
        missing = np.isnan(values)
        z = np.where(missing, 0.0, values - self.mean)  # (N, V)
        pulled = z @ self._precision  # (N, V)
        conditional = z.copy()
        log_det = np.empty(len(values))
        for rows, absent in _patterns(missing):
            M, O = np.flatnonzero(absent), np.flatnonzero(~absent)  # noqa: E741
            if len(M) <= len(O):
                factor, log_det[rows] = _factor(self._precision[np.ix_(M, M)])
                log_det[rows] += self._log_det
                solved = -cho_solve(factor, pulled[np.ix_(rows, M)].T)  # (|M|, rows)
            else:
                factor, log_det[rows] = _factor(self.covariance[np.ix_(O, O)])
                weights = cho_solve(factor, z[np.ix_(rows, O)].T)  # (|O|, rows)
                solved = self.covariance[np.ix_(M, O)] @ weights
            conditional[np.ix_(rows, M)] = solved.T
        distance = (z * (conditional @ self._precision)).sum(axis=1)
        n_measured = (~missing).sum(axis=1)
        log_density = -(n_measured * math.log(2 * math.pi) + log_det + distance) / 2
        return conditional + self.mean, log_density


def ppca(covariance: NDArray[np.float64], rank: int) -> GaussianImputer:
    """Return the imputer of probabilistic PCA: W W' + s2 I in place of the covariance.

    s2 is the mean of the V - rank smallest eigenvalues, and W = U (lambda - s2)^(1/2)
    comes from the `rank` largest. Fewer patients than the rank, or panels that differ,
    can leave nothing for s2; it is then RIDGE, for want of an inverse.

    Raises
    ------
    ConfigError
        If the rank is not between 1 and V - 1.

    References
    ----------
    Tipping & Bishop, J. R. Statist. Soc. B 61:611, 1999, eqs. 7 and 8.
    """
    V = len(covariance)
    if not 1 <= rank < V:
        raise ConfigError(f"the PPCA rank is {rank}; expected 1 to {V - 1}.")
    variances, axes = np.linalg.eigh(covariance)  # ascending
    variances = np.maximum(variances, 0)
    noise = variances[:-rank].mean()
    if noise <= 1e-9 * variances[-1]:  # nothing but rounding
        noise = RIDGE
    W = axes[:, -rank:] * np.sqrt(np.maximum(variances[-rank:] - noise, 0))  # (V, rank)
    return GaussianImputer(W @ W.T + noise * np.eye(V), ridge=0.0)


def factor_analysis(
    covariance: NDArray[np.float64], rank: int, n_steps: int = 30
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return loadings (V, R) and noise variance (V,) of the best factor model.

    Alternates the two conditions of maximum likelihood: principal axes of the noise-
    scaled covariance, and a noise that makes up each gene's variance (Joereskog 1967);
    no noise falls below `RIDGE`. Ranks beyond what the data tell are loaded with zero.
    """
    variance = np.diag(covariance).copy()
    noise = np.maximum(variance / 2, RIDGE)
    size = len(covariance)
    rank_known = min(rank, size - 1)
    loadings = np.zeros((size, rank))
    for _ in range(n_steps):
        scale = np.sqrt(noise)
        values, vectors = eigh(
            covariance / np.outer(scale, scale),
            subset_by_index=(size - rank_known, size - 1),
        )
        axes = vectors * np.sqrt(np.maximum(values - 1, 0))
        loadings[:, :rank_known] = scale[:, None] * axes
        noise = np.maximum(variance - (loadings**2).sum(axis=1), RIDGE)
    return loadings.astype(np.float32), noise.astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class MixtureImputer:
    """A Gaussian for each cancer type; the type is inferred from the measured genes.

    How far an imputer gets that reads context but is linear within a type.
    """

    types: tuple[str, ...]
    """Cancer types, K of them."""
    shares: NDArray[np.float64]
    """Share of each type among the training patients, shape (K,)."""
    components: tuple[GaussianImputer, ...]
    """Expression within each type, length K."""

    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Fill with the types' conditional means, weighted by P(type | measured)."""
        means, responsibilities = self._condition(values)
        return _fill(values, np.einsum("nk,knv->nv", responsibilities, means))

    def responsibilities(
        self, values: NDArray[np.floating[Any]]
    ) -> NDArray[np.float64]:
        """Return P(type | measured genes), shape (N, K)."""
        return self._condition(values)[1]

    def _condition(
        self, values: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return conditional means (K, N, V) and responsibilities (N, K)."""
        means, log_densities = zip(
            *(component.condition(values) for component in self.components), strict=True
        )
        log_joint = np.log(self.shares) + np.stack(log_densities, axis=1)  # (N, K)
        return np.stack(means), softmax(log_joint, axis=1)


def fit_mixture(
    standardised: NDArray[np.floating[Any]], labels: Sequence[str]
) -> MixtureImputer:
    """Fit one Gaussian to each cancer type, covariance half shared and half its own.

    Parameters
    ----------
    standardised
        Training patients, shape (N, V), NaN where missing. A gene that no patient of a
        type has gets mean 0 and its variance from the shared half.
    labels
        Cancer type of each patient, length N.

    Returns
    -------
    MixtureImputer
        Each component has covariance (shared + own) / 2 + RIDGE I, where own is the
        covariance within the type and shared that within types, pooled over all.
    """
    types = sorted(set(labels))
    rows_of = [standardised[[label == t for label in labels]] for t in types]
    means = [GeneMoments.of(rows).mean for rows in rows_of]
    within = [
        CrossProducts.of(rows - mean) for rows, mean in zip(rows_of, means, strict=True)
    ]
    shared = pool(within).covariance()
    return MixtureImputer(
        types=tuple(types),
        shares=np.array([len(rows) for rows in rows_of]) / len(standardised),
        components=tuple(
            GaussianImputer((shared + own.covariance()) / 2, mean=mean)
            for own, mean in zip(within, means, strict=True)
        ),
    )


def _fill(values: NDArray[Float], filling: NDArray[Any]) -> NDArray[Float]:
    """Return a copy of values with NaN cells taken from `filling`."""
    missing = np.isnan(values)
    filled = values.copy()
    filled[missing] = filling[missing]
    return filled


def _patterns(
    missing: NDArray[np.bool_],
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
    """Yield each distinct row of `missing` (N, V) with the indices of its rows.

    Patients of one panel share a pattern, and so one factorisation.
    """
    rows_of: dict[bytes, list[int]] = {}
    for i, row in enumerate(missing):
        rows_of.setdefault(row.tobytes(), []).append(i)
    for rows in rows_of.values():
        yield np.array(rows), missing[rows[0]]


def _factor(
    matrix: NDArray[np.float64],
) -> tuple[tuple[NDArray[np.float64], bool], float]:
    """Return the Cholesky factor of a matrix, and its log determinant."""
    factor = cho_factor(matrix, lower=True)
    return factor, 2 * float(np.log(np.diagonal(factor[0])).sum())
