"""Which cancer it is, from few genes: every method on the same panels and patients.

    split -> panels: drawn at random, or chosen -> the type that each method says of
    each unseen patient, kept in files -> accuracy and macro-F1 against number of genes

Panels are chosen from the sites' sums (common/panel_selection.py) or, to compare, from
pooled rows. N unseen patients, V genes, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray
from rich.console import Console
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_selection import f_classif

from fedgex.common import panel_selection, predictions, tasks
from fedgex.common.errors import ConfigError
from fedgex.common.harmonise import Patients
from fedgex.common.panel_selection import Types
from fedgex.common.phases import take_part
from fedgex.common.seeds import derive
from fedgex.common.statistics import by_type, pool_types
from fedgex.common.study import CLASSIFICATION
from fedgex.server.evaluation import class_scores
from fedgex.simulations import charts, in_process, references
from fedgex.simulations.benchmark.ground import (
    ALONE_SITES,
    FEDERATED,
    POOLED,
    Arm,
    Ground,
    Model,
    arms,
    models,
)
from fedgex.simulations.benchmark.outcome import Outcome, Section
from fedgex.simulations.benchmark.tables import markdown, paired_p, spread
from fedgex.simulations.comparisons import cached

SIZES = (8, 16, 32, 64, 128, 256)
"""Genes of the panels that every method is judged on."""
BETWEEN = (4, 6, 12, 24, 48, 96, 192)
"""Further sizes of chosen panels, to find the smallest that is enough."""
DRAWS = 3
"""Random panels of each size, for each seed."""
FEW = 32
"""Genes up to which the model is to be better than simple methods."""
SHARES = (0.95, 0.99)
"""Of the accuracy from all genes: what a panel has to reach."""
FOLDS = 5
"""Groups of sites on which panels are judged that the others' sums chose."""
QUICK_SIZES = (8, 32)
BOOSTING = {"max_iter": 200, "max_leaf_nodes": 8, "max_features": 0.3}
"""Of gradient boosting; everything else as scikit-learn has it, without early stopping.
Best of five on the validation institutions in the mean over 8, 32 and 128 random genes;
with 100 iterations, 31 leaves, all features or twice the learning rate it lost 0.001 to
0.006 in accuracy."""

ALONE, MIXTURE = "alone", "mixture"
DISCRIMINANT, LOGISTIC, BOOSTED = "discriminant", "logistic", "boosting"
LABELS = {
    FEDERATED: "federated model",
    POOLED: "pooled data",
    ALONE: f"a hospital alone ({ALONE_SITES} largest)",
    MIXTURE: "linear start alone",
    DISCRIMINANT: "linear discriminant",
    LOGISTIC: "logistic regression",
    BOOSTED: "gradient boosting",
}
"""Methods as the reader knows them, in the order of tables."""
LOOKS = {
    FEDERATED: ("blue", "o"),
    POOLED: ("ink", "s"),
    ALONE: ("orange", "^"),
    MIXTURE: ("purple", "P"),
    DISCRIMINANT: ("grey", "X"),
    LOGISTIC: ("vermillion", "v"),
    BOOSTED: ("green", "D"),
}
SIMPLE = (LOGISTIC, BOOSTED)
"""What the model is to be better than."""
AT_ALL_SIZES = (FEDERATED, LOGISTIC)
"""Judged on the sizes between as well."""

RANDOM, SELECTED, BY_F, ALL = "random", "selected", "by F", "all"

Indices = NDArray[np.intp]
"""Positions of genes in the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Genes that a method may see."""

    kind: str
    """How they came together: RANDOM, SELECTED, BY_F or ALL."""
    draw: str
    """Names the random draw; "" for the others."""
    genes: tuple[int, ...]
    """Positions in the vocabulary, rising."""

    @property
    def name(self) -> str:
        """One of its own among all panels."""
        return f"{self.kind} {self.draw} {len(self.genes)}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Patients to learn from, and to tell."""

    classes: tuple[str, ...]
    train: NDArray[np.float32]
    """Standardised rows of all sites, shape (M, V)."""
    labels: NDArray[np.int64]
    """Their classes, shape (M,)."""
    unseen: Patients
    """N of them, each of a class."""
    truth: NDArray[np.int64]
    """Their classes, shape (N,)."""
    institution: NDArray[np.str_]
    """Of each, shape (N,)."""
    types: Types
    """What the sites' sums say of the classes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A method to judge on panels."""

    method: str
    run: str
    """Names what scores are spread over: the seed, the draw."""
    panels: tuple[Panel, ...]
    model: Model | None
    """None for methods that train on the panel's genes."""
    path: Path
    """Of the answers."""


