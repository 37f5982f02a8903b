"""Flower's own simulation runtime, by the command that Flower supports: `flwr run`.

A SuperLink in simulation mode, on a free port of the loopback interface, runs the two
apps; Ray carries the messages, and can carry them to other machines
(docs/scenarios.md). All of it ends with this process, and so does its scratch folder,
however this process ends: the SuperLink's process reads from it, and clears up when
there is nothing more to read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import httpx

from fedgex.client.app import SITES_VARIABLE
from fedgex.common.errors import FederationError
from fedgex.common.system.processes import (
    begin,
    child_environment,
)
from fedgex.server import journal
from fedgex.server.service.flower import BUNDLE
from fedgex.server.settings import ServerSettings
from fedgex.simulations.daemons import free_ports

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "SPT_NOENV": "1",
}
"""No telemetry, Ray on the loopback interface only, and processes that keep their
environment when they are renamed, unless set otherwise."""
START_S = 60.0
CONNECTION = "engine"
HOME = "FLWR_HOME"
"""Environment variable with the scratch folder; every process of a run inherits it."""
MODULE = "fedgex.simulations.engine_flower"


def main(settings_file: Path, sites: Path, workers: int) -> None:
    """Run the apps until the server's is done, or the parent process is gone.

    Raises
    ------
    FederationError
        If Ray is not installed, the SuperLink does not start, or the run failed.
    """
    begin()
    if find_spec("ray") is None:
        raise FederationError(
            'engine = "flower" needs Ray, which is not installed; install '
            'fedgex[flower-engine], or set engine = "local" in [run].'
        )
    settings = ServerSettings.load(settings_file)
    home = Path(tempfile.mkdtemp(prefix="fedgex-flower-"))
    [port] = free_ports(1)
    app = home / "bundle"
    app.mkdir()
    (app / "pyproject.toml").write_text(BUNDLE.format(version=version("fedgex")))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **RAY,
        **child_environment(),
        HOME: str(home),
        "RAY_TMPDIR": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        SITES_VARIABLE: str(sites.resolve()),
    }
    superlink = subprocess.Popen(
        [
            *(sys.executable, "-m", MODULE, "superlink"),
            *("--insecure", "--simulation", "--isolation", "subprocess"),
            *("--host", "127.0.0.1", "--port", port),
        ],
        env=environment,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _wait(superlink, port)
        _run(app, environment, settings_file, settings.n_sites, workers)
    finally:
        superlink.kill()
        superlink.communicate()
        _clear(home)
    events, _ = journal.tail(settings.run_dir / "journal.jsonl", 0)
    if not any(event["event"] == "run-finished" for event in events):
        raise FederationError("Flower's run ended before the federation did.")


def _run(
    app: Path,
    environment: Mapping[str, str],
    settings: Path,
    n_sites: int,
    workers: int,
) -> None:
    """Start the run, and return when it has ended."""
    resources = (
        f"num-supernodes={n_sites} client-resources-num-cpus=1 "
        "client-resources-num-gpus=0.0"
    )
    if "RAY_ADDRESS" not in environment:  # a cluster has its own
        resources += f" init-args-num-cpus={workers}"
    subprocess.run(
        [
            *("flwr", "run", str(app), CONNECTION, "--stream"),
            *("--run-config", f"settings={json.dumps(str(settings))}"),
            *("--federation-config", resources),
        ],
        env=environment,
        check=True,
    )


def _wait(superlink: subprocess.Popen[bytes], port: str) -> None:
    """Wait until the SuperLink answers."""
    end = time.monotonic() + START_S
    while superlink.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise FederationError("Flower's SuperLink did not start; its last lines say why.")


def _superlink() -> None:
    """Run Flower's own command, until the engine has ended."""
    from flwr.superlink.cli import flower_superlink

    def watch() -> None:
        sys.stdin.read()
        _clear(Path(os.environ[HOME]))
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-engine").start()
    sys.argv = ["flower-superlink", *sys.argv[2:]]
    flower_superlink()


def _clear(home: Path) -> None:
    """Kill every other process that has a scratch folder, and remove the folder."""
    while left := _processes(home) - {os.getpid()}:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(home, ignore_errors=True)


def _processes(home: Path) -> set[int]:
    """Return the processes that inherited a scratch folder (Linux; else none)."""
    marker, found = os.fsencode(f"{HOME}={home}") + b"\0", set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marker in path.read_bytes():
                found.add(int(path.parent.name))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "superlink":
        _superlink()
    else:
        try:
            main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
        except Exception:
            logging.exception("the engine failed")
            sys.exit(1)
