import math
from itertools import pairwise
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from torch import Tensor

from fedgex.common.models.survival import (
    BaselineHazard,
    breslow,
    cox_loss,
    discrete_time_loss,
    intervals,
    predict_survival,
    survival_probability,
)

ENDS = (100.0, 200.0, 400.0)

# Few distinct days, so that deaths tie with deaths and with censorings.
patient = st.tuples(
    st.floats(-4, 4), st.integers(1, 4).map(float), st.booleans(), st.integers(0, 1)
)
cohorts = st.lists(patient, min_size=1, max_size=9)


def columns(cohort: list[tuple[float, float, bool, int]]) -> list[Tensor]:
    log_hazard, duration, event, strata = zip(*cohort, strict=True)
    return [
        torch.tensor(log_hazard, dtype=torch.float64),
        torch.tensor(duration, dtype=torch.float64),
        torch.tensor(event),
        torch.tensor(strata),
    ]


def efron_by_definition(cohort: list[tuple[float, float, bool, int]]) -> float:
    """Sum over strata and days of death, written as in the textbook."""
    total = 0.0
    for stratum in {s for *_, s in cohort}:
        members = [(h, t, e) for h, t, e, s in cohort if s == stratum]
        for day in {t for _, t, e in members if e}:
            dying = [h for h, t, e in members if e and t == day]
            risk = sum(math.exp(h) for h, t, _ in members if t >= day)
            own = sum(math.exp(h) for h in dying)
            total += sum(dying)
            for place in range(len(dying)):
                total -= math.log(risk - place / len(dying) * own)
    deaths = sum(e for _, _, e, _ in cohort)
    return -total / max(deaths, 1)


# ---- Cox loss ----


def test_two_equal_patients_of_whom_the_first_dies_cost_the_log_of_two() -> None:
    loss = cox_loss(torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([1, 0]))

    assert loss.item() == pytest.approx(math.log(2))


def test_two_deaths_on_one_day_leave_the_risk_set_by_halves() -> None:
    loss = cox_loss(torch.zeros(3), torch.tensor([1.0, 1.0, 2.0]), torch.ones(3))

    by_hand = (math.log(3) + math.log(3 - 1) + math.log(1)) / 3

    assert loss.item() == pytest.approx(by_hand)


def test_a_patient_censored_on_a_day_of_death_was_at_risk_on_it() -> None:
    loss = cox_loss(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([1, 0]))

    assert loss.item() == pytest.approx(math.log(2))


@settings(deadline=None)
@given(cohorts)
def test_the_cox_loss_equals_its_definition_with_ties_censoring_and_strata(
    cohort: list[tuple[float, float, bool, int]],
) -> None:
    log_hazard, duration, event, strata = columns(cohort)

    loss = cox_loss(log_hazard, duration, event, strata)

    assert loss.item() == pytest.approx(efron_by_definition(cohort), abs=1e-9)


@settings(deadline=None)
@given(cohorts, st.randoms(use_true_random=False))
def test_the_order_of_patients_changes_neither_loss_nor_gradient(
    cohort: list[tuple[float, float, bool, int]], random: Random
) -> None:
    order = list(range(len(cohort)))
    random.shuffle(order)
    log_hazard, *rest = columns(cohort)
    log_hazard.requires_grad_()

    straight = cox_loss(log_hazard, *rest)
    shuffled = cox_loss(log_hazard[order], *(values[order] for values in rest))

    torch.testing.assert_close(straight, shuffled)
    torch.testing.assert_close(
        torch.autograd.grad(straight, log_hazard),
        torch.autograd.grad(shuffled, log_hazard),
    )


