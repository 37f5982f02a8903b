"""What all benchmarks stand on: a split of the patients, and models trained on it.

    protocol -> split -> sites and unseen patients -> models of each arm and seed, kept
    in files so that a benchmark which was stopped goes on

An arm is who trains with whom: all sites as a federation, all pooled as if there were
no walls, or one site alone. V genes.
"""

from __future__ import annotations

import dataclasses
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console
from safetensors.numpy import load_file, save_file

from fedgex.common import tasks
from fedgex.common.cohort import Cohort
from fedgex.common.errors import ConfigError
from fedgex.common.harmonise import Patients, to_patients
from fedgex.common.statistics import Standardisation
from fedgex.common.study import (
    CLASSIFICATION,
    PRETRAINING,
    SURVIVAL,
    Classification,
    Settings,
    Study,
    Survival,
)
from fedgex.common.tasks import Parameters
from fedgex.common.vocabulary import Vocabulary
from fedgex.simulations import in_process, scenario
from fedgex.simulations.scenario import Holdout, Public, Scenario
from fedgex.simulations.split import HOLDOUT, split

FEDERATED, POOLED = "federated", "pooled"
ALONE_SITES = 8
"""Sites that train alone for comparison, unless all are asked for."""
MEAN, SD = "standardisation.mean", "standardisation.sd"


class Splits(Settings):
    """Hold-outs beyond the scenario's own."""

    number: int = Field(ge=0)
    """How many."""
    share: float = Field(gt=0, lt=1)
    """Of all patients in each, about."""
    seed: int = Field(ge=0)
    """Of the draw."""


class Quick(Settings):
    """What --quick cuts down."""

    rounds: int = Field(ge=1)
    """Most rounds of a phase."""
    patients: int = Field(ge=10)
    """Most unseen patients."""


