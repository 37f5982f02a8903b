"""Keys and certificates of one consortium, and what makes them trusted.

One certificate authority signs every certificate. Each has a name (CN) and a role (OU)
in its subject, and O is "fedgex". Which certificate is trusted, `verify` decides, and
which signed document, `signed.Signed.signers`; nothing else does.

Certificates and signatures use ECDSA over P-256 with SHA-256 (FIPS 186-5); the keys
of Flower's node authentication are on P-384.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeGuard

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fedgex.common.errors import TrustError
from fedgex.common.system.files import write_atomic

Role = Literal["server", "coordinator", "administrator", "site"]
"""Who a certificate is for. `server`: TLS of the coordinating machine. `coordinator`:
signs receipts. `administrator`: signs contracts and orders. `site`: signs approvals and
its part of receipts."""

Key = ec.EllipticCurvePrivateKey

ORGANISATION = "fedgex"
BACKDATED = timedelta(days=2)
"""How long before its making a certificate is valid, for machines whose clock is
behind."""
DOCUMENT_SIGNING = ObjectIdentifier("1.3.6.1.5.5.7.3.36")
"""Extended key usage of RFC 9336. It keeps a certificate that signs documents from
passing as the server's in TLS."""
REPLACEMENTS = ObjectIdentifier("2.25.169690005800426191261357330391330558620")
"""Extension with the statements by which a key replaces the one before, see `pinning`.
Its number is that of a UUID (ITU-T X.667)."""


# ---- keys ----


def new_key() -> Key:
    """Return a new key for a certificate, on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def new_node_key() -> Key:
    """Return a new key for Flower's node authentication, on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def save_key(key: Key, path: Path) -> None:
    """Write a certificate's key as PKCS #8 PEM, unencrypted, readable by its owner.

    Raises
    ------
    TrustError
        If `path` exists: a key is never overwritten.
    """
    _save(key, path, serialization.PrivateFormat.PKCS8)


def save_node_key(key: Key, path: Path) -> None:
    """Write a node key in OpenSSH's private format, as Flower reads it.

    Raises
    ------
    TrustError
        If `path` exists: a key is never overwritten.
    """
    _save(key, path, serialization.PrivateFormat.OpenSSH)


