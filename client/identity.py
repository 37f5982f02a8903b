"""The hospital's identity in its consortium: two private keys, certificate and kit.

The private keys are made here and never leave. `request.json` carries the public node
key and a certificate request to the administrator, who returns the kit: the
consortium's authority, the hospital's certificate, and the keys of the administrators
who may sign contracts. `identity.next` holds keys that are to replace the present ones,
until the kit for them is here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from pydantic import Field

from fedgex.client.settings import SERVER_PATTERN, SiteSettings
from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.settings import NAME_PATTERN, Digest, Name, Settings
from fedgex.common.system.files import read_json, write_atomic
from fedgex.common.trust import pki, revocation
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.pinning import PinError, Pins, pinned_signers, replacement
from fedgex.common.trust.signed import Signed, sign

AUDIT = "audit.jsonl"
"""The hospital's audit log, in its state directory."""
NOT_PINNED = "administrators are not pinned; join again with a new kit"
"""Warning at a hospital that joined before kits named administrators."""
REVOKED = "revoked.crl"
"""The newest list of revoked certificates; an empty file before the first."""


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
    administrators: dict[Name, Digest] = Field(default={})
    """Fingerprint of each administrator's key; only these sign contracts for us."""
    signatures: int = Field(default=1, ge=1)
    """How many of them must sign a contract."""
    revoked: str = ""
    """The authority's list of revoked certificates, see `revocation`."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a kit.

        Raises
        ------
        ConfigError
            If the file cannot be read or is no kit.
        """
        return cls.read(read_json(path, "the administrator's kit"), path.name)


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
    administrators: Pins = field(default_factory=dict)
    """Pinned keys of those who sign contracts; empty if we joined before there were
    such pins."""
    signatures: int = 1
    """How many of them must sign a contract."""
    revoked: frozenset[int] = frozenset()
    """Serial numbers of certificates that count no more, as far as we know."""
    revoked_at: datetime | None = None
    """Date of that list; None if there is none."""

    @classmethod
    def load(cls, state_dir: Path) -> Self:
        """Read the identity that `join` completed; expiry is not checked.

        Raises
        ------
        ConfigError
            If the hospital has not joined yet.
        TrustError
            If key and certificate do not belong together, authority.crt is not the
            kit's, or the list of revoked certificates was changed.
        """
        folder = state_dir / "identity"
        if not (folder / "kit.json").exists():
            raise ConfigError(
                f"{folder} holds no kit.json: this hospital has not joined a "
                "consortium. Send request.json to the administrator, then run "
                "fedgex-site join with the kit that comes back."
            )
        kit = Kit.load(folder / "kit.json")
        key = pki.load_key(folder / "site.key")
        certificate = pki.from_pem(kit.certificate)
        _belongs(certificate, key)
        authority, held = pki.from_pem(kit.authority), _revocations(folder)
        _same_authority(folder, authority)
        revoked = revocation.read_list(held, authority) if held else None
        return cls(
            name=kit.site,
            consortium=kit.consortium,
            server=kit.server,
            key=key,
            certificate=certificate,
            authority=authority,
            node_key_path=folder / "node.key",
            administrators=kit.administrators,
            signatures=kit.signatures,
            revoked=frozenset() if revoked is None else revocation.serials(revoked),
            revoked_at=None if revoked is None else revoked.last_update_utc,
        )

    @property
    def fingerprint(self) -> str:
        """Of the signing key, see `pki.fingerprint`."""
        return pki.fingerprint(self.certificate)

    def sign(self, content: bytes) -> str:
        """Sign bytes with the hospital's key, base64."""
        return sign(self.key, content)

    def counted(self, contract: Signed, pins: Pins) -> tuple[str, ...]:
        """Return the signers of a contract whom both it and our kit pin.

        Signatures and certificates are not verified; see `Signed.signers`.

        Parameters
        ----------
        pins
            The contract's `administrator_keys`.

        Raises
        ------
        PinError
            If they are fewer than our kit demands.
        """
        known = pinned_signers(contract, self.administrators, "our kit")
        signers = pinned_signers(contract, pins, "the contract")
        counted = tuple(name for name in signers if name in known)
        if len(counted) < self.signatures:
            raise PinError(
                f"it is signed by {', '.join(s.name for s in contract.signatures)}; "
                f"expected {described(self)}, whose keys the contract pins too. Have "
                "it signed by these; if administrators changed, ask for a new kit."
            )
        return counted


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
            "overwritten. To replace them, use fedgex-site rotate."
        )
    return _new_keys(settings, folder, lambda key: b"")


