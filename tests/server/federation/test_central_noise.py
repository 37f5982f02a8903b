"""The server's noise, and what it says was spent."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from fedgex.common.study import SitePrivacy, Study
from fedgex.server.federation import central_noise

from ...conftest import OF_DELTAS

RULE = SitePrivacy(noise_multiplier=2.0, clip=3.0, delta=1e-3)


def study(**rules: Any) -> Study:
    values = {
        "name": "test",
        "pretraining": {"rounds": 3},
        "survival": {"rounds": 4, "cancer_types": ["x"]},
        "privacy": rules,
    }
    return Study.read(values | OF_DELTAS, "test")


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the delta of a Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    return float(
        norm.cdf(mu / 2 - epsilon / mu)
        - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    )


@pytest.mark.parametrize("contributors", [1, 5])
def test_noise_is_gaussian_of_the_studys_size_over_the_contributors(contributors: int):
    mean = {"a": np.full((200, 200), 7.0, np.float32), "b": np.zeros(5, np.float32)}

    noised = central_noise.noised(mean, RULE, contributors)

    std = 2.0 * 3.0 * 1.001 / contributors
    noise = (noised["a"].astype(np.float64) - 7).ravel()
    assert noise.std() == pytest.approx(std, rel=0.02)
    assert kstest(noise / std, "norm").pvalue > 1e-4
    assert noised["a"].dtype == noised["b"].dtype == np.float32
    assert noised["b"].all()  # every array has its share


def test_noise_does_not_follow_from_any_seed():
    def once() -> np.ndarray:
        np.random.seed(1)  # noqa: NPY002, the generator that must have no say
        torch.manual_seed(1)
        return central_noise.noised({"a": np.zeros(4, np.float32)}, RULE, 1)["a"]

    assert not (once() == once()).any()


def test_the_mean_that_was_handed_in_stays_as_it_is():
    mean = {"a": np.zeros(4, np.float32)}

    central_noise.noised(mean, RULE, 1)

    assert not mean["a"].any()


def test_without_differential_privacy_nothing_bounds_epsilon():
    assert central_noise.spent(study(), "pretraining", 2) is None


@pytest.mark.parametrize(
    ("phase", "number", "rounds"),
    [("pretraining", 0, 0), ("pretraining", 2, 2), ("survival", 1, 4)],
)
def test_epsilon_of_a_site_composes_all_rounds_so_far(
    phase: str, number: int, rounds: int
):
    told = study(site=RULE.model_dump())

    spent = central_noise.spent(told, phase, number)

    assert spent is not None
    assert spent.keys() == {"site"}
    if rounds:
        mu = math.sqrt(rounds) / 2.0
        assert gaussian_delta(spent["site"], mu) == pytest.approx(1e-3, rel=1e-3)
    else:
        assert spent["site"] == 0


def test_epsilon_of_a_patient_composes_the_steps_of_all_rounds_so_far():
    # With all patients in each step it is a plain Gaussian mechanism.
    rule = {"noise_multiplier": 10, "delta": 1e-3, "clip": 1, "sample_rate": 1}

    spent = central_noise.spent(study(patient=rule), "survival", 2)

    assert spent is not None
    mu = math.sqrt(3 + 2) / 10
    assert gaussian_delta(spent["patient"], mu) == pytest.approx(1e-3, rel=1e-2)
