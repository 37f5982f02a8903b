"""Counts, sums and cross-products that add up across hospitals to the pooled ones.

N patients (rows), V genes of the vocabulary. A cell that was not measured is NaN. All
arithmetic is float64, so that pooling is exact to rounding, in any order of the sites.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedgex.common.data.scales import LARGE_PANEL
from fedgex.common.errors import UpdateError

Number = TypeVar("Number", bound=np.generic)
Summable = TypeVar("Summable", "GeneMoments", "CrossProducts")

SUPPRESSED = -1
"""Count of a cell below the minimum cell count, few or none alike; its sums are 0."""

OTHERS = "others"
"""Group of the patients of all cancer types that the study does not name."""

MIN_SITES = 2
"""Fewest sites behind a group's sums, since all sites receive what is made of them."""

FEWEST_TO_COMPARE = 3
"""Fewest sites of which one can be found to differ from the others."""

FOREIGN_BEYOND = float(np.sqrt(np.log(2)))
"""Gene means in natural logarithms are .69 of those in base 2. A site is on a foreign
scale if its ratio to the others is nearer to that, or to the inverse, than to 1."""

CONSTANT_BELOW = 1e-6
"""A gene whose SD is this share of its root mean square or less is constant: float64
sums of squares cannot tell a smaller spread from rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneMoments:
    """A site's count, sum and sum of squares of each gene's values.

    The sum of a gene that one patient has measured is that patient's value; so a site
    sends `suppressed` moments.
    """

    count: NDArray[np.int64]
    """Patients in whom the gene was measured, or SUPPRESSED, shape (V,)."""
    total: NDArray[np.float64]
    """Sum of the gene's values, shape (V,)."""
    square_total: NDArray[np.float64]
    """Sum of their squares, shape (V,)."""
    n_patients: int
    """Rows, whether or not everything in them was measured."""

    def __post_init__(self) -> None:
        """Refuse what no site can have counted."""
        shapes = {self.count.shape, self.total.shape, self.square_total.shape}
        if len(shapes) > 1 or self.count.ndim != 1:
            raise UpdateError(
                f"moments have shapes {sorted(shapes)}; expected one (V,) for count, "
                "total and square_total. Check that the site holds this study."
            )
        _refuse_non_finite("total", self.total)
        _refuse_non_finite("square_total", self.square_total)
        wrong = (self.count < SUPPRESSED) | (self.count > self.n_patients)
        wrong |= self.square_total < 0
        wrong |= (self.count <= 0) & ((self.total != 0) | (self.square_total != 0))
        if wrong.any():
            raise UpdateError(
                f"moments of {wrong.sum()} genes are impossible; expected counts from "
                f"0 to the {self.n_patients} patients, or {SUPPRESSED} for suppressed, "
                "sums of squares of 0 or more, and sums of 0 where nothing is counted."
            )

    @classmethod
    def of(cls, values: NDArray[np.floating[Any]]) -> Self:
        """Count and sum values of shape (N, V), one row a patient."""
        present = ~np.isnan(values)
        x = np.where(present, values, 0).astype(np.float64)
        return cls(
            count=present.sum(axis=0),
            total=x.sum(axis=0),
            square_total=(x**2).sum(axis=0),
            n_patients=len(values),
        )

    def suppressed(self, min_cell_count: int) -> Self:
        """Return the moments without genes measured in fewer patients."""
        known = self.count >= min_cell_count
        return type(self)(
            count=np.where(known, self.count, SUPPRESSED),
            total=np.where(known, self.total, 0.0),
            square_total=np.where(known, self.square_total, 0.0),
            n_patients=self.n_patients,
        )

    def __add__(self, other: Self) -> Self:
        """Return the moments of both groups of patients together."""
        _refuse_other_genes(len(self.count), len(other.count))
        return type(self)(
            count=_known(self.count) + _known(other.count),
            total=self.total + other.total,
            square_total=self.square_total + other.square_total,
            n_patients=self.n_patients + other.n_patients,
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each gene, shape (V,); 0 for a gene without a count."""
        return self.total / np.maximum(self.count, 1)

    @property
    def sd(self) -> NDArray[np.float64]:
        """Population SD (ddof 0) of each gene, shape (V,).

        1 for a gene that has no count or is constant (CONSTANT_BELOW), so that dividing
        by it leaves zeros.
        """
        square_mean = self.square_total / np.maximum(self.count, 1)
        variance = square_mean - self.mean**2
        constant = variance <= CONSTANT_BELOW**2 * square_mean
        return np.sqrt(np.where(constant, 1.0, variance))


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardisation:
    """Mean and SD of each gene over the federation, the same at every site.

    Centring each site by itself would remove the differences between their cancers.
    """

    mean: NDArray[np.float64]
    """Shape (V,), on the study's canonical scale."""
    sd: NDArray[np.float64]
    """Shape (V,), above 0."""

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be divided by."""
        _refuse_other_genes(len(self.mean), len(self.sd))
        _refuse_non_finite("mean", self.mean)
        _refuse_non_finite("sd", self.sd)
        if (self.sd <= 0).any():
            raise UpdateError(
                f"sd of {(self.sd <= 0).sum()} genes is 0 or less; expected above 0."
            )

    @classmethod
    def identity(cls, n_genes: int) -> Self:
        """Return mean 0 and SD 1, under which values stay as they are."""
        return cls(mean=np.zeros(n_genes), sd=np.ones(n_genes))

    def apply(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return (values - mean) / sd, shape (N, V); NaN stays NaN."""
        return ((values - self.mean) / self.sd).astype(np.float32)

    def undo(self, standardised: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return values of shape (N, V) on the canonical scale; NaN stays NaN."""
        return (standardised * self.sd + self.mean).astype(np.float32)


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
        _refuse_non_finite("products", self.products)
        _refuse_non_finite("totals", self.totals)
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
        known = self.pair_counts >= min_cell_count
        return type(self)(
            products=np.where(known, self.products, 0.0),
            pair_counts=np.where(known, self.pair_counts, SUPPRESSED),
            totals=np.where(np.diag(known), self.totals, 0.0),
        )

    def without(self, genes: NDArray[np.bool_]) -> Self:
        """Return the sums without the genes that are marked in shape (V,)."""
        hidden = genes[:, None] | genes[None, :]
        return type(self)(
            products=np.where(hidden, 0.0, self.products),
            pair_counts=np.where(hidden, SUPPRESSED, self.pair_counts),
            totals=np.where(genes, 0.0, self.totals),
        )

    def __add__(self, other: Self) -> Self:
        """Return the cross-products of both groups of patients together."""
        _refuse_other_genes(len(self.products), len(other.products))
        return type(self)(
            products=self.products + other.products,
            pair_counts=_known(self.pair_counts) + _known(other.pair_counts),
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
        pairs = _known(self.pair_counts)
        return self.products - pairs * np.outer(self.mean, self.mean)

    def covariance(self) -> NDArray[np.float64]:
        """Return the pairwise-complete covariance about 0, shape (V, V).

        About 0, because standardised genes have mean 0 over the federation. The
        diagonal is 1, but for genes that are constant or were never measured (0). Pairs
        never measured together get 0; where panels differ, the matrix may therefore
        have negative eigenvalues.
        """
        return self.products / np.maximum(self.pair_counts, 1)


def pool(sites: Iterable[Summable]) -> Summable:
    """Return the moments, or the cross-products, of all sites' patients together.

    Raises
    ------
    UpdateError
        If there is no site, or if two disagree in the number of genes.
    """
    summands = list(sites)
    if not summands:
        raise UpdateError("no site sent statistics; expected one or more.")
    return functools.reduce(operator.add, summands)


def foreign_scale(
    mean: NDArray[np.floating[Any]], level: NDArray[np.floating[Any]]
) -> float | None:
    """Return the ratio of gene means to their usual level, if that is another scale's.

    The slope through the origin of one on the other, on a logarithmic scale. Other
    cancers make a difference of a few per cent, another base of the logarithm one of 30
    or more; see `FOREIGN_BEYOND`.

    Parameters
    ----------
    mean, level
        Shape (V,), NaN where not known. None with fewer known genes than `LARGE_PANEL`.
    """
    known = ~np.isnan(mean) & ~np.isnan(level)
    if known.sum() < LARGE_PANEL or not level[known].any():
        return None
    ratio = float(mean[known] @ level[known] / (level[known] @ level[known]))
    return None if FOREIGN_BEYOND <= ratio <= 1 / FOREIGN_BEYOND else ratio


def foreign_scales(sites: Mapping[str, GeneMoments]) -> dict[str, float]:
    """Return the sites whose gene means are not on the others' scale, with the ratio.

    The others' level is the median of the sites' means; see `foreign_scale`. Empty with
    fewer than `FEWEST_TO_COMPARE` sites of `LARGE_PANEL` genes.

    Parameters
    ----------
    sites
        Moments on the study's canonical scale, by site.
    """
    means = {
        name: np.where(site.count > 0, site.mean, np.nan)
        for name, site in sites.items()
        if (site.count > 0).sum() >= LARGE_PANEL
    }
    if len(means) < FEWEST_TO_COMPARE:
        return {}
    every = np.stack(list(means.values()))
    level = np.full(every.shape[1], np.nan)
    anyone = ~np.isnan(every).all(axis=0)
    level[anyone] = np.nanmedian(every[:, anyone], axis=0)
    ratios = {name: foreign_scale(mean, level) for name, mean in means.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def by_type(
    standardised: NDArray[np.floating[Any]],
    cancer_type: Sequence[str | None],
    types: Collection[str],
    min_cell_count: int,
) -> dict[str, CrossProducts]:
    """Return cross-products of the patients of each type, and of all `OTHERS`.

    The groups add up to the site, whose moments are known too: the cell that is
    suppressed in one group only follows by subtraction. So a type of fewer patients
    than `min_cell_count` joins the others; if these are still fewer, so does the
    smallest type; and a gene that is suppressed in one group is so in every group.

    Parameters
    ----------
    standardised
        Shape (N, V), NaN where not measured.
    cancer_type
        Of each patient, length N.
    types
        Those with a group each; none: all patients are among the others.
    min_cell_count
        Fewest patients in a group, and behind a sum.
    """
    group = [t if t is not None and t in types else OTHERS for t in cancer_type]
    while True:
        size = Counter(group)
        named = sorted(size.keys() - {OTHERS}, key=lambda t: (size[t], t))
        n_others = size[OTHERS] or min_cell_count  # no others: nothing to hide
        if not named or min(size[named[0]], n_others) >= min_cell_count:
            break
        group = [OTHERS if t == named[0] else t for t in group]
    sums = {
        name: CrossProducts.of(standardised[[g == name for g in group]])
        for name in sorted(size)
    }
    few = [(s.counts > 0) & (s.counts < min_cell_count) for s in sums.values()]
    hidden = np.logical_or.reduce(few)
    return {n: s.suppressed(min_cell_count).without(hidden) for n, s in sums.items()}


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


def _known(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.maximum(counts, 0)


def _refuse_non_finite(name: str, numbers: NDArray[np.float64]) -> None:
    if not np.isfinite(numbers).all():
        raise UpdateError(
            f"{name} holds {(~np.isfinite(numbers)).sum()} numbers that are not "
            "finite; expected none. Check the site's expression file."
        )


def _refuse_other_genes(one: int, other: int) -> None:
    if one != other:
        raise UpdateError(
            f"statistics of {one} and of {other} genes do not add up; expected one "
            "vocabulary."
        )
