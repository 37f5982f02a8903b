"""Flower's own simulation runtime ends in the bits of the local engine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedgex.common.models import checkpoint
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


def test_flowers_engine_ends_in_the_bits_of_the_local_one_and_leaves_nothing_running(
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

    process = engine.start("flower", settings, consortium.sites, workers=2, log=log)

    assert process.wait(timeout=300) == 0, log.read_text()
    model = checkpoint.find(tmp_path / "run") / "model.safetensors"
    assert checkpoint.digest(model) == finished.digest
    home = b"FLWR_HOME=" + os.fsencode("/tmp/fedgex-flower-")
    mine = os.getuid()
    left = [
        path
        for path in Path("/proc").glob("[0-9]*/environ")
        if path.stat().st_uid == mine and home in path.read_bytes()
    ]
    assert not left
