"""Flower's SuperLink behind a guard that exposes only the fleet interface to hospitals.

One app serves two listeners. The public one uses TLS and passes the calls of hospitals'
nodes and `/health`. The loopback one serves control and runtime, and requires a secret
that the supervisor makes for this process.

The guard also records each node's last activity, on which a round's deadline depends
(docs/rounds.md). The SuperLink's state is in memory; a run's state is in its folder.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import sys
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fedgex.common.errors import FedgexError
from fedgex.common.settings import Settings
from fedgex.common.system.processes import begin
from fedgex.common.transport.flower import look_less_often
from fedgex.common.trust.audit_log import Chain
from fedgex.server.service.flower import NODE_KEY_HEADER, SECRET_HEADER, superlink_app

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
NodeOf = Callable[[bytes], int | None]
"""Flower's number of the node with a public key."""

SECRET_VARIABLE = "FEDGEX_SUPERLINK_SECRET"
FLEET, HEALTH = "/v1/fleet/", "/health"
POLL, HEARTBEAT = FLEET + "pull-messages", FLEET + "send-node-heartbeat"
PUBLIC = frozenset(
    {
        HEALTH,
        *(
            FLEET + call
            for call in (
                "activate-node",
                "deactivate-node",
                "send-node-heartbeat",
                "pull-messages",
                "push-messages",
                "get-run",
                "get-fab",
                "push-object",
                "pull-object",
                "confirm-message-received",
            )
        ),
    }
)
"""Paths that hospitals can reach; nodes are registered by the supervisor only."""
MAX_BODY_BYTES = 64 * 2**20
"""Largest request; Flower splits arrays into objects of 5 MiB."""
ACTIVITY_PERIOD_S = 0.5
DENIALS_PERIOD_S = 60.0
PEERS_NAMED = 20
"""Peers in one line about denied requests; the others are counted together."""
PATHS_LOGGED = 10
"""Denied paths in the plain log, each minute."""


class SuperLinkSettings(Settings):
    """Settings that the supervisor passes to the process."""

    host: str
    """Public interface."""
    port: int
    control_port: int
    """Loopback port of control and runtime."""
    health_port: int
    """Loopback port of Flower's gRPC health service; 0 leaves it out."""
    certificate: Path
    key: Path
    state_dir: Path


