"""Tables, goals and figures of the survival comparison.

A split's numbers are means over its seeds. Means over cancers are taken within a split,
SDs over the splits, paired tests over all pairs of split and cancer.
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
    """Scores on one split: of one seed, or the mean over its seeds."""

    deaths: Mapping[str, int]
    """Of unseen patients, by cancer."""
    c_index: Mapping[str, ByCancer]
    """By method, way of hiding and method (`panel/...`), or fate of the anchors."""
    error: ByCancer
    """Jackknife standard error of the C-index from true anchors only."""
    overall: Mapping[str, Mapping[str, float]]
    """By method, then by key of MEASURES."""
    thirds: Mapping[str, Sequence[tuple[float, float]]]
    """By method, predicted and Kaplan-Meier survival of each third, worst first."""
    anchors: Mapping[str, Sequence[str]]
    """Genes of each cancer, by falling |z|."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method against another on the same pairs of split and cancer."""

    mean: float
    sd: float
    """Over the splits' means; NaN of one split."""
    p: float
    """Of Wilcoxon's signed-rank test over pairs."""
    n_pairs: int

    def __str__(self) -> str:
        """Return it as `+.012 ± .004 (p .031)`."""
        if math.isnan(self.mean):
            return "-"
        tail = "" if math.isnan(self.sd) else f" ± {self.sd:.3f}"
        test = "" if math.isnan(self.p) else f" (p {self.p:.3f})"
        return f"{self.mean:+.3f}{tail}{test}"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """C-index from a cancer's anchors: true, absent and restored."""

    true: float
    absent: float
    error: float
    """Standard error of the gap: over splits, or the jackknife's of one split."""
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


