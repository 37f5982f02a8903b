"""The authority's signed list of certificates that count no more, with its date.

It is an X.509 certificate revocation list (RFC 5280), in PEM. It travels to a hospital
with its kit and with every contract, and a hospital keeps the newest that it has seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedgex.common.errors import TrustError
from fedgex.common.trust import pki

NEXT = timedelta(days=3650)
"""RFC 5280 wants a day of the next list. A list holds until another is made."""


def new_list(
    key: pki.Key, authority: x509.Certificate, revoked: Iterable[tuple[int, datetime]]
) -> str:
    """Return the list of serial numbers, each with the time of revocation, as PEM."""
    made = pki.now()
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(made)
        .next_update(made + NEXT)
    )
    for serial, at in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(serial)
            .revocation_date(at)
            .build()
        )
    signed = builder.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def read_list(text: str, authority: x509.Certificate) -> x509.CertificateRevocationList:
    """Read a list that the authority signed.

    Raises
    ------
    TrustError
        If it is unreadable, or not signed by the authority.
    """
    try:
        found = x509.load_pem_x509_crl(text.encode())
        held = found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
        _ = serials(found), found.last_update_utc
    except Exception as error:  # the library parses each part when it is asked for
        raise TrustError(
            "the list of revoked certificates cannot be read; expected an X.509 CRL in "
            "PEM. Ask the administrator to send it again."
        ) from error
    if not held:
        raise TrustError(
            "the list of revoked certificates is not signed by this consortium's "
            f"authority ({pki.short(authority)}). Inform the administrators."
        )
    return found


def serials(found: x509.CertificateRevocationList) -> frozenset[int]:
    """Return the serial numbers of a list."""
    return frozenset(each.serial_number for each in found)


def newer(text: str, held: str, authority: x509.Certificate) -> bool:
    """Return whether a list is to be kept instead of the one that is held.

    Parameters
    ----------
    held
        PEM; empty if there is none.

    Raises
    ------
    TrustError
        If the list cannot be trusted, or forgets a certificate that the held one names.
    """
    found = read_list(text, authority)
    if not held:
        return True
    before = read_list(held, authority)
    if found.last_update_utc <= before.last_update_utc:
        return False
    if forgotten := serials(before) - serials(found):
        raise TrustError(
            f"the list of revoked certificates of {found.last_update_utc:%Y-%m-%d} "
            f"lacks {len(forgotten)} that the one of {before.last_update_utc:%Y-%m-%d} "
            "names; nothing is taken back. Ask the administrator to revoke them again "
            "if the server was restored from a backup."
        )
    return True
