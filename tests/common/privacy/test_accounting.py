import importlib.util
import math

import pytest
from scipy.stats import norm

from fedgex.common.errors import ConfigError
from fedgex.common.privacy.accounting import (
    Invocation,
    epsilon,
    invocations,
    noise_multiplier,
    planned,
    site_epsilon,
    steps,
)
from fedgex.common.study import Pretraining, Study

DELTA = 1e-5
HISTORIES = {
    "one rate": [(1.1, 0.1, 300)],
    "with counts": [(2.0, 0.1, 400), (10.0, 1.0, 1)],
    "mixed": [(1.5, 0.05, 500), (3.0, 0.2, 100), (8.0, 1.0, 3)],
    "everybody": [(6.0, 1.0, 20)],
    "much noise": [(6.0, 0.2, 200)],
}


def history(*rows: tuple[float, float, int]) -> list[Invocation]:
    return [
        Invocation(noise_multiplier=noise, sample_rate=rate, steps=n)
        for noise, rate, n in rows
    ]


def study(**rule) -> Study:
    values = {
        "name": "test",
        "pretraining": {"rounds": 3, "local_epochs": 2},
        "classification": {"rounds": 2, "classes": ["a", "b"]},
        "strategy": {"name": "fedavg", "weights": "equal", "update": "delta"},
        "public": {"statistics": True},
        "privacy": {
            "patient": {"delta": DELTA, "clip": 1.0, "sample_rate": 0.25} | rule
        },
    }
    return Study.read(values, "test")


def gaussian_delta(eps: float, mu: float) -> float:
    """Return Balle and Wang 2018, theorem 8, as it is written."""
    return float(
        norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
    )


def test_nothing_done_costs_nothing():
    assert epsilon([], DELTA) == 0.0
    assert epsilon(history((1.0, 0.1, 0)), DELTA, "rdp") == 0.0


@pytest.mark.parametrize(("noise", "n"), [(5.0, 1), (20.0, 100), (0.5, 1), (0.1, 4)])
def test_a_gaussian_mechanism_on_everybody_costs_what_its_curve_says(noise, n):
    found = epsilon(history((noise, 1.0, n)), DELTA)
    assert gaussian_delta(found, math.sqrt(n) / noise) == pytest.approx(DELTA, rel=1e-3)


def test_so_much_noise_that_delta_covers_it_costs_nothing():
    assert epsilon(history((1e6, 1.0, 1)), 0.1) == 0.0


@pytest.mark.parametrize("rows", HISTORIES.values(), ids=HISTORIES)
def test_prv_is_tighter_than_rdp_and_no_less_than_half_of_it(rows):
    prv, rdp = (epsilon(history(*rows), DELTA, by) for by in ("prv", "rdp"))
    assert rdp / 2 < prv < rdp


def test_prv_agrees_with_the_exact_curve_where_the_rate_is_all_but_one():
    """Of which Opacus' PRV knows nothing: a rate of 1 takes another way here."""
    nearly = epsilon(history((6.0, 1 - 1e-9, 20)), DELTA)
    assert nearly == pytest.approx(epsilon(history((6.0, 1.0, 20)), DELTA), rel=0.01)


def test_order_and_grouping_of_a_history_do_not_matter():
    once = epsilon(history((2.0, 0.1, 300), (10.0, 1.0, 1)), DELTA)
    parts = history((2.0, 0.1, 100), (10.0, 1.0, 1), (2.0, 0.1, 200))
    assert epsilon(parts, DELTA) == once


def test_more_steps_and_less_noise_cost_more():
    costs = [
        epsilon(history(row), DELTA)
        for row in ((2.0, 0.1, 100), (2.0, 0.1, 200), (1.0, 0.1, 200))
    ]
    assert costs == sorted(costs)
    assert costs[0] < costs[2]


def test_hardly_any_noise_costs_much_and_still_has_a_number():
    assert epsilon(history((0.05, 0.5, 100)), DELTA) > 1000


def test_a_round_takes_its_epochs_over_the_rate_and_at_least_one_step():
    rule = study(noise_multiplier=1.0).privacy.patient
    assert steps(Pretraining(rounds=1, local_epochs=2), rule) == 8
    rarely = rule.model_copy(update={"sample_rate": 0.3})
    assert steps(Pretraining(rounds=1, local_epochs=1), rarely) == 3
    always = rule.model_copy(update={"sample_rate": 1.0})
    assert steps(Pretraining(rounds=1), always) == 1


def test_all_rounds_are_planned_and_the_classes_counted_once():
    of = study(noise_multiplier=1.5, label_noise=7.0)
    assert planned(of) == [
        *history((1.5, 0.25, 8)) * 3,
        *history((1.5, 0.25, 4), (7.0, 1.0, 1), (1.5, 0.25, 4)),
    ]
    assert invocations(of, "classification", 2) == history((1.5, 0.25, 4))
    assert len(invocations(of, "classification", 1)) == 2


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("target", [1.0, 4.0])
def test_solved_noise_spends_the_target_to_within_one_percent(accountant, target):
    of = study(epsilon=target, accountant=accountant, label_noise=30.0)
    spent = epsilon(planned(of), DELTA, accountant)
    assert 0.99 * target <= spent <= target


def test_noise_of_the_study_is_taken_as_it_is():
    assert noise_multiplier(study(noise_multiplier=1.5)) == 1.5


def test_a_target_that_class_counts_alone_exceed_is_refused():
    with pytest.raises(ConfigError, match="larger label_noise"):
        noise_multiplier(study(epsilon=0.1, label_noise=1.0))


def test_site_level_privacy_is_a_gaussian_mechanism_a_round():
    values = study(noise_multiplier=1.0).model_dump()
    values["privacy"] = {"site": {"noise_multiplier": 8.0, "clip": 1.0, "delta": 1e-4}}
    values["strategy"] |= {"per_gene": False}
    of = Study.read(values, "test")
    assert site_epsilon(of, 0) == 0.0
    assert gaussian_delta(site_epsilon(of, 25), 5 / 8) == pytest.approx(1e-4, rel=1e-3)


# ---- an independent accountant ----

independent = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None,
    reason="dp-accounting is not installed (pip install dp-accounting)",
)


@independent
@pytest.mark.parametrize("rows", HISTORIES.values(), ids=HISTORIES)
def test_prv_equals_googles_privacy_loss_distribution(rows):
    from dp_accounting.pld import PLDAccountant

    accountant = _composed(PLDAccountant(), rows)
    theirs = accountant.get_epsilon(DELTA)
    assert epsilon(history(*rows), DELTA) == pytest.approx(theirs, rel=0.01)


@independent
@pytest.mark.parametrize("rows", HISTORIES.values(), ids=HISTORIES)
def test_rdp_equals_googles_rdp(rows):
    from dp_accounting.rdp import RdpAccountant

    theirs = _composed(RdpAccountant(), rows).get_epsilon(DELTA)
    assert epsilon(history(*rows), DELTA, "rdp") == pytest.approx(theirs, rel=0.01)


def _composed(accountant, rows):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    for noise, rate, n in rows:
        event = GaussianDpEvent(noise)
        accountant.compose(PoissonSampledDpEvent(rate, event) if rate < 1 else event, n)
    return accountant
