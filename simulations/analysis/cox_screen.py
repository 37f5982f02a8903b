"""A Cox screen of every gene by itself whose sums add up over hospitals.

N patients (rows), V genes. A value that was not measured is NaN.

The score test asks whether a gene's coefficient in a Cox model of one gene is 0.
At 0 all hazards are equal, so that score and information need no fit, only, at each
death, the mean and the variance of the gene among those then at risk,

    U_g = sum over deaths i of (x_ig - mean of x_g over the risk set of i)
    I_g = sum over deaths i of the variance of x_g over the risk set of i

with the same risk set for all deaths of one day (Breslow). Where sites are strata, both
are sums over the sites, and z_g = U_g / sqrt(I_g) is about N(0, 1) for a gene that says
nothing of survival.

References
----------
Cox (1972), J. R. Stat. Soc. B 34:187-220, section 5. Andreux et al. (2020),
arXiv 2006.08997, for sites as strata.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgex.common.errors import UpdateError


@dataclass(frozen=True, kw_only=True, eq=False)
class CoxScore:
    """What the patients of one site and cancer type tell of every gene.

    The score of few deaths is close to these patients' own profiles, so that it should
    leave a site only within a sum over sites (secure aggregation), or where the site
    permits cross-products, which tell as much.
    """

    score: NDArray[np.float64]
    """U of each gene, shape (V,); above 0 where those with more of it die earlier."""
    information: NDArray[np.float64]
    """I of each gene, shape (V,); 0 where no death is informative."""

    def __post_init__(self) -> None:
        """Refuse what no site can have summed."""
        shapes = {self.score.shape, self.information.shape}
        if len(shapes) > 1 or self.score.ndim != 1:
            raise UpdateError(
                f"a Cox screen has shapes {sorted(shapes)}; expected one (V,) for "
                "score and information. Check that the site holds this study."
            )
        wrong = ~np.isfinite(self.score) | ~np.isfinite(self.information)
        wrong |= self.information < 0
        if wrong.any():
            raise UpdateError(
                f"a Cox screen has {wrong.sum()} genes of impossible numbers; expected "
                "finite scores, and information of 0 or more."
            )

    @classmethod
    def of(
        cls,
        values: NDArray[np.floating[Any]],
        duration: ArrayLike,
        event: ArrayLike,
        floor: int = 1,
    ) -> Self:
        """Sum over the deaths of one stratum.

        Parameters
        ----------
        values
            Standardised expression, shape (N, V). Who lacks a gene is in no risk set of
            that gene.
        duration
            Days, shape (N,).
        event
            1 died, 0 censored, shape (N,).
        floor
            Smallest number of patients with a gene whose sums are reported.
        """
        time, died = np.asarray(duration, float), np.asarray(event, bool)
        order = np.argsort(-time, kind="stable")  # risk sets are the first rows
        time, died, values = time[order], died[order], values[order]
        known = ~np.isnan(values)
        x = np.where(known, values, 0).astype(np.float64)
        score, information = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for day in np.unique(time[died]):
            at_risk = time >= day
            dead = died & (time == day)
            n = np.maximum(known[at_risk].sum(0), 1)
            mean = x[at_risk].sum(0) / n
            off = np.where(known[at_risk], x[at_risk] - mean, 0)
            deaths = known[dead].sum(0)
            score += x[dead].sum(0) - deaths * mean
            information += deaths * (off**2).sum(0) / n
        reported = known.sum(0) >= floor
        return cls(
            score=np.where(reported, score, 0.0),
            information=np.where(reported, information, 0.0),
        )

    def __add__(self, other: Self) -> Self:
        """Return the screen of both strata together."""
        if len(self.score) != len(other.score):
            raise UpdateError(
                f"Cox screens of {len(self.score)} and of {len(other.score)} genes do "
                "not add up; expected one vocabulary."
            )
        return type(self)(
            score=self.score + other.score,
            information=self.information + other.information,
        )

    @property
    def z(self) -> NDArray[np.float64]:
        """U / sqrt(I) of each gene, shape (V,); 0 where nothing is known."""
        spread = np.sqrt(self.information)
        return np.divide(
            self.score, spread, out=np.zeros_like(self.score), where=spread > 0
        )


def anchors(screen: CoxScore, n_genes: int) -> NDArray[np.intp]:
    """Return the genes of largest |z|, the largest first, shape (n_genes,)."""
    found: NDArray[np.intp] = np.argsort(-np.abs(screen.z), kind="stable")[:n_genes]
    return found