def rotate(settings: SiteSettings) -> Path:
    """Make keys that replace the present ones, and the request for their certificates.

    The present signing key states that the new one replaces it, so that contracts which
    pin it go on. The present keys are used until `join` has the kit for the new ones.

    Returns
    -------
    Path
        `request.json` in the state directory, to be sent to the administrator.

    Raises
    ------
    ConfigError
        If the hospital has not joined, or such keys wait for their kit already.
    """
    held, folder = Identity.load(settings.state_dir), _next(settings)
    if folder.exists():
        raise ConfigError(
            f"{folder} exists: new keys wait for their kit. Send request.json to the "
            "administrator and join with the kit, or remove the folder to begin again."
        )
    made = _new_keys(
        settings, folder, lambda key: replacement(held.key, held.certificate, key)
    )
    Chain(settings.state_dir / AUDIT).append("keys-made", replaced=held.fingerprint)
    return made


def _new_keys(
    settings: SiteSettings, folder: Path, replaces: Callable[[pki.Key], bytes]
) -> Path:
    partial = settings.state_dir / "identity.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a call that was cut off
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial.mkdir(mode=0o700)
    key, node_key = pki.new_key(), pki.new_node_key()
    pki.save_key(key, partial / "site.key")
    pki.save_node_key(node_key, partial / "node.key")
    request = SiteRequest(
        name=settings.name,
        node_public_key=pki.public_ssh(node_key),
        certificate_request=pki.request(key, settings.name, "site", replaces(key)),
        version=version("fedgex"),
    )
    path = settings.state_dir / "request.json"
    write_atomic(path, request.to_json().encode(), mode=0o644)
    partial.rename(folder)
    return path


def join(
    settings: SiteSettings, kit: Path, *, administrators_changed: bool = False
) -> Identity:
    """Install the kit for our request; can be repeated with a newer one.

    Parameters
    ----------
    administrators_changed
        The operator's word that other administrators, or another number of signatures,
        than those of the kit before are meant.

    Raises
    ------
    ConfigError
        If there are no keys yet, or the file is no kit for this hospital.
    TrustError
        If the certificate is not for our key and name, another authority than before
        signed it, or it names other administrators without the operator's word.
    """
    folder, waiting = settings.state_dir / "identity", _next(settings)
    if not folder.exists() and (waiting / "kit.json").exists():
        waiting.rename(folder)  # an earlier call was cut off
    if not folder.exists():
        raise ConfigError(
            f"{folder} does not exist: this hospital has no keys yet. Run "
            "fedgex-site init and send the request.json that it writes."
        )
    found = Kit.load(kit)
    if found.site != settings.name:
        raise ConfigError(
            f'{kit.name} is for the hospital "{found.site}", and site.toml says '
            f'"{settings.name}". Ask the administrator for the right kit.'
        )
    require_server(settings, found.server, kit.name)
    authority = pki.from_pem(found.authority)
    certificate = pki.from_pem(found.certificate)
    name = pki.verify(certificate, authority, "site")
    if name != settings.name:
        raise TrustError(
            f'{kit.name}: the certificate is for "{name}", and this hospital is '
            f'"{settings.name}". Ask the administrator to issue it again.'
        )
    _same_authority(folder, authority)
    _same_administrators(folder, found, changed=administrators_changed)
    revoked = _newest(folder, found.revoked, authority)
    into = folder
    if waiting.exists() and _fits(certificate, pki.load_key(waiting / "site.key")):
        into = waiting
    _belongs(certificate, pki.load_key(into / "site.key"))
    for file, text in (
        ("authority.crt", found.authority),
        ("site.crt", found.certificate),
        (REVOKED, revoked),
        ("kit.json", found.model_dump_json(indent=2)),  # last: it completes joining
    ):
        write_atomic(into / file, text.encode())
    if into is waiting:
        before = pki.fingerprint(pki.load_key(folder / "site.key").public_key())
        folder.rename(settings.state_dir / f"identity.replaced-{before[:16]}")
        waiting.rename(folder)
    Chain(settings.state_dir / AUDIT).append(
        "joined",
        consortium=found.consortium,
        authority=pki.fingerprint(authority),
        certificate=pki.fingerprint(certificate),
        administrators=found.administrators,
        signatures=found.signatures,
    )
    return Identity.load(settings.state_dir)


