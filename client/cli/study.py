"""`fedgex-site study`: what a person of the hospital decides about each contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from fedgex.client.admission.approvals import (
    ApprovalStore,
    Decision,
    Received,
    Refusal,
    require_pins,
    runs_of,
)
from fedgex.client.cli.options import (
    Form,
    Format,
    SiteToml,
    load,
    not_found,
    refusing,
)
from fedgex.client.ledger.budget import Account
from fedgex.client.settings import SiteSettings
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError
from fedgex.common.trust.contract import remaining

study = typer.Typer(
    no_args_is_help=True,
    help="Read the contracts of studies, and approve, reject or withdraw them.",
)


Prefix = Annotated[
    str,
    typer.Argument(metavar="HASH", help="The contract's hash, or its first letters."),
]
By = Annotated[
    str,
    typer.Option(help="Who decides; stands in the log and in an approval sent out."),
]
Reason = Annotated[str, typer.Option(help="Why; stands in the log, does not leave.")]


@study.command("list")
def list_contracts(site_toml: SiteToml, form: Form = Format.TEXT) -> None:
    """List every contract that reached this hospital and what was decided about it."""
    with refusing():
        _, approvals = _open(site_toml)
        rows = [_summary(approvals, received) for received in approvals.contracts()]
    if form == Format.JSON:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        typer.echo(f"{row['hash'][:16]}  {row['state']:<34}  {row['purpose']}")
    if not rows:
        typer.echo("no contract has been received yet", err=True)


@study.command()
def show(site_toml: SiteToml, hash: Prefix, form: Form = Format.TEXT) -> None:
    """Print a contract: for what, with whom, its text, and what our policy refuses."""
    with refusing():
        settings, approvals = _open(site_toml)
        received = approvals.contract(_find(approvals, hash))
        facts = _facts(approvals, received, settings)
        facts["data"] = _coverage(settings, received)
    if form == Format.JSON:
        text = {"text": received.text}
        typer.echo(json.dumps(facts | text, indent=2, ensure_ascii=False))
    else:
        typer.echo(_as_text(facts, received.text))


@study.command()
def approve(
    site_toml: SiteToml,
    hash: Prefix,
    by: By,
    expires: Annotated[
        datetime,
        typer.Option(
            formats=["%Y-%m-%d"],
            help="Last day, UTC; at the latest that of the contract.",
        ),
    ],
    runs: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            help="Runs of the contract in all, those that began before included.",
        ),
    ] = 1,
) -> None:
    """Let a study run here until a day, for a number of runs, within the policy."""
    with refusing():
        settings, approvals = _open(site_toml)
        full = _find(approvals, hash)
        made = approvals.decide(
            full, "approved", by=by, expires=expires.date(), runs=runs
        )
        received = approvals.contract(full)
        against = settings.policy.objections(received.contract.study)
        data = _coverage(settings, received)
    typer.echo(f"approved {full} until {made.expires} for {runs_of(made)} by {made.by}")
    for each in against:
        typer.echo(f"Warning: it will be refused all the same: {each}", err=True)
    for each in data:
        typer.echo(f"our data: {each}", err=True)


@study.command()
def reject(site_toml: SiteToml, hash: Prefix, by: By, reason: Reason) -> None:
    """Decline a contract; it can still be approved later."""
    with refusing():
        _, approvals = _open(site_toml)
        full = _find(approvals, hash)
        made = approvals.decide(full, "rejected", by=by, reason=reason)
    typer.echo(f"rejected {full} by {made.by}")


@study.command()
def withdraw(
    site_toml: SiteToml,
    hash: Prefix,
    by: By,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take an approval back for good: this contract never runs here again."""
    with refusing():
        _, approvals = _open(site_toml)
        full = _find(approvals, hash)
        if not yes:
            typer.confirm(
                f"Contract {full[:16]} will never run here again. What has left the "
                "hospital stays in the model. Withdraw?",
                abort=True,
                err=True,
            )
        made = approvals.decide(full, "withdrawn", by=by, reason=reason)
    typer.echo(f"withdrew {full} by {made.by}")


def state_of(received: Received, decision: Decision | None) -> str:
    """Return the state of a contract at this hospital, in a few words."""
    now = datetime.now(UTC)
    if decision is not None and decision.decision == "withdrawn":
        return "withdrawn"
    if received.contract.expired(now):
        return "contract expired"
    if decision is None:
        return "undecided"
    if decision.expires is None:
        return "rejected"
    if now.date() > decision.expires:
        return "approval expired"
    return f"approved until {decision.expires}, {runs_of(decision)}"


def _open(site_toml: Path) -> tuple[SiteSettings, ApprovalStore]:

    settings = load(site_toml)
    return settings, ApprovalStore.of(settings)


def _coverage(settings: SiteSettings, received: Received) -> list[str]:
    """Return what of a contract the hospital's data can take part in."""
    from fedgex.client.admission import coverage  # pandas, which most commands need not

    return coverage.of_site(settings, received.contract.study)


def _find(approvals: ApprovalStore, prefix: str) -> str:
    """Return the unique hash with this prefix; exit with 3 for none, 1 for several."""
    found = approvals.find(prefix)
    if len(found) == 1:
        return found[0]
    if not found:
        not_found(
            f'no contract here has a hash that begins with "{prefix}"; fedgex-site '
            "study list shows those that do."
        )
    raise ConfigError(
        f'{len(found)} contracts begin with "{prefix}"; give more letters of the hash.'
    )


