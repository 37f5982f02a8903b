"""Administrators and hospitals of a consortium: admitted, renewed, rotated, revoked.

Private keys of hospitals and administrators are made where they are used; only requests
come here, and a request is admitted under the fingerprint that its owner read out.
Each change is noted in the audit log before it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.system.files import explained, write_atomic
from fedgex.common.trust import pinning, pki
from fedgex.common.trust.enrolment import EnrolmentRequest, SiteRequest
from fedgex.server.consortium.store import (
    VALID_DAYS,
    Consortium,
    NotFoundError,
    SiteEntry,
    listed,
)

# ---- administrators ----


def new_administrator(name: str, folder: Path) -> tuple[Path, EnrolmentRequest]:
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
    asked = EnrolmentRequest.read(
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


def add_administrator(
    consortium: Consortium, request: Path, fingerprint: str
) -> x509.Certificate:
    """Admit an administrator and return the new certificate.

    Parameters
    ----------
    request
        Written by `fedgex-admin administrator request`.
    fingerprint
        As the administrator read it out.

    Raises
    ------
    TrustError
        With everything that speaks against it.
    """
    asked = EnrolmentRequest.load(request)
    with consortium.locked():
        findings = _findings(asked, fingerprint, None, "administrator")
        if asked.name in consortium.administrators():
            findings.append(
                f'an administrator "{asked.name}" exists already; choose another '
                "name, or revoke the present one first."
            )
        certificate = _issue_or_refuse(consortium, asked, "administrator", findings)
        consortium.audit.append("administrator-added", name=asked.name)
        path = consortium.folder / "administrators" / f"{asked.name}.crt"
        write_atomic(path, pki.to_pem(certificate).encode())
    return certificate


def renew_administrator(consortium: Consortium, name: str) -> x509.Certificate:
    """Return a new certificate over an administrator's key; the old one stays valid.

    Raises
    ------
    NotFoundError
        If there is no such administrator.
    TrustError
        If the authority's key is not there.
    """
    with consortium.locked():
        held = _administrator(consortium, name)
        key = consortium.authority_key
        certificate = pki.renew(key, consortium.authority, held, VALID_DAYS)
        consortium.audit.append("administrator-renewed", name=name)
        path = consortium.folder / "administrators" / f"{name}.crt"
        write_atomic(path, pki.to_pem(certificate).encode())
    return certificate


def revoke_administrator(consortium: Consortium, name: str, reason: str) -> None:
    """Revoke an administrator's certificate.

    Raises
    ------
    NotFoundError
        If there is no such administrator.
    TrustError
        If the authority's key is not there.
    """
    with consortium.locked():
        held = _administrator(consortium, name)
        _ = consortium.authority_key  # before anything is written
        consortium.audit.append("administrator-revoked", name=name, reason=reason)
        serials, keys = [_serial(held)], (pki.fingerprint(held),)
        consortium.revoke(serials, name, "administrator", reason, keys)


def administrator_pins(consortium: Consortium) -> dict[str, str]:
    """Return the fingerprint of each administrator's key, for kits and contracts.

    Raises
    ------
    ConfigError
        If there are fewer administrators than must sign a contract.
    """
    found = {n: pki.fingerprint(c) for n, c in consortium.administrators().items()}
    if len(found) < (needed := consortium.settings.signatures):
        raise ConfigError(
            f"{len(found)} administrators are admitted, and {needed} must sign a "
            "contract; admit them first, since hospitals keep their keys: "
            "fedgex-admin administrator add."
        )
    return found


def _administrator(consortium: Consortium, name: str) -> x509.Certificate:
    known = consortium.administrators()
    if name not in known:
        raise NotFoundError(
            f'there is no administrator "{name}"; expected one of {listed(known)}.'
        )
    return known[name]


# ---- hospitals ----


def add_site(
    consortium: Consortium, request: Path, fingerprint: str, *, name: str | None = None
) -> dict[str, Any]:
    """Admit a hospital and return its kit. A revoked one may come back so.

    Parameters
    ----------
    request
        The hospital's `request.json`.
    fingerprint
        As the hospital read it out.
    name
        Expected name; if None, any.

    Raises
    ------
    TrustError
        With everything that speaks against it.
    """
    asked = SiteRequest.load(request)
    with consortium.locked():
        pins = administrator_pins(consortium)
        findings = _site_findings(consortium, asked, fingerprint, name, replaces=None)
        present = consortium.sites().get(asked.name)
        if present is not None and present.state == "active":
            findings.append(
                f'a hospital "{asked.name}" exists already; choose another name, '
                "or give it new keys with fedgex-admin site rotate."
            )
        certificate = _issue_or_refuse(consortium, asked, "site", findings)
        consortium.audit.append("site-added", site=asked.name)
        return _enter(consortium, asked, certificate, pins)


def rotate_site(
    consortium: Consortium, name: str, request: Path, fingerprint: str
) -> dict[str, Any]:
    """Replace a hospital's keys and return its new kit; no other's changes.

    The old certificate is revoked first. Contracts that pin the old key go on if the
    request holds the old key's statement, as `fedgex-site rotate` makes it.

    Raises
    ------
    NotFoundError
        If there is no such hospital.
    TrustError
        With everything that speaks against the request.
    """
    asked = SiteRequest.load(request)
    with consortium.locked():
        pins, present = administrator_pins(consortium), _active(consortium, name)
        replaces = pki.fingerprint(pki.from_pem(present.certificate))
        findings = _site_findings(consortium, asked, fingerprint, name, replaces)
        certificate = _issue_or_refuse(consortium, asked, "site", findings)
        consortium.audit.append("site-rotated", site=name)
        _revoke_site(consortium, present, "rotated")
        return _enter(consortium, asked, certificate, pins)


def renew_site(consortium: Consortium, name: str) -> dict[str, Any]:
    """Return a kit with a new certificate over the keys that a hospital has.

    Raises
    ------
    NotFoundError
        If there is no such hospital.
    TrustError
        If it was revoked.
    """
    with consortium.locked():
        pins, present = administrator_pins(consortium), _active(consortium, name)
        asked = SiteRequest(
            name=name,
            certificate_request=present.certificate_request,
            node_public_key=present.node_public_key,
            version=present.version,
        )
        certificate = consortium.issue(asked.certificate_request, name, "site")
        consortium.audit.append("site-renewed", site=name)
        old = _serial(pki.from_pem(present.certificate))
        return _enter(consortium, asked, certificate, pins, (*present.earlier, old))


def revoke_site(consortium: Consortium, name: str, reason: str) -> None:
    """Revoke a hospital's certificates and both its keys.

    Raises
    ------
    NotFoundError
        If there is no such hospital.
    TrustError
        If it was revoked before.
    """
    with consortium.locked():
        present = _active(consortium, name)
        _ = consortium.authority_key  # before anything is written
        consortium.audit.append("site-revoked", site=name, reason=reason)
        _revoke_site(consortium, present, reason)
        struck = present.model_copy(update={"state": "revoked", "reason": reason})
        _write_site(consortium, struck)


# ---- requests ----


def _issue_or_refuse(
    consortium: Consortium,
    asked: EnrolmentRequest,
    role: pki.Role,
    findings: list[str],
) -> x509.Certificate:
    """Issue the certificate, or raise with all findings and the request's own."""
    try:
        certificate = consortium.issue(asked.certificate_request, asked.name, role)
    except TrustError as error:
        raise TrustError("\n".join([*findings, str(error)])) from error
    own = pki.fingerprint(certificate)
    findings = [*findings, *_taken("signing key", own, consortium)]
    if findings:
        raise TrustError("\n".join(findings))
    return certificate


