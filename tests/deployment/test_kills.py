"""Processes die anywhere; the run ends in the same model as the undisturbed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from fedgex.common import chain

pytestmark = pytest.mark.deployment

SUPERLINK, APP = "fedgex.server.superlink", "fedgex.server.worker"
SUPERNODE, WORKER = "fedgex.client.supernode", "fedgex.client.worker"


def kill_child(served, name: str, module: str) -> None:
    (pid,) = served.consortium.children(name, module)
    os.kill(pid, signal.SIGKILL)


def kill_daemon(served, name: str) -> None:
    process = served.consortium.processes[name]
    process.kill()
    process.wait()


def test_a_run_over_the_network_ends_in_the_simulators_model(served):
    assert served.run("undisturbed") == "finished"
    assert served.consortium.digest("undisturbed") == served.simulated


DISTURBANCES: dict[str, Callable] = {
    "server-app": lambda s: kill_child(s, "server", APP),
    "superlink": lambda s: kill_child(s, "server", SUPERLINK),
    "supervisor": lambda s: kill_daemon(s, "server"),
    "supernode": lambda s: kill_child(s, s.consortium.sites[0], SUPERNODE),
    "site-worker": lambda s: kill_child(s, s.consortium.sites[1], WORKER),
    "site-daemon": lambda s: kill_daemon(s, s.consortium.sites[2]),
    "every-site": lambda s: [kill_daemon(s, name) for name in s.consortium.sites],
    "everything": lambda s: [kill_daemon(s, n) for n in s.consortium.processes],
}


@pytest.mark.parametrize("victim", DISTURBANCES)
def test_a_run_survives_the_death_of(served, victim):
    run = f"after-{victim}"
    ended = served.run(run, lambda: DISTURBANCES[victim](served))
    assert ended == "finished"
    assert served.consortium.digest(run) == served.simulated
    assert len(served.rounds(run)) == 3
    for name in served.consortium.sites:
        chain.verify(served.consortium.site_state(name) / "audit.jsonl")


def test_no_site_trained_a_round_twice_after_a_reply_was_stored(served):
    """Whatever was answered once is replayed; only what left no reply is computed."""
    for name in served.consortium.sites:
        lines = chain.read(served.consortium.site_state(name) / "audit.jsonl")
        stored: set[tuple[str, str, int]] = set()
        for line in lines:
            if line.get("type") != "train":
                continue
            about = (line["run"], line["phase"], line["round"])
            if line["event"] == "asked":
                assert about not in stored
            if line["event"] == "replayed":
                stored.add(about)
