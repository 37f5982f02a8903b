"""The survival benchmark's numbers as tables, figures and goals.

A split's numbers are means over its seeds. Means over cancers are taken within a split,
SDs over the splits, paired tests over all pairs of split and cancer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fedgex.simulations.benchmark.forecasts import (
    ALONE,
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
    TYPE_ALONE,
    WITH_CLINICAL,
)
from fedgex.simulations.benchmark.ground import POOLED
from fedgex.simulations.benchmark.outcome import Outcome, Section, plain
from fedgex.simulations.benchmark.tables import markdown, paired_p, spread
from fedgex.simulations.charts import COLOURS, STYLE

MIN_EVENTS = 10
"""Fewer deaths of a cancer among the unseen patients, and it is not estimable."""
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
    ALONE,
)
OVERALL = (*(name for name in METHODS if name != ALONE), TYPE_ALONE)
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
COLOUR_NAMES = ("vermillion", "orange", "blue", "green")

ByCancer = dict[str, float]
"""By cancer of which enough died; NaN where a method says nothing."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What came out on one split: of one seed, or as the mean over its seeds."""

    deaths: Mapping[str, int]
    """Of unseen patients, by cancer."""
    c_index: Mapping[str, ByCancer]
    """By method, way of hiding and method (`panel/...`), or fate of the anchors."""
    error: ByCancer
    """Jackknife standard error of the C-index from true anchors alone."""
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
    """How much of what a cancer's anchors tell is left when they are restored."""

    true: float
    absent: float
    error: float
    """Standard error of the gap: over splits, or the jackknife's of one split."""
    ours: float
    """C-index from anchors that the federated model restored."""
    gaussian: float

    @property
    def tells(self) -> bool:
        """Whether the gap exceeds two standard errors."""
        return self.true - self.absent > 2 * self.error

    def share(self, restored: float) -> float:
        """Return the recovered share of the gap."""
        return (restored - self.absent) / (self.true - self.absent)


def page(splits: Sequence[Judged], types: Sequence[str], *, quick: bool) -> Outcome:
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
                "gap_exceeds_two_errors": each.tells,
                "share_ours": each.share(each.ours) if each.tells else None,
                "share_gaussian": each.share(each.gaussian) if each.tells else None,
            }
            for name, each in recovered.items()
        },
    }
    sections = [
        _within(splits, types),
        _overall(splits),
        Section(
            title="Calibration",
            lines=[
                "Predicted against Kaplan-Meier survival at three years in thirds of "
                "the predicted risk within each cancer, all cancers together: a point "
                "for each third and split. On the diagonal, as many live as was said."
            ],
            figure="calibration",
        ),
        *(_partly(splits, scheme) for scheme in SCHEMES),
        _anchors(splits, recovered),
        _among_all(splits, types),
        Section(
            title="What is left out",
            lines=[
                "A random survival forest: scikit-survival has one, but under GPL-3, "
                "which would bind whoever passes fedgex on with it. It is no "
                "dependency and no extra of fedgex, so there is no row of it."
            ],
        ),
    ]
    figures = {"c-index": _draw_c_index(splits), "calibration": _calibration(splits)}
    found = plain(numbers)
    return Outcome(name="survival", sections=sections, numbers=found, figures=figures)


