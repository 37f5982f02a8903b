"""When the worker asks the SuperNode for a message."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from fedgex.client.service import worker


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return the ends of the pipe that the daemon hands on: to read and to write."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_the_worker_asks_as_soon_as_an_arrival_is_noted(pipe, monkeypatch):
    monkeypatch.setattr(worker, "ASK_S", 60.0)
    threading.Timer(0.2, os.write, (pipe[1], b"\n")).start()

    started = time.monotonic()
    worker._wait(pipe[0])

    assert time.monotonic() - started < 30


def test_arrivals_that_were_noted_before_count_once(pipe, monkeypatch):
    monkeypatch.setattr(worker, "ASK_S", 0.3)
    os.write(pipe[1], b"\n\n")

    worker._wait(pipe[0])
    started = time.monotonic()
    worker._wait(pipe[0])

    assert time.monotonic() - started >= 0.3


def test_the_worker_asks_once_in_a_while_where_none_is_noted(pipe, monkeypatch):
    monkeypatch.setattr(worker, "ASK_S", 0.3)

    worker._wait(pipe[0])
