"""Links between hospital and server are slow, broken, changed or intercepted."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedgex.common import pki
from fedgex.server.consortium import Consortium
from fedgex.simulations.rehearsal import RUN_LIMIT_S

pytestmark = pytest.mark.deployment

OUTAGE_S = float(os.environ.get("FEDGEX_OUTAGE_S", "60"))
"""How long a link is away; an hour is tried by hand."""
DEADLINE_S = 3600 + OUTAGE_S
"""Of a round: longer than its hospital is away, or the hospital would be late."""


@dataclass(frozen=True)
class Linked:
    """A consortium whose first hospital is behind a link, the second behind a proxy."""

    served: Any
    link: Any
    proxied: list[str]
    """Where the proxy was asked to connect to."""

    def run(self, name: str, disturb=None, limit_s: float = RUN_LIMIT_S) -> str:
        return self.served.run(name, disturb, limit_s)


@pytest.fixture(scope="module")
def linked(tmp_path_factory, builder, serving, link) -> Iterator[Linked]:
    folder = tmp_path_factory.mktemp("linked")
    with builder(folder, rounds={"deadline_s": DEADLINE_S}) as consortium:
        first, second, _ = consortium.sites
        consortium.servers[first] = link.open()
        consortium.reviving = True
        consortium.provision()
        port = Consortium(consortium.state).settings.port
        link.target = ("127.0.0.1", port)
        proxied: list[str] = []
        proxy = intercepting_proxy(folder / "proxy", proxied)
        site_toml = consortium.site_toml(second)
        lines = f'proxy = "{proxy}"\nserver_authority = "{folder}/proxy/ca.pem"\n'
        site_toml.write_text(lines + site_toml.read_text())
        simulated = consortium.simulate()
        consortium.start()
        contract = consortium.publish()
        consortium.approve(contract)
        yield Linked(serving(consortium, contract, simulated), link, proxied)


def intercepting_proxy(folder: Path, asked: list[str]) -> str:
    """Serve a CONNECT proxy that opens TLS under the hospital's own authority."""
    folder.mkdir()
    key, authority = pki.new_authority("hospital-it")
    own = pki.new_key()
    request = pki.request(own, "hospital-it", "server")
    certificate = pki.issue(
        key, authority, request,
        name="hospital-it", role="server", days=30, hosts=["localhost"],
    )  # fmt: skip
    (folder / "ca.pem").write_text(pki.to_pem(authority))
    (folder / "own.crt").write_text(pki.to_pem(certificate))
    pki.save_key(own, folder / "own.key")
    near_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    near_side.load_cert_chain(folder / "own.crt", folder / "own.key")
    far_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    far_side.check_hostname = False
    far_side.verify_mode = (
        ssl.CERT_NONE
    )  # its own business; the site verifies the proxy
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve(near: socket.socket) -> None:
        try:
            pass_on(near)
        except OSError:  # either side went away
            near.close()

    def pass_on(near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(4096)
        place = head.split()[1].decode()
        asked.append(place)
        host, _, port = place.partition(":")
        far = far_side.wrap_socket(socket.create_connection((host, int(port))))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        inner = near_side.wrap_socket(near, server_side=True)
        back = threading.Thread(target=copy, args=(far, inner), daemon=True)
        back.start()
        copy(inner, far)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while content := source.recv(16384):
                sink.sendall(content)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            threading.Thread(target=serve, args=(near,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hospital_behind_an_intercepting_proxy_takes_part(linked):
    assert linked.run("proxied") == "finished"
    assert linked.served.consortium.digest("proxied") == linked.served.simulated
    assert linked.proxied
    assert all(place.startswith("localhost:") for place in linked.proxied)


def test_half_a_second_of_latency_and_a_megabit_change_nothing(linked):
    linked.link.delay_s, linked.link.bytes_per_s = 0.25, 125_000.0
    try:
        assert linked.run("slow") == "finished"
    finally:
        linked.link.delay_s, linked.link.bytes_per_s = 0.0, float("inf")
    assert linked.served.consortium.digest("slow") == linked.served.simulated


def test_a_changed_byte_on_the_way_is_noticed_and_sent_again(linked):
    def flip() -> None:
        linked.link.flip_after = 100_000

    assert linked.run("flipped", flip) == "finished"
    assert linked.link.flipped == 1
    assert linked.served.consortium.digest("flipped") == linked.served.simulated


@pytest.mark.parametrize("how", ["refusing", "silent", "one-way"])
def test_a_link_that_comes_back_within_the_deadline_costs_time_alone(linked, how):
    fault = how.replace("-", "_")

    def away() -> None:
        setattr(linked.link, fault, True)
        if how == "refusing":
            linked.link.cut()
        time.sleep(OUTAGE_S)
        setattr(linked.link, fault, False)
        linked.link.cut()

    assert linked.run(how, away, RUN_LIMIT_S + OUTAGE_S) == "finished"
    assert linked.served.consortium.digest(how) == linked.served.simulated
