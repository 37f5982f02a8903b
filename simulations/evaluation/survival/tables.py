"""Tables, goals and figures of the survival comparison.

The seeds train on the same patients and are evaluated on the same others: SDs over them
are those of training only. What the patients' number leaves open is the interval over
resampled patients; paired tests are over cancers, whose patients differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedgex.simulations.evaluation import figures
from fedgex.simulations.evaluation.arms import LOCAL, POOLED
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import MIN_EVENTS
from fedgex.simulations.evaluation.survival.predictions import (
    CLINICAL_COX,
    CLINICAL_GAUSSIAN,
    COX_CLINICAL,
    COX_RIDGE,
    GAUSSIAN,
    MEAN_FILLED,
    OURS,
    PANEL_TRAINED,
    PCA_COX,
    RESTORED,
    SCHEMES,
    TUNED,
    TYPE_ONLY,
    WITH_CLINICAL,
)
from fedgex.simulations.evaluation.table import markdown, mean_known, mean_sd, paired_p
from fedgex.simulations.reporting.schema import plain

NOT_ESTIMABLE = "not estimable"
GAIN = 0.03
"""Goal: C-index above Cox ridge on Gaussian-imputed values."""
SHARE = 2 / 3
"""Goal: of the gap between absent and true anchors that restored ones recover."""
N_SHOWN = 8
"""Anchors that the page names for each cancer; the JSON names all."""

METHODS = (
    COX_RIDGE,
    COX_CLINICAL,
    PCA_COX,
    CLINICAL_COX,
    OURS,
    WITH_CLINICAL,
    TUNED,
    POOLED,
    LOCAL,
)
OVERALL = (*(name for name in METHODS if name != LOCAL), TYPE_ONLY)
CALIBRATED = (COX_RIDGE, COX_CLINICAL, OURS, WITH_CLINICAL)
PARTLY = (
    OURS,
    WITH_CLINICAL,
    GAUSSIAN,
    CLINICAL_GAUSSIAN,
    RESTORED,
    MEAN_FILLED,
    PANEL_TRAINED,
)
MEASURES = {
    "pooled": "C-index over all pairs",
    "stratified": "C-index within cancers",
    "brier": "integrated Brier score",
    "calibration": "calibration error",
}
FATES = {
    COX_RIDGE: "Cox ridge, true anchors",
    f"all/{RESTORED}": "Cox ridge, anchors restored by the federated model",
    f"all/{GAUSSIAN}": "Cox ridge, anchors restored by the Gaussian",
    f"all/{MEAN_FILLED}": "Cox ridge, anchors mean-filled",
    "all/without": "Cox ridge, trained without the anchors",
    OURS: "federated model, true anchors",
    "all/federated": "federated model, anchors hidden",
}
"""Models of all genes, by the fate of the anchors."""

Rows = dict[str, dict[str, str]]
ByCancer = dict[str, float]
"""By estimable cancer; NaN where a method predicts nothing."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one seed."""

    deaths: Mapping[str, int]
    """Of unseen patients, by cancer."""
    c_index: Mapping[str, ByCancer]
    """By method, way of hiding and method (`panel/...`), or fate of the anchors."""
    error: ByCancer
    """Jackknife standard error of the C-index from true anchors only."""
    resampled: Mapping[str, Sequence[float]]
    """By method, the mean C-index over cancers on each bootstrap sample."""
    overall: Mapping[str, Mapping[str, float]]
    """By method, then by key of MEASURES."""
    thirds: Mapping[str, Sequence[tuple[float, float]]]
    """By method, predicted and Kaplan-Meier survival of each third, worst first."""
    anchors: Mapping[str, Sequence[str]]
    """Genes of each cancer, by falling |z|."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method against another on the same cancers."""

    mean: float
    interval: tuple[float, float] | None
    """95 % over bootstrap samples of the patients; None where none were drawn."""
    p: float
    """Of Wilcoxon's signed-rank test over cancers."""
    n_cancers: int

    def __str__(self) -> str:
        """Return it as `+0.012 (-0.010 to +0.034; p 0.031)`."""
        if math.isnan(self.mean):
            return "-"
        about = [] if math.isnan(self.p) else [f"p {self.p:.3f}"]
        if self.interval is not None:
            about.insert(0, "{:+.3f} to {:+.3f}".format(*self.interval))
        return f"{self.mean:+.3f}" + (f" ({'; '.join(about)})" if about else "")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """C-index from a cancer's anchors: true, absent and restored."""

    true: float
    absent: float
    error: float
    """The jackknife's standard error of the C-index from true anchors."""
    ours: float
    """C-index from anchors that the federated model restored."""
    gaussian: float

    @property
    def is_sure(self) -> bool:
        """Whether the gap exceeds two standard errors."""
        return self.true - self.absent > 2 * self.error

    def share(self, restored: float) -> float:
        """Return the recovered share of the gap."""
        return (restored - self.absent) / (self.true - self.absent)


