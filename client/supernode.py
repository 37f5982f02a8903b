"""Flower's SuperNode, as this hospital runs it.

What we change: the node that a crash left behind is signed off first, so that a restart
takes seconds and not a minute; it looks for messages more often than every three
seconds; and it forgets a message whose run ended while it was being fetched. Everything
else is Flower's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import InMemoryNodeState, NodeStateFactory

from fedgex.client.identity import Identity
from fedgex.client.settings import SiteSettings
from fedgex.common import pki
from fedgex.common.errors import FedgexError
from fedgex.common.files import write_atomic
from fedgex.common.processes import begin
from fedgex.common.study import Settings

flower_supernode = import_module("flwr.supernode.cli.flower_supernode")
"""Not to be had by an import, which finds the function of that name first."""

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Longest pause between two looks for a message, or for its reply."""
SECRET_VARIABLE = "FEDGEX_SUPERNODE_SECRET"
NODE_FILE = "node.json"
"""In the state directory: Flower's number of this node."""


class SuperNodeSettings(Settings):
    """What the daemon tells the process."""

    site_toml: Path
    port: int
    """Loopback port for our worker."""


def trusted(settings: SiteSettings, identity: Identity) -> bytes:
    """Return what may sign the server's certificate, PEM.

    The consortium's authority, and the hospital's own where a proxy intercepts TLS.
    """
    texts = [pki.to_pem(identity.authority)]
    if settings.server_authority is not None:
        texts.append(settings.server_authority.read_text())
    return "\n".join(texts).encode()


def main(told: SuperNodeSettings, secret: str) -> None:
    """Run until the daemon ends us, or the server no longer knows this node."""
    settings = SiteSettings.load(told.site_toml)
    identity = Identity.load(settings.state_dir)
    if settings.proxy is not None:
        os.environ["HTTPS_PROXY"] = settings.proxy
    key = load_ssh_private_key(identity.node_key_path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    roots = trusted(settings, identity)
    _sign_off(settings.state_dir, identity.server, roots, key)
    config = flower_supernode.SuperNodeLifespanConfig(
        server_address=identity.server,
        root_certificates=roots,
        insecure=False,
        authentication_keys=(key, key.public_key()),
        max_retries=None,
        max_wait_time=None,
        node_config={"site-toml": str(told.site_toml)},
        isolation="process",
        runtime_certificates=None,
        runtime_root_certificates_path=None,
        health_server_address=(
            f"127.0.0.1:{settings.health_port}" if settings.health_port else None
        ),
        trusted_entities=None,
        superexec_auth_secret=secret.encode(),
        runtime_dependency_install=False,
        host="127.0.0.1",
        port=told.port,
        runtime_ssl_certfile=None,
        runtime_ssl_keyfile=None,
    )
    _remember_node(settings.state_dir)
    forget_half_fetched()
    start_client_internal.time = SimpleNamespace(  # type: ignore[assignment,attr-defined]
        sleep=lambda seconds: time.sleep(min(seconds, POLL_S))
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
    # Flower gave the connection up, as it does on some errors of TLS. Its runtime
    # interface would keep this process alive, and the daemon would not notice.
    logger.warning("the connection to the server was given up")
    os._exit(1)


def forget_half_fetched() -> None:
    """Have Flower forget a message whose run ended while it was being fetched.

    Flower raises `RunNotRunningException` past its own clearing up then, and leaves a
    task whose objects never come: our worker would wait for them for ever, and the
    hospital would answer nobody any more.
    """
    fetch = start_client_internal._pull_and_store_message

    def fetch_or_forget(**told: Any) -> int | None:
        for name in ("pull_object", "confirm_message_received"):
            told[name] = _failing_plainly(told[name])
        return fetch(**told)

    start_client_internal._pull_and_store_message = fetch_or_forget  # type: ignore[assignment]


def _failing_plainly(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call that raises an exception which Flower clears up after."""

    def failing(*given: Any) -> Any:
        try:
            return call(*given)
        except RunNotRunningException as ended:
            raise ConnectionError("the run ended meanwhile") from ended

    return failing


def _sign_off(
    state_dir: Path, server: str, roots: bytes, key: ec.EllipticCurvePrivateKey
) -> None:
    """Deactivate the node of the process before, which may have been killed."""
    try:
        node = int(json.loads((state_dir / NODE_FILE).read_text())["node"])
    except (FileNotFoundError, ValueError):  # none, or cut off by a full disk
        return
    client = FleetHttpClient.from_server_address(
        server, False, roots, [NodeAuthHttpInterceptor(key, key.public_key())]
    )
    # Not reachable, or a server that does not know the node: activation will tell.
    with contextlib.suppress(httpx.HTTPError, RuntimeError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    client.close()


def _remember_node(state_dir: Path) -> None:
    """Have the node's number written down as soon as Flower knows it."""
    set_node_id = InMemoryNodeState.set_node_id

    def set_and_write(state: InMemoryNodeState, node: int | None) -> None:
        set_node_id(state, node)
        told = {"node": node, "since": time.time()}
        try:
            write_atomic(state_dir / NODE_FILE, json.dumps(told).encode())
        except FedgexError as error:  # the next start takes a minute longer, no more
            logger.error("%s", error)

    InMemoryNodeState.set_node_id = set_and_write  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    begin()
    main(
        SuperNodeSettings.read(json.loads(sys.argv[1]), "the daemon's word"),
        os.environ.pop(SECRET_VARIABLE),
    )
