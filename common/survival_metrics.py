"""How good survival predictions are: concordance, Brier score, log-rank, Kaplan-Meier.

N patients, K times, M steps. Durations are in days and above zero; an event is 1 for an
observed death and 0 for a censored patient; a higher risk means an earlier death. What
cannot be estimated is NaN, never 0 or 0.5. Written in NumPy, because `lifelines` has
neither strata nor standard error for the C-index nor a Brier score, and takes seconds
to import; where it has the same number, the tests compare.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2

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
        comparable, or if a risk in a comparable pair is NaN.

    References
    ----------
    Harrell, Lee and Mark (1996), Stat. Med. 15:361-387.
    """
    return c_index_with_se(duration, event, risk)[0]


def stratified_c_index(
    duration: ArrayLike, event: ArrayLike, risk: ArrayLike, strata: ArrayLike
) -> float:
    """Return Harrell's C over the pairs whose patients share a stratum.

    With cancer types as `strata` (N,), of any type that compares, what the cancer type
    alone predicts does not count. All else is as in `c_index`.
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
    stratum = np.zeros(len(time)) if strata is None else np.asarray(strata)
    ordered, comparable = _pairs(time, died, np.asarray(risk), stratum)
    pairs = comparable.sum() / 2  # both patients of a pair have counted it
    if pairs == 0:
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
    survival = np.asarray(survival_at_t)
    days, uncensored = _censoring(time, died)
    observed_at_t = uncensored[np.searchsorted(days, t, side="right") - 1]
    if observed_at_t == 0:
        return float("nan")
    dead, alive = died & (time <= t), time > t
    just_before = np.searchsorted(days, time[dead], side="left") - 1
    error_dead = np.sum(survival[dead] ** 2 / uncensored[just_before])
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
        NaN if no death was observed while two groups were at risk.

    References
    ----------
    Peto and Peto (1972), J. R. Stat. Soc. A 135:185-207.
    """
    time, died = _arrays(duration, event)
    if not died.any():
        return float("nan")
    days = np.unique(time[died])
    stayed = time >= days[0]  # who left before the first death tells nothing
    names, code = np.unique(np.asarray(group)[stayed], return_inverse=True)
    member = (code == np.arange(len(names))[:, None]).astype(float)  # (groups, N)
    at_risk = member @ (time[stayed, None] >= days)  # (groups, M)
    deaths = member @ (died[stayed, None] & (time[stayed, None] == days))
    n, d = at_risk.sum(0), deaths.sum(0)  # each (M,)
    share = at_risk / n
    excess = (deaths - share * d).sum(1)  # observed less expected, (groups,)
    spread = d * (n - d) / np.maximum(n - 1, 1)  # hypergeometric
    if len(names) < 2 or not spread.any():
        return float("nan")
    covariance = np.diag(share @ spread) - (share * spread) @ share.T
    free, freedom = excess[1:], len(names) - 1  # the excesses sum to zero
    statistic = free @ np.linalg.solve(covariance[1:, 1:], free)
    return float(chi2.sf(statistic, freedom))


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
    days, deaths = np.unique(time[died], return_counts=True)
    at_risk = (time >= days[:, None]).sum(1)
    return _product_limit(days, deaths, at_risk)


def _arrays(
    duration: ArrayLike, event: ArrayLike
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return both as arrays, the event as a truth value."""
    return np.asarray(duration), np.asarray(event, dtype=bool)


def _pairs(
    time: NDArray[Any],
    died: NDArray[np.bool_],
    risk: NDArray[Any],
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


def _censoring(time: NDArray[Any], died: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return the Kaplan-Meier steps of not being censored; who dies leaves first."""
    days, censored = np.unique(time[~died], return_counts=True)
    at_risk = ((time > days[:, None]) | (~died & (time == days[:, None]))).sum(1)
    return _product_limit(days, censored, at_risk)


def _product_limit(
    days: NDArray[Any], leaving: NDArray[Any], at_risk: NDArray[Any]
) -> tuple[Floats, Floats]:
    """Return days and the product of the shares that stay, starting with (0, 1)."""
    return np.append(0.0, days), np.append(1.0, np.cumprod(1 - leaving / at_risk))
