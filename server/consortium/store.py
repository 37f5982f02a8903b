"""A consortium on the server's disk: its authority, administrators and hospitals.

Everything lies under one folder, the state directory:

    consortium.toml           name, address, ports
    pki/                      keys and certificates of authority, server, coordinator;
                              revoked.crl, the authority's signed list for hospitals
    administrators/NAME.crt   who may sign contracts and orders
    sites/NAME.json           hospitals: public keys, certificate, state
    revoked.json              certificates that count no more, and their keys
    audit.jsonl               who was admitted and revoked, what was ordered

The authority's key may lie elsewhere (`authority_dir`), on a medium that is in place
only while members are admitted, renewed or revoked. Members are changed by `members`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from cryptography import x509
from pydantic import AwareDatetime, Field, model_validator

from fedgex.common import parsing
from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.settings import NAME_PATTERN, Settings
from fedgex.common.system import files
from fedgex.common.system.files import exclusive_lock, explained, write_atomic
from fedgex.common.trust import pki, revocation
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import annotated_toml

VALID_DAYS = 365
"""Of every certificate but the authority's."""
FOLDERS = (
    "pki",
    "administrators",
    "sites",
    "contracts",
    "orders/pending",
    "orders/done",
    "runs",
    "releases",
)


class NotFoundError(ConfigError):
    """What a command names does not exist."""


