"""Models that an audit trains and attacks, and the losses of patients under them.

Each site's patients are halved: members train, non-members do not. Shadow models train
on other halves, in complementary pairs. N patients of all sites, V genes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError
from fedgex.common.models import tasks
from fedgex.common.privacy import attacks
from fedgex.common.privacy.audit_report import Training
from fedgex.common.seeds import derive, generator
from fedgex.common.study import CLASSIFICATION, SURVIVAL, Privacy, Study
from fedgex.simulations import resumable
from fedgex.simulations.data.split import PUBLIC, Split, read_cohort
from fedgex.simulations.privacy.effort import CANARIES, SHADOWS
from fedgex.simulations.training import begin, train, vocabulary

RESTORATION = "restoration"
TARGET = "target"

Losses = Mapping[str, NDArray[np.float64]]
"""Of each patient, shape (N,), by task; and of the canaries, see `_attacked`."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is computed."""

    shadows: int = SHADOWS
    """Shadow models, M: even, 4 or more; each pair are complements, so that every
    patient is in half of them."""
    canaries: int = CANARIES
    inverted: int = 4
    """Patients whose gradients are inverted: one by one, by two, and so on."""
    inversion_steps: int = attacks.STEPS
    rounds: int | None = None
    """Most rounds of a phase; None: the study's."""

    def __post_init__(self) -> None:
        """Refuse what no attack could be made with."""
        if self.shadows < 4 or self.shadows % 2:
            raise ConfigError(
                f"{self.shadows} shadow models were asked for; expected an even number "
                "of 4 or more."
            )
        if self.canaries < 10:
            raise ConfigError(
                f"{self.canaries} canaries were asked for; expected 10 or more."
            )


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Data that all models of an audit share."""

    sites: Mapping[str, Cohort]
    """One row a patient, sorted by site."""
    public: Cohort | None
    genes: Vocabulary
    seed: int

    def half(self, *names: str | int) -> NDArray[np.bool_]:
        """Draw half of each site's patients, shape (N,)."""
        parts = []
        for name, cohort in self.sites.items():
            n = len(cohort.patients)
            order = torch.randperm(n, generator=generator(self.seed, *names, name))
            parts.append((order < n // 2).numpy())
        return np.concatenate(parts)

    def of(self, site: str, everybody: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return one site's part of a mask (N,)."""
        sizes = [len(cohort.patients) for cohort in self.sites.values()]
        place = list(self.sites).index(site)
        return np.split(everybody, np.cumsum(sizes)[:-1])[place]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to train and to attack."""

    name: str
    study: Study
    inside: NDArray[np.bool_]
    """Patients who train, shape (N,)."""
    inserted: NDArray[np.bool_]
    """Canaries who train, shape (canaries,)."""


def read_ground(study: Study, parts: Split, out: Path) -> tuple[Ground, list[str]]:
    """Read the sites; those too small for two halves are left out with a note."""
    sites, small = {}, []
    for name in parts.sites:
        cohort = read_cohort(out / "sites" / name, study)
        if len(cohort.patients) >= 2 * study.minimum_cohort:
            sites[name] = cohort
        else:
            small.append(name)
    if not sites:
        raise ConfigError(
            f"none of {len(parts.sites)} sites has {2 * study.minimum_cohort} "
            "patients, twice the study's minimum cohort, of which half would train; "
            "choose larger sites."
        )
    notes = list(parts.notes)
    if small:
        notes.append(f"left out, too small for two halves: {', '.join(small)}")
    public = read_cohort(out / PUBLIC, study) if parts.public_size else None
    ground = Ground(
        sites=sites,
        public=public,
        genes=vocabulary(study, sites, public),
        seed=derive(study.seed, "audit"),
    )
    return ground, notes


def trainings(study: Study) -> dict[Training, Study]:
    """Return the study without privacy and, if it has any, with it."""
    plain = study.model_copy(update={"privacy": Privacy()})
    if study.privacy == Privacy():
        return {"plain": plain}
    return {"plain": plain, "private": study}


def jobs_of(ground: Ground, study: Study, effort: Effort) -> Iterator[Job]:
    """Yield every model that an audit attacks."""
    nobody = np.zeros(effort.canaries, dtype=bool)
    members = ground.half("members")
    inside = {TARGET: members, canaries(effort): members}
    inside |= {shadow(i): each for i, each in enumerate(shadows(ground, effort))}
    for own in trainings(study).values():
        for kind, rows in inside.items():
            inserted = coins(ground, effort) if kind == canaries(effort) else nobody
            yield Job(name=name(own, kind), study=own, inside=rows, inserted=inserted)


def name(study: Study, kind: str) -> str:
    """Return the name of a model: TARGET, `canaries` or `shadow` of a study."""
    return f"{study.hash[:12]}-{kind}"


def canaries(effort: Effort) -> str:
    """Return the kind of the model into which canaries were inserted."""
    return f"canaries-{effort.canaries}"


def shadow(number: int) -> str:
    """Return the kind of a shadow model."""
    return f"shadow-{number:03d}"


def shadows(ground: Ground, effort: Effort) -> list[NDArray[np.bool_]]:
    """Return who is in each shadow model, (N,) each."""
    halves = [ground.half("shadow", pair) for pair in range(effort.shadows // 2)]
    return [each for half in halves for each in (half, ~half)]


def coins(ground: Ground, effort: Effort) -> NDArray[np.bool_]:
    """Return which canaries train, by fair coins, shape (canaries,)."""
    rng = generator(ground.seed, "coins")
    return (torch.rand(effort.canaries, generator=rng) < 0.5).numpy()


def all_losses(
    ground: Ground, jobs: Iterable[Job], folder: Path, workers: int, console: Console
) -> dict[str, Losses]:
    """Return the losses under every model, trained if they are not there yet."""
    paths = {folder / f"{job.name}.safetensors": job for job in jobs}
    n_absent = sum(not path.exists() for path in paths)
    console.print(f"{len(paths)} models, {n_absent} to train", highlight=False)
    resumable.compute_all(
        partial(_attacked, ground), paths, workers, console, attrgetter("name")
    )
    return {job.name: resumable.load(path) for path, job in paths.items()}


def _attacked(ground: Ground, job: Job) -> Losses:
    """Train a model and return the losses of all patients, members or not.

    With canaries also theirs, before (`canaries-start`) and after (`canaries`).
    """
    study = job.study
    members = {
        name: cohort.take(ground.of(name, job.inside))
        for name, cohort in ground.sites.items()
    }
    begun = begin(study, ground.genes, members, ground.public)
    inserted = _canaries(ground, len(job.inserted))
    patients_of = {}
    for site, cohort in members.items():
        patients = to_patients(cohort, ground.genes, begun.standardisation)
        coined = zip(inserted, job.inserted, strict=True)
        added = [patient for (own, patient), trains in coined if trains and own == site]
        patients_of[site] = Patients.joined([patients, *added])
    public = None
    if ground.public is not None:
        public = to_patients(ground.public, ground.genes, begun.standardisation)
    # No attack uses survival, and no other phase depends on it.
    trained = train(begun, patients_of, public=public, without=(SURVIVAL,)).parameters
    everybody = Patients.joined(
        [
            to_patients(cohort, ground.genes, begun.standardisation)
            for cohort in ground.sites.values()
        ]
    )
    seed = derive(ground.seed, "masks")

    def restored(
        parameters: tasks.Parameters, patients: Patients
    ) -> NDArray[np.float64]:
        backbone = tasks.load_backbone(study, len(ground.genes), parameters)
        return attacks.restoration_losses(backbone, patients, seed)

    losses = {RESTORATION: restored(trained, everybody)}
    if CLASSIFICATION in study.phases:
        modules = tasks.load_classifier(study, len(ground.genes), trained)
        classes = study.classification.classes
        found = attacks.classification_losses(modules, everybody, classes)
        losses[CLASSIFICATION] = found
    if job.inserted.any():
        every = Patients.joined([patient for _, patient in inserted])
        losses["canaries-start"] = restored(begun.parameters, every)
        losses["canaries"] = restored(trained, every)
    return losses


def _canaries(ground: Ground, n: int) -> list[tuple[str, Patients]]:
    """Return made-up patients and their sites, in turn: standard normal expression.

    They have the genes that their site measures, and neither type nor follow-up, so
    that they train in pretraining only.
    """
    rng = generator(ground.seed, "canaries")
    sites = itertools.cycle(ground.sites.items())
    unknown = torch.full((1,), torch.nan)
    made = []
    for site, cohort in itertools.islice(sites, n):
        placed = ground.genes.place(cohort.genes, cohort.expression)
        measured = torch.from_numpy(~np.isnan(placed)).any(dim=0)
        values = torch.randn(1, len(ground.genes), generator=rng)
        patient = Patients(
            values=torch.where(measured, values, torch.nan),
            cancer_type=(None,),
            duration=unknown,
            event=unknown,
            clinical=torch.zeros(1, 2),
        )
        made.append((site, patient))
    return made
