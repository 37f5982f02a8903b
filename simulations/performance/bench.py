"""Measure what fedgex costs, as ratios within one run on this machine (Linux).

Seconds and megabytes differ from machine to machine; ratios of two sides measured one
after the other, many times over, differ less. docs/benchmarks.md says what each means.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from fedgex.client.data.cohort import load_cohort
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import save_cohort
from fedgex.common.data.dataset import Patients
from fedgex.common.federation import Update
from fedgex.common.models import gexbert, tasks
from fedgex.common.models.gexbert import GexBert, n_parameters, select
from fedgex.common.models.masking import draw_hidden
from fedgex.common.models.parameters import parameters
from fedgex.common.models.training import fit, pretraining_loss
from fedgex.common.privacy.secure_random import SecretRandom
from fedgex.common.seeds import generator, seeded
from fedgex.common.study import (
    MaskingRule,
    PatientPrivacy,
    Pretraining,
    StrategyRule,
)
from fedgex.common.system.malloc import resident_mb
from fedgex.server import journal
from fedgex.server.federation.strategy import Spooled, combine
from fedgex.simulations import run
from fedgex.simulations import synthetic as cohorts
from fedgex.simulations.scenario import Scenario
from fedgex.simulations.split import split

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
)


def measure(sizes: Sizes, console: Console) -> list[Row]:
    """Measure everything, in processes of their own; progress goes to `console`.

    Raises
    ------
    FederationError
        If a simulated federation stopped.
    """
    rows: list[Row] = []
    for title, part in (
        ("training throughput", training_throughput),
        ("federation's share of a round", federation_share),
        ("memory of the server", server_memory),
        ("memory of the aggregation", aggregation_memory),
        ("cost of genes", cost_of_genes),
        ("cost of patient-level privacy", cost_of_privacy),
    ):
        started = time.monotonic()
        console.print(f"bench: {title}", highlight=False)
        rows += part(sizes, console)
        seconds = time.monotonic() - started
        console.print(f"bench: {title}: done in {seconds:.0f} s", highlight=False)
    return rows


# ---- 1. training, against a bare loop ----


def training_throughput(sizes: Sizes, console: Console) -> list[Row]:
    """Compare patients a second of `fit` with those of `bare_loop`."""
    pairs = _alone(_time_training, sizes)
    ratio = median(bare / ours for ours, bare in pairs)
    ours, bare = (sizes.patients / median(side) for side in zip(*pairs, strict=True))
    return [
        _at_least(
            "training throughput, fedgex / bare PyTorch loop",
            ratio,
            0.95,
            f"{ours:.0f} / {bare:.0f} patients a CPU second, {sizes.genes} genes",
        )
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What the model is shown in one step; B patients, T genes given, Q asked for."""

    genes: Tensor
    """Shape (B, T)."""
    values: Tensor
    """Shape (B, T)."""
    keep: Tensor | None
    """Shape (B, T)."""
    asked: Tensor
    """Shape (B, Q)."""
    cells: Tensor
    """False where `asked` is padding, shape (B, Q)."""
    target: Tensor
    """Values of the cells asked for, in their order, shape (cells,)."""


def bare_batches(patients: Patients, phase: Pretraining, seed: int) -> list[Batch]:
    """Return the very batches that `fit` draws under a seed, ready for the model."""
    rng = generator(seed, "batches")
    batches = []
    for _ in range(phase.local_epochs):
        for rows in torch.randperm(len(patients), generator=rng).split(
            phase.batch_size
        ):
            values, measured = patients.values[rows], patients.measured[rows]
            hidden = draw_hidden(values, measured, phase.masking, rng)
            genes, keep = select(measured & ~hidden)
            asked, cells = select(hidden)
            cells = torch.ones_like(asked, dtype=torch.bool) if cells is None else cells
            given = values.gather(1, genes)
            batches.append(
                Batch(
                    genes=genes,
                    values=given if keep is None else torch.where(keep, given, 0.0),
                    keep=keep,
                    asked=asked,
                    cells=cells,
                    target=values.gather(1, asked)[cells],
                )
            )
    return batches


def bare_loop(backbone: GexBert, batches: list[Batch], phase: Pretraining) -> None:
    """Train in place with nothing but the steps that training consists of."""
    optimizer = torch.optim.AdamW(
        backbone.parameters(),
        lr=LEARNING_RATE,
        weight_decay=phase.weight_decay,
        betas=(0.9, 0.98),
    )
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        restored = backbone(batch.genes, batch.values, batch.keep, batch.asked)
        loss = F.mse_loss(restored[batch.cells], batch.target)
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), phase.max_grad_norm)
        optimizer.step()


