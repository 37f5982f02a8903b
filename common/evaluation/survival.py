"""How good survival predictions are: concordance, Brier score, log-rank, Kaplan-Meier.

N patients, K times, M steps. Durations are in days and above zero; an event is 1 for an
observed death and 0 for a censored patient; a higher risk means an earlier death. What
cannot be estimated is NaN, never 0 or 0.5. Estimates come from `lifelines`; ours is
what it lacks: the C-index within strata, its standard error, and the Brier score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lifelines import KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from lifelines.utils import concordance_index
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def c_index(duration: ArrayLike, event: ArrayLike, risk: ArrayLike) -> float:
    """Return Harrell's C: the share of comparable pairs that the risk puts in order.

    A pair is comparable if one patient was seen to die and the other lived longer, or
    was censored on that very day; two deaths on one day are not. Equal risks count
    half.

    Parameters
    ----------
    duration, event, risk
        Each of shape (N,).

    Returns
    -------
    float
        From 0 to 1, with 0.5 for a risk that says nothing; NaN if no pair is
        comparable, or if a risk is NaN.

    References
    ----------
    Harrell, Lee and Mark (1996), Stat. Med. 15:361-387.
    """
    risk = np.asarray(risk, dtype=float)
    if np.isnan(risk).any():
        return float("nan")
    try:  # lifelines scores predicted survival, which falls as the risk rises
        return float(concordance_index(duration, -risk, event))
    except ZeroDivisionError:  # it found no comparable pair
        return float("nan")


def stratified_c_index(
    duration: ArrayLike, event: ArrayLike, risk: ArrayLike, strata: ArrayLike
) -> float:
    """Return Harrell's C over the pairs whose patients share a stratum.

    With cancer types as `strata` (N,), of any type that compares, differences
    between cancer types do not count. All else is as in `c_index`.
    """
    return c_index_with_se(duration, event, risk, strata)[0]


def c_index_with_se(
    duration: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    strata: ArrayLike | None = None,
) -> tuple[float, float]:
    """Return Harrell's C, stratified if strata are given, and its standard error.

    The standard error is that of the jackknife: C is computed without each patient in
    turn. It covers the choice of these patients, not of those the model was trained on.
    Pairs are counted per patient, so that leaving one out costs a subtraction, not
    another pass over all pairs.

    Parameters
    ----------
    duration, event, risk
        Each of shape (N,).
    strata
        Labels, shape (N,), as in `stratified_c_index`; None: one stratum.

    Returns
    -------
    value, standard_error
        As in `c_index`; the error is NaN where C without some patient would be.

    References
    ----------
    Efron and Stein (1981), Ann. Stat. 9:586-596.
    """
    time, died = _arrays(duration, event)
    risk = np.asarray(risk, dtype=float)
    stratum = np.zeros(len(time)) if strata is None else np.asarray(strata)
    ordered, comparable = _pairs(time, died, risk, stratum)
    pairs = comparable.sum() / 2  # both patients of a pair have counted it
    if pairs == 0 or np.isnan(risk).any():
        return float("nan"), float("nan")
    value = float(ordered.sum() / comparable.sum())
    if (pairs - comparable).min() == 0:
        return value, float("nan")
    without = (ordered.sum() / 2 - ordered) / (pairs - comparable)  # (N,)
    n = len(without)
    return value, float(np.sqrt((n - 1) * without.var()))


def brier_score(
    duration: ArrayLike, event: ArrayLike, survival_at_t: ArrayLike, t: float
) -> float:
    """Return the mean squared error of predicted survival at day t.

    Patients censored by t have no known outcome; those who have one stand in for them,
    weighted by the inverse probability of being still observed. That probability is
    estimated on the same patients, with deaths before censorings on the same day.

    Parameters
    ----------
    duration, event
        Each of shape (N,).
    survival_at_t
        Predicted probability of living longer than t, shape (N,).
    t
        Days.

    Returns
    -------
    float
        0 is perfect; predicting 0.5 for all gives about 0.25. NaN if nobody can be
        observed as late as t.

    References
    ----------
    Graf, Schmoor, Sauerbrei and Schumacher (1999), Stat. Med. 18:2529-2545.
    """
    time, died = _arrays(duration, event)
    if len(time) == 0:
        return float("nan")
    survival = np.asarray(survival_at_t)
    # Who dies leaves just before those censored on the same day.
    leaving = np.where(died, np.nextafter(time, 0), time)
    observed = KaplanMeierFitter().fit(leaving, ~died)
    observed_at_t = float(observed.predict(t))
    if observed_at_t == 0:
        return float("nan")
    dead, alive = died & (time <= t), time > t
    weight = 1 / observed.survival_function_at_times(leaving[dead]).to_numpy()
    error_dead = np.sum(survival[dead] ** 2 * weight)
    error_alive = np.sum((1 - survival[alive]) ** 2) / observed_at_t
    return float((error_dead + error_alive) / len(time))


def integrated_brier_score(
    duration: ArrayLike, event: ArrayLike, survival: ArrayLike, times: ArrayLike
) -> float:
    """Return the Brier score averaged over time, by the trapezoidal rule.

    Parameters
    ----------
    duration, event
        Each of shape (N,).
    survival
        Predicted probability of living longer than each time, shape (N, K).
    times
        Days, rising, shape (K,), two or more; the average runs from first to last.

    Returns
    -------
    float
        NaN if the score at any of the times is.
    """
    at, predicted = np.asarray(times, float), np.asarray(survival).T  # (K,), (K, N)
    scores = [
        brier_score(duration, event, p, t) for p, t in zip(predicted, at, strict=True)
    ]
    return float(np.trapezoid(scores, at) / (at[-1] - at[0]))


def logrank_p(duration: ArrayLike, event: ArrayLike, group: ArrayLike) -> float:
    """Return the p-value of the log-rank test that all groups die alike.

    Parameters
    ----------
    duration, event
        Each of shape (N,).
    group
        Labels of two or more groups, shape (N,).

    Returns
    -------
    float
        NaN if fewer than two groups were there on the day of the first death, or if
        all who were there died on that day.

    References
    ----------
    Peto and Peto (1972), J. R. Stat. Soc. A 135:185-207.
    """
    time, died = _arrays(duration, event)
    if not died.any():
        return float("nan")
    first = time[died].min()
    there = time >= first  # who left before the first death is not informative
    time, died, names = time[there], died[there], np.asarray(group)[there]
    if len(np.unique(names)) < 2 or (died & (time == first)).all():
        return float("nan")
    return float(multivariate_logrank_test(time, names, died).p_value)


def kaplan_meier(duration: ArrayLike, event: ArrayLike) -> tuple[Floats, Floats]:
    """Estimate the share that lives longer than each day.

    Parameters
    ----------
    duration, event
        Each of shape (N,).

    Returns
    -------
    days, survival
        Each of shape (M + 1,): day 0 with survival 1, then each day with a death, from
        which on the new survival holds.

    References
    ----------
    Kaplan and Meier (1958), JASA 53:457-481.
    """
    time, died = _arrays(duration, event)
    if not died.any():
        return np.zeros(1), np.ones(1)
    curve = KaplanMeierFitter().fit(time, died).survival_function_.iloc[:, 0]
    days = np.append(0.0, np.unique(time[died]))
    return days, curve.loc[days].to_numpy()


def _arrays(duration: ArrayLike, event: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Return both as arrays, the event as a truth value."""
    return np.asarray(duration, dtype=float), np.asarray(event, dtype=bool)


def _pairs(
    time: Floats,
    died: NDArray[np.bool_],
    risk: Floats,
    stratum: NDArray[Any],
) -> tuple[Floats, Floats]:
    """Return each patient's correctly ordered and comparable pairs, each (N,)."""
    ordered, comparable = np.zeros(len(time)), np.zeros(len(time))
    for i in np.flatnonzero(died):
        later = (time > time[i]) | ((time == time[i]) & ~died)
        others = np.flatnonzero(later & (stratum == stratum[i]))
        right = (1 + np.sign(risk[i] - risk[others])) / 2  # 1, or 0.5 for equal risks
        ordered[i] += right.sum()
        ordered[others] += right
        comparable[i] += len(others)
        comparable[others] += 1
    return ordered, comparable
