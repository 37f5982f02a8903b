"""A released model in one file, with all that shows who made it and who released it.

The format stands in docs/bundle.md. A bundle is an uncompressed zip:

    authority.crt        certificate of the consortium's authority
    checkpoint/          the model's folder as the server wrote it
    contract.json        the contract that the run kept to, signed by administrators
    receipts/00001.json  receipt of each round, signed by the coordinator and the sites
    orders/NAME.json     the order to release exactly this model, signed by NAME
    release.json         what all this is, with the SHA-256 of every other member;
                         signed by the coordinator
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from pydantic import AwareDatetime

from fedgex.common.errors import CheckpointError, ConfigError, TrustError
from fedgex.common.models import checkpoint as checkpoints
from fedgex.common.settings import Digest, Name, Settings
from fedgex.common.system import files
from fedgex.common.trust import archive, pki, receipt
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.pinning import pinned_signers
from fedgex.common.trust.receipt import Receipt
from fedgex.common.trust.signed import Signed

SUFFIX = ".fedgex"

RELEASE, AUTHORITY, CONTRACT = "release.json", "authority.crt", "contract.json"


class Lineage(Settings):
    """Where a model comes from; all of it follows from contract and receipts."""

    study: str
    study_hash: Digest
    vocabulary_hash: Digest
    start: Digest
    """Digest of the parameters before the first round."""
    rounds: int
    sites: dict[Name, int]
    """Rounds to which each site contributed."""


class Release(Settings):
    """`release.json`: what the coordinator signs about a bundle."""

    format: Literal[1] = 1
    run: str
    contract: Digest
    """Hash of the contract's text."""
    model: Digest
    """SHA-256 of the checkpoint's manifest.json, as the administrators signed it."""
    last_receipt: Digest
    """Hash of the run's last receipt."""
    lineage: Lineage
    released: AwareDatetime
    """When, by the coordinator's clock."""
    members: dict[str, Digest]
    """SHA-256 of every other member."""
    coordinator: Digest
    """SHA-256 of the PEM of the certificate that this is signed under."""


class Consent(Settings):
    """An administrator's order to release a model (server/consortium/commands.py)."""

    kind: Literal["release"]
    token: str
    subject: str
    """The run."""
    administrator: Name
    at: AwareDatetime
    run: Literal[""] = ""
    model: Digest
    """SHA-256 of the manifest of the checkpoint that is to be released."""
    audit: Literal[""] | Digest = ""
    """SHA-256 of the audit report that the administrator relied on."""


@dataclass(frozen=True)
class Released:
    """A bundle that was verified."""

    release: Release
    contract: Contract
    administrators: tuple[str, ...]
    """Who ordered the release."""


@dataclass(frozen=True)
class Evidence:
    """What a bundle is made of, besides the coordinator's signature."""

    run: str
    checkpoint: Path
    """Folder of the run's last checkpoint."""
    contract: Signed
    receipts: Sequence[Signed]
    """Of every round, in order."""
    orders: Mapping[str, Signed]
    """By the name of the administrator."""
    authority: x509.Certificate
    released: datetime


def write(
    evidence: Evidence, path: Path, key: pki.Key, coordinator: x509.Certificate
) -> None:
    """Write a bundle and sign it; nothing about it is verified, see `verify`.

    The same members and signature give the same bytes. The file is on the disk when
    this returns, and a torn one stays if it is cut off: write it under another name.

    Raises
    ------
    FedgexError
        If it cannot be written.
    TrustError
        If receipts or contract cannot be read.
    """
    receipts = [Receipt.read_signed(each) for each in evidence.receipts]
    members: dict[str, Path | bytes] = {
        AUTHORITY: pki.to_pem(evidence.authority).encode(),
        CONTRACT: evidence.contract.to_json().encode(),
    }
    for number, signed in enumerate(evidence.receipts, start=1):
        members[_receipt(number)] = signed.to_json().encode()
    for name, signed in evidence.orders.items():
        members[_order(name)] = signed.to_json().encode()
    for file in evidence.checkpoint.iterdir():
        members[f"checkpoint/{file.name}"] = file
    release = Release(
        run=evidence.run,
        contract=evidence.contract.hash,
        model=checkpoints.digest(evidence.checkpoint / "manifest.json"),
        last_receipt=evidence.receipts[-1].hash,
        lineage=_lineage(Contract.read_signed(evidence.contract), receipts),
        released=evidence.released,
        members={name: _digest(content) for name, content in members.items()},
        coordinator=_certificate_digest(pki.to_pem(coordinator)),
    )
    signed = Signed(release.to_json()).signed_by(key, coordinator)
    members[RELEASE] = signed.to_json().encode()
    with files.explained(path):
        archive.pack(members, path)
        files.sync(path)


