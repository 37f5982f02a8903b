"""Run server and sites on this machine, in Flower's simulation engine.

A process of its own, so that it can be killed and started again like a real one: the
federation goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from flwr.simulation import run_simulation

import fedgex.client.app
import fedgex.server.app
from fedgex.client.app import SITES_VARIABLE
from fedgex.common.processes import child_environment, end_with_parent

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No telemetry, no update check, and Ray on the loopback interface only."""


def start(
    *,
    study: Path,
    sites: Path,
    n_sites: int,
    holdout: Path,
    public: Path | None,
    run_dir: Path,
    workers: int,
    log: Path,
) -> subprocess.Popen[bytes]:
    """Start a federation in a process of its own and return the process.

    Parameters
    ----------
    sites
        Folder of the sites' folders.
    public
        Folder of the server's public cohort, if it has one.
    workers
        Sites trained at the same time, each on one thread.
    log
        File that takes everything the process prints.
    """
    environment: Mapping[str, str] = {
        **child_environment(),
        **OFFLINE,
        SITES_VARIABLE: str(sites.resolve()),
        "FEDGEX_SERVER_STUDY": str(study.resolve()),
        "FEDGEX_SERVER_RUN_DIR": str(run_dir.resolve()),
        "FEDGEX_SERVER_HOLDOUT": str(holdout.resolve()),
        "FEDGEX_SERVER_N_SITES": str(n_sites),
        "FEDGEX_SERVER_POLL_S": "0.02",
        "OMP_NUM_THREADS": "1",
        **({} if public is None else {"FEDGEX_SERVER_PUBLIC": str(public.resolve())}),
    }
    arguments = [sys.executable, "-m", __name__, str(n_sites), str(workers)]
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def main(n_sites: int, workers: int) -> None:
    """Run the apps until the server's is done, or whoever started us is gone."""
    logging.basicConfig(level=logging.INFO)
    end_with_parent()
    run_simulation(
        server_app=fedgex.server.app.app,
        client_app=fedgex.client.app.app,
        num_supernodes=n_sites,
        backend_config={
            "init_args": {"num_cpus": workers, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except Exception:
        logging.exception("the engine failed")
        logging.shutdown()
        os._exit(1)  # Flower's threads would keep what failed alive for ever
