"""Child processes that end with their parent and are started again when they die."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Flower asks nobody on the internet and installs nothing."""

PARENT_VARIABLE = "FEDGEX_PARENT"
"""Process number of the parent, which may be gone before the child looks."""

MAX_PAUSE_S = 30.0
CALM_S = 60.0
"""A child that lived this long is started again at once when it dies."""


def log_to_stderr() -> None:
    """Write our log lines to stderr, and leave Flower's to its own handler."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("flwr").propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)


def begin() -> None:
    """Begin a child process, which ends when the parent is gone."""
    log_to_stderr()
    begin_command()
    end_with_parent()


def begin_command() -> None:
    """Begin a process: no proxy of the environment, files for their owner only."""
    set_proxy(None)
    os.umask(0o077)


def set_proxy(url: str | None) -> None:
    """Send this process's connections over TLS through one proxy, and no other any.

    Proxies of the environment are forgotten, here and for children. What our processes
    send each other is plain HTTP on loopback, with their secrets.

    Parameters
    ----------
    url
        http(s)://host:port; None: every connection is direct.
    """
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            del os.environ[name]
    # Where no variable is set, macOS has its own proxies.
    os.environ |= {"NO_PROXY": "*"} if url is None else {"HTTPS_PROXY": url}


def child_environment() -> dict[str, str]:
    """Return this process's environment for a child that is to end with it."""
    return {**os.environ, PARENT_VARIABLE: str(os.getpid())}


def end_with_parent(parent: int | None = None) -> None:
    """Watch the parent, and end this process when it is gone, or is gone already.

    Parameters
    ----------
    parent
        Its process number; None: as `child_environment` set it.
    """
    if parent is None:
        parent = int(os.environ[PARENT_VARIABLE])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


class IdlePause:
    """A pause between two looks for work, longer the longer there was none.

    It is a twentieth of the time since the last work, within bounds: what comes after a
    minute without work waits for 3 s more at most, and what follows on other work for
    the shortest pause.
    """

    def __init__(self, shortest_s: float, longest_s: float) -> None:
        self._bounds = shortest_s, longest_s
        self.worked()

    def worked(self) -> None:
        """Note that there was work."""
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """The next pause."""
        shortest, longest = self._bounds
        idle = time.monotonic() - self._last
        return min(max(idle / 20, shortest), longest)


class Child:
    """A Python module of ours, run as a process that is kept alive.

    It is found where fedgex is installed, never in the working directory (`-P`), and
    inherits the open `files`.

    What it prints goes where our own output goes, so that systemd or the container
    runtime collects it.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        files: Sequence[int] = (),
    ) -> None:
        self.module, self.arguments, self.files = module, list(arguments), files
        self.environment = child_environment() | OFFLINE | dict(environment or {})
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._not_before = 0.0
        self._pause = 0.0

    @property
    def pid(self) -> int | None:
        """Process number, None while it does not run."""
        return self._process.pid if self._process is not None and self.alive else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the last process; negative is a signal's number."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the process."""
        self.starts += 1
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", self.module, *self.arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            pass_fds=self.files,
        )

    def keep(self) -> bool:
        """Start the process if it does not run, with growing pauses if it keeps dying.

        Returns
        -------
        bool
            Whether it was started now.
        """
        if self.alive:
            return False
        now = time.monotonic()
        if self._process is not None and self._not_before <= self._started:
            calm = now - self._started > CALM_S
            self._pause = 0.0 if calm else min(self._pause * 2 + 0.5, MAX_PAUSE_S)
            self._not_before = now + self._pause
            logger.warning(
                "%s ended with %s; starting it again in %.1f s",
                self.module,
                self.exit_code,
                self._pause,
            )
        if now < self._not_before:
            return False
        self.start()
        self._not_before = self._started
        return True

    def stop(self, grace_s: float = 10.0) -> None:
        """End the process: ask, wait for `grace_s`, then kill."""
        if self._process is None:
            return
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(timeout=grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
