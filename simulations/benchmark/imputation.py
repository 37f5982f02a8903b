"""How well missing expression is restored, and how well the model knows it.

    exams (unseen patients, other data) -> hidden cells -> each method restores them
    -> error by setting, institution and gene -> tables over the seeds

A setting is a pattern of missingness with its rate or panel, such as "mcar 0.5". Every
method gets the same cells. Each judgement is kept in a file. N patients, V genes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import norm
from torch import Tensor

from fedgex.common.harmonise import Patients
from fedgex.common.imputers import (
    Float,
    GaussianImputer,
    Imputer,
    MeanImputer,
    NearestNeighbours,
    fit_mixture,
    ppca,
)
from fedgex.common.metrics import restoration
from fedgex.common.model import select
from fedgex.common.start import LinearStart
from fedgex.common.statistics import CrossProducts
from fedgex.common.study import Study
from fedgex.common.tasks import Parameters
from fedgex.common.uncertainty import restore_with_spread
from fedgex.server import evaluation
from fedgex.simulations import comparisons, in_process
from fedgex.simulations.benchmark.exams import (
    BREAST,
    UNSEEN,
    Exam,
    other_data,
    unseen,
)
from fedgex.simulations.benchmark.ground import (
    ALONE_SITES,
    FEDERATED,
    POOLED,
    Ground,
    arms,
    models,
)
from fedgex.simulations.benchmark.outcome import Outcome, Section, plain
from fedgex.simulations.benchmark.tables import markdown, paired_p, spread
from fedgex.simulations.charts import COLOURS

QUICK_ALONE = 2
"""Sites that train alone with --quick."""

MEAN, KNN, GAUSSIAN, MIXTURE = "mean", "knn", "gaussian", "mixture"
PPCA_RANKS = (32, 128)
REFERENCES = (MEAN, KNN, *(f"ppca-{r}" for r in PPCA_RANKS), GAUSSIAN, MIXTURE)
LINEAR, ALONE, SPREAD = "linear start", "alone", "spread"
LABELS = {
    MEAN: "gene mean",
    KNN: "10 nearest neighbours",
    "ppca-32": "PPCA, rank 32",
    "ppca-128": "PPCA, rank 128",
    GAUSSIAN: "Gaussian conditional mean",
    MIXTURE: "mixture by cancer type",
    FEDERATED: "ours, federated",
    LINEAR: "ours, network switched off",
    POOLED: "ours, pooled",
    ALONE: f"ours, a site alone ({ALONE_SITES} largest)",
}
"""Methods as the reader knows them, in the order of the tables."""
PATTERNS: dict[str, str] = {
    "mcar": "missing completely at random",
    "panel": "only a panel's genes measured",
    "mnar": "low expression drops out",
}
BY_GENE = "mcar 0.5"
"""The setting that genes are compared at."""
LEVELS = tuple(k / 20 for k in range(1, 20))
"""Shares of the values that intervals are to hold."""
SHOWN_LEVELS = (0.5, 0.8, 0.95)

Judged = Mapping[str, Any]
"""What a file holds: exam, then setting, to numbers."""
Results = Mapping[str, Sequence[Judged]]
"""Method, then one a seed."""


class LinearImputer:
    """The linear start of a backbone without its network."""

    def __init__(self, linear: LinearStart, batch_size: int = 64) -> None:
        self.linear = linear
        self.batch_size = batch_size

    @torch.no_grad()
    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Fill the NaN cells of standardised values (N, V)."""
        filled = values.copy()
        every = torch.arange(values.shape[1])
        for start in range(0, len(values), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = torch.as_tensor(values[rows], dtype=torch.float32)
            missing = batch.isnan()
            genes, keep = select(~missing)
            given = batch.gather(1, genes).nan_to_num(0.0)
            known = self.linear(genes, given, keep)
            restored = self.linear.restore(known, every.expand(len(batch), -1))
            filled[rows][missing.numpy()] = restored[missing].numpy()
        return filled


def run(grounds: Callable[[int], Ground], console: Console) -> Outcome:
    """Judge every method on the scenario's hold-out and on other data."""
    ground = grounds(0)
    others, notes = other_data(ground)
    exams = [unseen(ground), *others]
    results = _results(ground, exams, console)
    first = results[FEDERATED][0][UNSEEN]
    comparison = {setting: _compared(results, setting) for setting in first}
    goals = _goals(comparison)
    sections = [
        Section(
            title="Error on unseen institutions",
            lines=_error_lines(ground, exams[0], results),
            figure="error",
        ),
        Section(
            title="Against the references", lines=_comparison_lines(ground, comparison)
        ),
        Section(title="Goals", lines=_goal_lines(goals)),
    ]
    numbers: dict[str, Any] = {
        "seeds": list(ground.seeds),
        "quick": ground.quick,
        "patients": {exam.name: len(exam.patients) for exam in exams},
        "mse": _mse_by_method(results, exams),
        "comparison": comparison,
        "goals": goals,
        "notes": notes,
    }
    figures = {"error": _draw_error(results)}
    if BY_GENE in first:
        numbers["genes"] = _by_gene(results)
        sections.append(
            Section(
                title="Gene by gene", lines=_gene_lines(numbers["genes"]), figure="gene"
            )
        )
        figures["gene"] = _draw_genes(results)
    if SPREAD in results:
        numbers["intervals"] = _intervals(results[SPREAD])
        sections.append(
            Section(
                title="How sure the model is",
                lines=_interval_lines(numbers["intervals"]),
                figure="reliability",
            )
        )
        figures["reliability"] = _draw_reliability(numbers["intervals"])
    sections.append(
        Section(
            title="Another layer and another platform",
            lines=_other_lines(results, others, notes),
        )
    )
    return Outcome(
        name="imputation", sections=sections, numbers=plain(numbers), figures=figures
    )


# ---- judging ----


@dataclass(frozen=True, kw_only=True)
class _Material:
    """What any method is made of and judged on."""

    study: Study
    exams: Sequence[Exam]
    pooled: Patients
    n_genes: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    method: str
    seed: int
    path: Path
    whole: Parameters | None = None
    """The model, if the method is one of ours."""


def _results(ground: Ground, exams: Sequence[Exam], console: Console) -> Results:
    """Return what was found of each method, one a seed, judged if it is not there."""
    folder = ground.folder / "imputation"
    folder.mkdir(exist_ok=True)
    seen = [ground.genes.hash, *(c.n_patients for c in ground.sites.values())]
    asked = [[e.name, len(e.patients), repr(e.rules)] for e in exams]
    digest = hashlib.sha256(json.dumps([seen, asked]).encode()).hexdigest()[:12]
    jobs: list[_Job] = []
    for seed in ground.seeds:
        jobs += [
            _Job(method=m, seed=seed, path=folder / f"{m}-{seed}-{digest}.json")
            for m in REFERENCES
        ]
        most = QUICK_ALONE if ground.quick else ALONE_SITES
        wanted = arms(ground, seed, most_alone=most)
        for arm, model in models(ground, wanted, console):
            methods = [arm.name]
            if arm.name == FEDERATED and arm.study.linear_rank:
                methods += [LINEAR, SPREAD]
            own = f"{seed}-{digest}-{_digest(model.parameters)}"
            jobs += [
                _Job(
                    method=method,
                    seed=seed,
                    path=folder / f"{method.replace(' ', '-')}-{own}.json",
                    whole=model.parameters,
                )
                for method in methods
            ]
    material = _Material(
        study=ground.study,
        exams=exams,
        pooled=ground.pooled,
        n_genes=len(ground.genes),
    )
    todo = [job for job in jobs if not job.path.exists()]
    done = in_process.each_done(partial(_work, material), todo, ground.workers)
    for count, (job, seconds) in enumerate(done, 1):
        console.print(
            f"judged {count} of {len(todo)}: {job.method}, seed {job.seed}, "
            f"{seconds:.0f} s",
            highlight=False,
        )
    results: dict[str, list[Judged]] = {}
    for seed in ground.seeds:
        of_seed = {job.method: _read(job.path) for job in jobs if job.seed == seed}
        alone = [v for name, v in of_seed.items() if name.startswith(f"{ALONE}-")]
        kept = {n: v for n, v in of_seed.items() if not n.startswith(f"{ALONE}-")}
        if alone:
            kept[ALONE] = _averaged(alone)
        for name, judged in kept.items():
            results.setdefault(name, []).append(judged)
    return results


def _read(path: Path) -> Judged:
    """Return what a file holds, settings by pattern and then by number."""

    def place(setting: str) -> tuple[int, float]:
        pattern, key = setting.split(" ")
        return list(PATTERNS).index(pattern), float(key)

    return {
        exam: {setting: judged[setting] for setting in sorted(judged, key=place)}
        for exam, judged in json.loads(path.read_text()).items()
    }


def _work(material: _Material, job: _Job) -> float:
    """Judge a method into its file; return the seconds that it took."""
    started = time.monotonic()
    if job.method == SPREAD:
        comparisons.cached(job.path, lambda: _judge_spread(material, job))
        return time.monotonic() - started
    imputer = _imputer(material, job)
    comparisons.cached(
        job.path, lambda: {e.name: judge(imputer, e, job.seed) for e in material.exams}
    )
    return time.monotonic() - started


def judge(imputer: Imputer, exam: Exam, seed: int) -> dict[str, Any]:
    """Return the error of an imputer at each setting of an exam.

    Returns
    -------
    dict
        By setting: mse; by_group, mean squared error of each group in order of name;
        at BY_GENE also gene_mse and gene_pearson, each of length V.
    """
    true = exam.patients.values.numpy()
    found: dict[str, Any] = {}
    for setting, hidden in exam.settings(seed):
        restored = imputer.impute(np.where(hidden, np.float32(np.nan), true))
        score = restoration(true, restored, hidden)
        square = np.where(hidden, restored - true, 0.0) ** 2
        rows = [exam.group == name for name in np.unique(exam.group)]
        found[setting] = {
            "mse": score.mse,
            "by_group": [
                float(square[r].sum() / hidden[r].sum())
                if hidden[r].any()
                else math.nan
                for r in rows
            ],
        }
        if setting == BY_GENE:
            found[setting]["gene_mse"] = score.gene_mse.tolist()
            found[setting]["gene_pearson"] = score.gene_pearson.tolist()
    return found


def _imputer(material: _Material, job: _Job) -> Imputer:
    if job.whole is not None:
        ours = evaluation.model_imputer(material.study, job.whole, material.n_genes)
        if job.method != LINEAR:
            return ours
        assert ours.backbone.encoder.linear is not None
        return LinearImputer(ours.backbone.encoder.linear)
    values = material.pooled.values.numpy()
    if job.method == MEAN:
        return MeanImputer()
    if job.method == KNN:
        return NearestNeighbours(values)
    if job.method == MIXTURE:
        typed = {
            i: t for i, t in enumerate(material.pooled.cancer_type) if t is not None
        }
        return fit_mixture(values[list(typed)], list(typed.values()))
    covariance = CrossProducts.of(values).covariance()
    if job.method == GAUSSIAN:
        return GaussianImputer(covariance)
    rank = int(job.method.removeprefix("ppca-"))
    return ppca(covariance, min(rank, material.n_genes - 1))


def _judge_spread(material: _Material, job: _Job) -> dict[str, Any]:
    """Return how often intervals hold the unseen values, and how wide they are."""
    assert job.whole is not None
    ours = evaluation.model_imputer(material.study, job.whole, material.n_genes)
    exam = material.exams[0]
    true = exam.patients.values
    found: dict[str, Any] = {}
    for setting, hidden in exam.settings(job.seed):
        gone = torch.from_numpy(hidden)
        mean, sd = restore_with_spread(
            ours.backbone, torch.where(gone, torch.nan, true)
        )
        found[setting] = coverage(true[gone], mean[gone], sd[gone])
    return {exam.name: found}


def coverage(true: Tensor, mean: Tensor, sd: Tensor) -> dict[str, Any]:
    """Return the share of values within central intervals of a Gaussian.

    Parameters
    ----------
    true, mean, sd
        Of each restored cell, shape (C,).

    Returns
    -------
    dict
        held, share of the values within the interval of each of LEVELS; width, of
        the 95 % interval in the mean, SD of the gene; square, mean squared error over
        its own variance.
    """
    z = ((true - mean) / sd).abs().numpy()
    half = norm.ppf(0.5 + np.array(LEVELS) / 2)
    return {
        "held": [float((z <= h).mean()) for h in half],
        "width": float(2 * norm.ppf(0.975) * sd.mean()),
        "square": float((z.astype(np.float64) ** 2).mean()),
    }


def _averaged(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return the mean over sites of their errors."""
    return {
        exam: {
            setting: {
                "mse": float(np.mean([one[exam][setting]["mse"] for one in judged])),
                "by_group": np.mean(
                    [one[exam][setting]["by_group"] for one in judged], axis=0
                ).tolist(),
            }
            for setting in settings
        }
        for exam, settings in judged[0].items()
    }


def _digest(whole: Parameters) -> str:
    total = hashlib.sha256()
    for name, array in sorted(whole.items()):
        total.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:12]


# ---- what came of it ----


def _mse(results: Results, method: str, exam: str, setting: str) -> list[float]:
    """Return the error of each seed."""
    return [one[exam][setting]["mse"] for one in results[method]]


def _mse_by_method(results: Results, exams: Sequence[Exam]) -> dict[str, Any]:
    return {
        exam.name: {
            method: {
                setting: _mse(results, method, exam.name, setting)
                for setting in results[method][0][exam.name]
            }
            for method in LABELS
            if method in results
        }
        for exam in exams
    }


def _compared(results: Results, setting: str) -> dict[str, Any]:
    """Return the federated error over that of others, one a seed, and paired p."""
    own = np.array(_mse(results, FEDERATED, UNSEEN, setting))
    means = {m: np.mean(_mse(results, m, UNSEEN, setting)) for m in REFERENCES}
    best = min(means, key=lambda m: means[m])
    ratio = {
        other: (own / _mse(results, other, UNSEEN, setting)).tolist()
        for other in (GAUSSIAN, MIXTURE, LINEAR, POOLED, ALONE)
        if other in results
    }
    by_group = {
        m: np.mean([one[UNSEEN][setting]["by_group"] for one in results[m]], axis=0)
        for m in (FEDERATED, GAUSSIAN, MIXTURE)
    }
    return {
        "ratio": ratio,
        "p": {
            m: paired_p(by_group[FEDERATED], by_group[m]) for m in (GAUSSIAN, MIXTURE)
        },
        "institutions": int(np.isfinite(by_group[FEDERATED]).sum()),
        "best_reference": best,
        "ratio_to_best": float(own.mean() / means[best]),
    }


def _goals(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with the worst setting that it speaks of."""
    mcar = [s for s in comparison if s.startswith("mcar ")]
    rest = [s for s in comparison if not s.startswith("mcar ")]
    asked: list[tuple[str, str, float, Sequence[str]]] = [
        ("never above the Gaussian", GAUSSIAN, 1.0, list(comparison)),
        ("7 % below the Gaussian at .5", GAUSSIAN, 0.93, ["mcar 0.5"]),
        ("16 % below the Gaussian at .9", GAUSSIAN, 0.84, ["mcar 0.9"]),
        ("16 % below the Gaussian at .95", GAUSSIAN, 0.84, ["mcar 0.95"]),
        ("below the mixture at every rate at random", MIXTURE, 1.0, mcar),
        ("below the mixture on panels and under dropout", MIXTURE, 1.0, rest),
    ]
    goals = []
    for goal, other, limit, settings in asked:
        ratios = {
            s: float(np.mean(comparison[s]["ratio"][other]))
            for s in settings
            if s in comparison
        }
        worst = max(ratios, key=lambda s: ratios[s]) if ratios else None
        found = math.nan if worst is None else ratios[worst]
        goals.append(
            {
                "goal": goal,
                "limit": limit,
                "worst": worst,
                "found": found,
                "met": None if worst is None else bool(_below(found, limit, other)),
            }
        )
    return goals


def _below(found: float, limit: float, other: str) -> bool:
    """Return whether a ratio meets its goal; the mixture has to be beaten."""
    return found < limit if other == MIXTURE else found <= limit


def _by_gene(results: Results) -> dict[str, dict[str, list[float]]]:
    """Return, by method and one a seed, how many genes are restored how well."""
    found: dict[str, dict[str, list[float]]] = {}
    for method in LABELS:
        if method not in results or method == ALONE:
            continue
        rows: dict[str, list[float]] = {}
        for one, other in zip(results[method], results[GAUSSIAN], strict=True):
            r = np.array(one[UNSEEN][BY_GENE]["gene_pearson"], dtype=float)
            own = np.array(one[UNSEEN][BY_GENE]["gene_mse"], dtype=float)
            gaussian = np.array(other[UNSEEN][BY_GENE]["gene_mse"], dtype=float)
            counts = {
                "genes": np.isfinite(own).sum(),
                "r above 0": (r > 0).sum(),
                "r above .5": (r > 0.5).sum(),
                "below the Gaussian's error": (own < gaussian).sum(),
            }
            for name, count in counts.items():
                rows.setdefault(name, []).append(float(count))
        found[method] = rows
    return found


def _intervals(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return, by setting and one a seed, coverage at each level, width and square."""
    return {
        setting: {
            "levels": list(LEVELS),
            **{
                key: [one[UNSEEN][setting][key] for one in judged]
                for key in ("held", "width", "square")
            },
        }
        for setting in judged[0][UNSEEN]
    }


# ---- the page ----


def _said(setting: str) -> str:
    """Return a setting's key as a heading: ".5", "100 genes"."""
    pattern, key = setting.split(" ")
    return f"{key} genes" if pattern == "panel" else key.removeprefix("0")


def _named(setting: str) -> str:
    pattern = setting.split(" ")[0]
    return f"{PATTERNS[pattern]}, {_said(setting)}"


def _seeds(ground: Ground) -> str:
    number = len(ground.seeds)
    return "one seed" if number == 1 else f"mean ± SD over {number} seeds"


def _error_lines(ground: Ground, exam: Exam, results: Results) -> list[str]:
    n_groups = len(np.unique(exam.group))
    lines = [
        f"Mean squared error over hidden cells of {len(exam.patients)} patients of "
        f"{n_groups} institutions that no method saw, each of {len(ground.genes)} "
        f"genes in SD of the training patients; {_seeds(ground)}, which draw the "
        "cells too. The references are computed from pooled rows.",
    ]
    settings = list(results[FEDERATED][0][exam.name])
    for pattern, title in PATTERNS.items():
        some = [s for s in settings if s.startswith(f"{pattern} ")]
        if not some:
            continue
        rows = {
            label: {_said(s): spread(_mse(results, method, exam.name, s)) for s in some}
            for method, label in LABELS.items()
            if method in results
        }
        lines += ["", *markdown(title.capitalize(), rows)]
    return lines


def _comparison_lines(ground: Ground, comparison: Mapping[str, Any]) -> list[str]:
    rows = {}
    for setting, found in comparison.items():
        row = {}
        for other, heading in (
            (GAUSSIAN, "over Gaussian"),
            (MIXTURE, "over mixture"),
            (LINEAR, "over its network switched off"),
            (POOLED, "over pooled"),
            (ALONE, "over site alone"),
        ):
            if other in found["ratio"]:
                row[heading] = spread(found["ratio"][other])
            if other in found["p"]:
                row[f"p, {LABELS[other].split()[0]}"] = _p(found["p"][other])
        best = LABELS[found["best_reference"]]
        row["over the best reference"] = f"{found['ratio_to_best']:.3f} ({best})"
        rows[_named(setting)] = row
    n_groups = next(iter(comparison.values()))["institutions"]
    return [
        "Error of the federated model over that of others, below 1 where it is better; "
        f"{_seeds(ground)}. p: Wilcoxon's signed-rank test, two-sided, over the mean "
        f"errors of the {n_groups} institutions.",
        "",
        *markdown("Setting", rows),
    ]


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "below .0001" if value < 1e-4 else f"{value:.2g}"


def _goal_lines(goals: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = {
        goal["goal"]: {
            "ratio asked": f"{goal['limit']:.2f}",
            "found": "not judged" if goal["worst"] is None else f"{goal['found']:.3f}",
            "worst at": "-" if goal["worst"] is None else _named(goal["worst"]),
            "met": {None: "-", True: "yes", False: "no"}[goal["met"]],
        }
        for goal in goals
    }
    return [
        "Ratio of the federated model's error, mean over the seeds, at the worst "
        "setting that a goal speaks of.",
        "",
        *markdown("Goal", rows),
    ]


def _gene_lines(genes: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    rows = {
        LABELS[method]: {name: spread(counts, 0) for name, counts in found.items()}
        for method, found in genes.items()
    }
    return [
        "How many genes each method restores at a rate of .5 completely at random, by "
        "Pearson's r over the gene's hidden cells, and for how many its error is below "
        "the Gaussian's.",
        "",
        *markdown("Method", rows),
    ]


def _interval_lines(intervals: Mapping[str, Any]) -> list[str]:
    rows = {}
    for setting, found in intervals.items():
        held = np.array(found["held"])
        row = {
            f"{level:.0%}": spread(held[:, LEVELS.index(level)].tolist())
            for level in SHOWN_LEVELS
        }
        row["width of 95 %"] = spread(found["width"], 2)
        row["squared error over variance"] = spread(found["square"], 2)
        rows[_named(setting)] = row
    return [
        "Share of the true values within the central intervals of the federated model: "
        "the restored value and a Gaussian with the standard deviation that the linear "
        "start predicts for each cell. Width in SD of the gene. That low expression "
        "drops out is not what the intervals assume.",
        "",
        *markdown("Setting", rows),
    ]


def _other_lines(
    results: Results, others: Sequence[Exam], notes: Sequence[str]
) -> list[str]:
    lines = [
        "Cells missing completely at random in patients of other data, in SD of the "
        "training patients' genes. Paired: RSEM, converted from log2(x + .25); nobody "
        "in it trains. GSE1992: log ratios of a microarray, which `predict` refuses "
        "since they have no level: here each gene is given the mean and SD of the "
        f"sites' {BREAST} patients, from whole genes and alike for all methods.",
        "",
    ]
    if others:
        rows = {
            label: {
                f"{exam.name} ({len(exam.patients)}), {_said(setting)}": spread(
                    _mse(results, method, exam.name, setting)
                )
                for exam in others
                for setting in results[method][0][exam.name]
            }
            for method, label in LABELS.items()
            if method in results
        }
        lines += [*markdown("Method", rows), ""]
    return [*lines, *(f"Skipped: {note}." for note in notes)]


# ---- figures ----

_LINES = {
    KNN: ("orange", "^", ":"),
    "ppca-128": ("green", "D", ":"),
    GAUSSIAN: ("vermillion", "v", "-"),
    MIXTURE: ("purple", "P", "-"),
    ALONE: ("grey", "s", "--"),
    LINEAR: ("blue", "x", ":"),
    POOLED: ("ink", "s", "--"),
    FEDERATED: ("blue", "o", "-"),
}
"""Colour, marker and line of each method."""


def _draw_error(results: Results) -> Figure:
    """Draw error against rate, and over the Gaussian's at every setting."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = list(results[FEDERATED][0][UNSEEN])
    at_random = [s for s in settings if s.startswith("mcar ")]
    for method, (colour, marker, line) in _LINES.items():
        if method not in results:
            continue
        style = {
            "color": COLOURS[colour],
            "marker": marker,
            "linestyle": line,
            "label": LABELS[method],
        }
        rates = [float(s.split(" ")[1]) for s in at_random]
        left.plot(
            rates,
            [np.mean(_mse(results, method, UNSEEN, s)) for s in at_random],
            **style,
        )
        ratios = [
            np.mean(_mse(results, method, UNSEEN, s))
            / np.mean(_mse(results, GAUSSIAN, UNSEEN, s))
            for s in settings
        ]
        right.plot(range(len(settings)), ratios, **style | {"linestyle": "none"})
    left.set(
        xlabel="share of cells missing completely at random",
        ylabel="mean squared error",
    )
    right.axhline(1, color=COLOURS["rule"], zorder=0)
    right.set_xticks(
        range(len(settings)), settings, rotation=60, ha="right", fontsize=8
    )
    right.set(
        ylabel="error over the Gaussian's", ylim=(None, min(2, right.get_ylim()[1]))
    )
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    return figure


def _draw_genes(results: Results) -> Figure:
    """Draw each gene's error by the federated model against the Gaussian's, and r."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    error, r = figure.subplots(1, 2)
    for axes, key, name in (
        (error, "gene_mse", "mean squared error"),
        (r, "gene_pearson", "Pearson's r"),
    ):
        ours, gaussian = (
            np.mean(
                np.array([one[UNSEEN][BY_GENE][key] for one in results[m]], float),
                axis=0,
            )
            for m in (FEDERATED, GAUSSIAN)
        )
        axes.scatter(
            gaussian, ours, s=7, alpha=0.5, color=COLOURS["blue"], linewidths=0
        )
        ends = [
            float(np.nanmin([gaussian, ours])),
            float(np.nanmax([gaussian, ours])),
        ]
        axes.plot(ends, ends, color=COLOURS["grey"], linewidth=1)
        axes.set(
            xlabel=f"{name}, Gaussian",
            ylabel=f"{name}, federated model",
            aspect="equal",
        )
    return figure


def _draw_reliability(intervals: Mapping[str, Any]) -> Figure:
    """Draw the share of values that an interval holds against what it should."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    grid = figure.subplots(1, 3, sharey=True)
    for axes, (pattern, title) in zip(grid, PATTERNS.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=COLOURS["grey"], linewidth=1)
        for setting, found in intervals.items():
            if setting.startswith(f"{pattern} "):
                held = np.mean(found["held"], axis=0)
                axes.plot(LEVELS, held, marker=".", linewidth=1, label=_said(setting))
        axes.set(xlabel="share that an interval should hold", aspect="equal")
        axes.set_title(title, fontsize="medium")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    grid[0].set_ylabel("share that it holds")
    return figure
