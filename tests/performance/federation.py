"""A federation's share of a round, and the server's memory with more hospitals."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file, save_file

from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import save_cohort
from fedgex.common.federation import Update
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.models import tasks
from fedgex.common.models.gexbert import n_parameters
from fedgex.common.models.parameters import parameters
from fedgex.common.study import StrategyRule
from fedgex.common.system.malloc import resident_mb
from fedgex.server import journal
from fedgex.server.federation.strategy import Spooled, combine
from fedgex.simulations import run
from fedgex.simulations.data import synthetic as cohorts
from fedgex.simulations.data.split import split
from fedgex.simulations.scenario import Scenario

from .rows import (
    SEED,
    Federation,
    Row,
    Sizes,
    begin_peak,
    below,
    in_new_process,
    new_backbone,
)


def share_of_round(sizes: Sizes, console: Console) -> list[Row]:
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
        below(
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


def server_memory(sizes: Sizes, console: Console) -> list[Row]:
    """Compare the peak memory of the simulating process with few and many sites."""
    few, many = (
        _federate(size, sizes.workers, console)[-1]["peak_rss_mb"]
        for size in (sizes.few, sizes.many)
    )
    sites = f"{sizes.many.n_sites} / {sizes.few.n_sites} sites"
    return [
        below(
            f"peak memory, server and engine, {sites}",
            many / few,
            1.2,
            f"{many:.0f} / {few:.0f} MB",
        )
    ]


def aggregation_memory(sizes: Sizes) -> list[Row]:
    """Compare the memory that aggregation takes with few and many updates.

    The updates are one file that is read again for each: a site's arrays are in memory
    one at a time, or they are not, whatever their numbers.
    """
    with TemporaryDirectory(prefix="fedgex-bench-") as folder:
        file = Path(folder) / "update.safetensors"
        n = _spool_one(sizes, file)
        (few, few_all), (many, many_all) = (
            in_new_process(_aggregate, sizes, file, n_updates)
            for n_updates in sizes.updates
        )
    updates = f"{sizes.updates[1]} / {sizes.updates[0]} updates"
    of = f"{n / 1e6:.1f} M parameters"
    return [
        below(
            f"peak memory, aggregating process, {updates}",
            many_all / few_all,
            1.2,
            f"{many_all:.0f} / {few_all:.0f} MB, {of}",
        ),
        below(
            f"peak memory, aggregation only, {updates}",
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
    before = begin_peak()
    combine(StrategyRule(name="fedavg"), incoming, updates, 1, {})
    peak = resident_mb("VmHWM")
    return peak - before, peak


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
        holdout, _ = read_cohort(
            settings.data,
            settings.policy.minimum_cohort,
            scenario.study.scale,
            tuple(scenario.study.phases),
        )
        save_cohort(holdout, out / "holdout" / "checked", scenario.study.scale)
        run.federate(scenario, parts, out, console)
        return journal.read(out / "run" / "journal.jsonl")
