"""The factor model: conditional means, evidence, padding, panels."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import multivariate_normal
from torch import Tensor

from fedgex.common.models.factor_model import (
    NEVER,
    TYPE_NOISE,
    MixtureOfFactorAnalyzers,
)

from .small_models import R, drawn, mixture


def of_the_mixture(
    start: MixtureOfFactorAnalyzers, genes: Tensor, values: Tensor, asked: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a patient's genes tell of those asked for, factors and component.

    From each component's joint normal distribution of genes and factors, in NumPy.
    """
    W, noise = start.loadings.double().numpy(), start.noise.double().numpy()
    joint, restored, factors = [], [], []
    x, g, q = values.double().numpy(), genes.numpy(), asked.numpy()
    for mean, precision, log_share in zip(
        start.means.double().numpy(),
        start.precisions.double().numpy(),
        start.log_shares.double().numpy(),
        strict=True,
    ):
        C = np.linalg.inv(precision)
        S = W @ C @ W.T + np.diag(noise)
        within = S[np.ix_(g, g)]
        off = np.linalg.solve(within, x - mean[g])
        restored.append(mean[q] + S[np.ix_(q, g)] @ off)
        factors.append(C @ W[g].T @ off)
        joint.append(log_share + multivariate_normal.logpdf(x, mean[g], within))
    weights = softmax(joint)
    return weights @ restored, weights @ factors, weights


@pytest.mark.parametrize("n_components", [1, 4])
@pytest.mark.parametrize("n_given", [2, 6, 17])
def test_the_factor_model_restores_the_conditional_mean_of_a_mixture_of_normals(
    n_given, n_components
):
    genes, values, asked = drawn(5, n_given, 6)
    start = mixture(n_components)

    known = start(genes, values, None)
    restored = start.restore(known, asked)

    for i in range(5):
        assert not set(genes[i].tolist()) & set(asked[i].tolist())
        expected, factors, weights = of_the_mixture(
            start, genes[i], values[i], asked[i]
        )
        np.testing.assert_allclose(known.log_weights[i].exp(), weights, atol=1e-4)
        np.testing.assert_allclose(known.factors[i], factors, atol=1e-4)
        np.testing.assert_allclose(restored[i], expected, atol=1e-4)
    if n_components > 1 and n_given == 2:  # so that all components have a say
        assert known.log_weights.exp().max() < 0.95


def test_of_a_patient_without_genes_the_factor_model_knows_the_shares_alone():
    genes, values, asked = drawn(1, 4, 6)
    start = mixture()

    known = start(genes, values, torch.zeros(1, 4, dtype=torch.bool))

    shares = start.log_shares.exp()
    torch.testing.assert_close(known.log_weights[0].exp(), shares)
    torch.testing.assert_close(known.factors[0], torch.zeros(R))
    expected = shares @ start.means[:, asked[0]]
    torch.testing.assert_close(start.restore(known, asked)[0], expected)


def test_a_component_of_which_nothing_is_known_has_no_weight():
    genes, values, asked = drawn(3, 11, 6)
    start, without = mixture(4), mixture(4)
    start.log_shares[1] = NEVER
    start.means[1], start.precisions[1] = 0, torch.eye(R)
    values[0] = 0  # the very mean of that component
    others = [0, 2, 3]
    for name in ("means", "precisions", "log_shares"):
        setattr(without, name, getattr(without, name)[others])

    known, expected = start(genes, values, None), without(genes, values, None)

    assert known.log_weights[:, 1].exp().tolist() == [0, 0, 0]
    torch.testing.assert_close(known.log_weights[:, others], expected.log_weights)
    torch.testing.assert_close(
        start.restore(known, asked), without.restore(expected, asked)
    )


def test_the_evidence_for_a_component_does_not_depend_on_how_common_it_is():
    genes, values, _ = drawn(3, 11, 6)
    start, others = mixture(4), mixture(4)
    others.log_shares.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]).log())

    found = start.evidence(genes, values, None)

    torch.testing.assert_close(found, others.evidence(genes, values, None))
    start.noise.mul_(TYPE_NOISE)
    start.log_shares.fill_(math.log(1 / 4))
    expected = start(genes, values, None).log_weights.clamp(min=-20)
    torch.testing.assert_close(found, expected)


def test_there_is_no_evidence_for_a_component_of_which_nothing_is_known():
    genes, values, _ = drawn(3, 11, 6)
    start = mixture(4)
    start.log_shares[1] = NEVER
    start.means[1], start.precisions[1] = 0, torch.eye(R)

    assert (start.evidence(genes, values, None)[:, 1] == -20).all()


def test_padding_changes_nothing_in_the_factor_model():
    genes, values, _ = drawn(2, 11, 6)
    keep = torch.arange(11) < torch.tensor([[7], [3]])
    start = mixture()

    padded = start(genes, values.masked_fill(~keep, 1e3), keep)

    for i, n in enumerate((7, 3)):
        alone = start(genes[i : i + 1, :n], values[i : i + 1, :n], None)
        torch.testing.assert_close(padded.factors[i], alone.factors[0])
        torch.testing.assert_close(padded.log_weights[i], alone.log_weights[0])


@pytest.mark.parametrize("padded", [False, True])
def test_patients_of_one_panel_are_known_together_as_by_themselves(padded):
    genes, values, _ = drawn(5, 11, 6)
    genes = genes[:1].expand(5, -1)
    keep = (torch.arange(11) < 7).expand(5, -1) if padded else None
    start = mixture()

    together = start(genes, values, keep)

    for i in range(5):
        other = torch.cat([genes[i : i + 1], genes[i : i + 1].flip(1)])
        both = None if keep is None else torch.cat([keep[i : i + 1], keep[:1].flip(1)])
        twice = torch.cat([values[i : i + 1], values[i : i + 1].flip(1)])
        apart = start(other, twice, both)  # not the same columns: one by one
        for found, expected in zip(together[:2], apart[:2], strict=True):
            torch.testing.assert_close(found[i], expected[0])
            torch.testing.assert_close(found[i], expected[1])


def test_the_factor_model_tells_components_apart_on_many_genes_in_float32():
    start, n_genes = MixtureOfFactorAnalyzers(5000, R, 2), 5000
    rng = torch.Generator().manual_seed(0)
    start.loadings.copy_(torch.randn(n_genes, R, generator=rng))
    start.noise.fill_(0.1)
    start.means[0] = 0.01 * torch.randn(n_genes, generator=rng)
    genes, values = torch.arange(n_genes)[None], torch.randn(1, n_genes, generator=rng)

    found = start(genes, values, None).log_weights[0]

    # With C the same in both, and flat, the densities differ by squares alone.
    w, x = start.loadings.double().numpy(), values[0].double().numpy()
    inner = np.eye(R) + w.T @ w / 0.1
    off = np.stack([x - start.means[0].double().numpy(), x])
    target = off @ w / 0.1
    distance = (off**2).sum(1) / 0.1
    distance -= (target * np.linalg.solve(inner, target.T).T).sum(1)
    np.testing.assert_allclose(found.exp(), softmax(-distance / 2), atol=0.02)
    assert 0.001 < found.exp()[0] < 0.999
