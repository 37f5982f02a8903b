"""Run server and sites on this machine, in one of two engines with the same results.

    local     this process and a pool of others; the default
    flower    Flower's simulation runtime on Ray (engine_flower.py)

The engine is a process of its own, so that it can be killed and started again like a
real server: the federation goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from flwr.app import Context, RecordDict

from fedgex.common.system.processes import (
    OFFLINE,
    begin,
    child_environment,
)
from fedgex.server.settings import ServerSettings
from fedgex.simulations.grid import SERVER_NODE, LocalGrid
from fedgex.simulations.processes import process_pool

Engine = Literal["local", "flower"]
POLL_S = 0.02
"""Seconds between two looks of the server for replies."""


def start(
    engine: Engine, settings: ServerSettings, sites: Path, *, workers: int, log: Path
) -> subprocess.Popen[bytes]:
    """Start a federation in a process of its own and return the process.

    Parameters
    ----------
    settings
        Of the server; written next to `log`.
    sites
        Folder of the sites' folders.
    workers
        Sites trained at the same time, each on one thread.
    log
        File that receives everything the process prints.
    """
    file = log.with_name("server.json")
    file.write_text(settings.model_dump_json())
    module = __name__ if engine == "local" else f"{__name__}_flower"
    arguments = [str(file.resolve()), str(sites.resolve()), str(workers)]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**child_environment(), **OFFLINE, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def main(settings: Path, sites: Path, workers: int) -> None:
    """Run the server's app in this process, and the sites' in a pool."""
    import fedgex.server.app

    begin()
    context = Context(
        run_id=1,
        node_id=SERVER_NODE,
        node_config={},
        state=RecordDict(),
        run_config={"settings": str(settings)},
    )
    pool = process_pool(workers) if workers > 1 else None
    with pool or contextlib.nullcontext():
        fedgex.server.app.app(LocalGrid(sites, pool, workers), context)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except Exception:
        logging.exception("the engine failed")
        logging.shutdown()
        os._exit(1)  # workers of the pool may be in the middle of a round
