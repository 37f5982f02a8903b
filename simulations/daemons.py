"""Processes that serve: started, watched, killed, revived, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fedgex.common.errors import FederationError

LIMIT_S = 300.0
"""Longest wait for a step, for a machine that is busy otherwise."""


@dataclass(kw_only=True)
class Daemons:
    """Processes by name, with a log each under one folder.

    Use it as a context manager: leaving it ends every process.
    """

    folder: Path
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """More environment variables, by site, or for "server"."""
    prefixes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Words before a command that serves, such as `nsenter`, by site or "server"."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    reviving: bool = False
    """Start what died instead of giving up, as systemd does."""
    _commands: dict[str, list[str]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End server or hospital with a signal, children included."""
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(timeout=30)

    def environment(self, who: str) -> dict[str, str]:
        """Return the environment variables of a process."""
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **self.environments.get(who, {}),
        }

    def serve(self, name: str, command: list[str]) -> None:
        """Start a process that serves; its output goes to `folder/NAME.log`."""
        program, *words = command
        self._commands[name] = command
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [
                    *self.prefixes.get(name, ()),
                    Path(sys.executable).with_name(program),
                    *words,
                ],
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def children(self, name: str, module: str) -> list[int]:
        """Return the processes of a module that server or a hospital has started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue  # it ended meanwhile
            if int(fields[1]) == self.processes[name].pid and module.encode() in words:
                found.append(int(folder.name))
        return found

    def revive(self) -> None:
        """Start whatever died, as systemd does."""
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                command = self._commands[name]
                self.serve(name, command)

    def until(
        self, what: str, reached: Callable[[], bool], limit_s: float = LIMIT_S
    ) -> None:
        """Wait until something is so.

        Raises
        ------
        FederationError
            After `limit_s`, or if server or a hospital ended.
        """
        end = time.monotonic() + limit_s
        while not reached():
            if self.reviving:
                self.revive()
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise FederationError(
                        f"{name} ended with {process.returncode} before {what}; see "
                        f"{self.folder / name}.log"
                    )
            if time.monotonic() > end:
                raise FederationError(f"{what}: not within {limit_s:g} s")
            time.sleep(0.2)


def free_ports(number: int) -> list[str]:
    """Return ports of this machine that nothing listens on."""
    found = [socket.socket() for _ in range(number)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in found]
    for each in found:
        each.close()
    return ports