def verify(path: Path, authority: x509.Certificate) -> Released:
    """Return what a bundle is, once everything in it is verified.

    Verified: that its bytes are those of its release, which the coordinator signed;
    that administrators of this authority signed the contract, and as many as it demands
    ordered the release of exactly this model; that every round has its receipt, signed
    by the coordinator and the sites, in an order that ends with the parameters in the
    checkpoint; and that study, genes and sites are the contract's.

    Certificates must be valid at the time of which the bundle speaks, so that a model
    outlives them. Not verified: revocation, the coordinator's clock, and that the
    parameters follow from the updates, which nobody keeps.

    Parameters
    ----------
    authority
        Of the consortium, from another source than the bundle.

    Raises
    ------
    TrustError
        If any of it does not hold, to the last byte.
    """
    with opened(path, authority) as (released, _):
        return released


@contextmanager
def opened(path: Path, authority: x509.Certificate) -> Iterator[tuple[Released, Path]]:
    """Verify a bundle, see `verify`, and unpack it for as long as the context lasts.

    Yields
    ------
    tuple
        What it is, and the folder of its checkpoint.

    Raises
    ------
    TrustError
        As for `verify`.
    FedgexError
        If there is no room to unpack it.
    """
    with tempfile.TemporaryDirectory(prefix="fedgex-") as temporary:
        folder = Path(temporary) / "bundle"
        try:
            names = archive.unpack(path, folder)
            released = _verify(folder, names, authority)
        except (TrustError, CheckpointError, ConfigError) as error:
            raise TrustError(
                f"{path} is not used: {error} If it was damaged on its way, fetch it "
                "again; if not, ask the consortium's administrators."
            ) from error
        yield released, folder / "checkpoint"


def administrators(path: Path) -> tuple[str, ...]:
    """Return whose orders a bundle holds, by name; nothing is verified.

    Raises
    ------
    TrustError
        If the file is no bundle.
    """
    names = archive.members(path)
    return tuple(sorted(Path(n).stem for n in names if n.startswith("orders/")))


def _verify(folder: Path, names: set[str], authority: x509.Certificate) -> Released:
    """Verify an unpacked bundle, from what is signed inwards."""
    _expect(names, {AUTHORITY, CONTRACT, RELEASE, "checkpoint/manifest.json"})
    text = (folder / AUTHORITY).read_bytes()
    if text != pki.to_pem(authority).encode():
        raise TrustError(
            "it is of another consortium: its authority.crt differs from the authority "
            f"that is trusted here ({pki.fingerprint(authority)[:16]})."
        )
    release = _release(folder, authority)
    _verify_digests(folder, names, release)
    contract = _contract(folder, release, authority)
    receipts = _receipts(folder, names, release, contract, authority)
    consenting = _consenting(folder, names, release, contract, authority)
    if len(consenting) < (needed := contract.release.administrators):
        raise TrustError(
            f"{len(consenting)} administrators ordered the release "
            f"({', '.join(consenting) or 'nobody'}), the contract demands {needed}."
        )
    if release.lineage != _lineage(contract, receipts):
        raise TrustError("its lineage is not that of its contract and receipts.")
    _verify_checkpoint(folder, names, release, contract, receipts)
    return Released(release, contract, consenting)


