"""Counts, sums and standardisation: what adds up across hospitals to the pooled ones.

N patients (rows), V genes of the vocabulary. A cell that was not measured is NaN. All
arithmetic is float64, so that pooling is exact to rounding, in any order of the sites.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedgex.common.data.scales import LARGE_PANEL
from fedgex.common.errors import UpdateError


class Sums(Protocol):
    """Sums over patients, such as `GeneMoments` and `cross_products.CrossProducts`."""

    def __add__(self, other: Self, /) -> Self:
        """Return the sums over both groups of patients together."""


Summable = TypeVar("Summable", bound=Sums)

SUPPRESSED = -1
"""Count of a cell below the minimum cell count, few or none alike; its sums are 0."""

FEWEST_TO_COMPARE = 3
"""Fewest sites of which one can be found to differ from the others."""

FOREIGN_BEYOND = float(np.sqrt(np.log(2)))
"""Gene means in natural logarithms are .69 of those in base 2. A site is on a foreign
scale if its ratio to the others is nearer to that, or to the inverse, than to 1."""

CONSTANT_BELOW = 1e-6
"""A gene whose SD is this share of its root mean square or less is constant: float64
sums of squares cannot tell a smaller spread from rounding."""

LEAST_SD, LARGEST = 1e-6, 2.0**31
"""Least SD, and largest mean and SD, of genes on any scale; values end at
`scales.LARGEST_ABUNDANCE`."""

STEP = 2.0**-9
"""Steps in which mean and SD are published, a share of the SD: three digits."""

STEP_OF_ONE, LARGEST_STEP = 4.0, 2.0**-3
"""The share is STEP_OF_ONE / patients if that is more, so that the difference of two
means, times the patients, is off by about an SD; and LARGEST_STEP at most."""


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
        refuse_non_finite("total", self.total)
        refuse_non_finite("square_total", self.square_total)
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
        refuse_other_genes(len(self.count), len(other.count))
        return type(self)(
            count=known_counts(self.count) + known_counts(other.count),
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

        1 for a gene that has no count or is constant (CONSTANT_BELOW, LEAST_SD), so
        that dividing by it leaves zeros.
        """
        square_mean = self.square_total / np.maximum(self.count, 1)
        variance = square_mean - self.mean**2
        constant = variance <= np.maximum(CONSTANT_BELOW**2 * square_mean, LEAST_SD**2)
        return np.sqrt(np.where(constant, 1.0, variance))


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardisation:
    """Mean and SD of each gene over the federation, the same at every site.

    Centring each site by itself would remove the differences between their cancers. A
    gene of which no site has a value is NaN in both: whatever is standardised by it, or
    restored from it, is NaN too, which is how a value that is not known is written.
    """

    mean: NDArray[np.float64]
    """Shape (V,), on the study's canonical scale; NaN where not known."""
    sd: NDArray[np.float64]
    """Shape (V,), above 0; NaN where not known."""

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be divided by."""
        refuse_other_genes(len(self.mean), len(self.sd))
        if (np.isnan(self.mean) != np.isnan(self.sd)).any():
            raise UpdateError(
                "mean and sd are NaN for other genes; expected the same: those of "
                "which no site has a value."
            )
        refuse_non_finite("mean", self.mean[self.known])
        refuse_non_finite("sd", self.sd[self.known])
        if (self.sd <= 0).any():
            raise UpdateError(
                f"sd of {(self.sd <= 0).sum()} genes is 0 or less; expected above 0."
            )

    @classmethod
    def published(cls, moments: GeneMoments) -> Self:
        """Return mean and SD in steps of a share of the SD, see STEP and STEP_OF_ONE.

        Every hospital, and everybody with a model, reads them: the mean of N patients
        and that of N - 1 of them give the values of one, but for the rounding. It is
        far below the standard error of either.
        """
        patients = np.where(moments.count > 0, moments.count, np.nan)
        share = np.clip(STEP_OF_ONE / patients, STEP, LARGEST_STEP)
        step = np.exp2(np.floor(np.log2(share * moments.sd)))  # exact in float64
        return cls(
            mean=np.rint(moments.mean / step) * step,
            sd=np.rint(moments.sd / step) * step,
        )

    @property
    def known(self) -> NDArray[np.bool_]:
        """Genes of which some site has values, shape (V,)."""
        return ~np.isnan(self.mean)

    @property
    def is_of_expression(self) -> bool:
        """Whether all known means and SDs could be those of genes, see LEAST_SD."""
        mean, sd = self.mean[self.known], self.sd[self.known]
        least, largest = sd.min(initial=1.0), sd.max(initial=1.0)
        extreme = np.abs(mean).max(initial=0.0)
        return bool(least >= LEAST_SD and max(largest, extreme) <= LARGEST)

    @classmethod
    def identity(cls, n_genes: int) -> Self:
        """Return mean 0 and SD 1, under which values stay as they are."""
        return cls(mean=np.zeros(n_genes), sd=np.ones(n_genes))

    def apply(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return (values - mean) / sd, shape (N, V); NaN stays NaN.

        Genes that are not known become NaN: no model has learnt of them.
        """
        return ((values - self.mean) / self.sd).astype(np.float32)

    def undo(self, standardised: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return values of shape (N, V) on the canonical scale; NaN stays NaN."""
        return (standardised * self.sd + self.mean).astype(np.float32)


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


def known_counts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return counts with 0 for SUPPRESSED."""
    return np.maximum(counts, 0)


def refuse_non_finite(name: str, numbers: NDArray[np.float64]) -> None:
    """Raise UpdateError if a number is infinite or NaN."""
    if not np.isfinite(numbers).all():
        raise UpdateError(
            f"{name} holds {(~np.isfinite(numbers)).sum()} numbers that are not "
            "finite; expected none. Check the site's expression file."
        )


def refuse_other_genes(one: int, other: int) -> None:
    """Raise UpdateError if two numbers of genes differ."""
    if one != other:
        raise UpdateError(
            f"statistics of {one} and of {other} genes do not add up; expected one "
            "vocabulary."
        )
