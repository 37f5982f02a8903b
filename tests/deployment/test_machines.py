"""A disk fills up, a clock jumps, packets get lost; the processes go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedgex.common import chain
from fedgex.simulations.rehearsal import ADMINISTRATORS

pytestmark = pytest.mark.deployment

SUPERNODE = "fedgex.client.supernode"
DISK_MB = 64
BLOCK = bytes(2**20)
FULL_S = AWAY_S = 16.0
DAY_S = 86_400


@dataclass(frozen=True)
class Disk:
    """A small disk under a folder, real enough to be full to its last byte."""

    folder: Path

    def mount(self) -> str:
        """Put what the folder holds on a disk of its own; say why not, if so."""
        kept = self.folder.with_name(f"{self.folder.name}-before")
        self.folder.rename(kept)
        self.folder.mkdir(mode=0o700)
        options = f"size={DISK_MB}m,mode=700"
        command = ["mount", "-t", "tmpfs", "-o", options, "fedgex", self.folder]
        done = subprocess.run(command, capture_output=True, text=True)
        shutil.copytree(kept, self.folder, dirs_exist_ok=True)
        return f"no disk can be mounted: {done.stderr}" if done.returncode else ""

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], capture_output=True)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Leave no block free, whatever others remove, until the end."""
        filler, ending = self.folder / "filler", threading.Event()

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                while not ending.wait(0.02):
                    with suppress(OSError):
                        while True:
                            file.write(BLOCK)

        thread = threading.Thread(target=fill)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
            filler.unlink()


