"""Metrics are served on loopback, and files of lines are followed as they grow."""

import json
import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedgex.common.errors import ConfigError
from fedgex.common.system import metrics_server
from fedgex.common.system.metrics_server import Tail


class One(Collector):
    """Says one thing."""

    def collect(self) -> list[GaugeMetricFamily]:
        return [GaugeMetricFamily("one", "Always 1.", value=1)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_scrape_gets_what_the_collector_says_and_nothing_else() -> None:
    port = free_port()
    metrics_server.serve(port, One())

    reply = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)

    assert reply.text == "# HELP one Always 1.\n# TYPE one gauge\none 1.0\n"


def test_no_other_address_of_the_machine_is_listened_on() -> None:
    port = free_port()
    metrics_server.serve(port, One())

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(
            ConfigError, match=f"metrics_port {port} cannot be listened"
        ):
            metrics_server.serve(port, One())


def test_each_finished_line_is_given_once_and_a_torn_one_when_it_is_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    assert tail.new() == []

    path.write_text(json.dumps({"n": 1}) + "\n" + '{"n"')
    assert tail.new() == [{"n": 1}]
    assert tail.new() == []

    with path.open("a") as file:
        file.write(": 2}\n")
    assert tail.new() == [{"n": 2}]


def test_a_damaged_line_is_an_error_each_time(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("not JSON\n")
    tail = Tail(path)

    for _ in range(2):
        with pytest.raises(ValueError, match="Expecting value"):
            tail.new()
