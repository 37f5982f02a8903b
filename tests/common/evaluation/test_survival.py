import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lifelines.utils import concordance_index
from scipy.stats import CensoredData, chi2, ecdf, logrank

from fedgex.common.evaluation.survival import (
    brier_score,
    c_index,
    c_index_with_se,
    integrated_brier_score,
    kaplan_meier,
    logrank_p,
    stratified_c_index,
)

# Few distinct days and risks, so that both tie.
patient = st.tuples(
    st.integers(1, 5), st.booleans(), st.integers(0, 3), st.sampled_from("xyz")
)
cohorts = st.lists(patient, min_size=2, max_size=15)


def concordance_by_definition(
    patients: list[tuple[int, bool, int, str]], stratified: bool
) -> float:
    """Ask of every pair who died first; NaN if that can be said of none."""
    score = pairs = 0.0
    for t_i, e_i, r_i, s_i in patients:
        for t_j, e_j, r_j, s_j in patients:
            same = s_i == s_j or not stratified
            if same and e_i and (t_i < t_j or (t_i == t_j and not e_j)):
                pairs += 1
                score += 1.0 if r_i > r_j else 0.5 if r_i == r_j else 0.0
    return score / pairs if pairs else math.nan


# ---- concordance ----


def test_a_risk_that_orders_all_deaths_has_a_c_index_of_one() -> None:
    assert c_index([1, 2, 3], [1, 1, 1], [9.0, 5.0, 1.0]) == 1


def test_equal_risks_count_half() -> None:
    assert c_index([1, 2, 3], [1, 1, 1], [9.0, 9.0, 1.0]) == pytest.approx(2.5 / 3)


def test_a_censored_patient_is_compared_only_with_earlier_deaths() -> None:
    # Comparable: 1 with 2, 1 with 3. Not 2 with 3, because 2 was censored first.
    assert c_index([1, 2, 3], [1, 0, 1], [5.0, 9.0, 1.0]) == pytest.approx(1 / 2)


def test_two_deaths_on_one_day_are_not_compared() -> None:
    assert c_index([1, 1, 2], [1, 1, 0], [9.0, 5.0, 1.0]) == 1


def test_without_a_comparable_pair_the_c_index_is_not_a_number() -> None:
    assert math.isnan(c_index([1, 2], [0, 0], [1.0, 2.0]))
    assert math.isnan(c_index([], [], []))


def test_a_risk_that_is_not_a_number_does_not_pass_for_a_wrong_order() -> None:
    cohort = [1, 2, 3], [1, 1, 1], [9.0, math.nan, 1.0]

    assert math.isnan(c_index(*cohort))
    assert all(math.isnan(number) for number in c_index_with_se(*cohort))


@settings(deadline=None, max_examples=50)
@given(cohorts)
def test_the_c_index_counts_comparable_pairs(
    cohort: list[tuple[int, bool, int, str]],
) -> None:
    duration, event, risk, _ = zip(*cohort, strict=True)

    expected = concordance_by_definition(cohort, stratified=False)
    assert c_index(duration, event, risk) == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=50)
@given(cohorts)
def test_the_value_that_has_a_standard_error_is_that_of_lifelines(
    cohort: list[tuple[int, bool, int, str]],
) -> None:
    duration, event, risk, _ = map(np.array, zip(*cohort, strict=True))
    value, _ = c_index_with_se(duration, event, risk)
    assume(not math.isnan(value))

    assert value == pytest.approx(concordance_index(duration, -risk, event))


@settings(deadline=None, max_examples=50)
@given(cohorts)
def test_the_stratified_c_index_compares_only_within_strata(
    cohort: list[tuple[int, bool, int, str]],
) -> None:
    duration, event, risk, strata = zip(*cohort, strict=True)

    value = stratified_c_index(duration, event, risk, strata)

    expected = concordance_by_definition(cohort, stratified=True)
    assert value == pytest.approx(expected, nan_ok=True)


def test_what_the_stratum_alone_predicts_does_not_count() -> None:
    duration, strata = [1, 2, 3, 11, 12, 13], ["a", "a", "a", "b", "b", "b"]
    risk = [9.0, 9.0, 9.0, 1.0, 1.0, 1.0]

    assert c_index(duration, np.ones(6), risk) == pytest.approx((9 + 6 / 2) / 15)
    assert stratified_c_index(duration, np.ones(6), risk, strata) == 0.5


