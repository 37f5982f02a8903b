"""A Flower Grid on one machine: the hospitals' own app answers, here or in a pool.

Messages and replies are serialised both ways, so that neither side sees the other's
objects; contents travel as they would between hospitals, without the network.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import fedgex.client.app

SERVER_NODE = SUPERLINK_NODE_ID
FIRST_NODE = 100
AHEAD = 2
"""Messages handed to the pool for each of its workers: one under way, one next."""


class ProcessGrid(Grid):
    """What grids without a server share: messages are pushed and pulled, no more."""

    def __init__(self) -> None:
        """Open a grid; from now on this process may make messages."""
        # Flower 1.41 builds no message in a process without a task.
        TaskIdentity.run_id = TaskIdentity.task_id = 1
        TaskIdentity.node_id = SERVER_NODE
        self._ids = (f"message-{i}" for i in itertools.count(1))

    def set_run(self, run: Run) -> None:
        """Refuse: Flower's runtime calls it, and there is none."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """Refuse, as `set_run` does."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refuse: deprecated by Flower."""
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        """Refuse: the server pushes and pulls."""
        raise NotImplementedError


class LocalGrid(ProcessGrid):
    """One node for each folder of a split, in order of name.

    Without a pool a message is answered when its reply is asked for, so that one reply
    is in memory at a time.
    """

    def __init__(
        self, sites: Path, pool: Executor | None = None, workers: int = 1
    ) -> None:
        """Open a grid over the sites' folders.

        Parameters
        ----------
        pool
            Answers `workers` messages at a time; None: this process answers.
        """
        super().__init__()
        names = sorted(path.name for path in sites.iterdir() if path.is_dir())
        self.names = dict(enumerate(names, start=FIRST_NODE))
        self._sites, self._pool, self._most = sites, pool, AHEAD * workers
        self._waiting: deque[str] = deque()
        self._messages: dict[str, Message] = {}
        self._running: dict[str, Future[bytes]] = {}

    def get_node_ids(self) -> list[int]:
        """Return the nodes of all sites."""
        return list(self.names)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their identifiers."""
        ids = []
        for message in messages:
            ids.append(next(self._ids))
            self._waiting.append(ids[-1])
            self._messages[ids[-1]] = message
        self._hand_over()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once."""
        found = []
        for message_id in message_ids:
            if self._pool is None and message_id in self._messages:
                self._waiting.remove(message_id)
                found.append(self.deliver(self._messages.pop(message_id), message_id))
            elif message_id in self._running and self._running[message_id].done():
                found.append(_reply(self._running.pop(message_id).result()))
        self._hand_over()
        return found

    def deliver(self, message: Message, message_id: str) -> Message:
        """Have the site of a message answer it in this process."""
        request, site = self._request(message, message_id)
        return _reply(answer(site, request))

    def _hand_over(self) -> None:
        """Submit messages to the pool while it has room: each holds a model."""
        while self._pool and self._waiting and len(self._running) < self._most:
            message_id = self._waiting.popleft()
            request, site = self._request(self._messages.pop(message_id), message_id)
            self._running[message_id] = self._pool.submit(answer, site, request)

    def _request(self, message: Message, message_id: str) -> tuple[bytes, Path]:
        proto = message_to_proto(message)
        proto.metadata.message_id = message_id
        site = self._sites / self.names[message.metadata.dst_node_id]
        return proto.SerializeToString(deterministic=True), site


def answer(site: Path, request: bytes) -> bytes:
    """Have the app of a hospital answer a serialised message, and serialise the reply.

    Parameters
    ----------
    site
        Folder of the hospital, with its `site.toml`.
    """
    message = message_from_proto(MessageProto.FromString(request))
    reply = fedgex.client.app.app(message, _context(site, message.metadata.dst_node_id))
    content: bytes = message_to_proto(reply).SerializeToString(deterministic=True)
    return content


@cache
def _context(site: Path, node: int) -> Context:
    return Context(
        run_id=1,
        node_id=node,
        node_config={"site-toml": str(site / "site.toml")},
        state=RecordDict(),
        run_config={},
    )


def _reply(content: bytes) -> Message:
    return message_from_proto(MessageProto.FromString(content))