def _site_findings(
    consortium: Consortium,
    asked: SiteRequest,
    fingerprint: str,
    name: str | None,
    replaces: str | None,
) -> list[str]:
    """Return what speaks against a request.

    Parameters
    ----------
    replaces
        Fingerprint of the key that the request may replace; None for a new hospital.
    """
    findings = _findings(asked, fingerprint, name, "hospital")
    findings += _replacing(asked, replaces)
    try:
        own = _node_key_fingerprint(asked.node_public_key)
    except TrustError as error:
        return [*findings, str(error)]
    return [*findings, *_taken("node key", own, consortium)]


def _replacing(asked: SiteRequest, replaces: str | None) -> list[str]:
    """Return what is wrong with the statement that a request's key replaces another."""
    try:
        request = pki.read_request(asked.certificate_request)
    except TrustError:
        return []  # issuing the certificate reports that
    try:
        before = pinning.replaced(request)
    except TrustError as error:
        return [str(error)]
    if not before or before[-1] == replaces:
        return []
    return [
        f"the request replaces the key {before[-1][:16]}, expected "
        + (replaces[:16] if replaces else "a request that replaces none")
        + ". Ask for one that fedgex-site rotate made at a hospital in force, or "
        "fedgex-site init at a new one."
    ]


def _findings(
    asked: EnrolmentRequest, fingerprint: str, name: str | None, who: str
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


def _taken(which: str, key: str, consortium: Consortium) -> list[str]:
    """Return a finding if the key is, or was, in use in this consortium."""
    owners = {
        each: f'{revoked.role} "{revoked.name}", revoked'
        for revoked in consortium.revocations()
        for each in revoked.keys
    }
    for role in ("authority", "server", "coordinator"):
        if (consortium.folder / "pki" / f"{role}.crt").exists():
            owners[pki.fingerprint(consortium.certificate(role))] = f"the {role}"
    for name, certificate in consortium.administrators().items():
        owners[pki.fingerprint(certificate)] = f'administrator "{name}"'
    for site in consortium.sites().values():
        for each in _keys(site):
            owners.setdefault(each, f'hospital "{site.name}"')
    if key not in owners:
        return []
    return [
        f"the {which} is registered already, as that of {owners[key]}; expected one "
        "that was never used here. Have new keys made, and ask for their request."
    ]


# ---- entries ----


def _active(consortium: Consortium, name: str) -> SiteEntry:
    present = consortium.site(name)
    if present.state == "revoked":
        raise TrustError(
            f'the hospital "{name}" was revoked ({present.reason}); expected an '
            "active one. To admit it again, add a request with new keys."
        )
    return present


def _enter(
    consortium: Consortium,
    asked: SiteRequest,
    certificate: x509.Certificate,
    administrators: Mapping[str, str],
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
        added=pki.now(),
        version=asked.version,
    )
    _write_site(consortium, entry)
    settings = consortium.settings
    return {
        "format": 1,
        "consortium": settings.name,
        "site": entry.name,
        "server": f"{settings.host}:{settings.port}",
        "authority": pki.to_pem(consortium.authority),
        "certificate": entry.certificate,
        "administrators": dict(administrators),
        "signatures": settings.signatures,
        "revoked": consortium.revocation_list,
    }


def _write_site(consortium: Consortium, entry: SiteEntry) -> None:
    path = consortium.folder / "sites" / f"{entry.name}.json"
    write_atomic(path, entry.model_dump_json(indent=1).encode())


def _revoke_site(consortium: Consortium, site: SiteEntry, reason: str) -> None:
    serials = [*site.earlier, _serial(pki.from_pem(site.certificate))]
    consortium.revoke(serials, site.name, "site", reason, _keys(site))


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
    except Exception as error:  # such as a compressed point
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