def require_server(settings: SiteSettings, server: str, source: str) -> None:
    """Refuse a kit's server that is another than that of site.toml.

    Raises
    ------
    ConfigError
        If site.toml names another one.
    """
    if settings.server not in (None, server):
        raise ConfigError(
            f"{source} names the server {server}, and site.toml says "
            f"{settings.server}. Ask the administrator which is right, and change "
            "site.toml if the kit is."
        )


def keep_revocations(state_dir: Path, text: str) -> None:
    """Keep a list of revoked certificates, if it is newer than the one we have.

    Raises
    ------
    TrustError
        If it is not signed by the authority, or forgets what an older list names.
    """
    folder = state_dir / "identity"
    authority = pki.from_pem(Kit.load(folder / "kit.json").authority)
    if revocation.newer(text, _revocations(folder), authority):
        listed = revocation.read_list(text, authority)
        write_atomic(folder / REVOKED, text.encode())
        Chain(state_dir / AUDIT).append(
            "revocations",
            of=listed.last_update_utc.isoformat(),
            certificates=len(revocation.serials(listed)),
        )


def _newest(folder: Path, text: str, authority: x509.Certificate) -> str:
    held = _revocations(folder)
    return text if text and revocation.newer(text, held, authority) else held


def _revocations(folder: Path) -> str:
    path = folder / REVOKED
    return path.read_text() if path.exists() else ""


def _next(settings: SiteSettings) -> Path:
    return settings.state_dir / "identity.next"


def _fits(certificate: x509.Certificate, key: pki.Key) -> bool:
    return pki.fingerprint(key.public_key()) == pki.fingerprint(certificate)


def _belongs(certificate: x509.Certificate, key: pki.Key) -> None:
    ours, found = pki.fingerprint(key.public_key()), pki.fingerprint(certificate)
    if not _fits(certificate, key):
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


def _same_administrators(folder: Path, kit: Kit, *, changed: bool) -> None:
    """Refuse other administrators than before, unless the operator wants them."""
    if not (folder / "kit.json").exists():
        return
    before = Kit.load(folder / "kit.json")
    same = (before.administrators, before.signatures) == (
        kit.administrators,
        kit.signatures,
    )
    if not before.administrators or same:
        return
    if not kit.administrators:
        raise TrustError(
            "the kit names no administrators, and this hospital has pinned "
            f"{described(before)}. Ask for a kit made by this release of fedgex."
        )
    if not changed:
        raise TrustError(
            f"the kit names other administrators than before. Before: "
            f"{described(before)}. In the kit: {described(kit)}. Have the "
            "administrators read their keys' fingerprints out by telephone; if these "
            "are right, join again with --administrators-changed."
        )


def described(pinned: Kit | Identity) -> str:
    """Return the pinned administrators and their number of signatures, in words."""
    if not pinned.administrators:
        return f"any administrator: {NOT_PINNED}"
    keys = (f"{name} {key[:16]}" for name, key in sorted(pinned.administrators.items()))
    return f"{pinned.signatures} of {', '.join(keys)}"
