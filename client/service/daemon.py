"""`fedgex-site start`: SuperNode and worker of a hospital, kept alive.

If one dies during a computation, both are restarted: the SuperNode deactivates its old
node, so the server learns at once that the message failed and sends it again.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from fedgex.client.admission.gate import read_working, stop_working
from fedgex.client.identity import Identity, require_server
from fedgex.client.ledger import debit
from fedgex.client.service import monitoring, supernode
from fedgex.client.settings import SiteSettings
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.system.files import (
    exclusive_lock,
    lock_holder,
    warn_of_others,
    write_atomic,
)
from fedgex.common.system.processes import Child
from fedgex.common.trust import audit_log

logger = logging.getLogger(__name__)

LOOK_S = 0.5
STATUS_S = 5.0
LOCK = "daemon.lock"
"""Lock file of the running daemon; holds its PID."""


def run(site_toml: Path) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises
    ------
    ConfigError
        If settings or policy cannot be used, or the hospital has not joined.
    TrustError
        If the audit log was changed.
    LedgerError
        If the privacy ledger cannot be used, or is older than the audit log.
    FedgexError
        If another daemon serves this state directory.
    """
    site_toml = site_toml.resolve()
    settings = SiteSettings.load(site_toml)
    require_server(settings, Identity.load(settings.state_dir).server, "the kit")
    warn_of_others(settings.state_dir)
    busy = (
        f"another daemon serves {settings.state_dir}; stop it with fedgex-site stop, "
        "or use it."
    )
    with exclusive_lock(settings.state_dir / LOCK, busy):
        audit = settings.state_dir / "audit.jsonl"
        if audit.exists():
            audit_log.verify(audit)
            debit.existing(settings.state_dir)
        audit_log.Chain(audit).append("daemon-started", pid=os.getpid())
        monitoring.serve(settings)
        _Daemon(site_toml, settings).serve()
        audit_log.Chain(audit).append("daemon-stopped", pid=os.getpid())


def daemon_pid(state_dir: Path) -> int | None:
    """Return the PID of the running daemon, None without one."""
    return lock_holder(state_dir / LOCK) or None


class _Daemon:
    def __init__(self, site_toml: Path, settings: SiteSettings) -> None:
        self.site_toml, self.settings = site_toml, settings
        self.stopping = False
        self.started = datetime.now(UTC)
        port, secret = _free_port(), secrets.token_hex(32)
        environment = {supernode.SECRET_VARIABLE: secret}
        arrivals, arrived = os.pipe()
        for end in (arrivals, arrived):
            os.set_blocking(end, False)
        process = supernode.SuperNodeSettings(
            site_toml=site_toml, port=port, arrivals=arrived
        )
        self.node = Child(
            "fedgex.client.service.supernode",
            [process.model_dump_json()],
            environment,
            [arrived],
        )
        self.worker = Child(
            "fedgex.client.service.worker",
            [str(site_toml), str(port), str(arrivals)],
            environment | {"OMP_NUM_THREADS": str(settings.policy.threads)},
            [arrivals],
        )

    def serve(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        written = 0.0
        try:
            while not self.stopping:
                self._enforce_limit()
                self._end_bereaved()
                self.node.keep()
                self.worker.keep()
                if time.monotonic() - written > STATUS_S:
                    written = time.monotonic()
                    self._write_status()
                time.sleep(LOOK_S)
        finally:
            self.node.stop()
            self.worker.stop()
            self._write_status()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _end_bereaved(self) -> None:
        """Stop a process whose partner died, except an idle worker.

        While the server is unreachable the node restarts repeatedly; an idle worker
        keeps torch, data and model loaded.
        """
        if self.worker.starts and not self.worker.alive and self.node.alive:
            self.node.stop()
        if self.node.starts and not self.node.alive and self._computing():
            self.worker.stop(grace_s=0)

    def _computing(self) -> dict[str, object] | None:
        """Return the worker's computation, None if it is idle or dead."""
        working = read_working(self.settings.state_dir)
        if working is None or working.get("code"):
            return None
        return working if working["pid"] == self.worker.pid else None

    def _enforce_limit(self) -> None:
        """Stop a computation that exceeds the policy's time limit."""
        working = self._computing()
        if working is None:
            return
        limit = self._limit_s()
        if time.monotonic() - float(str(working["since"])) > limit:
            logger.warning("a message took more than %g s; it is stopped", limit)
            self.worker.stop(grace_s=0)
            with _going_on():
                stop_working(self.settings.state_dir, Code.TIME_LIMIT)

    def _limit_s(self) -> float:
        """Return the policy's current limit, or the last readable one."""
        try:
            self.settings = SiteSettings.load(self.site_toml)
        except ConfigError as error:
            logger.error("the settings cannot be used, so nothing changes: %s", error)
        return self.settings.policy.message_limit_s

    def _write_status(self) -> None:
        status = {
            "pid": os.getpid(),
            "started": self.started.isoformat(),
            "supernode": self.node.alive,
            "worker": self.worker.alive,
            "restarts": max(self.node.starts, self.worker.starts) - 1,
            "stopped": self.stopping,
        }
        path = self.settings.state_dir / "status.json"
        with _going_on():
            write_atomic(path, json.dumps(status).encode())


@contextmanager
def _going_on() -> Iterator[None]:
    """Log an error of writing: a full disk must not end the service."""
    try:
        yield
    except FedgexError as error:
        logger.error("%s", error)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
