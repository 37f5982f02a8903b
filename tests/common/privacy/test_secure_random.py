import time

import numpy as np
import pytest
import torch
from scipy import stats

from fedgex.common.privacy.secure_random import SecretRandom


def test_noise_is_normal_with_the_stated_standard_deviation():
    drawn = SecretRandom().normal((200_000,), 3.0).double().numpy()

    n = len(drawn)
    assert abs(drawn.mean()) < 5 * 3 / np.sqrt(n)
    assert drawn.std() == pytest.approx(3.0, rel=5 / np.sqrt(2 * n))
    assert abs(stats.skew(drawn)) < 5 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(drawn)) < 5 * np.sqrt(24 / n)
    assert stats.kstest(drawn, "norm", args=(0, 3.0)).pvalue > 1e-6


def test_neighbouring_values_do_not_depend_on_each_other():
    """Values share a pair of Box-Muller numbers; the two of a pair are independent."""
    drawn = SecretRandom().normal((200_000,), 1.0).double().numpy()

    for lag in (1, 2):
        a, b = drawn[:-lag], drawn[lag:]
        limit = 5 / np.sqrt(len(a))
        assert abs(np.corrcoef(a, b)[0, 1]) < limit
        assert abs(np.corrcoef(a**2, b**2)[0, 1]) < limit


def test_shape_and_type_are_those_of_a_parameter():
    secret = SecretRandom()
    assert secret.normal((2, 3), 1.0).shape == (2, 3)
    assert secret.normal((2, 3), 1.0).dtype == torch.float64
    assert secret.normal((0,), 1.0).shape == (0,)
    assert secret.normal((), 1.0).shape == ()


def test_uniform_numbers_are_even_and_neither_0_nor_1():
    drawn = SecretRandom()._uniform(200_000).numpy()
    assert 0 < drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-6
    assert (drawn * 2.0**53 % 2 == 1).all()


def test_each_is_drawn_at_the_rate_and_by_itself():
    drawn = SecretRandom().bernoulli(100_000, 0.3)
    assert drawn.dtype == torch.bool
    assert drawn.float().mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / 1e5))
    assert SecretRandom().bernoulli(1000, 1.0).all()
    assert len(SecretRandom().bernoulli(0, 0.5)) == 0


def test_no_seed_repeats_a_draw_and_no_global_generator_moves():
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        secret = SecretRandom()
        drawn.append(
            (secret.normal((5,), 1.0), secret.bernoulli(64, 0.5), secret.seed())
        )
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][1], drawn[1][1])
    assert drawn[0][2] != drawn[1][2]
    with pytest.raises(TypeError):
        SecretRandom(1)  # type: ignore[call-arg]


def test_two_draws_of_one_instance_differ():
    secret = SecretRandom()
    assert not torch.equal(secret.normal((5,), 1.0), secret.normal((5,), 1.0))


def test_the_keystream_is_chacha20_and_its_first_bytes_the_next_key(monkeypatch):
    """RFC 8439, appendix A.1, vector 1: key and nonce of zeros."""
    block = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    monkeypatch.setattr("os.urandom", bytes)
    secret = SecretRandom()
    assert secret._bytes(32) == block[32:]
    assert secret._key == block[:32]


def test_a_million_numbers_take_well_under_a_second():
    secret = SecretRandom()
    secret.normal((1000,), 1.0)
    started = time.process_time()
    secret.normal((1_000_000,), 1.0)
    assert time.process_time() - started < 1.0
