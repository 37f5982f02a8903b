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


def restart_server(served, environment: dict[str, str]) -> None:
    consortium = served.consortium
    consortium.environments = {"server": environment}
    process = consortium.processes["server"]
    process.terminate()
    process.wait()
    consortium.revive()


def window() -> str:
    return version("fedgex").rpartition(".")[0]


def test_a_run_goes_on_after_an_upgrade_inside_the_window(served, tmp_path: Path):
    number = f"{window()}.99"

    def upgrade() -> None:
        restart_server(served, install(tmp_path, number))

    assert served.run("upgraded", upgrade) == "finished"
    folder = served.consortium.run_dir("upgraded")
    last = sorted((folder / "checkpoints").iterdir())[-1] / "manifest.json"
    assert json.loads(last.read_text())["versions"]["fedgex"] == number
    assert served.consortium.digest("upgraded") == served.simulated


def test_outside_the_window_the_run_stops_and_names_the_version(served, tmp_path: Path):
    def upgrade() -> None:
        restart_server(served, install(tmp_path, "99.0.0"))

    assert served.run("too-new", upgrade) == "failed"
    state = served.consortium.run_dir("too-new") / "state.json"
    reason = json.loads(state.read_text())["reason"]
    assert f"install fedgex {window()}.x here" in reason


def test_the_run_is_resumed_under_the_version_of_the_contract(served):
    restart_server(served, {})
    consortium = served.consortium
    key = consortium.key("first-administrator")
    consortium.admin("run", "resume", "too-new", "--key", key)
    consortium.until("resumed", lambda: consortium.state_of("too-new") != "failed")
    assert consortium.wait("too-new") == "finished"
    assert consortium.digest("too-new") == served.simulated
