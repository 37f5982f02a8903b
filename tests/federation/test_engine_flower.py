"""Flower's own simulation runtime ends in the bits of the local engine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedgex.common.models import checkpoint
from fedgex.server import journal
from fedgex.server.settings import ServerSettings
from fedgex.simulations import engine

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

pytestmark = [
    pytest.mark.federation,
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed: fedgex[flower-engine]"
    ),
]


def test_flowers_engine_killed_and_started_again_ends_in_the_bits_of_the_local_one(
    consortium: Consortium, finished: Finished, tmp_path: Path
) -> None:
    study = tmp_path / "study.json"
    study.write_text(finished.final.study.to_json())
    settings = ServerSettings(
        study=study,
        run_dir=tmp_path / "run",
        holdout=consortium.holdout,
        n_sites=len(consortium.names),
        poll_s=engine.POLL_S,
    )
    log = tmp_path / "engine.log"
    others = scratch_folders()

    # Killed after its first round, it leaves no process, and no scratch folder.
    killed = engine.start("flower", settings, consortium.sites, workers=2, log=log)
    wait_for(lambda: rounds(settings.run_dir), killed, log)
    (home,) = scratch_folders() - others
    assert running(home)
    killed.kill()
    assert killed.wait() < 0
    wait_for(lambda: not running(home) and not home.exists())

    # Started again, it goes on, and leaves nothing behind at its end.
    process = engine.start("flower", settings, consortium.sites, workers=2, log=log)
    assert process.wait(timeout=300) == 0, log.read_text()
    assert scratch_folders() <= others
    assert rounds(settings.run_dir) == finished.rounds
    model = checkpoint.find(settings.run_dir) / "model.safetensors"
    assert checkpoint.digest(model) == finished.digest


def rounds(run_dir: Path) -> list[tuple[str, int]]:
    events, _ = journal.tail(run_dir / "journal.jsonl", 0)
    return [(e["phase"], e["round"]) for e in events if e["event"] == "round"]


def scratch_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("fedgex-flower-*"))


def running(home: Path) -> list[Path]:
    """Return the processes that inherited a scratch folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(f"FLWR_HOME={home}") in path.read_bytes():
                found.append(path)
    return found


def wait_for(
    condition: Callable[[], Any],
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, log and log.read_text()
        time.sleep(0.1)
