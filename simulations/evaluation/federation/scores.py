"""Arms of one split, trained and scored on the unseen patients once, and their table.

Scores of restoration, classification and survival. N unseen patients, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients
from fedgex.common.evaluation.survival import stratified_c_index
from fedgex.common.models import predict, tasks
from fedgex.common.seeds import derive
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Evaluation, Study
from fedgex.server import evaluation
from fedgex.simulations import resumable
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
from fedgex.simulations.evaluation.protocol import MIN_EVENTS, Measure, Split
from fedgex.simulations.evaluation.table import markdown, mean_known, mean_sd

Floats = NDArray[np.float32]
Scores = Mapping[str, Floats]
"""One number an unseen patient, shape (N,), by name: `squares/K` and `cells/K` (squared
error over hidden cells, and their number), `hit/P` (1 if the type is right, NaN if it
is none of the study's), `risk`."""

RESTORED = Evaluation(rates=(0.5, 0.9), panels=(100,))
DROPPED_OUT = Evaluation(rates=(0.5,), panels=())
"""Low expression: there the network adds to the linear start in every study."""
TYPE_PANEL = 32
"""Genes of the small panel for classification."""
DRAWS = 3
"""Small panels drawn for each seed."""


MEASURES = (
    Measure("mse-0.5", "MSE, 50 % hidden", "lower"),
    Measure("mse-0.9", "MSE, 90 % hidden", "lower"),
    Measure("mse-panel-100", "MSE from 100 genes", "lower"),
    Measure("mse-mnar-0.5", "MSE, 50 % dropped out", "lower"),
    Measure(f"accuracy-{TYPE_PANEL}", f"accuracy, {TYPE_PANEL} genes", "higher"),
    Measure("accuracy", "accuracy, all genes", "higher"),
    Measure("c-index", "C-index", "higher"),
)
ERRORS = tuple(measure for measure in MEASURES if measure.better == "lower")

Values = dict[str, float]
"""Value of each measure by its key; NaN where it is not estimable."""


def score(split: Split, model: Model) -> dict[str, Floats]:
    """Score a model on the split's unseen patients, in the split's unit of error.

    Parameters
    ----------
    split
        Its own genes are the model's, its own scale need not be.
    """
    study, parameters = model.study, model.parameters
    patients = model.patients(split.unseen)
    found: dict[str, Floats] = {}
    if PRETRAINING in study.phases:
        found |= _squares(split, model, patients)
    if CLASSIFICATION in study.phases:
        target = patients.type_index(study.classification.classes)
        for name, of_panel in chances(model, patients):
            found[name] = hits(of_panel, target)
    if SURVIVAL in study.phases:
        found["risk"] = evaluation.predict_risk(study, parameters, patients)
    return found


def chances(model: Model, patients: Patients) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the probabilities of the classes (N, C) from each panel."""
    classifier = tasks.load_classifier(model.study, len(model.genes), model.parameters)
    for name, panel in _panels_seen(model).items():
        some = patients.without(~panel)
        yield f"hit/{name}", predict.class_probabilities(classifier, some)


def hits(chances: torch.Tensor, target: torch.Tensor) -> Floats:
    """Return whether each patient's class is right, NaN where it is -1, shape (N,)."""
    right = (chances.argmax(dim=1) == target).float()
    hits: Floats = torch.where(target >= 0, right, torch.nan).numpy()
    return hits


def _squares(split: Split, model: Model, patients: Patients) -> dict[str, Floats]:
    """Return squared error and number of hidden cells of each patient and setting."""
    unit = split.patients(split.unseen)
    true, own = unit.values.numpy(), patients.values.numpy()
    imputer = evaluation.model_imputer(model.study, model.parameters, len(model.genes))
    found: dict[str, Floats] = {}
    seed = model.study.seed
    for pattern, key, hidden in (
        *evaluation.hidden_cells(unit, RESTORED, seed, ("mcar", "panel")),
        *evaluation.hidden_cells(unit, DROPPED_OUT, seed, ("mnar",)),
    ):
        gone = hidden.numpy()
        restored = imputer.impute(np.where(gone, np.float32(np.nan), own))
        in_unit = split.standardisation.apply(model.standardisation.undo(restored))
        error = np.where(gone, np.square(in_unit - true), 0)
        squares = np.where(np.isnan(error), np.inf, error).sum(axis=1)  # it diverged
        name = key if pattern == "mcar" else f"{pattern}-{key}"
        found[f"squares/{name}"] = squares.astype(np.float32)
        found[f"cells/{name}"] = gone.sum(axis=1).astype(np.float32)
    return found


def _panels_seen(model: Model) -> dict[str, torch.Tensor]:
    """Return the genes of all panels: all of them, and the draws of the small one."""
    genes = model.genes.genes
    panels = {"all": set(genes)}
    if len(genes) > TYPE_PANEL:
        for draw in range(DRAWS):
            seed = derive(model.study.seed, "panel", draw)
            drawn = references.panels(genes, [TYPE_PANEL], seed)[TYPE_PANEL]
            panels[f"{TYPE_PANEL}-{draw}"] = set(drawn)
    return {k: torch.tensor([g in panel for g in genes]) for k, panel in panels.items()}


def values_of(
    study: Study, unseen: Patients, scores: Scores, rows: NDArray[np.bool_] | None
) -> Values:
    """Return the measures, NaN where one is not estimable.

    Over all patients the C-index is the mean over cancers of `MIN_EVENTS` deaths or
    more; over some it is that of pairs within a cancer type, if they have as many.

    Parameters
    ----------
    rows
        Patients to evaluate, shape (N,); None: all.
    """
    chosen = np.ones(len(unseen), dtype=bool) if rows is None else rows
    found = dict.fromkeys((measure.key for measure in MEASURES), math.nan)
    for name in [n.removeprefix("cells/") for n in scores if n.startswith("cells/")]:
        cells = scores[f"cells/{name}"][chosen].sum()
        if cells:
            squares = scores[f"squares/{name}"][chosen].sum(dtype=np.float64)
            found[f"mse-{name}"] = float(squares / cells)
    small = f"accuracy-{TYPE_PANEL}", f"hit/{TYPE_PANEL}-"
    for key, prefix in (small, ("accuracy", "hit/all")):
        hits = [scores[name][chosen] for name in scores if name.startswith(prefix)]
        known = np.concatenate(hits) if hits else np.empty(0)
        known = known[~np.isnan(known)]
        if known.size:
            found[key] = float(known.mean())
    if "risk" in scores:
        found["c-index"] = (
            mean_known(c_index_by_cancer(study, unseen, scores["risk"]).values())
            if rows is None
            else _within_types(study, unseen, scores["risk"], rows)
        )
    return found


def c_index_by_cancer(study: Study, unseen: Patients, risk: Floats) -> Values:
    """Return the C-index within each cancer with enough deaths."""
    found = {}
    for name in study.survival.cancer_types:
        one = evaluation.evaluate_risk(unseen, name, risk)
        if one["events"] >= MIN_EVENTS and one["c_index"] is not None:
            found[name] = float(one["c_index"])
    return found


def _within_types(
    study: Study, unseen: Patients, risk: Floats, rows: NDArray[np.bool_]
) -> float:
    stratum = unseen.type_index(study.survival.cancer_types).numpy()
    duration, event = unseen.duration.numpy(), unseen.event.numpy()
    usable = rows & (stratum >= 0) & (duration > 0) & ~np.isnan(event)
    if event[usable].sum() < MIN_EVENTS:
        return math.nan
    return stratified_c_index(
        duration[usable], event[usable], risk[usable], stratum[usable]
    )


QUICK_LOCAL = 3
"""Sites with a local model under --quick, the largest."""


Part = tuple[dict[str, Any], dict[str, Any]]
"""Fields of the page, and numbers."""


@dataclass(frozen=True)
class Bench:
    """A split, and the results on it."""

    split: Split
    console: Console
    drawn: dict[str, Values] = dataclasses.field(default_factory=dict)
    """Values for the figure, by label of an arm, in order."""

    @property
    def study(self) -> Study:
        """The study with the first seed."""
        return self.split.seeded(self.split.seeds[0])

    @cached_property
    def unseen(self) -> Patients:
        """Unseen patients on the scale of the split."""
        return self.split.patients(self.split.unseen)

    @cached_property
    def target(self) -> torch.Tensor:
        """Class of each unseen patient, -1 if it is none of the study's, shape (N,)."""
        return self.unseen.type_index(self.study.classification.classes)

    def among(self, types: set[str]) -> Scores:
        """Score the federated model restricted to some types, first seed."""
        possible = torch.tensor([c in types for c in self.study.classification.classes])
        return {
            name: hits(of_panel.masked_fill(~possible, -1), self.target)
            for name, of_panel in self._chances.items()
        }

    @cached_property
    def _chances(self) -> dict[str, torch.Tensor]:
        """The federated model's probabilities (N, C), by name of the result."""
        if CLASSIFICATION not in self.study.phases:
            return {}
        wanted = arms(self.split, self.study.seed, (FEDERATED,))
        [(_, model)] = models(self.split, wanted, self.console)
        return dict(chances(model, self.unseen))

    def central(self) -> dict[str, list[Scores]]:
        """Score federated and pooled, one result a seed."""
        kinds, split = (FEDERATED, POOLED), self.split
        wanted = [arm for seed in split.seeds for arm in arms(split, seed, kinds)]
        found: dict[str, list[Scores]] = {}
        for arm, scores in self.each(split, wanted):
            found.setdefault(arm.name, []).append(scores)
        for name, results in found.items():
            self.drawn[name] = self.values(results[0])
        return found

    def local(self) -> dict[str, Scores]:
        """Score every site's local model, by the site's name."""
        most = QUICK_LOCAL if self.split.quick else None
        wanted = arms(self.split, self.study.seed, (LOCAL,), most_local=most)
        found = self.each(self.split, wanted)
        return {next(iter(arm.sites)): scores for arm, scores in found}

    def variants(
        self,
        ways: Mapping[str, tuple[str, Study]],
        sites: Mapping[str, Cohort] | None = None,
    ) -> dict[str, Values]:
        """Score more federations with the first seed, by their labels.

        Parameters
        ----------
        ways
            By the arm's name: its label, and the study.
        sites
            None: those of the split.
        """
        split = self.split
        if sites is not None:
            split = dataclasses.replace(split, sites=sites)
        ordered = dict(sorted(split.sites.items()))
        wanted = [
            Arm(name=k, study=each, sites=ordered) for k, (_, each) in ways.items()
        ]
        scored = self.each(split, wanted)
        found = {ways[arm.name][0]: self.values(scores) for arm, scores in scored}
        self.drawn.update(found)
        return found

    def values(self, scores: Scores, rows: NDArray[np.bool_] | None = None) -> Values:
        """Return the measures over all unseen patients, or over some."""
        return values_of(self.study, self.unseen, scores, rows)

    def each(self, split: Split, wanted: Sequence[Arm]) -> list[tuple[Arm, Scores]]:
        """Train and score the arms of a split."""
        todo = [arm for arm in wanted if not self._path(arm).exists()]
        for arm, model in models(split, todo, self.console):
            resumable.save(self._path(arm), score(self.split, model))
        return [(arm, resumable.load(self._path(arm))) for arm in wanted]

    def _path(self, arm: Arm) -> Path:
        asked = "/".join(rule.model_dump_json() for rule in (RESTORED, DROPPED_OUT))
        n_unseen = self.split.unseen.n_patients
        key = f"{arm.study.hash}/{n_unseen}/{asked}/{TYPE_PANEL}/{DRAWS}"
        name = f"{arm.name}-{resumable.digest(key)}.safetensors"
        return self.split.folder / "federation" / name


def table(bench: Bench, found: Mapping[str, Values]) -> str:
    """Return a table with pooled and federated first, and errors over the pooled."""
    pooled, rows = bench.drawn[POOLED], dict[str, dict[str, str]]()
    ours = {name: bench.drawn[name] for name in (POOLED, FEDERATED)}
    for name, values in {**ours, **found}.items():
        row = rows[name] = {m.name: mean_sd([values[m.key]]) for m in MEASURES}
        for m in ERRORS if name != POOLED else ():
            row[m.name] += f" (x {values[m.key] / pooled[m.key]:.3f})"
    return markdown("trained", rows)


def percent(ratio: float) -> str:
    """Return a ratio as a difference, such as "+1.2 %"."""
    return "-" if math.isnan(ratio) else f"{100 * (ratio - 1):+.1f} %"


def yes(met: bool) -> str:
    """Return whether a goal is met, in a word."""
    return "yes" if met else "no"


def all_within(ratios: Mapping[str, float], limit: float) -> str:
    """Return whether all known ratios of the errors are within a limit."""
    known = [ratios[m.key] for m in ERRORS if not math.isnan(ratios[m.key])]
    return yes(all(ratio <= limit for ratio in known)) if known else "-"
