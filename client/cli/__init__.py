"""`fedgex-site`: for a hospital's operator. One module a noun.

At import these modules need typer and little else: each command imports what it uses,
so that `--help` is fast.
"""

from __future__ import annotations

import typer

from fedgex.client.cli import (
    audit,
    data,
    ledger,
    log,
    predict,
    service,
    site,
    status,
    study,
)

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False
)


@app.callback()
def main() -> None:
    """Serve a hospital's operator: join, decide about studies, use a finished model."""


# Help lists commands in this order; within one Typer, groups come after commands.
_operation = typer.Typer()
for _command in (
    site.init,
    site.join,
    site.check_connection,
    status.status,
    site.pause,
    site.resume,
):
    _operation.command()(_command)
_operation.add_typer(log.log, name="log")

app.command()(data.check_data)
app.add_typer(_operation)
app.add_typer(service.commands)
app.add_typer(study.study, name="study")
app.add_typer(ledger.ledger, name="ledger")
app.add_typer(predict.predict, name="predict")
app.add_typer(audit.commands)
