"""Known marker genes: their ranks among all genes in what a model attributes.

V genes, C cancer types.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

PERMUTATIONS = 10_000
"""Of the gene names."""

Floats = NDArray[np.float64]


def listed(
    genes: Sequence[str], types: Sequence[str]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return cancer, gene and source of the markers measured, and the names of others.

    Cancers without a class in the model are left out.
    """
    own = resources.files(__package__) / "marker_genes.toml"
    found = [
        (entry["cancer"], gene, entry["source"])
        for entry in tomllib.loads(own.read_text(encoding="utf-8"))["marker"]
        for gene in entry["genes"]
        if entry["cancer"] in types
    ]
    measured = [one for one in found if one[1] in genes]
    return measured, sorted({gene for _, gene, _ in found} - set(genes))


def permuted(ranked: Floats, places: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return the mean percentile at some places (C, V), and the p of one as high."""
    reached = float(np.mean([ranked[at] for at in places]))
    rng = np.random.default_rng(0)
    sums = np.zeros(PERMUTATIONS)
    for row in {k for k, _ in places}:
        n = sum(k == row for k, _ in places)
        known = ranked[row][~np.isnan(ranked[row])]
        for i in range(PERMUTATIONS):
            sums[i] += rng.choice(known, n, replace=False, shuffle=False).sum()
    as_high = int((sums / len(places) >= reached - 1e-9).sum())
    return reached, (1 + as_high) / (1 + PERMUTATIONS)


def percentiles(values: Floats) -> Floats:
    """Return the percentile of each gene in its row, 0 to 100, ties averaged."""
    ranks = np.array([rankdata(row, nan_policy="omit") for row in values])
    known = (~np.isnan(values)).sum(axis=1, keepdims=True)
    found: Floats = 100 * (ranks - 1) / np.maximum(known - 1, 1)
    return found
