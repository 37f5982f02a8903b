"""A simulated federation: split, run, compare, report."""

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

from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import MANIFEST, Cohort, load_cohort, save_cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.errors import CheckpointError, ConfigError, FederationError
from fedgex.common.ingestion.cohort import read_cohort as check_cohort
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

GENE_RATE = "0.5"
"""Missing rate of the comparison gene by gene."""
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
        If the federation stopped; its output is in `out/engine.log`.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    _claim(scenario, out)
    parts = split(scenario, data_dir, out)
    for note in parts.notes:
        console.print(note, highlight=False)
    for apart in parts.apart:
        checked(out / apart, scenario.study)
    federate(scenario, parts, out, console)
    federation = _open(parts, out)
    report = _report(scenario, parts, federation, out, console, started)
    write_report(report, out)
    return summary(report)


def checked(folder: Path, study: Study) -> Path:
    """Check patients that no site has, and return where the server finds them."""
    done = folder / "checked"
    if not (done / MANIFEST).exists():
        save_cohort(_checked(folder, study), done, study.scale)
    return done


def _checked(folder: Path, study: Study) -> Cohort:
    """Read patients as a site does, every sample of them."""
    settings = SiteSettings.load(folder / "site.toml")
    floor = settings.policy.minimum_cohort
    return check_cohort(settings.data, floor, study.scale, tuple(study.phases))[0]


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
    """Return why a federation stopped, by its journal or the end of its log."""
    events = read(journal) if journal.exists() else []
    with log.open(errors="replace") as file:
        reason = "".join(deque(file, maxlen=20)).strip()
    for event in events:
        if event["event"] == "run-failed":
            reason = event["reason"]
    return (
        f"the federation stopped: {reason}\nSee {log}. The same command goes on from "
        f"the last checkpoint in {out / 'run' / 'checkpoints'}."
    )


def _open(parts: Split, out: Path) -> Federation:
    """Read a finished federation, and the patients of the sites that took part."""
    checkpoints = out / "run" / "checkpoints"
    found = checkpoint.latest(checkpoints)
    if found is None:
        raise CheckpointError(f"{checkpoints} holds no checkpoint.")
    final = checkpoint.load(found)

    def patients(cohort: Cohort) -> Patients:
        return to_patients(cohort, final.vocabulary, final.standardisation)

    public = public_cohort.is_wanted(final.study)
    return Federation(
        final=final,
        sites={
            name: patients(_checked(out / "sites" / name, final.study))
            for name in parts.sites
            if name in final.trained_on["sites"]
        },
        holdout=patients(load_cohort(out / HOLDOUT / "checked", final.study.scale)),
        start=checkpoint.load(min(checkpoints.glob("00000-*"))).parameters
        if public
        else None,
        public=patients(load_cohort(out / PUBLIC / "checked", final.study.scale))
        if public
        else None,
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
    folder, workers = out / "comparisons", scenario.run.workers
    models = comparisons.train_all(
        federation, kinds, folder / "models", workers, console
    )
    computed = {}
    for name, compute in (
        ("imputation", lambda: comparisons.imputation(federation)),
        ("survival", lambda: comparisons.survival(federation, models)),
        ("classification", lambda: comparisons.classification(federation, models)),
    ):
        console.print(f"references: {name}", highlight=False)
        computed[name] = cached(folder / f"{name}.json", compute)
    survival, curves = computed["survival"]
    judged = json.loads((out / "run" / "judgement.json").read_text())
    events = read(out / "run" / "journal.jsonl")
    return {
        "schema": 1,
        "study": _study_facts(scenario, parts, federation, started),
        "rounds": [_round_facts(e) for e in events if e["event"] == "round"],
        "imputation": judged["imputation"] | computed["imputation"],
        "imputation_per_gene": _per_gene(federation, judged["per_gene"]),
        "survival": survival,
        "kaplan_meier": curves,
        "classification": computed["classification"],
        "cost": _cost(events, workers),
    }


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
            "institutions": list(scenario.public_institutions),
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
    if GENE_RATE not in per_gene["model"] or "gaussian" not in per_gene:
        return None
    model, gaussian = (per_gene[m][GENE_RATE] for m in ("model", "gaussian"))
    return {
        "rate": GENE_RATE,
        "genes": list(federation.final.vocabulary.genes),
        "model_mse": model["mse"],
        "gaussian_mse": gaussian["mse"],
        "model_r": model["pearson"],
    }


def _cost(events: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Return what pretraining cost, over its rounds after the first.

    The overhead of a round is its time less that of training, were the sites' own
    seconds spread evenly over the workers. Rounds in which a site withholds its seconds
    or patients do not count.
    """
    every = [event for event in events if event["event"] == "round"]
    sizes = {key: sum(e[key] for e in every) for key in ("bytes_up", "bytes_down")}
    peaks = [e["peak_rss_mb"] for e in events if e["event"] == "run-finished"]
    cost: dict[str, Any] = {**sizes, "peak_rss_mb": peaks[-1]}
    timed = []
    for event in [e for e in every if e["phase"] == "pretraining" and e["seconds"]][1:]:
        there = [s for s in event["sites"].values() if s["state"] == "contributed"]
        own = [(s["seconds"], s["num_examples"]) for s in there]
        if not any(None in numbers for numbers in own):
            timed.append((*map(sum, zip(*own, strict=True)), event["seconds_sites"]))
    if timed:
        seconds, examples, walls = np.array(timed).T
        cost["samples_per_s"] = float(examples.sum() / walls.sum())
        cost["round_overhead_s"] = float((walls - seconds / workers).mean())
    return cost
