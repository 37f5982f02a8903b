"""`fedgex-site audit`: what a finished model tells of the hospital's own patients."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fedgex.client.predict_cli import Authority, Model, trusted_authority
from fedgex.client.settings import SiteSettings
from fedgex.client.study_cli import refusing
from fedgex.common import bundle
from fedgex.common import checkpoint as checkpoints
from fedgex.common.files import write_atomic

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
    from fedgex.client import audit as audits  # torch takes seconds to load

    with refusing(), ExitStack() as stack:
        settings = SiteSettings.load(site)
        if model.is_file():
            trusted = trusted_authority(model, authority, settings)
            _, folder = stack.enter_context(bundle.opened(model, trusted))
        else:
            folder = checkpoints.find(model)
        digest = checkpoints.digest(folder / "manifest.json")
        report = audits.audit(settings, checkpoints.load(folder), digest, non_members)
        if output is not None:
            write_atomic(output, report.to_json().encode(), mode=0o644)
    if output is None:
        typer.echo(report.to_json(), nl=False)
    else:
        typer.echo(f"wrote {output}", err=True)