Answers = dict[tuple[str, str, int, str], list[NDArray[np.int64]]]
"""Classes that were said, each (N,), by method, kind of panel, size and run; several
where the method is a mean over models."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a method did on panels of one kind and size, a number a run."""

    accuracy: tuple[float, ...]
    macro_f1: tuple[float, ...]
    at: NDArray[np.float64]
    """Accuracy at each institution, mean over the runs."""


Scores = dict[str, dict[str, dict[int, Score]]]
"""Method, kind of panel, size."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Genes in the order in which each rule chose them, and how many are enough."""

    selected: tuple[int, ...]
    """From the sites' sums."""
    by_f: tuple[int, ...]
    """From pooled rows."""
    bound: tuple[float, ...]
    """On the error with each gene of `selected` and all before."""
    right: Mapping[int, float]
    """Share of the sites' own patients told right, by size, each by panels that were
    chosen without their site."""


def run(grounds: Callable[[int], Ground], console: Console) -> Outcome:
    """Compare accuracy from panels of 8 to all genes, on unseen institutions.

    Raises
    ------
    ConfigError
        If the study does not learn cancer types.
    """
    ground = grounds(0)
    if CLASSIFICATION not in ground.study.phases:
        raise ConfigError(
            f'the study "{ground.study.name}" has no classification; expected one that '
            "learns cancer types, such as that of the scenario release."
        )
    folder = ground.folder / CLASSIFICATION
    folder.mkdir(exist_ok=True)
    task = _task(ground)
    chosen = _chosen(ground, task, folder)
    answers = _answers(ground, task, chosen, folder, console)
    scores = _scores(task, answers)
    return Outcome(
        name=CLASSIFICATION,
        sections=_sections(ground, task, chosen, scores),
        numbers=_numbers(ground, task, chosen, scores, answers),
        figures={
            "panel-size": _draw_sizes(scores),
            "confusion": _draw_confusion(task, answers),
            "selection": _draw_selection(scores),
        },
    )


def _task(ground: Ground) -> Task:
    classes = ground.study.classification.classes
    labels, train = ground.pooled.type_index(classes).numpy(), ground.pooled.values
    unseen = ground.patients(ground.unseen)
    truth = unseen.type_index(classes)
    known = (truth >= 0).nonzero().squeeze(1)
    return Task(
        classes=classes,
        train=train.numpy()[labels >= 0],
        labels=labels[labels >= 0],
        unseen=unseen.take(known),
        truth=truth[known].numpy(),
        institution=ground.institution[known.numpy()],
        types=_types(ground, [*ground.sites]),
    )


# ---- panels ----


def _types(ground: Ground, sites: Sequence[str]) -> Types:
    """Return what the sums of some sites say of the classes."""
    classes, floor = ground.study.classification.classes, ground.study.minimum_cohort

    def sums() -> Iterator[Any]:
        for name in sites:
            patients = ground.patients(ground.sites[name])
            values = patients.values.numpy()
            yield by_type(values, patients.cancer_type, classes, floor)

    return Types.of(pool_types(sums()), classes)


def _sizes(ground: Ground) -> list[int]:
    sizes = QUICK_SIZES if ground.quick else SIZES
    return [size for size in sizes if size < len(ground.genes)]


def _chosen(ground: Ground, task: Task, folder: Path) -> Chosen:
    """Choose genes from sums, and from rows; count what the sites' own patients say."""
    between = () if ground.quick else BETWEEN
    largest = int(task.types.known.sum())
    sizes = sorted(s for s in {*_sizes(ground), *between} if s <= largest)
    key = _digest(task.train, task.labels, str(ground.study.minimum_cohort), str(sizes))

    def compute() -> dict[str, Any]:
        selection = panel_selection.select(task.types, sizes[-1])
        rows = np.nan_to_num(task.train)
        varies = np.flatnonzero(rows.std(axis=0) > 0)
        f, _ = f_classif(rows[:, varies], task.labels)
        right = _right_elsewhere(ground, sizes)
        return {
            "selected": selection.genes.tolist(),
            "by_f": varies[np.argsort(-f, kind="stable")][: sizes[-1]].tolist(),
            "bound": selection.bound.tolist(),
            "right": {str(size): share for size, share in right.items()},
        }

    found = cached(folder / f"panels-{key}.json", compute)
    return Chosen(
        selected=tuple(found["selected"]),
        by_f=tuple(found["by_f"]),
        bound=tuple(found["bound"]),
        right={size: found["right"][str(size)] for size in [*sizes, len(ground.genes)]},
    )


