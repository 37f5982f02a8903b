"""`fedgex-admin`: what the consortium's administrator sees of a run and its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from fedgex.common import checkpoint
from fedgex.common.errors import FedgexError
from fedgex.server import journal

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
runs = typer.Typer(no_args_is_help=True, help="Watch a run.")
models = typer.Typer(no_args_is_help=True, help="Look at models.")
app.add_typer(runs, name="run")
app.add_typer(models, name="model")

Format = Annotated[
    Literal["text", "json"], typer.Option("--format", help="Form of the output.")
]


@app.callback()
def main() -> None:
    """See what a run came to and what its models are."""


@runs.command("status")
def run_status(
    run: Annotated[Path, typer.Argument(help="A run's folder, with journal.jsonl.")],
    form: Format = "text",
) -> None:
    """Say how far a run is, and who did not contribute to its last round and why."""
    try:
        facts = status(run)
    except FedgexError as error:
        _refuse(error)
    _print(facts, form)


@models.command("show")
def model_show(
    model: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a run's.")],
    form: Format = "text",
) -> None:
    """Verify a checkpoint against its hashes and print its card and metrics."""
    try:
        folder = checkpoint.find(model)
        found = checkpoint.load(folder)
    except FedgexError as error:
        _refuse(error)
    numbers = {
        k: found.metrics.get(k) for k in ("train_loss", "judged_loss", "holdout")
    }
    _print({"folder": str(folder), "verified": True, **found.card, **numbers}, form)


def status(run: Path) -> dict[str, Any]:
    """Return a run's state, last round, and absent sites, from its journal.

    Raises
    ------
    FedgexError
        If the folder holds no journal.
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
        "last_round": None,
        "absent": {},
    }
    if rounds:
        last = rounds[-1]
        facts["last_round"] = f"{last['phase']} {last['round']}/{last['rounds']}"
        facts["train_loss"] = last["train_loss"]
        facts["absent"] = {
            name: f"{site['state']}: {site['reason']}"
            for name, site in last["sites"].items()
            if site["state"] != "contributed"
        }
    return facts


def _print(facts: dict[str, Any], form: str) -> None:
    if form == "json":
        typer.echo(json.dumps(facts, sort_keys=True))
        return
    for name, value in facts.items():
        text = json.dumps(value) if isinstance(value, dict | list) else value
        typer.echo(f"{name}: {text}")


def _refuse(error: FedgexError) -> NoReturn:
    """Print an error in one piece and leave with exit code 1."""
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(1) from error
