"""`fedgex-admin`: for the administrators of a consortium (docs/administration.md)."""

from __future__ import annotations

import logging

import typer

from fedgex.server.consortium_cli import administrator, consortium, site
from fedgex.server.model_cli import model
from fedgex.server.run_cli import run
from fedgex.server.server_cli import server
from fedgex.server.study_cli import study

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(consortium, name="consortium")
app.add_typer(administrator, name="administrator")
app.add_typer(site, name="site")
app.add_typer(server, name="server")
app.add_typer(study, name="study")
app.add_typer(run, name="run")
app.add_typer(model, name="model")


@app.callback()
def main() -> None:
    """Lead a consortium: who belongs, what is studied, what runs, what is released."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
