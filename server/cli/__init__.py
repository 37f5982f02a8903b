"""`fedgex-admin`: for the administrators of a consortium (docs/administration.md)."""

from __future__ import annotations

import logging

import typer

from fedgex.common.system.lazy_commands import lazy_group
from fedgex.common.system.processes import begin_command

_CLI = "fedgex.server.cli."
COMMANDS = {
    name: (_CLI + place, line)
    for name, place, line in (
        (
            "consortium",
            "consortium:consortium",
            "Found a consortium; see how it is.",
        ),
        (
            "administrator",
            "consortium:administrator",
            "Who signs contracts and orders.",
        ),
        ("site", "consortium:site", "Hospitals: admit, renew, rotate, revoke."),
        ("server", "server:server", "The service: SuperLink and runs."),
        ("study", "study:study", "Contracts: draft, sign, publish, read."),
        ("cohort", "cohort:cohort", "Make and check hold-out and public cohort."),
        ("run", "run:run", "Launch, watch, stop and resume runs."),
        ("model", "model:model", "Look at models and release them."),
    )
}
"""Where each group of commands is, and its line of help."""

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Administer a consortium: members, contracts, runs and releases."""
    begin_command()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
