"""Diagnose the connection from this hospital to the consortium's server.

The steps name, connection, TLS, server, clock, version and key each need the previous
one, so the first failure ends the check. Nothing changes at the server.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedgex.client.identity import Identity
from fedgex.client.service import flower
from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.trust import pki

TIMEOUT_S = 10.0
MAX_CLOCK_DIFFERENCE_S = 60.0
"""Flower accepts timestamps a few seconds ahead to five minutes behind."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Result of one step of the check."""

    name: str
    state: Literal["ok", "failed", "skipped"]
    found: str
    expected: str = ""
    action: str = ""
    """What to do; empty unless it failed."""

    def __str__(self) -> str:
        """Return the step as one line."""
        if self.state != "failed":
            return f"{self.state:<8}{self.name}: {self.found}"
        return (
            f"{self.state:<8}{self.name}: {self.found}; expected {self.expected}. "
            f"{self.action}"
        )


class _FailedError(FedgexError):
    def __init__(self, found: str, expected: str, action: str) -> None:
        super().__init__(found)
        self.found, self.expected, self.action = found, expected, action


@dataclass
class Check:
    """Check of the connection to one server."""

    server: str
    """host:port."""
    identity: Identity | None
    """None before the hospital has joined: only the first two steps are possible."""
    proxy: str | None = None
    """http(s)://host:port."""
    server_authority: Path | None = None
    """PEM of the hospital's own authority, where its proxy opens TLS."""

    def steps(self) -> Iterator[Step]:
        """Run the steps in order."""
        steps: dict[str, Callable[[], str]] = {
            "name": self._name,
            "connection": self._connection,
            "TLS": self._tls,
            "server": self._answer,
            "clock": self._clock,
            "version": self._version,
            "key": self._key,
        }
        failed = ""
        for name, step in steps.items():
            if failed:
                found = f'not tried, since "{failed}" failed'
                yield Step(name=name, state="skipped", found=found)
                continue
            if self.identity is None and name not in ("name", "connection"):
                found = "not tried: needs the kit; run fedgex-site join first"
                yield Step(name=name, state="skipped", found=found)
                continue
            try:
                try:
                    done = Step(name=name, state="ok", found=step())
                except OSError as error:
                    raise _FailedError(
                        f"the connection broke ({_reason(error)})",
                        "one that holds",
                        "Try again; if it persists, ask your network's administrators.",
                    ) from error
                yield done
            except _FailedError as error:
                failed = name
                yield Step(
                    name=name,
                    state="failed",
                    found=error.found,
                    expected=error.expected,
                    action=error.action,
                )

    @property
    def _server(self) -> tuple[str, int]:
        host, _, port = self.server.rpartition(":")
        return host, int(port)

    @property
    def _first(self) -> tuple[str, int]:
        """Return the address to connect to: the proxy's, or the server's."""
        if self.proxy is None:
            return self._server
        url = urlsplit(self.proxy)
        return url.hostname or "", url.port or 0

    def _name(self) -> str:
        host, port = self._first
        whose = "the server" if self.proxy is None else "the proxy"
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise _FailedError(
                f'the name of {whose}, "{host}", has no address ({error.strerror})',
                "an address",
                "Check its spelling in "
                + ("the kit" if self.proxy is None else "site.toml (proxy)")
                + ", and that this machine's name server knows it."
                + ("" if self.proxy else " If the network has a proxy, set proxy."),
            ) from error
        return f"{host} is {found[0][4][0]}" + (" (proxy)" if self.proxy else "")

    def _connection(self) -> str:
        with self._connected():
            pass
        return self.server + (f" through {self.proxy}" if self.proxy else "")

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        """Yield a connection that reaches the server, through the proxy if any."""
        host, port = self._first
        try:
            connection = socket.create_connection((host, port), timeout=TIMEOUT_S)
        except OSError as error:
            what = _reason(error)
            raise _FailedError(
                f"no connection to {host}:{port} ({what})",
                "an open port",
                f"Ask your network's administrators to allow outbound TCP to "
                f"{host}:{port}, and the consortium whether its server runs."
                if self.proxy is None
                else "Check proxy in site.toml, and that the proxy runs.",
            ) from error
        with connection:
            if self.proxy is None:
                yield connection
                return
            if self.proxy.startswith("https:"):
                context = ssl.create_default_context()
                try:
                    connection = context.wrap_socket(connection, server_hostname=host)
                except OSError as error:
                    raise _FailedError(
                        f"no TLS with the proxy ({_reason(error)})",
                        "a proxy whose certificate this machine trusts",
                        "Most proxies want http:// here, which is their own protocol, "
                        "not the server's. Check proxy in site.toml.",
                    ) from error
            self._ask_proxy(connection)
            yield connection

    def _ask_proxy(self, connection: socket.socket) -> None:
        """Open a tunnel to the server through the proxy."""
        target = self.server.encode("ascii")
        try:
            connection.sendall(
                b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, target)
            )
            head = b""
            while b"\r\n\r\n" not in head and len(head) < 65536:
                part = connection.recv(4096)
                if not part:
                    break
                head += part
        except OSError as error:
            head = _reason(error).encode()
        line = head.split(b"\r\n", 1)[0].decode("latin-1")[:100]
        words = line.split(maxsplit=2)
        status = words[1] if len(words) > 1 and words[0].startswith("HTTP/") else ""
        if status == "200":
            return
        raise _FailedError(
            f'the proxy {self.proxy} did not connect us to {self.server}: "{line}"',
            "200",
            "The proxy wants a login; ask for a rule without one for this machine."
            if status == "407"
            else "Ask your network's administrators to allow CONNECT to "
            f"{self.server} for this machine.",
        )

    def _tls(self) -> str:
        host = self._server[0]
        with self._connected() as connection:
            try:
                with self._context().wrap_socket(
                    connection, server_hostname=host
                ) as tls:
                    found = f"{tls.version()}, certificate for {host}"
                    der = tls.getpeercert(binary_form=True)
            except ssl.SSLCertVerificationError as error:
                raise self._distrusted(error) from error
            except OSError as error:
                raise _FailedError(
                    f"{self.server} does not speak TLS ({_reason(error)})",
                    "a TLS server",
                    "Check host and port with the consortium; something else answers "
                    "there, or something on the way breaks TLS.",
                ) from error
        until = x509.load_der_x509_certificate(der or b"").not_valid_after_utc
        return f"{found}, valid until {until:%Y-%m-%d}"

    def _context(self) -> ssl.SSLContext:
        """Return a context that trusts the consortium and, if set, the hospital."""
        assert self.identity is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=pki.to_pem(self.identity.authority))
        if self.server_authority is not None:
            try:
                context.load_verify_locations(cafile=self.server_authority)
            except OSError as error:
                raise _FailedError(
                    f"{self.server_authority} cannot be used ({_reason(error)})",
                    "certificates in PEM",
                    "Check server_authority in site.toml.",
                ) from error
        return context

    def _distrusted(self, error: ssl.SSLCertVerificationError) -> _FailedError:
        """Explain why the server's certificate was refused."""
        host, shown = self._server[0], self._shown()
        here = f"this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        if error.verify_code in (_HOST_MISMATCH, _IP_MISMATCH):
            return _FailedError(
                f'the certificate is for {_hosts(shown)}, not for "{host}"',
                f'a certificate that names "{host}"',
                "Ask the consortium under which name its server is reached, or to "
                "issue its certificate for this name too.",
            )
        if error.verify_code == _EXPIRED:
            return _FailedError(
                f"the certificate expired on {shown.not_valid_after_utc:%Y-%m-%d}, and "
                + here,
                "a certificate in force",
                "Correct the clock if it is wrong; else ask the consortium to renew "
                "its server's certificate.",
            )
        if error.verify_code == _NOT_YET_VALID:
            return _FailedError(
                "the certificate is valid from "
                f"{shown.not_valid_before_utc:%Y-%m-%d %H:%M}, and {here}",
                "a certificate in force",
                "Correct the clock of this machine.",
            )
        if error.verify_code == _WRONG_PURPOSE:
            return _FailedError(
                f'"{_common_name(shown.subject)}" answers with a certificate that is '
                "not for servers",
                "the server's certificate",
                "Stop: something on the way poses as the server. Tell both "
                "administrators.",
            )
        return _FailedError(
            f'the certificate was issued by "{_common_name(shown.issuer)}", which is '
            f"not trusted here ({error.verify_message})",
            f"one of {self.identity.consortium if self.identity else 'the consortium'}"
            "'s authority",
            "If that is your hospital's own proxy, which opens TLS, set "
            "server_authority in site.toml to its authority's certificate. If not, "
            "stop: something on the way poses as the server. Tell both administrators.",
        )

    def _shown(self) -> x509.Certificate:
        """Return the server's certificate, unverified."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            self._connected() as connection,
            context.wrap_socket(connection, server_hostname=self._server[0]) as tls,
        ):
            return x509.load_der_x509_certificate(tls.getpeercert(True) or b"")

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        with httpx.Client(
            base_url=f"https://{self.server}",
            verify=self._context(),
            proxy=self.proxy,
            trust_env=False,
            timeout=TIMEOUT_S,
        ) as client:
            try:
                yield client
            except httpx.HTTPError as error:
                raise _FailedError(
                    f"no answer ({type(error).__name__}: {error})",
                    "an answer over HTTPS",
                    "Try again; if it persists, ask the consortium whether its server "
                    "is well.",
                ) from error

    def _health(self) -> httpx.Response:
        with self._client() as client:
            return client.get("/health")

    def _answer(self) -> str:
        response = self._health()
        if response.status_code != httpx.codes.OK:
            raise _FailedError(
                f"GET /health was answered with {response.status_code}",
                "200",
                "Something else answers at this address, or the server is not well; "
                "check host and port with the consortium.",
            )
        return "it is well"

    def _clock(self) -> str:
        response = self._health()
        try:
            theirs = parsedate_to_datetime(response.headers["date"])
        except (KeyError, ValueError) as error:
            raise _FailedError(
                "the server sent no time",
                "a Date header",
                "A proxy on the way removes it; ask your network's administrators.",
            ) from error
        apart = (datetime.now(UTC) - theirs).total_seconds()
        if abs(apart) > MAX_CLOCK_DIFFERENCE_S:
            raise _FailedError(
                f"this machine's clock is {abs(apart):.0f} s "
                f"{'ahead of' if apart > 0 else 'behind'} the server's",
                f"at most {MAX_CLOCK_DIFFERENCE_S:.0f} s",
                "Correct this machine's clock (NTP); if it is right, tell the "
                "consortium.",
            )
        return f"{abs(apart):.0f} s apart"

    def _version(self) -> str:
        code = self._probe()
        installed = f"Flower {version('flwr')} and fedgex {version('fedgex')}"
        if code == flower.OTHER_RELEASE:
            raise _FailedError(
                f"the server refuses {installed}",
                "the release that the server runs",
                "Ask the consortium which release of fedgex it runs, and install it.",
            )
        if code not in (
            flower.WRONG_INTERVAL,
            flower.NOT_ACTIVATED,
            httpx.codes.UNAUTHORIZED,
        ):
            raise _FailedError(
                f"a signed request was answered with {code}",
                "an answer of Flower's fleet interface",
                "If a proxy is on the way, it must let POST with binary content pass; "
                "else ask the consortium whether its server is well.",
            )
        return f"{installed} are accepted; a contract names its own release"

    def _key(self) -> str:
        code = self._probe()
        if code == flower.WRONG_INTERVAL:
            return "the server knows this hospital's node key"
        raise _FailedError(
            f"the server does not accept this hospital's node key ({code})",
            "a registered key",
            "Ask the consortium whether this hospital was added with its present "
            "request.json, and not revoked since.",
        )

    def _probe(self) -> int:
        """Return the code that a signed request is refused with, see `flower.probe`."""
        assert self.identity is not None
        content, headers = flower.probe(_node_key(self.identity.node_key_path))
        with self._client() as client:
            response = client.post(
                flower.ACTIVATE_PATH, content=content, headers=headers
            )
        return flower.error_code(response)


_NOT_YET_VALID, _EXPIRED, _WRONG_PURPOSE, _HOST_MISMATCH, _IP_MISMATCH = (
    9,
    10,
    26,
    62,
    64,
)
"""X509_V_ERR_* of OpenSSL."""


def _node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read; expected the node key.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: is not an EC key; expected the node key.")
    return key


def _reason(error: OSError) -> str:
    """Return what the system says, without numbers and source lines."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_S:.0f} s"
    return error.strerror or type(error).__name__


def _hosts(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
    except x509.ExtensionNotFound:
        return "no host"
    return ", ".join(f'"{name.value}"' for name in names)


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()
