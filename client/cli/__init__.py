"""`fedgex-site`: for a hospital's operator. One module a noun, imported when called."""
# ruff: noqa: E501 (one line a command)

from __future__ import annotations

import typer

from fedgex.common.system.lazy_commands import lazy_group
from fedgex.common.system.processes import begin_command

# fmt: off
_PLACES = {
    "check-data": ("data:commands", "Check the hospital's data before a study does; nothing leaves the machine."),
    "import": ("imports:commands", "Make a hospital's files of a download of GDC, cBioPortal, Xena or GEO."),
    "init": ("site:commands", "Write settings, policy, keys and a request; what exists is kept as it is."),
    "join": ("site:commands", "Take the kit that the administrator made from our request."),
    "rotate": ("site:commands", "Make keys that replace ours; the old ones serve until the new kit is joined."),
    "check-connection": ("site:commands", "Check the connection to the server step by step; name the fault and its fix."),
    "status": ("status:commands", "Show whether the site runs, what it may do, and what needs attention."),
    "pause": ("site:commands", "Answer no message until `resume`; what is computed now is still sent."),
    "resume": ("site:commands", "Answer messages again."),
    "log": ("log:log", "Verify the hospital's audit log and receipts, and compare them."),
    "start": ("service:commands", "Serve until SIGTERM; for systemd, a container or a terminal."),
    "stop": ("service:commands", "Stop the daemon; exit code 4 if there is none."),
    "study": ("study:study", "Read the contracts of studies, and approve, reject or withdraw them."),
    "ledger": ("ledger:ledger", "Look at the hospital's privacy ledger; nothing of it leaves."),
    "predict": ("predict:predict", "Use a finished model on own samples; nothing leaves the machine."),
    "audit": ("audit:commands", "Attack a model with own patients, members or not; only numbers come out."),
}
# fmt: on
COMMANDS = {
    name: (f"fedgex.client.cli.{place}", line)
    for name, (place, line) in _PLACES.items()
}
"""Where each command is, and its line of help, in the order of their use."""

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Serve a hospital's operator: join, decide about studies, use a finished model."""
    begin_command()
