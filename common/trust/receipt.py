"""Who contributed to a round and who did not, signed by both sides and chained.

A site signs a `Part` for each reply. The coordinator puts the parts of a round into a
`Receipt`, with the hash of the receipt before, and signs it. Both are canonical JSON,
and the signature is over exactly that text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import numpy as np
from cryptography import x509
from flwr.app import RecordDict
from pydantic import AwareDatetime, Field, model_validator

from fedgex.common import keys
from fedgex.common.arrays import Arrays
from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.settings import Digest, Name, Settings, added
from fedgex.common.transport.records import digest
from fedgex.common.trust import pinning, pki
from fedgex.common.trust.audit_log import Head
from fedgex.common.trust.pinning import Pins
from fedgex.common.trust.signed import Signed, check_signature

NO_RECEIPT = "0" * 64
"""`previous` of a run's first receipt."""

Patients = Annotated[int, Field(ge=0)] | Literal["suppressed"]
"""`suppressed`: the number is below the floor, or the site withholds it."""

REASON = 300
"""Longest reason that is written, characters; every hospital keeps it."""
OLD_REASON = 1 << 14
"""Longest reason that is read: earlier releases named each parameter."""


class _Canonical(Settings):
    """Base of what is signed: one text for one content."""

    @classmethod
    def from_json(cls, text: str, source: str) -> Self:
        """Read the canonical form; signatures over it are not verified.

        Raises
        ------
        TrustError
            If the text is not exactly what `to_json` returns for what it says.
        """
        try:
            found = super().from_json(text, source)
        except ConfigError as error:
            raise TrustError(f"{error}. Fetch it again.") from error
        if found.to_json() != text:
            raise TrustError(
                f"{source} is not written in canonical JSON (sorted keys, no spaces), "
                "so its text was changed. Fetch it again."
            )
        return found


class Part(_Canonical):
    """What a site signs about one reply."""

    contract: Digest
    run: str
    site: Name
    type: str
    """Type of the message that was answered."""
    phase: str
    """Empty for a message that belongs to no round."""
    round: int = Field(ge=0)
    """0 for a message that belongs to no round."""
    request: Digest
    """What was asked, see `request_digest`."""
    reply: Digest
    """What was answered, see `reply_digest`."""
    head: Head
    """Last line of the site's audit log when it signed."""
    patients: Patients
    """How many of its patients the reply is about."""


class SitePart(Settings):
    """One site in a receipt."""

    state: Literal["contributed", "late", "failed", "refused", "quarantined"]
    reason: Annotated[str, Field(max_length=OLD_REASON)] | None = None
    """Code or cause, for every state but `contributed`; see `brief`."""
    patients: Patients | None = None
    """None if the site's reply did not come or could not be used."""
    update: Digest | None = None
    """Digest of the reply that came, see `reply_digest`; it is the part's."""
    part: str | None = None
    """The `Part` as the site signed it."""
    signature: str | None = None
    """The site's, over `part`."""
    certificate: str | None = None
    """The site's, PEM."""

    @model_validator(mode="after")
    def _signed_or_not(self) -> Self:
        proof = (self.update, self.part, self.signature, self.certificate)
        if any(proof) != all(proof):
            raise ValueError("update, part, signature and certificate come together")
        if (self.state == "contributed") != (self.reason is None):
            raise ValueError("a reason stands with every state but contributed")
        return self


class Receipt(_Canonical):
    """What the coordinator signs about one round."""

    contract: Digest
    run: str
    index: int = Field(ge=1)
    """Number of the receipt in its run, over all phases."""
    phase: str
    round: int = Field(ge=1)
    """Number of the round in its phase."""
    incoming: Digest
    """Parameters before the round, see `parameters_digest`."""
    outgoing: Digest
    """Parameters after it."""
    model_sent: Digest | None = added(None)
    """The model that the round's message held, see `parameters_digest`."""
    model_next: Digest | None = added(None)
    """The model that the next round's message holds; None after the last round, and
    where the server first trains on its public cohort."""
    sites: dict[Name, SitePart]
    """Every site of the run, whether it contributed or not."""
    previous: Digest
    """Hash of the receipt before; `NO_RECEIPT` for the first."""
    time: AwareDatetime
    """When the coordinator made it, by its own clock."""

    @classmethod
    def read_signed(cls, signed: Signed) -> Self:
        """Read a signed receipt's text; no signature is verified.

        Raises
        ------
        TrustError
            As for `from_json`.
        """
        return cls.from_json(signed.content, f"receipt {signed.hash[:12]}")


