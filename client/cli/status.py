"""`fedgex-site status`: whether the site runs, its limits, and what needs attention."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from fedgex.client.admission.approvals import ApprovalStore, Received
from fedgex.client.cli.options import (
    NOT_RUNNING,
    Form,
    Format,
    SiteToml,
    load,
    refusing,
)
from fedgex.client.cli.study import state_of
from fedgex.client.identity import AUDIT, NOT_PINNED, Identity, described
from fedgex.client.ledger.budget import Account
from fedgex.client.ledger.ledger import LedgerError
from fedgex.client.settings import SiteSettings
from fedgex.common.errors import ConfigError
from fedgex.common.system.files import lock_holder, read_json
from fedgex.common.trust.audit_log import Chain

WARN_DAYS = 30
"""Days before expiry from which a certificate causes a warning."""

commands = typer.Typer()


@commands.command()
def status(site_toml: SiteToml, form: Form = Format.TEXT) -> None:
    """Show whether the site runs, what it may do, and what needs attention."""
    with refusing():
        facts = status_of(load(site_toml))
    if form == Format.JSON:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        typer.echo(_as_text(facts))
    if not facts["running"]:
        raise typer.Exit(NOT_RUNNING)


def status_of(settings: SiteSettings) -> dict[str, Any]:
    """Return what `status` prints, by name."""
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
        "administrators": None,
        "revocations": None,
        "contracts": [],
        "privacy": None,
        "audit": asdict(Chain(state_dir / AUDIT).head),
        "warnings": warnings,
    }
    if not joined:
        warnings.append("this hospital has not joined a consortium: fedgex-site join")
        return facts
    approvals, own = ApprovalStore.of(settings), Identity.load(state_dir)
    until = own.certificate.not_valid_after_utc
    days = (until - datetime.now(UTC)).days
    if days < WARN_DAYS:
        when = "expired" if days < 0 else f"expires in {days} days"
        warnings.append(
            f"this hospital's certificate {when} ({until:%Y-%m-%d}): ask the "
            "administrator for a new kit, then fedgex-site join"
        )
    if not own.administrators:
        warnings.append(NOT_PINNED)
    if settings.server not in (None, own.server):
        warnings.append(
            f"site.toml names the server {settings.server}, the kit {own.server}"
        )
    readable = approvals.contracts()
    unreadable = len(approvals.find("")) - len(readable)
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
        "administrators": described(own),
        "revocations": own.revoked_at and own.revoked_at.isoformat(),
        "contracts": [_contract(approvals, received, account) for received in readable],
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
    approvals: ApprovalStore, received: Received, account: Account | None
) -> dict[str, Any]:
    decision = approvals.decision(received.hash)
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
        return read_json(path, "what this hospital wrote")
    except ConfigError:
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
        f"contracts    need {facts['administrators'] or 'a kit'}",
        f"revocations  list of {facts['revocations'] or 'no day yet'}",
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
