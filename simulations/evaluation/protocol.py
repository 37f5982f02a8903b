"""Protocol that all questions share: scenario, seeds, and which patients evaluate.

V genes, N unseen patients.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from fedgex.common import federation
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.moments import GeneMoments, Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError
from fedgex.common.settings import Settings
from fedgex.common.study import Study
from fedgex.simulations import scenario, training
from fedgex.simulations.data.split import HOLDOUT, read_cohort
from fedgex.simulations.data.split import split as write_split
from fedgex.simulations.scenario import Holdout, Public, Scenario

MIN_EVENTS = 10
"""Fewest deaths of a cancer type among unseen patients to estimate a C-index."""


@dataclass(frozen=True)
class Measure:
    """A score on unseen patients."""

    key: str
    name: str
    better: Literal["lower", "higher"]

    def against(self, one: float, other: float) -> float:
        """Return by what factor `one` is worse (above 1) or better than `other`."""
        worse, better = (one, other) if self.better == "lower" else (other, one)
        return worse / better if better else math.inf

    @property
    def of_types(self) -> bool:
        """Whether it scores the classification."""
        return self.key.startswith("accuracy")

    def is_better(self, one: float, other: float) -> bool:
        """Return whether `one` is the better value."""
        return one < other if self.better == "lower" else one > other


class Quick(Settings):
    """Limits under --quick."""

    rounds: int = Field(ge=1)
    """Most rounds of a phase."""
    patients: int = Field(ge=10)
    """Most unseen patients."""


class Protocol(Settings):
    """Scenario and seeds that every question shares, and who makes choices."""

    scenario: str
    """Name of the scenario, or path."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the study."""
    validation: tuple[str, ...]
    """Institutions of the training group on which choices are made."""
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
            own = resources.files(__package__) / "protocol.toml"
            return cls.read(tomllib.loads(own.read_text()), "protocol.toml")
        try:
            return cls.read(tomllib.loads(path.read_text()), str(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no protocol can be read: {error}") from error


On = Literal["test", "validation"]
"""Patients that evaluate: the hold-out, or the institutions on which choices are
made."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of the patients into training sites and unseen institutions."""

    scenario: Scenario
    study: Study
    """That of the scenario, with fewer rounds if quick."""
    seeds: tuple[int, ...]
    sites: Mapping[str, Cohort]
    """Training patients by site."""
    unseen: Cohort
    """Evaluation patients: institutions without a patient at any site."""
    institution: NDArray[np.str_]
    """Of each unseen patient, shape (N,)."""
    genes: Vocabulary
    data_dir: Path
    """Folder of the scenario's files."""
    folder: Path
    """Folder of models and cached results."""
    workers: int
    """Processes side by side."""
    quick: bool

    @cached_property
    def moments(self) -> dict[str, GeneMoments]:
        """Each site's moments of its genes, as it sends them."""
        least = self.study.minimum_cohort
        return {
            name: federation.gene_moments(cohort, self.genes, least)
            for name, cohort in self.sites.items()
        }

    @cached_property
    def standardisation(self) -> Standardisation:
        """The federation's scale of the genes, on which every arm is trained."""
        return federation.standardisation(self.moments)

    def seeded(self, seed: int) -> Study:
        """Return the study with another seed."""
        return self.study.model_copy(update={"seed": seed})

    def patients(self, cohort: Cohort) -> Patients:
        """Return a cohort's patients on the federation's genes and scale."""
        return to_patients(cohort, self.genes, self.standardisation)

    @cached_property
    def pooled(self) -> Patients:
        """All sites' patients, in order of site."""
        cohorts = [cohort for _, cohort in sorted(self.sites.items())]
        return Patients.joined([*map(self.patients, cohorts)])


def prepare(
    protocol: Protocol,
    data_dir: Path,
    out: Path,
    *,
    on: On = "test",
    workers: int = 2,
    quick: bool = False,
) -> Split:
    """Split the patients and read them.

    Parameters
    ----------
    on
        Patients that evaluate. With "validation" the scenario's hold-out is not used.

    Raises
    ------
    ConfigError
        If the data do not fit.
    """
    chosen = scenario.find(protocol.scenario)
    if on == "validation":
        apart = Public(institutions=chosen.holdout.institutions)
        held = Holdout(institutions=protocol.validation)
        chosen = chosen.model_copy(update={"holdout": held, "public": apart})
    folder = out / f"{on}-0"
    study = scenario.shortened(chosen.study, protocol.quick.rounds if quick else None)
    parts = write_split(chosen, data_dir, folder)
    sites = {name: read_cohort(folder / "sites" / name, study) for name in parts.sites}
    unseen = read_cohort(folder / HOLDOUT, study)
    if quick:
        order = np.random.default_rng(0).permutation(unseen.n_patients)
        unseen = unseen.take(np.sort(order[: protocol.quick.patients]))
    of_patient = institutions(chosen, data_dir)
    return Split(
        scenario=chosen,
        study=study,
        seeds=protocol.seeds[:1] if quick else protocol.seeds,
        sites=sites,
        unseen=unseen,
        institution=of_patient.loc[list(unseen.patients)].to_numpy(dtype=str),
        genes=training.vocabulary(study, sites),
        data_dir=data_dir,
        folder=folder,
        workers=workers,
        quick=quick,
    )


def institutions(chosen: Scenario, data_dir: Path) -> pd.Series:
    """Return the institution of each patient."""
    named = chosen.data.columns.patient
    table = pd.read_csv(data_dir / chosen.data.clinical, dtype=str)
    of_patient: pd.Series = table.set_index(named)[chosen.sites.column]
    return of_patient
