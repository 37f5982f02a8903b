"""What differential privacy costs: epsilon of what was done, and noise for a target.

Every mechanism here is a Gaussian one, on a Poisson sample of the patients or on all.
The accountants are Opacus': PRV (Gopi et al. 2021) or RDP (Mironov 2017).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedgex.common.errors import ConfigError
from fedgex.common.study import CLASSIFICATION, LocalTraining, PatientPrivacy, Study

Accountant = Literal["prv", "rdp"]
Merged = tuple[tuple[float, float, int], ...]
"""Noise multiplier, sampling rate and steps, each pair of the first two once."""

ORDERS = (
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *(2**k for k in range(6, 11)),
)
"""Rényi orders over which RDP takes the best."""
BEYOND_PRV = 100.0
"""Epsilon above which RDP's bound stands for PRV's, whose memory grows with it."""
PRV_STEPS = 200_000
"""Steps above which RDP's bound stands for PRV's, whose time grows with them: a million
took a minute."""
RELATIVE_ERROR = 0.002
"""Share of epsilon that PRV's grid may add, so that its bound is tight."""
LEAST_ERROR, GREATEST_ERROR = 1e-3, 1e-2
"""Least that the grid adds, since it grows as this falls, and most."""
SLACK = 0.01
"""Share of a target that the solved noise may leave unspent."""
NOISES = (1e-2, 1e6)
"""Noise multipliers among which the solution lies."""


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """A Gaussian mechanism that was invoked a number of times."""

    noise_multiplier: float
    """Standard deviation of the noise as a multiple of the sensitivity."""
    sample_rate: float
    """Probability with which each patient took part; 1 for all of them."""
    steps: int = 1
    """Number of times."""

    @property
    def is_possible(self) -> bool:
        """Whether the numbers are those of a mechanism that can be invoked."""
        finite = 0 < self.noise_multiplier < math.inf
        return finite and 0 < self.sample_rate <= 1 and self.steps >= 0


def epsilon(
    history: Iterable[Invocation], delta: float, accountant: Accountant = "prv"
) -> float:
    """Return the epsilon of everything in a history together, an upper bound.

    Neighbouring data sets differ by one patient, added or removed. Where all patients
    took part each time, PRV is replaced by the exact curve of the Gaussian mechanism.

    Parameters
    ----------
    history
        In any order; 0 for an empty one.
    delta
        Between 0 and 1, both excluded.

    References
    ----------
    Gopi, Lee, Wutschitz (2021), arXiv 2106.02848. Mironov (2017), arXiv 1702.07476.
    Balle, Wang (2018), arXiv 1805.06530, theorem 8.
    """
    return _epsilon(_merged(history), delta, accountant)


def planned(study: Study) -> list[Invocation]:
    """Return what all rounds of all phases will invoke at one site.

    Raises
    ------
    ConfigError
        If no noise meets the study's epsilon.
    """
    return _all_rounds(study, noise_multiplier(study))


def noise_multiplier(study: Study) -> float:
    """Return the study's noise multiplier, or the least that meets its epsilon.

    Raises
    ------
    ConfigError
        If no noise meets it.
    """
    privacy = _patient(study)
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    return _solved(study.to_json())


def steps(training: LocalTraining, privacy: PatientPrivacy) -> int:
    """Return the steps of one round, a number that no site's patients influence."""
    return max(1, round(training.local_epochs / privacy.sample_rate))


def invocations(study: Study, phase: str, number: int) -> list[Invocation]:
    """Return what one round of a phase invokes at a site.

    Parameters
    ----------
    number
        Of the round in its phase, from 1; the first of classification counts the
        patients of each class.
    """
    return _round(study, phase, number, noise_multiplier(study))


def site_epsilon(study: Study, rounds: int) -> float:
    """Return the epsilon of site-level privacy after a number of rounds.

    Raises
    ------
    ConfigError
        If the study has no site-level privacy.
    """
    site = study.privacy.site
    if site is None:
        raise ConfigError("the study has no privacy.site; expected one.")
    if not rounds:
        return 0.0
    done = Invocation(
        noise_multiplier=site.noise_multiplier, sample_rate=1, steps=rounds
    )
    return epsilon([done], site.delta)


def _patient(study: Study) -> PatientPrivacy:
    if study.privacy.patient is None:
        raise ConfigError("the study has no privacy.patient; expected one.")
    return study.privacy.patient


def _all_rounds(study: Study, noise: float) -> list[Invocation]:
    return [
        invocation
        for phase, training in study.phases.items()
        for number in range(1, training.rounds + 1)
        for invocation in _round(study, phase, number, noise)
    ]


