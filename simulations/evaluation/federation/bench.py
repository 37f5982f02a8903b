"""Arms of one split, trained and scored once, and the table that they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.cohort import Cohort
from fedgex.common.harmonise import Patients
from fedgex.common.study import CLASSIFICATION, Study
from fedgex.simulations.evaluation import resumable
from fedgex.simulations.evaluation.arms import (
    FEDERATED,
    LOCAL,
    POOLED,
    Arm,
    arms,
    models,
)
from fedgex.simulations.evaluation.federation.scores import (
    DRAWS,
    DROPPED_OUT,
    ERRORS,
    MEASURES,
    RESTORED,
    TYPE_PANEL,
    Scores,
    Values,
    chances,
    hits,
    is_shared,
    score,
    values_of,
)
from fedgex.simulations.evaluation.protocol import Split
from fedgex.simulations.evaluation.table import Cells, markdown, spread

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
        if not is_shared(self.study, CLASSIFICATION):
            return {}
        wanted = arms(self.split, self.study.seed, (FEDERATED,))
        [(_, model)] = models(self.split, wanted, self.console)
        return dict(chances(model, self.unseen))

    def central(self) -> dict[str, list[Scores]]:
        """Score federated and pooled, one result a seed."""
        wanted = [
            arm
            for seed in self.split.seeds
            for arm in arms(self.split, seed, (FEDERATED, POOLED))
        ]
        found: dict[str, list[Scores]] = {}
        for arm, scores in self.each(self.split, wanted):
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
            Arm(name=name, study=study, sites=ordered)
            for name, (_, study) in ways.items()
        ]
        found = {
            ways[arm.name][0]: self.values(scores)
            for arm, scores in self.each(split, wanted)
        }
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
    pooled = bench.drawn[POOLED]
    rows: Cells = {
        name: {
            m.name: spread([values[m.key]])
            + (
                f" (x {values[m.key] / pooled[m.key]:.3f})"
                if m in ERRORS and name != POOLED
                else ""
            )
            for m in MEASURES
        }
        for name, values in (
            (POOLED, pooled),
            (FEDERATED, bench.drawn[FEDERATED]),
            *found.items(),
        )
    }
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
