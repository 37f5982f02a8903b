"""Signed documents: a text and its signatures, each with the signer's certificate."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedgex.common import parsing
from fedgex.common.canonical import canonical_json
from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.trust import pki


def sign(key: pki.Key, content: bytes) -> str:
    """Return an ECDSA signature with SHA-256 over the bytes, in base64."""
    return base64.b64encode(key.sign(content, ec.ECDSA(hashes.SHA256()))).decode()


def check_signature(
    certificate: x509.Certificate, content: bytes, signature: str
) -> None:
    """Refuse a signature that the certificate's key did not make over these bytes.

    The certificate itself is not verified; see `pki.verify`.

    Raises
    ------
    TrustError
        If the signature does not fit.
    """
    key = certificate.public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        raw = base64.b64decode(signature, validate=True)
        key.verify(raw, content, ec.ECDSA(hashes.SHA256()))
    except Exception as error:  # whatever bytes came
        raise TrustError(
            f"the signature does not fit the content under the key "
            f"{pki.short(certificate)}; one of them was changed. Fetch the document "
            "again from who signed it."
        ) from error


@dataclass(frozen=True)
class Signature:
    """Who says to have signed, with what."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """Must be the certificate's."""
    certificate: str
    """PEM."""
    signature: str
    """What `sign` returned for the content's UTF-8."""


@dataclass(frozen=True)
class Signed:
    """A text and its signatures. Holding one says nothing; call `signers`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    content: str
    signatures: tuple[Signature, ...] = ()

    @property
    def hash(self) -> str:
        """SHA-256 of the content's UTF-8, as hex; signatures do not change it."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def to_json(self) -> str:
        """Return the canonical form: sorted keys, no spaces."""
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Self:
        """Read what `to_json` returned; no signature is verified.

        Raises
        ------
        TrustError
            If the text is no signed document.
        """
        try:
            return TypeAdapter(cls).validate_python(
                parsing.json_value(text, source, most=parsing.LONG_BYTES)
            )
        except (ValidationError, ConfigError) as error:
            raise TrustError(
                f"{source} is no signed document; expected JSON with a content and its "
                "signatures. Fetch it again."
            ) from error

    def signed_by(self, key: pki.Key, certificate: x509.Certificate) -> Self:
        """Return the document with one signature more; a name's earlier one goes.

        Raises
        ------
        TrustError
            If the key is not the certificate's.
        """
        name = pki.name_and_role(certificate.subject)[0]
        if pki.fingerprint(key.public_key()) != pki.fingerprint(certificate):
            raise TrustError(
                f"the private key is not that of {name}'s certificate "
                f"({pki.short(certificate)}); expected the two of one kit. Check which "
                "files were named."
            )
        made = Signature(
            name, pki.to_pem(certificate), sign(key, self.content.encode())
        )
        others = tuple(each for each in self.signatures if each.name != name)
        return dataclasses.replace(self, signatures=(*others, made))

    def signers(
        self,
        authority: x509.Certificate,
        role: pki.Role,
        *,
        at: datetime | None = None,
        revoked: Collection[int] = (),
    ) -> tuple[str, ...]:
        """Return who signed, once every signature and certificate is verified.

        Each name counts once, in order of first signature. A document without
        signatures has no signers, so a caller says how many it needs.

        Raises
        ------
        TrustError
            If any one signature or certificate cannot be trusted.
        """
        names: dict[str, None] = {}
        for each in self.signatures:
            certificate = pki.from_pem(each.certificate)
            name = pki.verify(certificate, authority, role, at=at, revoked=revoked)
            if name != each.name:
                raise TrustError(
                    f'a signature says to be of "{each.name}", its certificate is of '
                    f'"{name}"; expected the same name. Fetch the document again.'
                )
            check_signature(certificate, self.content.encode(), each.signature)
            names[name] = None
        return tuple(names)
