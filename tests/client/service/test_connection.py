"""The check of the way to the server: what its reader sees of all that breaks."""

import http.server
import json
import socket
import ssl
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedgex.client.identity import Identity
from fedgex.client.service.connection import Check, Step
from fedgex.common.trust import pki

KNOWN_KEY, UNKNOWN_KEY, OTHER_VERSION = 2003, 2004, 1001
"""What Flower 1.41 answers to a heartbeat of zero seconds, by whose key and version."""

Authority = tuple[pki.Key, x509.Certificate]
Issue = Callable[..., Path]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the consortium's server does, as far as the check asks."""

    behind = timedelta(0)
    code = KNOWN_KEY

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        public = b64decode(self.headers["flwr-public-key"])
        code = self.code if self._is_signed(public) else 0
        body = json.dumps({"code": code, "detail": "refused"}).encode()
        self.send_response(412)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _is_signed(self, public: bytes) -> bool:
        key = load_pem_public_key(public)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        try:
            key.verify(
                b64decode(self.headers["flwr-signature"]),
                self.headers["flwr-timestamp"].encode(),
                ec.ECDSA(hashes.SHA256()),
            )
        except InvalidSignature:
            return False
        return True

    def date_time_string(self, timestamp: float | None = None) -> str:
        return format_datetime(datetime.now(UTC) - self.behind, usegmt=True)

    def log_message(self, *args: object) -> None:
        pass


class Quiet(http.server.ThreadingHTTPServer):
    """Does not print what clients do that refuse its certificate."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def serving(certificate: Path | None, **behaviour: object) -> Iterator[int]:
    """Serve on a free port of the loopback interface; yield the port."""
    handler = type("Behaving", (Handler,), behaviour)
    with Quiet(("127.0.0.1", 0), handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def proxying(answer: bytes | None) -> Iterator[int]:
    """Be a proxy that answers CONNECT with `answer`, or, if None, connects."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    stop = threading.Event()

    def serve(client: socket.socket) -> None:
        with client:
            request = client.recv(4096).split()
            if answer is not None:
                client.sendall(answer)
                return
            host, port = request[1].decode().split(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pump, args=(server, client))
                back.start()
                pump(client, server)
                back.join()

    def accept() -> None:
        while not stop.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            client.settimeout(5)
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        listener.close()


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while part := source.recv(65536):
            sink.sendall(part)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture(scope="module")
def authority() -> Authority:
    return pki.new_authority("oncology")


@pytest.fixture
def identity(tmp_path: Path, authority: Authority) -> Identity:
    key, node_key = pki.new_key(), pki.new_node_key()
    pki.save_node_key(node_key, tmp_path / "node.key")
    request = pki.request(key, "north", "site")
    certificate = pki.issue(*authority, request, name="north", role="site", days=9)
    return Identity(
        name="north",
        consortium="oncology",
        server="localhost:9092",
        key=key,
        certificate=certificate,
        authority=authority[1],
        node_key_path=tmp_path / "node.key",
    )


@pytest.fixture
def issue(tmp_path: Path, authority: Authority) -> Issue:
    """Return what writes a server's key and certificate into one file."""

    def issue(
        by: Authority = authority, host: str = "localhost", days: int = 30
    ) -> Path:
        key = pki.new_key()
        made = pki.issue(
            *by,
            pki.request(key, "server", "server"),
            name="server",
            role="server",
            days=days,
            hosts=[host],
        )
        pki.save_key(key, tmp_path / "server.pem")
        with (tmp_path / "server.pem").open("a") as file:
            file.write(pki.to_pem(made))
        return tmp_path / "server.pem"

    return issue


def failure(check: Check) -> tuple[list[Step], Step]:
    """Return the steps that went well, and the first that did not."""
    steps = list(check.steps())
    states = [step.state for step in steps]
    at = states.index("failed")
    assert states == ["ok"] * at + ["failed"] + ["skipped"] * (len(steps) - at - 1)
    for step in steps[at + 1 :]:
        assert str(step).endswith(f'not tried, since "{steps[at].name}" failed')
    return steps[:at], steps[at]


def test_a_good_way_passes_every_step(identity: Identity, issue: Issue) -> None:
    with serving(issue()) as port:
        steps = list(Check(f"localhost:{port}", identity).steps())

    assert [(step.name, step.state) for step in steps] == [
        ("name", "ok"),
        ("connection", "ok"),
        ("TLS", "ok"),
        ("server", "ok"),
        ("clock", "ok"),
        ("version", "ok"),
        ("key", "ok"),
    ]
    assert str(steps[0]) == "ok      name: localhost is 127.0.0.1"
    assert str(steps[6]) == "ok      key: the server knows this hospital's node key"


