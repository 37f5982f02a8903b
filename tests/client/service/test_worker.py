"""When the worker asks the SuperNode for a message."""

import threading
import time

from fedgex.client.service import worker


def test_the_worker_asks_as_soon_as_an_arrival_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "ASK_S", 60.0)
    arrived = tmp_path / "arrived"
    seen = worker._changed(arrived)
    threading.Timer(0.2, arrived.touch).start()

    started = time.monotonic()
    worker._wait(arrived, seen)

    assert time.monotonic() - started < 30
    assert worker._changed(arrived) != seen


def test_the_worker_asks_once_in_a_while_where_none_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "ASK_S", 0.3)
    (tmp_path / "arrived").touch()

    worker._wait(tmp_path / "arrived", worker._changed(tmp_path / "arrived"))
