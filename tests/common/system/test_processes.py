"""Child processes end with whoever started them."""

import os
import subprocess
import sys

import pytest

from fedgex.common.system import processes
from fedgex.common.system.processes import PARENT_VARIABLE, IdlePause, child_environment

CHILD = """
import time
from fedgex.common.system.processes import end_with_parent
end_with_parent()
time.sleep({seconds})
"""


def exit_code(environment: dict[str, str], seconds: float) -> int:
    """Return how a child ended that would sleep for so long."""
    command = [sys.executable, "-c", CHILD.format(seconds=seconds)]
    return subprocess.run(command, env=environment, timeout=40).returncode


def test_a_child_whose_parent_died_while_it_was_starting_ends() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    assert exit_code({**os.environ, PARENT_VARIABLE: str(gone.pid)}, 30) == 1


def test_a_child_outlives_many_looks_at_a_parent_that_lives() -> None:
    assert exit_code(child_environment(), 1.5) == 0


@pytest.mark.parametrize("given", [{}, {PARENT_VARIABLE: "another's"}])
def test_a_child_of_ours_is_told_who_its_parent_is(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    assert child_environment()[PARENT_VARIABLE] == str(os.getpid())


def test_a_pause_grows_with_the_time_without_work_within_its_bounds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    pause = IdlePause(0.5, 3.0)

    found = []
    for idle in (0, 20, 60, 3600):
        now[0] = 100.0 + idle
        found.append(pause.seconds)
    pause.worked()

    assert found == [0.5, 1.0, 3.0, 3.0]
    assert pause.seconds == 0.5
