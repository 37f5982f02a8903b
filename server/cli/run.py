"""`fedgex-admin run`: launch, watch, stop and resume runs; list contributors."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedgex.common.errors import FedgexError
from fedgex.common.trust import pki
from fedgex.common.trust.receipt import Receipt, verify_chain
from fedgex.common.trust.signed import Signed
from fedgex.server import journal, run_monitor
from fedgex.server.cli.command_line import (
    NOT_RUNNING,
    REFUSED,
    Format,
    KeyFile,
    OptionalState,
    State,
    leave,
    note,
    refusals,
    show,
    show_rows,
)
from fedgex.server.consortium import commands, contracts, runs
from fedgex.server.consortium.store import Consortium

run = typer.Typer(no_args_is_help=True, help="Launch, watch, stop and resume runs.")

ABSENT_S = 60.0
"""Longest absence of the server while a run is watched, seconds."""
Name = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]


@run.command("status")
def run_status(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, with journal.jsonl; or its name.")
    ],
    state: OptionalState = None,
    form: Format = "text",
) -> None:
    """Show the progress of a run, and the sites that missed its last round."""
    with refusals():
        if not run.exists() and state is not None:
            run = runs.load(state, str(run)).folder
        facts = status(run)
    show(facts, form)


@run.command("launch")
def run_launch(
    contract: Annotated[
        str, typer.Argument(help="Hash, six or more characters of it, or study's name.")
    ],
    key: KeyFile,
    state: State,
    submit_token: Annotated[
        str | None,
        typer.Option(help="Names this launch: given again, it is the same run."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; without it, the study's.")
    ] = None,
    form: Format = "text",
) -> None:
    """Order a run of a published contract; with the same token it is the same run."""
    with refusals():
        found = Consortium(state)
        published = contracts.find(found, contract)
        contracts.usable(found, published)
        order = commands.launch(
            found,
            published.hash,
            name or published.contract.study.name,
            pki.load_key(key),
            token=submit_token,
        )
        facts = {"run": order.run, "contract": order.subject, **_standing(found, order)}
    _ordered(found, facts, form)


@run.command("list")
def run_list(state: State, form: Format = "text") -> None:
    """List the runs, and the launches that the server has not carried out yet."""
    with refusals():
        found = Consortium(state)
        rows = [_row(each, form) for each in runs.every(found.folder)]
        known = {row["run"] for row in rows}
        rows += [
            {
                "run": name,
                "state": "ordered",
                "contract": _short(order.subject, form),
                "last_round": None,
                "reason": None,
            }
            for name, order in commands.launches(found).items()
            if name not in known
        ]
    show_rows(rows, form, "no run yet; see fedgex-admin run launch")


@run.command("stop")
def run_stop(run: Name, key: KeyFile, state: State, form: Format = "text") -> None:
    """Order that a run stops; what it has reached stays, and it can be resumed."""
    _order(state, "stop", run, key, form)


@run.command("resume")
def run_resume(run: Name, key: KeyFile, state: State, form: Format = "text") -> None:
    """Order that a stopped or failed run goes on from its last checkpoint."""
    _order(state, "resume", run, key, form)


@run.command("receipts")
def run_receipts(run: Name, state: State, form: Format = "text") -> None:
    """Verify a run's chain of receipts and show who contributed to each round."""
    with refusals():
        found = Consortium(state)
        rows = receipts(found, runs.load(found.folder, run).folder)
    if form == "json":
        show({"run": run, "verified": True, "receipts": rows}, form)
        return
    table = [
        {
            "receipt": row["index"],
            "round": f"{row['phase']} {row['round']}",
            "hospital": site,
            "state": part["state"],
            "patients": part["patients"],
            "reason": part["reason"],
        }
        for row in rows
        for site, part in row["sites"].items()
    ]
    show_rows(table, form, "no round is finished yet")
    note(f"{len(rows)} receipts, all signatures and the chain verified")


@run.command("watch")
def run_watch(run: Name, state: State, form: Format = "text") -> None:
    """Follow a run to its end: rounds, hospitals, restoration error, time left."""
    with refusals():
        found = Consortium(state)
        watched = runs.load(found.folder, run)
        ended = _follow(found, watched, form)
    if ended == "running":
        leave(
            f'the server is not running, and the run "{run}" is not at its end; start '
            "it with fedgex-admin server start, and the run goes on by itself.",
            NOT_RUNNING,
        )
    if ended != "finished":
        leave(f'the run "{run}" {ended}: {watched.facts["reason"]}', REFUSED)