def test_the_standard_error_is_that_of_leaving_out_each_patient_in_turn() -> None:
    rng = np.random.default_rng(2)
    duration, event = rng.integers(1, 20, 30), rng.random(30) < 0.6
    risk = rng.normal(size=30)

    value, standard_error = c_index_with_se(duration, event, risk)

    rest = [np.arange(30) != i for i in range(30)]
    without = [concordance_index(duration[r], -risk[r], event[r]) for r in rest]
    jackknife = math.sqrt(29 / 30 * np.sum((without - np.mean(without)) ** 2))
    assert value == pytest.approx(concordance_index(duration, -risk, event))
    assert standard_error == pytest.approx(jackknife)


def test_the_standard_error_is_the_spread_over_repeated_cohorts() -> None:
    rng = np.random.default_rng(3)
    repeats = []
    for _ in range(200):
        risk = rng.normal(size=80)
        death, loss = rng.exponential(np.exp(-risk)), rng.exponential(2, 80)
        duration, event = np.minimum(death, loss), death <= loss
        repeats.append(c_index_with_se(duration, event, risk))
    values, errors = np.array(repeats).T

    assert errors.mean() == pytest.approx(values.std(), rel=0.15)


def test_a_single_comparable_pair_has_no_standard_error() -> None:
    value, standard_error = c_index_with_se([1, 2], [1, 0], [2.0, 1.0])

    assert value == 1
    assert math.isnan(standard_error)


# ---- Brier score ----


def test_without_censoring_the_brier_score_is_a_mean_square() -> None:
    score = brier_score([1, 2, 3, 4], [1, 1, 1, 1], [0.1, 0.4, 0.8, 1.0], t=2)

    assert score == pytest.approx((0.1**2 + 0.4**2 + 0.2**2 + 0.0**2) / 4)


def test_who_outlives_a_censored_patient_stands_in_for_him() -> None:
    # Day 2 censors one of the three still there, so the two left weigh 3/2 each; the
    # first died while everyone could still be seen, and weighs 1.
    score = brier_score([1, 2, 3, 5], [1, 0, 1, 0], [0.2, 0.5, 0.6, 0.9], t=4)

    by_hand = (0.2**2 + 0.6**2 * 3 / 2 + (1 - 0.9) ** 2 * 3 / 2) / 4
    assert score == pytest.approx(by_hand)


def test_a_death_comes_before_a_censoring_on_the_same_day() -> None:
    # The censored patient of day 1 leaves after the dead one: 1 of 2 remains in sight.
    score = brier_score([1, 1, 3], [1, 0, 1], [0.3, 0.5, 0.6], t=2)

    assert score == pytest.approx((0.3**2 + 0.4**2 * 2) / 3)


def test_the_brier_score_is_not_a_number_where_nobody_can_be_seen() -> None:
    assert math.isnan(brier_score([1, 2], [1, 0], [0.5, 0.5], t=3))
    assert math.isnan(brier_score([], [], [], t=3))


def test_predicting_a_half_for_all_scores_about_a_quarter_despite_censoring() -> None:
    rng = np.random.default_rng(4)
    death, loss = rng.exponential(100, 2000), rng.exponential(100, 2000)

    score = brier_score(
        np.minimum(death, loss), death <= loss, np.full(2000, 0.5), t=80
    )

    assert score == pytest.approx(0.25, abs=0.01)


def test_the_true_survival_curve_beats_curves_that_are_too_high_or_too_low() -> None:
    rng = np.random.default_rng(4)
    death, loss = rng.exponential(100, 2000), rng.exponential(100, 2000)
    duration, event = np.minimum(death, loss), death <= loss

    low, true, high = (
        brier_score(duration, event, np.full(2000, s), t=80)
        for s in (math.exp(-1.2), math.exp(-0.8), math.exp(-0.4))
    )

    assert true < low
    assert true < high


def test_the_integrated_brier_score_is_the_area_over_the_width() -> None:
    duration, event = [1, 3, 6, 9], [1, 1, 1, 1]
    survival = np.array([[0.2, 0.1, 0.0], [0.9, 0.5, 0.1], [0.9, 0.6, 0.5], [1, 1, 1]])

    score = integrated_brier_score(duration, event, survival, [2, 4, 8])

    first, second, third = (
        brier_score(duration, event, survival[:, k], t) for k, t in enumerate([2, 4, 8])
    )
    area = 2 * (first + second) / 2 + 4 * (second + third) / 2
    assert score == pytest.approx(area / 6)


