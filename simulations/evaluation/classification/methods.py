"""Classes that every method predicts for the unseen patients, cached.

N unseen patients, V genes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from sklearn.ensemble import HistGradientBoostingClassifier

from fedgex.common import panel_selection, predictions, tasks
from fedgex.common.model import GexBert
from fedgex.common.phases import take_part
from fedgex.common.study import CLASSIFICATION, PRETRAINING
from fedgex.common.tasks import BACKBONE
from fedgex.simulations import references
from fedgex.simulations.evaluation import resumable
from fedgex.simulations.evaluation.arms import (
    FEDERATED,
    LOCAL,
    POOLED,
    Arm,
    Model,
    arms,
    models,
)
from fedgex.simulations.evaluation.classification.panels import (
    Chosen,
    Panel,
    Task,
    drawn,
    fixed,
    folder_of,
    sizes_of,
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """A method to evaluate on panels."""

    method: str
    run: str
    """Seed or draw over which scores are spread."""
    panels: tuple[Panel, ...]
    model: Model | None = None
    """None for methods that train on the panel's genes."""


Answers = dict[tuple[str, str, int, str], list[NDArray[np.int64]]]
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
    for method in (DISCRIMINANT, *SIMPLE):
        own = _of_method(split, method, panels)
        settings = json.dumps(BOOSTING) if method == BOOSTED else ""
        unseen = task.unseen.values.numpy()
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
    for arm, model in models(split, able, console):
        methods = [arm.method]
        if arm.name == FEDERATED and len(model.study.linear_types) > 1:
            methods.append(MIXTURE)
        trained = [model.parameters[name] for name in sorted(model.parameters)]
        unseen = task.unseen.values.numpy()
        for method in methods:
            own = _of_method(split, method, panels)
            key = resumable.digest(*trained, unseen, method, repr(own))
            path = folder_of(split) / f"{arm.name}-{key}.json"
            jobs[path] = Job(method=method, run=str(seed), panels=own, model=model)
    return jobs


def _n_types(split: Split, arm: Arm) -> int:
    """Return the number of classes with patients at an arm's sites."""
    return len(
        {
            name
            for cohort in arm.sites.values()
            for name in take_part(
                split.study, CLASSIFICATION, split.patients(cohort)
            ).cancer_type
        }
    )


def _answer(task: Task, job: Job) -> dict[str, list[int]]:
    """Return the classes that a job's method predicts, by name of the panel."""
    predict = _method(task, job)
    return {p.name: predict(np.array(p.genes)).tolist() for p in job.panels}


def _method(task: Task, job: Job) -> Callable[[Indices], NDArray[np.int64]]:
    """Return the map from genes to the class of each unseen patient, shape (N,)."""
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
    def predict(seen: Indices) -> NDArray[np.int64]:
        trees = HistGradientBoostingClassifier(
            random_state=0, early_stopping=False, **BOOSTING
        )
        trees.fit(task.train[:, seen], task.labels)
        predicted: NDArray[np.int64] = trees.predict(task.unseen.values[:, seen])
        return predicted

    return predict


def _by_model(task: Task, model: Model) -> Callable[[Indices], NDArray[np.int64]]:
    n_genes = task.unseen.values.shape[1]
    modules = tasks.load(model.study, n_genes, CLASSIFICATION, model.parameters)

    def predict(seen: Indices) -> NDArray[np.int64]:
        hidden = torch.ones(n_genes, dtype=torch.bool)
        hidden[seen] = False
        values = task.unseen.values.masked_fill(hidden, torch.nan)
        patients = dataclasses.replace(task.unseen, values=values)
        probabilities = predictions.class_probabilities(modules, patients)
        classes: NDArray[np.int64] = probabilities.argmax(dim=1).numpy()
        return classes

    return predict


def _by_mixture(task: Task, model: Model) -> Callable[[Indices], NDArray[np.int64]]:
    """Predict the likeliest type by the linear start; -1 is no class."""
    study, n_genes = model.study, task.unseen.values.shape[1]
    backbone = tasks.load(study, n_genes, PRETRAINING, model.parameters)[BACKBONE]
    assert isinstance(backbone, GexBert)
    linear = backbone.encoder.linear
    assert linear is not None
    at = np.array(
        [
            task.classes.index(name) if name in task.classes else -1
            for name in study.linear_types
        ]
    )

    def predict(seen: Indices) -> NDArray[np.int64]:
        found = []
        for batch in task.unseen.values[:, seen].split(64):
            genes = torch.from_numpy(seen).expand(len(batch), -1)
            keep = ~batch.isnan()
            evidence = linear.evidence(genes, batch.nan_to_num(0.0), keep)
            found.append(evidence.argmax(dim=1))
        classes: NDArray[np.int64] = at[torch.cat(found).numpy()]
        return classes

    return predict
