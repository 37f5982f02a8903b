"""Sums of genes and of the products of every two, by group of patients.

N patients (rows), V genes of the vocabulary. A cell that was not measured is NaN. Sums
are taken on the canonical scale, in float64, and standardised as sums: no number of
another party enters before they are taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedgex.common.data.moments import (
    SUPPRESSED,
    Standardisation,
    known_counts,
    refuse_non_finite,
    refuse_other_genes,
)
from fedgex.common.errors import UpdateError

Number = TypeVar("Number", bound=np.generic)

OTHERS = "others"
"""Group of the patients of all cancer types that the study does not name."""

MIN_SITES = 2
"""Fewest sites behind a group's sums, since all sites receive what is made of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossProducts:
    """Sums of standardised genes, and of the products of every two.

    With fewer patients than genes they determine the profiles up to one rotation common
    to all of them, and a single profile up to sign. So a site sends them `suppressed`,
    and only if its policy permits it.
    """

    products: NDArray[np.float64]
    """Sum over the patients who have both genes of their product, shape (V, V)."""
    pair_counts: NDArray[np.int64]
    """Patients who have both genes, or SUPPRESSED, shape (V, V)."""
    totals: NDArray[np.float64]
    """Sum of each gene over the patients who have it, shape (V,)."""

    def __post_init__(self) -> None:
        """Refuse what no site can have summed."""
        shapes = {self.products.shape, self.pair_counts.shape, 2 * self.totals.shape}
        if len(shapes) > 1 or self.totals.ndim != 1:
            raise UpdateError(
                f"cross-products have shapes {sorted(shapes)}; expected one (V, V) for "
                "products and pair_counts, and (V,) for totals."
            )
        refuse_non_finite("products", self.products)
        refuse_non_finite("totals", self.totals)
        wrong = self.pair_counts < SUPPRESSED
        wrong |= (self.pair_counts <= 0) & (self.products != 0)
        wrong[np.diag_indices_from(wrong)] |= (self.counts <= 0) & (self.totals != 0)
        if wrong.any():
            raise UpdateError(
                f"cross-products of {wrong.sum()} pairs are impossible; expected "
                f"counts of 0 or more, or {SUPPRESSED} for suppressed, and sums of 0 "
                "where nothing is counted."
            )

    @classmethod
    def of(cls, standardised: NDArray[np.floating[Any]]) -> Self:
        """Sum products of standardised values of shape (N, V)."""
        present = (~np.isnan(standardised)).astype(np.float64)
        x = np.where(present, standardised, 0).astype(np.float64)
        return cls(
            products=x.T @ x,
            pair_counts=np.rint(present.T @ present).astype(np.int64),
            totals=x.sum(axis=0),
        )

    def suppressed(self, min_cell_count: int) -> Self:
        """Return the sums without pairs measured in fewer patients."""
        return self.where(self.pair_counts >= min_cell_count)

    def where(self, known: NDArray[np.bool_]) -> Self:
        """Return the sums of the pairs that are marked, shape (V, V)."""
        return type(self)(
            products=np.where(known, self.products, 0.0),
            pair_counts=np.where(known, self.pair_counts, SUPPRESSED),
            totals=np.where(np.diag(known), self.totals, 0.0),
        )

    def __add__(self, other: Self) -> Self:
        """Return the cross-products of both groups of patients together."""
        refuse_other_genes(len(self.products), len(other.products))
        counts = known_counts(self.pair_counts) + known_counts(other.pair_counts)
        return type(self)(
            products=self.products + other.products,
            pair_counts=counts,
            totals=self.totals + other.totals,
        )

    @property
    def counts(self) -> NDArray[np.int64]:
        """Patients who have each gene, or SUPPRESSED, shape (V,)."""
        return np.diag(self.pair_counts)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each gene, shape (V,); 0 for a gene without a count."""
        return self.totals / np.maximum(self.counts, 1)

    def about_mean(self) -> NDArray[np.float64]:
        """Return the sums of products of deviations from the mean, shape (V, V).

        Each gene deviates from the mean over all who have it, whichever the other gene
        of the pair; the two agree where all patients have the same genes.
        """
        pairs = known_counts(self.pair_counts)
        return self.products - pairs * np.outer(self.mean, self.mean)

    def covariance(self) -> NDArray[np.float64]:
        """Return the pairwise-complete covariance about 0, shape (V, V).

        About 0, because standardised genes have mean 0 over the federation. The
        diagonal is 1, but for rounding (`Standardisation.published`), and for genes
        that are constant or were never measured (0). Pairs never measured together get
        0; where panels differ, the matrix may therefore have negative eigenvalues.
        """
        return self.products / np.maximum(self.pair_counts, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PairMoments:
    """Sums of genes and products over patients, before anything is standardised.

    Every standardisation's cross-products follow from them linearly, and they from the
    patients: no number of another party decides what is added up.
    """

    products: NDArray[np.float64]
    """Sum over the patients who have both genes of their product, shape (V, V)."""
    pair_totals: NDArray[np.float64]
    """Sum of the row's gene over the patients who have both, shape (V, V)."""
    pair_counts: NDArray[np.int64]
    """Patients who have both genes, shape (V, V)."""

    @classmethod
    def of(cls, values: NDArray[np.floating[Any]]) -> Self:
        """Sum values of shape (N, V) on the canonical scale, one row a patient."""
        present = (~np.isnan(values)).astype(np.float64)
        x = np.where(present, values, 0).astype(np.float64)
        return cls(
            products=x.T @ x,
            pair_totals=x.T @ present,
            pair_counts=np.rint(present.T @ present).astype(np.int64),
        )

    def standardised(self, scale: Standardisation) -> CrossProducts:
        """Return the cross-products of (values - mean) / sd.

        Those of genes that are not known stay as they are, see `standardised`.
        """
        mean = np.where(scale.known, scale.mean, 0.0)
        sd = np.where(scale.known, scale.sd, 1.0)
        once = self.pair_totals * mean  # of the column's gene
        about = self.products - once - once.T
        about += self.pair_counts * np.outer(mean, mean)
        counts = np.diag(self.pair_counts)
        return CrossProducts(
            products=about / np.outer(sd, sd),
            pair_counts=self.pair_counts,
            totals=(np.diag(self.pair_totals) - counts * mean) / sd,
        )


