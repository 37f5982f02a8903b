"""Gene programmes of a linear start, and their Cox screen over sites.

    loadings -> programmes (varimax) -> scores of patients, which stay at their site
    -> score and information of each programme and cancer type, summed over the sites

V genes, P programmes, R factors, N patients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray

from fedgex.common.data.dataset import Patients
from fedgex.common.evaluation.survival import c_index_with_se
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.simulations.analysis import attribution
from fedgex.simulations.analysis.cox_screen import CoxScore

PROGRAMMES = 32
"""Most programmes: the leading directions of the linear start's loadings."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Programmes:
    """Gene programmes, which every site computes from the shared model."""

    loadings: Floats
    """Of each gene on each programme, shape (V, P)."""
    from_factors: Floats
    """From the linear start's factors to the programmes, shape (R, P)."""

    @classmethod
    def of(cls, linear: MixtureOfFactorAnalyzers) -> Programmes:
        """Rotate the leading directions of the loadings to a simple structure.

        Each points where most of its weight, by third powers, is positive.
        """
        loadings = linear.loadings.double().numpy()
        left, sizes, right = np.linalg.svd(loadings, full_matrices=False)
        known = int((sizes > 1e-6 * sizes[0]).sum())
        P = min(PROGRAMMES, known)
        leading = left[:, :P] * sizes[:P]
        turn = varimax(leading)
        turn = turn * np.where(((leading @ turn) ** 3).sum(axis=0) < 0, -1, 1)
        order = np.argsort(-((leading @ turn) ** 2).sum(axis=0), kind="stable")
        turn = turn[:, order]
        return cls(loadings=leading @ turn, from_factors=right[:P].T @ turn)

    @torch.no_grad()
    def scores(self, linear: MixtureOfFactorAnalyzers, patients: Patients) -> Floats:
        """Return each patient's scores, which stay local, shape (N, P)."""
        factors = torch.zeros(len(patients), linear.loadings.shape[1])
        for rows, genes in attribution.alike(patients.measured):
            values = patients.values[rows[:, None], genes]
            factors[rows] = linear(genes, values, None).factors
        scores: Floats = factors.double().numpy() @ self.from_factors
        return scores


def varimax(loadings: Floats, n_steps: int = 500) -> Floats:
    """Return the rotation after which the squared loadings vary most, shape (P, P).

    Parameters
    ----------
    loadings
        Shape (V, P).

    References
    ----------
    Kaiser (1958), Psychometrika 23:187-200; here by repeated SVD.
    """
    V, P = loadings.shape
    turn, reached = np.eye(P), 0.0
    for _ in range(n_steps):
        turned = loadings @ turn
        slope = turned**3 - turned * (turned**2).sum(axis=0) / V
        left, sizes, right = np.linalg.svd(loadings.T @ slope)
        turn = left @ right
        if sizes.sum() <= reached * (1 + 1e-8):
            break
        reached = sizes.sum()
    return turn


@dataclass(frozen=True, kw_only=True)
class Follow:
    """Scores and follow-up of patients; N of them."""

    scores: Floats
    """Shape (N, P)."""
    duration: Floats
    event: Floats
    cancer_type: NDArray[np.str_]
    stratum: NDArray[np.str_]
    """Patients are compared within a stratum, shape (N,)."""

    def c_index(self, risk: Floats, cancer_type: str | None = None) -> Floats:
        """Return the C-index within strata and its standard error, shape (2,).

        Parameters
        ----------
        risk
            Shape (N,).
        cancer_type
            None: all.
        """
        rows = np.full(len(risk), True)
        if cancer_type is not None:
            rows = self.cancer_type == cancer_type
        found = c_index_with_se(
            self.duration[rows], self.event[rows], risk[rows], self.stratum[rows]
        )
        return np.array(found)


@dataclass(frozen=True, kw_only=True)
class Screened:
    """Cox screen of the programmes, and patients to evaluate them on."""

    programmes: Programmes
    by_type: Mapping[str, CoxScore]
    """Summed over the sites, by cancer type."""
    at_sites: Follow
    unseen: Follow

    @property
    def total(self) -> CoxScore:
        """Over all sites and cancer types."""
        return reduce(add, self.by_type.values())


def screen(
    linear: MixtureOfFactorAnalyzers,
    sites: Mapping[str, Patients],
    unseen: Patients,
    minimum_cohort: int,
) -> Screened | None:
    """Screen the programmes at the sites, and score the unseen patients.

    The linear start makes them, so that all seeds have the same.

    Parameters
    ----------
    sites, unseen
        Patients with known follow-up.

    Returns
    -------
    Screened
        None if no site has the minimum cohort of any cancer type.
    """
    programmes = Programmes.of(linear)
    by_type: dict[str, CoxScore] = {}
    follows = []
    for name, patients in sites.items():
        if len(patients) == 0:
            continue
        follow = _follow(programmes, linear, patients, f"{name}/")
        follows.append(follow)
        for kind in np.unique(follow.cancer_type):
            rows = follow.cancer_type == kind
            if rows.sum() < minimum_cohort:
                continue
            own = CoxScore.of(
                follow.scores[rows], follow.duration[rows], follow.event[rows]
            )
            by_type[kind] = by_type[kind] + own if kind in by_type else own
    if not by_type:
        return None
    columns = [field.name for field in dataclasses.fields(Follow)]
    return Screened(
        programmes=programmes,
        by_type=by_type,
        at_sites=Follow(
            **{c: np.concatenate([getattr(f, c) for f in follows]) for c in columns}
        ),
        unseen=_follow(programmes, linear, unseen, ""),
    )


def _follow(
    programmes: Programmes,
    linear: MixtureOfFactorAnalyzers,
    patients: Patients,
    site: str,
) -> Follow:
    return Follow(
        scores=programmes.scores(linear, patients),
        duration=patients.duration.double().numpy(),
        event=patients.event.double().numpy(),
        cancer_type=np.array(patients.cancer_type, dtype=str),
        stratum=np.array([f"{site}{t}" for t in patients.cancer_type], dtype=str),
    )
