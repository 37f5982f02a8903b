"""The hospital's identity in its consortium: two private keys, certificate and kit.

The private keys are made here and never leave. `request.json` carries the public node
key and a certificate request to the administrator, who returns the kit: the
consortium's authority and the hospital's certificate.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from pydantic import Field

from fedgex.client.settings import SERVER_PATTERN, SiteSettings
from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.settings import NAME_PATTERN, Settings
from fedgex.common.system.files import read_json, write_atomic
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.signed import sign

AUDIT = "audit.jsonl"
"""The hospital's audit log, in its state directory."""


class Request(SiteRequest):
    """`request.json`: what a hospital sends to be admitted."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `request.json`.

        Raises
        ------
        ConfigError
            If the file cannot be read or is no request.
        """
        return cls.read(read_json(path, "a hospital's request.json"), path.name)


class Kit(Settings):
    """`kit.json`: what the consortium's administrator returns for a request."""

    format: Literal[1] = 1
    consortium: str
    site: str = Field(pattern=NAME_PATTERN)
    server: str = Field(pattern=SERVER_PATTERN)
    """host:port, the only place that the hospital connects to."""
    authority: str
    """PEM of the consortium's certificate authority."""
    certificate: str
    """PEM of the hospital's certificate."""


@dataclass(frozen=True)
class Identity:
    """A hospital that has joined a consortium."""

    name: str
    consortium: str
    server: str
    """host:port."""
    key: pki.Key
    """Signs approvals and the hospital's part of receipts."""
    certificate: x509.Certificate
    authority: x509.Certificate
    node_key_path: Path
    """Private key of Flower's node authentication."""

    @classmethod
    def load(cls, state_dir: Path) -> Self:
        """Read the identity that `join` completed; expiry is not checked.

        Raises
        ------
        ConfigError
            If the hospital has not joined yet.
        TrustError
            If key and certificate do not belong together.
        """
        folder = state_dir / "identity"
        if not (folder / "kit.json").exists():
            raise ConfigError(
                f"{folder} holds no kit.json: this hospital has not joined a "
                "consortium. Send request.json to the administrator, then run "
                "fedgex-site join with the kit that comes back."
            )
        kit = Kit.read(read_json(folder / "kit.json", "a kit"), "kit.json")
        key = pki.load_key(folder / "site.key")
        certificate = pki.from_pem(kit.certificate)
        _belongs(certificate, key)
        return cls(
            name=kit.site,
            consortium=kit.consortium,
            server=kit.server,
            key=key,
            certificate=certificate,
            authority=pki.from_pem(kit.authority),
            node_key_path=folder / "node.key",
        )

    def sign(self, content: bytes) -> str:
        """Sign bytes with the hospital's key, base64."""
        return sign(self.key, content)


def create(settings: SiteSettings) -> Path:
    """Make both private keys and write the request for their certificates.

    The folder of the keys appears in one step, so that a call that was cut off can be
    repeated.

    Returns
    -------
    Path
        `request.json` in the state directory, to be sent to the administrator.

    Raises
    ------
    ConfigError
        If there are keys already; they are never overwritten.
    """
    folder = settings.state_dir / "identity"
    if folder.exists():
        raise ConfigError(
            f"{folder} exists: this hospital has its keys, and they are never "
            "overwritten. To make new ones, move the folder to a safe place first."
        )
    partial = folder.with_name("identity.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a call that was cut off
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial.mkdir(mode=0o700)
    key, node_key = pki.new_key(), pki.new_node_key()
    pki.save_key(key, partial / "site.key")
    pki.save_node_key(node_key, partial / "node.key")
    request = Request(
        name=settings.name,
        node_public_key=pki.public_ssh(node_key),
        certificate_request=pki.request(key, settings.name, "site"),
        version=version("fedgex"),
    )
    path = settings.state_dir / "request.json"
    write_atomic(path, request.to_json().encode(), mode=0o644)
    partial.rename(folder)
    return path


def join(settings: SiteSettings, kit: Path) -> Identity:
    """Install the kit for our request; can be repeated with a newer one.

    Raises
    ------
    ConfigError
        If there are no keys yet, or the file is no kit for this hospital.
    TrustError
        If the certificate is not for our key and name, or another authority than
        before signed it.
    """
    folder = settings.state_dir / "identity"
    if not folder.exists():
        raise ConfigError(
            f"{folder} does not exist: this hospital has no keys yet. Run "
            "fedgex-site init and send the request.json that it writes."
        )
    found = Kit.read(read_json(kit, "the administrator's kit"), kit.name)
    if found.site != settings.name:
        raise ConfigError(
            f'{kit.name} is for the hospital "{found.site}", and site.toml says '
            f'"{settings.name}". Ask the administrator for the right kit.'
        )
    if settings.server not in (None, found.server):
        raise ConfigError(
            f"{kit.name} names the server {found.server}, and site.toml says "
            f"{settings.server}. Ask the administrator which is right, and change "
            "site.toml if the kit is."
        )
    authority = pki.from_pem(found.authority)
    certificate = pki.from_pem(found.certificate)
    name = pki.verify(certificate, authority, "site")
    if name != settings.name:
        raise TrustError(
            f'{kit.name}: the certificate is for "{name}", and this hospital is '
            f'"{settings.name}". Ask the administrator to issue it again.'
        )
    _belongs(certificate, pki.load_key(folder / "site.key"))
    _same_authority(folder, authority)
    for file, text in (
        ("authority.crt", found.authority),
        ("site.crt", found.certificate),
        ("kit.json", found.model_dump_json(indent=2)),  # last: it completes joining
    ):
        write_atomic(folder / file, text.encode())
    Chain(settings.state_dir / AUDIT).append(
        "joined",
        consortium=found.consortium,
        authority=pki.fingerprint(authority),
        certificate=pki.fingerprint(certificate),
    )
    return Identity.load(settings.state_dir)


def _belongs(certificate: x509.Certificate, key: pki.Key) -> None:
    ours, found = pki.fingerprint(key.public_key()), pki.fingerprint(certificate)
    if ours != found:
        raise TrustError(
            f"the certificate is for the key {found[:16]}, and this hospital's is "
            f"{ours[:16]}; it answers another request. Send the present request.json "
            "and ask for a new kit."
        )


def _same_authority(folder: Path, authority: x509.Certificate) -> None:
    """Refuse a kit of another authority than before."""
    if not (folder / "authority.crt").exists():
        return
    before = pki.from_pem((folder / "authority.crt").read_text())
    if pki.fingerprint(before) != pki.fingerprint(authority):
        raise TrustError(
            f"the kit comes from the authority {pki.fingerprint(authority)[:16]}, and "
            f"this hospital joined {pki.fingerprint(before)[:16]}; expected the same. "
            "To join another consortium, set up another hospital folder with "
            "fedgex-site init."
        )