def _right_elsewhere(ground: Ground, sizes: Sequence[int]) -> dict[int, float]:
    """Return the share of the sites' patients that others' panels tell right, by size.

    Each fold of sites is told by genes and discriminant from the sums of all others. A
    patient of a type that these do not tell of does not count: no panel could help.
    Only counts leave a site, and none from a site below the minimum cohort.
    """
    study, names = ground.study, sorted(ground.sites)
    everything = len(ground.genes)
    right = dict.fromkeys([*sizes, everything], 0)
    n_patients = 0
    for fold in range(min(FOLDS, len(names))):
        own = names[fold::FOLDS]
        types = _types(ground, [name for name in names if name not in own])
        order = panel_selection.select(types, sizes[-1]).genes
        panels = {size: order[:size] for size in sizes}
        panels[everything] = np.flatnonzero(types.known)
        for name in own:
            patients = ground.patients(ground.sites[name])
            told_of = patients.type_index(types.names) >= 0
            patients = patients.take(told_of.nonzero().squeeze(1))
            if len(patients) < study.minimum_cohort:
                continue
            n_patients += len(patients)
            values, truth = patients.values.numpy(), patients.cancer_type
            for size, panel in panels.items():
                right[size] += panel_selection.n_right(types, panel, values, truth)
    return {size: count / max(n_patients, 1) for size, count in right.items()}


def _drawn(ground: Ground, seed: int) -> Iterator[tuple[Panel, ...]]:
    """Yield the random panels of each draw of a seed, one of each size."""
    names = ground.genes.genes
    at = {gene: i for i, gene in enumerate(names)}
    for draw in range(1 if ground.quick else DRAWS):
        panels = references.panels(names, _sizes(ground), derive(seed, "panel", draw))
        yield tuple(
            Panel(
                kind=RANDOM,
                draw=f"{seed}-{draw}",
                genes=tuple(sorted(at[gene] for gene in genes)),
            )
            for genes in panels.values()
        )


def _fixed(ground: Ground, chosen: Chosen) -> tuple[Panel, ...]:
    """Return the panels that no seed has a part in: chosen ones, and all genes."""
    kinds = {SELECTED: chosen.selected, BY_F: chosen.by_f}
    panels = [
        Panel(kind=kind, draw="", genes=tuple(sorted(order[:size])))
        for kind, order in kinds.items()
        for size in chosen.right
        if size < len(ground.genes)
    ]
    everything = tuple(range(len(ground.genes)))
    return (*panels, Panel(kind=ALL, draw="", genes=everything))


def _of_method(
    ground: Ground, method: str, panels: Sequence[Panel]
) -> tuple[Panel, ...]:
    """Return the panels that a method is judged on."""
    if method in AT_ALL_SIZES:
        return tuple(panels)
    sizes = {*_sizes(ground), len(ground.genes)}
    return tuple(panel for panel in panels if len(panel.genes) in sizes)


# ---- answers ----


def _answers(
    ground: Ground, task: Task, chosen: Chosen, folder: Path, console: Console
) -> Answers:
    """Ask every method, or read what it said before."""
    fixed = _fixed(ground, chosen)
    answers: Answers = {}
    _ask([*_references(ground, task, "", fixed, folder)], ground, task, answers)
    for seed in ground.seeds:
        drawn = [*_drawn(ground, seed)]
        jobs = [
            job
            for panels in drawn
            for job in _references(ground, task, panels[0].draw, panels, folder)
        ]
        panels = (*fixed, *(panel for panels in drawn for panel in panels))
        jobs += _of_models(ground, task, seed, panels, folder, console)
        _ask(jobs, ground, task, answers)
        console.print(f"judged seed {seed}", highlight=False)
    return answers


