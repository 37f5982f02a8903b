"""Private interfaces of Flower that a site uses: its node, its tasks, and their probe.

No other module of `client` imports them. What only one process needs is imported by its
function.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message
from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode, SubStatus
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
)
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from fedgex.common.transport.flower import RuntimeHttpClient, holder, look_less_often

logger = logging.getLogger(__name__)

ACTIVATE_PATH = "/v1/fleet/activate-node"
OTHER_RELEASE = ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE
WRONG_INTERVAL = ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL
NOT_ACTIVATED = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
"""Flower's error codes of a refused probe."""

UPLOAD_PAUSES_S = (0.2, 1.0, 5.0)
"""Before each further try of an upload that broke off, seconds."""

IDLE_S = 3.0
"""Flower's polling interval, seconds."""


def probe(key: ec.EllipticCurvePrivateKey) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a signed request that changes nothing at the server.

    It activates the node with a heartbeat interval of zero: Flower checks version,
    signature and key, in this order, then refuses the interval.
    """
    public = public_key_to_bytes(key.public_key())
    timestamp = now().isoformat()
    signature = sign_message(key, timestamp.encode("ascii"))
    about = RuntimeVersionMetadata.from_local_component("SuperNode")
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=0)
    headers = {
        "content-type": PROTOBUF_MEDIA_TYPE,
        "accept": PROTOBUF_MEDIA_TYPE,
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode(),
        TIMESTAMP_HEADER: timestamp,
        **dict(about.as_metadata()),
    }
    return request.SerializeToString(), headers


def error_code(response: httpx.Response) -> int:
    """Return Flower's code of an error, or the HTTP status if there is none."""
    error = FlowerError.from_json(response.text)
    return response.status_code if error is None else error.code


# ---- the node ----


def run_node(
    *,
    server: str,
    roots: bytes,
    key: ec.EllipticCurvePrivateKey,
    site_toml: Path,
    port: int,
    health_port: int,
    secret: str,
    on_number: Callable[[int | None], None],
    on_message: Callable[[], None],
    pause: Callable[[], None],
) -> None:
    """Run Flower's SuperNode until it drops the connection.

    Parameters
    ----------
    server
        host:port.
    roots
        Certificates that may sign the server's, PEM.
    port
        Loopback port for our worker.
    health_port
        Of Flower's gRPC health service; 0 leaves it out.
    secret
        Secret that a process must present to acquire tasks.
    on_number
        Called with Flower's number of the node once it is known.
    on_message
        Called once a message is here.
    pause
        Called between two looks for a message.
    """
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode import start_client_internal
    from flwr.supernode.nodestate import NodeStateFactory

    # An import statement would find the function of the same name.
    flower_supernode = import_module("flwr.supernode.cli.flower_supernode")
    config = flower_supernode.SuperNodeLifespanConfig(
        server_address=server,
        root_certificates=roots,
        insecure=False,
        authentication_keys=(key, key.public_key()),
        max_retries=None,
        max_wait_time=None,
        node_config={"site-toml": str(site_toml)},
        isolation="process",
        runtime_certificates=None,
        runtime_root_certificates_path=None,
        health_server_address=f"127.0.0.1:{health_port}" if health_port else None,
        trusted_entities=None,
        superexec_auth_secret=secret.encode(),
        runtime_dependency_install=False,
        host="127.0.0.1",
        port=port,
        runtime_ssl_certfile=None,
        runtime_ssl_keyfile=None,
    )
    look_less_often()
    note_number(on_number)
    note_messages(on_message)
    upload_again()
    start_client_internal.time = SimpleNamespace(  # type: ignore[assignment,attr-defined]
        sleep=lambda seconds: pause() if seconds >= IDLE_S else time.sleep(seconds)
    )
    state_factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    flower_supernode._start_supernode_http_api(config, state_factory)
    start_client_internal.start_client_internal(
        state_factory=state_factory,
        server_address=config.server_address,
        node_config=config.node_config,
        root_certificates=config.root_certificates,
        insecure=config.insecure,
        authentication_keys=config.authentication_keys,
        isolation=config.isolation,
        runtime_api_address=f"{config.host}:{config.port}",
        health_server_address=config.health_server_address,
        superexec_auth_secret=config.superexec_auth_secret,
        runtime_dependency_install=config.runtime_dependency_install,
    )