def load_key(path: Path) -> Key:
    """Read what `save_key` wrote.

    Raises
    ------
    TrustError
        If the file cannot be read, or holds no unencrypted key on P-256.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise TrustError(
            f"{path}: the private key cannot be read ({error.strerror}); expected a "
            "PEM file that belongs to the user who runs this. Check the path and its "
            "owner."
        ) from error
    except Exception as error:  # whatever the library finds
        raise TrustError(
            f"{path}: holds no unencrypted private key; expected PKCS #8 PEM. Restore "
            "it from your backup, or make new keys and have them rotated."
        ) from error
    if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(
            f"{path}: holds a private key of another kind; expected EC on P-256."
        )
    return key


def public_ssh(key: Key) -> str:
    """Return the public half as OpenSSH writes it, as Flower registers it."""
    return (
        key.public_key()
        .public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        .decode()
    )


def fingerprint(of: PublicKeyTypes | x509.Certificate) -> str:
    """Return the SHA-256 of the public key, SubjectPublicKeyInfo in DER, as hex."""
    key = of.public_key() if isinstance(of, x509.Certificate) else of
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


# ---- certificates ----


def new_authority(consortium: str, days: int = 3650) -> tuple[Key, x509.Certificate]:
    """Return the key and the self-signed certificate of a new authority.

    It may sign certificates of the four roles and no authority below it.
    """
    key, made = new_key(), now()
    subject = _subject(consortium, None)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(made - BACKDATED)
        .not_valid_after(made + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def request(key: Key, name: str, role: Role, replaces: bytes = b"") -> str:
    """Return a certificate signing request (PKCS #10, PEM) for `name` in `role`.

    Parameters
    ----------
    replaces
        What `pinning.replacement` returned, for a key that replaces another.
    """
    builder = x509.CertificateSigningRequestBuilder()
    builder = builder.subject_name(_subject(name, role))
    if replaces:
        extension = x509.UnrecognizedExtension(REPLACEMENTS, replaces)
        builder = builder.add_extension(extension, critical=False)
    made = builder.sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


def read_request(csr: str) -> x509.CertificateSigningRequest:
    """Read a certificate signing request; nothing about it is verified.

    Raises
    ------
    TrustError
        If the text holds none.
    """
    try:
        return x509.load_pem_x509_csr(csr.encode())
    except Exception as error:  # as in `from_pem`
        raise TrustError(
            "the certificate request cannot be read; expected PKCS #10 in PEM. Ask for "
            "the file again."
        ) from error


def replacements(of: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """Return the statements of key replacement in a certificate or request.

    Raises
    ------
    ValueError
        If its extensions cannot be read.
    """
    try:
        found = of.extensions.get_extension_for_oid(REPLACEMENTS).value
    except x509.ExtensionNotFound:
        return b""
    assert isinstance(found, x509.UnrecognizedExtension)
    return found.value


def issue(
    authority_key: Key,
    authority: x509.Certificate,
    csr: str,
    *,
    name: str,
    role: Role,
    days: int,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """Return the certificate for a request, if it asks for exactly this name and role.

    What is verified: that the sender holds the request's private key, and that it names
    `name` and `role`. That `name` is who they say is for the caller to know, by the
    fingerprint that reached it in another way.

    Parameters
    ----------
    csr
        What `request` returned. Its subject and key are taken, and of its extensions
        the statements of key replacement.
    days
        Validity from now; it ends with the authority's at the latest.
    hosts
        DNS names and IP addresses under which a server is reached.

    Raises
    ------
    TrustError
        If the request is unreadable, its signature is bad, or name, role or kind of key
        differ.
    """
    asked = read_request(csr)
    try:
        valid, key = asked.is_signature_valid, asked.public_key()
        found, replaces = name_and_role(asked.subject), replacements(asked)
    except Exception as error:  # it parses what was sent, part by part
        raise TrustError(
            "the certificate request cannot be read; expected PKCS #10 in PEM. Ask for "
            "the file again."
        ) from error
    if not valid:
        raise TrustError(
            "the certificate request is not signed by its own key, so it was changed; "
            "ask for the file again."
        )
    if found != (name, role):
        raise TrustError(
            f"the certificate request is for {_told(*found)}; expected "
            f"{_told(name, role)}. Ask for a request made under that name."
        )
    if not _on_p256(key):
        raise TrustError(
            f"the certificate request of {_told(name, role)} holds another kind of "
            "key; expected EC on P-256. Have it made by this fedgex."
        )
    return _issued(
        authority_key, authority, asked.subject, key, role, days, hosts, replaces
    )


def renew(
    authority_key: Key, authority: x509.Certificate, held: x509.Certificate, days: int
) -> x509.Certificate:
    """Return a new certificate over the key of one that signs documents."""
    key, (_, role) = held.public_key(), name_and_role(held.subject)
    assert _on_p256(key), "issued by fedgex"
    return _issued(
        authority_key, authority, held.subject, key, role, days, (), replacements(held)
    )


def _issued(
    authority_key: Key,
    authority: x509.Certificate,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    role: str,
    days: int,
    hosts: Sequence[str],
    replaces: bytes,
) -> x509.Certificate:
    made = now()
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else DOCUMENT_SIGNING
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(made - BACKDATED)
        .not_valid_after(
            min(made + timedelta(days=days), authority.not_valid_after_utc)
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(
                authority_key.public_key()
            ),
            critical=False,
        )
    )
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    if replaces:
        statements = x509.UnrecognizedExtension(REPLACEMENTS, replaces)
        builder = builder.add_extension(statements, critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def to_pem(certificate: x509.Certificate) -> str:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def from_pem(text: str) -> x509.Certificate:
    """Read a certificate; nothing about it is verified.

    Raises
    ------
    TrustError
        If the text holds none.
    """
    try:
        certificate = x509.load_pem_x509_certificate(text.encode())
        fingerprint(certificate)
        name_and_role(certificate.subject)
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except Exception as error:  # the library parses each part when it is asked for
        raise TrustError(
            "the certificate cannot be read; expected X.509 in PEM. Ask for the file "
            "again."
        ) from error
    return certificate


def verify(
    certificate: x509.Certificate,
    authority: x509.Certificate,
    role: Role,
    *,
    at: datetime | None = None,
    revoked: Collection[int] = (),
) -> str:
    """Return whom a certificate names, once everything about it is verified.

    Verified: the signature of `authority`, that both are valid at the time, that it is
    for `role`, and that its serial number is not revoked. Not verified: the authority
    itself, which came with the kit, and whether the name still belongs to the
    consortium; that is what `revoked` is for.

    Parameters
    ----------
    at
        Time with its zone; now, if absent.
    revoked
        Serial numbers.

    Raises
    ------
    TrustError
        If any of it does not hold.
    """
    at = at or now()
    try:
        certificate.verify_directly_issued_by(authority)
        found_name, found_role = name_and_role(certificate.subject)
        authority_name = name_and_role(authority.subject)[0]
    except Exception as error:  # a bad signature, or one of a kind that is not known
        raise TrustError(
            f"the certificate with fingerprint {short(certificate)} was not issued by "
            f"this consortium's authority ({short(authority)}); expected one that "
            "was. Ask an administrator for a new kit."
        ) from error
    found = _told(found_name, found_role)
    for what, each in ((authority_name, authority), (found, certificate)):
        _verify_time(f"the certificate of {what}", each, at)
    if found_role != role:
        raise TrustError(
            f"the certificate is for {found}; expected one for the role {role}. Use "
            "the certificate that was issued for it."
        )
    if certificate.serial_number in revoked:
        raise TrustError(
            f"the certificate of {found} (serial number "
            f"{certificate.serial_number:x}) was revoked; expected one in force. Ask "
            "an administrator for a new one."
        )
    return found_name


# ---- helpers ----


def _save(key: Key, path: Path, form: serialization.PrivateFormat) -> None:
    if path.exists():
        raise TrustError(
            f"{path} exists already, and a private key is never overwritten; move it "
            "away if it is no longer in use."
        )
    content = key.private_bytes(
        serialization.Encoding.PEM, form, serialization.NoEncryption()
    )
    write_atomic(path, content, mode=0o600)


def now() -> datetime:
    """Return the time of this machine, UTC, in seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def _subject(name: str, role: Role | None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION)]
    if role is not None:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role))
    parts.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
    return x509.Name(parts)


