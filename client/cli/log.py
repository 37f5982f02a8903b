"""`fedgex-site log`: the hospital's audit log and the coordinator's receipts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgex.client.cli.options import SiteToml, load, not_found, refusing
from fedgex.client.identity import AUDIT
from fedgex.client.settings import SiteSettings
from fedgex.common.system.files import write_atomic

WRONG, UNCOUNTED, EQUIVOCATION = 1, 5, 6
"""Exit codes: a contradiction; answers that no receipt counts; two versions."""

log = typer.Typer(
    no_args_is_help=True,
    help="Verify the hospital's audit log and receipts, and compare them.",
)


@log.command("verify")
def log_verify(site_toml: SiteToml) -> None:
    """Verify the audit log, and all receipts against it.

    Exits with 1 if a line or receipt was changed, removed or forged, and with 5 if only
    answers of this hospital are missing from receipts.
    """
    from fedgex.client.admission.receipt_check import check

    with refusing():
        found = check(_joined(site_toml))
    for each in found.wrong:
        typer.echo(f"Error: {each}", err=True)
    for each in found.uncounted:
        typer.echo(f"Not counted: {each}", err=True)
    if found.wrong:
        typer.echo(
            "Keep audit log and receipts as they are, and ask other hospitals and the "
            "administrators; fedgex-site log export writes what can be compared.",
            err=True,
        )
        raise typer.Exit(WRONG)
    if found.uncounted:
        typer.echo(
            "The log holds. Ask the administrators why these answers do not count: "
            "they came too late, were quarantined, or were left out.",
            err=True,
        )
        raise typer.Exit(UNCOUNTED)
    typer.echo(
        f"ok: {found.head.index} lines, none changed, removed or reordered; it holds "
        f"what {found.receipts} receipts say of it; head {found.head.hash}"
    )


@log.command("export")
def log_export(
    site_toml: SiteToml,
    file: Annotated[Path, typer.Argument(help="File to write; .json.")],
) -> None:
    """Write all receipts to a file, for another hospital to compare.

    It holds what every hospital of a run receives, and nothing of a patient.
    """
    from fedgex.client.admission.receipt_check import export

    with refusing():
        exported = export(_joined(site_toml))
        write_atomic(file, exported.to_json().encode(), mode=0o644)
    typer.echo(f"{len(exported.receipts)} receipts written to {file}")


@log.command("compare")
def log_compare(
    site_toml: SiteToml,
    file: Annotated[Path, typer.Argument(help="What another hospital exported.")],
) -> None:
    """Compare the receipts here with those that another hospital exported.

    Exits with 6 if the coordinator signed two versions of a receipt, and with 3 if the
    hospitals have none in common.
    """
    from fedgex.client.admission.receipt_check import compare

    with refusing():
        compared, found = compare(_joined(site_toml), file)
    for each in found:
        typer.echo(f"Equivocation: {each}", err=True)
    if found:
        typer.echo(
            "Keep both, and tell the other hospitals and the administrators.", err=True
        )
        raise typer.Exit(EQUIVOCATION)
    if not compared:
        not_found(f"{file} holds no receipt that is also here; nothing was compared.")
    typer.echo(f"ok: {compared} receipts are the same at both hospitals")


def _joined(site_toml: Path) -> SiteSettings:
    settings = load(site_toml)
    if not (settings.state_dir / AUDIT).exists():
        not_found(
            f"{settings.state_dir / AUDIT} does not exist; expected the log of a "
            "hospital that has joined."
        )
    return settings