def _round(study: Study, phase: str, number: int, noise: float) -> list[Invocation]:
    privacy = _patient(study)
    done = [
        Invocation(
            noise_multiplier=noise,
            sample_rate=privacy.sample_rate,
            steps=steps(study.phases[phase], privacy),
        )
    ]
    if phase == CLASSIFICATION and number == 1:
        counts = Invocation(noise_multiplier=privacy.label_noise, sample_rate=1)
        done.append(counts)
    return done


@lru_cache(maxsize=64)
def _solved(study_json: str) -> float:
    """Return the least noise whose planned epsilon is within `SLACK` of the target."""
    study = Study.from_json(study_json, "the study")
    privacy = _patient(study)
    target = privacy.epsilon
    assert target is not None

    def spent(noise: float, accountant: Accountant) -> float:
        return epsilon(_all_rounds(study, noise), privacy.delta, accountant)

    def too_much(log_noise: float, accountant: Accountant) -> float:
        return math.log(spent(math.exp(log_noise), accountant) / aim)

    aim = target * (1 - SLACK / 2)
    low, high = map(math.log, NOISES)
    if (least := spent(NOISES[1], "rdp")) > aim:
        raise ConfigError(
            f"privacy.patient.epsilon is {target:g}, and at delta {privacy.delta:g} "
            f"{least:.3g} are spent whatever the noise; set a larger epsilon or delta, "
            "or, with classification, a larger label_noise."
        )
    # RDP is quick and never below PRV, so it bounds the search.
    found = float(brentq(too_much, low, high, args=("rdp",), xtol=SLACK / 10))
    if privacy.accountant == "prv":
        low = found
        while too_much(low, "prv") < 0:
            low -= 0.1
        if low < found:
            found = float(brentq(too_much, low, found, args=("prv",), xtol=SLACK / 10))
    while spent(math.exp(found), privacy.accountant) > target:
        found += SLACK / 10
    return math.exp(found)


def _merged(history: Iterable[Invocation]) -> Merged:
    total: dict[tuple[float, float], int] = {}
    for done in history:
        key = (done.noise_multiplier, done.sample_rate)
        total[key] = total.get(key, 0) + done.steps
    return tuple(sorted((*key, steps) for key, steps in total.items() if steps))


@lru_cache(maxsize=1024)
def _epsilon(history: Merged, delta: float, accountant: Accountant) -> float:
    if not history:
        return 0.0
    if accountant == "prv" and all(rate == 1 for _, rate, _ in history):
        return _gaussian(history, delta)
    bound = _rdp(history, delta)
    many = sum(steps for _, _, steps in history) > PRV_STEPS
    if accountant == "rdp" or bound > BEYOND_PRV or many:
        return bound
    return _prv(history, delta, bound)


def _gaussian(history: Merged, delta: float) -> float:
    """Return the exact epsilon of Gaussian mechanisms on all patients.

    Together they are one whose sensitivity is `mu` standard deviations.
    """
    mu = math.sqrt(sum(steps / noise**2 for noise, _, steps in history))

    def excess(eps: float) -> float:
        left = log_ndtr(mu / 2 - eps / mu)
        right = eps + log_ndtr(-mu / 2 - eps / mu)
        return float(left + math.log(-math.expm1(min(right - left, -1e-300)))) - wanted

    wanted = math.log(delta)
    if excess(0.0) <= 0:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(-2 * wanted)
    return float(brentq(excess, 0.0, high, xtol=1e-12))


def _rdp(history: Merged, delta: float) -> float:
    # Opacus takes seconds to import and hundreds of MB: only where it is needed.
    from opacus.accountants.analysis import rdp

    with _quiet():
        total = sum(n * _rdp_of_one(noise, rate) for noise, rate, n in history)
        spent, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=total, delta=delta)
    return max(float(spent), 0.0)


@lru_cache(maxsize=1024)
def _rdp_of_one(noise: float, rate: float) -> NDArray[np.float64]:
    """Return the Rényi divergence of one step at each of `ORDERS`."""
    from opacus.accountants.analysis import rdp

    one = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS)
    return np.asarray(one, dtype=np.float64)


def _prv(history: Merged, delta: float, bound: float) -> float:
    """Return PRV's upper bound, or RDP's `bound` where that is the smaller one."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    error = min(max(RELATIVE_ERROR * bound, LEAST_ERROR), GREATEST_ERROR)
    with _quiet():
        try:
            spent = accountant.get_epsilon(delta, eps_error=error)
        except RuntimeError:  # so much noise that the loss is narrower than the grid
            return bound
    return min(float(spent), bound)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore what the accountants warn of: tails of the grid, and the order found."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
