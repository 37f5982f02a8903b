"""`fedgex-site ledger`: epsilon spent per patient, and the budget."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedgex.client.admission.privacy_statement import statement
from fedgex.client.cli.options import (
    Form,
    Format,
    SiteToml,
    load,
    not_found,
    refusing,
)
from fedgex.client.ledger import debit
from fedgex.client.ledger.book import Book, Row
from fedgex.client.ledger.budget import Account, Use
from fedgex.client.ledger.ledger import LedgerError
from fedgex.client.settings import SiteSettings

ledger = typer.Typer(
    no_args_is_help=True,
    help="Look at the hospital's privacy ledger; nothing of it leaves.",
)


class Export(StrEnum):
    """Format of all rows."""

    CSV = "csv"
    JSON = "json"


@ledger.command()
def show(site_toml: SiteToml, form: Form = Format.TEXT) -> None:
    """Show the mechanisms of each run, and the epsilon spent and left."""
    with refusing():
        account = _account(site_toml)
        facts = _facts(account)
    if form == Format.JSON:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        typer.echo(_as_text(account, facts))


@ledger.command()
def verify(site_toml: SiteToml) -> None:
    """Find any row that was changed or removed, or that the audit log misses."""
    with refusing():
        book, known = verified(load(site_toml))
    if book is None:
        not_found(
            "there is no ledger yet; it begins with the first study under "
            "patient-level differential privacy."
        )
    typer.echo(
        f"ok: {len(book.rows)} rows, none changed, removed or reordered; it holds all "
        f"{known} heads that the audit log names; head {book.head.hash}"
    )


@ledger.command()
def export(
    site_toml: SiteToml,
    form: Annotated[
        Export, typer.Option("--format", help="One row a line, or one object.")
    ] = Export.CSV,
) -> None:
    """Print every row; a cohort is a digest and a number, no patient is in it."""
    with refusing():
        book = _account(site_toml).book
    rows = [_exported(row, book) for row in book.rows]
    if form == Export.JSON:
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(_as_csv(rows), nl=False)


@ledger.command("statement")
def print_statement(site_toml: SiteToml) -> None:
    """Print the privacy guarantee to a patient, as Markdown."""
    with refusing():
        page = statement(load(site_toml))
    typer.echo(page)


def verified(settings: SiteSettings) -> tuple[Book | None, int]:
    """Compare the ledger with every head that the audit log holds.

    Returns
    -------
    tuple
        The ledger, None if there never was one; and the number of heads.

    Raises
    ------
    LedgerError
        If it cannot be used, or lacks one of them.
    """
    found = debit.existing(settings.state_dir)
    if found is None:
        return None, 0
    book, heads = found.read(), set(debit.heads(settings.state_dir))
    for head in heads:
        if not book.contains(head):
            raise LedgerError(
                f"the audit log names row {head.index} of the ledger with another hash "
                "than it has; expected the same. One of both was written by hand: keep "
                "both, and find out who did."
            )
    return book, len(heads)


def _account(site_toml: Path) -> Account:

    return Account.of(load(site_toml))


def _facts(account: Account) -> dict[str, Any]:
    return {
        "uses": [asdict(use) for use in account.uses()],
        "epsilon": account.budget.epsilon,
        "delta": account.budget.delta,
        "spent": account.spent,
        "left": account.left,
        "head": asdict(account.book.head),
    }


def _as_text(account: Account, facts: dict[str, Any]) -> str:
    spent = (
        f"spent {facts['spent']:.3f} of epsilon {facts['epsilon']:g} at delta "
        f"{facts['delta']:g}, of the patient used most; left {facts['left']:.3f}"
    )
    table = [_HEADER, *map(_cells, account.uses())]
    if len(table) == 1:
        return f"no patient was used under differential privacy yet\n{spent}"
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]
    return "\n".join([*lines, spent])


_HEADER: Sequence[str] = (
    "contract",
    "run",
    "phase",
    "rounds",
    "mechanism",
    "noise",
    "rate",
    "steps",
    "patients",
    "epsilon",
)


def _cells(use: Use) -> Sequence[str]:
    return (
        use.contract[:16] or "none",
        use.run or "none",
        use.phase,
        str(use.rounds),
        use.mechanism,
        f"{use.noise_multiplier:.4g}",
        f"{use.sample_rate:g}",
        str(use.steps),
        str(use.patients),
        f"{use.epsilon:.3f}",
    )


def _exported(row: Row, book: Book) -> dict[str, str | int | float]:
    patients = len(book.cohorts[row.cohort])
    return row.content() | {"patients": patients, "hash": row.hash}


def _as_csv(rows: Sequence[dict[str, str | int | float]]) -> str:
    written = io.StringIO()
    if rows:
        writer = csv.DictWriter(written, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return written.getvalue()