def _references(
    ground: Ground, task: Task, run: str, panels: Sequence[Panel], folder: Path
) -> Iterator[Job]:
    """Yield the methods that are trained on each panel."""
    for method in (DISCRIMINANT, *SIMPLE):
        own = _of_method(ground, method, panels)
        settings = json.dumps(BOOSTING) if method == BOOSTED else ""
        key = _digest(task.train, task.labels, task.unseen.values.numpy(), settings)
        yield Job(
            method=method,
            run=run,
            panels=own,
            model=None,
            path=folder / f"{method}-{_digest(key, repr(own))}.json",
        )


def _of_models(
    ground: Ground,
    task: Task,
    seed: int,
    panels: Sequence[Panel],
    folder: Path,
    console: Console,
) -> Iterator[Job]:
    """Yield the models of a seed, each of which can read any panel."""
    kinds = (FEDERATED, POOLED) if ground.quick else (FEDERATED, POOLED, ALONE)
    able = [
        arm
        for arm in arms(ground, seed, kinds)
        if arm.name in (FEDERATED, POOLED) or _n_types(ground, arm) > 1
    ]
    for arm, model in models(ground, able, console):
        alone = arm.name not in (FEDERATED, POOLED)
        methods = [ALONE if alone else arm.name]
        if arm.name == FEDERATED and len(model.study.linear_types) > 1:
            methods.append(MIXTURE)
        trained = [model.parameters[name] for name in sorted(model.parameters)]
        for method in methods:
            own = _of_method(ground, method, panels)
            key = _digest(*trained, task.unseen.values.numpy(), method, repr(own))
            yield Job(
                method=method,
                run=str(seed),
                panels=own,
                model=model,
                path=folder / f"{arm.name}-{key}.json",
            )


def _n_types(ground: Ground, arm: Arm) -> int:
    """Count the classes that an arm's sites have patients of."""
    return len(
        {
            name
            for cohort in arm.sites.values()
            for name in take_part(
                ground.study, CLASSIFICATION, ground.patients(cohort)
            ).cancer_type
        }
    )


def _ask(jobs: Sequence[Job], ground: Ground, task: Task, answers: Answers) -> None:
    """Add what each job's method says, asked only if its file is not there yet."""
    todo = [job for job in jobs if not job.path.exists()]
    for _ in in_process.each_done(partial(_answer, task), todo, ground.workers):
        pass
    for job in jobs:
        found = json.loads(job.path.read_text())
        for panel in job.panels:
            key = (job.method, panel.kind, len(panel.genes), panel.draw or job.run)
            answers.setdefault(key, []).append(np.array(found[panel.name]))


def _answer(task: Task, job: Job) -> None:
    """Keep what a job's method says of the unseen patients, panel by panel."""

    def compute() -> dict[str, list[int]]:
        say = _method(task, job)
        return {p.name: say(np.array(p.genes)).tolist() for p in job.panels}

    cached(job.path, compute)


def _method(task: Task, job: Job) -> Callable[[Indices], NDArray[np.int64]]:
    """Return what maps genes to the class of each unseen patient, shape (N,)."""
    if job.model is not None:
        read = _by_mixture if job.method == MIXTURE else _by_model
        return read(task, job.model)
    return {DISCRIMINANT: _discriminant, LOGISTIC: _logistic, BOOSTED: _boosting}[
        job.method
    ](task)


def _discriminant(task: Task) -> Callable[[Indices], NDArray[np.int64]]:
    at = np.array([task.classes.index(name) for name in task.types.names])
    unseen = task.unseen.values.numpy()
    return lambda seen: at[panel_selection.told(task.types, seen, unseen)]


def _logistic(task: Task) -> Callable[[Indices], NDArray[np.int64]]:
    unseen = task.unseen.values.numpy()
    return lambda seen: references.logistic(
        task.train[:, seen], task.labels, unseen[:, seen]
    )


def _boosting(task: Task) -> Callable[[Indices], NDArray[np.int64]]:
    def said(seen: Indices) -> NDArray[np.int64]:
        trees = HistGradientBoostingClassifier(
            random_state=0, early_stopping=False, **BOOSTING
        )
        trees.fit(task.train[:, seen], task.labels)
        predicted: NDArray[np.int64] = trees.predict(task.unseen.values[:, seen])
        return predicted

    return said