def _summary(approvals: ApprovalStore, received: Received) -> dict[str, Any]:
    decision = approvals.decision(received.hash)
    return {
        "hash": received.hash,
        "state": state_of(received, decision),
        "expires": received.contract.expires.isoformat(),
        "purpose": _printable(received.contract.purpose),
    }


def _facts(
    approvals: ApprovalStore, received: Received, settings: SiteSettings
) -> dict[str, Any]:

    policy = settings.policy
    contract, decision = received.contract, approvals.decision(received.hash)
    refused = policy.objections(contract.study)
    if not contract.supports(version("fedgex")):
        refused.append(
            f"The contract is for fedgex {contract.code_version}, and "
            f"{version('fedgex')} is installed."
        )
    try:
        require_pins(contract)
    except Refusal as refusal:
        refused.append(str(refusal))
    decided = None if decision is None else decision.model_dump(mode="json")
    return _summary(approvals, received) | {
        "sites": list(contract.sites),
        "signed_by": list(received.signers),
        "code_version": contract.code_version,
        "privacy": contract.study.privacy.model_dump(mode="json"),
        "secure_aggregation": contract.study.secure_aggregation is not None,
        "no_secure_aggregation": _printable(contract.no_secure_aggregation),
        "not_protected": [_printable(each) for each in remaining(contract)],
        "administrators": approvals.administrators,
        "cost": _cost(received, settings),
        "samples_are_patients": settings.data.clinical is None
        and settings.data.expression.suffix != ".h5ad",
        "release_by": contract.release.administrators,
        "tasks": list(contract.study.phases),
        "minimum_cohort": max(contract.study.minimum_cohort, policy.minimum_cohort),
        "decision": decided,
        "runs": list(approvals.runs(received.hash)),
        "refused": refused,
    }


def _as_text(facts: dict[str, Any], text: str) -> str:
    decided = facts["decision"]
    lines = [
        f"contract     {facts['hash']}",
        f"purpose      {facts['purpose']}",
        f"hospitals    {', '.join(facts['sites'])}",
        f"signed by    {', '.join(facts['signed_by'])}; we want "
        f"{facts['administrators']}",
        f"expires      {facts['expires']}",
        f"trains       {', '.join(facts['tasks'])}",
        *(f"privacy      {each}" for each in _privacy(facts)),
        *(f"remains      {each}" for each in facts["not_protected"]),
        f"release      by {facts['release_by']} administrator(s)",
        f"code         fedgex {facts['code_version']}",
        f"patients     {facts['minimum_cohort']} or more here, or we take no part "
        "(the stricter of contract and policy)",
        f"state        {facts['state']}"
        + (f", by {decided['by']} on {decided['at'][:10]}" if decided else ""),
    ]
    lines += [f"runs         {_runs(facts)}"]
    lines += [f"our data     {each}" for each in facts["data"]]
    if facts["refused"]:
        lines += ["our policy   refuses it:"]
        lines += [f"  - {each}" for each in facts["refused"]]
    else:
        lines += ["our policy   refuses nothing of it"]
    signed = [_printable(line) for line in text.splitlines()]
    return "\n".join([*lines, "", "--- text that was signed", *signed])


def _runs(facts: dict[str, Any]) -> str:
    """Return how many runs were approved and have begun."""
    begun, decided = facts["runs"], facts["decision"]
    if decided is None or decided["decision"] != "approved":
        permitted = "one if approved, more with approve --runs"
    else:
        permitted = f"{decided.get('runs', 'any number')} approved"
    return ", ".join([f"{permitted}, {len(begun)} begun", *begun]).replace(
        "begun, ", "begun: ", 1
    )


def _cost(received: Received, settings: SiteSettings) -> dict[str, float] | None:
    """Return what a study under patient-level privacy costs; None for another."""
    study = received.contract.study
    if study.privacy.patient is None:
        return None
    account = Account.of(settings)
    return {
        "epsilon": account.study_epsilon(study),
        "spent": account.spent,
        "after": account.after(received.hash, study),
        "budget": account.budget.epsilon,
        "delta": account.budget.delta,
    }


def _privacy(facts: dict[str, Any]) -> Iterator[str]:
    """Yield one sentence for each protection of patients or the hospital."""
    patient, site = facts["privacy"]["patient"], facts["privacy"]["site"]
    if patient is None:
        yield (
            "no differential privacy; updates leave as they are"
            if site is None and not facts["secure_aggregation"]
            else "none for patients: nothing bounds what leaves reveals of them"
        )
    else:
        cost = facts["cost"]
        at = f"at delta {cost['delta']:g}"
        yield (
            "for each patient, made here: the study costs epsilon "
            f"{cost['epsilon']:.3g} {at}"
        )
        yield (
            f"budget of a patient: epsilon {cost['spent']:.3g} spent, "
            f"{cost['after']:.3g} after this study, {cost['budget']:g} permitted"
        )
        if facts["samples_are_patients"]:
            yield (
                "site.toml names no clinical table: each sample counts as a patient, "
                "and a patient with several is protected less than this says"
            )
        if cost["after"] > cost["budget"]:
            yield (
                f"the budget ends this study early: {Code.BUDGET_EXCEEDED} from some "
                "round on"
            )
    if site is not None:
        yield (
            "for this hospital's contribution, if the server is trusted to add noise "
            f"{site['noise_multiplier']:g} on updates of norm {site['clip']:g}"
        )
    if facts["secure_aggregation"]:
        yield "the server sees the sum of all hospitals' updates, none by itself"


def _printable(text: str) -> str:
    """Replace control characters in a foreign text."""
    return "".join(c if c.isprintable() else " " for c in text)
