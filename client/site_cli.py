"""`fedgex-site` for a hospital's operator: set up, join, check, look, pause."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from fedgex.client import identity, policy
from fedgex.client.connection import Check, Step
from fedgex.client.decisions import Desk, Received
from fedgex.client.identity import AUDIT, Identity, Request
from fedgex.client.ledger import LedgerError
from fedgex.client.settings import SERVER_PATTERN, SiteSettings
from fedgex.client.spending import Account
from fedgex.client.study_cli import Form, Format, SiteToml, refusing, state_of
from fedgex.common import chain, pki
from fedgex.common.chain import Chain, Head
from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.files import lock_holder, write_atomic
from fedgex.common.pki import Signed
from fedgex.common.receipt import Part, Receipt
from fedgex.common.study import NAME_PATTERN

WARN_DAYS = 30
"""Certificates that expire sooner are warned of."""

UNREACHABLE, NOT_FOUND, NOT_RUNNING = 4, 3, 4
"""Exit codes; 1 is refused, 2 wrong usage."""

TEMPLATE = """\
# The hospital's own settings. Relative paths start at the folder of this file.
# What studies may do here stands in policy.toml beside it.
name = "{name}"                       # this hospital, as the consortium calls it
server = "{server}"     # host:port of the consortium; the one place that we connect to
state_dir = "state"                  # keys, approvals, replies, audit log; back it up

# proxy = "http://proxy.hospital:3128"       # if the way out leads through a proxy
# server_authority = "hospital-ca.pem"       # if that proxy opens TLS: its authority, PEM
# health_port = 9101                         # loopback port for health checks
# metrics_port = 9102                        # loopback port for monitoring (Prometheus)

[data]                               # docs/hospital-data.md; try it with check-data
expression = "expression.tsv.gz"     # .csv, .tsv (also .gz), .parquet or .h5ad
# clinical = "clinical.csv"          # needed for classification and survival
scale = "log2p1"                     # CHANGE to what your numbers are: linear, log2p1, ...
# hgnc_table = "hgnc_complete_set.txt"  # for Ensembl ids and retired symbols
# opt_outs = "opt-outs.txt"          # patients to leave out, one identifier a line
# time_unit = "days"                 # of the follow-up: days, months, years

