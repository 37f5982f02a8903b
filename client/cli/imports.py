"""`fedgex-site import`: a hospital's files of a portal's download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgex.client.cli.data import check_data
from fedgex.client.cli.options import load, refusing
from fedgex.client.cli.site import is_name, is_server

if TYPE_CHECKING:
    from fedgex.client.settings import SiteSettings

commands = typer.Typer()


@commands.command("import")
def import_(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Files and folders.")
    ],
    to: Annotated[Path, typer.Option(help="Folder for this hospital; a new one.")],
    name: Annotated[
        str,
        typer.Option(
            help="This hospital: lower-case letters, digits, hyphens.", callback=is_name
        ),
    ] = "hospital",
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The consortium's server.",
            callback=lambda value: value and is_server(value),
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="Scale, where the download does not say.")
    ] = None,
    value_column: Annotated[
        str | None, typer.Option(help="Column of values in files of one sample each.")
    ] = None,
) -> None:
    """Make a hospital's files of a download of GDC, cBioPortal, Xena or GEO."""
    from fedgex.client.importing.write import recognise, write
    from fedgex.common.data.scales import scale_of

    try:
        declared = None if scale is None else scale_of(scale)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--scale") from error
    with refusing():
        download = recognise(sources)
        typer.echo(f"recognised: a download of {download.source}")
        site_toml = write(download, to, name, server, declared, value_column)
    for line in download.decided:
        typer.echo(f"decided: {line}")
    for line in download.undecided:
        typer.echo(f"TO DECIDE: {line}")
    if declared is None and download.scale is None:
        typer.echo(f"Error: set data.scale in {site_toml}, then check-data", err=True)
        raise typer.Exit(1)
    check_data(site_toml)
    with refusing():
        typer.echo("\n".join(_by_type(load(site_toml))))
    typer.echo(f"Read {site_toml} and policy.toml next to it.", err=True)


def _by_type(settings: SiteSettings) -> list[str]:
    """Return patients and events of each cancer type, none below the floor."""
    from fedgex.common.data.genes import GeneTable
    from fedgex.common.ingestion.cohort import read_cohort

    least = settings.policy.minimum_cohort
    cohort, _ = read_cohort(settings.data, least, settings.data.scale, ())
    table = GeneTable.packaged()
    known = sum(map(table.knows, cohort.genes))
    lines = [f"{known} of {len(cohort.genes)} genes are HGNC's or once were"]
    one = cohort.take(cohort.first_samples())
    if not {"cancer_type", "event"} <= set(one.clinical):
        return lines
    for kind, rows in one.clinical.groupby("cancer_type"):
        if len(rows) >= least:
            died = int((rows["event"] == 1).sum())
            events = str(died) if died >= least else f"fewer than {least}"
            lines.append(f"{kind}: {len(rows)} patients, {events} with the event")
    return lines
