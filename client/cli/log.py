"""`fedgex-site log`: the hospital's audit log."""

from __future__ import annotations

import typer

from fedgex.client.cli.options import SiteToml, load, not_found, refusing
from fedgex.client.identity import AUDIT
from fedgex.client.settings import SiteSettings
from fedgex.common.errors import TrustError
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Head
from fedgex.common.trust.receipt import Part, Receipt
from fedgex.common.trust.signed import Signed

log = typer.Typer(no_args_is_help=True, help="Look at the hospital's audit log.")


@log.command("verify")
def log_verify(site_toml: SiteToml) -> None:
    """Find any line of the audit log that was changed, removed, reordered or cut."""
    with refusing():
        settings = load(site_toml)
        if not (settings.state_dir / AUDIT).exists():
            not_found(
                f"{settings.state_dir / AUDIT} does not exist; expected the log of a "
                "hospital that has joined."
            )
        head, receipts = verify_log(settings)
    typer.echo(
        f"ok: {head.index} lines, none changed, removed or reordered; it holds what "
        f"{receipts} receipts say of it; head {head.hash}"
    )


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
    head = audit_log.verify(path)
    lines = {Head(line["n"], line["hash"]) for line in audit_log.read(path)}
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
