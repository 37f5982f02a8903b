"""Gene panels, and the classes that every method predicts from them, cached.

Panels are drawn at random, or selected from the sites' sums or pooled rows. N unseen
patients, M training patients, V genes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_selection import f_classif

from fedgex.common.data.cross_products import by_type, pool_types
from fedgex.common.data.dataset import Patients
from fedgex.common.models import predict as predictions
from fedgex.common.models import tasks
from fedgex.common.models.losses import eligible
from fedgex.common.seeds import derive
from fedgex.common.study import CLASSIFICATION
from fedgex.simulations import resumable
from fedgex.simulations.analysis import panel_selection
from fedgex.simulations.analysis.panel_selection import Types
from fedgex.simulations.baselines import references
from fedgex.simulations.evaluation.arms import (
    FEDERATED,
    LOCAL,
    POOLED,
    Arm,
    Model,
    arms,
    models,
)
from fedgex.simulations.evaluation.protocol import Split

BOOSTING = {"max_iter": 200, "max_leaf_nodes": 8, "max_features": 0.3}
"""Of gradient boosting; everything else as scikit-learn has it, without early stopping.
Best of five on the validation institutions in the mean over 8, 32 and 128 random genes;
with 100 iterations, 31 leaves, all features or twice the learning rate it lost 0.001 to
0.006 in accuracy."""

MIXTURE = "mixture"
DISCRIMINANT, LOGISTIC, BOOSTED = "discriminant", "logistic", "boosting"
SIMPLE = (LOGISTIC, BOOSTED)
"""Methods that the model is to outperform."""
AT_ALL_SIZES = (FEDERATED, LOGISTIC)
"""Methods evaluated on the sizes between as well."""

Indices = NDArray[np.intp]
"""Positions of genes in the vocabulary."""
Classes = NDArray[np.int64]
"""Class of each unseen patient, shape (N,)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A method to evaluate on panels."""

    method: str
    run: str
    """Seed or draw of the scores."""
    panels: tuple[Panel, ...]
    model: Model | None = None
    """None for methods that train on the panel's genes."""


Answers = dict[tuple[str, str, int, str], list[Classes]]
"""Predicted classes, each (N,), by method, kind of panel, number of genes and run;
several where the method is a mean over models."""


def _of_method(split: Split, method: str, panels: Sequence[Panel]) -> tuple[Panel, ...]:
    """Return the panels on which a method is evaluated."""
    if method in AT_ALL_SIZES:
        return tuple(panels)
    sizes = {*sizes_of(split), len(split.genes)}
    return tuple(panel for panel in panels if len(panel.genes) in sizes)


def answers_of(split: Split, task: Task, chosen: Chosen, console: Console) -> Answers:
    """Return the classes that every method predicts."""
    same = fixed(split, chosen)
    jobs = _references(split, task, "", same)
    for seed in split.seeds:
        draws = [*drawn(split, seed)]
        for panels in draws:
            jobs |= _references(split, task, panels[0].draw, panels)
        panels = (*same, *(panel for panels in draws for panel in panels))
        jobs |= _of_models(split, task, seed, panels, console)
    resumable.compute_all(partial(_answer, task), jobs, split.workers)
    answers: Answers = {}
    for path, job in jobs.items():
        found = resumable.load(path)
        for panel in job.panels:
            key = (job.method, panel.kind, len(panel.genes), panel.draw or job.run)
            answers.setdefault(key, []).append(np.array(found[panel.name]))
    return answers


def _references(
    split: Split, task: Task, run: str, panels: Sequence[Panel]
) -> dict[Path, Job]:
    """Return the methods that are trained on each panel."""
    jobs = {}
    unseen = task.unseen.values.numpy()
    for method in (DISCRIMINANT, *SIMPLE):
        own = _of_method(split, method, panels)
        settings = json.dumps(BOOSTING) if method == BOOSTED else ""
        key = resumable.digest(task.train, task.labels, unseen, settings, repr(own))
        path = folder_of(split) / f"{method}-{key}.json"
        jobs[path] = Job(method=method, run=run, panels=own)
    return jobs


def _of_models(
    split: Split, task: Task, seed: int, panels: Sequence[Panel], console: Console
) -> dict[Path, Job]:
    """Return the models of a seed, each of which can read any panel."""
    kinds = (FEDERATED, POOLED) if split.quick else (FEDERATED, POOLED, LOCAL)
    able = [
        arm
        for arm in arms(split, seed, kinds)
        if arm.method != LOCAL or _n_types(split, arm) > 1
    ]
    jobs = {}
    unseen = task.unseen.values.numpy()
    for arm, model in models(split, able, console):
        methods = [arm.method]
        if arm.name == FEDERATED and len(model.study.linear_types) > 1:
            methods.append(MIXTURE)
        trained = [model.parameters[name] for name in sorted(model.parameters)]
        for method in methods:
            own = _of_method(split, method, panels)
            key = resumable.digest(*trained, unseen, method, repr(own))
            path = folder_of(split) / f"{arm.name}-{key}.json"
            jobs[path] = Job(method=method, run=str(seed), panels=own, model=model)
    return jobs