def difference(splits: Sequence[Judged], one: str, other: str) -> Difference:
    """Compare two methods where both say something."""
    pairs = [
        [
            (of_one, of_other)
            for name, of_one in each.c_index.get(one, {}).items()
            if not math.isnan(
                of_other := each.c_index.get(other, {}).get(name, math.nan)
            )
            and not math.isnan(of_one)
        ]
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


def recoveries(splits: Sequence[Judged], types: Iterable[str]) -> dict[str, Recovery]:
    """Return what came of restored anchors, by cancer that is estimable on a split.

    Absent anchors leave a model that reads nothing else with nothing to tell patients
    apart: C is 0.5, which filling with the mean gives as well.
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


def _within(splits: Sequence[Judged], types: Sequence[str]) -> Section:
    deaths = {
        name: ", ".join(str(each.deaths[name]) for each in splits) for name in types
    }
    rows = {"*unseen deaths*": deaths}
    for method in _there(splits, METHODS):
        rows[method] = _by_cancer(splits, method, types)
        if method != COX_RIDGE:
            against = difference(splits, method, COX_RIDGE)
            rows[method][f"against {COX_RIDGE}"] = str(against)
    goal = difference(splits, OURS, COX_RIDGE)
    return Section(
        title="C-index within each cancer",
        lines=[
            "Overall survival, days; Harrell's C on unseen institutions, mean ± SD "
            f"over {_splits(splits)}. Fewer than {MIN_EVENTS} deaths: {NOT_ESTIMABLE}. "
            "The simple models are trained on pooled rows of one cancer, the ridge "
            "chosen by cross-validation inside; clinical covariates are age and sex; "
            f"`{ALONE}` is the mean over sites with the minimum cohort of the cancer. "
            "Last column: difference on the same pairs of split and cancer, mean ± SD "
            "over splits, Wilcoxon's p over pairs. Splits share patients, so that SD "
            "and p flatter.",
            "",
            *markdown("method", rows),
            "",
            f"Goal, not below {COX_RIDGE} in the mean over cancers: "
            f"{_met(goal.mean, 0.0)} ({goal}).",
        ],
        figure="c-index",
    )


def _overall(splits: Sequence[Judged]) -> Section:
    rows = {
        method: {
            text: spread([each.overall[method][key] for each in splits])
            for key, text in MEASURES.items()
        }
        for method in OVERALL
        if all(method in each.overall for each in splits)
    }
    return Section(
        title="All cancers together, and predicted survival",
        lines=[
            "A C-index over all pairs is mostly the cancer type: read it beside the "
            f"row `{TYPE_ALONE}` (Kaplan-Meier of the training patients of the "
            "cancer), and beside the C-index over pairs of one cancer. The integrated "
            "Brier score is the mean over cancers (lower is better); calibration error "
            "is the mean distance from the diagonal of the figure below.",
            "",
            *markdown("method", rows),
        ],
    )


def _partly(splits: Sequence[Judged], scheme: str) -> Section:
    against = f"{scheme}/{GAUSSIAN}"
    rows = {}
    for method in _there(splits, PARTLY, f"{scheme}/"):
        key = f"{scheme}/{method}"
        rows[method] = {"C-index": spread(_means(splits, key))}
        if method != GAUSSIAN:
            rows[method]["against Gaussian-imputed"] = str(
                difference(splits, key, against)
            )
    for method in _there(splits, (OURS, COX_RIDGE)):
        rows[f"{method}, everything measured"] = {
            "C-index": spread(_means(splits, method))
        }
    goal = difference(splits, f"{scheme}/{OURS}", against)
    clinical = difference(
        splits, f"{scheme}/{WITH_CLINICAL}", f"{scheme}/{CLINICAL_GAUSSIAN}"
    )
    return Section(
        title=f"Unseen patients with {SCHEMES[scheme]}",
        lines=[
            "Mean C-index over cancers ± SD over "
            f"{_splits(splits)}, each the mean over random draws that are the same for "
            "all methods. All models are trained on all genes, but for the one trained "
            "on the panel itself.",
            "",
            *markdown("method", rows),
            "",
            f"Goal, {GAIN} above {COX_RIDGE} on Gaussian-imputed values: "
            f"{_met(goal.mean, GAIN)} ({goal}). Both with age and sex: {clinical}.",
        ],
    )


def _anchors(splits: Sequence[Judged], recovered: Mapping[str, Recovery]) -> Section:
    rows, told = {}, []
    for name, each in recovered.items():
        gap = f"{each.true - each.absent:+.3f} ± {each.error:.3f}"
        rows[name] = {
            "true": f"{each.true:.3f}",
            "restored, federated model": f"{each.ours:.3f}",
            "restored, Gaussian": f"{each.gaussian:.3f}",
            "mean-filled or absent": f"{each.absent:.3f}",
            "gap ± SE": gap,
            "recovered, federated model": "gap too small",
            "recovered, Gaussian": "gap too small",
        }
        if each.tells:
            told.append(each.share(each.ours))
            rows[name] |= {
                "recovered, federated model": f"{told[-1]:.2f}",
                "recovered, Gaussian": f"{each.share(each.gaussian):.2f}",
            }
    reached = sum(share >= SHARE for share in told)
    verdict = (
        f"{'met' if reached == len(told) else 'not met'}: in {reached} of {len(told)} "
        "cancers"
        if told
        else NOT_ESTIMABLE
    )
    genes = [
        f"- {name}: {', '.join(list(some)[:N_SHOWN])}"
        for name, some in splits[0].anchors.items()
    ]
    return Section(
        title="Anchor genes: alone",
        lines=[
            "The genes of largest |z| in a federated Cox screen of the training sites "
            "(score and information of each gene at coefficient 0, summed over sites). "
            "A Cox ridge that reads the anchors alone, trained on their true values, "
            "is asked of unseen patients with true anchors, and with anchors deleted "
            "and restored from the other genes. Absent anchors leave it nothing that "
            "tells patients apart (C 0.5), and so does filling them with the mean, the "
            "same for all; a model of the other genes is another question, see below.",
            "",
            *markdown("cancer", rows),
            "",
            f"Goal, {SHARE:.2f} of the gap recovered wherever it exceeds two standard "
            f"errors ({'over splits' if len(splits) > 1 else 'jackknife'}): {verdict}.",
            "",
            "First anchors of each cancer on the first split:",
            "",
            *genes,
        ],
    )


def _among_all(splits: Sequence[Judged], types: Sequence[str]) -> Section:
    fates = {
        COX_RIDGE: "Cox ridge, true anchors",
        f"all/{RESTORED}": "Cox ridge, anchors restored by the federated model",
        f"all/{GAUSSIAN}": "Cox ridge, anchors restored by the Gaussian",
        f"all/{MEAN_FILLED}": "Cox ridge, anchors mean-filled",
        "all/without": "Cox ridge, trained without the anchors",
        OURS: "federated model, true anchors",
        "all/federated": "federated model, anchors hidden",
    }
    rows = {
        text: _by_cancer(splits, key, types)
        for key, text in fates.items()
        if _there(splits, (key,))
    }
    return Section(
        title="Anchor genes: among all others",
        lines=[
            "The same anchors deleted from the inputs of models that read all genes: "
            "how much is lost where other genes can stand in. C-index, mean ± SD over "
            f"{_splits(splits)}.",
            "",
            *markdown("model", rows),
        ],
    )


def _by_cancer(
    splits: Sequence[Judged], key: str, types: Sequence[str]
) -> dict[str, str]:
    """Return a method's cells: each cancer, and their mean."""
    cells = {}
    for name in types:
        values = [each.c_index.get(key, {}).get(name, math.nan) for each in splits]
        text = spread(values)
        cells[name] = NOT_ESTIMABLE if text == "-" else text
    return cells | {"mean": spread(_means(splits, key))}


def _means(splits: Sequence[Judged], key: str) -> list[float]:
    """Return each split's mean over the cancers of which a method says something."""
    found = []
    for each in splits:
        values = [v for v in each.c_index.get(key, {}).values() if not math.isnan(v)]
        found.append(float(np.mean(values)) if values else math.nan)
    return found


def _there(
    splits: Sequence[Judged], keys: Sequence[str], prefix: str = ""
) -> list[str]:
    return [key for key in keys if any(prefix + key in s.c_index for s in splits)]


def _splits(splits: Sequence[Judged]) -> str:
    return f"{len(splits)} split{'s' if len(splits) > 1 else ''}"


def _met(value: float, goal: float) -> str:
    if math.isnan(value):
        return NOT_ESTIMABLE
    return "met" if value >= goal else "not met"


@mpl.rc_context(STYLE)
def _draw_c_index(splits: Sequence[Judged]) -> Figure:
    """Draw the federated model against Cox ridge, a point a split and cancer."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    looks = {"full": ("", COX_RIDGE), **{s: (f"{s}/", GAUSSIAN) for s in SCHEMES}}
    grid = figure.subplots(1, len(looks), sharex=True, sharey=True)
    titles = {"full": "everything measured", **SCHEMES}
    for axes, (key, (prefix, other)) in zip(grid, looks.items(), strict=True):
        for each in splits:
            ours = each.c_index.get(f"{prefix}{OURS}", {})
            theirs = each.c_index.get(f"{prefix}{other}", {})
            shared = [name for name in ours if name in theirs]
            axes.scatter(
                [theirs[name] for name in shared],
                [ours[name] for name in shared],
                s=12,
                color=COLOURS["blue"],
            )
        axes.axline((0.5, 0.5), slope=1, color=COLOURS["grey"], linewidth=0.8)
        axes.set(
            title=titles[key],
            xlabel=f"C-index, {other}",
            aspect="equal",
            xlim=(0.3, 1),
            ylim=(0.3, 1),
        )
    grid[0].set_ylabel("C-index, federated model")
    return figure


@mpl.rc_context(STYLE)
def _calibration(splits: Sequence[Judged]) -> Figure:
    """Draw predicted against observed survival, a point a third and split."""
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for method, colour in zip(CALIBRATED, COLOUR_NAMES, strict=True):
        points = [p for each in splits for p in each.thirds.get(method, ())]
        if points:
            said, seen = zip(*points, strict=True)
            axes.scatter(said, seen, s=14, color=COLOURS[colour], label=method)
    axes.axline((0, 0), slope=1, color=COLOURS["grey"], linewidth=0.8)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
        xlabel="predicted survival at three years",
        ylabel="Kaplan-Meier survival at three years",
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")
    return figure
