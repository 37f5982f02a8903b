"""`fedgex-sim`: whole federations on one machine, for method developers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fedgex.common.errors import FedgexError
from fedgex.simulations import cohorts, scenario
from fedgex.simulations import run as simulation

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
errors = Console(stderr=True)


@app.callback()
def main() -> None:
    """Run whole federations on this machine, with the apps that hospitals run."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")


@app.command()
def run(
    name: Annotated[
        str, typer.Argument(metavar="SCENARIO", help="Scenario: a TOML file or a name.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of the data.")],
    out: Annotated[Path, typer.Option(help="Folder for the run; a run goes on in it.")],
) -> None:
    """Run a scenario to its report; a run that was stopped goes on."""
    try:
        lines = simulation.run(scenario.find(name), data, out, errors)
    except FedgexError as error:
        _refuse(error)
    for line in lines:
        typer.echo(line)
    typer.echo(f"report: {(out / 'report.html').resolve().as_uri()}")


@app.command("new-data")
def new_data(
    out: Annotated[Path, typer.Argument(help="Folder for the data; new or empty.")],
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 1,
    sites: Annotated[int, typer.Option(help="Hospitals that train.")] = 8,
    patients: Annotated[int, typer.Option(help="Patients of a hospital, mean.")] = 80,
    genes: Annotated[int, typer.Option(help="Genes.")] = 300,
    cancer_types: Annotated[int, typer.Option(help="Cancer types.")] = 4,
) -> None:
    """Write a synthetic consortium with known truth."""
    try:
        cohorts.new_data(
            out,
            seed=seed,
            n_sites=sites,
            patients_per_site=patients,
            n_genes=genes,
            n_cancer_types=cancer_types,
        )
    except FedgexError as error:
        _refuse(error)
    typer.echo(f"wrote {out}")


def _refuse(error: FedgexError) -> NoReturn:
    """Print an error in one piece and leave with exit code 1."""
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(1) from error