def _time_training(sizes: Sizes) -> list[tuple[float, float]]:
    """Return seconds of an epoch of `fit` and of the bare loop, pair by pair."""
    patients, phase = synthetic(sizes.patients, sizes.genes), Pretraining(rounds=1)
    start = new_backbone("tiny", sizes.genes)
    pairs = []
    for repeat in range(sizes.repeats + 1):
        batches = bare_batches(patients, phase, repeat)
        ours, bare = copy.deepcopy(start), copy.deepcopy(start)
        loss = pretraining_loss(ours, patients, phase)

        def one_fit(
            backbone: GexBert = ours, loss: Any = loss, seed: int = repeat
        ) -> None:
            fit(
                backbone.parameters(),
                loss,
                len(patients),
                phase,
                learning_rate=LEARNING_RATE,
                seed=seed,
            )

        def one_bare(backbone: GexBert = bare, batches: list[Batch] = batches) -> None:
            bare_loop(backbone, batches, phase)

        if repeat % 2:
            seconds = _seconds(one_fit)
            pairs.append((seconds, _seconds(one_bare)))
        else:
            seconds = _seconds(one_bare)
            pairs.append((_seconds(one_fit), seconds))
    return pairs[1:]  # the first pair warms up


# ---- 2. the federation's share of a round ----


def federation_share(sizes: Sizes, console: Console) -> list[Row]:
    """Compare a round's time with that of its sites' own work."""
    size = sizes.federation
    events = _federate(size, sizes.workers, console)
    later = [e for e in events if e["event"] == "round"][1:]
    work = [
        sum(site["seconds"] for site in e["sites"].values()) / sizes.workers
        for e in later
    ]
    waited = [e["seconds_sites"] for e in later]
    whole = [e["seconds"] for e in later]
    told = f"median of {len(later)} rounds, {size.n_sites} sites"
    return [
        _below(
            "federation's share of a round",
            median(1 - w / t for w, t in zip(work, waited, strict=True)),
            0.05,
            f"{median(waited):.2f} s, sites' own work {median(work):.2f} s; {told}",
        ),
        Row(
            name="the same with aggregation, judging and checkpoint",
            value=median(1 - w / t for w, t in zip(work, whole, strict=True)),
            goal="",
            met=None,
            detail=f"{median(whole):.2f} s; {told}",
        ),
    ]


# ---- 3. memory of the server ----


def server_memory(sizes: Sizes, console: Console) -> list[Row]:
    """Compare the peak memory of the simulating process with few and many sites."""
    few, many = (
        _federate(size, sizes.workers, console)[-1]["peak_rss_mb"]
        for size in (sizes.few, sizes.many)
    )
    sites = f"{sizes.many.n_sites} / {sizes.few.n_sites} sites"
    return [
        _below(
            f"peak memory, server and engine, {sites}",
            many / few,
            1.2,
            f"{many:.0f} / {few:.0f} MB",
        )
    ]


def aggregation_memory(sizes: Sizes, console: Console) -> list[Row]:
    """Compare the memory that aggregation takes with few and many updates.

    The updates are one file that is read again for each: a site's arrays are in memory
    one at a time, or they are not, whatever their numbers.
    """
    with TemporaryDirectory(prefix="fedgex-bench-") as folder:
        file = Path(folder) / "update.safetensors"
        n = _spool_one(sizes, file)
        (few, few_all), (many, many_all) = (
            _alone(_aggregate, sizes, file, n_updates) for n_updates in sizes.updates
        )
    updates = f"{sizes.updates[1]} / {sizes.updates[0]} updates"
    of = f"{n / 1e6:.1f} M parameters"
    return [
        _below(
            f"peak memory, aggregating process, {updates}",
            many_all / few_all,
            1.2,
            f"{many_all:.0f} / {few_all:.0f} MB, {of}",
        ),
        _below(
            f"peak memory, aggregation alone, {updates}",
            many / few,
            1.2,
            f"{many:.0f} / {few:.0f} MB above the process at rest",
        ),
    ]


def _spool_one(sizes: Sizes, file: Path) -> int:
    backbone = new_backbone(sizes.update_preset, sizes.update_genes)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(parameters({tasks.BACKBONE: backbone}), file)
    return n_parameters(backbone)


def _aggregate(sizes: Sizes, file: Path, n_updates: int) -> tuple[float, float]:
    """Return MB that `combine` took above the process at rest, and with it."""
    measured = np.ones(sizes.update_genes, dtype=np.bool_)
    updates = [
        Update(
            site=f"site-{i:03d}",
            arrays=Spooled(file),
            num_examples=100 + i,
            num_loss_terms=1,
            measured=measured,
        )
        for i in range(n_updates)
    ]
    incoming = load_file(file)
    before = _begin_peak()
    combine(StrategyRule(name="fedavg"), incoming, updates, 1, {})
    peak = resident_mb("VmHWM")
    return peak - before, peak


