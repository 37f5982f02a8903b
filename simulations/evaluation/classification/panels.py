"""Gene panels: drawn at random, or selected from the sites' sums or pooled rows.

N unseen patients, M training patients, V genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_selection import f_classif

from fedgex.common import panel_selection
from fedgex.common.harmonise import Patients
from fedgex.common.panel_selection import Types
from fedgex.common.seeds import derive
from fedgex.common.statistics import by_type, pool_types
from fedgex.common.study import CLASSIFICATION
from fedgex.simulations import references
from fedgex.simulations.evaluation import resumable
from fedgex.simulations.evaluation.protocol import Split

SIZES = (8, 16, 32, 64, 128, 256)
"""Genes of the panels that every method is judged on."""
BETWEEN = (4, 6, 12, 24, 48, 96, 192)
"""Further sizes of chosen panels, to find the smallest that is enough."""
DRAWS = 3
"""Random panels of each size, for each seed."""
FOLDS = 5
"""Groups of sites on which panels are judged that the others' sums chose."""
QUICK_SIZES = (8, 32)

RANDOM, SELECTED, BY_F, ALL = "random", "selected", "by F", "all"


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
    """What the sites' sums say of the classes."""


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
        right = share_right(split, sizes)
        return {
            "selected": selection.genes.tolist(),
            "by_f": varies[np.argsort(-f, kind="stable")][: sizes[-1]].tolist(),
            "bound": selection.bound.tolist(),
            "right": {str(size): share for size, share in right.items()},
        }

    found = resumable.cached(folder_of(split) / f"panels-{key}.json", compute)
    return Chosen(
        selected=tuple(found["selected"]),
        by_f=tuple(found["by_f"]),
        bound=tuple(found["bound"]),
        right={size: found["right"][str(size)] for size in [*sizes, len(split.genes)]},
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
    at = {gene: i for i, gene in enumerate(names)}
    for draw in range(1 if split.quick else DRAWS):
        panels = references.panels(names, sizes_of(split), derive(seed, "panel", draw))
        yield tuple(
            Panel(
                kind=RANDOM,
                draw=f"{seed}-{draw}",
                genes=tuple(sorted(at[gene] for gene in genes)),
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
