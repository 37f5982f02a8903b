"""Ask the sites something, ask again what got lost, and say how each one ended.

Flower carries the messages. What we add: one reply in memory at a time, who answered
what under which message, a deadline that counts from the last movement, and a reason
for everybody who did not answer. Asking twice is safe: a site computes an answer once
and sends it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgex.common import codes, failpoints, keys
from fedgex.common.errors import TrustError, UpdateError
from fedgex.common.receipt import Part, request_digest
from fedgex.common.records import let_go
from fedgex.server.journal import Journal

logger = logging.getLogger(__name__)

PAUSE_S = 5.0
"""Longest pause between two tries of one site."""
IDLE_S = 3.0
"""A node that asks for work this long after its message was sent has lost it; Flower's
nodes ask every three seconds."""
MAX_DEATHS = 5
"""How often the death of a node or its app gives the site its full time anew. One that
dies whenever it is asked would otherwise hold up the round for ever."""

State = Literal["contributed", "late", "failed", "refused", "quarantined"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The same question for several sites."""

    type: str
    content: Callable[[], RecordDict]
    """Builds what every site is sent, anew for each try: a model is not kept twice."""
    group: str
    """Flower's group, and what the journal and the log call it."""
    phase: str = ""
    """Empty for a question that belongs to no round, and then `round` is 0."""
    round: int = 0
    own: Callable[[str], Mapping[str, ConfigRecord]] = lambda site: {}
    """What one site is sent besides, for its eyes alone."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What the guard saw of a node, each in seconds since the epoch; None if never."""

    moved: float | None
    """Last byte or message in either direction."""
    idle: float | None
    """Last time that it asked for work and there was none."""


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """A site's signed part of one reply, verified."""

    part: Part
    text: str
    signature: str
    certificate: str


class Peers(Protocol):
    """Who the sites are, and what is known of them besides their answers."""

    def nodes(self) -> Mapping[str, int]:
        """Return Flower's number of each site's node, as of now."""

    def activity(self) -> Mapping[int, Activity]:
        """Return what moved, by node; empty where nobody looks."""

    def barred(self) -> Mapping[str, str]:
        """Return the sites that may not take part, and why."""

    def records(self, site: str) -> Mapping[str, ConfigRecord]:
        """Return what a message to this site holds besides."""

    def verify(
        self, site: str, request: Request, asked: str, reply: RecordDict
    ) -> Sealed | None:
        """Return the site's signed part; None where nobody signs.

        Parameters
        ----------
        asked
            Digest of what was asked.

        Raises
        ------
        TrustError, UpdateError
            If the part is missing, cannot be trusted, or is of another question.
        """


@dataclass(frozen=True)
class Simulated:
    """The peers of a simulation: each has its node, nobody signs, nobody looks."""

    by_name: Mapping[str, int]

    def nodes(self) -> Mapping[str, int]:
        """Return the nodes as given."""
        return self.by_name

    def activity(self) -> Mapping[int, Activity]:
        """Return nothing."""
        return {}

    def barred(self) -> Mapping[str, str]:
        """Return nobody."""
        return {}

    def records(self, site: str) -> Mapping[str, ConfigRecord]:
        """Add nothing."""
        return {}

    def verify(
        self, site: str, request: Request, asked: str, reply: RecordDict
    ) -> Sealed | None:
        """Return None."""
        return None


@dataclass(frozen=True, kw_only=True)
class Line:
    """What it takes to talk to the sites."""

    grid: Grid
    peers: Peers
    journal: Journal
    poll_s: float
    """Seconds between two looks for replies."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How asking one site ended; `content` is absent unless it did as asked."""

    site: str
    state: State
    reason: str | None = None
    """Code or cause, for every state but `contributed`."""
    content: RecordDict | None = None
    sealed: Sealed | None = None
    """Its signature, of a run between hospitals."""
    bytes_up: int = 0
    bytes_down: int = 0


def ask(
    line: Line,
    sites: Iterable[str],
    request: Request,
    *,
    deadline_s: float,
    temporary: Collection[str] = codes.TEMPORARY,
) -> Iterator[Answer]:
    """Ask all sites the same and yield each one's answer as it comes, each once.

    A site is asked again when its node or app failed, when it refuses for a reason that
    passes, when its node is idle without having answered, and when its node is back. It
    ends as late, or with what failed last, once nothing of it has moved for
    `deadline_s`. An answer loses its arrays when the next is taken, so that those of
    one reply are in memory at a time.

    Parameters
    ----------
    temporary
        Codes of refusals that pass.
    """
    return _Asking(line, sites, request, deadline_s, temporary).answers()


