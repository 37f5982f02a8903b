"""Proxies that the environment of a machine names, as on most hospital machines.

A recording proxy stands for one of them. What fedgex's own processes send each other on
loopback, with their secret, never goes to it; the way out is the one of site.toml.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedgex.client.settings import SiteSettings
from fedgex.common.errors import ConfigError
from fedgex.common.system.processes import child_environment
from fedgex.server.consortium.store import Consortium, ConsortiumSettings

from ..support.hospital import join

FIRST_BYTES = 4096
LIMIT_S = 60.0


@dataclass
class Listener:
    """A server that notes the first bytes of each connection and answers 502."""

    port: int
    heard: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def until_heard(self) -> bytes:
        until(lambda: bool(self.heard))
        return self.heard[0]


@contextmanager
def listening() -> Iterator[Listener]:
    """Listen on a free port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = Listener(server.getsockname()[1])

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                with connection:
                    listener.heard.append(connection.recv(FIRST_BYTES))
                    connection.sendall(
                        b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"
                    )

        threading.Thread(target=serve, daemon=True).start()
        yield listener
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy() -> Iterator[Listener]:
    """Return the proxy that the environment names."""
    with listening() as made:
        yield made


@pytest.fixture
def environment(proxy: Listener) -> dict[str, str]:
    """Return an environment that names the proxy in every way that a library knows."""
    names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    named = dict.fromkeys(names, proxy.url)
    return child_environment() | named | {k.upper(): v for k, v in named.items()}


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < end, f"not within {LIMIT_S:g} s"
        time.sleep(0.05)


@contextmanager
def running(
    environment: dict[str, str], *words: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module of ours as a process, and end it."""
    command = [sys.executable, "-P", "-m", *words]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def command(
    environment: dict[str, str], side: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of fedgex-site or fedgex-admin."""
    return subprocess.run(
        [sys.executable, "-c", f"from fedgex.{side}.cli import app; app()", *words],
        env=environment,
        capture_output=True,
        text=True,
    )


def lines_first(path: Path, text: str) -> None:
    path.write_text(text + path.read_text())


# ---- between processes of one machine ----


def test_the_supervisors_secret_does_not_go_to_a_proxy_of_the_environment(
    tmp_path, proxy, environment
):
    ports = [free_port() for _ in range(4)]
    settings = ConsortiumSettings(
        name="alliance",
        host="localhost",
        interface="127.0.0.1",
        port=ports[0],
        control_port=ports[1],
        health_port=ports[2],
        metrics_port=ports[3],
    )
    Consortium.init(tmp_path / "state", settings)
    state = ("--state", str(tmp_path / "state"))
    start = "import sys; from fedgex.server.cli import app; app(sys.argv[1:])"
    words = ["server", "start", *state]

    def serves() -> bool:
        return (
            command(environment, "server", "server", "status", *state).returncode == 0
        )

    process = subprocess.Popen(
        [sys.executable, "-c", start, *words],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: serves() or bool(proxy.heard))
    finally:
        process.terminate()
        process.wait(timeout=30)

    assert proxy.heard == []


def test_the_workers_secret_does_not_go_to_a_proxy_of_the_environment(
    tmp_path, proxy, environment
):
    site_toml, _ = join(tmp_path)
    with listening() as node:
        secret = {"FEDGEX_SUPERNODE_SECRET": "00" * 32}
        words = ("fedgex.client.service.worker", str(site_toml), str(node.port), "0")
        with running(environment | secret, *words) as worker:
            until(lambda: bool(node.heard or proxy.heard) or worker.poll() is not None)

    assert proxy.heard == []
    assert b"acquire-task" in node.heard[0]


def test_a_worker_goes_on_where_its_node_answers_with_an_error(tmp_path, environment):
    site_toml, _ = join(tmp_path)
    with listening() as node:
        secret = {"FEDGEX_SUPERNODE_SECRET": "00" * 32}
        words = ("fedgex.client.service.worker", str(site_toml), str(node.port), "0")
        with running(environment | secret, *words) as worker:
            node.until_heard()
            time.sleep(1.0)
            assert worker.poll() is None


# ---- the way out ----


def supernode(
    site_toml: Path, environment: dict[str, str], heard: Callable[[], bool]
) -> None:
    """Run a hospital's SuperNode until something is heard."""
    process = f'{{"site_toml": "{site_toml}", "port": {free_port()}, "arrivals": 1}}'
    secret = {"FEDGEX_SUPERNODE_SECRET": "00" * 32}
    words = ("fedgex.client.service.supernode", process)
    with running(environment | secret, *words):
        until(heard)


def check_connection(
    site_toml: Path, environment: dict[str, str], heard: Callable[[], bool]
) -> None:
    """Run `fedgex-site check-connection`."""
    command(environment, "client", "check-connection", str(site_toml))


WAYS = pytest.mark.parametrize("go", [supernode, check_connection])
"""Of the daemon's connection, and of the command that tries it."""


@WAYS
@pytest.mark.parametrize("bypass", [None, "*"])
def test_the_way_out_is_the_proxy_of_site_toml_whatever_the_environment_says(
    tmp_path, proxy, environment, go, bypass
):
    site_toml, _ = join(tmp_path)
    if bypass is not None:
        environment |= {"no_proxy": bypass, "NO_PROXY": bypass}
    with listening() as named:
        lines_first(site_toml, f'proxy = "{named.url}"\n')
        go(site_toml, environment, lambda: bool(named.heard or proxy.heard))

    assert named.heard[0].startswith(b"CONNECT fed.example.org:9092 ")
    assert proxy.heard == []


@WAYS
def test_a_server_on_this_machine_is_reached_through_the_proxy_of_site_toml(
    tmp_path, proxy, environment, go
):
    server = f"127.0.0.1:{free_port()}"
    site_toml, _ = join(tmp_path, server)
    with listening() as named:
        lines_first(site_toml, f'proxy = "{named.url}"\n')
        go(site_toml, environment, lambda: bool(named.heard or proxy.heard))

    assert named.heard[0].startswith(b"CONNECT " + server.encode())
    assert proxy.heard == []


@WAYS
def test_without_a_proxy_in_site_toml_the_way_out_is_direct(
    tmp_path, proxy, environment, go
):
    with listening() as server:
        site_toml, _ = join(tmp_path, f"127.0.0.1:{server.port}")
        go(site_toml, environment, lambda: bool(server.heard or proxy.heard))

    assert server.heard
    assert proxy.heard == []


# ---- the password ----


@pytest.mark.parametrize(
    "found",
    [
        "http://me:hunter2@proxy.example:3128",
        "http://me:hunter2 @proxy.example",
        "hunter2",
    ],
)
def test_a_refused_proxy_does_not_show_its_password(tmp_path, found):
    site_toml, _ = join(tmp_path)
    lines_first(site_toml, f'proxy = "{found}"\n')

    with pytest.raises(ConfigError, match=r"site\.toml: proxy: ") as refused:
        SiteSettings.load(site_toml)

    assert "hunter2" not in str(refused.value)
    assert "http(s)://host:port" in str(refused.value)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
