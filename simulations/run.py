"""A whole simulated federation: split, run, compare, report."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from fedgex.client.data.cohort import load_cohort as check_cohort
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import load_cohort, save_cohort
from fedgex.common.data.dataset import to_patients
from fedgex.common.errors import CheckpointError, ConfigError, FederationError
from fedgex.common.models import checkpoint
from fedgex.common.privacy.summary import protections
from fedgex.common.study import Study
from fedgex.server import run_monitor
from fedgex.server.evaluation import mse_only
from fedgex.server.federation import public_cohort
from fedgex.server.journal import read
from fedgex.server.settings import ServerSettings
from fedgex.simulations import engine
from fedgex.simulations.baselines import comparisons
from fedgex.simulations.baselines.comparisons import Federation
from fedgex.simulations.data.split import HOLDOUT, PUBLIC, Split, split
from fedgex.simulations.reporting.report import summary, write_report
from fedgex.simulations.resumable import cached
from fedgex.simulations.scenario import Scenario

logger = logging.getLogger(__name__)

VERSIONS = ("fedgex", "flwr", "torch", "numpy", "pandas", "lifelines", "scikit-learn")


def run(scenario: Scenario, data_dir: Path, out: Path, console: Console) -> list[str]:
    """Run a scenario to its report, going on from what `out` already holds.

    Returns
    -------
    list of str
        Ten-line summary for a terminal.

    Raises
    ------
    ConfigError
        If the data do not fit, or `out` holds another scenario's run.
    FederationError
        If the federation stopped; what it said is in `out/engine.log`.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    _claim(scenario, out)
    parts = split(scenario, data_dir, out)
    for note in parts.notes:
        console.print(note, highlight=False)
    for apart in (HOLDOUT, PUBLIC) if parts.public_size else (HOLDOUT,):
        checked(out / apart, scenario.study)
    federate(scenario, parts, out, console)
    federation = _open(parts, out)
    report = _report(scenario, parts, federation, out, console, started)
    write_report(report, out)
    return summary(report)


def checked(folder: Path, study: Study) -> Path:
    """Check patients that no site has, and return where the server finds them."""
    done = folder / "checked"
    if not (done / "clinical.parquet").exists():
        settings = SiteSettings.load(folder / "site.toml")
        cohort, _ = check_cohort(settings, study.scale, tuple(study.phases))
        save_cohort(cohort, done)
    return done


def federate(scenario: Scenario, parts: Split, out: Path, console: Console) -> None:
    """Run the federation in the scenario's engine until it has finished.

    Raises
    ------
    FederationError
        If it stopped before its end.
    """
    journal = out / "run" / "journal.jsonl"
    if _ended(journal):
        return
    study = out / "study.json"
    study.write_text(scenario.study.to_json())
    log = out / "engine.log"
    settings = ServerSettings(
        study=study.resolve(),
        run_dir=(out / "run").resolve(),
        holdout=(out / HOLDOUT / "checked").resolve(),
        public=(out / PUBLIC / "checked").resolve() if parts.public_size else None,
        n_sites=len(parts.sites),
        poll_s=engine.POLL_S,
    )
    process = engine.start(
        scenario.run.engine,
        settings,
        out / "sites",
        workers=scenario.run.workers,
        log=log,
    )
    try:
        run_monitor.follow(
            journal,
            lambda state: bool(state.ending) or process.poll() is not None,
            console,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)  # the engine winds up by itself
    finally:
        _stop(process)
    if not _ended(journal):
        raise FederationError(_why(journal, log, out))


def _claim(scenario: Scenario, out: Path) -> None:
    """Write the scenario into `out`, or refuse if another one is there.

    How it uses the machine may differ: no result depends on it.
    """
    path = out / "scenario.json"
    if path.exists():
        found = Scenario.read(json.loads(path.read_text()), str(path))
        if found.model_copy(update={"run": scenario.run}) != scenario:
            raise ConfigError(
                f"{out} holds the run of another scenario ({path.name} differs); "
                "choose another --out, or delete this one."
            )
    path.write_text(scenario.model_dump_json(indent=1))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the engine; it goes on from its last checkpoint when started again."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ended(journal: Path) -> bool:
    return journal.exists() and any(e["event"] == "run-finished" for e in read(journal))


def _why(journal: Path, log: Path, out: Path) -> str:
    """Return why a federation stopped: its own word, or the end of its log."""
    reasons = []
    if journal.exists():
        reasons = [e["reason"] for e in read(journal) if e["event"] == "run-failed"]
    if reasons:
        said = reasons[-1]
    else:
        with log.open(errors="replace") as file:
            said = "".join(deque(file, maxlen=20)).strip()
    return (
        f"the federation stopped: {said}\nSee {log}. The same command goes on from the "
        f"last checkpoint in {out / 'run' / 'checkpoints'}."
    )


def _open(parts: Split, out: Path) -> Federation:
    found = checkpoint.latest(out / "run" / "checkpoints")
    if found is None:
        raise CheckpointError(f"{out / 'run' / 'checkpoints'} holds no checkpoint.")
    final = checkpoint.load(found)
    place = (final.vocabulary, final.standardisation)
    start, known = None, None
    if public_cohort.is_wanted(final.study):
        first = min((out / "run" / "checkpoints").glob("00000-*"))
        start = checkpoint.load(first).parameters
        known = to_patients(load_cohort(out / PUBLIC / "checked"), *place)
    holdout = to_patients(load_cohort(out / HOLDOUT / "checked"), *place)
    took_part = [name for name in parts.sites if name in final.trained_on["sites"]]
    return comparisons.open_federation(
        final, out / "sites", took_part, holdout, start, known
    )


