"""Predictive standard deviations against the definition, and against samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedgex.common.errors import ConfigError
from fedgex.common.models import gexbert
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.common.models.gexbert import GexBert
from fedgex.common.models.uncertainty import (
    VARIANCE_SHARE,
    restore_with_uncertainty,
    unlikeness,
)

N_GENES, RANK, TYPES = 12, 3, 2


def backbone(linear_rank: int = RANK) -> GexBert:
    """Return an untrained network over a factor model of random numbers."""
    torch.manual_seed(0)
    made = GexBert(gexbert.preset("tiny", N_GENES, linear_rank, TYPES))
    linear = made.encoder.linear
    if linear is not None:
        linear.loadings.copy_(torch.randn(N_GENES, RANK))
        linear.noise.copy_(torch.rand(N_GENES) + 0.2)
        linear.means.copy_(torch.randn(TYPES, N_GENES))
        root = torch.randn(TYPES, RANK, RANK)
        linear.precisions.copy_(root @ root.mT + torch.eye(RANK))
        linear.log_shares.copy_(torch.tensor([0.3, 0.7]).log())
    return made


def dense(
    linear: MixtureOfFactorAnalyzers,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean (K, V) and covariance (K, V, V) of each type, written out."""
    w, noise, precisions = (
        getattr(linear, name).double().numpy()
        for name in ("loadings", "noise", "precisions")
    )
    covariances = [w @ np.linalg.inv(c) @ w.T + np.diag(noise) for c in precisions]
    return linear.means.double().numpy(), np.stack(covariances)


def patients(
    linear: MixtureOfFactorAnalyzers, number: int, seed: int = 0
) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    means, covariances = dense(linear)
    types = rng.choice(TYPES, number, p=linear.log_shares.double().softmax(0).numpy())
    drawn = [rng.multivariate_normal(means[k], covariances[k]) for k in types]
    return np.array(drawn, dtype=np.float32)


def test_the_uncertainty_is_that_of_the_gaussian_mixture_given_the_measured_genes() -> (
    None
):
    network = backbone()
    linear = network.encoder.linear
    assert linear is not None
    x = patients(linear, 1)[0].astype(np.float64)
    M, O = np.arange(5), np.arange(5, N_GENES)  # noqa: E741
    means, covariances = dense(linear)
    density, conditional, variance = [], [], []
    for mean, s in zip(means, covariances, strict=True):
        inverse = np.linalg.inv(s[np.ix_(O, O)])
        off = x[O] - mean[O]
        density.append(
            np.exp(-off @ inverse @ off / 2) * np.sqrt(np.linalg.det(inverse))
        )
        conditional.append(mean[M] + s[np.ix_(M, O)] @ inverse @ off)
        left = s[np.ix_(M, M)] - s[np.ix_(M, O)] @ inverse @ s[np.ix_(O, M)]
        variance.append(np.diag(left))
    share = linear.log_shares.double().softmax(0).numpy() * density
    share /= share.sum()
    mean = share @ np.array(conditional)
    second = share @ (np.array(variance) + np.square(conditional))
    expected = np.sqrt(VARIANCE_SHARE * (second - mean**2))

    given = torch.tensor(x, dtype=torch.float32)[None]
    given[:, M] = torch.nan
    _, sd = restore_with_uncertainty(network, given)

    assert sd[0, M].numpy() == pytest.approx(expected, rel=1e-3)


def test_with_nothing_measured_the_uncertainty_is_that_of_all_patients() -> None:
    network = backbone()
    assert network.encoder.linear is not None
    drawn = patients(network.encoder.linear, 6_000)

    _, sd = restore_with_uncertainty(network, torch.full((1, N_GENES), torch.nan))

    expected = np.sqrt(VARIANCE_SHARE) * drawn.std(axis=0)
    assert sd[0].numpy() == pytest.approx(expected, rel=0.06)


def test_a_measured_value_stays_and_has_no_uncertainty() -> None:
    network = backbone()
    given = torch.randn(3, N_GENES)
    given[0, 2] = torch.nan

    mean, sd = restore_with_uncertainty(network, given, batch_size=2)

    measured = ~given.isnan()
    assert torch.equal(mean[measured], given[measured])
    assert (sd[measured] == 0).all()
    assert mean[0, 2].isfinite()
    assert sd[0, 2] > 0


def test_more_measured_genes_never_widen_the_uncertainty_within_one_type() -> None:
    network = backbone()
    assert network.encoder.linear is not None
    network.encoder.linear.log_shares.copy_(torch.tensor([0.0, -1e4]))
    given = torch.randn(1, N_GENES)
    few, many = given.clone(), given.clone()
    few[:, :8], many[:, :4] = torch.nan, torch.nan

    wide, narrow = (restore_with_uncertainty(network, x)[1][0, :4] for x in (few, many))

    assert (narrow <= wide + 1e-6).all()
    assert (narrow < wide).any()


def test_a_model_without_a_factor_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear_rank"):
        restore_with_uncertainty(backbone(linear_rank=0), torch.zeros(1, N_GENES))


def test_unlikeness_is_the_distance_a_gene_under_the_most_probable_type() -> None:
    linear = backbone().encoder.linear
    assert linear is not None
    values = patients(linear, 6)
    values[:3, 4:9] = np.nan
    means, covariances = dense(linear)
    shares = linear.log_shares.double().numpy()

    found = unlikeness(linear, torch.from_numpy(values)).numpy()

    for row, score in zip(values.astype(np.float64), found, strict=True):
        there = ~np.isnan(row)
        joint, distances = [], []
        for mean, covariance, share in zip(means, covariances, shares, strict=True):
            own = covariance[np.ix_(there, there)]
            off = row[there] - mean[there]
            distances.append(off @ np.linalg.solve(own, off))
            joint.append(share - distances[-1] / 2 - np.linalg.slogdet(own)[1] / 2)
        expected = distances[int(np.argmax(joint))] / there.sum()
        assert score == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n_genes", [4, N_GENES])
def test_unlikeness_is_about_one_on_any_panel_and_grows_with_foreign_values(
    n_genes: int,
) -> None:
    linear = backbone().encoder.linear
    assert linear is not None
    values = patients(linear, 400)
    values[:, n_genes:] = np.nan

    own = unlikeness(linear, torch.from_numpy(values)).numpy()
    foreign = unlikeness(linear, torch.from_numpy(values + 20)).numpy()

    assert own.mean() == pytest.approx(1, abs=0.15)
    assert foreign.min() > own.max()


def test_a_sample_without_a_gene_is_neither_like_nor_unlike() -> None:
    linear = backbone().encoder.linear
    assert linear is not None

    assert unlikeness(linear, torch.full((1, N_GENES), torch.nan)).isnan().all()
    assert unlikeness(linear, torch.empty(0, N_GENES)).shape == (0,)