@settings(deadline=None)
@given(cohorts, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_added_to_a_stratum_does_not_change_the_cox_loss(
    cohort: list[tuple[float, float, bool, int]], first: float, second: float
) -> None:
    log_hazard, duration, event, strata = columns(cohort)
    constant = torch.tensor([first, second], dtype=torch.float64)[strata]

    loss = cox_loss(log_hazard, duration, event, strata)
    moved = cox_loss(log_hazard + constant, duration, event, strata)

    torch.testing.assert_close(loss, moved)


@settings(deadline=None)
@given(cohorts)
def test_strata_add_up_when_weighted_by_their_events(
    cohort: list[tuple[float, float, bool, int]],
) -> None:
    log_hazard, duration, event, strata = columns(cohort)

    parts = [
        cox_loss(log_hazard[own], duration[own], event[own]) * event[own].sum()
        for own in (strata == 0, strata == 1)
    ]
    whole = cox_loss(log_hazard, duration, event, strata) * event.sum()

    torch.testing.assert_close(sum(parts), whole)


def test_the_cox_loss_is_the_log_likelihood_of_lifelines_per_event() -> None:
    rng = np.random.default_rng(5)
    frame = pd.DataFrame(rng.normal(size=(80, 3)), columns=["a", "b", "c"])
    frame["days"] = np.ceil(10 * rng.exponential(np.exp(-frame["a"])))  # many ties
    frame["died"] = rng.random(80) < 0.6

    fitted = CoxPHFitter().fit(frame, "days", "died")
    log_hazard = frame[["a", "b", "c"]].to_numpy() @ fitted.params_.to_numpy()
    loss = cox_loss(
        torch.tensor(log_hazard),
        torch.tensor(frame["days"].to_numpy()),
        torch.tensor(frame["died"].to_numpy()),
    )

    assert -loss.item() * frame["died"].sum() == pytest.approx(fitted.log_likelihood_)


def test_a_batch_without_events_gives_zero_loss_and_zero_gradient() -> None:
    log_hazard = torch.tensor([1.0, -2.0], requires_grad=True)

    loss = cox_loss(log_hazard, torch.tensor([1.0, 2.0]), torch.zeros(2))
    loss.backward()

    assert loss.item() == 0
    assert log_hazard.grad is not None
    assert log_hazard.grad.tolist() == [0, 0]


@settings(deadline=None)
@given(cohorts)
def test_the_gradient_of_the_cox_loss_sums_to_zero_in_every_stratum(
    cohort: list[tuple[float, float, bool, int]],
) -> None:
    log_hazard, duration, event, strata = columns(cohort)
    log_hazard.requires_grad_()

    cox_loss(log_hazard, duration, event, strata).backward()

    assert log_hazard.grad is not None
    for stratum in (0, 1):
        total = log_hazard.grad[strata == stratum].sum().item()
        assert total == pytest.approx(0, abs=1e-9)


def test_huge_log_hazards_overflow_neither_the_cox_loss_nor_its_gradient() -> None:
    log_hazard = torch.tensor([-1000.0, 1000.0, 1000.0, 0.0], requires_grad=True)
    duration, event = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.ones(4)

    loss = cox_loss(log_hazard, duration, event)
    loss.backward()

    # Death 1 loses 2000 + ln 2 to the two of day 2, who lose ln 2 and 0 to one another.
    assert loss.item() == pytest.approx((2000 + 2 * math.log(2)) / 4)
    assert log_hazard.grad is not None
    assert log_hazard.grad.isfinite().all()


# ---- discrete time ----


def test_a_death_counts_in_its_interval_and_the_intervals_before_are_survived() -> None:
    at_risk, died = intervals(torch.tensor([150.0]), torch.tensor([1]), ENDS)

    assert at_risk.tolist() == [[True, True, False]]
    assert died.tolist() == [[False, True, False]]


def test_a_death_on_the_last_day_of_an_interval_belongs_to_it() -> None:
    at_risk, died = intervals(torch.tensor([100.0]), torch.tensor([1]), ENDS)

    assert at_risk.tolist() == [[True, False, False]]
    assert died.tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("day", "survived"), [(49, 0), (50, 1), (149, 1), (150, 2), (299, 2), (300, 3)]
)
def test_a_censored_patient_survived_the_intervals_he_was_half_followed_in(
    day: int, survived: int
) -> None:
    at_risk, died = intervals(torch.tensor([float(day)]), torch.tensor([0]), ENDS)

    assert at_risk.sum().item() == survived
    assert not died.any()


def test_who_dies_after_the_last_end_has_survived_every_interval() -> None:
    at_risk, died = intervals(torch.tensor([400.5]), torch.tensor([1]), ENDS)

    assert at_risk.all()
    assert not died.any()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 500), st.booleans()), min_size=1, max_size=9))
def test_risk_is_an_unbroken_run_from_day_zero_and_death_ends_it(
    followed: list[tuple[float, bool]],
) -> None:
    duration, event = zip(*followed, strict=True)

    at_risk, died = intervals(torch.tensor(duration), torch.tensor(event), ENDS)

    assert not (~at_risk[:, :-1] & at_risk[:, 1:]).any()
    assert not (died & ~at_risk).any()
    assert not (died[:, :-1] & at_risk[:, 1:]).any()
    assert (died.sum(1) <= 1).all()


def test_the_discrete_loss_is_minus_the_log_probability_of_what_happened() -> None:
    hazard = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    at_risk, died = intervals(
        torch.tensor([150.0, 250.0]), torch.tensor([1, 0]), (100.0, 200.0, 300.0)
    )

    loss = discrete_time_loss(hazard.logit(), at_risk, died)

    first = -math.log(0.9 * 0.2)  # survives the first interval, dies in the second
    second = -math.log(0.9 * 0.8 * 0.7)  # followed for half of the third: survived it
    assert loss.item() == pytest.approx((first + second) / 2)


