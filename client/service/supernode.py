"""Process that runs Flower's SuperNode for this hospital.

Changes to Flower's behaviour: the node of a crashed process is deactivated first, so
that a restart needs seconds, not a minute; messages are polled more often while a study
runs; arrivals are signalled to the worker through a pipe; a message whose run ended
during its transfer is dropped; and an upload that TLS broke off is tried again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedgex.client.identity import Identity
from fedgex.client.service.flower import deactivate_node, run_node
from fedgex.client.settings import SiteSettings
from fedgex.common.errors import FedgexError
from fedgex.common.settings import Settings
from fedgex.common.system.files import write_atomic
from fedgex.common.system.processes import IdlePause, begin, set_proxy
from fedgex.common.trust import pki

logger = logging.getLogger(__name__)

POLL_S, IDLE_POLL_S = 0.5, 3.0
"""Polling intervals, seconds: while a study runs, and otherwise."""
SECRET_VARIABLE = "FEDGEX_SUPERNODE_SECRET"
NODE_FILE = "node.json"
"""File in the state directory with Flower's number of this node."""


class SuperNodeSettings(Settings):
    """Settings that the daemon passes to the process."""

    site_toml: Path
    port: int
    """Loopback port for our worker."""
    arrivals: int
    """Pipe into which a byte is written when a message arrives, for the worker."""


def trusted(settings: SiteSettings, identity: Identity) -> bytes:
    """Return the authorities that may sign the server's certificate, PEM.

    They are the consortium's, and the hospital's own where a proxy intercepts TLS.
    """
    texts = [pki.to_pem(identity.authority)]
    if settings.server_authority is not None:
        texts.append(settings.server_authority.read_text())
    return "\n".join(texts).encode()


def main(process: SuperNodeSettings, secret: str) -> None:
    """Run until the daemon stops this process, or the server drops the node."""
    settings = SiteSettings.load(process.site_toml)
    identity = Identity.load(settings.state_dir)
    set_proxy(settings.proxy)
    key = load_ssh_private_key(identity.node_key_path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    roots = trusted(settings, identity)
    _sign_off(settings.state_dir, identity.server, roots, key)
    looks = IdlePause(POLL_S, IDLE_POLL_S)

    def arrived() -> None:
        looks.worked()
        with suppress(BlockingIOError):  # the worker has more to read than it needs
            os.write(process.arrivals, b"\n")

    run_node(
        server=identity.server,
        roots=roots,
        key=key,
        site_toml=process.site_toml,
        port=process.port,
        health_port=settings.health_port,
        secret=secret,
        on_number=partial(write_number, settings.state_dir),
        on_message=arrived,
        pause=lambda: time.sleep(looks.seconds),
    )
    # Flower gave the connection up, as it does on some errors of TLS. Its runtime
    # interface would keep this process alive, and the daemon would not notice.
    logger.warning("the connection to the server was given up")
    os._exit(1)


def _sign_off(
    state_dir: Path, server: str, roots: bytes, key: ec.EllipticCurvePrivateKey
) -> None:
    """Deactivate the node of the previous process, which may have been killed."""
    try:
        node = int(json.loads((state_dir / NODE_FILE).read_text())["node"])
    except (FileNotFoundError, ValueError):  # none, or cut off by a full disk
        return
    deactivate_node(server, roots, key, node)


def write_number(state_dir: Path, node: int | None) -> None:
    """Store the node's number, so that the next start can deactivate it."""
    document = {"node": node, "since": time.time()}
    try:
        write_atomic(state_dir / NODE_FILE, json.dumps(document).encode())
    except FedgexError as error:  # the next start takes a minute longer, no more
        logger.error("%s", error)


if __name__ == "__main__":
    begin()
    main(
        SuperNodeSettings.from_json(sys.argv[1], "the daemon's word"),
        os.environ.pop(SECRET_VARIABLE),
    )
