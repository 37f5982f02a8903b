"""What the network costs: a rehearsed consortium beside the simulator, per round.

Real processes and TLS on this machine. Overhead is the time of a round over and above
the training in it; memory is the peak of a process, in models.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from fedgex.common.errors import FederationError
from fedgex.common.models import checkpoint
from fedgex.common.system.malloc import resident_mb
from fedgex.server import journal
from fedgex.simulations import rehearsal
from fedgex.simulations.data.synthetic import new_data
from fedgex.simulations.rehearsal import Rehearsal
from fedgex.simulations.scenario import Scenario

from .rows import Row

SUPERLINK = "fedgex.server.service.superlink"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A consortium to be measured."""

    preset: str
    n_genes: int
    n_sites: int = 4
    rounds: int = 4
    """The first is left out of the times."""


MODELS = (
    Size(preset="tiny", n_genes=3_200),
    Size(preset="base", n_genes=2_200),
    Size(preset="base", n_genes=90_000),
)
"""1, 10 and 100 M parameters."""
SITES = (5, 20)


def measure(console: Console, *, quick: bool) -> list[Row]:
    """Measure overhead for each model, and the server's memory for more sites.

    Parameters
    ----------
    quick
        The smallest model alone.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in MODELS[:1] if quick else MODELS:
            rows += _overhead(size, Path(folder) / f"{size.n_genes}-genes", console)
        if not quick:
            rows.append(_memory(Path(folder), console))
    return rows


def _overhead(size: Size, folder: Path, console: Console) -> list[Row]:
    found = _run(size, folder, console, simulate=True)
    model_mb = found["parameters"] * 4 / 2**20
    name = f"{found['parameters'] / 1e6:.1f} M parameters, {size.n_sites} sites"
    seconds = found["overhead_s"]
    rest_mb = _rest_mb()
    app = (found["app_mb"] - rest_mb) / model_mb
    return [
        Row(
            name=f"seconds a round above training, network, {name}",
            value=seconds,
            goal="< 4",
            met=seconds < 4,
            detail=f"simulator {found['simulator_overhead_s']:.2f} s; model "
            f"{model_mb:.0f} MB",
        ),
        Row(
            name=f"server memory in models, {name}",
            value=app,
            goal="< 4",
            met=app < 4,
            detail=f"app {found['app_mb']:.0f} MB of which {rest_mb:.0f} MB at rest; "
            f"SuperLink {found['superlink_mb']:.0f} MB",
        ),
    ]


def _memory(folder: Path, console: Console) -> Row:
    few, many = (
        _run(
            Size(preset="tiny", n_genes=3_200, n_sites=n, rounds=2),
            folder / f"{n}-sites",
            console,
            simulate=False,
        )
        for n in SITES
    )
    ratio = many["app_mb"] / few["app_mb"]
    return Row(
        name=f"server app's peak memory, {SITES[1]} sites against {SITES[0]}",
        value=ratio,
        goal="< 1.2",
        met=ratio < 1.2,
        detail=f"{many['app_mb']:.0f} / {few['app_mb']:.0f} MB; SuperLink "
        f"{many['superlink_mb']:.0f} / {few['superlink_mb']:.0f} MB",
    )


def _run(
    size: Size, folder: Path, console: Console, *, simulate: bool
) -> dict[str, float]:
    """Run a study over the network; return what it took."""
    new_data(
        folder / "data",
        n_sites=size.n_sites,
        n_holdouts=1,
        patients_per_site=6,
        n_genes=size.n_genes,
        n_cancer_types=2,
    )
    scenario = Scenario.read(_scenario(size), "the benchmark's scenario")
    study, sites = rehearsal.prepare(
        scenario, folder / "data", folder, size.n_sites, {}
    )
    with Rehearsal(
        folder=folder, study=study, sites=sites, told=console.print
    ) as consortium:
        consortium.provision()
        consortium.start()
        contract = consortium.publish()
        consortium.approve(contract)
        consortium.launch(contract, study.name)
        if consortium.wait(study.name, limit_s=3600) != "finished":
            raise FederationError(f"the run did not finish; see {folder}")
        (pid,) = consortium.children("server", SUPERLINK)
        superlink_mb = resident_mb("VmHWM", pid)
        events = consortium.events(study.name)
        final = checkpoint.load(checkpoint.find(consortium.run_dir(study.name)))
    found = {
        "overhead_s": _seconds(events, together=True),
        "app_mb": float(events[-1]["peak_rss_mb"]),
        "superlink_mb": superlink_mb,
        "parameters": float(sum(a.size for a in final.parameters.values())),
    }
    if simulate:
        consortium.simulate()
        simulated = journal.read(folder / "simulated" / "journal.jsonl")
        found["simulator_overhead_s"] = _seconds(simulated, together=False)
    return found


def _seconds(events: Iterable[dict[str, Any]], *, together: bool) -> float:
    """Return the median time of a round above its training, s.

    Parameters
    ----------
    together
        Sites trained at the same time, and the slowest counts; else one by one.
    """
    above = []
    for event in [e for e in events if e["event"] == "round"][1:]:
        trained = [site["seconds"] for site in event["sites"].values()]
        above.append(event["seconds"] - (max(trained) if together else sum(trained)))
    return float(median(above))


def _scenario(size: Size) -> dict[str, Any]:
    """Return a study of pretraining alone, on a few patients."""
    return {
        "study": {
            "name": "bench",
            "preset": size.preset,
            "minimum_cohort": 5,
            "pretraining": {"rounds": size.rounds, "batch_size": 1},
            "evaluation": {"rates": [0.5], "panels": [10], "patients_per_round": 1},
            "rounds": {"quorum": size.n_sites},
        },
        "data": {
            "expression": "expression.parquet",
            "scale": "log2p1",
            "clinical": "clinical.csv",
        },
        "sites": {"column": "institution", "minimum_patients": 5},
        "holdout": {"institutions": ["Hold-out 01"]},
        "reference": {"alone": False, "pooled": False},
    }


def _rest_mb() -> float:
    """Return the memory of the server app with its libraries and no model, MiB."""
    code = (
        "import fedgex.server.federation.run; "
        "from fedgex.common.system.malloc import resident_mb; "
        'print(resident_mb("VmHWM"))'
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return float(done.stdout)