def groups_of(
    cancer_type: Sequence[str | None], types: Collection[str], min_cell_count: int
) -> list[str]:
    """Return the group of each patient, see `by_type`; length N."""
    group = [t if t is not None and t in types else OTHERS for t in cancer_type]
    while True:
        size = Counter(group)
        n_others = size[OTHERS] or min_cell_count  # no others: nothing to hide
        joined = smallest_joined(group)
        if joined is None or min(*size.values(), n_others) >= min_cell_count:
            return group
        group = joined


def smallest_joined(group: Sequence[str]) -> list[str] | None:
    """Return each patient's group with the smallest type among the others.

    None without a type. Of types of one size, the first by name.
    """
    size = Counter(group)
    named = sorted(size.keys() - {OTHERS}, key=lambda name: (size[name], name))
    if not named:
        return None
    return [OTHERS if name == named[0] else name for name in group]


def known_pairs(
    counts: Sequence[NDArray[np.int64]], min_cell_count: int
) -> list[NDArray[np.bool_]]:
    """Return the pairs of genes that may leave of each group, (V, V), see `by_type`.

    Parameters
    ----------
    counts
        Patients of each group who have both genes, shape (V, V).
    """
    few = [(n > 0) & (n < min_cell_count) for n in map(np.diag, counts)]
    hidden = np.logical_or.reduce(few)
    pairs = [each >= min_cell_count for each in counts]
    return [each & ~(hidden[:, None] | hidden[None, :]) for each in pairs]


