"""Error of restored expression, and coverage of the predicted uncertainty.

    test sets (unseen patients, other data) -> hidden cells -> each method restores them
    -> error by setting, institution and gene -> tables over the seeds

A setting is a pattern of missingness with its rate or panel, such as "mcar 0.5". All
methods get the same cells. N patients, V genes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from fedgex.simulations.evaluation import figures
from fedgex.simulations.evaluation.arms import FEDERATED, LOCAL, POOLED
from fedgex.simulations.evaluation.imputation.methods import (
    BY_GENE,
    GAUSSIAN,
    LABELS,
    LEVELS,
    LINEAR,
    MIXTURE,
    PATTERNS,
    REFERENCES,
    UNCERTAINTY,
    collect,
)
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import Split
from fedgex.simulations.evaluation.table import (
    Cells,
    markdown,
    mean_over,
    mean_sd,
    nested,
    paired_p,
    summary,
    where,
)
from fedgex.simulations.evaluation.test_sets import (
    BREAST,
    UNSEEN,
    TestSet,
    other_data,
    unseen,
)
from fedgex.simulations.reporting.schema import plain

TESTED = (GAUSSIAN, MIXTURE)
"""Methods against which the differences are tested."""
SHOWN_LEVELS = (0.5, 0.8, 0.95)
RATIOS = {
    GAUSSIAN: "over Gaussian",
    MIXTURE: "over mixture",
    LINEAR: "over its network switched off",
    POOLED: "over pooled",
    LOCAL: "over local",
}
"""Comparisons of the federated model, with their headings."""
GOALS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("never above the Gaussian", GAUSSIAN, 1.0, tuple(PATTERNS)),
    ("7 % below the Gaussian at .5", GAUSSIAN, 0.93, ("mcar 0.5",)),
    ("16 % below the Gaussian at .9", GAUSSIAN, 0.84, ("mcar 0.9",)),
    ("16 % below the Gaussian at .95", GAUSSIAN, 0.84, ("mcar 0.95",)),
    ("below the mixture at every rate at random", MIXTURE, 1.0, ("mcar",)),
    ("below the mixture on panels and under dropout", MIXTURE, 1.0, ("panel", "mnar")),
)
"""Name, other method, highest ratio, and the patterns or settings it is about."""


def run(split: Split, console: Console) -> Results:
    """Evaluate every method on the scenario's hold-out and on other data."""
    others, notes = other_data(split)
    test_sets = [unseen(split), *others]
    results = collect(split, test_sets, console)
    of_unseen = where(results, cohort=UNSEEN)
    mse = where(of_unseen, metric="mse")
    settings = mse["setting"].unique().tolist()
    comparison = {setting: _compared(of_unseen, setting) for setting in settings}
    goals = _goals(comparison)
    genes = _by_gene(where(of_unseen, setting=BY_GENE)) if BY_GENE in settings else None
    intervals = _intervals(where(of_unseen, method=UNCERTAINTY))
    numbers: dict[str, Any] = {
        "seeds": list(split.seeds),
        "quick": split.quick,
        "patients": {each.name: len(each.patients) for each in test_sets},
        "mse": nested(where(results, metric="mse"), "cohort", "method", "setting"),
        "comparison": comparison,
        "goals": goals,
        "notes": notes,
    }
    drawn = {"error": figures.imputation_errors(mse, LABELS)}
    if genes is not None:
        numbers["genes"] = genes
        drawn["gene"] = figures.imputation_genes(where(of_unseen, setting=BY_GENE))
    if intervals:
        numbers["intervals"] = intervals
        drawn["reliability"] = figures.reliability(intervals, PATTERNS, heading)
    n_seeds = len(split.seeds)
    fields = {
        "patients": len(split.unseen.patients),
        "institutions": len(np.unique(split.institution)),
        "genes": len(split.genes),
        "seeds": "one seed" if n_seeds == 1 else f"mean ± SD over {n_seeds} seeds",
        "breast": BREAST,
        "errors": _error_tables(mse),
        "compared": next(iter(comparison.values()))["institutions"],
        "comparison": markdown("Setting", _comparison_rows(comparison)),
        "goals": markdown("Goal", _goal_rows(goals)),
        "by_gene": None if genes is None else markdown("Method", _gene_rows(genes)),
        "intervals": markdown("Setting", _interval_rows(intervals))
        if intervals
        else None,
        "other_data": _other_data(results, others, notes),
    }
    return Results(
        name="imputation", numbers=plain(numbers), fields=fields, figures=drawn
    )


def _compared(results: pd.DataFrame, setting: str) -> dict[str, Any]:
    """Return the federated error over that of others, one a seed, and paired p."""
    here = where(results, setting=setting)
    mse = nested(where(here, metric="mse"), "method")
    own = np.array(mse[FEDERATED])
    means = {m: np.mean(mse[m]) for m in REFERENCES}
    best = min(means, key=means.__getitem__)
    by_group = mean_over(where(here, metric="by_group"), "seed", "method")
    return {
        "ratio": {m: (own / mse[m]).tolist() for m in RATIOS if m in mse},
        "p": {m: paired_p(by_group[FEDERATED], by_group[m]) for m in TESTED},
        "institutions": int(np.isfinite(by_group[FEDERATED]).sum()),
        "best_reference": best,
        "ratio_to_best": float(own.mean() / means[best]),
    }


