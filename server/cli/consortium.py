"""`fedgex-admin consortium`, `administrator`, `site`: members and their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedgex.common.trust import pki, revocation
from fedgex.server.cli.command_line import (
    AuthorityDir,
    Fingerprint,
    Format,
    Reason,
    RequestFile,
    State,
    note,
    refusals,
    show,
    show_rows,
    write_out,
)
from fedgex.server.consortium import members
from fedgex.server.consortium.certificates import expiries
from fedgex.server.consortium.store import Consortium, ConsortiumSettings

consortium = typer.Typer(
    no_args_is_help=True, help="Found a consortium; see how it is."
)
administrator = typer.Typer(
    no_args_is_help=True, help="Who signs contracts and orders."
)
site = typer.Typer(
    no_args_is_help=True, help="Hospitals: admit, renew, rotate, revoke."
)

Name = Annotated[str, typer.Argument(help="Lower-case letters, digits, hyphens.")]
Kit = Annotated[Path, typer.Option("--out", help="File for the kit to send back.")]


# ---- consortium ----


@consortium.command("init")
def consortium_init(
    name: Annotated[str, typer.Argument(help="Name of the consortium.")],
    state: State,
    host: Annotated[str, typer.Option(help="Host name by which hospitals reach it.")],
    port: Annotated[int, typer.Option(help="The one port hospitals reach.")] = 9092,
    interface: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 means all.")
    ] = "0.0.0.0",
    control_port: Annotated[int, typer.Option(help="Loopback: control.")] = 9093,
    health_port: Annotated[int, typer.Option(help="Loopback: health.")] = 9094,
    metrics_port: Annotated[int, typer.Option(help="Loopback: metrics.")] = 9095,
    signatures: Annotated[
        int, typer.Option(help="Administrators who must sign a contract.")
    ] = 1,
    authority_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDGEX_AUTHORITY_DIR",
            help="Folder for the authority's key, such as a removable medium; without "
            "it, the state directory.",
        ),
    ] = None,
    form: Format = "text",
) -> None:
    """Make the authority, the server's certificates and the state directory."""
    values = {
        "name": name,
        "host": host,
        "port": port,
        "interface": interface,
        "control_port": control_port,
        "health_port": health_port,
        "metrics_port": metrics_port,
        "signatures": signatures,
        "authority_dir": None
        if authority_dir is None
        else str(authority_dir.resolve()),
    }
    with refusals():
        settings = ConsortiumSettings.read(values, "consortium init")
        founded = Consortium.init(state, settings)
        facts = {
            "state": str(state),
            "authority": pki.fingerprint(founded.authority),
            "authority_key": str(founded.authority_dir / "authority.key"),
        }
    show(facts, form)
    note(
        "Keep a copy of the authority's key offline: it cannot be replaced. The server "
        "starts without it; what admits, renews or revokes needs it."
    )


@consortium.command("status")
def consortium_status(state: State, form: Format = "text") -> None:
    """List members, and warn of certificates that end within 30 days."""
    with refusals():
        found = Consortium(state)
        settings, sites = found.settings, found.sites().values()
        warnings = [str(each) for each in expiries(found)]
        if not found.revocation_list:
            warnings.append(
                "no list of revoked certificates is signed yet, so hospitals get none: "
                "fedgex-admin consortium renew signs one."
            )
        key = found.authority_dir / "authority.key"
        facts = {
            "consortium": settings.name,
            "server": f"{settings.host}:{settings.port}",
            "running": found.is_served(),
            "authority": pki.fingerprint(found.authority),
            "authority_key": str(key) if key.exists() else f"not in place: {key}",
            "own_certificates_until": {
                role: str(found.certificate(role).not_valid_after_utc.date())
                for role in ("server", "coordinator")
            },
            "administrators": list(found.administrators()),
            "signatures": settings.signatures,
            "sites": [each.name for each in sites if each.state == "active"],
            "revoked_sites": [each.name for each in sites if each.state == "revoked"],
            "revocations": _revocations(found),
        }
    show(facts | {"warnings": warnings} if form == "json" else facts, form)
    if form == "text":
        for warning in warnings:
            note(f"Warning: {warning}")


@consortium.command("renew")
def consortium_renew(
    state: State, authority_dir: AuthorityDir = None, form: Format = "text"
) -> None:
    """Issue new certificates of server and coordinator; no kit changes."""
    with refusals():
        found = Consortium(state, authority_dir)
        found.renew()
        facts = {"expires": found.coordinator.not_valid_after_utc.date()}
    show(facts, form)
    note("Restart the server, so that it shows the new certificate.")


# ---- administrators ----


@administrator.command("request")
def administrator_request(
    name: Name,
    out: Annotated[Path, typer.Option(help="Folder for key and request.")],
    form: Format = "text",
) -> None:
    """Make an administrator's key, where it will be used, and the request for it."""
    with refusals():
        path, asked = members.new_administrator(name, out)
    facts = {
        "key": str(out / f"{name}.key"),
        "request": str(path),
        "fingerprint": asked.fingerprint,
    }
    show(facts, form)
    note("Send the request, read the fingerprint out, and keep the key to yourself.")