def said(content: RecordDict) -> str | None:
    """Return the code of a refusal, None if the reply is none."""
    refusal = content.config_records.get(keys.REFUSAL)
    return None if refusal is None else str(refusal.get(keys.CODE, "without a code"))


def size_bytes(content: RecordDict) -> int:
    """Return the bytes of arrays and texts in a message."""
    size = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            size += sum(len(array.data) for array in record.values())
        elif isinstance(record, ConfigRecord):
            size += _text_size(record)
    return size


@dataclass(kw_only=True)
class _Wait:
    """Where one unanswered site stands; times are monotonic unless said otherwise."""

    progress: float
    """When something of it last moved."""
    due: float
    """When to try next, if no message is under way."""
    before: float = 0.0
    """`progress` before the present try."""
    message: str | None = None
    """Identifier of the message under way."""
    node: int | None = None
    """Node that it went to."""
    sent_at: float = 0.0
    """When, seconds since the epoch."""
    moved: float | None = None
    """Last movement that the guard told, seconds since the epoch."""
    tries: int = 0
    deaths: int = 0
    bytes_down: int = 0
    ended: tuple[State, str] | None = None
    """How the last try ended, unless something moved since."""
    told: tuple[State, str] | None = None
    """What the journal says of it."""


@dataclass
class _Asking:
    line: Line
    sites: Iterable[str]
    request: Request
    deadline_s: float
    temporary: Collection[str]
    waiting: dict[str, _Wait] = field(default_factory=dict)
    under_way: dict[str, str] = field(default_factory=dict)
    """Site of each message whose reply may come, superseded ones included."""
    asked: dict[str, str] = field(default_factory=dict)
    """Digest of what each site is asked."""
    shared: str = ""
    """The same, where all are asked the same."""

    def answers(self) -> Iterator[Answer]:
        now = time.monotonic()
        self.waiting = {site: _Wait(progress=now, due=now) for site in self.sites}
        first = True
        while self.waiting:
            yield from self._barred()
            pushed = self._push()
            if first:
                failpoints.reach("server.asked")
                first = False
            # Looked at before the replies are: whoever was idle and has no reply even
            # now has none on the way.
            activity = self.line.peers.activity()
            came = False
            for message_id in list(self.under_way):
                answer = self._pull(message_id)
                if answer is not None:
                    came = True
                    yield answer
                    if answer.content is not None:
                        let_go(answer.content)
                del answer
            self._look(activity)
            yield from self._late()
            if self.waiting and not came and not pushed:
                time.sleep(self.line.poll_s)

    def _barred(self) -> Iterator[Answer]:
        for site, reason in self.line.peers.barred().items():
            if site in self.waiting:
                yield self._end(site, "refused", reason)

    def _push(self) -> bool:
        """Send a message to every site that is due; return whether any was sent."""
        now, pushed = time.monotonic(), False
        due = [s for s, w in self.waiting.items() if w.message is None and w.due <= now]
        if not due:
            return False
        nodes, connected = self.line.peers.nodes(), set(self.line.grid.get_node_ids())
        activity = self.line.peers.activity()
        content = self.request.content()
        server = ConfigRecord({keys.VERSION: version("fedgex")})
        for site in due:
            wait, node = self.waiting[site], nodes.get(site)
            if node is None or node not in connected:
                self._try_later(site, "failed", "its node is not connected")
                continue
            own = self.request.own(site)
            records = {keys.SERVER: server, **self.line.peers.records(site), **own}
            whole = RecordDict({**content, **records})
            self._note_digest(site, whole, shared=not own)
            message = Message(
                whole, node, self.request.type, group_id=self.request.group
            )
            ids = list(self.line.grid.push_messages([message]))
            if not ids or not ids[0]:
                self._try_later(site, "failed", "message not accepted")
                continue
            if wait.tries == 0:
                wait.progress = time.monotonic()
            pushed, wait.message, wait.node = True, ids[0], node
            wait.sent_at, wait.before = time.time(), wait.progress
            wait.moved = activity[node].moved if node in activity else None
            wait.tries += 1
            wait.bytes_down += size_bytes(whole)
            self.under_way[ids[0]] = site
        return pushed

    def _note_digest(self, site: str, whole: RecordDict, *, shared: bool) -> None:
        """Compute the digest of a site's request, once for all where it is the same."""
        if site in self.asked:
            return
        digest = self.shared if shared else ""
        self.asked[site] = digest or request_digest(self.request.type, whole)
        if shared:
            self.shared = self.asked[site]

    def _pull(self, message_id: str) -> Answer | None:
        """Fetch the reply to one message; return it if it settles its site."""
        pulled = list(self.line.grid.pull_messages([message_id]))
        if not pulled:
            return None
        reply = pulled.pop()
        site = self.under_way.pop(message_id)
        wait = self.waiting.get(site)
        if wait is None:
            if not reply.has_error():
                self._note("duplicate", site)
            return None
        superseded = wait.message != message_id
        if reply.has_error():
            if not superseded:
                reason = f"Flower error {reply.error.code}: {reply.error.reason}"
                self._died(site, "failed", reason)
            return None
        code = said(reply.content)
        if code is not None and code in self.temporary:
            if not superseded:
                wait.progress = wait.before  # to be paused is no progress
                self._try_later(site, "refused", code)
            return None
        return self._settle(site, reply.content, code)

    def _settle(self, site: str, content: RecordDict, code: str | None) -> Answer:
        bytes_up = size_bytes(content)
        try:
            asked = self.asked[site]
            sealed = self.line.peers.verify(site, self.request, asked, content)
        except (TrustError, UpdateError) as error:
            return self._end(site, "quarantined", str(error), bytes_up)
        if code is not None:
            return self._end(site, "refused", code, bytes_up)
        return Answer(
            site=site,
            state="contributed",
            content=content,
            sealed=sealed,
            bytes_up=bytes_up,
            bytes_down=self.waiting.pop(site).bytes_down,
        )

    def _look(self, activity: Mapping[int, Activity]) -> None:
        """Note what moved, and find messages that their node no longer has."""
        nodes = self.line.peers.nodes()
        for site, wait in self.waiting.items():
            if wait.message is None or wait.node is None:
                continue
            if nodes.get(site) != wait.node:
                self._died(site, "failed", "its node was replaced")
                continue
            seen = activity.get(wait.node)
            if seen is None:
                continue
            if seen.moved is not None and seen.moved != wait.moved:
                # That it changed, not when: clocks jump.
                wait.moved, wait.progress = seen.moved, time.monotonic()
                wait.ended = None
            if seen.idle is not None and seen.idle - wait.sent_at > IDLE_S:
                self._died(site, "late", "its node lost the message")

    def _late(self) -> Iterator[Answer]:
        now = time.monotonic()
        for site, wait in list(self.waiting.items()):
            if now - wait.progress > self.deadline_s:
                silent: tuple[State, str]
                silent = "late", f"no answer in {self.deadline_s:g} s"
                yield self._end(site, *(wait.ended or silent))

    def _died(self, site: str, state: State, reason: str) -> None:
        """Ask again what a node or its app took and did not bring to its end."""
        wait = self.waiting[site]
        wait.deaths += 1
        if wait.deaths > MAX_DEATHS:
            wait.progress = wait.before
        self._try_later(site, state, reason)

    def _try_later(self, site: str, state: State, reason: str) -> None:
        wait = self.waiting[site]
        pause = min(PAUSE_S, self.line.poll_s * 2 ** min(wait.tries, 10))
        wait.message, wait.due = None, time.monotonic() + pause
        wait.ended = state, reason
        if wait.told != wait.ended:
            wait.told = wait.ended
            self._note("asked-again", site, state=state, reason=reason)

    def _end(self, site: str, state: State, reason: str, bytes_up: int = 0) -> Answer:
        return Answer(
            site=site,
            state=state,
            reason=reason,
            bytes_up=bytes_up,
            bytes_down=self.waiting.pop(site).bytes_down,
        )

    def _note(self, event: str, site: str, **facts: str) -> None:
        logger.info("%s site=%s %s %s", self.request.group, site, event, facts)
        self.line.journal.write(event, site=site, group=self.request.group, **facts)


def _text_size(record: ConfigRecord) -> int:
    return sum(
        sum(len(str(item)) for item in value) if isinstance(value, list)
        else len(str(value))
        for value in record.values()
    )  # fmt: skip