def _goals(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with the worst of its settings."""
    goals = []
    for goal, other, limit, asked in GOALS:
        ratios = {
            setting: float(np.mean(found["ratio"][other]))
            for setting, found in comparison.items()
            if setting in asked or setting.split(" ")[0] in asked
        }
        worst = max(ratios, key=ratios.__getitem__, default=None)
        row = {"goal": goal, "limit": limit, "worst": worst}
        found, met = math.nan, None
        if worst is not None:
            found = ratios[worst]
            met = found < limit if other == MIXTURE else found <= limit
        goals.append(row | {"found": found, "met": met})
    return goals


def _by_gene(results: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """Return, by method and one a seed, the number of genes restored so well."""
    errors = nested(where(results, metric="gene_mse"), "method", "seed")
    pearson = nested(where(results, metric="gene_pearson"), "method", "seed")
    found: dict[str, dict[str, list[float]]] = {}
    for method, by_seed in errors.items():
        rows = found[method] = dict[str, list[float]]()
        for seed, error in by_seed.items():
            own, r = np.array(error), np.array(pearson[method][seed])
            for name, able in (
                ("genes", np.isfinite(own)),
                ("r above 0", r > 0),
                ("r above .5", r > 0.5),
                ("below the Gaussian's error", own < errors[GAUSSIAN][seed]),
            ):
                rows.setdefault(name, []).append(float(able.sum()))
    return found


def _intervals(results: pd.DataFrame) -> dict[str, Any]:
    """Return, by setting and one a seed, coverage at each level, width and square."""
    return {
        str(setting): {
            "levels": list(LEVELS),
            "held": [*nested(where(some, metric="held"), "seed").values()],
            **{k: where(some, metric=k)["value"].tolist() for k in ("width", "square")},
        }
        for setting, some in results.groupby("setting", sort=False)
    }


def heading(setting: str) -> str:
    """Return a setting's key as a heading: ".5", "100 genes"."""
    pattern, key = setting.split(" ")
    return f"{key} genes" if pattern == "panel" else key.removeprefix("0")


def _named(setting: str) -> str:
    return f"{PATTERNS[setting.split(' ')[0]]}, {heading(setting)}"


def _labelled(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results with the labels of methods and settings."""
    return results.assign(
        method=results["method"].map(LABELS), setting=results["setting"].map(heading)
    )


def _error_tables(mse: pd.DataFrame) -> str:
    tables = [
        markdown(title.capitalize(), summary(_labelled(some), "method", "setting"))
        for pattern, title in PATTERNS.items()
        if len(some := mse[mse["setting"].str.startswith(f"{pattern} ")])
    ]
    return "\n\n".join(tables)


def _comparison_rows(comparison: Mapping[str, Any]) -> Cells:
    rows = {}
    for setting, found in comparison.items():
        row = rows[_named(setting)] = dict[str, str]()
        for other in found["ratio"]:
            row[RATIOS[other]] = mean_sd(found["ratio"][other])
            if other in found["p"]:
                row[f"p, {LABELS[other].split()[0]}"] = _p(found["p"][other])
        best = LABELS[found["best_reference"]]
        row["over the best reference"] = f"{found['ratio_to_best']:.3f} ({best})"
    return rows


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "below .0001" if value < 1e-4 else f"{value:.2g}"


def _goal_rows(goals: Sequence[Mapping[str, Any]]) -> Cells:
    return {
        goal["goal"]: {
            "ratio asked": f"{goal['limit']:.2f}",
            "found": "not judged" if goal["worst"] is None else f"{goal['found']:.3f}",
            "worst at": "-" if goal["worst"] is None else _named(goal["worst"]),
            "met": {None: "-", True: "yes", False: "no"}[goal["met"]],
        }
        for goal in goals
    }


def _gene_rows(genes: Mapping[str, Mapping[str, Sequence[float]]]) -> Cells:
    return {
        LABELS[method]: {name: mean_sd(counts, 0) for name, counts in found.items()}
        for method, found in genes.items()
    }


def _interval_rows(intervals: Mapping[str, Any]) -> Cells:
    rows = {}
    for setting, found in intervals.items():
        held = np.array(found["held"])
        rows[_named(setting)] = {
            f"{level:.0%}": mean_sd(held[:, LEVELS.index(level)].tolist())
            for level in SHOWN_LEVELS
        } | {
            "width of 95 %": mean_sd(found["width"], 2),
            "squared error over variance": mean_sd(found["square"], 2),
        }
    return rows


def _other_data(
    results: pd.DataFrame, others: Sequence[TestSet], notes: Sequence[str]
) -> str:
    sizes = {each.name: len(each.patients) for each in others}
    some = results[results["cohort"].isin(sizes) & (results["metric"] == "mse")]
    blocks = [f"Skipped: {note}." for note in notes]
    if others:
        some = _labelled(some)
        some["column"] = [
            f"{cohort} ({sizes[cohort]}), {setting}"
            for cohort, setting in zip(some["cohort"], some["setting"], strict=True)
        ]
        table = markdown("Method", summary(some, "method", "column"))
        blocks = [table, "", *blocks]
    return "\n".join(blocks)
