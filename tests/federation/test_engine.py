"""The command itself, through Flower's engine: killed, told so, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedgex.common.models import checkpoint
from fedgex.server import journal
from fedgex.simulations import engine
from fedgex.simulations.engine import OFFLINE

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

pytestmark = pytest.mark.federation

SCENARIO = """
[study]
name = "small"
minimum_cohort = 10
cross_products = true

[study.pretraining]
rounds = 2

[study.classification]
rounds = 2
classes = ["type-1", "type-2"]

[study.survival]
rounds = 2
cancer_types = ["type-1", "type-2"]

[study.evaluation]
rates = [0.1, 0.5, 0.9]
panels = [10, 20]

[data]
expression = "expression.parquet"
scale = "log2p1"
clinical = "clinical.csv"

[sites]
column = "institution"
minimum_patients = 10

[holdout]
institutions = ["Hold-out 01"]

[reference]
alone = false
pooled = false

[run]
workers = 2
"""
REPORT_KEYS = {
    "schema",
    "study",
    "rounds",
    "imputation",
    "imputation_per_gene",
    "survival",
    "kaplan_meier",
    "classification",
    "cost",
}
"""Top level of docs/report.md."""


def test_a_killed_engine_is_told_of_and_the_same_command_finishes_in_the_same_bits(
    consortium: Consortium, finished: Finished, tmp_path: Path
) -> None:
    scenario, out = tmp_path / "small.toml", tmp_path / "out"
    scenario.write_text(SCENARIO)
    command = [
        *(str(Path(sys.executable).with_name("fedgex-sim")), "run", str(scenario)),
        *("--data", str(consortium.data), "--out", str(out)),
    ]

    # Killed once round 1 is in the journal: it says so, with a hint, and no traceback.
    process = _start(command)
    _wait_for_a_round(out / "run" / "journal.jsonl", process)
    os.kill(_engine_of(process.pid), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: the federation stopped" in said
    assert "The same command goes on from the last checkpoint" in " ".join(said.split())
    assert "Traceback" not in said
    assert not (out / "report.json").exists()

    # The same command goes on, and ends in the bits of a run that nobody disturbed.
    process = _start(command)
    summary, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "report: file://" in summary
    events = journal.read(out / "run" / "journal.jsonl")
    rounds = [(e["phase"], e["round"]) for e in events if e["event"] == "round"]
    assert rounds == finished.rounds
    starts = [e["resumed_from"] for e in events if e["event"] == "run-started"]
    assert starts[0] is None
    assert starts[-1] is not None
    report = json.loads((out / "report.json").read_text())
    assert set(report) <= REPORT_KEYS
    assert {"schema", "study", "rounds", "imputation", "cost"} <= set(report)
    assert report["study"]["hash"] == finished.final.study.hash
    assert all(site["train_loss"] is not None for site in report["study"]["sites"])
    seconds = sum(r["seconds"] for r in report["rounds"] if r["seconds"] is not None)
    assert report["study"]["seconds"] >= seconds > 0
    assert set(report["imputation"]) >= {"model", "mean", "knn", "ppca", "gaussian"}
    assert (out / "report.html").is_file()
    model = checkpoint.find(out) / "model.safetensors"
    assert checkpoint.digest(model) == finished.digest

    # A third time there is nothing to train, and no engine starts.
    journal_before = (out / "run" / "journal.jsonl").read_bytes()
    log_before = (out / "engine.log").read_bytes()
    third = subprocess.run(
        command, capture_output=True, text=True, env=_environment(), timeout=60
    )
    assert third.returncode == 0, third.stderr
    assert (out / "run" / "journal.jsonl").read_bytes() == journal_before
    assert (out / "engine.log").read_bytes() == log_before


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    return {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def _wait_for_a_round(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        events, _ = journal.tail(path, 0)
        if any(event["event"] == "round" for event in events):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError("no round within two minutes")


def _engine_of(parent: int) -> int:
    """Return the process that runs the engine's module, a child of the command."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    engines = [line for line in found.stdout.splitlines() if engine.__name__ in line]
    assert len(engines) == 1, found.stdout
    return int(engines[0].split()[0])