def standardised(
    groups: Mapping[str, PairMoments], min_cell_count: int, scale: Standardisation
) -> dict[str, CrossProducts]:
    """Return what may leave of each group's sums, see `by_type`."""
    may_leave = known_pairs([s.pair_counts for s in groups.values()], min_cell_count)
    known = np.outer(scale.known, scale.known)
    return {
        name: sums.standardised(scale).where(pairs & known)
        for (name, sums), pairs in zip(groups.items(), may_leave, strict=True)
    }


def by_type(
    values: NDArray[np.floating[Any]],
    cancer_type: Sequence[str | None],
    types: Collection[str],
    min_cell_count: int,
    scale: Standardisation | None = None,
) -> dict[str, CrossProducts]:
    """Return cross-products of the patients of each type, and of all `OTHERS`.

    The groups add up to the site, whose moments are known too: the cell that is
    suppressed in one group only follows by subtraction. So a type of fewer patients
    than `min_cell_count` joins the others; if these are still fewer, so does the
    smallest type; and a gene that is suppressed in one group is so in every group.

    Parameters
    ----------
    values
        Shape (N, V), NaN where not measured.
    cancer_type
        Of each patient, length N.
    types
        Those with a group each; none: all patients are among the others.
    min_cell_count
        Fewest patients in a group, and behind a sum.
    scale
        By which the sums are standardised, and whose genes are known; None: the values
        are standardised.
    """
    group = groups_of(cancer_type, types, min_cell_count)
    sums = {
        name: PairMoments.of(values[[g == name for g in group]])
        for name in sorted(set(group))
    }
    unit = Standardisation.identity(values.shape[1])
    return standardised(sums, min_cell_count, scale or unit)


def pool_types(
    sites: Iterable[Mapping[str, CrossProducts]],
) -> dict[str, CrossProducts]:
    """Return the cross-products of each group over all sites, see `by_type`.

    No site's own statistics enter the model: a type that fewer than `MIN_SITES` of
    several sites report joins the others; and where then one site reports others, whose
    sums would follow by subtraction, so does the type with the fewest patients.
    """
    pooled: dict[str, CrossProducts] = {}
    reporters: dict[str, set[int]] = {}
    for site, groups in enumerate(sites):
        for name, sums in groups.items():
            pooled[name] = pooled[name] + sums if name in pooled else sums
            reporters.setdefault(name, set()).add(site)
    least = min(MIN_SITES, len(set().union(*reporters.values())))

    def too_few(name: str) -> bool:
        return 0 < len(reporters.get(name, ())) < least

    def first_to_join(name: str) -> tuple[bool, int, str]:
        return not too_few(name), int(pooled[name].counts.max()), name

    while named := sorted(pooled.keys() - {OTHERS}, key=first_to_join):
        name = named[0]
        if not (too_few(name) or too_few(OTHERS)):
            break
        sums = pooled.pop(name)
        pooled[OTHERS] = pooled[OTHERS] + sums if OTHERS in pooled else sums
        reporters.setdefault(OTHERS, set()).update(reporters.pop(name))
    return pooled


def pack(matrix: NDArray[Number]) -> NDArray[Number]:
    """Return the upper triangle of a symmetric (V, V) matrix, shape (V (V + 1) / 2,).

    Row by row, diagonal included: half the bytes to send.
    """
    return matrix[np.triu_indices(len(matrix))]


def unpack(triangle: NDArray[Number]) -> NDArray[Number]:
    """Return the symmetric (V, V) matrix of which `triangle` is the upper part.

    Raises
    ------
    UpdateError
        If no V has a triangle of this length.
    """
    size = int(np.sqrt(2 * triangle.size))
    if triangle.shape != (size * (size + 1) // 2,):
        raise UpdateError(
            f"a packed matrix has shape {triangle.shape}; expected (V (V + 1) / 2,)."
        )
    matrix = np.empty((size, size), dtype=triangle.dtype)
    rows, columns = np.triu_indices(size)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix
