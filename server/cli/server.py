"""`fedgex-admin server`: the server's service."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgex.common.system.processes import log_to_stderr
from fedgex.server.cli.command_line import NOT_RUNNING, Format, State, refusals, show
from fedgex.server.consortium import runs
from fedgex.server.consortium.certificates import expiries
from fedgex.server.consortium.store import Consortium

server = typer.Typer(no_args_is_help=True, help="The service: SuperLink and runs.")

HEALTH_TIMEOUT_S = 3.0


@server.command("start")
def server_start(state: State) -> None:
    """Serve the consortium until SIGTERM; for systemd, a container or a terminal."""
    from fedgex.server.service import (
        supervisor,  # torch and Flower take seconds to load
    )

    logging.getLogger().handlers.clear()  # those of short commands
    log_to_stderr()
    with refusals():
        supervisor.serve(state)


@server.command("status")
def server_status(state: State, form: Format = "text") -> None:
    """Show whether the server is healthy, what runs, and what needs attention.

    Exit code 4 if it does not serve.
    """
    with refusals():
        found = Consortium(state)
        serving = healthy(found.settings.health_port)
        facts: dict[str, Any] = {
            "serving": serving,
            "address": f"{found.settings.host}:{found.settings.port}",
            "hospitals": {name: site.state for name, site in found.sites().items()},
            "runs": {run.name: run.state for run in runs.every(found.folder)},
            "warnings": [str(each) for each in expiries(found)],
        }
    show(facts, form)
    if not serving:
        raise typer.Exit(NOT_RUNNING)


def healthy(port: int) -> bool:
    """Ask Flower's gRPC health service on this machine whether it serves."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_S
            )
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