def _n_types(split: Split, arm: Arm) -> int:
    """Return the number of classes with patients at an arm's sites."""
    cohorts = map(split.patients, arm.sites.values())
    able = (eligible(split.study, CLASSIFICATION, each) for each in cohorts)
    return len({name for patients in able for name in patients.cancer_type})


def _answer(task: Task, job: Job) -> dict[str, list[int]]:
    """Return the classes that a job's method predicts, by name of the panel."""
    if job.model is not None:
        read = _by_mixture if job.method == MIXTURE else _by_model
        predict = read(task, job.model)
    else:
        predict = partial(_TRAINED[job.method], task)
    return {p.name: predict(np.array(p.genes)).tolist() for p in job.panels}


def _discriminant(task: Task, seen: Indices) -> Classes:
    at = np.array([task.classes.index(name) for name in task.types.names])
    unseen = task.unseen.values.numpy()
    return at[panel_selection.classify(task.types, seen, unseen)]


def _logistic(task: Task, seen: Indices) -> Classes:
    unseen = task.unseen.values.numpy()[:, seen]
    return references.logistic(task.train[:, seen], task.labels, unseen)


def _boosting(task: Task, seen: Indices) -> Classes:
    trees = HistGradientBoostingClassifier(
        random_state=0, early_stopping=False, **BOOSTING
    )
    trees.fit(task.train[:, seen], task.labels)
    predicted: Classes = trees.predict(task.unseen.values[:, seen])
    return predicted


_TRAINED = {DISCRIMINANT: _discriminant, LOGISTIC: _logistic, BOOSTED: _boosting}


def _by_model(task: Task, model: Model) -> Callable[[Indices], Classes]:
    n_genes = task.unseen.values.shape[1]
    classifier = tasks.load_classifier(model.study, n_genes, model.parameters)

    def predict(seen: Indices) -> Classes:
        hidden = torch.ones(n_genes, dtype=torch.bool)
        hidden[seen] = False
        patients = task.unseen.without(hidden)
        probabilities = predictions.class_probabilities(classifier, patients)
        classes: Classes = probabilities.argmax(dim=1).numpy()
        return classes

    return predict


def _by_mixture(task: Task, model: Model) -> Callable[[Indices], Classes]:
    """Predict the likeliest type by the linear start; -1 is no class."""
    study, n_genes = model.study, task.unseen.values.shape[1]
    linear = tasks.load_backbone(study, n_genes, model.parameters).encoder.linear
    assert linear is not None
    position = {name: i for i, name in enumerate(task.classes)}
    at = np.array([position.get(name, -1) for name in study.linear_types])

    def predict(seen: Indices) -> Classes:
        found = []
        for batch in task.unseen.values[:, seen].split(64):
            genes = torch.from_numpy(seen).expand(len(batch), -1)
            evidence = linear.evidence(genes, batch.nan_to_num(0.0), ~batch.isnan())
            found.append(evidence.argmax(dim=1))
        classes: Classes = at[torch.cat(found).numpy()]
        return classes

    return predict


SIZES = (8, 16, 32, 64, 128, 256)
"""Genes of the panels on which every method is evaluated."""
BETWEEN = (4, 6, 12, 24, 48, 96, 192)
"""Further sizes of chosen panels, to find the smallest that is enough."""
DRAWS = 3
"""Random panels of each size, for each seed."""
FOLDS = 5
"""Groups of sites, each with panels from the sums of the others."""
QUICK_SIZES = (8, 32)

RANDOM, SELECTED, BY_F, ALL = "random", "selected", "by F", "all"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Genes that a method may use."""

    kind: str
    """How they were chosen: RANDOM, SELECTED, BY_F or ALL."""
    draw: str
    """Names the random draw; "" for the others."""
    genes: tuple[int, ...]
    """Positions in the vocabulary, rising."""

    @property
    def name(self) -> str:
        """Name, unique among all panels."""
        return f"{self.kind} {self.draw} {len(self.genes)}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Training patients and unseen patients with known classes."""

    classes: tuple[str, ...]
    train: NDArray[np.float32]
    """Standardised rows of all sites, shape (M, V)."""
    labels: NDArray[np.int64]
    """Their classes, shape (M,)."""
    unseen: Patients
    """N patients of known class."""
    truth: NDArray[np.int64]
    """Their classes, shape (N,)."""
    institution: NDArray[np.str_]
    """Of each, shape (N,)."""
    types: Types
    """Statistics of the classes, from the sites' sums."""


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
    """Share of the sites' own patients classified correctly, by size, each by panels
    that were selected without their site."""


