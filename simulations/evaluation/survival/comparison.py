"""Survival predictions of every method within each cancer, on unseen institutions.

    predictions of each seed -> scores of each seed -> tables over cancers and seeds

N unseen patients, n of one cancer, K ends of intervals. A cancer counts where
MIN_EVENTS of its unseen patients died.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.dataset import Patients
from fedgex.common.errors import ConfigError
from fedgex.common.evaluation.survival import (
    c_index,
    c_index_with_se,
    integrated_brier_score,
    kaplan_meier,
    stratified_c_index,
)
from fedgex.common.models.losses import eligible
from fedgex.common.study import SURVIVAL, Study
from fedgex.simulations.analysis import cox_screen
from fedgex.simulations.evaluation.arms import LOCAL
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import MIN_EVENTS, Split
from fedgex.simulations.evaluation.survival import predictions as methods
from fedgex.simulations.evaluation.survival.predictions import Predictions
from fedgex.simulations.evaluation.survival.tables import (
    CALIBRATED,
    METHODS,
    OVERALL,
    ByCancer,
    Scores,
    results,
)
from fedgex.simulations.evaluation.table import mean_known
from fedgex.simulations.reporting.charts import DAYS_PER_YEAR

MIN_LEFT = 5
"""The Brier score goes as far as so many of a cancer are followed for longer."""
CALIBRATED_DAY = 3 * DAYS_PER_YEAR
"""Calibration is evaluated at the end of interval nearest to this day."""
THIRDS = 3
RESAMPLES = 200
"""Bootstrap samples of the unseen patients, drawn within each cancer."""

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


def run(split: Split, console: Console) -> Results:
    """Evaluate every method, once a seed.

    Raises
    ------
    ConfigError
        If the study has no survival phase.
    """
    study = split.study
    if SURVIVAL not in study.phases:
        raise ConfigError(
            f'the study "{study.name}" has no survival phase; expected '
            "survival.rounds of 1 or more. Choose another scenario."
        )
    scores = []
    for number, seed in enumerate(split.seeds, 1):
        scores.append(_evaluate(split, seed, console))
        console.print(
            f"survival with seed {number} of {len(split.seeds)} is evaluated",
            highlight=False,
        )
    return results(scores, study.survival.cancer_types, quick=split.quick)


def evaluate(
    study: Study,
    unseen: Patients,
    predictions: Predictions,
    able: Mapping[str, frozenset[str]],
    anchors: Mapping[str, Sequence[str]],
) -> Scores:
    """Evaluate predictions for the unseen patients.

    Parameters
    ----------
    able
        Cancers of which each site has the minimum cohort; its local model is evaluated
        on these.
    anchors
        Genes of each cancer, for the page.
    """
    types = study.survival.cancer_types
    known = (unseen.duration > 0) & ~unseen.event.isnan()
    index = unseen.type_index(types)
    rows_of: dict[str, Rows] = {
        name: ((index == k) & known).nonzero().squeeze(1).numpy()
        for k, name in enumerate(types)
    }
    event = unseen.event.numpy()
    deaths = {name: int(event[rows].sum()) for name, rows in rows_of.items()}
    counted = {n: rows for n, rows in rows_of.items() if deaths[n] >= MIN_EVENTS}
    ends = np.asarray(study.survival.interval_ends)
    day = int(np.abs(ends - CALIBRATED_DAY).argmin())

    c_indices: dict[str, list[ByCancer]] = {}
    for key, prediction in predictions.items():
        site = key.removeprefix(f"{LOCAL}/")
        asked = able[site] if site != key else counted
        c_indices.setdefault(_method(key), []).append(
            {
                name: _c_index(unseen, prediction, rows) if name in asked else math.nan
                for name, rows in counted.items()
            }
        )
    thirds = {
        method: _thirds(unseen, predictions[method][:, 1 + day], counted, ends[day])
        for method in CALIBRATED
        if method in predictions
    }
    overall = {
        method: _pan_cancer(unseen, predictions[method], rows_of, day)
        | {
            "brier": _brier(unseen, predictions[method][:, 1:], counted, ends),
            "calibration": _distance(thirds.get(method, [])),
        }
        for method in OVERALL
        if method in predictions
    }
    errors = {}
    if "anchors/true" in predictions:
        for name, rows in counted.items():
            followed = unseen.duration[rows], unseen.event[rows]
            risk = predictions["anchors/true"][rows, 0]
            errors[name] = c_index_with_se(*followed, risk)[1]
    return Scores(
        deaths=deaths,
        c_index={method: _means(several) for method, several in c_indices.items()},
        error=errors,
        resampled=_resampled(unseen, predictions, counted),
        overall=overall,
        thirds=thirds,
        anchors=anchors,
    )


def _resampled(
    unseen: Patients, predictions: Predictions, counted: Mapping[str, Rows]
) -> dict[str, list[float]]:
    """Return the mean C-index over cancers on resampled patients, by method.

    The draws are the same for every method and seed, so that differences are paired.
    """
    rng = np.random.default_rng(0)
    draws = [
        {name: rng.choice(rows, len(rows)) for name, rows in counted.items()}
        for _ in range(RESAMPLES)
    ]
    return {
        method: [
            mean_known(
                _c_index(unseen, predictions[method], rows) for rows in draw.values()
            )
            for draw in draws
        ]
        for method in METHODS
        if method in predictions
    }


def _means(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each entry over those where it is known."""
    return {name: mean_known(each[name] for each in several) for name in several[0]}


