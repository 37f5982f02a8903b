"""A consortium on the server's disk: its authority, administrators and hospitals.

Everything lies under one folder, the state directory:

    consortium.toml           name, address, ports
    pki/                      keys and certificates of authority, server, coordinator
    administrators/NAME.crt   who may sign contracts and orders
    sites/NAME.json           hospitals: public keys, certificate, state
    revoked.json              certificates that count no more, and their keys
    audit.jsonl               who was admitted and revoked, what was ordered

Private keys of hospitals and administrators are made where they are used; only requests
come here, and a request is admitted under the fingerprint that its owner read out.
Each change is noted in the audit log before it is made.
"""

from __future__ import annotations

import json
import socket
import tomllib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import Field, model_validator

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.study import NAME_PATTERN, Settings
from fedgex.common.system import files
from fedgex.common.system.files import exclusive_lock, explained, write_atomic
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.enrolment import EnrolmentRequest, SiteRequest
from fedgex.server.consortium import annotated_toml

VALID_DAYS = 365
"""Of every certificate but the authority's."""
WARN_DAYS = 30
"""Certificates that expire sooner are warned of."""
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

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = (self.port, self.control_port, self.health_port, self.metrics_port)
        if len(set(ports)) < len(ports):
            raise ValueError(
                "port, control_port, health_port, metrics_port must differ"
            )
        return self


class AdministratorRequest(EnrolmentRequest):
    """An administrator's request, as `fedgex-admin administrator request` writes it."""


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
    at: datetime
    keys: tuple[str, ...]
    """Fingerprints of the keys that went with it; they are never admitted again."""


@dataclass(frozen=True)
class Expiry:
    """A certificate that ends soon, or has ended."""

    name: str
    role: str
    expires: datetime

    @property
    def days_left(self) -> int:
        """Whole days; negative once it has expired."""
        return (self.expires - _now()).days

    def __str__(self) -> str:
        """Return a warning with what to do."""
        when = "expired" if self.expires <= _now() else "expires"
        remedy = {
            "authority": "found a new consortium; it cannot be renewed",
            "server": "run fedgex-admin consortium renew and restart the server",
            "coordinator": "run fedgex-admin consortium renew and restart the server",
            "administrator": "revoke it and add a new request of that administrator",
            "site": f"run fedgex-admin site renew {self.name} and send the kit",
        }[self.role]
        return (
            f'the certificate of {self.role} "{self.name}" {when} on '
            f"{self.expires:%Y-%m-%d} ({self.days_left} days); {remedy}."
        )


