"""`fedgex-site`: for a hospital's operator."""

from __future__ import annotations

import typer

from fedgex.common.lazy_commands import lazy_group

_CLIENT = "fedgex.client."
COMMANDS = {
    name: (_CLIENT + place, line)
    for name, place, line in (
        (
            "init",
            "site_cli:commands",
            "Write settings, policy, keys and a request; what exists is kept as it is.",
        ),
        (
            "join",
            "site_cli:commands",
            "Take the kit that the administrator made from our request.",
        ),
        (
            "check-connection",
            "site_cli:commands",
            "Try the way to the server step by step; says which fails, and the fix.",
        ),
        (
            "check-data",
            "data_cli:commands",
            "Check the hospital's data before a study does; nothing leaves the "
            "machine.",
        ),
        (
            "start",
            "daemon_cli:commands",
            "Serve until SIGTERM; for systemd, a container or a terminal.",
        ),
        (
            "stop",
            "daemon_cli:commands",
            "Stop the daemon; exit code 4 if there is none.",
        ),
        (
            "status",
            "site_cli:commands",
            "Say whether the site runs, what it may do, and what wants attention.",
        ),
        (
            "pause",
            "site_cli:commands",
            "Answer no message until `resume`; what is computed now is still sent.",
        ),
        ("resume", "site_cli:commands", "Answer messages again."),
        (
            "study",
            "study_cli:study",
            "Read the contracts of studies, and approve, reject or withdraw them.",
        ),
        (
            "ledger",
            "ledger_cli:ledger",
            "Look at the hospital's privacy ledger; nothing of it leaves.",
        ),
        (
            "predict",
            "predict_cli:predict",
            "Use a finished model on own samples; nothing leaves the machine.",
        ),
        (
            "audit",
            "audit_cli:commands",
            "Attack a model with own patients, members or not; only numbers come out.",
        ),
        ("log", "site_cli:commands", "Look at the hospital's audit log."),
    )
}
"""Where each command is, and its line of help."""

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Serve a hospital's operator: join, decide about studies, use a finished model."""
