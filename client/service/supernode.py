"""Flower's SuperNode, as this hospital runs it.

What we change: the node that a crash left behind is signed off first, so that a restart
takes seconds and not a minute; while a study runs it looks for messages more often than
every three seconds; our worker need not ask it all the time; and it forgets a message
whose run ended while it was being fetched. Everything else is Flower's.
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
from fedgex.common.system.processes import IdlePause, begin
from fedgex.common.trust import pki

logger = logging.getLogger(__name__)

POLL_S, IDLE_POLL_S = 0.5, 3.0
"""Between two looks for a message: while a study runs, and while none does."""
SECRET_VARIABLE = "FEDGEX_SUPERNODE_SECRET"
NODE_FILE = "node.json"
"""In the state directory: Flower's number of this node."""
ARRIVED_FILE = "arrived"
"""In the state directory: touched whenever a message is here for our worker."""


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
    looks = IdlePause(POLL_S, IDLE_POLL_S)

    def arrived() -> None:
        looks.worked()
        with suppress(OSError):  # a full disk; the worker asks by itself, later
            (settings.state_dir / ARRIVED_FILE).touch()

    run_node(
        server=identity.server,
        roots=roots,
        key=key,
        site_toml=told.site_toml,
        port=told.port,
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
    """Deactivate the node of the process before, which may have been killed."""
    try:
        node = int(json.loads((state_dir / NODE_FILE).read_text())["node"])
    except (FileNotFoundError, ValueError):  # none, or cut off by a full disk
        return
    deactivate_node(server, roots, key, node)


def write_number(state_dir: Path, node: int | None) -> None:
    """Write the node's number for the next start to sign off."""
    told = {"node": node, "since": time.time()}
    try:
        write_atomic(state_dir / NODE_FILE, json.dumps(told).encode())
    except FedgexError as error:  # the next start takes a minute longer, no more
        logger.error("%s", error)


if __name__ == "__main__":
    begin()
    main(
        SuperNodeSettings.read(json.loads(sys.argv[1]), "the daemon's word"),
        os.environ.pop(SECRET_VARIABLE),
    )
