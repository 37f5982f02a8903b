"""What is measured, how much of it, and how: time of the processor and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from fedgex.common.data.dataset import Patients
from fedgex.common.models import gexbert
from fedgex.common.models.gexbert import GexBert
from fedgex.common.seeds import generator, seeded
from fedgex.common.system.malloc import resident_mb

T = TypeVar("T")

SEED = 1
LEARNING_RATE = 2e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the result."""

    name: str
    value: float
    """A ratio without unit."""
    goal: str
    """What the value should be; empty where the row only informs."""
    met: bool | None
    """Whether it is; None without a goal."""
    detail: str
    """What the ratio was made of, on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Federation:
    """A simulated federation to be measured."""

    n_sites: int
    patients_per_site: int
    """Mean; sites differ in size."""
    n_genes: int
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is measured."""

    repeats: int
    """Pairs of timings; their median counts."""
    patients: int
    """Patients of the training throughput."""
    genes: int
    """Genes of the training throughput."""
    federation: Federation
    """Of the federation's share of a round."""
    few: Federation
    """Of the server's memory, the smaller; `many` differs in its sites only."""
    many: Federation
    updates: tuple[int, int]
    """Updates aggregated, few and many."""
    update_preset: str
    """Size of the model whose updates are aggregated."""
    update_genes: int
    steps: tuple[tuple[int, int], ...]
    """Genes and batch size of each training step; the first is the reference."""
    matrix: tuple[int, int]
    """Genes and samples of the expression file that is checked."""
    private_batch: int = 32
    """Patients of a private step."""
    workers: int = 2
    """Sites trained at the same time."""


FULL = Sizes(
    repeats=7,
    patients=200,
    genes=698,
    federation=Federation(n_sites=10, patients_per_site=100, n_genes=698, rounds=5),
    few=Federation(n_sites=10, patients_per_site=30, n_genes=200, rounds=2),
    many=Federation(n_sites=100, patients_per_site=30, n_genes=200, rounds=2),
    updates=(10, 100),
    update_preset="base",
    update_genes=2000,
    steps=((698, 32), (3556, 32), (20000, 4)),
    matrix=(20_000, 1_000),
)
QUICK = Sizes(
    repeats=2,
    patients=32,
    genes=60,
    federation=Federation(n_sites=2, patients_per_site=30, n_genes=60, rounds=2),
    few=Federation(n_sites=2, patients_per_site=20, n_genes=40, rounds=1),
    many=Federation(n_sites=4, patients_per_site=20, n_genes=40, rounds=1),
    updates=(2, 4),
    update_preset="tiny",
    update_genes=5000,
    steps=((500, 8), (2000, 4)),
    matrix=(1_000, 100),
)


def new_backbone(preset: str, n_genes: int) -> GexBert:
    """Return a model of a preset, always with the same parameters."""
    with seeded(SEED, "bench", preset):
        return GexBert(gexbert.preset(preset, n_genes))


def synthetic(n_patients: int, n_genes: int) -> Patients:
    """Return patients of pure noise, every gene measured."""
    rng = generator(SEED, "bench", "patients")
    return Patients(
        values=torch.randn(n_patients, n_genes, generator=rng),
        cancer_type=(None,) * n_patients,
        duration=torch.full((n_patients,), torch.nan),
        event=torch.full((n_patients,), torch.nan),
        clinical=torch.zeros(n_patients, 2),
    )


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new process, on one thread, as a site trains."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        return pool.submit(function, *arguments).result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the processor's seconds: one thread's, whoever else uses the machine."""
    started = time.process_time()
    work()
    return time.process_time() - started


def begin_peak() -> float:
    """Begin to record the peak anew, and return the present memory, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def at_least(name: str, value: float, goal: float, detail: str) -> Row:
    return Row(
        name=name,
        value=value,
        goal=f"at least {goal:g}",
        met=value >= goal,
        detail=detail,
    )


def below(name: str, value: float, goal: float, detail: str) -> Row:
    return Row(
        name=name, value=value, goal=f"below {goal:g}", met=value < goal, detail=detail
    )
