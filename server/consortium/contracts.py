"""Study contracts at the server: drafts, signatures, publication and sites' decisions.

    contracts/HASH.json           the signed contract
    contracts/HASH.answers.json   the decision that each hospital signed about it

A draft is a TOML file (`drafts`); its signatures are in `NAME.toml.signed.json` in its
folder.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from cryptography import x509
from pydantic import AwareDatetime

from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.settings import Settings
from fedgex.common.system.files import write_atomic
from fedgex.common.trust import pinning, pki
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.pinning import pinned_signers
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import commands
from fedgex.server.consortium.commands import Order
from fedgex.server.consortium.store import Consortium, NotFoundError, read_json

logger = logging.getLogger(__name__)

MIN_PREFIX = 6
"""Fewest characters of a hash that name a contract."""


class Answer(Settings):
    """A hospital's signed decision about a contract."""

    contract: str
    decision: Literal["approved", "rejected", "withdrawn"]
    by: str = ""
    at: AwareDatetime
    expires: date | None = None
    """Last day of an approval."""
    reason: str = ""
    runs: int | None = None
    """Runs that an approval permits; None for any number, as fedgex 0.1.0 sent it."""


@dataclass(frozen=True)
class Published:
    """A contract in the store."""

    hash: str
    contract: Contract
    signers: tuple[str, ...]
    signed: Signed


# ---- before publication ----


def sign(path: Path, key: pki.Key, certificate: x509.Certificate) -> Signed:
    """Add a signature to a draft, in the draft's file of signatures.

    Raises
    ------
    ConfigError
        If the draft is no contract.
    TrustError
        If it was changed since somebody else signed it, or the key is not the
        certificate's.
    """
    text = read_text(path)
    Contract.from_toml(text, str(path))
    kept, signed = signatures_path(path), Signed(text)
    if kept.exists():
        signed = Signed.from_json(read_text(kept), str(kept))
        if signed.content != text:
            names = ", ".join(each.name for each in signed.signatures)
            raise TrustError(
                f"{path} was changed after {names} signed it; expected the text that "
                f"{kept.name} holds. Restore it, or remove {kept.name} and have "
                "the new text signed by all."
            )
    signed = signed.signed_by(key, certificate)
    write_atomic(kept, signed.to_json().encode(), mode=0o644)
    return signed


def signatures_path(contract_toml: Path) -> Path:
    """Return the path of a draft's signatures."""
    return contract_toml.with_name(f"{contract_toml.name}.signed.json")


# ---- publication ----


def publish(consortium: Consortium, contract_toml: Path, key: pki.Key) -> Order:
    """Store a signed draft, and order its delivery to the sites.

    Publishing again adds signatures.

    Raises
    ------
    ConfigError
        If the contract expired, is for another version, or names hospitals that are
        not in the consortium; all of it at once.
    TrustError
        If it has fewer administrators' signatures than hospitals want, or an untrusted
        one.
    """
    path = signatures_path(contract_toml)
    if not path.exists():
        raise NotFoundError(
            f"{path} does not exist: {contract_toml.name} was not signed. Sign it with "
            "fedgex-admin study sign."
        )
    signed = Signed.from_json(read_text(path), str(path))
    if signed.content != read_text(contract_toml):
        raise TrustError(
            f"{contract_toml} differs from the text that was signed in {path.name}; "
            "restore it, or have it signed anew."
        )
    consortium.signers(signed)
    contract = Contract.read_signed(signed)
    signers = pinned_signers(signed, contract.administrator_keys, "the contract")
    if len(signers) < (needed := consortium.settings.signatures):
        raise TrustError(
            f"{path.name} bears the signatures of {', '.join(signers) or 'nobody'}; "
            f"hospitals want {needed} administrators whose keys it pins. Sign it with "
            "fedgex-admin study sign."
        )
    if findings := _unpublishable(consortium, contract):
        raise ConfigError("\n".join(findings))
    with consortium.locked():
        stored = _stored(consortium) / f"{signed.hash}.json"
        if stored.exists():
            before = Signed.from_json(read_text(stored), str(stored))
            signed = _merged(consortium, before, signed)
        consortium.audit.append("contract-stored", contract=signed.hash)
        write_atomic(stored, signed.to_json().encode(), point="contract")
    return commands.submit(consortium, "publish", signed.hash, key)


def published(consortium: Consortium) -> list[Published]:
    """Return the contracts of the store, by the names of their studies."""
    paths = _stored(consortium).glob("*.json")
    hashes = [path.stem for path in paths if not path.stem.endswith(".answers")]
    found = [load(consortium, each) for each in hashes]
    return sorted(found, key=lambda each: (each.contract.study.name, each.hash))


def find(consortium: Consortium, which: str) -> Published:
    """Return a contract by its hash, six or more characters of it, or its study's name.

    Raises
    ------
    NotFoundError
        If none fits, or more than one.
    """
    known = published(consortium)
    fit = [
        each
        for each in known
        if which == each.contract.study.name
        or (len(which) >= MIN_PREFIX and each.hash.startswith(which))
    ]
    if len(fit) != 1:
        names = ", ".join(f"{k.hash[:12]} ({k.contract.study.name})" for k in known)
        raise NotFoundError(
            f'{len(fit)} published contracts fit "{which}"; expected one of '
            f"{names or 'none yet: publish one with fedgex-admin study publish'}."
        )
    return fit[0]