def _by_model(task: Task, model: Model) -> Callable[[Indices], NDArray[np.int64]]:
    n_genes = task.unseen.values.shape[1]
    classifier = tasks.load_classifier(model.study, n_genes, model.parameters)

    def said(seen: Indices) -> NDArray[np.int64]:
        hidden = torch.ones(n_genes, dtype=torch.bool)
        hidden[seen] = False
        values = task.unseen.values.masked_fill(hidden, torch.nan)
        patients = dataclasses.replace(task.unseen, values=values)
        probabilities = predictions.class_probabilities(classifier, patients)
        told: NDArray[np.int64] = probabilities.argmax(dim=1).numpy()
        return told

    return said


def _by_mixture(task: Task, model: Model) -> Callable[[Indices], NDArray[np.int64]]:
    """Say the type that the linear start alone finds likeliest; -1 is no class."""
    study, n_genes = model.study, task.unseen.values.shape[1]
    backbone = tasks.load_backbone(study, n_genes, model.parameters)
    linear = backbone.encoder.linear
    assert linear is not None
    at = np.array(
        [
            task.classes.index(name) if name in task.classes else -1
            for name in study.linear_types
        ]
    )

    def said(seen: Indices) -> NDArray[np.int64]:
        found = []
        for batch in task.unseen.values[:, seen].split(64):
            genes = torch.from_numpy(seen).expand(len(batch), -1)
            keep = ~batch.isnan()
            evidence = linear.evidence(genes, batch.nan_to_num(0.0), keep)
            found.append(evidence.argmax(dim=1))
        told: NDArray[np.int64] = at[torch.cat(found).numpy()]
        return told

    return said