def _evaluate(split: Split, seed: int, console: Console) -> Scores:
    """Evaluate the predictions of one split and seed."""
    federated, trained = methods.survival_models(split, seed, console)
    hidden = methods.hidden_sets(split, seed)
    screens = methods.screen(split)
    of_models = methods.cached(
        split,
        federated.study,
        "models",
        lambda: methods.of_models(split, trained, hidden, screens),
    )
    of_references = methods.cached(
        split,
        federated.study,
        "references",
        lambda: methods.of_references(split, seed, federated, hidden, screens),
    )
    study, genes = split.study, split.genes.genes
    able = {}
    for site, cohort in split.sites.items():
        rows = eligible(study, SURVIVAL, split.patients(cohort)).cancer_type
        able[site] = frozenset(
            name
            for name in study.survival.cancer_types
            if rows.count(name) >= study.minimum_cohort
        )
    n_anchors = methods.n_anchors(split)
    return evaluate(
        study,
        split.patients(split.unseen),
        of_models | of_references,
        able,
        {
            name: [genes[g] for g in cox_screen.anchors(scores, n_anchors)]
            for name, scores in screens.items()
        },
    )


def _method(key: str) -> str:
    """Return the method of a prediction, without site or number of the draw."""
    first, _, rest = key.partition("/")
    if first == LOCAL:
        return LOCAL
    scheme, _, draw = first.rpartition("-")
    return f"{scheme}/{rest}" if rest and draw.isdigit() else key


def _c_index(unseen: Patients, prediction: Floats, rows: Rows) -> float:
    return c_index(unseen.duration[rows], unseen.event[rows], prediction[rows, 0])


def _thirds(
    unseen: Patients, alive: Floats, counted: Mapping[str, Rows], day: float
) -> list[tuple[float, float]]:
    """Return predicted and Kaplan-Meier survival on a day, the worst third first.

    Patients are in a third of their own cancer, so that the cancer type
    orders no patients.
    """
    third = np.full(len(alive), -1)
    for rows in counted.values():
        place = alive[rows].argsort(kind="stable").argsort(kind="stable")
        third[rows] = THIRDS * place // len(rows)
    found = []
    for k in range(THIRDS):
        rows = np.flatnonzero(third == k)
        if len(rows) == 0 or np.isnan(alive[rows]).any():
            found.append((math.nan, math.nan))
            continue
        days, seen = kaplan_meier(unseen.duration[rows], unseen.event[rows])
        at_day = seen[np.searchsorted(days, day, side="right") - 1]
        found.append((float(alive[rows].mean()), float(at_day)))
    return found


def _distance(thirds: Sequence[tuple[float, float]]) -> float:
    """Return the mean absolute difference of predicted and seen; NaN of none."""
    return float(np.mean([abs(p - k) for p, k in thirds])) if thirds else math.nan


def _pan_cancer(
    unseen: Patients, prediction: Floats, rows_of: Mapping[str, Rows], day: int
) -> dict[str, float]:
    """Return the C-index over all cancers, by survival on a day, and that within."""
    rows = np.concatenate(list(rows_of.values()))
    rows = rows[~np.isnan(prediction[rows, 0])]
    duration, event = unseen.duration[rows], unseen.event[rows]
    strata = np.asarray(unseen.cancer_type)[rows]
    return {
        "pooled": c_index(duration, event, -prediction[rows, 1 + day]),
        "stratified": stratified_c_index(duration, event, prediction[rows, 0], strata),
    }


def _brier(
    unseen: Patients, alive: Floats, counted: Mapping[str, Rows], ends: Floats
) -> float:
    """Return the mean over cancers of the integrated Brier score."""
    scores = []
    for rows in counted.values():
        duration, event = unseen.duration[rows], unseen.event[rows]
        left = np.array([int((duration > end).sum()) for end in ends])
        until = left >= MIN_LEFT
        if until.sum() > 1 and not np.isnan(alive[rows]).any():
            followed = alive[rows][:, until], ends[until]
            scores.append(integrated_brier_score(duration, event, *followed))
    return float(np.nanmean(scores)) if scores else math.nan
