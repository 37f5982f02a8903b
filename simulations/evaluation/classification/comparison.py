"""Accuracy of the cancer type from few genes, all methods on the same panels.

    split -> panels: drawn at random, or selected -> class predicted by each method for
    each unseen patient, cached -> accuracy and macro-F1 against the number of genes

Panels are selected from the sites' sums (simulations/analysis/panel_selection.py) or,
for comparison, from pooled rows. N unseen patients, V genes, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import confusion_matrix

from fedgex.common.errors import ConfigError
from fedgex.common.study import CLASSIFICATION
from fedgex.server.evaluation import class_scores
from fedgex.simulations.analysis import panel_selection
from fedgex.simulations.baselines import references
from fedgex.simulations.evaluation import figures
from fedgex.simulations.evaluation.arms import FEDERATED, LOCAL, LOCAL_SITES, POOLED
from fedgex.simulations.evaluation.classification.methods import (
    ALL,
    AT_ALL_SIZES,
    BOOSTED,
    BOOSTING,
    BY_F,
    DISCRIMINANT,
    DRAWS,
    FOLDS,
    LOGISTIC,
    MIXTURE,
    RANDOM,
    SELECTED,
    SIMPLE,
    Answers,
    Chosen,
    Task,
    answers_of,
    choose,
    task_of,
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
    where,
)
from fedgex.simulations.reporting.charts import p_value
from fedgex.simulations.reporting.schema import plain

FEW = 32
"""Genes up to which the model is to be better than simple methods."""
SHARES = (0.95, 0.99)
"""Of the accuracy from all genes: what a panel has to reach."""
KINDS = (SELECTED, BY_F, RANDOM)
LABELS = {
    FEDERATED: "federated model",
    POOLED: "pooled data",
    LOCAL: f"local model ({LOCAL_SITES} largest sites)",
    MIXTURE: "linear start",
    DISCRIMINANT: "linear discriminant",
    LOGISTIC: "logistic regression",
    BOOSTED: "gradient boosting",
}
"""Labels of the methods, in the order of the tables."""
LOOKS = {
    FEDERATED: ("blue", "o"),
    POOLED: ("ink", "s"),
    LOCAL: ("orange", "^"),
    MIXTURE: ("purple", "P"),
    DISCRIMINANT: ("grey", "X"),
    LOGISTIC: ("vermillion", "v"),
    BOOSTED: ("green", "D"),
}
KIND_LOOKS = {
    "selected": ("blue", "o"),
    "by F": ("vermillion", "v"),
    "random": ("grey", "s"),
}
Runs = dict[str, dict[str, dict[int, list[float]]]]
"""A number a run, by method, kind of panel and number of genes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores by method, kind of panel and number of genes."""

    accuracy: Runs
    macro_f1: Runs
    at: dict[str, dict[str, dict[int, NDArray[np.float64]]]]
    """Accuracy at each institution, mean over the runs."""

    @classmethod
    def of(cls, results: pd.DataFrame) -> Scores:
        """Collect tidy results (keys: method, kind, genes, run, metric, group)."""
        keys = "method", "kind", "genes"
        return cls(
            accuracy=nested(where(results, metric="accuracy"), *keys),
            macro_f1=nested(where(results, metric="macro_f1"), *keys),
            at=mean_over(where(results, metric="at institution"), "run", *keys),
        )

    @property
    def n_genes(self) -> int:
        """Number of all genes."""
        return next(iter(self.accuracy[FEDERATED][ALL]))

    def mean(self, method: str, kind: str, size: int) -> float:
        """Return the mean accuracy over the runs."""
        return float(np.mean(self.accuracy[method][kind][size]))

    def smallest(self, method: str, kind: str, share: float) -> int | None:
        """Return the fewest genes with a share of the accuracy from all genes."""
        wanted = share * self.mean(method, ALL, self.n_genes)
        sizes = self.accuracy[method].get(kind, {})
        return min(
            (n for n in sizes if self.mean(method, kind, n) >= wanted), default=None
        )

    def against(self, kind: str, size: int) -> dict[str, dict[str, float]]:
        """Compare the federated model with each simple method."""
        ours, at = self.mean(FEDERATED, kind, size), self.at[FEDERATED][kind]
        return {
            method: {
                "difference": ours - self.mean(method, kind, size),
                "p": paired_p(at[size], self.at[method][kind][size]),
            }
            for method in (*SIMPLE, DISCRIMINANT, MIXTURE)
            if size in self.accuracy.get(method, {}).get(kind, {})
        }

    def few(self, kind: str) -> list[int]:
        """Return the sizes of FEW genes or fewer."""
        return [size for size in self.accuracy[POOLED][kind] if size <= FEW]


def run(split: Split, console: Console) -> Results:
    """Compare accuracy from panels of 8 to all genes, on unseen institutions.

    Raises
    ------
    ConfigError
        If the study has no classification phase.
    """
    if CLASSIFICATION not in split.study.phases:
        raise ConfigError(
            f'the study "{split.study.name}" has no classification; expected one that '
            "learns cancer types, such as that of the scenario release."
        )
    task = task_of(split)
    chosen = choose(split, task)
    answers = answers_of(split, task, chosen, console)
    scores = Scores.of(_results(task, answers))
    return Results(
        name=CLASSIFICATION,
        numbers=plain(_numbers(split, task, chosen, scores, answers)),
        fields=_fields(split, task, chosen, scores),
        figures=_figures(task, scores, answers),
    )


def _results(task: Task, answers: Answers) -> pd.DataFrame:
    """Return tidy results: of each run, the mean over its models."""
    places = np.unique(task.institution)
    metrics = [("accuracy", ""), ("macro_f1", "")]
    metrics += [("at institution", str(place)) for place in places]
    order, rows = [*LABELS], []
    for key in sorted(answers, key=lambda key: (order.index(key[0]), *key[1:])):
        scores = []
        for each in answers[key]:
            right = each == task.truth
            at = [right[task.institution == place].mean() for place in places]
            scores.append([*class_scores(task.truth, each), *at])
        values = np.mean(scores, axis=0).tolist()
        rows += [(*key, *m, v) for m, v in zip(metrics, values, strict=True)]
    return pd.DataFrame(
        rows, columns=["method", "kind", "genes", "run", "metric", "group", "value"]
    )


def _numbers(
    split: Split, task: Task, chosen: Chosen, scores: Scores, answers: Answers
) -> dict[str, Any]:
    names = split.genes.genes
    places, counts = np.unique(task.institution, return_counts=True)
    return {
        "seeds": split.seeds,
        "classes": task.classes,
        "patients": len(task.truth),
        "institutions": dict(zip(places, counts, strict=True)),
        "scores": {
            method: {
                kind: {
                    size: {
                        "accuracy": accuracy,
                        "macro_f1": scores.macro_f1[method][kind][size],
                        "at_institutions": scores.at[method][kind][size],
                    }
                    for size, accuracy in by_size.items()
                }
                for kind, by_size in by_kind.items()
            }
            for method, by_kind in scores.accuracy.items()
        },
        "federated_against": {
            kind: {size: scores.against(kind, size) for size in scores.few(kind)}
            for kind in (RANDOM, SELECTED)
        },
        "confusion": {
            method: _confusion(task, answers, method)
            for method in (FEDERATED, LOGISTIC)
        },
        "panel_selection": {
            "selected": [names[i] for i in chosen.selected],
            "bound": chosen.bound,
            "by_f": [names[i] for i in chosen.by_f],
            "share_right_at_sites": chosen.right,
            "agreed": {
                f"{share:g}": panel_selection.enough(chosen.right, share)
                for share in SHARES
            },
            "smallest_on_unseen": {
                f"{share:g}": {
                    method: {
                        kind: scores.smallest(method, kind, share) for kind in KINDS
                    }
                    for method in AT_ALL_SIZES
                }
                for share in SHARES
            },
        },
    }


def _fields(split: Split, task: Task, chosen: Chosen, scores: Scores) -> dict[str, Any]:
    names = split.genes.genes
    order = [names[i] for i in chosen.selected]
    goals, agreed = {}, []
    for kind in (RANDOM, SELECTED):
        below = [
            f"{LABELS[method]} at {size}"
            for size in scores.few(kind)
            for method, found in scores.against(kind, size).items()
            if method in SIMPLE and found["difference"] <= 0
        ]
        goals[kind] = f"not met (not above {', '.join(below)})" if below else "met"
    for share in SHARES:
        size = panel_selection.enough(chosen.right, share)
        genes = "all genes" if size > len(order) else ", ".join(order[:size])
        agreed.append(f"- Agreed for {share:.0%}, {size} genes in order: {genes}.")
    return {
        "patients": len(task.truth),
        "institutions": len(np.unique(task.institution)),
        "sites": len(split.sites),
        "classes": len(task.classes),
        "seeds": len(split.seeds),
        "draws": 1 if split.quick else DRAWS,
        "few": FEW,
        "boosting": ", ".join(f"{name} {value}" for name, value in BOOSTING.items()),
        "logistic_c": references.LOGISTIC_C,
        "folds": min(FOLDS, len(split.sites)),
        "accuracy": _by_size(scores, scores.accuracy, RANDOM),
        "macro_f1": _by_size(scores, scores.macro_f1, RANDOM),
        "accuracy_selected": _by_size(scores, scores.accuracy, SELECTED),
        "macro_f1_selected": _by_size(scores, scores.macro_f1, SELECTED),
        "comparison": markdown("panel", _comparison(scores)),
        "goals": goals,
        "by_kind": markdown("accuracy", _by_kind(scores)),
        "fewest": markdown("share", _fewest(chosen, scores)),
        "right": ", ".join(f"{n}: {share:.3f}" for n, share in chosen.right.items()),
        "all_genes": len(names),
        "agreed": "\n".join(agreed),
    }


def _by_size(scores: Scores, runs: Runs, kind: str) -> str:
    """Return a row a method, a column a size, all genes last."""
    rows = {
        LABELS[method]: {str(n): mean_sd(of[kind][n]) for n in runs[POOLED][kind]}
        | {"all genes": mean_sd(of[ALL][scores.n_genes])}
        for method, of in runs.items()
    }
    return markdown("genes", rows)


def _comparison(scores: Scores) -> Cells:
    rows = {}
    for kind in (RANDOM, SELECTED):
        for size in scores.few(kind):
            row = rows[f"{kind}, {size} genes"] = dict[str, str]()
            for method, found in scores.against(kind, size).items():
                p = p_value(None if math.isnan(found["p"]) else found["p"])
                row[LABELS[method]] = f"{found['difference']:+.3f} ({p})"
    return rows


def _by_kind(scores: Scores) -> Cells:
    rows = {}
    for method in AT_ALL_SIZES:
        of_method = scores.accuracy[method]
        for kind in KINDS:
            of_kind = of_method.get(kind, {})
            rows[f"{LABELS[method]}, {kind}"] = {
                str(size): mean_sd(of_kind.get(size, ()))
                for size in of_method[SELECTED]
            }
    return rows


def _fewest(chosen: Chosen, scores: Scores) -> Cells:
    rows = {}
    for share in SHARES:
        size = panel_selection.enough(chosen.right, share)
        kind = ALL if size == scores.n_genes else SELECTED
        of_all = scores.mean(FEDERATED, ALL, scores.n_genes)
        reached = scores.mean(FEDERATED, kind, size) / of_all
        rows[f"{share:.0%}"] = {"agreed": f"{size} (reaches {reached:.1%})"} | {
            f"{LABELS[m]}, {kind}": str(scores.smallest(m, kind, share) or "all")
            for m in AT_ALL_SIZES
            for kind in KINDS
        }
    return rows


def _figures(task: Task, scores: Scores, answers: Answers) -> dict[str, Any]:
    by_size, by_kind, levels = [], [], []
    for kind in (RANDOM, SELECTED):
        lines = {
            LABELS[m]: (look, scores.accuracy[m][kind] | scores.accuracy[m][ALL])
            for m, look in LOOKS.items()
            if m in scores.accuracy
        }
        by_size.append((f"{kind} panels", lines))
    for method in AT_ALL_SIZES:
        of_kinds = scores.accuracy[method]
        lines = {
            kind: (look, of_kinds.get(kind, {})) for kind, look in KIND_LOOKS.items()
        }
        by_kind.append((LABELS[method], lines))
        of_all = scores.mean(method, ALL, scores.n_genes)
        of_share = {f"{share:.0%} of it": share * of_all for share in SHARES}
        levels.append({"all genes": of_all} | of_share)
    size = _confused_at(answers)
    confusion = {
        f"{LABELS[m]}, {size} random genes": _confusion(task, answers, m)
        for m in (FEDERATED, LOGISTIC)
    }
    return {
        "panel-size": figures.accuracies(by_size),
        "confusion": figures.confusions(confusion, np.unique(task.truth), task.classes),
        "selection": figures.accuracies(by_kind, levels, ncols=6),
    }


def _confusion(task: Task, answers: Answers, method: str) -> NDArray[np.float64]:
    """Return the share of each true class that is given each class, shape (C, C).

    From the largest random panels of few genes, over all runs; a row without patients
    is 0.
    """
    at = method, RANDOM, _confused_at(answers)
    given = [
        each for key, several in answers.items() if key[:3] == at for each in several
    ]
    counts = confusion_matrix(
        np.tile(task.truth, len(given)),
        np.concatenate(given),
        labels=np.arange(len(task.classes)),
    )
    shares: NDArray[np.float64] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def _confused_at(answers: Answers) -> int:
    sizes = {size for _, kind, size, _ in answers if kind == RANDOM}
    return max(size for size in sizes if size <= FEW)