@administrator.command("add")
def administrator_add(
    request: Annotated[Path, typer.Argument(help="The administrator's request.")],
    fingerprint: Fingerprint,
    state: State,
    out: Annotated[
        Path | None, typer.Option(help="File for the certificate to send back.")
    ] = None,
    authority_dir: AuthorityDir = None,
    form: Format = "text",
) -> None:
    """Admit an administrator whose request has this fingerprint."""
    with refusals():
        found = Consortium(state, authority_dir)
        certificate = members.add_administrator(found, request, fingerprint)
        if out is not None:
            write_out(out, pki.to_pem(certificate))
        name = pki.verify(certificate, found.authority, "administrator")
    show(
        {"administrator": name, "expires": certificate.not_valid_after_utc.date()}, form
    )


@administrator.command("list")
def administrator_list(state: State, form: Format = "text") -> None:
    """List the administrators in force and when their certificates end."""
    with refusals():
        found = Consortium(state)
        rows = [
            {
                "name": name,
                "expires": certificate.not_valid_after_utc.date(),
                "key": pki.fingerprint(certificate)[:16],
            }
            for name, certificate in found.administrators().items()
        ]
    show_rows(rows, form, "no administrator yet; see fedgex-admin administrator add")


@administrator.command("renew")
def administrator_renew(
    name: Name,
    out: Annotated[Path, typer.Option(help="File for the certificate to send back.")],
    state: State,
    authority_dir: AuthorityDir = None,
    form: Format = "text",
) -> None:
    """Write a new certificate over the key that an administrator has."""
    with refusals():
        found = Consortium(state, authority_dir)
        certificate = members.renew_administrator(found, name)
        write_out(out, pki.to_pem(certificate))
    show(
        {"administrator": name, "expires": certificate.not_valid_after_utc.date()}, form
    )


@administrator.command("revoke")
def administrator_revoke(
    name: Name,
    reason: Reason,
    state: State,
    authority_dir: AuthorityDir = None,
    form: Format = "text",
) -> None:
    """Revoke an administrator's certificate; hospitals get the signed list."""
    with refusals():
        members.revoke_administrator(Consortium(state, authority_dir), name, reason)
    show({"administrator": name, "state": "revoked"}, form)


# ---- hospitals ----


@site.command("add")
def site_add(
    name: Name,
    request: RequestFile,
    fingerprint: Fingerprint,
    out: Kit,
    state: State,
    authority_dir: AuthorityDir = None,
    form: Format = "text",
) -> None:
    """Admit a hospital whose request has this fingerprint, and write its kit."""
    with refusals():
        found = Consortium(state, authority_dir)
        kit = members.add_site(found, request, fingerprint, name=name)
        facts = _write_kit(found, name, kit, out)
    show(facts, form)


@site.command("list")
def site_list(state: State, form: Format = "text") -> None:
    """List the hospitals, their states, and when their certificates end."""
    with refusals():
        rows = [
            {
                "name": each.name,
                "state": each.state,
                "expires": each.expires.date(),
                "added": each.added.date(),
                "version": each.version,
                "reason": each.reason,
            }
            for each in Consortium(state).sites().values()
        ]
    show_rows(rows, form, "no hospital yet; see fedgex-admin site add")


@site.command("renew")
def site_renew(
    name: Name,
    out: Kit,
    state: State,
    authority_dir: AuthorityDir = None,
    form: Format = "text",
) -> None:
    """Write a kit with a new certificate over the keys that a hospital has."""
    with refusals():
        found = Consortium(state, authority_dir)
        facts = _write_kit(found, name, members.renew_site(found, name), out)
    show(facts, form)


@site.command("rotate")
def site_rotate(
    name: Name,
    request: RequestFile,
    fingerprint: Fingerprint,
    out: Kit,
    state: State,
    authority_dir: AuthorityDir = None,
    form: Format = "text",
) -> None:
    """Revoke a hospital's keys, admit its new ones, and write the new kit."""
    with refusals():
        found = Consortium(state, authority_dir)
        kit = members.rotate_site(found, name, request, fingerprint)
        facts = _write_kit(found, name, kit, out)
    show(facts, form)


@site.command("revoke")
def site_revoke(
    name: Name,
    reason: Reason,
    state: State,
    authority_dir: AuthorityDir = None,
    form: Format = "text",
) -> None:
    """Revoke a hospital: its connection and signatures are refused from now on."""
    with refusals():
        members.revoke_site(Consortium(state, authority_dir), name, reason)
    show({"site": name, "state": "revoked"}, form)


def _write_kit(
    found: Consortium, name: str, kit: dict[str, Any], out: Path
) -> dict[str, object]:
    """Write a hospital's kit; return what the command shows of it."""
    write_out(out, kit)
    expires = found.site(name).expires.date()
    return {"site": name, "kit": str(out), "expires": expires}


def _revocations(found: Consortium) -> str:
    """Return how many certificates the signed list names, and its date."""
    if not found.revocation_list:
        return "none signed"
    listed = revocation.read_list(found.revocation_list, found.authority)
    of = f"{listed.last_update_utc:%Y-%m-%d %H:%M} UTC"
    return f"{len(revocation.serials(listed))} certificates, list of {of}"
