"""A consortium of real processes, and ways between them that can be broken."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
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

    def run(
        self,
        name: str,
        disturb: Callable[[], None] | None = None,
        limit_s: float = rehearsal.RUN_LIMIT_S,
    ) -> str:
        """Launch a run, disturb it in its second round, and return how it ended.

        `limit_s` counts from the end of the disturbance.
        """
        self.consortium.launch(self.contract, name)
        if disturb is not None:
            self.until_round(name, 1)
            disturb()
        return self.consortium.wait(name, limit_s)

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


LOSS = 0.05
TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET_BYTES = 2**16
TCP = 6


@dataclass
class Road:
    """The only way between this machine and a network namespace: two TUN devices.

    What the kernel sends into one of them we write to the other, less what gets lost.
    """

    namespace: str
    here: str = "198.18.0.1"
    """This machine's address on it; both are set apart for tests of networks."""
    beyond: str = "198.18.0.2"
    up: int = -1
    """The namespace's device; what is read of it goes to the server."""
    down: int = -1
    """This machine's device."""
    lossy: bool = False
    """One packet in twenty of TCP gets lost from now on, in either direction."""
    lost: Counter[str] = field(default_factory=Counter)
    """How many did, "up" towards the server and "down" from it."""
    why_not: str = ""
    """Why there is no such road on this machine, if so."""
    _closing: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def prefix(self) -> list[str]:
        """Words before a command that is to run at the other end."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}"]

    def open(self) -> None:
        """Make namespace and devices, and pass packets on from now on.

        Raises
        ------
        OSError
            If this machine does not permit it; the error says what.
        """
        if taken := _ip("route", "show", "to", "root", "198.18.0.0/15"):
            raise OSError(f"its addresses are in use: {taken}")
        _ip("netns", "add", self.namespace)
        near, far = f"{self.namespace}-s", f"{self.namespace}-h"
        self.down, self.up = _tun(near), _tun(far)
        _ip("address", "add", self.here, "peer", self.beyond, "dev", near)
        _ip("link", "set", near, "up")
        _ip("link", "set", far, "netns", self.namespace)
        inside = ("-netns", self.namespace)
        _ip(*inside, "address", "add", self.beyond, "peer", self.here, "dev", far)
        for device in ("lo", far):
            _ip(*inside, "link", "set", device, "up")
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take everything down again, as far as it was made."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        for device in (self.up, self.down):
            if device >= 0:
                os.close(device)
        with contextlib.suppress(OSError):
            _ip("netns", "del", self.namespace)

    def _pass_on(self) -> None:
        chance = random.Random(1)
        ways = {self.up: ("up", self.down), self.down: ("down", self.up)}
        while not self._closing.is_set():
            for device in select.select([*ways], [], [], 0.2)[0]:
                way, other = ways[device]
                packet = os.read(device, PACKET_BYTES)
                is_tcp = packet[0] >> 4 == 4 and packet[9] == TCP
                if self.lossy and is_tcp and chance.random() < LOSS:
                    self.lost[way] += 1
                    continue
                with contextlib.suppress(OSError):  # a device is being taken down
                    os.write(other, packet)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _tun(name: str) -> int:
    """Make a device, which is there until its file is closed."""
    device = os.open(TUN, os.O_RDWR)
    try:
        wanted = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(device, TUNSETIFF, wanted)
    except OSError:
        os.close(device)
        raise
    return device


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


@pytest.fixture(scope="module")
def road() -> Iterator[Road]:
    """Return a road into a network namespace, or one that says why there is none."""
    made = Road(f"fedgex{os.getpid()}"[:13])
    try:
        made.open()
    except OSError as error:
        made.why_not = f"no network of our own can be made: {error}"
    yield made
    made.close()


@pytest.fixture(scope="session")
def serving() -> type[Served]:
    """Return the class of a consortium that serves."""
    return Served