def test_an_unknown_name_is_told_from_a_closed_port(identity: Identity) -> None:
    _, step = failure(Check("server.invalid:9092", identity))

    assert str(step).startswith(
        'failed  name: the name of the server, "server.invalid", has no address ('
    )
    assert "Check its spelling in the kit" in step.action


def test_a_closed_port_names_what_the_firewall_must_allow(identity: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    _, step = failure(Check(f"localhost:{port}", identity))

    assert str(step) == (
        f"failed  connection: no connection to localhost:{port} (Connection refused); "
        "expected an open port. Ask your network's administrators to allow outbound "
        f"TCP to localhost:{port}, and the consortium whether its server runs."
    )


def test_plain_http_is_refused(identity: Identity) -> None:
    with serving(None) as port:
        before, step = failure(Check(f"localhost:{port}", identity))

    assert [each.name for each in before] == ["name", "connection"]
    assert step.name == "TLS"
    assert step.found.startswith(f"localhost:{port} does not speak TLS (")
    assert step.expected == "a TLS server"


def test_a_certificate_for_another_host_names_both(
    identity: Identity, issue: Issue
) -> None:
    with serving(issue(host="fedgex.example.org")) as port:
        _, step = failure(Check(f"localhost:{port}", identity))

    assert str(step) == (
        'failed  TLS: the certificate is for "fedgex.example.org", not for '
        '"localhost"; expected a certificate that names "localhost". Ask the '
        "consortium under which name its server is reached, or to issue its "
        "certificate for this name too."
    )


def test_a_certificate_for_another_address_names_both(
    identity: Identity, issue: Issue
) -> None:
    with serving(issue()) as port:
        _, step = failure(Check(f"127.0.0.1:{port}", identity))

    assert step.found == 'the certificate is for "localhost", not for "127.0.0.1"'


def test_an_expired_certificate_says_when_and_what_the_clock_says(
    identity: Identity, issue: Issue
) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)

    with serving(issue(days=-1)) as port:
        _, step = failure(Check(f"localhost:{port}", identity))

    assert step.name == "TLS"
    assert step.found.startswith(
        f"the certificate expired on {yesterday:%Y-%m-%d}, and this machine's clock "
        f"says {datetime.now(UTC):%Y-%m-%d}"
    )
    assert "renew its server's certificate" in step.action


