"""Child processes end with whoever started them."""

import os
import subprocess
import sys

import pytest

from fedgex.common.processes import PARENT_VARIABLE, child_environment

CHILD = """
import time
from fedgex.common.processes import end_with_parent
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
