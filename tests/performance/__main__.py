"""Measure what fedgex costs, as ratios within one run on this machine (Linux).

Seconds and megabytes differ from machine to machine; ratios of two sides measured one
after the other, many times over, differ less. docs/benchmarks.md explains each.
From the repository's root: `python -m tests.performance`, or `make bench`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from time import monotonic
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from . import deployment, federation, ingestion, privacy, secure_aggregation, training
from .rows import FULL, QUICK, Row


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="A small run, to see that it works.")
    ] = False,
    network: Annotated[
        bool, typer.Option("--deployment", help="What the network costs instead.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON for scripts instead of a table.")
    ] = False,
) -> None:
    """Measure what fedgex costs here, as ratios within one run."""
    progress = Console(stderr=True, highlight=False)
    rows = list(
        deployment.measure(progress, quick=quick)
        if network
        else measure(progress, quick=quick)
    )
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table("measure", "ratio", "goal", "met", "detail", box=box.SIMPLE_HEAD)
    for row in rows:
        met = {True: "yes", False: "no", None: ""}[row.met]
        table.add_row(row.name, f"{row.value:.3f}", row.goal, met, row.detail)
    out = Console()  # a file or a pipe gets as much width as it needs
    Console(width=out.width if out.is_terminal else 200).print(table)


def measure(progress: Console, *, quick: bool) -> Iterator[Row]:
    """Measure everything but the network, in processes of their own."""
    sizes = QUICK if quick else FULL
    parts: dict[str, Callable[[], list[Row]]] = {
        "training throughput": partial(training.throughput, sizes),
        "federation's share of a round": partial(
            federation.share_of_round, sizes, progress
        ),
        "memory of the server": partial(federation.server_memory, sizes, progress),
        "memory of the aggregation": partial(federation.aggregation_memory, sizes),
        "cost of genes": partial(training.cost_of_genes, sizes),
        "cost of patient-level privacy": partial(privacy.cost_of_privacy, sizes),
        "check of a hospital's data": partial(ingestion.check_data, sizes),
        "secure aggregation": partial(secure_aggregation.measure, quick=quick),
    }
    for title, part in parts.items():
        started = monotonic()
        progress.print(f"bench: {title}")
        yield from part()
        progress.print(f"bench: {title}: done in {monotonic() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
