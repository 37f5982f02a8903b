"""Links between hospital and server are slow, broken, changed or intercepted."""

from __future__ import annotations

import pytest

from fedgex.simulations.rehearsal import RUN_LIMIT_S

from .consortium import OUTAGE_S

pytestmark = pytest.mark.deployment

MODEL_BYTES = 1_000_000
"""Less than a model and less than an update."""


def test_a_hospital_behind_an_intercepting_proxy_takes_part(served):
    served.survives()
    assert served.proxied
    link = served.consortium.servers[served.consortium.sites[1]]
    assert set(served.proxied) == {link}


def test_half_a_second_of_latency_and_a_megabit_change_nothing(served):
    link = served.links[served.consortium.sites[0]]

    def slow() -> None:
        link.passed.clear()
        link.delay_s, link.bytes_per_s = 0.25, 125_000.0
        try:
            served.consortium.until(
                "a model came down slowly, and an update went up",
                lambda: min(link.passed["up"], link.passed["down"]) > MODEL_BYTES,
                RUN_LIMIT_S,
            )
        finally:
            link.delay_s, link.bytes_per_s = 0.0, float("inf")

    served.survives(slow)


def test_a_changed_byte_on_the_way_is_noticed_and_sent_again(served):
    link = served.links[served.consortium.sites[0]]

    def flip() -> None:
        link.flip_after = 100_000
        served.consortium.until("a byte was changed", lambda: link.flipped == 1)

    served.survives(flip)


def test_links_that_come_back_within_the_deadline_cost_time_alone(served):
    """One refuses, one is silent and one is silent one way, in the same round."""
    refusing, silent, one_way = served.links.values()

    def away() -> None:
        refusing.refusing = silent.silent = one_way.one_way = True
        refusing.cut()
        served.pause(OUTAGE_S)
        refusing.refusing = silent.silent = one_way.one_way = False
        for link in served.links.values():
            link.cut()

    served.survives(away, RUN_LIMIT_S + OUTAGE_S)