# [data.columns]                     # where your clinical columns are named otherwise
# patient = "patient"
"""  # noqa: E501

commands = typer.Typer()
logs = typer.Typer(no_args_is_help=True, help="Look at the hospital's audit log.")
commands.add_typer(logs, name="log")


def _is_server(server: str) -> str:
    if not re.fullmatch(SERVER_PATTERN, server):
        raise typer.BadParameter(f'"{server}" must be HOST:PORT')
    return server


def _is_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise typer.BadParameter(
            f'"{name}" must be lower-case letters, digits and hyphens'
        )
    return name


# ---- commands ----


@commands.command()
def init(
    site_dir: Annotated[Path, typer.Argument(help="Folder for this hospital.")],
    name: Annotated[
        str,
        typer.Option(
            help="This hospital: lower-case letters, digits, hyphens.",
            callback=_is_name,
        ),
    ],
    server: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="The consortium's server.",
            callback=_is_server,
        ),
    ],
) -> None:
    """Write settings, policy, keys and a request; what exists is kept as it is."""
    with refusing():
        site_toml, request = set_up(site_dir, name, server)
    typer.echo(
        f"Settings are in {site_toml} and {policy.FILE} beside it: read both.\n"
        f"Send {request} to the administrator, and read this fingerprint out to them "
        "by telephone:",
        err=True,
    )
    typer.echo(Request.load(request).fingerprint)
    typer.echo(f"When the kit comes back: fedgex-site join {site_toml} KIT", err=True)


@commands.command()
def join(
    site_toml: SiteToml,
    kit: Annotated[Path, typer.Argument(help="The kit from the administrator.")],
) -> None:
    """Take the kit that the administrator made from our request."""
    with refusing():
        joined = identity.join(SiteSettings.load(site_toml), kit)
    until = joined.certificate.not_valid_after_utc
    typer.echo(
        f"joined {joined.consortium} as {joined.name}, server {joined.server}, "
        f"certificate until {until:%Y-%m-%d}"
    )
    typer.echo(
        "Compare the authority's fingerprint with the one that the administrator reads "
        f"out: {pki.fingerprint(joined.authority)}\n"
        f"Next: fedgex-site check-connection {site_toml}",
        err=True,
    )


@commands.command()
def check_connection(site_toml: SiteToml, form: Form = Format.TEXT) -> None:
    """Try the way to the server step by step; says which fails, and the fix."""
    steps: list[Step] = []
    with refusing():
        for step in check(SiteSettings.load(site_toml)).steps():
            steps.append(step)
            if form == Format.TEXT:
                typer.echo(str(step))
    if form == Format.JSON:
        typer.echo(json.dumps([asdict(step) for step in steps], indent=2))
    failed = [step.name for step in steps if step.state == "failed"]
    if failed:
        raise typer.Exit(UNREACHABLE if failed[0] in ("name", "connection") else 1)


@commands.command()
def status(site_toml: SiteToml, form: Form = Format.TEXT) -> None:
    """Say whether the site runs, what it may do, and what wants attention."""
    with refusing():
        facts = status_of(SiteSettings.load(site_toml))
    if form == Format.JSON:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        typer.echo(_as_text(facts))
    if not facts["running"]:
        raise typer.Exit(NOT_RUNNING)


@commands.command()
def pause(
    site_toml: SiteToml,
    by: Annotated[str, typer.Option(help="Who pauses; stands in the log.")],
    reason: Annotated[str, typer.Option(help="Why; stands in the log.")],
) -> None:
    """Answer no message until `resume`; what is computed now is still sent."""
    with refusing():
        settings = SiteSettings.load(site_toml)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"by": by, "reason": reason, "at": at}
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(settings.state_dir / "paused", json.dumps(content).encode())
        Chain(settings.state_dir / AUDIT).append("paused", by=by, reason=reason)
    typer.echo(f"paused by {by}")


@commands.command()
def resume(
    site_toml: SiteToml,
    by: Annotated[str, typer.Option(help="Who resumes; stands in the log.")],
) -> None:
    """Answer messages again."""
    with refusing():
        settings = SiteSettings.load(site_toml)
        path = settings.state_dir / "paused"
        if not path.exists():
            raise ConfigError("this hospital is not paused; there is nothing to do.")
        Chain(settings.state_dir / AUDIT).append("resumed", by=by)
        path.unlink()
    typer.echo(f"resumed by {by}")


@logs.command("verify")
def log_verify(site_toml: SiteToml) -> None:
    """Find any line of the audit log that was changed, removed, reordered or cut."""
    with refusing():
        settings = SiteSettings.load(site_toml)
        if not (settings.state_dir / AUDIT).exists():
            typer.echo(
                f"Error: {settings.state_dir / AUDIT} does not exist; expected the log "
                "of a hospital that has joined.",
                err=True,
            )
            raise typer.Exit(NOT_FOUND)
        head, receipts = verify_log(settings)
    typer.echo(
        f"ok: {head.index} lines, none changed, removed or reordered; it holds what "
        f"{receipts} receipts say of it; head {head.hash}"
    )


# ---- what they do ----


def set_up(site_dir: Path, name: str, server: str) -> tuple[Path, Path]:
    """Write what a new hospital needs; files and keys that exist are kept.

    Returns
    -------
    tuple of Path
        `site.toml` and `request.json`.

    Raises
    ------
    ConfigError
        If the folder is another hospital's.
    """
    site_toml = site_dir / "site.toml"
    files = {
        site_toml: TEMPLATE.format(name=name, server=server),
        site_dir / policy.FILE: policy.TEMPLATE,
    }
    site_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path, text in files.items():
        if not path.exists():
            write_atomic(path, text.encode())
    settings = SiteSettings.load(site_toml)
    if (settings.name, settings.server) != (name, server):
        raise ConfigError(
            f'{site_toml} exists, for "{settings.name}" at {settings.server}, and is '
            f'kept; expected "{name}" at {server}. Change it by hand, or take another '
            "folder."
        )
    request = settings.state_dir / "request.json"
    if not (settings.state_dir / "identity").exists():
        request = identity.create(settings)
    return site_toml, request


def check(settings: SiteSettings) -> Check:
    """Return the check of the way from a hospital to its server."""
    joined = (settings.state_dir / "identity" / "kit.json").exists()
    found = Identity.load(settings.state_dir) if joined else None
    server = settings.server if found is None else found.server
    if server is None:
        raise ConfigError(
            "site.toml names no server, and there is no kit yet that does; set "
            'server = "HOST:PORT".'
        )
    return Check(server, found, settings.proxy, settings.server_authority)


def verify_log(settings: SiteSettings) -> tuple[Head, int]:
    """Follow the audit log, and look for each of its heads that a receipt holds.

    Returns
    -------
    tuple
        The log's head, and the number of receipts with a head of it.

    Raises
    ------
    TrustError
        If a line was changed, removed or reordered, or the log does not hold a head
        that the coordinator signed: then its end was cut, or a backup restored.
    """
    path = settings.state_dir / AUDIT
    head = chain.verify(path)
    lines = {Head(line["n"], line["hash"]) for line in chain.read(path)}
    receipts = sorted((settings.state_dir / "receipts").glob("*/*.json"))
    compared = 0
    for file in receipts:
        name = f"receipts/{file.parent.name}/{file.name}"
        receipt = Receipt.read_signed(Signed.from_json(file.read_bytes(), name))
        ours = receipt.sites.get(settings.name)
        if ours is None or ours.part is None:
            continue
        known = Part.from_json(ours.part, name).head
        if known not in lines:
            raise TrustError(
                f"{name} holds our signature over line {known.index} of the audit log, "
                f"and the log of {head.index} lines does not have that line: its end "
                "was cut, or it was restored from a backup. Keep both, find out what "
                "happened, and tell the administrator."
            )
        compared += 1
    return head, compared


def status_of(settings: SiteSettings) -> dict[str, Any]:
    """Return what `status` tells."""
    state_dir = settings.state_dir
    warnings: list[str] = []
    joined = (state_dir / "identity" / "kit.json").exists()
    facts: dict[str, Any] = {
        "name": settings.name,
        "version": version("fedgex"),
        "running": is_running(state_dir),
        "paused": _json(state_dir / "paused", warnings),
        "daemon": _json(state_dir / "status.json", warnings),
        "consortium": None,
        "server": settings.server,
        "certificate_expires": None,
        "contracts": [],
        "privacy": None,
        "audit": asdict(Chain(state_dir / AUDIT).head),
        "warnings": warnings,
    }
    if not joined:
        warnings.append("this hospital has not joined a consortium: fedgex-site join")
        return facts
    desk, own = Desk.of(settings), Identity.load(state_dir)
    until = own.certificate.not_valid_after_utc
    days = (until - datetime.now(UTC)).days
    if days < WARN_DAYS:
        when = "expired" if days < 0 else f"expires in {days} days"
        warnings.append(
            f"this hospital's certificate {when} ({until:%Y-%m-%d}): ask the "
            "administrator for a new kit, then fedgex-site join"
        )
    readable = desk.contracts()
    unreadable = len(desk.find("")) - len(readable)
    if unreadable:
        warnings.append(
            f"{unreadable} contract(s) cannot be trusted: fedgex-site study show says "
            "why"
        )
    account = _account(settings, warnings)
    return facts | {
        "privacy": None if account is None else _spending(account),
        "consortium": own.consortium,
        "server": own.server,
        "certificate_expires": until.isoformat(),
        "contracts": [_contract(desk, received, account) for received in readable],
    }


def _account(settings: SiteSettings, warnings: list[str]) -> Account | None:
    try:
        return Account.of(settings)
    except LedgerError as error:
        warnings.append(f"{error.code}: {error}")
        return None


def _spending(account: Account) -> dict[str, float]:
    return {
        "epsilon": account.budget.epsilon,
        "delta": account.budget.delta,
        "spent": account.spent,
        "left": account.left,
    }


def _contract(
    desk: Desk, received: Received, account: Account | None
) -> dict[str, Any]:
    decision = desk.decision(received.hash)
    study = received.contract.study
    facts: dict[str, Any] = {
        "hash": received.hash,
        "study": study.name,
        "state": state_of(received, decision),
        "expires": received.contract.expires.isoformat(),
        "rounds_left": None,
        "rounds_planned": None,
    }
    approved = decision is not None and decision.decision == "approved"
    if approved and account is not None and study.privacy.patient is not None:
        left, planned = account.rounds_left(received.hash, study)
        facts |= {"rounds_left": left, "rounds_planned": planned}
    return facts


def is_running(state_dir: Path) -> bool:
    """Return whether a daemon holds its lock; a file that was left behind is none."""
    return lock_holder(state_dir / "daemon.lock") is not None


def _json(path: Path, warnings: list[str]) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        warnings.append(f"{path.name} cannot be read")
        return "unreadable"


def _as_text(facts: dict[str, Any]) -> str:
    """Return one line a fact; nested facts as JSON."""
    paused, expires = facts["paused"], facts["certificate_expires"]
    lines = [
        f"hospital     {facts['name']}, fedgex {facts['version']}",
        f"running      {'yes' if facts['running'] else 'no; start: fedgex-site start'}",
        f"paused       {_paused(paused) if paused else 'no'}",
        f"consortium   {facts['consortium'] or 'not joined'}, server {facts['server']}",
        f"certificate  {'none' if expires is None else 'until ' + expires[:10]}",
        f"audit log    {facts['audit']['index']} lines, head "
        f"{facts['audit']['hash'][:16]}",
    ]
    if isinstance(facts["daemon"], dict):
        lines += [f"daemon       {k}: {_word(v)}" for k, v in facts["daemon"].items()]
    if (privacy := facts["privacy"]) is not None:
        lines.append(
            f"privacy      spent {privacy['spent']:.3g} of epsilon "
            f"{privacy['epsilon']:g} for each patient at delta {privacy['delta']:g}, "
            f"left {privacy['left']:.3g}"
        )
    lines += _contract_lines(facts["contracts"])
    lines += [f"Warning: {warning}" for warning in facts["warnings"]]
    return "\n".join(lines)


def _contract_lines(contracts: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"contract     {each['hash'][:16]} {each['study']}: {each['state']}"
        + (
            ""
            if each["rounds_left"] is None
            else f", budget for {each['rounds_left']} of {each['rounds_planned']} "
            "rounds to come"
        )
        for each in contracts
    ] or ["contract     none received"]


def _paused(paused: Any) -> str:
    if not isinstance(paused, dict):
        return "yes"
    return f"by {paused.get('by')} since {paused.get('at')}: {paused.get('reason')}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
