"""`fedgex-site start` and `stop`: the hospital's service."""

from __future__ import annotations

import os
import signal
import time
from typing import Annotated

import typer

from fedgex.client.cli.options import NOT_RUNNING, SiteToml, load, refusing

commands = typer.Typer()


@commands.command()
def start(site_toml: SiteToml) -> None:
    """Serve until SIGTERM; for systemd, a container or a terminal.

    The site connects to its consortium's server, and answers approved studies.
    """
    from fedgex.client.service import daemon
    from fedgex.common.system.processes import log_to_stderr

    log_to_stderr()
    with refusing():
        daemon.run(site_toml)


@commands.command()
def stop(
    site_toml: SiteToml,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for its end.")] = 30,
) -> None:
    """Stop the daemon; exit code 4 if there is none."""
    from fedgex.client.service.daemon import daemon_pid

    with refusing():
        state_dir = load(site_toml).state_dir
    pid = daemon_pid(state_dir)
    if pid is None:
        typer.echo("no daemon serves this hospital", err=True)
        raise typer.Exit(NOT_RUNNING)
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + wait_s
    while daemon_pid(state_dir) is not None:
        if time.monotonic() > end:
            typer.echo(f"Error: process {pid} has not ended in {wait_s:g} s", err=True)
            raise typer.Exit(1)
        time.sleep(0.2)
    typer.echo("stopped")