def brief(reason: str) -> str:
    """Return a reason that another party may have chosen, printable and not long."""
    shown = "".join(each if each.isprintable() else "?" for each in reason)
    return shown if len(shown) <= REASON else f"{shown[: REASON - 3]}..."


def request_digest(message_type: str, content: RecordDict) -> str:
    """Return the digest of a request, as hex.

    Records that may differ when the same is asked again do not count: what the server
    says of itself, and the receipt that travels along.
    """
    asked = digest(content, without={keys.SERVER, keys.RECEIPT})
    return hashlib.sha256(f"{message_type}\n{asked}".encode()).hexdigest()


def reply_digest(content: RecordDict) -> str:
    """Return the digest of a reply, as hex; the part that signs it does not count."""
    return digest(content, without={keys.PART})


def parameters_digest(arrays: Arrays) -> str:
    """Return the digest of a model's parameters, as hex, however they lie in memory.

    SHA-256 over the arrays in order of name: length of what follows (8 bytes, most
    significant first), JSON `[name, dtype, shape]`, the numbers in C order.
    """
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        described = json.dumps([name, array.dtype.str, array.shape]).encode()
        hashed.update(len(described).to_bytes(8, "big"))
        hashed.update(described)
        hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def verify_part(
    text: str,
    signature: str,
    certificate: str,
    authority: x509.Certificate,
    *,
    at: datetime | None = None,
    revoked: Collection[int] = (),
    pins: Pins | None = None,
) -> Part:
    """Return a part once certificate and signature are verified.

    Not verified: that it fits the request, the reply and the receipt.

    Parameters
    ----------
    text
        The part as it came.
    certificate
        PEM.
    at
        Time for which the certificate must be valid; now, if absent.
    revoked
        Serial numbers.
    pins
        The contract's `site_keys`; none if it pins none, or is not at hand.

    Raises
    ------
    PinError
        If the contract pins another key of the site.
    TrustError
        If certificate or signature cannot be trusted, or name another site.
    """
    holder = pki.from_pem(certificate)
    name = pki.verify(holder, authority, "site", at=at, revoked=revoked)
    if pins:
        pinning.require(holder, pins, "the contract")
    check_signature(holder, text.encode(), signature)
    part = Part.from_json(text, f"the part signed by {name}")
    if part.site != name:
        raise TrustError(
            f'the part signed by "{name}" is about "{part.site}"; expected the same '
            "site. Ask that hospital for its receipts."
        )
    return part


def verify_chain(
    receipts: Sequence[Signed],
    authority: x509.Certificate,
    pins: Pins | None = None,
    *,
    secure: bool = False,
) -> None:
    """Refuse receipts that are not one run's, without a gap from its first to the last.

    Verified: each receipt as by `verify_receipt`; that each names the one before,
    begins with the parameters that the one before ended with, sent the model that the
    one before announced, and counts each round of a phase once.

    Not verified: that nothing was cut off at the end (compare the last receipt's hash
    with what a site or a release holds), that the coordinator's clock was right, and
    that the parameters follow from the updates, which are not kept.

    Parameters
    ----------
    pins, secure
        As for `verify_receipt`.

    Raises
    ------
    TrustError
        Naming the first receipt that does not hold, by its place, from 1.
    """
    before: list[tuple[str, Receipt]] = []
    for place, signed in enumerate(receipts, start=1):
        try:
            receipt = verify_receipt(signed, authority, before, pins, secure=secure)
        except TrustError as error:
            raise TrustError(f"receipt {place} does not hold: {error}") from error
        before.append((signed.hash, receipt))