def _digest(*parts: NDArray[Any] | str) -> str:
    """Return what names a file by what it was computed from."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part.tobytes())
    return found.hexdigest()[:16]


# ---- scores ----


def _scores(task: Task, answers: Answers) -> Scores:
    """Judge all answers: a number a run, the mean over the models of the run."""
    places = np.unique(task.institution)
    found: dict[tuple[str, str, int], list[NDArray[np.float64]]] = {}
    for (method, kind, size, _), said in sorted(
        answers.items(), key=lambda item: item[0]
    ):
        judged = [
            [
                *class_scores(task.truth, each),
                *(
                    (each == task.truth)[task.institution == place].mean()
                    for place in places
                ),
            ]
            for each in said
        ]
        found.setdefault((method, kind, size), []).append(np.mean(judged, axis=0))
    scores: Scores = {method: {} for method in LABELS}
    for (method, kind, size), runs in found.items():
        table = np.array(runs)
        scores[method].setdefault(kind, {})[size] = Score(
            accuracy=tuple(table[:, 0].tolist()),
            macro_f1=tuple(table[:, 1].tolist()),
            at=table[:, 2:].mean(axis=0),
        )
    return {method: of for method, of in scores.items() if of}


def _mean(scores: Scores, method: str, kind: str, size: int) -> float:
    return float(np.mean(scores[method][kind][size].accuracy))


def _everything(scores: Scores) -> int:
    """Return how many genes there are."""
    return next(iter(scores[FEDERATED][ALL]))


def _smallest(scores: Scores, method: str, kind: str, share: float) -> int | None:
    """Return the fewest genes from which a method is as accurate as it has to be."""
    everything = _everything(scores)
    wanted = share * _mean(scores, method, ALL, everything)
    able = [
        size
        for size in scores[method].get(kind, {})
        if _mean(scores, method, kind, size) >= wanted
    ]
    return min(able, default=None)


def _against(scores: Scores, kind: str, size: int) -> dict[str, dict[str, float]]:
    """Compare the federated model with each simple method."""
    own = scores[FEDERATED][kind][size]
    return {
        method: {
            "difference": float(np.mean(own.accuracy))
            - _mean(scores, method, kind, size),
            "p": paired_p(own.at, scores[method][kind][size].at),
        }
        for method in (*SIMPLE, DISCRIMINANT, MIXTURE)
        if size in scores.get(method, {}).get(kind, {})
    }


# ---- the page ----


def _sections(
    ground: Ground, task: Task, chosen: Chosen, scores: Scores
) -> list[Section]:
    n_seeds, n_draws = len(ground.seeds), 1 if ground.quick else DRAWS
    said = (
        f"{len(task.truth)} patients of {len(np.unique(task.institution))} "
        f"institutions without a patient at any of the {len(ground.sites)} sites; "
        f"{len(task.classes)} cancer types. The model is trained once and then reads "
        "any panel; logistic regression, gradient boosting and the linear discriminant "
        "are trained anew for each panel, on pooled rows (the discriminant: on the "
        "sites' sums). A hospital alone is the mean over the hospitals with two cancer "
        "types or more, judged on all types."
    )
    boosting = ", ".join(f"{name} {value}" for name, value in BOOSTING.items())
    settings = (
        f"Gradient boosting: {boosting}; logistic regression: C "
        f"{references.LOGISTIC_C:g}; the same for all panels."
    )
    return [
        Section(
            title="Accuracy from random panels",
            lines=[
                said,
                "",
                f"Accuracy by number of genes: mean and SD over {n_seeds} seeds with "
                f"{n_draws} random panels of each size, the same for all methods.",
                "",
                *_table(scores, RANDOM, "accuracy"),
                "",
                settings,
            ],
            figure="panel-size",
        ),
        Section(
            title="Macro-F1 from random panels",
            lines=[
                "F1 averaged over the cancer types, of the same answers.",
                "",
                *_table(scores, RANDOM, "macro_f1"),
            ],
        ),
        Section(
            title="Accuracy and macro-F1 from selected panels",
            lines=[
                "Panels that were chosen from the sites' sums (below). What a seed has "
                "no part in, has no SD.",
                "",
                *_table(scores, SELECTED, "accuracy"),
                "",
                *_table(scores, SELECTED, "macro_f1"),
            ],
        ),
        Section(
            title=f"The federated model against simple methods, {FEW} genes and fewer",
            lines=[
                "Difference in accuracy, and p of Wilcoxon's test over institutions "
                "(accuracy at each, mean over seeds and panels).",
                "",
                *_comparison(scores),
                "",
                *_goal(scores),
            ],
            figure="confusion",
        ),
        Section(
            title="Panel selection",
            lines=_selection_lines(ground, chosen, scores),
            figure="selection",
        ),
    ]


def _table(scores: Scores, kind: str, measure: str) -> list[str]:
    """Return a row a method, a column a size, all genes last."""
    sizes, everything = [*scores[POOLED][kind]], _everything(scores)
    rows = {
        LABELS[method]: {
            str(size): spread(getattr(of[kind][size], measure)) for size in sizes
        }
        | {"all genes": spread(getattr(of[ALL][everything], measure))}
        for method, of in scores.items()
    }
    return markdown("genes", rows)


def _few(scores: Scores, kind: str) -> list[int]:
    return [size for size in scores[POOLED][kind] if size <= FEW]


def _comparison(scores: Scores) -> list[str]:
    rows = {
        f"{kind}, {size} genes": {
            LABELS[method]: f"{found['difference']:+.3f} ({_p(found['p'])})"
            for method, found in _against(scores, kind, size).items()
        }
        for kind in (RANDOM, SELECTED)
        for size in _few(scores, kind)
    }
    return markdown("panel", rows)


def _p(p: float) -> str:
    return charts.p_value(None if math.isnan(p) else p)


def _goal(scores: Scores) -> list[str]:
    """Say of each kind of panel whether the model is above all simple methods."""
    lines = []
    for kind in (RANDOM, SELECTED):
        below = [
            f"{LABELS[method]} at {size}"
            for size in _few(scores, kind)
            for method, found in _against(scores, kind, size).items()
            if method in SIMPLE and found["difference"] <= 0
        ]
        met = f"not met (not above {', '.join(below)})" if below else "met"
        lines.append(
            f"- Goal, above logistic regression and gradient boosting at {FEW} genes "
            f"and fewer, {kind} panels: {met}."
        )
    return lines


def _selection_lines(ground: Ground, chosen: Chosen, scores: Scores) -> list[str]:
    names, everything = ground.genes.genes, len(ground.genes)
    order = [names[i] for i in chosen.selected]
    lines = [
        "The server chooses genes one after the other from the sums that the sites "
        "sent for the linear start: each lowers the Bhattacharyya bound on the error "
        "most, given those before it. The sites then count how many of their own "
        "patients panels tell right that were chosen without them "
        f"({min(FOLDS, len(ground.sites))} groups of sites); the counts add up to the "
        "number of genes that is enough. No row leaves a site. By F: the largest F "
        "statistics of single genes, from pooled rows.",
        "",
        *markdown("accuracy", _by_kind(scores)),
        "",
        "Fewest genes for a share of the accuracy from all genes. Agreed: by the "
        "sites' counts, before any unseen patient was asked; then what the model makes "
        "of that panel. The others: by the unseen patients, among the sizes above.",
        "",
        *markdown("share", _fewest(chosen, scores)),
        "",
        "Share of their own patients that the sites tell right, by number of genes: "
        + ", ".join(f"{size}: {share:.3f}" for size, share in chosen.right.items())
        + f" (all {everything} genes last).",
        "",
    ]
    for share in SHARES:
        size = panel_selection.enough(chosen.right, share)
        panel = order if size > len(order) else order[:size]
        told = "all genes" if size > len(order) else ", ".join(panel)
        lines.append(f"- Agreed for {share:.0%}, {size} genes in order: {told}.")
    return lines


def _by_kind(scores: Scores) -> dict[str, dict[str, str]]:
    rows = {}
    for method in AT_ALL_SIZES:
        for kind in (SELECTED, BY_F, RANDOM):
            of_kind = scores[method].get(kind, {})
            rows[f"{LABELS[method]}, {kind}"] = {
                str(size): spread(of_kind[size].accuracy) if size in of_kind else "-"
                for size in scores[method][SELECTED]
            }
    return rows


def _fewest(chosen: Chosen, scores: Scores) -> dict[str, dict[str, str]]:
    everything = _everything(scores)
    rows = {}
    for share in SHARES:
        size = panel_selection.enough(chosen.right, share)
        kind = ALL if size == everything else SELECTED
        reached = _mean(scores, FEDERATED, kind, size) / _mean(
            scores, FEDERATED, ALL, everything
        )
        rows[f"{share:.0%}"] = {"agreed": f"{size} (reaches {reached:.1%})"} | {
            f"{LABELS[method]}, {kind}": str(
                _smallest(scores, method, kind, share) or "all"
            )
            for method in AT_ALL_SIZES
            for kind in (SELECTED, BY_F, RANDOM)
        }
    return rows


def _numbers(
    ground: Ground, task: Task, chosen: Chosen, scores: Scores, answers: Answers
) -> dict[str, Any]:
    names = ground.genes.genes
    places, counts = np.unique(task.institution, return_counts=True)
    few = {kind: _few(scores, kind) for kind in (RANDOM, SELECTED)}
    agreed = {
        f"{share:g}": panel_selection.enough(chosen.right, share) for share in SHARES
    }
    return {
        "seeds": list(ground.seeds),
        "classes": list(task.classes),
        "patients": len(task.truth),
        "institutions": {
            str(place): int(n) for place, n in zip(places, counts, strict=True)
        },
        "scores": {
            method: {
                kind: {
                    str(size): {
                        "accuracy": score.accuracy,
                        "macro_f1": score.macro_f1,
                        "at_institutions": score.at.tolist(),
                    }
                    for size, score in of_kind.items()
                }
                for kind, of_kind in of_method.items()
            }
            for method, of_method in scores.items()
        },
        "federated_against": {
            kind: {
                str(size): {
                    method: {
                        name: None if math.isnan(value) else value
                        for name, value in found.items()
                    }
                    for method, found in _against(scores, kind, size).items()
                }
                for size in few[kind]
            }
            for kind in few
        },
        "confusion": {
            method: _confusion(task, answers, method).tolist()
            for method in (FEDERATED, LOGISTIC)
        },
        "panel_selection": {
            "selected": [names[i] for i in chosen.selected],
            "bound": chosen.bound,
            "by_f": [names[i] for i in chosen.by_f],
            "share_right_at_sites": {str(n): s for n, s in chosen.right.items()},
            "agreed": agreed,
            "smallest_on_unseen": {
                f"{share:g}": {
                    method: {
                        kind: _smallest(scores, method, kind, share)
                        for kind in (SELECTED, BY_F, RANDOM)
                    }
                    for method in AT_ALL_SIZES
                }
                for share in SHARES
            },
        },
    }


# ---- figures ----


@mpl.rc_context(charts.STYLE)
def _draw_sizes(scores: Scores) -> Figure:
    """Draw accuracy against the number of genes, random and selected panels."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, kind in zip(axes, (RANDOM, SELECTED), strict=True):
        for method, (colour, marker) in LOOKS.items():
            if method in scores:
                sizes = [*scores[POOLED][kind], _everything(scores)]
                of_method = scores[method][kind] | scores[method][ALL]
                _line(ax, of_method, sizes, LABELS[method], colour, marker)
        _count_genes(ax, sizes)
        ax.set_title(f"{kind} panels")
    axes[0].set_ylabel("accuracy, unseen institutions")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


