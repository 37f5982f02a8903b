"""Pinned keys, and the statements by which a key replaces the one before it.

A pin is the fingerprint of a key (`pki.fingerprint`) under a name. A certificate fits a
pin if its key is the pinned one, or if statements lead from the pinned key to it, each
signed by the key before. They stand in an extension of the certificate, so that they go
wherever it goes; the hospital makes them, and its certificate request carries them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, TypeAdapter

from fedgex.common import parsing
from fedgex.common.canonical import canonical_json
from fedgex.common.errors import TrustError
from fedgex.common.settings import Settings
from fedgex.common.trust import pki
from fedgex.common.trust.signed import Signed, sign

Pins = Mapping[str, str]
"""Fingerprint of a key, by the name of who holds it."""

MAX_BYTES = 1 << 16
"""Of the extension: some 200 replacements."""


class PinError(TrustError):
    """A key is not the pinned one, and no statement of that one replaces it."""


class Step(Settings):
    """A key, and its signature under the statement that another replaces it."""

    key: str = Field(max_length=1000)
    """SubjectPublicKeyInfo in DER, base64."""
    signature: str = Field(max_length=1000)


_STEPS = TypeAdapter(tuple[Step, ...])


def replacement(key: pki.Key, certificate: x509.Certificate, new: pki.Key) -> bytes:
    """Return the statements by which a new key replaces that of a certificate.

    Those in the certificate are kept, so that a pin outlives several replacements.

    Parameters
    ----------
    key
        Private key of the certificate.
    """
    text = _statement(
        certificate, pki.fingerprint(certificate), pki.fingerprint(new.public_key())
    )
    der = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    step = Step(key=base64.b64encode(der).decode(), signature=sign(key, text))
    steps = [each.model_dump() for each in (*_steps(certificate), step)]
    return canonical_json(steps).encode()


def replaced(
    of: x509.Certificate | x509.CertificateSigningRequest,
) -> tuple[str, ...]:
    """Return the fingerprints of the keys that a certificate's key replaces.

    Oldest first; empty if the key replaces none. Each statement is verified.

    Raises
    ------
    TrustError
        If a statement is unreadable, or not signed by the key before.
    """
    steps = _steps(of)
    try:
        keys = [
            serialization.load_der_public_key(base64.b64decode(each.key, validate=True))
            for each in steps
        ]
        found = [pki.fingerprint(key) for key in keys]
        after = [*found, pki.fingerprint(of.public_key())][1:]
        for step, key, old, new in zip(steps, keys, found, after, strict=True):
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise InvalidSignature
            key.verify(
                base64.b64decode(step.signature, validate=True),
                _statement(of, old, new),
                ec.ECDSA(hashes.SHA256()),
            )
    except Exception as error:  # the library parses what another party chose
        raise TrustError(
            "the statement that a key replaces another is not signed by the key "
            "before; ask the key's owner to make it again with fedgex-site rotate."
        ) from error
    return tuple(found)


def require(certificate: x509.Certificate, pins: Pins, by: str) -> None:
    """Refuse a certificate over a key that is not pinned under its name.

    Parameters
    ----------
    by
        What pins the keys, for the error's text.

    Raises
    ------
    PinError
        If the name has no pin, or another key's.
    TrustError
        As for `replaced`.
    """
    name = pki.name_and_role(certificate.subject)[0]
    if name not in pins:
        raise PinError(
            f'{by} pins no key of "{name}"; expected a name among '
            f"{', '.join(sorted(pins))}. Ask the administrators who that is."
        )
    own = pki.fingerprint(certificate)
    if pins[name] not in (own, *replaced(certificate)):
        raise PinError(
            f'{by} pins the key {pins[name][:16]} of "{name}", and this is {own[:16]}, '
            "which no statement of the pinned key names. If the key was replaced "
            "without the old one, a new contract is needed; if not, somebody plays "
            f"{name}: inform the administrators."
        )


def pinned_signers(signed: Signed, pins: Pins | None, by: str) -> tuple[str, ...]:
    """Return the signers whose keys are pinned, in order of signature.

    Signatures and certificates are not verified; see `Signed.signers`. Without any
    pins every signer counts.
    """
    names: dict[str, None] = {}
    for each in signed.signatures:
        try:
            if pins:
                require(pki.from_pem(each.certificate), pins, by)
        except PinError:
            continue
        names[each.name] = None
    return tuple(names)


def _statement(
    of: x509.Certificate | x509.CertificateSigningRequest, old: str, new: str
) -> bytes:
    name, role = pki.name_and_role(of.subject)
    values = {"name": name, "role": role, "old": old, "new": new}
    return f"fedgex replaces a key\n{canonical_json(values)}".encode()


def _steps(
    of: x509.Certificate | x509.CertificateSigningRequest,
) -> tuple[Step, ...]:
    try:
        content = pki.replacements(of)
        if not content:
            return ()
        found = parsing.json_value(content, "the statements", most=MAX_BYTES)
        return _STEPS.validate_python(found)
    except Exception as error:  # the library parses extensions when asked for them
        raise TrustError(
            "the statements by which a key replaces another cannot be read; expected "
            "those that fedgex-site rotate makes. Ask the key's owner to make them "
            "again."
        ) from error