def _report(
    scenario: Scenario,
    parts: Split,
    federation: Federation,
    out: Path,
    console: Console,
    started: float,
) -> dict[str, Any]:
    """Compute every comparison that is not there yet, and gather the report."""
    kinds = {kind for kind, on in scenario.reference.model_dump().items() if on}
    folder = out / "comparisons"
    folder.mkdir(exist_ok=True)
    with _bars(console) as bars:

        def told(step: str, done: int, total: int) -> None:
            names = {task.description: task.id for task in bars.tasks}
            task = names[step] if step in names else bars.add_task(step, total=total)
            bars.update(task, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"{step} {done}/{total}", highlight=False)

        models = comparisons.train_all(
            federation, kinds, folder / "models", scenario.run.workers, told
        )
        imputers = cached(
            folder / "imputation.json", lambda: comparisons.imputation(federation, told)
        )
        survival, curves = cached(
            folder / "survival.json",
            lambda: comparisons.survival(federation, models, told),
        )
        classes = cached(
            folder / "classification.json",
            lambda: comparisons.classification(federation, models, told),
        )
    judged = json.loads((out / "run" / "judgement.json").read_text())
    events = read(out / "run" / "journal.jsonl")
    return {
        "schema": 1,
        "study": _study_facts(scenario, parts, federation, started),
        "rounds": [_round_facts(e) for e in events if e["event"] == "round"],
        "imputation": judged["imputation"] | imputers,
        "imputation_per_gene": _per_gene(federation, judged["per_gene"]),
        "survival": survival,
        "kaplan_meier": curves,
        "classification": classes,
        "cost": _cost(events, scenario.run.workers),
    }


def _bars(console: Console) -> Progress:
    return Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _study_facts(
    scenario: Scenario, parts: Split, federation: Federation, started: float
) -> dict[str, Any]:
    final, study = federation.final, federation.study
    backbone = [v for k, v in final.parameters.items() if k.startswith("backbone.")]
    return {
        "name": study.name,
        "hash": study.hash,
        "seed": study.seed,
        "scale": study.scale.value,
        "preset": study.preset,
        "parameters": sum(array.size for array in backbone),
        "vocabulary": {"genes": len(final.vocabulary), "hash": final.vocabulary.hash},
        "sites": [
            {
                "name": name,
                "patients": len(rows),
                "genes": int(rows.measured.any(dim=0).sum()),
            }
            for name, rows in sorted(federation.sites.items())
        ],
        "holdout": {
            "patients": len(federation.holdout),
            "institutions": list(scenario.holdout.institutions),
        },
        "public": None
        if scenario.public is None
        else {
            "patients": parts.public_size,
            "institutions": list(scenario.public.institutions),
        },
        "protections": protections(study),
        "versions": {name: version(name) for name in VERSIONS},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seconds": time.monotonic() - started,
        "notes": list(parts.notes),
    }


def _round_facts(event: Mapping[str, Any]) -> dict[str, Any]:
    states = [site["state"] for site in event["sites"].values()]
    pretraining = event["phase"] == "pretraining" and event["holdout"]
    return {
        "phase": event["phase"],
        "round": event["round"],
        "train_loss": event["train_loss"],
        "judged_loss": event["judged_loss"],
        "holdout_mse": mse_only(event["holdout"]) if pretraining else None,
        "seconds": event["seconds"],
        "epsilon": event["epsilon"],
        "sites_contributed": states.count("contributed"),
        "sites_total": len(states),
    }


def _per_gene(
    federation: Federation, per_gene: Mapping[str, Any]
) -> dict[str, Any] | None:
    key = "0.5"
    if key not in per_gene["model"] or "gaussian" not in per_gene:
        return None
    return {
        "rate": key,
        "genes": list(federation.final.vocabulary.genes),
        "model_mse": per_gene["model"][key]["mse"],
        "gaussian_mse": per_gene["gaussian"][key]["mse"],
        "model_r": per_gene["model"][key]["pearson"],
    }


def _cost(events: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Return what pretraining cost, over its rounds after the first.

    The overhead of a round is its time less that of training, were the sites' own
    seconds spread evenly over the workers. Rounds in which a site withholds its seconds
    or patients do not count.
    """
    timed = [
        e
        for e in events
        if e["event"] == "round" and e["phase"] == "pretraining" and e["seconds"]
    ][1:]
    timed = [e for e in timed if not _is_withheld(e, "seconds", "num_examples")]
    every = [e for e in events if e["event"] == "round"]
    sizes = {key: sum(e[key] for e in every) for key in ("bytes_up", "bytes_down")}
    peaks = [e["peak_rss_mb"] for e in events if e["event"] == "run-finished"]
    cost: dict[str, Any] = {**sizes, "peak_rss_mb": peaks[-1]}
    if timed:
        there = [
            [s for s in e["sites"].values() if s["state"] == "contributed"]
            for e in timed
        ]
        seconds = np.array([sum(s["seconds"] for s in sites) for sites in there])
        examples = np.array([sum(s["num_examples"] for s in sites) for sites in there])
        walls = np.array([e["seconds_sites"] for e in timed])
        cost["samples_per_s"] = float(examples.sum() / walls.sum())
        cost["round_overhead_s"] = float((walls - seconds / workers).mean())
    return cost


def _is_withheld(event: Mapping[str, Any], *keys: str) -> bool:
    """Return whether a site that contributed to a round keeps any of these back."""
    there = [s for s in event["sites"].values() if s["state"] == "contributed"]
    return any(site[key] is None for site in there for key in keys)