# ---- 4. cost of genes ----


def cost_of_genes(sizes: Sizes, console: Console) -> list[Row]:
    """Compare one training step per patient between numbers of genes."""
    seconds = _alone(_time_steps, sizes)
    memory = [
        _alone(_step_memory, genes, batch) / batch for genes, batch in sizes.steps
    ]
    base = sizes.steps[0][0]
    rows = []
    for i, (genes, batch) in enumerate(sizes.steps[1:], start=1):
        more = genes / base
        slower = median(s[i] / s[0] for s in seconds)
        larger = memory[i] / memory[0]
        step = f"for {more:.2f} x the genes, batch of {batch}"
        rows += [
            _below(
                f"step time per patient and gene, {genes:,} / {base:,} genes",
                slower / more,
                1.2,
                f"{1000 * median(s[i] for s in seconds):.1f} CPU ms a patient, "
                f"{slower:.2f} x {step}",
            ),
            _below(
                f"step memory per patient and gene, {genes:,} / {base:,} genes",
                larger / more,
                1.2,
                f"{memory[i]:.1f} MB a patient, {larger:.2f} x {step}",
            ),
        ]
    return rows


def _time_steps(sizes: Sizes) -> list[list[float]]:
    """Return seconds per patient of one step, for each repeat and number of genes."""
    steps = [(_step(genes, batch), batch) for genes, batch in sizes.steps]
    timed = [
        [_seconds(step) / batch for step, batch in steps]
        for _ in range(sizes.repeats + 1)
    ]
    return timed[1:]  # the first warms up


def _step_memory(genes: int, batch: int) -> float:
    """Return MB that one step takes above the model and its patients."""
    _step(16, 2)()  # loads what PyTorch loads once
    step = _step(genes, batch)
    before = _begin_peak()
    step()
    return resident_mb("VmHWM") - before


def _step(genes: int, batch: int) -> Callable[[], None]:
    """Return one training step of the tiny preset, half of the cells hidden."""
    backbone, patients = new_backbone("tiny", genes), synthetic(batch, genes)
    masking = MaskingRule(min_rate=0.5, max_rate=0.5, panel=0, mnar=0)
    phase = Pretraining(rounds=1, batch_size=batch, masking=masking)
    loss = pretraining_loss(backbone, patients, phase)

    def step() -> None:
        fit(
            backbone.parameters(),
            loss,
            batch,
            phase,
            learning_rate=LEARNING_RATE,
            seed=SEED,
        )

    return step


# ---- 5. cost of patient-level privacy ----


def cost_of_privacy(sizes: Sizes, console: Console) -> list[Row]:
    """Compare private steps with plain ones: same model, patients and batch."""
    rows = []
    for way in ("fedgex", *OPACUS):
        pairs = _alone(_time_privacy, sizes, way)
        plain, private = (
            _alone(_private_memory, sizes, each) for each in ("plain", way)
        )
        time_ratio = median(private / plain for plain, private in pairs)
        above = (private[0] / plain[0], private[1] / plain[1])
        ms = [1000 * median(side) / PRIVATE_STEPS for side in zip(*pairs, strict=True)]
        told = (
            f"{ms[1]:.0f} / {ms[0]:.0f} CPU ms a step of {sizes.private_batch} "
            f"patients, {sizes.genes} genes"
        )
        mb = f"{private[1]:.0f} / {plain[1]:.0f} MB"
        if way == "fedgex":
            rows += [
                _below("private / plain training, time", time_ratio, 1.5, told),
                _below("private / plain training, peak memory", above[1], 2, mb),
                _below(
                    "private / plain training, memory of the steps alone",
                    above[0],
                    2,
                    f"{private[0]:.0f} / {plain[0]:.0f} MB above the process at rest",
                ),
            ]
        else:
            detail = f"{told}; memory {above[1]:.2f} x, {mb}"
            name = f"the same by Opacus' {way}, time"
            rows.append(
                Row(name=name, value=time_ratio, goal="", met=None, detail=detail)
            )
    return rows


OPACUS = ("hooks", "functorch")
"""Opacus' ways to a patient's gradient beside the one in use, expanded weights. Its
ghost clipping (1.6) fails on tables whose indices are an expanded view."""
PRIVATE_STEPS = 4
"""Steps that are timed together."""


def _time_privacy(sizes: Sizes, way: str) -> list[tuple[float, float]]:
    """Return seconds of plain steps and of private ones, pair by pair."""
    plain, private = _steps("plain", sizes), _steps(way, sizes)
    pairs = [(_seconds(plain), _seconds(private)) for _ in range(sizes.repeats + 1)]
    return pairs[1:]  # the first pair warms up