def _expect(names: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - names):
        raise TrustError(f"it lacks {', '.join(missing[:3])}.")


def _release(folder: Path, authority: x509.Certificate) -> Release:
    """Return what the coordinator signed.

    Nothing above it holds the digest of this one file, so nothing may be left in it
    that can be written in two ways: bytes of text, base64 and certificate are compared.
    """
    signed = _signed(folder, RELEASE)
    release = Release.from_json(signed.content, RELEASE)
    if signed.signers(authority, "coordinator", at=release.released) == ():
        raise TrustError(f"{RELEASE} is not signed; expected the coordinator.")
    first, *more = signed.signatures
    if (
        more
        or release.to_json() != signed.content
        or release.coordinator != _certificate_digest(first.certificate)
        or not _is_canonical(first.signature)
    ):
        raise TrustError(
            f"{RELEASE} is not in its canonical form, with the one signature of the "
            "coordinator; it was changed."
        )
    return release


def _verify_digests(folder: Path, names: set[str], release: Release) -> None:
    members = release.members
    _expect(names, set(members))
    changed = sorted(
        name
        for name in names - {RELEASE}
        if members.get(name) != checkpoints.digest(folder / name)
    )
    if changed:
        raise TrustError(
            f"{', '.join(changed[:3])} {'differ' if len(changed) > 1 else 'differs'} "
            f"from what {RELEASE} says of it."
        )
    if members["checkpoint/manifest.json"] != release.model:
        raise TrustError("its checkpoint is another one than the released.")


def _contract(folder: Path, release: Release, authority: x509.Certificate) -> Contract:
    signed = _signed(folder, CONTRACT)
    began = [
        pki.from_pem(s.certificate).not_valid_before_utc for s in signed.signatures
    ]
    # A contract bears no time of signing: all its certificates must have been valid
    # together once.
    if not signed.signers(authority, "administrator", at=max(began, default=None)):
        raise TrustError(f"{CONTRACT} is not signed; expected an administrator.")
    if signed.hash != release.contract:
        raise TrustError(f"{CONTRACT} is another contract than {RELEASE} says.")
    contract = Contract.read_signed(signed)
    if not pinned_signers(signed, contract.administrator_keys, "the contract"):
        raise TrustError(f"{CONTRACT} is signed by no administrator whom it pins.")
    return contract


def _receipts(
    folder: Path,
    names: set[str],
    release: Release,
    contract: Contract,
    authority: x509.Certificate,
) -> list[Receipt]:
    """Return the receipts of all rounds, verified."""
    rounds = [
        (phase, number)
        for phase, training in contract.study.phases.items()
        for number in range(1, training.rounds + 1)
    ]
    expected = [_receipt(number) for number in range(1, len(rounds) + 1)]
    found = sorted(name for name in names if name.startswith("receipts/"))
    if found != expected:
        raise TrustError(
            f"it holds {len(found)} receipts, expected receipts 1 to {len(rounds)}, "
            "one for each of the contract's rounds."
        )
    signed = [_signed(folder, name) for name in found]
    secure = contract.study.secure_aggregation is not None
    receipt.verify_chain(signed, authority, contract.site_keys, secure=secure)
    receipts = [Receipt.read_signed(each) for each in signed]
    for place, (each, of_round) in enumerate(zip(receipts, rounds, strict=True), 1):
        contributed = {n for n, s in each.sites.items() if s.state == "contributed"}
        rule = contract.study.rounds
        if (
            (each.contract, each.run) != (release.contract, release.run)
            or (each.phase, each.round) != of_round
            or not set(each.sites) <= set(contract.sites)
            or len(contributed) < rule.quorum
            or not set(rule.mandatory_sites) <= contributed
        ):
            raise TrustError(
                f"receipt {place} is not of this run, or its round did not keep to the "
                "contract: phases, sites, quorum and mandatory sites."
            )
    if signed[-1].hash != release.last_receipt:
        raise TrustError(f"its last receipt is another one than {RELEASE} says.")
    return receipts


