"""Arms and their models: which patients are trained on together, once per seed.

All sites as a federation, all pooled as one, or one site by itself ("local only"). This
module holds the only calls that train. V genes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models import tasks
from fedgex.common.models.tasks import Parameters
from fedgex.common.study import (
    CLASSIFICATION,
    PRETRAINING,
    SURVIVAL,
    Classification,
    Study,
    Survival,
)
from fedgex.simulations import resumable, training
from fedgex.simulations.evaluation.protocol import Split

FEDERATED, POOLED, LOCAL = "federated", "pooled", "local"
LOCAL_SITES = 8
"""Sites with a local model, the largest, unless all are asked for."""
MEAN, SD = "standardisation.mean", "standardisation.sd"

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, with the scale of its inputs."""

    study: Study
    genes: Vocabulary
    standardisation: Standardisation
    parameters: Parameters
    """All of them, by name."""

    def patients(self, cohort: Cohort) -> Patients:
        """Return a cohort's patients on the model's genes and scale."""
        return to_patients(cohort, self.genes, self.standardisation)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A study and the sites that train it together."""

    name: str
    """Names the file: lower-case letters, digits, hyphens."""
    study: Study
    sites: Mapping[str, Cohort]
    """Each trains by itself in a round; one site is no federation."""

    @property
    def method(self) -> str:
        """FEDERATED, POOLED or another arm's name; LOCAL for any one site."""
        return LOCAL if self.name.startswith(f"{LOCAL}-") else self.name


def arms(
    split: Split,
    seed: int,
    kinds: Sequence[str] = (FEDERATED, POOLED, LOCAL),
    most_local: int | None = LOCAL_SITES,
) -> list[Arm]:
    """Return a seed's arms: federated, pooled and, for the first seed, local ones.

    Parameters
    ----------
    most_local
        Number of sites with a local model, the largest first; None: all.
    """
    study = split.seeded(seed)
    sites = dict(sorted(split.sites.items()))
    found = []
    if FEDERATED in kinds:
        found.append(Arm(name=FEDERATED, study=study, sites=sites))
    if POOLED in kinds:
        one = Cohort.joined(list(sites.values()))
        found.append(Arm(name=POOLED, study=study, sites={POOLED: one}))
    if LOCAL in kinds and seed == split.seeds[0]:
        by_size = sorted(sites.items(), key=lambda site: -site[1].n_patients)
        found += [
            Arm(name=f"{LOCAL}-{name}", study=study, sites={name: cohort})
            for name, cohort in by_size[:most_local]
        ]
    return found


def models(
    split: Split, wanted: Sequence[Arm], console: Console
) -> Iterator[tuple[Arm, Model]]:
    """Yield each arm with its model, trained first if its file is absent."""
    folder = split.folder / "models"
    paths = [_path(folder, arm) for arm in wanted]
    resumable.compute_all(
        partial(_train, split.genes, split.standardisation, folder),
        dict(zip(paths, wanted, strict=True)),
        split.workers,
        console,
        lambda arm: f"trained {arm.name}, seed {arm.study.seed}",
    )
    for arm, path in zip(wanted, paths, strict=True):
        found = resumable.load(path)
        mean, sd = (found.pop(key).astype(np.float64) for key in (MEAN, SD))
        scale = Standardisation(mean=mean, sd=sd)
        model = Model(
            study=arm.study, genes=split.genes, standardisation=scale, parameters=found
        )
        yield arm, model


def initial_state(
    study: Study, genes: Vocabulary, scale: Standardisation, sites: Mapping[str, Cohort]
) -> Parameters:
    """Return the parameters before the first round."""
    return training.begin(study, genes, sites, scale=scale).parameters


def train(
    study: Study,
    genes: Vocabulary,
    scale: Standardisation,
    sites: Mapping[str, Cohort],
    before: Parameters,
    without: Collection[str],
) -> Arrays:
    """Train all phases but some over the sites; return all parameters.

    Parameters
    ----------
    before
        Parameters to begin with.
    """
    model = training.model_of(study, genes, scale, before, sites)
    patients = {name: to_patients(c, genes, scale) for name, c in sites.items()}
    return dict(training.train(model, patients, without=without).parameters)


def _train(
    genes: Vocabulary, scale: Standardisation, folder: Path, arm: Arm
) -> Mapping[str, NDArray[np.generic]]:
    """Return an arm's parameters and scale; its pretraining is cached by itself."""
    of_arm = arm.study, genes, scale, arm.sites

    def pretrain() -> Arrays:
        before = initial_state(*of_arm)
        return train(*of_arm, before, without=(CLASSIFICATION, SURVIVAL))

    first = resumable.cached(_path(folder, _pretraining(arm)), pretrain)
    fresh = tasks.initial(arm.study, len(genes))
    trained = train(*of_arm, fresh | first, without=(PRETRAINING,))
    return trained | {MEAN: scale.mean, SD: scale.sd}


def _pretraining(arm: Arm) -> Arm:
    """Return the arm without fine-tuning, shared by studies that differ in that."""
    return dataclasses.replace(
        arm,
        name=f"{arm.name}-pretrained",
        study=arm.study.model_copy(
            update={"classification": Classification(), "survival": Survival()}
        ),
    )


def _path(folder: Path, arm: Arm) -> Path:
    return folder / f"{arm.name}-{arm.study.hash[:12]}.safetensors"