def _private_memory(sizes: Sizes, way: str) -> tuple[float, float]:
    """Return MB that steps took above the process at rest, and with it."""
    _steps(way, replace(sizes, genes=16))()  # loads what is loaded once
    steps = _steps(way, sizes)
    before = _begin_peak()
    steps()
    peak = resident_mb("VmHWM")
    return peak - before, peak


def _steps(way: str, sizes: Sizes) -> Callable[[], None]:
    """Return some steps that everybody takes part in, half of the cells hidden."""
    n, genes = sizes.private_batch, sizes.genes
    backbone, patients = new_backbone("tiny", genes), synthetic(n, genes)
    masking = MaskingRule(min_rate=0.5, max_rate=0.5, panel=0, mnar=0)
    phase = Pretraining(
        rounds=1, batch_size=n, masking=masking, local_epochs=PRIVATE_STEPS
    )
    if way == "plain":
        plain = pretraining_loss(backbone, patients, phase)
        return lambda: _discard(
            fit(
                backbone.parameters(),
                plain,
                n,
                phase,
                learning_rate=LEARNING_RATE,
                seed=SEED,
            )
        )
    # Opacus takes seconds to import, and memory that plain training does not have.
    from fedgex.client.training.dp_sgd import RestorationLoss, fit_privately

    loss = RestorationLoss(backbone, patients, phase)
    if way != "fedgex":
        return _opacus_steps(way, loss, n)
    rule = PatientPrivacy(noise_multiplier=NOISE, delta=1e-5, clip=1.0, sample_rate=1.0)
    return lambda: fit_privately(
        loss, n, phase, rule, noise_multiplier=NOISE, learning_rate=LEARNING_RATE
    )


NOISE = 1.0
"""Noise multiplier; it costs what any other does."""


def _opacus_steps(way: str, loss: Any, n: int) -> Callable[[], None]:
    """Return the same steps by another of Opacus' ways."""
    from opacus.grad_sample import wrap_model

    from fedgex.client.training.dp_sgd import SecretOptimizer, take_step

    each = wrap_model(loss, grad_sample_mode=way, loss_reduction="sum")
    optimizer = SecretOptimizer(
        torch.optim.AdamW(loss.parameters(), lr=LEARNING_RATE),
        SecretRandom(),
        noise_multiplier=NOISE,
        max_grad_norm=1.0,
        expected_batch_size=n,
    )
    rows, rng = torch.arange(n), generator(SEED, "bench", "opacus")

    def steps() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(PRIVATE_STEPS):
                take_step(each, optimizer, rows, loss.draw(rows, rng))

    return steps


def _discard(report: object) -> None:
    """Do nothing with what training reports."""


# ---- what several parts need ----


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


def _federate(size: Federation, workers: int, console: Console) -> list[dict[str, Any]]:
    """Run a federation in the local engine and return its journal."""
    scenario = Scenario.read(
        {
            "study": {
                "name": "bench",
                "seed": SEED,
                "minimum_cohort": 5,
                "pretraining": {"rounds": size.rounds},
            },
            "data": {
                "expression": "expression.parquet",
                "scale": "log2p1",
                "clinical": "clinical.csv",
            },
            "sites": {"column": "institution", "minimum_patients": 1},
            "holdout": {"institutions": ["Hold-out 01"]},
            "run": {"workers": workers},
        },
        "bench",
    )
    with TemporaryDirectory(prefix="fedgex-bench-") as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        cohorts.new_data(
            data,
            seed=SEED,
            n_sites=size.n_sites,
            n_holdouts=1,
            patients_per_site=size.patients_per_site,
            n_genes=size.n_genes,
        )
        out.mkdir()
        parts = split(scenario, data, out)
        settings = SiteSettings.load(out / "holdout" / "site.toml")
        holdout, _ = load_cohort(
            settings, scenario.study.scale, tuple(scenario.study.phases)
        )
        save_cohort(holdout, out / "holdout" / "checked")
        run.federate(scenario, parts, out, console)
        return journal.read(out / "run" / "journal.jsonl")


def _alone(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new process, on one thread, as a site trains."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        return pool.submit(function, *arguments).result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _seconds(work: Callable[[], None]) -> float:
    """Return the processor's seconds: one thread's, whoever else uses the machine."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _begin_peak() -> float:
    """Begin to record the peak anew, and return the present memory, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def _at_least(name: str, value: float, goal: float, detail: str) -> Row:
    return Row(
        name=name,
        value=value,
        goal=f"at least {goal:g}",
        met=value >= goal,
        detail=detail,
    )


def _below(name: str, value: float, goal: float, detail: str) -> Row:
    return Row(
        name=name, value=value, goal=f"below {goal:g}", met=value < goal, detail=detail
    )