def test_the_discrete_loss_is_least_at_the_actuarial_hazards() -> None:
    duration = torch.tensor([50.0, 80.0, 150.0, 250.0, 500.0])
    event = torch.tensor([1, 1, 1, 0, 0])
    at_risk, died = intervals(duration, event, ENDS)
    hazard = torch.tensor([2 / 5, 1 / 3, 0.0], dtype=torch.float64)  # by hand
    logits = hazard.logit(eps=1e-9).expand(5, 3).clone().requires_grad_()

    discrete_time_loss(logits, at_risk, died).backward()

    assert logits.grad is not None
    torch.testing.assert_close(
        logits.grad.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-8, rtol=0
    )


def test_sites_add_up_to_the_pooled_discrete_loss_when_weighted_by_patients() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 3, generator=generator)
    duration = 500 * torch.rand(7, generator=generator)
    at_risk, died = intervals(duration, torch.tensor([1, 0, 1, 0, 1, 0, 1]), ENDS)

    sites = [slice(0, 2), slice(2, 7)]
    parts = [discrete_time_loss(logits[s], at_risk[s], died[s]) for s in sites]

    pooled = discrete_time_loss(logits, at_risk, died)
    torch.testing.assert_close((2 * parts[0] + 5 * parts[1]) / 7, pooled)


def test_patients_never_at_risk_give_zero_discrete_loss_and_zero_gradient() -> None:
    logits = torch.ones(2, 3, requires_grad=True)
    at_risk, died = intervals(torch.tensor([5.0, 9.0]), torch.tensor([0, 0]), ENDS)

    loss = discrete_time_loss(logits, at_risk, died)
    loss.backward()

    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_discrete_batch_without_patients_costs_nothing() -> None:
    none = torch.zeros(0, 3)

    assert discrete_time_loss(none, none.bool(), none.bool()).item() == 0


def test_survival_is_the_product_of_what_the_hazards_leave() -> None:
    hazard = torch.tensor([[0.5, 0.2, 0.0], [0.1, 1.0, 0.5]])

    survival = survival_probability(hazard.logit())

    torch.testing.assert_close(
        survival, torch.tensor([[0.5, 0.4, 0.4], [0.9, 0.0, 0.0]])
    )


@settings(deadline=None)
@given(st.lists(st.floats(-1000, 1000), min_size=2, max_size=6))
def test_survival_never_rises_and_stays_a_probability(logits: list[float]) -> None:
    survival = survival_probability(torch.tensor([logits]))[0].tolist()

    assert all(0 <= s <= 1 for s in survival)
    assert all(later <= earlier for earlier, later in pairwise(survival))


# ---- baseline hazard ----


def test_the_baseline_rises_by_deaths_over_the_hazard_at_risk() -> None:
    log_hazard = torch.tensor([2.0, 1.0, 3.0, 4.0]).log()
    duration, event = torch.tensor([5.0, 3.0, 3.0, 8.0]), torch.tensor([0, 1, 1, 1])

    baseline = breslow(log_hazard, duration, event)

    assert baseline.times.tolist() == [3, 8]
    assert baseline.cumulative.tolist() == pytest.approx([2 / 10, 2 / 10 + 1 / 4])


def test_predicted_survival_is_a_step_function_from_one() -> None:
    baseline = BaselineHazard(
        times=torch.tensor([3.0, 8.0]), cumulative=torch.tensor([0.2, 0.5])
    )
    log_hazard = torch.tensor([0.0, math.log(2)])

    survival = predict_survival(
        baseline, log_hazard, torch.tensor([1.0, 3.0, 7.0, 8.0, 99.0])
    )

    hazard = torch.tensor([0.0, 0.2, 0.2, 0.5, 0.5])
    torch.testing.assert_close(survival, torch.stack([-hazard, -2 * hazard]).exp())


def test_without_deaths_everyone_is_predicted_to_live() -> None:
    baseline = breslow(torch.zeros(2), torch.tensor([1.0, 2.0]), torch.zeros(2))

    survival = predict_survival(baseline, torch.zeros(2), torch.tensor([1.0, 9.0]))

    assert survival.tolist() == [[1, 1], [1, 1]]


def test_breslow_survival_is_that_of_lifelines() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=60)
    frame = pd.DataFrame({"x": x, "days": rng.exponential(np.exp(-x)) * 100})
    frame["died"] = rng.random(60) < 0.7
    times = np.sort(frame.loc[frame["died"], "days"])[[0, 9, 30]]  # it interpolates

    fitted = CoxPHFitter().fit(frame, "days", "died")
    log_hazard = torch.tensor(x * fitted.params_["x"])
    baseline = breslow(
        log_hazard, torch.tensor(frame["days"]), torch.tensor(frame["died"])
    )
    survival = predict_survival(baseline, log_hazard, torch.tensor(times))

    expected = fitted.predict_survival_function(frame, times=times).to_numpy().T
    np.testing.assert_allclose(survival.numpy(), expected, rtol=1e-6)
