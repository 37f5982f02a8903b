"""The gene list that all sites of a study share: identifiers, order and hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedgex.common.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """An ordered list of distinct gene symbols; V genes."""

    genes: tuple[str, ...]
    """HGNC symbols, sorted."""

    def __post_init__(self) -> None:
        """Refuse an empty, unsorted or repeating list."""
        if not self.genes or list(self.genes) != sorted(set(self.genes)):
            raise ConfigError(
                f"the vocabulary holds {len(self.genes)} genes; expected one or more, "
                "sorted, each once."
            )

    def __len__(self) -> int:
        """Return the number of genes, V."""
        return len(self.genes)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the genes joined by newlines; equal lists have equal hashes."""
        return hashlib.sha256("\n".join(self.genes).encode()).hexdigest()

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each gene."""
        return {gene: i for i, gene in enumerate(self.genes)}

    def place(
        self, genes: Sequence[str], values: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Move columns onto the vocabulary.

        Parameters
        ----------
        genes
            Names of the columns of `values`; those outside the vocabulary are dropped.
        values
            Expression, shape (N, len(genes)).

        Returns
        -------
        NDArray
            Shape (N, V); NaN wherever a gene of the vocabulary was not among `genes`.
        """
        placed = np.full((len(values), len(self)), np.nan, dtype=np.float32)
        at = [(self.index[g], i) for i, g in enumerate(genes) if g in self.index]
        if at:
            into, out = map(list, zip(*at, strict=True))
            placed[:, into] = values[:, out]
        return placed


def least_count(share: float, n: int) -> int:
    """Return the fewest of n that are at least a share of them.

    A share as it is written: 7 of 25 are .28 of them, though .28 * 25 is
    7.000000000000001 in floating point.
    """
    return math.ceil(Fraction(str(share)) * n)


def agree(panels: Mapping[str, Sequence[str]], min_share: float) -> Vocabulary:
    """Return the genes that at least a share of the sites measure.

    Parameters
    ----------
    panels
        Genes that each site measures, by site.
    min_share
        Least share of the sites, from 0 (one site is enough) to 1 (all of them).

    Raises
    ------
    ConfigError
        If no gene is measured by enough sites.
    """
    counts: dict[str, int] = {}
    for genes in panels.values():
        for gene in set(genes):
            counts[gene] = counts.get(gene, 0) + 1
    needed = max(1, least_count(min_share, len(panels)))
    kept = sorted(gene for gene, count in counts.items() if count >= needed)
    if not kept:
        raise ConfigError(
            f"none of {len(counts)} genes is measured by {min_share:.0%} of "
            f"{len(panels)} sites; lower vocabulary.min_share, or check that the "
            "sites name genes alike."
        )
    return Vocabulary(tuple(kept))