class Activity:
    """Time of each node's last transfer and last poll without a message.

    A transfer counts once the app answered it with 200: before, anyone may have sent it
    who knows a node's public key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._moved: dict[bytes, float] = {}
        self._idle: dict[bytes, float] = {}
        self._lock = threading.Lock()
        self._changed = False

    def moved(self, node_key: bytes) -> None:
        """Record a transfer of an authenticated node."""
        with self._lock:
            self._moved[node_key] = time.time()
            self._changed = True

    def idle(self, node_key: bytes) -> None:
        """Record a poll without a message."""
        with self._lock:
            self._idle[node_key] = time.time()
            self._changed = True

    def keep_writing(self, node_of: NodeOf) -> None:
        """Write the file after each change, for ever."""
        while True:
            time.sleep(ACTIVITY_PERIOD_S)
            try:
                self.write(node_of)
            except OSError as error:  # a full disk must not end this thread
                logger.error("%s could not be written: %s", self.path, error)

    def write(self, node_of: NodeOf) -> None:
        """Write the file if something changed since it was last written."""
        with self._lock:
            if not self._changed:
                return
            moved, idle = dict(self._moved), dict(self._idle)
            self._changed = False
        activity = {}
        for key in moved.keys() | idle.keys():
            node = node_of(key)
            if node is not None:
                activity[str(node)] = {"moved": moved.get(key), "idle": idle.get(key)}
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(activity))
            partial.replace(self.path)
        except OSError:
            self._changed = True
            raise


class Denials:
    """Requests for what is not public: counted, and a line a minute in the audit log.

    Who knocks often makes neither the log long nor the event loop slow.
    """

    def __init__(self, audit: Chain) -> None:
        self.audit = audit
        self._peers: Counter[str] = Counter()
        self._paths_left = PATHS_LOGGED
        self._lock = threading.Lock()

    def add(self, path: str, peer: str) -> None:
        """Count a request; the first paths of each minute go to the plain log."""
        with self._lock:
            named = peer in self._peers or len(self._peers) < PEERS_NAMED
            self._peers[peer if named else "others"] += 1
            self._paths_left -= 1
            if self._paths_left >= 0:
                logger.warning("denied %s to %s", ascii(path[:200]), peer)

    def write(self) -> None:
        """Add a line about all requests since the last one, if there were any."""
        with self._lock:
            peers, self._peers = self._peers, Counter()
            self._paths_left = PATHS_LOGGED
        if peers:
            self.audit.append("denied", count=peers.total(), peers=dict(peers))

    def keep_writing(self) -> None:
        """Write a line each minute, for ever."""
        while True:
            time.sleep(DENIALS_PERIOD_S)
            try:
                self.write()
            except FedgexError as error:  # a full disk must not end this thread
                logger.error("denied requests are not in the audit log: %s", error)


class PublicGuard:
    """Pass hospitals' calls and record them; answer all others with 404."""

    def __init__(self, app: App, activity: Activity, denials: Denials) -> None:
        self.app, self.activity, self.denials = app, activity, denials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path not in PUBLIC:
            client = (scope.get("client") or ("unknown",))[0]
            self.denials.add(path, str(client))
            await _answer(send, 404)
            return
        node_key = _node_key(scope)
        received = sent = 0
        status = 0

        async def counted_receive() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise ValueError(f"a request of more than {MAX_BODY_BYTES} bytes")
            return message

        async def counted_send(message: MutableMapping[str, Any]) -> None:
            nonlocal sent, status
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)
            if (
                status == 200
                and message.get("body")
                and path not in (HEARTBEAT, HEALTH)
            ):
                self.activity.moved(node_key)

        await self.app(scope, counted_receive, counted_send)
        # Only now is the node known to be who it claims to be.
        if path == POLL and status == 200 and sent == 0:
            self.activity.idle(node_key)
        elif status == 200 and path not in (HEARTBEAT, HEALTH):
            self.activity.moved(node_key)


class LoopbackGuard:
    """Require the supervisor's secret for calls of the control interface."""

    def __init__(self, app: App, secret: bytes) -> None:
        self.app, self.secret = app, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the app's start and end."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/control/"):
            given = dict(scope["headers"]).get(SECRET_HEADER.encode(), b"")
            if not hmac.compare_digest(given, self.secret):
                await _answer(send, 401)
                return
        await self.app(scope, receive, send)


async def serve(settings: SuperLinkSettings, secret: str) -> None:
    """Serve both listeners until the process is stopped."""
    import uvicorn  # not needed by the supervisor, which imports this module

    look_less_often()
    app, node_of = superlink_app(
        control_port=settings.control_port,
        health_port=settings.health_port,
        secret=secret,
    )
    activity = Activity(settings.state_dir / "activity.json")
    threading.Thread(
        target=activity.keep_writing, args=(node_of,), daemon=True, name="activity"
    ).start()
    common: dict[str, Any] = {"log_level": "warning", "access_log": False}
    loopback = uvicorn.Config(
        LoopbackGuard(app, secret.encode()),
        host="127.0.0.1",
        port=settings.control_port,
        **common,
    )
    denials = Denials(Chain(settings.state_dir / "audit.jsonl"))
    threading.Thread(target=denials.keep_writing, daemon=True, name="denials").start()
    guard = PublicGuard(app, activity, denials)
    public = uvicorn.Config(
        guard,
        host=settings.host,
        port=settings.port,
        lifespan="off",
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
        h11_max_incomplete_event_size=64 * 1024,
        **common,
    )
    servers = [uvicorn.Server(loopback), uvicorn.Server(public)]
    try:
        await asyncio.gather(*(server.serve() for server in servers))
    finally:
        denials.write()


def _node_key(scope: Scope) -> bytes:
    """Return the public key that a request claims, as Flower stores it."""
    claimed = dict(scope["headers"]).get(NODE_KEY_HEADER.encode(), b"")
    try:
        return b64decode(claimed, validate=True)
    except ValueError:
        return b""


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    begin()
    asyncio.run(
        serve(
            SuperLinkSettings.from_json(sys.argv[1], "the supervisor's word"),
            os.environ.pop(SECRET_VARIABLE),
        )
    )