@mpl.rc_context(charts.STYLE)
def _draw_selection(scores: Scores) -> Figure:
    """Draw accuracy against the number of genes for each way to choose them."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    looks = {
        SELECTED: ("blue", "o"),
        BY_F: ("vermillion", "v"),
        RANDOM: ("grey", "s"),
    }
    everything = _everything(scores)
    for ax, method in zip(axes, AT_ALL_SIZES, strict=True):
        for kind, (colour, marker) in looks.items():
            of_kind = scores[method].get(kind, {})
            _line(ax, of_kind, sorted(of_kind), kind, colour, marker)
        whole = _mean(scores, method, ALL, everything)
        for share, style in zip((1.0, *SHARES), ("-", ":", "--"), strict=True):
            ax.axhline(
                share * whole,
                color=charts.COLOURS["muted"],
                linestyle=style,
                linewidth=0.8,
                label="all genes" if share == 1 else f"{share:.0%} of it",
            )
        _count_genes(ax, sorted(scores[method].get(SELECTED, {})))
        ax.set_title(LABELS[method])
    axes[0].set_ylabel("accuracy, unseen institutions")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def _line(
    ax: Axes,
    scores: Mapping[int, Score],
    sizes: Sequence[int],
    label: str,
    colour: str,
    marker: str,
) -> None:
    """Draw mean and SD of the accuracy."""
    runs = [scores[size].accuracy for size in sizes]
    ax.errorbar(
        list(sizes),
        [float(np.mean(each)) for each in runs],
        [float(np.std(each, ddof=1)) if len(each) > 1 else 0.0 for each in runs],
        marker=marker,
        color=charts.COLOURS[colour],
        elinewidth=0.8,
        label=label,
        zorder=3 if colour == "blue" else 2,
    )


def _count_genes(ax: Axes, sizes: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(list(sizes), [str(size) for size in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("genes measured")


@mpl.rc_context(charts.STYLE)
def _draw_confusion(task: Task, answers: Answers) -> Figure:
    """Draw what is taken for what from few random genes, by model and by logistic."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    present = np.unique(task.truth)
    for ax, method in zip(axes, (FEDERATED, LOGISTIC), strict=True):
        shares = _confusion(task, answers, method)[present]
        ax.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                ax.text(
                    column,
                    row,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    color="white" if share > 0.5 else charts.COLOURS["ink"],
                )
        ax.grid(visible=False)
        ax.set_xticks(range(len(task.classes)), task.classes, rotation=90)
        ax.set_yticks(range(len(present)), [task.classes[i] for i in present])
        ax.set_xlabel("said")
        ax.set_title(f"{LABELS[method]}, {_confused_at(answers)} random genes")
    axes[0].set_ylabel("true (% of its patients)")
    return figure


def _confusion(task: Task, answers: Answers, method: str) -> NDArray[np.float64]:
    """Return the share of each true class that is said to be each, shape (C, C).

    From the largest random panels of few genes, over all runs; a row without patients
    is 0.
    """
    size, C = _confused_at(answers), len(task.classes)
    counts = np.zeros((C, C))
    for (name, kind, n_genes, _), said in answers.items():
        if (name, kind, n_genes) == (method, RANDOM, size):
            for each in said:
                np.add.at(counts, (task.truth, each), 1)
    shares: NDArray[np.float64] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def _confused_at(answers: Answers) -> int:
    sizes = {size for _, kind, size, _ in answers if kind == RANDOM}
    return max(size for size in sizes if size <= FEW)
