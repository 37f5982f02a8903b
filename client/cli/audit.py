"""`fedgex-site audit`: what a finished model reveals of the hospital's own patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgex.client.cli.options import Authority, Model, load, refusing

commands = typer.Typer()


@commands.command()
def audit(
    site: Annotated[
        Path, typer.Option(metavar="SITE_TOML", help="The hospital's site.toml.")
    ],
    model: Model,
    non_members: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Expression of own patients who never took part, in the format of the "
            "hospital's own; default: those who opted out.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File for the report (JSON); default: printed."),
    ] = None,
    authority: Authority = None,
) -> None:
    """Attack a model with own patients, members or not; only numbers come out."""
    from fedgex.client.prediction.audit import audit
    from fedgex.client.prediction.files import opened_model
    from fedgex.common.models import checkpoint as checkpoints
    from fedgex.common.system.files import write_atomic

    with refusing():
        settings = load(site)
        with opened_model(model, authority, settings) as (folder, _):
            digest = checkpoints.digest(folder / "manifest.json")
            checkpoint = checkpoints.load(folder)
            report = audit(settings, checkpoint, digest, non_members)
            if output is not None:
                write_atomic(output, report.to_json().encode())
    if output is None:
        typer.echo(report.to_json(), nl=False)
    else:
        typer.echo(f"wrote {output}", err=True)