def task_of(split: Split) -> Task:
    """Return the patients of known class."""
    classes = split.study.classification.classes
    labels, train = split.pooled.type_index(classes).numpy(), split.pooled.values
    unseen = split.patients(split.unseen)
    truth = unseen.type_index(classes)
    known = (truth >= 0).nonzero().squeeze(1)
    return Task(
        classes=classes,
        train=train.numpy()[labels >= 0],
        labels=labels[labels >= 0],
        unseen=unseen.take(known),
        truth=truth[known].numpy(),
        institution=split.institution[known.numpy()],
        types=types_of(split, [*split.sites]),
    )


def types_of(split: Split, sites: Sequence[str]) -> Types:
    """Return the statistics of the classes from the sums of some sites."""
    classes, floor = split.study.classification.classes, split.study.minimum_cohort

    def sums() -> Iterator[Any]:
        for name in sites:
            patients = split.patients(split.sites[name])
            values = patients.values.numpy()
            yield by_type(values, patients.cancer_type, classes, floor)

    return Types.of(pool_types(sums()), classes)


def sizes_of(split: Split) -> list[int]:
    """Return the numbers of genes below all genes."""
    sizes = QUICK_SIZES if split.quick else SIZES
    return [size for size in sizes if size < len(split.genes)]


def choose(split: Split, task: Task) -> Chosen:
    """Select genes from sums, and from rows; count the sites' correct predictions."""
    between = () if split.quick else BETWEEN
    largest = int(task.types.known.sum())
    sizes = sorted(s for s in {*sizes_of(split), *between} if s <= largest)
    key = resumable.digest(
        task.train, task.labels, str(split.study.minimum_cohort), str(sizes)
    )

    def compute() -> dict[str, Any]:
        selection = panel_selection.select(task.types, sizes[-1])
        rows = np.nan_to_num(task.train)
        varies = np.flatnonzero(rows.std(axis=0) > 0)
        f, _ = f_classif(rows[:, varies], task.labels)
        return {
            "selected": selection.genes.tolist(),
            "by_f": varies[np.argsort(-f, kind="stable")][: sizes[-1]].tolist(),
            "bound": selection.bound.tolist(),
            "right": {str(k): share for k, share in share_right(split, sizes).items()},
        }

    found = resumable.cached(folder_of(split) / f"panels-{key}.json", compute)
    right = found["right"]
    return Chosen(
        selected=tuple(found["selected"]),
        by_f=tuple(found["by_f"]),
        bound=tuple(found["bound"]),
        right={size: right[str(size)] for size in [*sizes, len(split.genes)]},
    )


def share_right(split: Split, sizes: Sequence[int]) -> dict[int, float]:
    """Return the share of patients that other sites' panels classify right, by size.

    Genes and discriminant for each fold of sites come from the sums of all others.
    Patients of a type absent from these are left out: no panel could help. Only counts
    leave a site, and none from a site below the minimum cohort.
    """
    study, names = split.study, sorted(split.sites)
    everything = len(split.genes)
    right = dict.fromkeys([*sizes, everything], 0)
    n_patients = 0
    for fold in range(min(FOLDS, len(names))):
        own = names[fold::FOLDS]
        types = types_of(split, [name for name in names if name not in own])
        order = panel_selection.select(types, sizes[-1]).genes
        panels = {size: order[:size] for size in sizes}
        panels[everything] = np.flatnonzero(types.known)
        for name in own:
            patients = split.patients(split.sites[name])
            known = patients.type_index(types.names) >= 0
            patients = patients.take(known.nonzero().squeeze(1))
            if len(patients) < study.minimum_cohort:
                continue
            n_patients += len(patients)
            values, truth = patients.values.numpy(), patients.cancer_type
            for size, panel in panels.items():
                right[size] += panel_selection.n_right(types, panel, values, truth)
    return {size: count / max(n_patients, 1) for size, count in right.items()}


def drawn(split: Split, seed: int) -> Iterator[tuple[Panel, ...]]:
    """Yield the random panels of each draw of a seed, one of each size."""
    names = split.genes.genes
    for draw in range(1 if split.quick else DRAWS):
        panels = references.panels(names, sizes_of(split), derive(seed, "panel", draw))
        yield tuple(
            Panel(
                kind=RANDOM,
                draw=f"{seed}-{draw}",
                genes=tuple(sorted(map(names.index, genes))),
            )
            for genes in panels.values()
        )


def fixed(split: Split, chosen: Chosen) -> tuple[Panel, ...]:
    """Return the panels that depend on no seed: selected ones, and all genes."""
    kinds = {SELECTED: chosen.selected, BY_F: chosen.by_f}
    panels = [
        Panel(kind=kind, draw="", genes=tuple(sorted(order[:size])))
        for kind, order in kinds.items()
        for size in chosen.right
        if size < len(split.genes)
    ]
    everything = tuple(range(len(split.genes)))
    return (*panels, Panel(kind=ALL, draw="", genes=everything))


def folder_of(split: Split) -> Path:
    """Return the folder of cached results."""
    return split.folder / CLASSIFICATION