def results(seeds: Sequence[Scores], types: Sequence[str], *, quick: bool) -> Results:
    """Return tables and figures over all seeds."""
    recovered = recoveries(seeds, types)
    goals = {
        "full_panels": difference(seeds, OURS, COX_RIDGE),
        **{s: difference(seeds, f"{s}/{OURS}", f"{s}/{GAUSSIAN}") for s in SCHEMES},
    }
    numbers = {
        "quick": quick,
        "min_events": MIN_EVENTS,
        "seeds": [asdict(each) for each in seeds],
        "goals": {name: asdict(each) for name, each in goals.items()},
        "anchors": {
            name: asdict(each)
            | {
                "gap_exceeds_two_errors": each.is_sure,
                "share_ours": each.share(each.ours) if each.is_sure else None,
                "share_gaussian": each.share(each.gaussian) if each.is_sure else None,
            }
            for name, each in recovered.items()
        },
    }
    overall = {
        method: {
            text: mean_sd([each.overall[method][key] for each in seeds])
            for key, text in MEASURES.items()
        }
        for method in OVERALL
        if all(method in each.overall for each in seeds)
    }
    among_all = {
        FATES[key]: _by_cancer(seeds, key, types) for key in _present(seeds, FATES)
    }
    fields: dict[str, Any] = {
        "seeds": f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
        "min_events": MIN_EVENTS,
        "not_estimable": NOT_ESTIMABLE,
        "local": LOCAL,
        "cox_ridge": COX_RIDGE,
        "type_alone": TYPE_ONLY,
        "gain": GAIN,
        "schemes": SCHEMES,
        "within": markdown("method", _within(seeds, types)),
        "goal": f"{_met(goals['full_panels'].mean, 0.0)} ({goals['full_panels']})",
        "overall": markdown("method", overall),
        "anchors": markdown("cancer", _anchors(recovered)),
        "share": SHARE,
        "recovered": _recovered(recovered),
        "first_anchors": "\n".join(
            f"- {name}: {', '.join(list(some)[:N_SHOWN])}"
            for name, some in seeds[0].anchors.items()
        ),
        "among_all": markdown("model", among_all),
    }
    for s in SCHEMES:
        clinical = f"{s}/{WITH_CLINICAL}", f"{s}/{CLINICAL_GAUSSIAN}"
        fields[s] = markdown("method", _partly(seeds, s))
        fields[f"{s}_goal"] = f"{_met(goals[s].mean, GAIN)} ({goals[s]})"
        fields[f"{s}_clinical"] = difference(seeds, *clinical)
    looks = {"everything measured": ("", COX_RIDGE)}
    looks |= {SCHEMES[s]: (f"{s}/", GAUSSIAN) for s in SCHEMES}
    drawn = {
        title: (
            other,
            [
                (mean_known(theirs), mean_known(mine))
                for theirs, mine in _values(
                    seeds, prefix + other, prefix + OURS
                ).values()
            ],
        )
        for title, (prefix, other) in looks.items()
    }
    thirds = {
        method: [point for each in seeds for point in each.thirds.get(method, ())]
        for method in CALIBRATED
    }
    return Results(
        name="survival",
        numbers=plain(numbers),
        fields=fields,
        figures={
            "c-index": figures.c_indices(drawn),
            "calibration": figures.calibration(thirds),
        },
    )


def difference(seeds: Sequence[Scores], one: str, other: str) -> Difference:
    """Compare two methods on the cancers where both predict something."""
    pairs = [
        (mean_known(mine), mean_known(theirs))
        for mine, theirs in _values(seeds, one, other).values()
    ]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    drawn = [
        np.subtract(each.resampled[one], each.resampled[other])
        for each in seeds
        if one in each.resampled and other in each.resampled
    ]
    interval = None
    if drawn:
        low, high = np.nanpercentile(np.mean(drawn, axis=0), [2.5, 97.5])
        interval = float(low), float(high)
    return Difference(
        mean=float(np.mean([a - b for a, b in pairs])) if pairs else math.nan,
        interval=interval,
        p=paired_p(*zip(*pairs, strict=True)) if pairs else math.nan,
        n_cancers=len(pairs),
    )


