"""Options, output and error handling that the commands of `fedgex-admin` share.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 not found, 4 not running.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from fedgex.common.errors import FedgexError
from fedgex.common.system.files import write_atomic
from fedgex.server.consortium.store import NotFoundError
from fedgex.server.run_monitor import one_line

REFUSED, NOT_FOUND, NOT_RUNNING = 1, 3, 4

_STATE = typer.Option("--state", envvar="FEDGEX_STATE", help="The state directory.")
State = Annotated[Path, _STATE]
OptionalState = Annotated[Path | None, _STATE]
AuthorityDir = Annotated[
    Path | None,
    typer.Option(
        envvar="FEDGEX_AUTHORITY_DIR",
        help="Folder of authority.key, where it is not in the place that "
        "consortium.toml names.",
    ),
]
Format = Annotated[
    Literal["text", "json"], typer.Option("--format", help="Form of the output.")
]
KeyFile = Annotated[
    Path, typer.Option("--key", help="The administrator's private key, a file.")
]
Fingerprint = Annotated[
    str, typer.Option(help="SHA-256 of the request, as its owner reads it out; hex.")
]
RequestFile = Annotated[Path, typer.Option("--request", help="The request, a file.")]
Reason = Annotated[str, typer.Option(help="Why; goes into the audit log.")]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn an error into one message on stderr and the exit code that fits."""
    try:
        yield
    except NotFoundError as error:
        leave(str(error), NOT_FOUND)
    except FedgexError as error:
        leave(str(error), REFUSED)


def leave(message: str, code: int) -> NoReturn:
    """Print an error in one piece and leave."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


def note(message: str) -> None:
    """Print a remark to stderr."""
    typer.echo(message, err=True)


def show(facts: Mapping[str, Any], form: str) -> None:
    """Print facts, one a line, or as one JSON object."""
    if form == "json":
        typer.echo(json.dumps(facts, sort_keys=True, default=str))
        return
    for name, value in facts.items():
        text = json.dumps(value) if isinstance(value, dict | list) else value
        typer.echo(f"{name}: {text}")


def show_rows(rows: Sequence[Mapping[str, Any]], form: str, nothing: str) -> None:
    """Print rows in columns, or as a JSON list; `nothing` says that there are none."""
    if form == "json":
        typer.echo(json.dumps(rows, default=str))
        return
    if not rows:
        note(nothing)
        return
    table = [list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(w) for cell, w in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def write_out(path: Path, content: Mapping[str, Any] | str) -> None:
    """Write an output file that holds no secret.

    Raises
    ------
    FedgexError
        If it cannot be written.
    """
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    write_atomic(path, text.encode(), mode=0o644)


def _cell(value: Any) -> str:
    return "-" if value is None or value == "" else one_line(str(value))