class Consortium:
    """The state directory, opened. Every method reads the disk, and sees changes."""

    def __init__(self, folder: Path) -> None:
        """Open the consortium in `folder`.

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
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self.folder = folder
        self.settings = ConsortiumSettings.read(values, str(path))
        self.audit = Chain(folder / "audit.jsonl")

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
        key, authority = pki.new_authority(settings.name)
        pki.save_key(key, folder / "pki" / "authority.key")
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
        return self._certificate("authority")

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
        return self._certificate("coordinator")

    def renew(self) -> None:
        """Issue new certificates of server and coordinator over the keys they have.

        Nobody's kit changes: hospitals trust the authority.
        """
        self.audit.append("server-certificates-issued")
        name, folder = self.settings.name, self.folder / "pki"
        told: tuple[tuple[pki.Role, list[str]], ...] = (
            ("server", [self.settings.host]),
            ("coordinator", []),
        )
        for role, hosts in told:
            asked = pki.request(pki.load_key(folder / f"{role}.key"), name, role)
            certificate = self._issue(asked, name, role, hosts)
            _write(folder / f"{role}.crt", pki.to_pem(certificate))

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

    def signers(self, signed: pki.Signed) -> tuple[str, ...]:
        """Return the administrators who signed a document, each once.

        Raises
        ------
        TrustError
            If any signature or certificate cannot be trusted, or its name is not
            registered here.
        """
        names = signed.signers(self.authority, "administrator", revoked=self.revoked())
        known = self.administrators()
        for each in signed.signatures:
            serial = pki.from_pem(each.certificate).serial_number
            if each.name not in known or known[each.name].serial_number != serial:
                raise TrustError(
                    f'the signature of "{each.name}" is by a certificate that is not '
                    f"registered here; expected one of {_listed(known)}. Add the "
                    "administrator, or have the document signed by another."
                )
        return names

    def add_administrator(
        self, request: Path, fingerprint: str, *, name: str | None = None
    ) -> x509.Certificate:
        """Admit an administrator and return the new certificate.

        Parameters
        ----------
        request
            What `fedgex-admin administrator request` wrote.
        fingerprint
            As the administrator read it out.
        name
            Whom to expect; if absent, whoever the request names.

        Raises
        ------
        TrustError
            With everything that speaks against it.
        """
        asked = AdministratorRequest.read(
            read_json(request, "an administrator's request"), request.name
        )
        with self.locked():
            findings = self._findings(asked, fingerprint, name, "administrator")
            if asked.name in self.administrators():
                findings.append(
                    f'an administrator "{asked.name}" exists already; choose another '
                    "name, or revoke the present one first."
                )
            certificate = self._issue_or_refuse(asked, "administrator", findings)
            self.audit.append("administrator-added", name=asked.name)
            path = self.folder / "administrators" / f"{asked.name}.crt"
            _write(path, pki.to_pem(certificate))
        return certificate

    def revoke_administrator(self, name: str, reason: str) -> None:
        """Make an administrator's certificate count no more.

        Raises
        ------
        NotFoundError
            If there is no such administrator.
        """
        known = self.administrators()
        if name not in known:
            raise NotFoundError(
                f'there is no administrator "{name}"; expected one of {_listed(known)}.'
            )
        with self.locked():
            self.audit.append("administrator-revoked", name=name, reason=reason)
            serials, keys = [_serial(known[name])], (pki.fingerprint(known[name]),)
            self._revoke(serials, name, "administrator", reason, keys)

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
                f'there is no hospital "{name}"; expected one of {_listed(known)}.'
            )
        return known[name]

    def add_site(
        self, request: Path, fingerprint: str, *, name: str | None = None
    ) -> dict[str, Any]:
        """Admit a hospital and return its kit. A revoked one may come back so.

        Parameters
        ----------
        request
            The hospital's `request.json`.
        fingerprint
            As the hospital read it out.
        name
            Whom to expect; if absent, whoever the request names.

        Raises
        ------
        TrustError
            With everything that speaks against it.
        """
        asked = self._site_request(request)
        with self.locked():
            findings = self._site_findings(asked, fingerprint, name)
            present = self.sites().get(asked.name)
            if present is not None and present.state == "active":
                findings.append(
                    f'a hospital "{asked.name}" exists already; choose another name, '
                    "or give it new keys with fedgex-admin site rotate."
                )
            certificate = self._issue_or_refuse(asked, "site", findings)
            self.audit.append("site-added", site=asked.name)
            return self._enter(asked, certificate)

    def rotate_site(self, name: str, request: Path, fingerprint: str) -> dict[str, Any]:
        """Replace a hospital's keys and return its new kit; no other's changes.

        The old certificate is revoked first.

        Raises
        ------
        NotFoundError
            If there is no such hospital.
        TrustError
            With everything that speaks against the request.
        """
        asked = self._site_request(request)
        with self.locked():
            present = self._active(name)
            findings = self._site_findings(asked, fingerprint, name)
            certificate = self._issue_or_refuse(asked, "site", findings)
            self.audit.append("site-rotated", site=name)
            self._revoke_site(present, "rotated")
            return self._enter(asked, certificate)

    def renew_site(self, name: str) -> dict[str, Any]:
        """Return a kit with a new certificate over the keys that a hospital has.

        Raises
        ------
        NotFoundError
            If there is no such hospital.
        TrustError
            If it was revoked.
        """
        with self.locked():
            present = self._active(name)
            asked = SiteRequest(
                name=name,
                certificate_request=present.certificate_request,
                node_public_key=present.node_public_key,
                version=present.version,
            )
            certificate = self._issue(asked.certificate_request, name, "site")
            self.audit.append("site-renewed", site=name)
            old = _serial(pki.from_pem(present.certificate))
            return self._enter(asked, certificate, (*present.earlier, old))

    def revoke_site(self, name: str, reason: str) -> None:
        """Strike a hospital: its certificate and both keys count no more.

        Raises
        ------
        NotFoundError
            If there is no such hospital.
        TrustError
            If it was revoked before.
        """
        with self.locked():
            present = self._active(name)
            self.audit.append("site-revoked", site=name, reason=reason)
            self._revoke_site(present, reason)
            struck = present.model_copy(update={"state": "revoked", "reason": reason})
            self._write_site(struck)

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

    def expiries(self, within_days: int = WARN_DAYS) -> tuple[Expiry, ...]:
        """Return the certificates in force that end within so many days, soonest first.

        Those that have ended already are among them.
        """
        name = self.settings.name
        server = pki.from_pem(self.server_certificate_path.read_text())
        found = [
            Expiry(name, "authority", self.authority.not_valid_after_utc),
            Expiry(name, "server", server.not_valid_after_utc),
            Expiry(name, "coordinator", self.coordinator.not_valid_after_utc),
        ]
        found += [
            Expiry(who, "administrator", certificate.not_valid_after_utc)
            for who, certificate in self.administrators().items()
        ]
        found += [
            Expiry(site.name, "site", site.expires)
            for site in self.sites().values()
            if site.state == "active"
        ]
        soon = [each for each in found if each.days_left < within_days]
        return tuple(sorted(soon, key=lambda each: each.expires))

    # ---- helpers ----

    def _certificate(self, role: str) -> x509.Certificate:
        return pki.from_pem((self.folder / "pki" / f"{role}.crt").read_text())

    def _issue(
        self, csr: str, name: str, role: pki.Role, hosts: list[str] | None = None
    ) -> x509.Certificate:
        return pki.issue(
            pki.load_key(self.folder / "pki" / "authority.key"),
            self.authority,
            csr,
            name=name,
            role=role,
            days=VALID_DAYS,
            hosts=hosts or (),
        )

    def _issue_or_refuse(
        self, asked: EnrolmentRequest, role: pki.Role, findings: list[str]
    ) -> x509.Certificate:
        """Issue the certificate, or raise with all findings and the request's own."""
        try:
            certificate = self._issue(asked.certificate_request, asked.name, role)
        except TrustError as error:
            raise TrustError("\n".join([*findings, str(error)])) from error
        own, keys = pki.fingerprint(certificate), self._known_keys()
        if own in keys:
            findings = [*findings, _key_taken("signing key", keys[own])]
        if findings:
            raise TrustError("\n".join(findings))
        return certificate

    def _site_request(self, path: Path) -> SiteRequest:
        return SiteRequest.read(read_json(path, "a hospital's request.json"), path.name)

    def _site_findings(
        self, asked: SiteRequest, fingerprint: str, name: str | None
    ) -> list[str]:
        findings = self._findings(asked, fingerprint, name, "hospital")
        try:
            own = _node_key_fingerprint(asked.node_public_key)
        except TrustError as error:
            return [*findings, str(error)]
        keys = self._known_keys()
        if own in keys:
            findings.append(_key_taken("node key", keys[own]))
        return findings

    def _findings(
        self, asked: EnrolmentRequest, fingerprint: str, name: str | None, who: str
    ) -> list[str]:
        findings = []
        given = "".join(fingerprint.replace(":", "").split()).lower()
        if given != asked.fingerprint:
            findings.append(
                f"the request's fingerprint is {asked.fingerprint}, and {given} was "
                f"given; expected the one that the {who} reads out. Compare them again "
                "by telephone; if they differ still, the file was changed on its way: "
                "ask for it anew."
            )
        if name is not None and asked.name != name:
            findings.append(
                f'the request is of "{asked.name}"; expected "{name}". Check which '
                f"file was named, or ask the {who} for a request under that name."
            )
        return findings

    def _known_keys(self) -> dict[str, str]:
        """Return the fingerprint of every key here, past ones too, and whose it is."""
        keys = {
            key: f'{each.role} "{each.name}", revoked'
            for each in self.revocations()
            for key in each.keys
        }
        for role in ("authority", "server", "coordinator"):
            if (self.folder / "pki" / f"{role}.crt").exists():
                keys[pki.fingerprint(self._certificate(role))] = f"the {role}"
        for name, certificate in self.administrators().items():
            keys[pki.fingerprint(certificate)] = f'administrator "{name}"'
        for site in self.sites().values():
            for key in _keys(site):
                keys.setdefault(key, f'hospital "{site.name}"')
        return keys

    def _active(self, name: str) -> SiteEntry:
        present = self.site(name)
        if present.state == "revoked":
            raise TrustError(
                f'the hospital "{name}" was revoked ({present.reason}); expected an '
                "active one. To admit it again, add a request with new keys."
            )
        return present

    def _enter(
        self,
        asked: SiteRequest,
        certificate: x509.Certificate,
        earlier: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Write a hospital's entry and return its kit."""
        entry = SiteEntry(
            name=asked.name,
            node_public_key=asked.node_public_key,
            certificate=pki.to_pem(certificate),
            earlier=earlier,
            certificate_request=asked.certificate_request,
            state="active",
            added=_now(),
            version=asked.version,
        )
        self._write_site(entry)
        return {
            "format": 1,
            "consortium": self.settings.name,
            "site": entry.name,
            "server": f"{self.settings.host}:{self.settings.port}",
            "authority": pki.to_pem(self.authority),
            "certificate": entry.certificate,
        }

    def _write_site(self, entry: SiteEntry) -> None:
        path = self.folder / "sites" / f"{entry.name}.json"
        _write(path, entry.model_dump_json(indent=1))

    def _revoke_site(self, site: SiteEntry, reason: str) -> None:
        serials = [*site.earlier, _serial(pki.from_pem(site.certificate))]
        self._revoke(serials, site.name, "site", reason, _keys(site))

    def _revoke(
        self,
        serials: Sequence[str],
        name: str,
        role: pki.Role,
        reason: str,
        keys: tuple[str, ...],
    ) -> None:
        new = [
            Revocation(
                serial=serial, name=name, role=role, reason=reason, at=_now(), keys=keys
            )
            for serial in serials
        ]
        every = [each.model_dump(mode="json") for each in (*self.revocations(), *new)]
        _write(
            self.folder / "revoked.json", json.dumps({"certificates": every}, indent=1)
        )

    def locked(self) -> AbstractContextManager[None]:
        """Keep other commands from changing the state at the same time."""
        return exclusive_lock(self.folder / "registry.lock")


def new_administrator(name: str, folder: Path) -> tuple[Path, AdministratorRequest]:
    """Make an administrator's key and request in `folder`, where the key will stay.

    Returns
    -------
    tuple
        Path of the request, to be handed to who runs the server, and the request.

    Raises
    ------
    FedgexError
        If the name cannot be used or there is a key of that name already.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    key = pki.new_key()
    asked = AdministratorRequest.read(
        {
            "name": name,
            "certificate_request": pki.request(key, name, "administrator"),
        },
        "the request",
    )
    pki.save_key(key, folder / f"{name}.key")
    path = folder / f"{name}.request.json"
    write_atomic(path, asked.to_json().encode(), mode=0o644)
    return path, asked


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ConfigError
        If the file is not there, or holds something else.
    """
    return files.read_json(path, expected, missing=NotFoundError)


def _keys(site: SiteEntry) -> tuple[str, str]:
    return (
        pki.fingerprint(pki.from_pem(site.certificate)),
        _node_key_fingerprint(site.node_public_key),
    )


def _serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _node_key_fingerprint(text: str) -> str:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError(
            "the node key cannot be read; expected an OpenSSH public key. Ask for the "
            "request again."
        ) from error
    if not (
        isinstance(key, ec.EllipticCurvePublicKey)
        and isinstance(key.curve, ec.SECP384R1)
    ):
        raise TrustError(
            "the node key is of another kind; expected EC on P-384. Have the request "
            "made by fedgex-site init."
        )
    return pki.fingerprint(key)


def _key_taken(which: str, owner: str) -> str:
    return (
        f"the {which} is registered already, as that of {owner}; expected one that was "
        "never used here. Have new keys made, and ask for their request."
    )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none yet"


def _write(path: Path, text: str) -> None:
    write_atomic(path, text.encode())


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
