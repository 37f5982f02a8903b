"""A federated Cox screen is the pooled one, stratified by site."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lifelines.statistics import logrank_test
from numpy.typing import NDArray

from fedgex.common.errors import UpdateError
from fedgex.common.models.survival import cox_loss
from fedgex.simulations.analysis.cox_screen import CoxScore, anchors

Floats = NDArray[np.float64]


def patients(n: int, seed: int, n_genes: int = 4) -> tuple[Floats, Floats, Floats]:
    """The first gene shortens life, the last lengthens it; no two share a day."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, n_genes))
    time = rng.exponential(500 * np.exp(x[:, -1] - x[:, 0]))
    return x, time, (rng.random(n) < 0.6).astype(float)


def naive(x: Floats, time: Floats, event: Floats) -> tuple[Floats, Floats]:
    score, information = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for g in range(x.shape[1]):
        known = ~np.isnan(x[:, g])
        for i in np.flatnonzero(known & (event == 1)):
            at_risk = x[known & (time >= time[i]), g]
            score[g] += x[i, g] - at_risk.mean()
            information[g] += at_risk.var()
    return score, information


def test_score_and_information_are_their_definition_with_ties_and_gaps() -> None:
    x, time, event = patients(40, 1)
    time = np.ceil(time / 100)
    x[np.random.default_rng(2).random(x.shape) < 0.2] = np.nan

    screen = CoxScore.of(x, time, event)

    score, information = naive(x, time, event)
    np.testing.assert_allclose(screen.score, score, atol=1e-12)
    np.testing.assert_allclose(screen.information, information, atol=1e-12)


def test_they_are_slope_and_curvature_of_the_partial_likelihood() -> None:
    x, time, event = patients(40, 3)
    beta = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def loss(beta: torch.Tensor) -> torch.Tensor:
        x_, time_, event_ = (torch.tensor(a) for a in (x, time, event))
        return event_.sum() * cox_loss(x_ @ beta, time_, event_)

    slope: Any = torch.autograd.functional.jacobian(loss, beta)
    curvature: Any = torch.autograd.functional.hessian(loss, beta)

    screen = CoxScore.of(x, time, event)

    np.testing.assert_allclose(screen.score, -slope.numpy(), atol=1e-9)
    np.testing.assert_allclose(screen.information, curvature.diag().numpy(), atol=1e-9)


def test_z_squared_of_two_groups_is_the_log_rank_statistic() -> None:
    x, time, event = patients(60, 4)
    group = x[:, :1] > 0

    screen = CoxScore.of(group.astype(float), time, event)

    a, b = group[:, 0], ~group[:, 0]
    known = logrank_test(time[a], time[b], event[a], event[b]).test_statistic
    assert screen.z[0] ** 2 == pytest.approx(known, rel=1e-9)


def test_sites_add_up_to_the_screen_stratified_by_site() -> None:
    one, other = patients(30, 5), patients(50, 6)

    total = CoxScore.of(*one) + CoxScore.of(*other)

    x, time, event = (
        torch.tensor(np.concatenate(pair)) for pair in zip(one, other, strict=True)
    )
    strata = torch.tensor([0] * 30 + [1] * 50)
    beta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (event.sum() * cox_loss(x @ beta, time, event, strata)).backward()
    assert beta.grad is not None
    np.testing.assert_allclose(total.score, -beta.grad.numpy(), atol=1e-9)


def test_a_gene_that_shortens_life_has_a_positive_z() -> None:
    screen = CoxScore.of(*patients(200, 7))

    assert screen.z[0] > 3
    assert screen.z[-1] < -3
    assert set(anchors(screen, 2)) == {0, 3}


def test_of_a_gene_that_too_few_have_nothing_is_told() -> None:
    x, time, event = patients(30, 8)
    x[4:, 1] = np.nan

    screen = CoxScore.of(x, time, event, floor=5)

    assert screen.score[1] == screen.information[1] == screen.z[1] == 0
    assert screen.score[0] != 0


def test_without_deaths_every_z_is_zero() -> None:
    x, time, event = patients(30, 9)

    assert not CoxScore.of(x, time, 0 * event).z.any()


def test_screens_of_other_genes_and_impossible_numbers_are_refused() -> None:
    fine = CoxScore.of(*patients(30, 9))

    with pytest.raises(UpdateError, match="one vocabulary"):
        fine + CoxScore.of(*patients(30, 9, n_genes=5))
    with pytest.raises(UpdateError, match="1 genes of impossible numbers"):
        CoxScore(score=np.zeros(2), information=np.array([1.0, -1.0]))
    with pytest.raises(UpdateError, match="shapes"):
        CoxScore(score=np.zeros(2), information=np.zeros(3))
