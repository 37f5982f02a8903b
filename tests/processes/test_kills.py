"""Processes die anywhere; every round ends in the same model as the undisturbed one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.deployment

SUPERLINK, APP = "fedgex.server.service.superlink", "fedgex.server.service.worker"
SUPERNODE, WORKER = "fedgex.client.service.supernode", "fedgex.client.service.worker"


def test_a_run_over_the_network_makes_the_simulators_models(served):
    served.survives()
    served.compare(served.run)


DISTURBANCES: dict[str, Callable] = {
    "server-app": lambda s: s.kill_child("server", APP),
    "superlink": lambda s: s.kill_child("server", SUPERLINK),
    "supervisor": lambda s: s.kill("server"),
    "supernode": lambda s: s.kill_child(s.consortium.sites[0], SUPERNODE),
    "site-worker": lambda s: s.kill_child(s.consortium.sites[1], WORKER),
    "site-daemon": lambda s: s.kill(s.consortium.sites[2]),
    "every-site": lambda s: s.kill(*s.consortium.sites),
    "everything": lambda s: s.kill(*s.consortium.processes),
}


@pytest.mark.parametrize("victim", DISTURBANCES)
def test_a_run_survives_the_death_of(served, victim):
    served.survives(lambda: DISTURBANCES[victim](served))