def name_and_role(subject: x509.Name) -> tuple[str, str]:
    """Return CN and OU, each empty unless it stands there exactly once."""
    name, role = (
        [str(part.value) for part in subject.get_attributes_for_oid(oid)]
        for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME)
    )
    return (
        name[0] if len(name) == 1 else "",
        role[0] if len(role) == 1 else "",
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _on_p256(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(
        key.curve, ec.SECP256R1
    )


def _verify_time(what: str, certificate: x509.Certificate, at: datetime) -> None:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if at < first:
        raise TrustError(
            f"{what} is valid from {first:%Y-%m-%d %H:%M} UTC and it is "
            f"{at:%Y-%m-%d %H:%M}; correct this machine's clock."
        )
    if at > last:
        raise TrustError(
            f"{what} expired on {last:%Y-%m-%d %H:%M} UTC and it is "
            f"{at:%Y-%m-%d %H:%M}; have it rotated, or correct this machine's clock."
        )


def _told(name: str, role: str) -> str:
    return f'{role or "no role"} "{name}"'


def short(certificate: x509.Certificate) -> str:
    """Return enough of the fingerprint to find the key by."""
    try:
        return fingerprint(certificate)[:16]
    except (ValueError, UnsupportedAlgorithm):
        return "unreadable"