def load(consortium: Consortium, hash: str) -> Published:
    """Return a contract of the store, its text and signatures verified.

    Signatures under expired or revoked certificates are accepted here, so that the
    contract can be shown; see `usable` for running it.

    Raises
    ------
    NotFoundError
        If there is none.
    TrustError
        If it was changed.
    """
    path = _stored(consortium) / f"{hash}.json"
    if not path.exists():
        raise NotFoundError(f"there is no published contract {hash}.")
    signed = Signed.from_json(read_text(path), str(path))
    if signed.hash != hash:
        raise TrustError(
            f"{path} holds the contract {signed.hash[:12]}; expected the one that it "
            "is named by. It was changed after publication: restore it, or publish "
            "the contract again."
        )
    began = [
        pki.from_pem(s.certificate).not_valid_before_utc for s in signed.signatures
    ]
    signers = tuple(
        signed.signers(
            consortium.authority, "administrator", at=max(began, default=None)
        )
    )
    return Published(hash, Contract.read_signed(signed), signers, signed)


def usable(consortium: Consortium, found: Published) -> None:
    """Refuse a contract under which no run may start now.

    Raises
    ------
    ConfigError
        If it expired, is for another version, or names unknown hospitals.
    TrustError
        If a signature is not, or no longer, that of an administrator in force.
    """
    try:
        consortium.signers(found.signed)
    except TrustError as error:
        raise TrustError(
            f"{error} To go on under this contract, have it signed by administrators "
            "in force and publish it again."
        ) from error
    if findings := _unpublishable(consortium, found.contract):
        raise ConfigError("\n".join(findings))


# ---- answers ----


def record_answer(consortium: Consortium, hash: str, signed: Signed) -> str:
    """Verify and store a hospital's decision; return the hospital's name.

    Raises
    ------
    TrustError
        If it is not signed by an active hospital of the contract, is about another
        contract, or is older than the hospital's last one.
    """
    signers = signed.signers(consortium.authority, "site", revoked=consortium.revoked())
    if len(signers) != 1:
        raise TrustError(
            f"the answer bears {len(signers)} signatures; expected one hospital's."
        )
    site, answer = signers[0], _answer(signed, signers[0])
    contract = load(consortium, hash).contract
    if site not in contract.sites or answer.contract != hash:
        raise TrustError(
            f"{site} answered about the contract {answer.contract[:12]}; expected a "
            f"hospital of {hash[:12]}, and an answer about it."
        )
    if not pinned_signers(signed, contract.site_keys, "the contract"):
        raise TrustError(
            f"the answer of {site} is signed by a key that {hash[:12]} does not pin."
        )
    with consortium.locked():
        kept = _answers(consortium, hash)
        if site in kept:
            before = _answer(kept[site], site)
            if answer.at < before.at:
                raise TrustError(
                    f"the answer of {site} is of {answer.at:%Y-%m-%d %H:%M}, older "
                    f"than the one of {before.at:%Y-%m-%d %H:%M} that is kept."
                )
        kept[site] = signed
        texts = {name: kept[name].to_json() for name in sorted(kept)}
        write_atomic(
            _answers_path(consortium, hash), json.dumps(texts, indent=1).encode()
        )
    return site


def answers(consortium: Consortium, hash: str) -> dict[str, Answer]:
    """Return the decision of each hospital that answered, by name."""
    kept = _answers(consortium, hash)
    return {site: _answer(signed, site) for site, signed in kept.items()}


# ---- helpers ----


def _unpublishable(consortium: Consortium, contract: Contract) -> list[str]:
    findings = []
    if contract.expired():
        findings.append(
            f"the contract expired on {contract.expires}; draft a new one with "
            "fedgex-admin study new."
        )
    if not contract.supports(version("fedgex")):
        findings.append(
            f"the contract is for fedgex {contract.code_version}, this is "
            f"{version('fedgex')}; install that version, or draft a new contract."
        )
    active = {n for n, site in consortium.sites().items() if site.state == "active"}
    if strange := sorted(set(contract.sites) - active):
        findings.append(
            f"the contract names {', '.join(strange)}; expected active hospitals of "
            f"{consortium.settings.name}. Add them with fedgex-admin site add."
        )
    if contract.site_keys:
        for name in sorted(set(contract.sites) & active):
            certificate = pki.from_pem(consortium.site(name).certificate)
            try:
                pinning.require(certificate, contract.site_keys, "the contract")
            except TrustError as error:
                findings.append(str(error))
    elif contract.study.secure_aggregation is not None:
        findings.append(
            "the contract asks for secure aggregation and pins no keys, so hospitals "
            f"refuse it ({Code.NOT_PINNED}); draft and sign a new one with "
            "fedgex-admin study new."
        )
    return findings


def _merged(consortium: Consortium, before: Signed, new: Signed) -> Signed:
    """Return the new signatures, and the earlier ones that are still valid."""
    kept = []
    for each in before.signatures:
        if each.name not in {other.name for other in new.signatures}:
            try:
                consortium.signers(Signed(new.content, (each,)))
            except TrustError as error:
                logger.warning("a signature of %s is dropped: %s", new.hash[:12], error)
            else:
                kept.append(each)
    return Signed(new.content, (*kept, *new.signatures))


def _answers(consortium: Consortium, hash: str) -> dict[str, Signed]:
    path = _answers_path(consortium, hash)
    if not path.exists():
        return {}
    values = read_json(path, "the answers of the hospitals")
    return {site: Signed.from_json(text, str(path)) for site, text in values.items()}


def _answer(signed: Signed, site: str) -> Answer:
    try:
        return Answer.from_json(signed.content, "the answer")
    except ConfigError as error:
        raise TrustError(
            f"the answer of {site} cannot be read; expected a decision as fedgex-site "
            "signs it."
        ) from error


def read_text(path: Path) -> str:
    """Read a file byte for byte, since its text is hashed."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: there is no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _stored(consortium: Consortium) -> Path:
    return consortium.folder / "contracts"


def _answers_path(consortium: Consortium, hash: str) -> Path:
    return _stored(consortium) / f"{hash}.answers.json"