class Protocol(Settings):
    """Seeds, splits and scenario that every benchmark shares."""

    scenario: str
    """Name of the scenario, or path."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Of the study."""
    validation: tuple[str, ...]
    """Institutions of the training group on which choices are made."""
    splits: Splits
    quick: Quick

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Read a protocol, or the one that comes with fedgex.

        Raises
        ------
        ConfigError
            If the file cannot be used.
        """
        if path is None:
            own = resources.files("fedgex.simulations.benchmark") / "protocol.toml"
            return cls.read(tomllib.loads(own.read_text()), "protocol.toml")
        try:
            return cls.read(tomllib.loads(path.read_text()), str(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no protocol can be read: {error}") from error


On = Literal["test", "validation"]
"""Whose patients judge: the hold-out, or the institutions on which choices are made."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, with the scale that it reads."""

    study: Study
    genes: Vocabulary
    standardisation: Standardisation
    parameters: Parameters
    """All of it, by name."""

    def patients(self, cohort: Cohort) -> Patients:
        """Return a cohort's patients on the model's genes and scale."""
        return to_patients(cohort, self.genes, self.standardisation)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """One split of the patients."""

    scenario: Scenario
    study: Study
    """That of the scenario, with fewer rounds if quick."""
    seeds: tuple[int, ...]
    sites: Mapping[str, Cohort]
    """Who trains, by site."""
    unseen: Cohort
    """Who judges: whole institutions without a patient at any site."""
    institution: NDArray[np.str_]
    """Of each unseen patient, shape (N,)."""
    genes: Vocabulary
    data_dir: Path
    """Folder that the scenario's files lie in."""
    folder: Path
    """Where models and results are kept."""
    workers: int
    """Models trained at the same time."""
    quick: bool
    number: int = 0
    """0 for the scenario's hold-out, above for one of the drawn ones."""
    n_splits: int = 1
    """Splits that the protocol has for these patients, this one among them."""

    @cached_property
    def standardisation(self) -> Standardisation:
        """The federation's scale of the genes, which every arm is trained on."""
        return in_process.standardisation(self.study, self.genes, self.sites)

    def seeded(self, seed: int) -> Study:
        """Return the study with another seed."""
        return self.study.model_copy(update={"seed": seed})

    def patients(self, cohort: Cohort) -> Patients:
        """Return a cohort's patients on the federation's genes and scale."""
        return to_patients(cohort, self.genes, self.standardisation)

    @cached_property
    def pooled(self) -> Patients:
        """All sites' patients, in order of site."""
        return Patients.joined(
            [self.patients(c) for _, c in sorted(self.sites.items())]
        )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Who trains what together."""

    name: str
    """Names the file: lower-case letters, digits, hyphens."""
    study: Study
    sites: Mapping[str, Cohort]
    """Each trains by itself in a round; one site is no federation."""


def prepare(
    protocol: Protocol,
    data_dir: Path,
    out: Path,
    *,
    on: On = "test",
    number: int = 0,
    workers: int = 2,
    quick: bool = False,
) -> Ground:
    """Split the patients and read them.

    Parameters
    ----------
    on
        Whose patients judge. With "validation" the scenario's hold-out takes no part.
    number
        0 for the scenario's hold-out, above for one of the protocol's drawn ones.

    Raises
    ------
    ConfigError
        If the data do not fit, there is no such split, or only the test has others.
    """
    chosen = scenario.find(protocol.scenario)
    if not 0 <= number <= protocol.splits.number:
        raise ConfigError(
            f"split {number} was asked for; expected 0 to {protocol.splits.number}."
        )
    if on == "validation":
        if number:
            raise ConfigError(
                f"split {number} was asked for on validation; expected split 0, since "
                "the others hold out institutions that judge."
            )
        apart = Public(institutions=chosen.holdout.institutions)
        held = Holdout(institutions=protocol.validation)
        chosen = chosen.model_copy(update={"holdout": held, "public": apart})
    elif number:
        whole = prepare(protocol, data_dir, out)
        cohorts = [*whole.sites.values(), whole.unseen]
        patients = [patient for cohort in cohorts for patient in cohort.patients]
        where = institutions(chosen, data_dir).loc[patients]
        held = Holdout(institutions=_drawn(where, protocol.splits, number))
        chosen = chosen.model_copy(update={"holdout": held})
    folder = out / f"{on}-{number}"
    study = in_process.shortened(chosen.study, protocol.quick.rounds if quick else None)
    parts = split(chosen, data_dir, folder)
    sites = {
        name: in_process.read(folder / "sites" / name, study) for name in parts.sites
    }
    unseen = in_process.read(folder / HOLDOUT, study)
    if quick:
        order = np.random.default_rng(0).permutation(unseen.n_patients)
        unseen = in_process.take(unseen, np.sort(order[: protocol.quick.patients]))
    of_patient = institutions(chosen, data_dir)
    return Ground(
        scenario=chosen,
        study=study,
        seeds=protocol.seeds[:1] if quick else protocol.seeds,
        sites=sites,
        unseen=unseen,
        institution=of_patient.loc[list(unseen.patients)].to_numpy(dtype=str),
        genes=in_process.vocabulary(study, sites, None),
        data_dir=data_dir,
        folder=folder,
        workers=workers,
        quick=quick,
        number=number,
        n_splits=1 if quick or on == "validation" else 1 + protocol.splits.number,
    )


def arms(
    ground: Ground,
    seed: int,
    kinds: Sequence[str] = (FEDERATED, POOLED, "alone"),
    most_alone: int | None = ALONE_SITES,
) -> list[Arm]:
    """Return the arms of a seed: federated, pooled, and, of the first, sites alone.

    Parameters
    ----------
    most_alone
        So many sites alone, the largest ones; None: all.
    """
    study = ground.seeded(seed)
    everybody = dict(sorted(ground.sites.items()))
    found = []
    if FEDERATED in kinds:
        found.append(Arm(name=FEDERATED, study=study, sites=everybody))
    if POOLED in kinds:
        one = in_process.joined(list(everybody.values()))
        found.append(Arm(name=POOLED, study=study, sites={POOLED: one}))
    if "alone" in kinds and seed == ground.seeds[0]:
        by_size = sorted(everybody.items(), key=lambda site: -site[1].n_patients)
        found += [
            Arm(name=f"alone-{name}", study=study, sites={name: cohort})
            for name, cohort in by_size[:most_alone]
        ]
    return found


def models(
    ground: Ground, wanted: Sequence[Arm], console: Console
) -> Iterator[tuple[Arm, Model]]:
    """Yield the model of each arm, trained first if it is not there yet."""
    folder = ground.folder / "models"
    folder.mkdir(exist_ok=True)
    todo = [arm for arm in wanted if not _file(folder, arm).exists()]
    train = partial(_train, ground.genes, ground.standardisation, folder)
    done = in_process.each_done(train, todo, ground.workers)
    for count, (arm, seconds) in enumerate(done, 1):
        console.print(
            f"trained {count} of {len(todo)}: {arm.name}, seed {arm.study.seed}, "
            f"{seconds:.0f} s",
            highlight=False,
        )
    for arm in wanted:
        found = load_file(_file(folder, arm))
        scale = Standardisation(
            mean=found.pop(MEAN).astype(np.float64),
            sd=found.pop(SD).astype(np.float64),
        )
        yield (
            arm,
            Model(
                study=arm.study,
                genes=ground.genes,
                standardisation=scale,
                parameters=found,
            ),
        )


def _train(genes: Vocabulary, scale: Standardisation, folder: Path, arm: Arm) -> float:
    """Train an arm's model into its file; return the seconds that it took."""
    started = time.monotonic()
    patients = {n: to_patients(c, genes, scale) for n, c in arm.sites.items()}
    pretrained = _file(folder, _pretraining(arm))
    if pretrained.exists():
        first = load_file(pretrained)
    else:
        begun = in_process.start(arm.study, genes, arm.sites, None, scale)
        first = in_process.federate(
            arm.study, begun, patients, without=(CLASSIFICATION, SURVIVAL)
        )
        _save(first, pretrained)
    fresh = tasks.initial(arm.study, len(genes))
    begun = in_process.Start(
        vocabulary=genes,
        standardisation=scale,
        parameters=fresh | first,
        public=None,
    )
    whole = in_process.federate(arm.study, begun, patients, without=(PRETRAINING,))
    _save(whole | {MEAN: scale.mean, SD: scale.sd}, _file(folder, arm))
    return time.monotonic() - started