@dataclass(frozen=True)
class Clock:
    """The clock of whatever runs in its environment."""

    offset: Path

    @property
    def environment(self) -> Mapping[str, str]:
        found = find_spec("libfaketime")
        if found is None or found.origin is None:
            return {}
        vendored = Path(found.origin).parent / "vendor/libfaketime/src"
        return {
            "LD_PRELOAD": str(vendored / "libfaketime.so.1"),
            "FAKETIME_TIMESTAMP_FILE": str(self.offset),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def jump(self, offset_s: int) -> None:
        """Be so far from the right time from now on."""
        partial = self.offset.with_suffix(".partial")
        partial.write_text(f"{offset_s:+d}\n")
        partial.replace(self.offset)

    def why_not(self) -> str:
        """Say why processes do not go by this clock, if so."""
        if not self.environment:
            return "libfaketime is not installed"
        self.jump(DAY_S)
        environment = {**os.environ, **self.environment}
        done = subprocess.run(["date", "+%s"], env=environment, capture_output=True)
        self.jump(0)
        moved = abs(int(done.stdout) - time.time() - DAY_S) < 60
        return "" if moved else "libfaketime moves no clock here"


@dataclass(frozen=True)
class Machines:
    """A consortium that can be disturbed.

    The disks and clocks are those of the first hospital and the server; the second
    hospital is at the other end of the road.
    """

    served: Any
    road: Any
    disks: Mapping[str, Disk]
    clocks: Mapping[str, Clock]
    no_disks: str
    """Why no disk can be filled here, if so."""
    no_clocks: str
    """Why no clock can be moved here, if so."""

    @property
    def consortium(self) -> Any:
        return self.served.consortium


@pytest.fixture(scope="module")
def machines(tmp_path_factory, builder, serving, road) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    with ExitStack() as stack:
        consortium = builder(folder)
        victims = (consortium.sites[0], "server")
        clocks = {name: Clock(folder / f"{name}.clock") for name in victims}
        for clock in clocks.values():
            clock.jump(0)
        no_clocks = clocks["server"].why_not()
        consortium.environments = {n: c.environment for n, c in clocks.items()}
        if not road.why_not:
            consortium.host = consortium.interface = road.here
            consortium.prefixes = {consortium.sites[1]: road.prefix}
        consortium.reviving = True
        consortium.provision()
        states = consortium.site_state(victims[0]), consortium.state
        disks = dict(zip(victims, map(Disk, states), strict=True))
        no_disks = ""
        for disk in disks.values():
            stack.callback(disk.unmount)
            no_disks = no_disks or disk.mount()
        stack.enter_context(consortium)  # its processes end before the disks go
        simulated = consortium.simulate()
        consortium.start()
        contract = consortium.publish()
        consortium.approve(contract)
        served = serving(consortium, contract, simulated)
        yield Machines(served, road, disks, clocks, no_disks, no_clocks)


def pause(machines: Machines, seconds: float) -> None:
    """Let time pass, and start again what ends meanwhile, as systemd does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        machines.consortium.revive()
        time.sleep(1)


def kill_daemon(machines: Machines, name: str) -> None:
    machines.consortium.processes[name].kill()
    machines.consortium.processes[name].wait()


def same_bits(machines: Machines, run: str) -> bool:
    """Whether a run has the simulator's model; all audit logs must be whole."""
    consortium = machines.consortium
    chain.verify(consortium.state / "audit.jsonl")
    for name in consortium.sites:
        chain.verify(consortium.site_state(name) / "audit.jsonl")
    return consortium.digest(run) == machines.served.simulated


def test_a_hospital_whose_disk_is_full_for_a_while_is_waited_for(machines):
    if machines.no_disks:
        pytest.skip(machines.no_disks)
    consortium, run = machines.consortium, "full-hospital"
    name = consortium.sites[0]

    def says_so() -> bool:
        return "FX-SITE-009" in {e.get("reason") for e in consortium.events(run)}

    def disturb() -> None:
        with machines.disks[name].full():
            consortium.until("it says that its disk is full", says_so)
            for pid in consortium.children(name, SUPERNODE):
                os.kill(pid, signal.SIGKILL)
            pause(machines, FULL_S / 2)
            kill_daemon(machines, name)
            pause(machines, FULL_S / 2)

    assert machines.served.run(run, disturb) == "finished"
    assert same_bits(machines, run)


def test_a_server_whose_disk_was_full_says_so_and_the_run_goes_on(machines):
    if machines.no_disks:
        pytest.skip(machines.no_disks)
    consortium, run = machines.consortium, "full-server"

    def disturb() -> None:
        with machines.disks["server"].full():
            pause(machines, FULL_S / 2)
            kill_daemon(machines, "server")
            pause(machines, FULL_S / 2)

    ended = machines.served.run(run, disturb)
    if ended == "failed":  # whether that could be written down is a matter of bytes
        reason = consortium.events(run)[-1]["reason"]
        assert "No space left on device. Free space on that disk" in reason
        key = consortium.key(ADMINISTRATORS[0])
        consortium.admin("run", "resume", run, "--key", key)
        consortium.until("it goes on", lambda: consortium.state_of(run) != "failed")
        ended = consortium.wait(run)

    assert ended == "finished"
    assert same_bits(machines, run)


@pytest.mark.parametrize("whose", ["hospital", "server"])
def test_a_clock_that_jumps_a_day_ahead_and_two_back_costs_time_alone(machines, whose):
    if machines.no_clocks:
        pytest.skip(machines.no_clocks)
    name = machines.consortium.sites[0] if whose == "hospital" else whose
    run = f"clock-{whose}"

    def disturb() -> None:
        for days in (1, -1, 0):
            machines.clocks[name].jump(days * DAY_S)
            pause(machines, AWAY_S if days else 0)

    assert machines.served.run(run, disturb) == "finished"
    assert same_bits(machines, run)


def test_one_lost_packet_in_twenty_costs_time_alone(machines):
    road = machines.road
    if road.why_not:
        pytest.skip(road.why_not)

    road.lossy = True
    try:
        assert machines.served.run("lossy") == "finished"
    finally:
        road.lossy = False

    assert same_bits(machines, "lossy")
    assert min(road.lost["up"], road.lost["down"]) > 0
