"""A consortium of real processes, and a link between them that can be broken."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedgex.simulations import rehearsal
from fedgex.simulations.cohorts import new_data
from fedgex.simulations.rehearsal import Rehearsal
from fedgex.simulations.scenario import Scenario

TYPES = ["type-1", "type-2"]
N_SITES = 3

STUDY: dict[str, Any] = {
    "name": "rehearsal",
    "minimum_cohort": 10,
    "cross_products": True,
    "linear_rank": 4,
    "pretraining": {"rounds": 3, "local_epochs": 1},
    "classification": {"rounds": 1, "classes": TYPES},
    "survival": {"rounds": 1, "cancer_types": TYPES},
    "evaluation": {"rates": [0.5], "panels": [10]},
    "rounds": {"quorum": N_SITES},
}
"""Three sites, five rounds, seconds each."""

SCENARIO: dict[str, Any] = {
    "study": STUDY,
    "data": {
        "expression": "expression.parquet",
        "scale": "log2p1",
        "clinical": "clinical.csv",
    },
    "sites": {"column": "institution", "minimum_patients": 10},
    "holdout": {"institutions": ["Hold-out 01"]},
    "reference": {"alone": False, "pooled": False},
}

Build = Callable[..., Rehearsal]


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Build]:
    """Return what builds a consortium; its processes end with the test."""
    opened: list[Rehearsal] = []

    def build(**changes: Any) -> Rehearsal:
        data = tmp_path / "data"
        new_data(
            data,
            n_sites=N_SITES,
            n_holdouts=1,
            patients_per_site=30,
            n_genes=30,
            n_cancer_types=len(TYPES),
        )
        scenario = Scenario.read(SCENARIO, "a test's scenario")
        study, sites = rehearsal.prepare(scenario, data, tmp_path, N_SITES, changes)
        built = Rehearsal(folder=tmp_path, study=study, sites=sites, told=_silent)
        opened.append(built)
        return built

    yield build
    for each in opened:
        each.__exit__()


@dataclass
class Link:
    """A TCP proxy in user space: passes bytes on, late, slowly, changed, or not at all.

    One link stands for one hospital's way to the server.
    """

    target: tuple[str, int]
    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    broken: bool = False
    """Connections are refused, and those there are go dead without a word."""
    flip_after: int | None = None
    """Change one byte once so many have passed towards the server."""
    passed: int = 0
    _listener: socket.socket = field(default_factory=socket.socket)
    _sockets: list[socket.socket] = field(default_factory=list)

    def open(self) -> str:
        """Listen; return host:port for the hospital."""
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        return f"localhost:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Close every connection, as a firewall that restarts does."""
        for each in self._sockets:
            each.close()
        self._sockets.clear()

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.broken:
                near.close()
                continue
            far = socket.create_connection(self.target)
            self._sockets += [near, far]
            for source, sink, up in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._pass, args=(source, sink, up), daemon=True
                ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        while True:
            try:
                content = bytearray(source.recv(16384))
                if not content:
                    sink.close()
                    return
                time.sleep(self.delay_s + len(content) / self.bytes_per_s)
                while self.broken:
                    time.sleep(0.1)
                if up:
                    self.passed += len(content)
                    if self.flip_after is not None and self.passed > self.flip_after:
                        content[len(content) // 2] ^= 1
                        self.flip_after = None
                sink.sendall(content)
            except OSError:
                return


@pytest.fixture
def links() -> Iterator[Callable[[tuple[str, int]], Link]]:
    """Return what opens a link to a target; all are closed with the test."""
    opened: list[Link] = []

    def make(target: tuple[str, int]) -> Link:
        link = Link(target)
        opened.append(link)
        return link

    yield make
    for each in opened:
        each.close()


def _silent(line: str) -> None:
    """Say nothing."""