def _pretraining(arm: Arm) -> Arm:
    """Return the arm without fine-tuning, which studies that differ in that share."""
    return dataclasses.replace(
        arm,
        name=f"{arm.name}-pretrained",
        study=arm.study.model_copy(
            update={"classification": Classification(), "survival": Survival()}
        ),
    )


def _save(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    partial_ = path.with_suffix(".partial")
    save_file(dict(arrays), partial_)
    partial_.replace(path)


def _file(folder: Path, arm: Arm) -> Path:
    return folder / f"{arm.name}-{arm.study.hash[:12]}.safetensors"


def institutions(chosen: Scenario, data_dir: Path) -> pd.Series:
    """Return the institution of each patient."""
    named = chosen.data.columns.patient
    table = pd.read_csv(data_dir / chosen.data.clinical, dtype=str)
    of_patient: pd.Series = table.set_index(named)[chosen.sites.column]
    return of_patient


def _drawn(where: pd.Series, splits: Splits, number: int) -> tuple[str, ...]:
    """Draw whole institutions with about the share of the patients.

    Parameters
    ----------
    where
        Institution of each patient who has expression.
    """
    sizes = where.value_counts().sort_index()
    rng = np.random.default_rng([splits.seed, number])
    order = rng.permutation(len(sizes))
    reached = np.cumsum(sizes.to_numpy()[order]) / sizes.sum()
    taken = order[: int(np.searchsorted(reached, splits.share)) + 1]
    return tuple(sorted(str(name) for name in sizes.index[taken]))
