"""How well hidden expression was restored.

N patients, V genes, standardised expression. Only hidden cells count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fedgex.common.errors import FedgexError

MIN_CELLS = 3
"""Fewest hidden cells of a gene that a correlation is computed from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RestorationScore:
    """Errors over hidden cells, and correlations gene by gene."""

    mse: float
    """Mean squared error over all hidden cells, SD^2; lower is better."""
    mae: float
    """Mean absolute error over all hidden cells, SD; lower is better."""
    gene_mse: NDArray[np.float64]
    """Mean squared error of each gene, shape (V,); NaN where nothing was hidden."""
    gene_pearson: NDArray[np.float64]
    """Correlation over each gene's hidden cells, shape (V,), higher is better. NaN with
    fewer than MIN_CELLS cells, or where the true or the restored values are constant
    (as the mean imputer's are)."""
    gene_spearman: NDArray[np.float64]
    """The same of ranks, ties averaged."""

    @property
    def median_pearson(self) -> float:
        """Median over the genes evaluated; NaN without any."""
        return float(np.median(_evaluated(self.gene_pearson)))

    @property
    def median_spearman(self) -> float:
        """Median over the genes evaluated; NaN without any."""
        return float(np.median(_evaluated(self.gene_spearman)))

    @property
    def n_genes_evaluated(self) -> int:
        """Genes that have a correlation."""
        return int(np.isfinite(self.gene_pearson).sum())

    @property
    def n_genes_r_above_0(self) -> int:
        """Genes with a Pearson correlation above 0."""
        return int((self.gene_pearson > 0).sum())

    @property
    def n_genes_r_above_half(self) -> int:
        """Genes with a Pearson correlation above 0.5."""
        return int((self.gene_pearson > 0.5).sum())

    def as_dict(self) -> dict[str, float | int]:
        """Return the score as flat numbers; pearson and spearman are medians."""
        return {
            "mse": self.mse,
            "mae": self.mae,
            "pearson": self.median_pearson,
            "spearman": self.median_spearman,
            "genes_r_above_0": self.n_genes_r_above_0,
            "genes_r_above_half": self.n_genes_r_above_half,
            "genes_judged": self.n_genes_evaluated,
        }


def restoration(
    true: NDArray[np.floating[Any]],
    restored: NDArray[np.floating[Any]],
    hidden: NDArray[np.bool_],
) -> RestorationScore:
    """Judge restored values against the true ones.

    Parameters
    ----------
    true
        Standardised expression, shape (N, V); NaN is allowed where nothing is hidden.
    restored
        What a model or imputer put there, shape (N, V).
    hidden
        Cells that were hidden from it, shape (N, V); all others are ignored.

    Raises
    ------
    FedgexError
        If nothing is hidden, if shapes differ, or if a hidden cell's true or restored
        value is not finite.
    """
    _check(true, restored, hidden)
    x = np.where(hidden, true, np.nan).astype(np.float64)
    y = np.where(hidden, restored, np.nan).astype(np.float64)
    error = np.where(hidden, y - x, 0.0)
    n_cells = hidden.sum(axis=0)  # (V,)
    with np.errstate(invalid="ignore"):
        gene_mse = (error**2).sum(axis=0) / n_cells
    return RestorationScore(
        mse=float((error**2).sum() / n_cells.sum()),
        mae=float(np.abs(error).sum() / n_cells.sum()),
        gene_mse=gene_mse,
        gene_pearson=_correlation(x, y),
        gene_spearman=_correlation(_ranks(x), _ranks(y)),
    )


def _check(
    true: NDArray[np.floating[Any]],
    restored: NDArray[np.floating[Any]],
    hidden: NDArray[np.bool_],
) -> None:
    if not true.shape == restored.shape == hidden.shape:
        raise FedgexError(
            f"true, restored and hidden have shapes {true.shape}, {restored.shape} and "
            f"{hidden.shape}; expected one (N, V)."
        )
    if not hidden.any():
        raise FedgexError(
            "no cell is hidden, so nothing can be evaluated; raise the missing rate "
            "or check that the patients have any measured genes."
        )
    for name, values in (("true", true), ("restored", restored)):
        n_wrong = int((hidden & ~np.isfinite(values)).sum())
        if n_wrong:
            raise FedgexError(
                f"{name} is not finite in {n_wrong} of {hidden.sum()} hidden cells; "
                "expected finite values in all of them."
            )


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Pearson's r down the columns, ignoring NaN; NaN if too few or constant."""
    n = np.isfinite(x).sum(axis=0)
    evaluated = (n >= MIN_CELLS) & _varies(x) & _varies(y)
    r = np.full(x.shape[1], np.nan)
    x, y, n = x[:, evaluated], y[:, evaluated], n[evaluated]
    x = np.nan_to_num(x - np.nansum(x, axis=0) / n)
    y = np.nan_to_num(y - np.nansum(y, axis=0) / n)
    r[evaluated] = (x * y).sum(axis=0) / np.sqrt(
        (x**2).sum(axis=0) * (y**2).sum(axis=0)
    )
    return r


def _varies(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    # Not by the variance: rounding of the mean gives a constant one above 0.
    varies: NDArray[np.bool_] = np.fmax.reduce(x) > np.fmin.reduce(x)
    return varies


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks down the columns, ties averaged, NaN left out."""
    ranks: NDArray[np.float64] = rankdata(x, axis=0, nan_policy="omit")
    return ranks


def _evaluated(correlations: NDArray[np.float64]) -> NDArray[np.float64]:
    finite = correlations[np.isfinite(correlations)]
    return finite if finite.size else np.array([np.nan])
