"""`fedgex-sim`: federations on one machine, for method developers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
from rich.console import Console

from fedgex.common.errors import FedgexError
from fedgex.common.system.processes import set_proxy
from fedgex.simulations import scenario
from fedgex.simulations.privacy import effort

# Each function imports what its command needs: importing all takes seconds.

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
errors = Console(stderr=True)


Format = Literal["text", "json"]
Question = Literal[
    "imputation", "survival", "classification", "interpretation", "federation"
]
Scenario = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="Scenario: a TOML file or a name.")
]
Data = Annotated[Path, typer.Option(help="Folder of the data.")]
Form = Annotated[Format, typer.Option("--format", help="A table for people, or JSON.")]


@app.callback()
def main() -> None:
    """Run federations on this machine: `run` with the apps that hospitals run."""
    set_proxy(None)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")


@app.command()
def run(
    name: Scenario,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the run; a run goes on in it.")],
) -> None:
    """Run a scenario to its report; a run that was stopped goes on."""
    from fedgex.simulations import run as simulation

    with _refusals():
        lines = simulation.run(scenario.find(name), data, out, errors)
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
    from fedgex.simulations.data import synthetic

    with _refusals():
        synthetic.new_data(
            out,
            seed=seed,
            n_sites=sites,
            patients_per_site=patients,
            n_genes=genes,
            n_cancer_types=cancer_types,
        )
    typer.echo(f"wrote {out}")


@app.command()
def rehearse(
    out: Annotated[Path, typer.Option(help="Folder for the rehearsal; new or empty.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the real data; without it, synthetic hospitals."),
    ] = None,
    sites: Annotated[int, typer.Option(help="Hospitals.", min=2)] = 4,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the study in the simulator too.")
    ] = False,
) -> None:
    """Found a consortium on this machine and take a study from contract to prediction.

    Real processes, TLS, keys and approvals; everything is ended when it is over.
    """
    from fedgex.simulations import rehearsal

    started = time.monotonic()

    def report(line: str) -> None:
        typer.echo(f"{time.monotonic() - started:6.1f} s  {line}")

    with _refusals():
        rehearsal.rehearse(data, out, sites, report, compare=compare)


@app.command()
def audit(
    name: Scenario,
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for the audit; an audit goes on in it.")
    ],
    shadows: Annotated[
        int, typer.Option(help="Shadow models: even, 4 or more.")
    ] = effort.SHADOWS,
    canaries: Annotated[
        int, typer.Option(help="Made-up patients, half of whom train.")
    ] = effort.CANARIES,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small audit, to see that it works.")
    ] = False,
    form: Form = "text",
) -> None:
    """Attack a scenario's model, with and without privacy (docs/audit.md)."""
    from fedgex.simulations.privacy import membership as auditing
    from fedgex.simulations.privacy.shadow_models import Effort

    with _refusals():
        asked = Effort(shadows=shadows, canaries=canaries)
        if quick:
            asked = auditing.QUICK
        report = auditing.audit(scenario.find(name), data, out, errors, asked)
    _print(report.to_json(), auditing.table(report), form)


@app.command()
def utility(
    name: Scenario,
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for the comparison; one goes on in it.")
    ],
    epsilons: Annotated[
        str, typer.Option(help="Epsilons to compare, with commas between.")
    ] = ",".join(f"{each:g}" for each in effort.EPSILONS),
    seeds: Annotated[
        int, typer.Option(help="Seeds, from the study's on.", min=1)
    ] = effort.SEEDS,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small run, to see that it works.")
    ] = False,
    form: Form = "text",
) -> None:
    """Measure what privacy costs a scenario's model (docs/results/privacy.md)."""
    from fedgex.simulations.privacy import utility as usefulness

    try:
        values = tuple(float(each) for each in epsilons.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{epsilons}: expected numbers with commas between, such as 1,3,8."
        ) from error
    with _refusals():
        chosen = scenario.find(name)
        report = usefulness.utility(
            chosen, data, out, errors, epsilons=values, seeds=seeds, quick=quick
        )
    _print(report.to_json(), usefulness.table(report), form)


@app.command("benchmark")
def compare(
    question: Annotated[
        Question,
        typer.Argument(metavar="QUESTION", help=f"{', '.join(get_args(Question))}."),
    ],
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for the benchmark; one goes on in it.")
    ],
    protocol: Annotated[
        Path | None,
        typer.Option(help="Seeds and splits, TOML; without it, those of fedgex."),
    ] = None,
    on: Annotated[
        Literal["test", "validation"],
        typer.Option(help="Who judges: the hold-out, or validation institutions."),
    ] = "test",
    workers: Annotated[
        int, typer.Option(help="Models trained at the same time.", min=1)
    ] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small benchmark, to see that it works.")
    ] = False,
) -> None:
    """Judge every method on the same hospitals never seen, one question at a time."""
    from fedgex.simulations import evaluation

    with _refusals():
        page = evaluation.evaluate(
            question,
            data,
            out,
            errors,
            protocol=protocol,
            on=on,
            workers=workers,
            quick=quick,
        )
    typer.echo(page, nl=False)


def _print(json: str, lines: Iterable[str], form: Format) -> None:
    typer.echo(json if form == "json" else "\n".join(lines), nl=form != "json")


@contextmanager
def _refusals() -> Iterator[None]:
    """Print an error in one piece and leave with exit code 1."""
    try:
        yield
    except FedgexError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
