"""The coordinator is upgraded between two rounds, in the contract's window and not."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.deployment


def install(folder: Path, number: str) -> dict[str, str]:
    """Return the environment of a process that takes fedgex for another version."""
    metadata = folder / f"fedgex-{number}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: fedgex\nVersion: {number}\n")
    return {"PYTHONPATH": str(folder)}


def window() -> str:
    return version("fedgex").rpartition(".")[0]


def test_a_run_goes_on_after_an_upgrade_inside_the_window(served, tmp_path: Path):
    number = f"{window()}.99"
    served.survives(lambda: served.restart({"server": install(tmp_path, number)}))
    last = served.receipt_paths(served.run)[-1].with_name("manifest.json")
    assert json.loads(last.read_text())["versions"]["fedgex"] == number


def test_outside_the_window_the_run_stops_and_names_the_version(served, tmp_path: Path):
    run, state_of = served.running(), served.consortium.state_of
    served.restart({"server": install(tmp_path, "99.0.0")})
    served.consortium.until("the run fails", lambda: state_of(run) == "failed")
    state = served.consortium.run_dir(run) / "state.json"
    reason = json.loads(state.read_text())["reason"]
    assert f"install fedgex {window()}.x here" in reason


def test_the_run_is_resumed_under_the_version_of_the_contract(served):
    run = served.run
    served.restart({"server": {}})
    served.resume(run)
    served.survives()
    assert served.run == run
