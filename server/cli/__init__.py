"""`fedgex-admin`: for the administrators of a consortium (docs/administration.md)."""

from __future__ import annotations

import logging

import typer

from fedgex.common.system.lazy_commands import lazy_group

_SERVER = "fedgex.server."
COMMANDS = {
    name: (_SERVER + place, line)
    for name, place, line in (
        (
            "consortium",
            "consortium_cli:consortium",
            "Found a consortium; see how it is.",
        ),
        (
            "administrator",
            "consortium_cli:administrator",
            "Who signs contracts and orders.",
        ),
        ("site", "consortium_cli:site", "Hospitals: admit, renew, rotate, revoke."),
        ("server", "server_cli:server", "The service: SuperLink and runs."),
        ("study", "study_cli:study", "Contracts: draft, sign, publish, read."),
        ("run", "run_cli:run", "Launch, watch, stop and resume runs."),
        ("model", "model_cli:model", "Look at models and release them."),
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
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