def note_messages(on_message: Callable[[], None]) -> None:
    """Patch Flower to call back for a message, and to drop one whose run has ended.

    Otherwise `RunNotRunningException` skips Flower's own clean-up and leaves a task
    whose objects never arrive, for which our worker would wait for ever.
    """
    from flwr.supernode import start_client_internal

    fetch = start_client_internal._pull_and_store_message

    def fetch_or_forget(**settings: Any) -> int | None:
        for name in ("pull_object", "confirm_message_received"):
            settings[name] = _failing_plainly(settings[name])
        run = fetch(**settings)
        if run is not None:
            on_message()
        return run

    start_client_internal._pull_and_store_message = fetch_or_forget  # type: ignore[assignment]


def _failing_plainly(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call so that it raises an exception after which Flower cleans up."""

    def failing(*given: Any) -> Any:
        try:
            return call(*given)
        except RunNotRunningException as ended:
            raise ConnectionError("the run ended meanwhile") from ended

    return failing


def upload_again() -> None:
    """Patch Flower to try an upload again that TLS broke off in the middle.

    Flower tries other broken connections again, but takes this one for a refused
    certificate: it drops the reply, and the server waits minutes for the rest of it.
    """
    from flwr.supernode import start_client_internal

    push = start_client_internal._push_messages

    def push_again(**settings: Any) -> None:
        for name in ("send", "push_object"):
            settings[name] = _tried_again(settings[name])
        push(**settings)

    start_client_internal._push_messages = push_again  # type: ignore[assignment]


def _tried_again(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call so that it is made again where the connection breaks."""

    def trying(*given: Any) -> Any:
        for pause_s in UPLOAD_PAUSES_S:
            try:
                return call(*given)
            except httpx.TransportError as error:
                logger.warning("an upload broke off and is tried again: %s", error)
                time.sleep(pause_s)
        return call(*given)

    return trying


def note_number(on_number: Callable[[int | None], None]) -> None:
    """Patch Flower to call back with the node's number once it is known."""
    from flwr.supernode.nodestate import InMemoryNodeState

    set_node_id = InMemoryNodeState.set_node_id

    def set_and_note(state: InMemoryNodeState, node: int | None) -> None:
        set_node_id(state, node)
        on_number(node)

    InMemoryNodeState.set_node_id = set_and_note  # type: ignore[assignment,method-assign]


def deactivate_node(
    server: str, roots: bytes, key: ec.EllipticCurvePrivateKey, node: int
) -> None:
    """Deactivate a node; ignore a server that is unreachable or does not know it."""
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    client = FleetHttpClient.from_server_address(
        server, False, roots, [NodeAuthHttpInterceptor(key, key.public_key())]
    )
    with contextlib.suppress(httpx.HTTPError, RuntimeError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    client.close()


# ---- a message at the worker ----


@dataclass(frozen=True)
class SiteTask:
    """One message to be answered."""

    message: Message
    context: Context
    bundle_digest: str
    """SHA-256 of the bundle that came with the run; its content is not used."""
    bundle_bytes: int
    _client: RuntimeHttpClient

    @classmethod
    @contextmanager
    def held(cls, port: int, token: str) -> Iterator[Callable[[], SiteTask]]:
        """Keep a task alive at the SuperNode; yield the function that fetches it."""
        from flwr.supercore.heartbeat import (
            HeartbeatSender,
            make_task_heartbeat_fn_http,
        )
        from flwr.supernode.runtime.run_clientapp import pull_task_input

        client = holder(port, token, "flwr-clientapp")
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()

        def fetch() -> SiteTask:
            message, context, _, fab = pull_task_input(client)
            return cls(message, context, fab.hash_str, len(fab.content), client)

        try:
            yield fetch
        finally:
            heartbeat.stop()
            client.close()

    def failure(self, code: str) -> Message:
        """Return an error reply that holds our code only."""
        failed = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code)
        return Message(failed, reply_to=self.message)

    def answer(self, reply: Message) -> None:
        """Hand the reply to the SuperNode."""
        from flwr.supernode.runtime.run_clientapp import (
            push_message,
            push_task_output,
        )

        push_message(self._client, reply, self.context)
        push_task_output(self._client, self.context, SubStatus.COMPLETED, "")
