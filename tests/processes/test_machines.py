"""A disk fills up, a clock jumps, packets get lost; the processes go on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping

import pytest

from .test_kills import SUPERNODE
from .troubles import DAY_S, Clock

pytestmark = pytest.mark.deployment

UNHEARD_S = 5.0
"""A node that is connected asks for work twice a second."""
NO_SPACE = "No space left on device"


def until_printed(served, name: str, text: str, before: int = 0) -> None:
    """Wait until server or hospital has printed a text more than so many times."""
    served.consortium.until(
        f"{name} prints {text!r}", lambda: served.log(name).count(text) > before
    )


def until_unheard(served, names: Iterable[str]) -> None:
    """Wait until nothing of some hospitals has reached the server for a while."""
    state = served.consortium.state
    nodes = json.loads((state / "nodes.json").read_text())
    last: dict[str, object] = {}
    since = time.monotonic()

    def unheard() -> bool:
        nonlocal last, since
        activity = json.loads((state / "activity.json").read_text())
        seen = {name: activity.get(str(nodes[name])) for name in names}
        if seen != last:
            last, since = seen, time.monotonic()
        return time.monotonic() - since > UNHEARD_S

    served.consortium.until("the server hears nothing of them", unheard)


def test_a_hospital_whose_disk_is_full_for_a_while_is_waited_for(served):
    if served.no_disks:
        pytest.skip(served.no_disks)
    consortium = served.consortium
    name = consortium.sites[0]

    def said() -> int:
        events = consortium.events(served.run)
        return sum(event.get("reason") == "FX-SITE-009" for event in events)

    def disturb() -> None:
        with served.disks[name].full():
            consortium.until("it says that its disk is full", lambda: said() > 0)
            before = said()
            served.kill_child(name, SUPERNODE)
            consortium.until("it says so again", lambda: said() > before)
            printed = served.log(name).count(NO_SPACE)
            served.kill(name)
            until_printed(served, name, NO_SPACE, printed)

    served.survives(disturb)


def test_a_server_whose_disk_was_full_says_so_and_the_run_goes_on(served):
    if served.no_disks:
        pytest.skip(served.no_disks)
    consortium = served.consortium

    def disturb() -> None:
        reached, printed = served.committed(), served.log("server").count(NO_SPACE)
        with served.disks["server"].full():
            until_printed(served, "server", NO_SPACE, printed)
            printed = served.log("server").count(NO_SPACE)
            served.kill("server")
            until_printed(served, "server", NO_SPACE, printed)
        consortium.until(
            "the run goes on, or has failed",
            lambda: (
                consortium.state_of(served.run) == "failed"
                or served.committed() > reached
            ),
        )
        # Whether the failure could be written down is a matter of bytes.
        if consortium.state_of(served.run) == "failed":
            reason = consortium.events(served.run)[-1]["reason"]
            assert f"{NO_SPACE}. Free space on that disk" in reason
            served.resume(served.run)

    served.survives(disturb)


@pytest.fixture(scope="module")
def clocks(served) -> Iterator[Mapping[str, Clock]]:
    """Start one hospital and the server under clocks that jump.

    Such a process is slow: no test of another module has one.
    """
    if served.no_clocks:
        pytest.skip(served.no_clocks)
    moved = {name: clock.environment for name, clock in served.clocks.items()}
    served.survives(lambda: served.restart(moved))
    yield served.clocks
    served.survives(lambda: served.restart({name: {} for name in moved}))


@pytest.mark.parametrize("whose", ["hospital", "server"])
def test_a_clock_that_jumps_a_day_ahead_and_two_back_costs_time_alone(
    served, clocks, whose
):
    sites = served.consortium.sites
    name, unheard = (sites[0], sites[:1]) if whose == "hospital" else (whose, sites)

    def disturb() -> None:
        try:
            for days in (1, -1):
                clocks[name].jump(days * DAY_S)
                until_unheard(served, unheard)
        finally:
            clocks[name].jump(0)

    served.survives(disturb)


def test_one_lost_packet_in_twenty_costs_time_alone(served):
    road = served.road
    if road.why_not:
        pytest.skip(road.why_not)

    road.lossy = True
    try:
        served.survives()
    finally:
        road.lossy = False

    assert min(road.lost["up"], road.lost["down"]) > 0
