"""Private interfaces of Flower that the server uses: SuperLink, control, a run's task.

No other module of `server` imports them. The bundle that Flower requires holds no code:
server and sites run the installed package. Imports that only one process needs are
inside its function, so that the supervisor stays small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Context
from flwr.common.constant import SubStatus
from flwr.common.serde import (
    context_from_proto,
    fab_to_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import (
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from fastapi import FastAPI
    from flwr.superlink.grid import HttpGrid

SECRET_HEADER = "fedgex-secret"
"""Header of the supervisor's secret."""
NODE_KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER
"""Header of a node's public key, base64."""

SETTINGS = "settings"
"""Key of a run's configuration: the path of its settings file."""

BUNDLE = """\
[project]
name = "fedgex"
version = "{version}"

[tool.flwr.app]
publisher = "fedgex"

[tool.flwr.app.components]
serverapp = "fedgex.server.app:app"
clientapp = "fedgex.client.app:app"

[tool.flwr.app.config]
settings = ""
"""


class _Secret:
    """Adds the supervisor's secret to every call."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def intercept(
        self, context: ProtobufRequestContext, call_next: ProtobufCall
    ) -> httpx.Response:
        add_headers(context.request, {SECRET_HEADER: self.secret})
        return call_next(context)


class Control:
    """The SuperLink's control interface, on loopback, with the supervisor's secret."""

    def __init__(self, port: int, secret: str) -> None:
        self._address = f"127.0.0.1:{port}"
        self._secret = secret
        self.client = ControlHttpClient.from_server_address(
            self._address, True, None, [_Secret(secret)]
        )

    def healthy(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            reply = httpx.get(f"http://{self._address}/health", timeout=2)
        except httpx.TransportError:
            return False
        return reply.is_success

    def register(self, site: str, node_public_key: str) -> int:
        """Register a site's node key (OpenSSH form); return Flower's number of it."""
        key = load_ssh_public_key(node_public_key.encode())
        assert isinstance(key, ec.EllipticCurvePublicKey), "the registry took no other"
        reply = self.client.RegisterNode(
            RegisterNodeRequest(public_key=public_key_to_bytes(key), name=site)
        )
        return int(reply.node_id)

    def unregister(self, node: int) -> None:
        """Unregister a node; its next call is refused."""
        self.client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start_run(self, settings: str) -> int:
        """Start a Flower run of our server app; return Flower's number of it.

        Parameters
        ----------
        settings
            Path of the run's settings file (`server.settings`).
        """
        request = StartRunRequest(
            fab=fab_to_proto(bundle()),
            override_config=user_config_to_proto({SETTINGS: settings}),
        )
        return int(self.client.StartRun(request).run_id)

    def stop_run(self, run: int) -> None:
        """Stop a Flower run, unless it has ended; its files stay."""
        try:
            self.client.StopRun(StopRunRequest(run_id=run))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
                raise


@cache
def bundle() -> Fab:
    """Return the bundle of every run, which holds configuration and no code."""
    from flwr.cli.build import build_fab_from_files

    content, _ = build_fab_from_files(
        {"pyproject.toml": BUNDLE.format(version=version("fedgex")).encode()}
    )
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def superlink_app(
    *, control_port: int, health_port: int, secret: str
) -> tuple[FastAPI, Callable[[bytes], int | None]]:
    """Return a SuperLink, its state in memory, and the node number of a public key.

    Parameters
    ----------
    control_port
        Loopback port of control and runtime.
    health_port
        Loopback port of Flower's gRPC health service; 0 leaves it out.
    secret
        Secret that a process must present to acquire tasks.
    """
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import (
        SuperLinkLifespanConfig,
        load_control_authn_plugin,
    )
    from flwr.superlink.main import create_app

    config = SuperLinkLifespanConfig(
        control_address="127.0.0.1:0",
        health_server_address=f"127.0.0.1:{health_port}" if health_port else None,
        host="127.0.0.1",
        port=control_port,
        insecure=True,
        certificates=None,
        superexec_auth_secret=secret.encode(),
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation="process",
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    return app, app.state.linkstate_factory.state().get_node_id_by_public_key


@dataclass(frozen=True)
class RunTask:
    """The server app's task of a Flower run."""

    grid: HttpGrid
    context: Context
    _client: Any

    @classmethod
    def pull(cls, port: int, token: str) -> Self:
        """Return the task of a token from the SuperLink on this machine."""
        from flwr.superlink.grid import HttpGrid

        grid = HttpGrid(f"127.0.0.1:{port}", insecure=True, token=token)
        client = grid._runtime_client
        task = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        run = run_from_proto(task.run)
        grid.set_run(run)
        context = context_from_proto(task.context)
        context.run_config = dict(run.override_config)
        return cls(grid, context, client)

    def end(self, failure: str | None) -> None:
        """Report the end of the task, with the error if any."""
        self._client.PushTaskOutput(
            PushTaskOutputRequest(
                context=None,
                sub_status=SubStatus.COMPLETED if failure is None else SubStatus.FAILED,
                details=failure or "",
            )
        )
        self.grid.close()