def _values(
    seeds: Sequence[Scores], one: str, other: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the C-indices of two methods by cancer, one a seed that has both."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for each in seeds:
        for name, value in each.c_index.get(one, {}).items():
            if name in each.c_index.get(other, {}):
                mine, theirs = found.setdefault(name, ([], []))
                mine.append(value)
                theirs.append(each.c_index[other][name])
    return found


def recoveries(seeds: Sequence[Scores], types: Iterable[str]) -> dict[str, Recovery]:
    """Return the recovery from restored anchors, by estimable cancer.

    A model that reads anchors only has C 0.5 without them, as it has with the mean.
    """
    found = {}
    for name in types:
        values = {
            key: [
                each.c_index[f"anchors/{key}"][name]
                for each in seeds
                if name in each.c_index.get(f"anchors/{key}", {})
            ]
            for key in ("true", MEAN_FILLED, RESTORED, GAUSSIAN)
        }
        true = np.asarray(values["true"])
        if len(true) == 0 or np.isnan(true).all():
            continue
        errors = [each.error[name] for each in seeds if name in each.error]
        found[name] = Recovery(
            true=float(true.mean()),
            absent=float(np.mean(values[MEAN_FILLED])),
            error=float(np.mean(errors)),
            ours=float(np.mean(values[RESTORED])),
            gaussian=float(np.mean(values[GAUSSIAN])),
        )
    return found


def _within(seeds: Sequence[Scores], types: Sequence[str]) -> Rows:
    """Return a row a method, a column a cancer."""
    rows = {"*unseen deaths*": {name: str(seeds[0].deaths[name]) for name in types}}
    for method in _present(seeds, METHODS):
        rows[method] = _by_cancer(seeds, method, types)
        if method != COX_RIDGE:
            against = difference(seeds, method, COX_RIDGE)
            rows[method][f"against {COX_RIDGE}"] = str(against)
    return rows


def _partly(seeds: Sequence[Scores], scheme: str) -> Rows:
    """Return a row a method, evaluated on partly hidden values."""
    rows = {}
    for method in _present(seeds, PARTLY, f"{scheme}/"):
        key = f"{scheme}/{method}"
        rows[method] = {"C-index": mean_sd(_means(seeds, key))}
        if method != GAUSSIAN:
            against = difference(seeds, key, f"{scheme}/{GAUSSIAN}")
            rows[method]["against Gaussian-imputed"] = str(against)
    for method in _present(seeds, (OURS, COX_RIDGE)):
        text = mean_sd(_means(seeds, method))
        rows[f"{method}, everything measured"] = {"C-index": text}
    return rows


def _anchors(recovered: Mapping[str, Recovery]) -> Rows:
    """Return a row a cancer: C-index by fate of the anchors, and recovered shares."""
    rows = {}
    for name, each in recovered.items():
        ways = {"federated model": each.ours, "Gaussian": each.gaussian}
        rows[name] = {
            "true": f"{each.true:.3f}",
            **{f"restored, {way}": f"{value:.3f}" for way, value in ways.items()},
            "mean-filled or absent": f"{each.absent:.3f}",
            "gap ± SE": f"{each.true - each.absent:+.3f} ± {each.error:.3f}",
        }
        for way, value in ways.items():
            share = f"{each.share(value):.2f}" if each.is_sure else "gap too small"
            rows[name][f"recovered, {way}"] = share
    return rows


def _recovered(recovered: Mapping[str, Recovery]) -> str:
    """Return whether the goal of recovered shares is met."""
    shares = [each.share(each.ours) for each in recovered.values() if each.is_sure]
    if not shares:
        return NOT_ESTIMABLE
    reached = sum(share >= SHARE for share in shares)
    met = "met" if reached == len(shares) else "not met"
    return f"{met}: in {reached} of {len(shares)} cancers"


def _by_cancer(
    seeds: Sequence[Scores], key: str, types: Sequence[str]
) -> dict[str, str]:
    """Return a method's cells: each cancer, and their mean."""
    found = [each.c_index.get(key, {}) for each in seeds]
    cells = {name: [each.get(name, math.nan) for each in found] for name in types}
    texts = {name: mean_sd(values) for name, values in cells.items()}
    texts = {n: NOT_ESTIMABLE if text == "-" else text for n, text in texts.items()}
    return texts | {"mean": mean_sd(_means(seeds, key))}


def _means(seeds: Sequence[Scores], key: str) -> list[float]:
    """Return each seed's mean over the cancers of a method."""
    return [mean_known(each.c_index.get(key, {}).values()) for each in seeds]


def _present(
    seeds: Sequence[Scores], keys: Iterable[str], prefix: str = ""
) -> list[str]:
    return [key for key in keys if any(prefix + key in s.c_index for s in seeds)]


def _met(value: float, goal: float) -> str:
    if math.isnan(value):
        return NOT_ESTIMABLE
    return "met" if value >= goal else "not met"