def _consenting(
    folder: Path,
    names: set[str],
    release: Release,
    contract: Contract,
    authority: x509.Certificate,
) -> tuple[str, ...]:
    """Return the administrators who ordered the release of this very model."""
    found = sorted(name for name in names if name.startswith("orders/"))
    for name in found:
        signed = _signed(folder, name)
        signed.signers(authority, "administrator", at=release.released)
        signers = pinned_signers(signed, contract.administrator_keys, "the contract")
        try:
            consent = Consent.from_json(signed.content, name)
        except ConfigError as error:
            raise TrustError(f"{name} is no order to release a model.") from error
        if (
            signers != (consent.administrator,)
            or name != _order(consent.administrator)
            or (consent.subject, consent.model) != (release.run, release.model)
        ):
            raise TrustError(
                f"{name} is not that administrator's order to release this model."
            )
        if contract.release.audit_max_auc is not None and not consent.audit:
            raise TrustError(f"{name} names no audit report, the contract demands one.")
    return tuple(Path(name).stem for name in found)


def _verify_checkpoint(
    folder: Path,
    names: set[str],
    release: Release,
    contract: Contract,
    receipts: Sequence[Receipt],
) -> None:
    """Compare the model with the manifest, the last receipt and the contract."""
    found = checkpoints.load(folder / "checkpoint")
    listed = checkpoints.read_manifest(folder / "checkpoint").files
    expected = {f"checkpoint/{name}" for name in (*listed, "manifest.json")}
    if {name for name in names if name.startswith("checkpoint/")} != expected:
        raise TrustError("its checkpoint holds other files than its manifest lists.")
    last = receipts[-1]
    differing = [
        what
        for what, fits in {
            "receipt": found.receipt is not None
            and Signed.from_json(found.receipt, "receipt.json").hash
            == release.last_receipt,
            "parameters": receipt.parameters_digest(found.parameters) == last.outgoing,
            "round": (found.phase, found.round) == (last.phase, last.round),
            "study": found.study.hash == contract.study.hash,
            "vocabulary": found.vocabulary.hash == contract.vocabulary_hash,
        }.items()
        if not fits
    ]
    if differing:
        raise TrustError(
            "its checkpoint differs from receipts or contract in "
            f"{', '.join(differing)}."
        )


def _lineage(contract: Contract, receipts: Sequence[Receipt]) -> Lineage:
    took_part = [
        name
        for each in receipts
        for name, site in each.sites.items()
        if site.state == "contributed"
    ]
    return Lineage(
        study=contract.study.name,
        study_hash=contract.study.hash,
        vocabulary_hash=contract.vocabulary_hash,
        start=receipts[0].incoming,
        rounds=len(receipts),
        sites={name: took_part.count(name) for name in sorted(contract.sites)},
    )


# ---- helpers ----


def _receipt(number: int) -> str:
    return f"receipts/{number:05d}.json"


def _order(administrator: str) -> str:
    return f"orders/{administrator}.json"


def _digest(content: Path | bytes) -> str:
    if isinstance(content, Path):
        return checkpoints.digest(content)
    return hashlib.sha256(content).hexdigest()


def _certificate_digest(pem: str) -> str:
    return hashlib.sha256(pem.encode()).hexdigest()


def _is_canonical(text: str) -> bool:
    """Return whether base64 is written in the one way in which an encoder writes it."""
    try:
        return base64.b64encode(base64.b64decode(text)).decode() == text
    except binascii.Error:
        return False


def _signed(folder: Path, name: str) -> Signed:
    text = (folder / name).read_bytes()
    signed = Signed.from_json(text, name)
    if signed.to_json().encode() != text:
        raise TrustError(f"{name} is not in canonical form, so its text was changed.")
    return signed