def verify_receipt(
    signed: Signed,
    authority: x509.Certificate,
    before: Sequence[tuple[str, Receipt]] | None,
    pins: Pins | None = None,
    *,
    secure: bool = False,
) -> Receipt:
    """Return a receipt once its signatures are verified, and that all were asked alike.

    Verified: the coordinator's signature; each site's signature under its part, which
    must be about the same contract, run, phase, round, reply and number of patients;
    and that all parts are about one request. Certificates must be valid at the
    receipt's own time, so that receipts outlive them.

    Parameters
    ----------
    before
        Hash and content of the receipts before it without a gap, oldest first, which it
        must follow; empty for a run's first, None if the one before is not there.
    pins
        As for `verify_part`.
    secure
        Whether the run aggregates securely: then each request holds shares for one
        site only, and requests are not compared.

    Raises
    ------
    TrustError
        If anything does not hold.
    """
    receipt = Receipt.read_signed(signed)
    if not signed.signers(authority, "coordinator", at=receipt.time):
        raise TrustError("it bears no signature; expected the coordinator's")
    if before is not None:
        _verify_order(receipt, before)
    requests: dict[str, list[str]] = {}
    for name, entry in receipt.sites.items():
        part = _verify_entry(receipt, name, entry, authority, pins)
        if part is not None:
            requests.setdefault(part.request, []).append(name)
    if len(requests) > 1 and not secure:
        asked = "; ".join(f"{k[:12]}: {', '.join(v)}" for k, v in requests.items())
        raise TrustError(
            f"its sites were sent different requests ({asked}); expected one. Compare "
            "the hospitals' logs, see fedgex-site log compare."
        )
    return receipt


def _verify_order(receipt: Receipt, before: Sequence[tuple[str, Receipt]]) -> None:
    expected: dict[str, Any] = {"index": 1, "previous": NO_RECEIPT, "round": 1}
    if before:
        previous, last = before[-1]
        expected |= {
            "index": last.index + 1,
            "previous": previous,
            "contract": last.contract,
            "run": last.run,
            "incoming": last.outgoing,
        }
        if last.model_next is not None:
            expected["model_sent"] = last.model_next
        of_phase = [each.round for _, each in before if each.phase == receipt.phase]
        if of_phase:
            # A phase that was left does not come back.
            expected |= {"round": of_phase[-1] + 1, "phase": last.phase}
    _compare("it", receipt, expected)


def _verify_entry(
    receipt: Receipt,
    name: str,
    entry: SitePart,
    authority: x509.Certificate,
    pins: Pins | None,
) -> Part | None:
    if entry.part is None or entry.signature is None or entry.certificate is None:
        if entry.state == "contributed":
            raise TrustError(
                f"{name} contributed without a signature; expected that a site that "
                "contributed has signed its part. Receipts of simulations are not "
                "signed, and prove nothing."
            )
        return None
    part = verify_part(
        entry.part,
        entry.signature,
        entry.certificate,
        authority,
        at=receipt.time,
        pins=pins,
    )
    expected = {
        "site": name,
        "contract": receipt.contract,
        "run": receipt.run,
        "type": keys.TRAIN,
        "phase": receipt.phase,
        "round": receipt.round,
        "reply": entry.update,
    }
    if entry.patients is not None:
        expected["patients"] = entry.patients
    _compare(f"the part of {name}", part, expected)
    return part


def _compare(what: str, found: Part | Receipt, expected: dict[str, Any]) -> None:
    wrong = [
        f"{key} is {getattr(found, key)}, expected {value}"
        for key, value in expected.items()
        if getattr(found, key) != value
    ]
    if wrong:
        raise TrustError(
            f"{what} was changed, or does not belong here: {'; '.join(wrong)}. Fetch "
            "the run's receipts again, and compare them with those of a hospital."
        )