def test_a_certificate_of_tomorrow_points_at_the_clock(
    identity: Identity, issue: Issue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    with monkeypatch.context() as patch:
        patch.setattr(pki, "now", lambda: now + timedelta(days=3))
        certificate = issue()

    with serving(certificate) as port:
        _, step = failure(Check(f"localhost:{port}", identity))

    assert step.found.startswith(
        f"the certificate is valid from {now + timedelta(days=1):%Y-%m-%d %H:%M}"
    )
    assert step.action == "Correct the clock of this machine."


def test_an_unknown_authority_is_named_and_the_own_one_asked_for(
    identity: Identity, issue: Issue
) -> None:
    with serving(issue(by=pki.new_authority("Hospital inspection"))) as port:
        _, step = failure(Check(f"localhost:{port}", identity))

    assert step.found.startswith(
        'the certificate was issued by "Hospital inspection", which is not trusted here'
    )
    assert step.expected == "one of oncology's authority"
    assert "set server_authority in site.toml" in step.action


def test_a_proxy_that_opens_tls_passes_with_the_hospitals_own_authority(
    identity: Identity, issue: Issue, tmp_path: Path
) -> None:
    inspection = pki.new_authority("Hospital inspection")
    own = tmp_path / "hospital-ca.pem"
    own.write_text(pki.to_pem(inspection[1]))

    with serving(issue(by=inspection)) as port:
        steps = list(Check(f"localhost:{port}", identity, server_authority=own).steps())

    assert {step.state for step in steps} == {"ok"}


def test_a_document_certificate_cannot_pose_as_the_server(
    identity: Identity, authority: Authority, tmp_path: Path
) -> None:
    key = pki.new_key()
    request = pki.request(key, "south", "site")
    south = pki.issue(
        *authority, request, name="south", role="site", days=9, hosts=["localhost"]
    )
    pki.save_key(key, tmp_path / "south.pem")
    with (tmp_path / "south.pem").open("a") as file:
        file.write(pki.to_pem(south))

    with serving(tmp_path / "south.pem") as port:
        _, step = failure(Check(f"localhost:{port}", identity))

    assert str(step) == (
        'failed  TLS: "south" answers with a certificate that is not for servers; '
        "expected the server's certificate. Stop: something on the way poses as the "
        "server. Tell both administrators."
    )


@pytest.mark.parametrize(
    ("behind", "found"),
    [
        (timedelta(days=1), "this machine's clock is 86400 s ahead of the server's"),
        (-timedelta(days=1), "this machine's clock is 86400 s behind the server's"),
        (timedelta(seconds=90), "this machine's clock is 90 s ahead of the server's"),
    ],
)
def test_a_clock_that_is_off_says_by_how_much_and_which_way(
    identity: Identity, issue: Issue, behind: timedelta, found: str
) -> None:
    with serving(issue(), behind=behind) as port:
        before, step = failure(Check(f"localhost:{port}", identity))

    assert [each.name for each in before] == ["name", "connection", "TLS", "server"]
    off = int(found.split()[4])
    seen = int(step.found.split()[4])
    assert abs(seen - off) <= 2
    assert step.found.replace(str(seen), str(off)) == found
    assert step.expected == "at most 60 s"


def test_half_a_minute_is_close_enough(identity: Identity, issue: Issue) -> None:
    with serving(issue(), behind=timedelta(seconds=30)) as port:
        steps = list(Check(f"localhost:{port}", identity).steps())

    assert steps[4].state == "ok"


def test_another_version_of_flower_names_the_installed_ones(
    identity: Identity, issue: Issue
) -> None:
    with serving(issue(), code=OTHER_VERSION) as port:
        _, step = failure(Check(f"localhost:{port}", identity))

    assert step.name == "version"
    assert step.found.startswith("the server refuses Flower 1.41.0 and fedgex ")


def test_an_unregistered_key_is_the_last_thing_found(
    identity: Identity, issue: Issue
) -> None:
    with serving(issue(), code=UNKNOWN_KEY) as port:
        before, step = failure(Check(f"localhost:{port}", identity))

    assert len(before) == 6
    assert str(step) == (
        "failed  key: the server does not accept this hospital's node key (2004); "
        "expected a registered key. Ask the consortium whether this hospital was added "
        "with its present request.json, and not revoked since."
    )


def test_another_server_at_the_address_is_not_taken_for_ours(
    identity: Identity, issue: Issue
) -> None:
    def not_found(self: Handler) -> None:
        self.send_error(404)

    with serving(issue(), do_GET=not_found) as port:
        _, step = failure(Check(f"localhost:{port}", identity))

    assert step.name == "server"
    assert step.found == "GET /health was answered with 404"


def test_the_way_through_a_proxy_passes_every_step(
    identity: Identity, issue: Issue
) -> None:
    with serving(issue()) as port, proxying(None) as proxy:
        url = f"http://localhost:{proxy}"
        steps = list(Check(f"localhost:{port}", identity, proxy=url).steps())

    assert {step.state for step in steps} == {"ok"}
    assert steps[1].found == f"localhost:{port} through {url}"


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        (
            "HTTP/1.1 403 Forbidden",
            "Ask your network's administrators to allow CONNECT to "
            "fedgex.example.org:9092 for this machine.",
        ),
        (
            "HTTP/1.1 407 Proxy Authentication Required",
            "The proxy wants a login; ask for a rule without one for this machine.",
        ),
    ],
)
def test_a_proxy_that_refuses_is_quoted(
    identity: Identity, answer: str, action: str
) -> None:
    with proxying(f"{answer}\r\n\r\n".encode()) as proxy:
        url = f"http://localhost:{proxy}"
        before, step = failure(Check("fedgex.example.org:9092", identity, proxy=url))

    assert [each.name for each in before] == ["name"]
    assert step.found == (
        f'the proxy {url} did not connect us to fedgex.example.org:9092: "{answer}"'
    )
    assert step.action == action


def test_before_joining_only_the_network_is_tried(issue: Issue) -> None:
    with serving(issue()) as port:
        steps = list(Check(f"localhost:{port}", None).steps())

    assert [step.state for step in steps] == ["ok"] * 2 + ["skipped"] * 5
    assert steps[2].found == "not tried: needs the kit; run fedgex-site join first"
