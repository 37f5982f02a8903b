"""A consortium of real processes, and a link between them that can be broken."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
    "name": "small",
    "minimum_cohort": 10,
    "cross_products": True,
    "linear_rank": 4,
    "pretraining": {"rounds": 2, "local_epochs": 1},
    "classification": {"rounds": 1, "classes": TYPES},
    "evaluation": {"rates": [0.5], "panels": [10]},
    "rounds": {"quorum": N_SITES},
}
"""Three sites and three rounds, a second each."""

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


def build(
    folder: Path,
    *,
    values: Mapping[str, Any] = SCENARIO,
    n_sites: int = N_SITES,
    n_holdouts: int = 1,
    patients_per_site: int = 30,
    **changes: Any,
) -> Rehearsal:
    """Return a consortium that is not provisioned yet."""
    data = folder / "data"
    new_data(
        data,
        n_sites=n_sites,
        n_holdouts=n_holdouts,
        patients_per_site=patients_per_site,
        n_genes=30,
        n_cancer_types=len(TYPES),
    )
    scenario = Scenario.read(values, "a test's scenario")
    study, sites = rehearsal.prepare(scenario, data, folder, n_sites, changes)
    return Rehearsal(folder=folder, study=study, sites=sites, told=_silent)


@dataclass(frozen=True)
class Served:
    """A consortium that serves, its approved contract, and the simulator's model."""

    consortium: Rehearsal
    contract: str
    simulated: str
    """SHA-256 of the model that the simulator makes of the same study."""

    def run(self, name: str, disturb: Callable[[], None] | None = None) -> str:
        """Launch a run, disturb it in its second round, and return how it ended."""
        self.consortium.launch(self.contract, name)
        if disturb is not None:
            self.until_round(name, 1)
            disturb()
        return self.consortium.wait(name)

    def until_round(self, run: str, number: int) -> None:
        """Wait until so many rounds of a run are finished, or it ended before."""
        self.consortium.until(
            f"{number} rounds of {run}",
            lambda: (
                len(self.rounds(run)) >= number
                or self.consortium.state_of(run) not in ("ordered", "running")
            ),
        )

    def rounds(self, run: str) -> list[dict[str, Any]]:
        """Return the finished rounds of a run, from its journal."""
        return [e for e in self.consortium.events(run) if e["event"] == "round"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provision, start and approve once for all tests of a file."""
    with build(tmp_path_factory.mktemp("consortium")) as consortium:
        consortium.reviving = True
        consortium.provision()
        simulated = consortium.simulate()
        consortium.start()
        contract = consortium.publish()
        consortium.approve(contract)
        yield Served(consortium, contract, simulated)


@dataclass
class Link:
    """A TCP proxy in user space: passes bytes on, late, slowly, changed, or not at all.

    One link stands for one hospital's way to the server.
    """

    target: tuple[str, int]
    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    silent: bool = False
    """Bytes vanish, and nobody is told."""
    one_way: bool = False
    """Bytes from the server vanish; those towards it arrive."""
    refusing: bool = False
    """New connections are closed at once."""
    flip_after: int | None = None
    """Change one byte once so many more have passed towards the server."""
    flipped: int = 0
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
            # Closing alone does not wake a thread that reads.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
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
            if self.refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(self.target)
            except OSError:  # the server is being started again
                near.close()
                continue
            self._sockets += [near, far]
            for source, sink, up in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._pass, args=(source, sink, up), daemon=True
                ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        try:
            while content := bytearray(source.recv(16384)):
                time.sleep(self.delay_s + len(content) / self.bytes_per_s)
                if self.silent or (self.one_way and not up):
                    continue
                if up and self.flip_after is not None:
                    self.flip_after -= len(content)
                    if self.flip_after <= 0:
                        content[len(content) // 2] ^= 1
                        self.flip_after = None
                        self.flipped += 1
                sink.sendall(content)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()


def _silent(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="session")
def builder() -> Callable[..., Rehearsal]:
    """Return what builds a consortium in a folder."""
    return build


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    """Return a link whose target is to be set."""
    made = Link(("127.0.0.1", 0))
    yield made
    made.close()


@pytest.fixture(scope="session")
def serving() -> type[Served]:
    """Return the class of a consortium that serves."""
    return Served