# ---- groups and curves ----


def test_the_log_rank_test_of_two_groups_agrees_with_a_hand_calculation() -> None:
    # Deaths: day 1 of a, 2 of b, 3 of b, 4 of a. Expected in a: 1/2 + 1/3 + 1/2 + 1.
    # Variances: 1/4 + 2/9 + 1/4 + 0.
    chi = (2 - (1 / 2 + 1 / 3 + 1 / 2 + 1)) ** 2 / (1 / 4 + 2 / 9 + 1 / 4)

    p = logrank_p([1, 4, 2, 3], [1, 1, 1, 1], ["a", "a", "b", "b"])

    assert p == pytest.approx(math.erfc(math.sqrt(chi / 2)))


def groups(n_groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Days with ties, events, and groups of which later ones live longer."""
    rng = np.random.default_rng(n_groups)
    group = rng.integers(0, n_groups, 90)
    duration = np.ceil(10 * rng.exponential(1 + 0.2 * group))
    return duration, rng.random(90) < 0.7, group


def test_the_log_rank_test_of_two_groups_is_that_of_scipy() -> None:
    duration, event, group = groups(2)

    p = logrank_p(duration, event, group)

    samples = [
        CensoredData.right_censored(duration[group == g], ~event[group == g])
        for g in (0, 1)
    ]
    assert p == pytest.approx(logrank(samples[0], samples[1]).pvalue)
    assert 0.001 < p < 0.999


@pytest.mark.parametrize("n_groups", [3, 4])
def test_the_log_rank_test_of_more_groups_sums_over_days_of_death(
    n_groups: int,
) -> None:
    duration, event, group = groups(n_groups)

    p = logrank_p(duration, event, group)

    excess, covariance = np.zeros(n_groups), np.zeros((n_groups, n_groups))
    for day in np.unique(duration[event]):
        at_risk, dead = duration >= day, event & (duration == day)
        n, d = at_risk.sum(), dead.sum()
        share = np.bincount(group[at_risk], minlength=n_groups) / n
        excess += np.bincount(group[dead], minlength=n_groups) - d * share
        if n > 1:
            spread = d * (n - d) / (n - 1)
            covariance += spread * (np.diag(share) - np.outer(share, share))
    statistic = excess @ np.linalg.pinv(covariance) @ excess
    assert p == pytest.approx(chi2.sf(statistic, n_groups - 1))
    assert 0.001 < p < 0.999


def test_a_group_that_left_before_the_first_death_is_no_group() -> None:
    duration, event, group = [5, 9, 6, 7], [1, 1, 1, 0], ["a", "a", "b", "b"]

    p = logrank_p([*duration, 1, 2], [*event, 0, 0], [*group, "c", "c"])

    assert p == pytest.approx(logrank_p(duration, event, group))


def test_one_group_or_no_death_cannot_be_tested() -> None:
    assert math.isnan(logrank_p([1, 2, 3], [1, 1, 0], ["a", "a", "a"]))
    assert math.isnan(logrank_p([1, 2, 3], [0, 0, 0], ["a", "b", "b"]))
    assert math.isnan(logrank_p([2, 2, 2], [1, 1, 1], ["a", "b", "b"]))


def test_survival_starts_at_one_and_steps_down_at_each_death() -> None:
    days, survival = kaplan_meier([5, 3, 3, 8], [0, 1, 1, 1])

    assert days.tolist() == [0, 3, 8]
    assert survival.tolist() == pytest.approx([1, 1 / 2, 0])


def test_without_deaths_survival_stays_at_one() -> None:
    for duration, event in (([5, 3], [0, 0]), ([], [])):
        days, survival = kaplan_meier(duration, event)

        assert days.tolist() == [0]
        assert survival.tolist() == [1]


@settings(deadline=None, max_examples=50)
@given(cohorts)
def test_the_survival_curve_is_that_of_scipy(
    cohort: list[tuple[int, bool, int, str]],
) -> None:
    duration, event, *_ = map(np.array, zip(*cohort, strict=True))

    days, survival = kaplan_meier(duration, event)

    curve = ecdf(CensoredData.right_censored(duration, ~event)).sf
    assert days.tolist() == [0, *sorted(set(duration[event]))]
    assert survival == pytest.approx(curve.evaluate(days))