class ConsortiumSettings(Settings):
    """`consortium.toml`."""

    name: str = Field(pattern=NAME_PATTERN)
    """Lower-case letters, digits and hyphens."""
    host: str = Field(pattern=r"^[A-Za-z0-9.\-]+$")
    """Name or address by which hospitals reach the server; its certificate holds it."""
    port: int = Field(default=9092, ge=1, le=65535)
    """The one port that hospitals reach."""
    interface: str = "0.0.0.0"
    """Address of this machine on which that port listens; 0.0.0.0 means all."""
    control_port: int = Field(default=9093, ge=1, le=65535)
    """Loopback only: Flower's control interface, for the supervisor."""
    health_port: int = Field(default=9094, ge=1, le=65535)
    """Loopback only: Flower's gRPC health service."""
    metrics_port: int = Field(default=9095, ge=1, le=65535)
    """Loopback only: Prometheus metrics."""
    signatures: int = Field(default=1, ge=1)
    """Administrators who must sign a contract before a hospital takes it. Hospitals
    keep the number with which they joined."""
    authority_dir: str | None = Field(default=None, pattern=r"^/")
    """Folder of authority.key, such as a removable medium; without it, pki/ here."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = (self.port, self.control_port, self.health_port, self.metrics_port)
        if len(set(ports)) < len(ports):
            raise ValueError(
                "port, control_port, health_port, metrics_port must differ"
            )
        return self


class SiteEntry(Settings):
    """A hospital as the consortium knows it: `sites/NAME.json`."""

    name: str = Field(pattern=NAME_PATTERN)
    node_public_key: str
    """OpenSSH text, as Flower registers it."""
    certificate: str
    """PEM; under it the hospital signs approvals and receipts."""
    earlier: tuple[str, ...] = ()
    """Serial numbers, hex, of certificates over the same keys that were renewed."""
    certificate_request: str
    """PEM; from it the certificate is renewed."""
    state: Literal["active", "revoked"]
    added: datetime
    version: str
    """The fedgex that made the request."""
    reason: str = ""
    """Why it was revoked."""

    @property
    def expires(self) -> datetime:
        """End of the certificate, UTC."""
        return pki.from_pem(self.certificate).not_valid_after_utc


class Revocation(Settings):
    """A certificate that counts no more."""

    serial: str
    """Hexadecimal."""
    name: str
    role: pki.Role
    reason: str
    at: AwareDatetime
    keys: tuple[str, ...]
    """Fingerprints of the keys that went with it; they are never admitted again."""


class Consortium:
    """The state directory, opened. Every method reads the disk, and sees changes."""

    def __init__(self, folder: Path, authority_dir: Path | None = None) -> None:
        """Open the consortium in `folder`.

        Parameters
        ----------
        authority_dir
            Folder of the authority's key; without it, the one of the settings.

        Raises
        ------
        ConfigError
            If there is none, or its settings cannot be used.
        """
        path = folder / "consortium.toml"
        if not path.is_file():
            raise NotFoundError(
                f"{folder} holds no consortium.toml; expected the state directory of a "
                "consortium. Name it with --state or FEDGEX_STATE, or found one with "
                "fedgex-admin consortium init."
            )
        content = parsing.read_bytes(path, "the consortium's settings")
        values = parsing.toml_table(content, f"{path}:")
        self.folder = folder
        self.settings = ConsortiumSettings.read(values, str(path))
        self.audit = Chain(folder / "audit.jsonl")
        named = self.settings.authority_dir
        self.authority_dir = authority_dir or Path(named or folder / "pki")

    @classmethod
    def init(cls, folder: Path, settings: ConsortiumSettings) -> Self:
        """Found a consortium: its folders, its authority, the server's certificates.

        Raises
        ------
        ConfigError
            If the folder holds anything of a consortium already.
        """
        if any((folder / name).exists() for name in ("consortium.toml", "pki")):
            raise ConfigError(
                f"{folder} holds a consortium.toml or pki/ already, and an authority "
                "is never overwritten; choose another folder. If an earlier init was "
                "cut off before it wrote consortium.toml, remove pki/ first."
            )
        with explained(folder):
            for name in FOLDERS:
                (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        apart = settings.authority_dir
        key, authority = pki.new_authority(settings.name)
        if apart is not None:
            with explained(Path(apart)):
                Path(apart).mkdir(mode=0o700, exist_ok=True)
        pki.save_key(key, Path(apart or folder / "pki") / "authority.key")
        _write(folder / "pki" / "authority.crt", pki.to_pem(authority))
        for role in ("server", "coordinator"):
            pki.save_key(pki.new_key(), folder / "pki" / f"{role}.key")
        # Last, because it completes the foundation.
        _write(folder / "consortium.toml", annotated_toml.render(settings))
        consortium = cls(folder)
        consortium.audit.append(
            "consortium-founded",
            name=settings.name,
            authority=pki.fingerprint(authority),
        )
        consortium.renew()
        return consortium

    # ---- the coordinating side ----

    @property
    def authority(self) -> x509.Certificate:
        """The certificate that every other is verified against."""
        return self.certificate("authority")

    @property
    def authority_key(self) -> pki.Key:
        """Private key that signs certificates and revocations; it may be elsewhere.

        Raises
        ------
        TrustError
            If it is not there, or another authority's.
        """
        path = self.authority_dir / "authority.key"
        if not path.exists():
            raise TrustError(
                f"{path} does not exist: the authority's key is not here, and this "
                "command needs it. Put its medium in place, or name its folder with "
                "--authority-dir or FEDGEX_AUTHORITY_DIR."
            )
        key = pki.load_key(path)
        if pki.fingerprint(key.public_key()) != pki.fingerprint(self.authority):
            raise TrustError(
                f"{path} is the key of another authority; expected that of "
                f"{self.settings.name} ({pki.short(self.authority)}). Check the medium."
            )
        return key

    @property
    def server_key_path(self) -> Path:
        """Private key of TLS."""
        return self.folder / "pki" / "server.key"

    @property
    def server_certificate_path(self) -> Path:
        """Certificate of TLS, in PEM."""
        return self.folder / "pki" / "server.crt"

    @property
    def coordinator_key(self) -> pki.Key:
        """Private key that signs receipts."""
        return pki.load_key(self.folder / "pki" / "coordinator.key")

    @property
    def coordinator(self) -> x509.Certificate:
        """Certificate that receipts are checked with."""
        return self.certificate("coordinator")

    def renew(self) -> None:
        """Issue new certificates of server and coordinator over the keys they have.

        No kit changes: hospitals trust the authority. The list of revoked
        certificates is signed anew as well.

        Raises
        ------
        TrustError
            If the authority's key is not there.
        """
        key = self.authority_key
        self.audit.append("server-certificates-issued")
        name, folder = self.settings.name, self.folder / "pki"
        of: dict[pki.Role, list[str]] = {
            "server": [self.settings.host],
            "coordinator": [],
        }
        for role, hosts in of.items():
            asked = pki.request(pki.load_key(folder / f"{role}.key"), name, role)
            certificate = self.issue(asked, name, role, hosts)
            _write(folder / f"{role}.crt", pki.to_pem(certificate))
        self._sign_revocations(key)

    def is_served(self) -> bool:
        """Whether a server answers on the health port of this machine."""
        address = ("127.0.0.1", self.settings.health_port)
        try:
            with socket.create_connection(address, timeout=1):
                return True
        except OSError:
            return False

    # ---- administrators ----

    def administrators(self) -> dict[str, x509.Certificate]:
        """Return the administrators who are not revoked, by name."""
        revoked = self.revoked()
        found = {
            path.stem: pki.from_pem(path.read_text())
            for path in sorted((self.folder / "administrators").glob("*.crt"))
        }
        return {n: c for n, c in found.items() if c.serial_number not in revoked}

    def administrator(self, key: pki.Key) -> tuple[str, x509.Certificate]:
        """Return name and certificate of the administrator whose key this is.

        Raises
        ------
        TrustError
            If the key is no registered administrator's, or the certificate expired.
        """
        own = pki.fingerprint(key.public_key())
        for certificate in self.administrators().values():
            if pki.fingerprint(certificate) == own:
                name = pki.verify(
                    certificate,
                    self.authority,
                    "administrator",
                    revoked=self.revoked(),
                )
                return name, certificate
        raise TrustError(
            f"the key {own[:16]} is no administrator's of {self.settings.name}; "
            "expected one that fedgex-admin administrator add has admitted and nobody "
            "revoked. Check --key."
        )

    def signers(self, signed: Signed) -> tuple[str, ...]:
        """Return the administrators who signed a document, each once.

        Raises
        ------
        TrustError
            If any signature or certificate cannot be trusted, or its name is not
            registered here.
        """
        names = signed.signers(self.authority, "administrator", revoked=self.revoked())
        known = {n: pki.fingerprint(c) for n, c in self.administrators().items()}
        for each in signed.signatures:
            own = pki.fingerprint(pki.from_pem(each.certificate))
            if known.get(each.name) != own:
                raise TrustError(
                    f'the signature of "{each.name}" is by a key that is not '
                    f"registered here; expected one of {listed(known)}. Add the "
                    "administrator, or have the document signed by another."
                )
        return names

    # ---- hospitals ----

    def sites(self) -> dict[str, SiteEntry]:
        """Return all hospitals that were ever admitted, by name, revoked ones too."""
        paths = sorted((self.folder / "sites").glob("*.json"))
        entries = (SiteEntry.read(read_json(p, "a hospital"), str(p)) for p in paths)
        return {entry.name: entry for entry in entries}

    def site(self, name: str) -> SiteEntry:
        """Return one hospital.

        Raises
        ------
        NotFoundError
            If there is no such hospital.
        """
        known = self.sites()
        if name not in known:
            raise NotFoundError(
                f'there is no hospital "{name}"; expected one of {listed(known)}.'
            )
        return known[name]

    # ---- certificates ----

    def revocations(self) -> tuple[Revocation, ...]:
        """Return every revocation, oldest first."""
        path = self.folder / "revoked.json"
        if not path.exists():
            return ()
        values = read_json(path, "the revoked certificates")
        return tuple(Revocation.read(v, str(path)) for v in values["certificates"])

    def revoked(self) -> set[int]:
        """Return the serial numbers that count no more."""
        return {int(each.serial, 16) for each in self.revocations()}

    @property
    def revocation_list(self) -> str:
        """What the authority last signed of them, PEM; empty before it did."""
        path = self.folder / "pki" / "revoked.crl"
        return path.read_text() if path.exists() else ""

    def certificate(self, role: str) -> x509.Certificate:
        """Return the certificate of authority, server or coordinator."""
        return pki.from_pem((self.folder / "pki" / f"{role}.crt").read_text())

    def issue(
        self, csr: str, name: str, role: pki.Role, hosts: Sequence[str] = ()
    ) -> x509.Certificate:
        """Return a new certificate for a request that was found in order.

        Raises
        ------
        TrustError
            If the request is for another name or role, or the authority's key is not
            there.
        """
        return pki.issue(
            self.authority_key,
            self.authority,
            csr,
            name=name,
            role=role,
            days=VALID_DAYS,
            hosts=hosts,
        )

    def revoke(
        self,
        serials: Sequence[str],
        name: str,
        role: pki.Role,
        reason: str,
        keys: tuple[str, ...],
    ) -> None:
        """Add certificates to `revoked.json`, with the fingerprints of their keys.

        The authority signs the new list for the hospitals.

        Raises
        ------
        TrustError
            If the authority's key is not there; nothing is revoked then.
        """
        key = self.authority_key
        new = [
            Revocation(
                serial=serial,
                name=name,
                role=role,
                reason=reason,
                at=pki.now(),
                keys=keys,
            )
            for serial in serials
        ]
        every = [each.model_dump(mode="json") for each in (*self.revocations(), *new)]
        _write(
            self.folder / "revoked.json", json.dumps({"certificates": every}, indent=1)
        )
        self._sign_revocations(key)

    def _sign_revocations(self, key: pki.Key) -> None:
        of = [(int(each.serial, 16), each.at) for each in self.revocations()]
        signed = revocation.new_list(key, self.authority, of)
        _write(self.folder / "pki" / "revoked.crl", signed)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other commands from changing the state at the same time."""
        return exclusive_lock(self.folder / "registry.lock")


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ConfigError
        If the file is not there, or holds something else.
    """
    return files.read_json(
        path, expected, missing=NotFoundError, most=parsing.LONG_BYTES
    )


def listed(names: Iterable[str]) -> str:
    """Return names for a message."""
    return ", ".join(sorted(names)) or "none yet"


def _write(path: Path, text: str) -> None:
    write_atomic(path, text.encode())