def results(splits: Sequence[Scores], types: Sequence[str], *, quick: bool) -> Results:
    """Return tables and figures over all splits."""
    recovered = recoveries(splits, types)
    goals = {
        "full_panels": difference(splits, OURS, COX_RIDGE),
        **{s: difference(splits, f"{s}/{OURS}", f"{s}/{GAUSSIAN}") for s in SCHEMES},
    }
    numbers = {
        "quick": quick,
        "min_events": MIN_EVENTS,
        "splits": [asdict(each) for each in splits],
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
            text: mean_sd([each.overall[method][key] for each in splits])
            for key, text in MEASURES.items()
        }
        for method in OVERALL
        if all(method in each.overall for each in splits)
    }
    among_all = {
        FATES[key]: _by_cancer(splits, key, types) for key in _present(splits, FATES)
    }
    fields: dict[str, Any] = {
        "splits": f"{len(splits)} split{'s' if len(splits) > 1 else ''}",
        "min_events": MIN_EVENTS,
        "not_estimable": NOT_ESTIMABLE,
        "local": LOCAL,
        "cox_ridge": COX_RIDGE,
        "type_alone": TYPE_ONLY,
        "gain": GAIN,
        "schemes": SCHEMES,
        "within": markdown("method", _within(splits, types)),
        "goal": f"{_met(goals['full_panels'].mean, 0.0)} ({goals['full_panels']})",
        "overall": markdown("method", overall),
        "anchors": markdown("cancer", _anchors(recovered)),
        "share": SHARE,
        "error_from": "over splits" if len(splits) > 1 else "jackknife",
        "recovered": _recovered(recovered),
        "first_anchors": "\n".join(
            f"- {name}: {', '.join(list(some)[:N_SHOWN])}"
            for name, some in splits[0].anchors.items()
        ),
        "among_all": markdown("model", among_all),
    }
    for s in SCHEMES:
        clinical = f"{s}/{WITH_CLINICAL}", f"{s}/{CLINICAL_GAUSSIAN}"
        fields[s] = markdown("method", _partly(splits, s))
        fields[f"{s}_goal"] = f"{_met(goals[s].mean, GAIN)} ({goals[s]})"
        fields[f"{s}_clinical"] = difference(splits, *clinical)
    looks = {"everything measured": ("", COX_RIDGE)}
    looks |= {SCHEMES[s]: (f"{s}/", GAUSSIAN) for s in SCHEMES}
    drawn = {
        title: (other, _pairs(splits, prefix + other, prefix + OURS))
        for title, (prefix, other) in looks.items()
    }
    thirds = {
        method: [point for each in splits for point in each.thirds.get(method, ())]
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


def difference(splits: Sequence[Scores], one: str, other: str) -> Difference:
    """Compare two methods where both predict something."""
    pairs = [
        [pair for pair in _pairs([each], one, other) if not any(map(math.isnan, pair))]
        for each in splits
    ]
    means = [float(np.mean([a - b for a, b in some])) for some in pairs if some]
    flat = [pair for some in pairs for pair in some]
    return Difference(
        mean=float(np.mean(means)) if means else math.nan,
        sd=float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        p=paired_p(*zip(*flat, strict=True)) if flat else math.nan,
        n_pairs=len(flat),
    )


def _pairs(splits: Sequence[Scores], one: str, other: str) -> list[tuple[float, float]]:
    """Return the C-indices of two methods, a pair a split and cancer."""
    return [
        (value, each.c_index[other][name])
        for each in splits
        for name, value in each.c_index.get(one, {}).items()
        if name in each.c_index.get(other, {})
    ]


def recoveries(splits: Sequence[Scores], types: Iterable[str]) -> dict[str, Recovery]:
    """Return the recovery from restored anchors, by estimable cancer.

    A model that reads anchors only has C 0.5 without them, as it has with the mean.
    """
    found = {}
    for name in types:
        values = {
            key: [
                each.c_index[f"anchors/{key}"][name]
                for each in splits
                if name in each.c_index.get(f"anchors/{key}", {})
            ]
            for key in ("true", MEAN_FILLED, RESTORED, GAUSSIAN)
        }
        true = np.asarray(values["true"])
        if len(true) == 0 or np.isnan(true).all():
            continue
        gap = true - np.asarray(values[MEAN_FILLED])
        errors = [each.error[name] for each in splits if name in each.error]
        found[name] = Recovery(
            true=float(true.mean()),
            absent=float(np.mean(values[MEAN_FILLED])),
            error=float(gap.std(ddof=1) / math.sqrt(len(gap)))
            if len(gap) > 1
            else errors[0],
            ours=float(np.mean(values[RESTORED])),
            gaussian=float(np.mean(values[GAUSSIAN])),
        )
    return found


def _within(splits: Sequence[Scores], types: Sequence[str]) -> Rows:
    """Return a row a method, a column a cancer."""
    rows = {
        "*unseen deaths*": {
            name: ", ".join(str(each.deaths[name]) for each in splits) for name in types
        }
    }
    for method in _present(splits, METHODS):
        rows[method] = _by_cancer(splits, method, types)
        if method != COX_RIDGE:
            against = difference(splits, method, COX_RIDGE)
            rows[method][f"against {COX_RIDGE}"] = str(against)
    return rows


def _partly(splits: Sequence[Scores], scheme: str) -> Rows:
    """Return a row a method, evaluated on partly hidden values."""
    rows = {}
    for method in _present(splits, PARTLY, f"{scheme}/"):
        key = f"{scheme}/{method}"
        rows[method] = {"C-index": mean_sd(_means(splits, key))}
        if method != GAUSSIAN:
            against = difference(splits, key, f"{scheme}/{GAUSSIAN}")
            rows[method]["against Gaussian-imputed"] = str(against)
    for method in _present(splits, (OURS, COX_RIDGE)):
        text = mean_sd(_means(splits, method))
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
    splits: Sequence[Scores], key: str, types: Sequence[str]
) -> dict[str, str]:
    """Return a method's cells: each cancer, and their mean."""
    found = [each.c_index.get(key, {}) for each in splits]
    cells = {name: [each.get(name, math.nan) for each in found] for name in types}
    texts = {name: mean_sd(values) for name, values in cells.items()}
    texts = {n: NOT_ESTIMABLE if text == "-" else text for n, text in texts.items()}
    return texts | {"mean": mean_sd(_means(splits, key))}


def _means(splits: Sequence[Scores], key: str) -> list[float]:
    """Return each split's mean over the cancers of a method."""
    return [mean_known(each.c_index.get(key, {}).values()) for each in splits]


def _present(
    splits: Sequence[Scores], keys: Iterable[str], prefix: str = ""
) -> list[str]:
    return [key for key in keys if any(prefix + key in s.c_index for s in splits)]


def _met(value: float, goal: float) -> str:
    if math.isnan(value):
        return NOT_ESTIMABLE
    return "met" if value >= goal else "not met"