def status(run: Path) -> dict[str, Any]:
    """Return a run's state, last round, and absent sites, from its journal.

    Raises
    ------
    FedgexError
        If the folder holds no journal, or the journal was damaged.
    """
    path = run / "journal.jsonl"
    if not path.exists():
        path = run / "run" / "journal.jsonl"
    if not path.exists():
        raise FedgexError(
            f"{run} holds no journal.jsonl; expected a run's folder, such as OUT/run."
        )
    events = journal.read(path)
    begun = [e for e in events if e["event"] == "run-started"]
    rounds = [e for e in events if e["event"] == "round"]
    ends = [e for e in events if e["event"] in ("run-started", *journal.ENDINGS)]
    facts: dict[str, Any] = {
        "study": begun[-1]["study"] if begun else None,
        "state": ends[-1]["event"].removeprefix("run-") if ends else "not started",
        "reason": ends[-1].get("reason") if ends else None,
        "unknown_genes": begun[-1].get("unknown_genes", []) if begun else [],
        "genes_of_one_site": begun[-1].get("genes_of_one_site", []) if begun else [],
        "last_round": None,
        "absent": {},
    }
    if rounds:
        last = rounds[-1]
        facts["last_round"] = f"{last['phase']} {last['round']}/{last['rounds']}"
        facts["train_loss"] = last["train_loss"]
        facts["epsilon"] = last.get("epsilon")
        facts["absent"] = {
            name: f"{site['state']}: {site['reason']}"
            for name, site in last["sites"].items()
            if site["state"] != "contributed"
        }
    return facts


def receipts(consortium: Consortium, folder: Path) -> list[dict[str, Any]]:
    """Verify a run's chain of receipts, and return their content.

    Raises
    ------
    TrustError
        If a receipt was changed, removed or reordered.
    """
    paths = sorted((folder / "checkpoints").glob("[0-9]*/receipt.json"))
    found = [Signed.from_json(path.read_text(), str(path)) for path in paths]
    contract = contracts.load(consortium, runs.Run(folder).facts["contract"]).contract
    secure = contract.study.secure_aggregation is not None
    verify_chain(found, consortium.authority, contract.site_keys, secure=secure)
    rows = []
    for signed in found:
        reported = Receipt.read_signed(signed).model_dump(mode="json")
        reported["hash"] = signed.hash
        rows.append(reported)
    return rows


def _follow(found: Consortium, watched: runs.Run, form: str) -> str:
    """Show the run until it ends; return its state."""
    last_served = -math.inf  # a server that is away from the start is not waited for
    standing = watched.state

    def over(_: run_monitor.RunState) -> bool:
        nonlocal standing, last_served
        standing, now = watched.state, time.monotonic()
        if found.is_served():
            last_served = now
        return standing != "running" or now - last_served > ABSENT_S

    run_monitor.follow(
        watched.folder / "journal.jsonl",
        over,
        Console(),
        title=watched.name,
        as_json=form == "json",
    )
    return standing


def _order(state: Path, kind: commands.Kind, run: str, key: Path, form: str) -> None:
    """Submit an order about a run that exists or was ordered."""
    with refusals():
        found = Consortium(state)
        begun = run in {each.name for each in runs.every(found.folder)}
        if begun or run not in commands.launches(found):
            _refuse_finished(runs.load(found.folder, run), kind)
        order = commands.submit(found, kind, run, pki.load_key(key))
        facts = {"run": run, "order": kind, **_standing(found, order)}
    _ordered(found, facts, form)


def _refuse_finished(run: runs.Run, kind: str) -> None:
    if run.state == "finished":
        raise FedgexError(
            f'the run "{run.name}" is finished, so there is nothing to {kind}; to '
            "train again, launch another with a --name of its own."
        )


def _standing(found: Consortium, order: commands.Order) -> dict[str, Any]:
    known = commands.outcome(found, order.token)
    return {"token": order.token, "state": known.state if known else "pending"}


def _ordered(found: Consortium, facts: dict[str, Any], form: str) -> None:
    show(facts, form)
    if facts["state"] == "pending" and not found.is_served():
        note("The server is not running; it carries the order out once it is started.")


def _row(each: runs.Run, form: str) -> dict[str, Any]:
    facts = each.facts
    try:
        last_round = status(each.folder)["last_round"]
    except FedgexError:
        last_round = None  # nothing is written yet
    return {
        "run": each.name,
        "state": facts["state"],
        "contract": _short(facts["contract"], form),
        "last_round": last_round,
        "reason": facts["reason"],
    }


def _short(hash: str, form: str) -> str:
    return hash if form == "json" else hash[:12]
