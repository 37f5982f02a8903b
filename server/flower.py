"""What we ask of Flower's control interface, on the loopback interface.

Flower's own clients do the talking. The bundle that Flower wants for a run holds no
code: server and sites run what is installed.
"""

from __future__ import annotations

import hashlib
from functools import cache
from http import HTTPStatus
from importlib.metadata import version

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedgex.server.superlink import SECRET_HEADER

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
        """Shut a node out; its next call is refused."""
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
        """Stop a Flower run, unless it is over already; what it has on disk stays."""
        try:
            self.client.StopRun(StopRunRequest(run_id=run))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
                raise


@cache
def bundle() -> Fab:
    """Return the bundle of every run: configuration, and not one line of code."""
    content, _ = build_fab_from_files(
        {"pyproject.toml": BUNDLE.format(version=version("fedgex")).encode()}
    )
    return Fab(hashlib.sha256(content).hexdigest(), content, {})
