"""Dispatch a request to the sites, with retries, and report an outcome for each.

Flower carries the messages. This module adds retries, a deadline that counts from the
last activity, a reason for each site without a reply, and one reply in memory at once.
Retries are safe: a site computes a reply once and replays it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from google.protobuf.message import DecodeError

from fedgex.common import codes, keys
from fedgex.common.errors import MessageError, UpdateError
from fedgex.common.messages.codec import boundary
from fedgex.common.messages.fields import Server
from fedgex.common.messages.replies import Refusal
from fedgex.common.messages.requests import Envelope
from fedgex.common.system import failpoints
from fedgex.common.transport.records import let_go
from fedgex.common.trust.receipt import brief, request_digest
from fedgex.server.federation.participants import (
    CONTRIBUTED,
    Activity,
    Channel,
    Request,
    SignedReply,
    SiteOutcome,
    State,
)

logger = logging.getLogger(__name__)

PAUSE_S = 5.0
"""Longest pause between retries of a site, seconds."""
IDLE_S = 3.0
"""A node that polls this long after its message was sent has lost it, seconds; Flower's
nodes poll every three."""
PATIENCE = 4
"""Deadlines after which a round that has its quorum does not wait for slow sites."""
LONGEST = 12
"""Deadlines after which no request waits, however much still moves."""
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    MemoryError,
    RecursionError,
    DecodeError,
)
"""What Flower raises of bytes that are no message; a lost connection raises others."""
MAX_DEATHS = 5
"""Crashes of a node or its app after which the deadline is no longer extended; else a
site that crashes on each request would block the round for ever."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A site's outcome, and its reply if it contributed."""

    site: str
    outcome: SiteOutcome
    content: RecordDict | None = None
    signed: SignedReply | None = None
    """Verified signature, in a run between hospitals."""
    bytes_up: int = 0
    bytes_down: int = 0


def request_all(
    channel: Channel,
    sites: Iterable[str],
    request: Request,
    *,
    deadline_s: float,
    temporary: Collection[str] = codes.TEMPORARY,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """Send a request to all sites and yield one answer per site, as replies arrive.

    A request is repeated when the site's node or app failed, when it refuses
    temporarily, when its node is idle without a reply, and when its node reconnects. A
    site without activity for `deadline_s` ends as late, or with its last failure; so
    does one that still moves after `LONGEST` deadlines, or after `PATIENCE` of them if
    there are enough answers. The arrays of an answer are freed when the next is taken.

    Parameters
    ----------
    temporary
        Codes of temporary refusals.
    enough
        Whether the answers that were taken so far suffice.
    """
    return _Dispatch(channel, sites, request, deadline_s, temporary, enough).answers()


def refusal_code(content: RecordDict) -> str | None:
    """Return the code of a refusal, None for another reply.

    Raises
    ------
    MessageError
        If a refusal holds anything but a code that this release knows.
    """
    if keys.REFUSAL not in content:
        return None
    code = Refusal.from_records(content).refusal.code
    if code not in frozenset(codes.Code):
        raise MessageError(f"unknown code {code}")
    return code


def size_bytes(content: RecordDict) -> int:
    """Return the size of the arrays and texts in a message."""
    size = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            size += sum(len(array.data) for array in record.values())
        elif isinstance(record, ConfigRecord):
            size += _text_size(record)
    return size


@dataclass(kw_only=True)
class _Wait:
    """State of a site without a reply; times are monotonic unless stated otherwise."""

    progress: float
    """Time of the last activity."""
    due: float
    """Time of the next try, if no message is under way."""
    before: float = 0.0
    """`progress` before the current try."""
    message: str | None = None
    """Identifier of the message under way."""
    node: int | None = None
    """Node that received it."""
    sent_at: float = 0.0
    """Time of sending, seconds since the epoch."""
    moved: float | None = None
    """Last activity that the guard reported, seconds since the epoch."""
    tries: int = 0
    deaths: int = 0
    bytes_down: int = 0
    ended: tuple[State, str] | None = None
    """Failure of the last try; None after new activity."""
    noted: tuple[State, str] | None = None
    """Last failure in the journal."""
    signed: SignedReply | None = None
    """Verified signature of the last temporary refusal."""


@dataclass
class _Dispatch:
    channel: Channel
    sites: Iterable[str]
    request: Request
    deadline_s: float
    temporary: Collection[str]
    enough: Callable[[], bool]
    waiting: dict[str, _Wait] = field(default_factory=dict)
    under_way: dict[str, str] = field(default_factory=dict)
    """Site of each message without a reply, superseded ones included."""
    asked: dict[str, str] = field(default_factory=dict)
    """Digest of each site's request."""
    shared: str = ""
    """Digest of a request that all sites share."""
    started: float = 0.0

    def answers(self) -> Iterator[Answer]:
        now = time.monotonic()
        self.started = now
        self.waiting = {site: _Wait(progress=now, due=now) for site in self.sites}
        first = True
        while self.waiting:
            yield from self._barred()
            pushed = self._push()
            if first:
                failpoints.reach("server.asked")
                first = False
            # Read before the replies: a site that was idle and still has no reply will
            # not send one.
            activity = self.channel.participants.activity()
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
                time.sleep(self.channel.poll_s)

    def _barred(self) -> Iterator[Answer]:
        for site, reason in self.channel.participants.barred().items():
            if site in self.waiting:
                yield self._end(site, "refused", reason)

    def _push(self) -> bool:
        """Send a message to every site that is due; return whether any was sent."""
        now, pushed = time.monotonic(), False
        due = [s for s, w in self.waiting.items() if w.message is None and w.due <= now]
        if not due:
            return False
        nodes, connected = (
            self.channel.participants.nodes(),
            set(self.channel.grid.get_node_ids()),
        )
        activity = self.channel.participants.activity()
        content = self.request.message().to_records()
        server = Envelope(server=Server(version=version("fedgex"))).to_records()
        for site in due:
            wait, node = self.waiting[site], nodes.get(site)
            if node is None or node not in connected:
                self._try_later(site, "failed", "its node is not connected")
                continue
            envelope = self.channel.participants.envelope(site).to_records()
            own = self.request.own
            more = {} if own is None else own(site).to_records()
            sent = RecordDict({**content, **server, **envelope, **more})
            self._note_digest(site, sent, shared=own is None)
            message = Message(
                sent, node, self.request.type, group_id=self.request.group
            )
            ids = list(self.channel.grid.push_messages([message]))
            if not ids or not ids[0]:
                self._try_later(site, "failed", "message not accepted")
                continue
            if wait.tries == 0:
                wait.progress = time.monotonic()
            pushed, wait.message, wait.node = True, ids[0], node
            wait.sent_at, wait.before = time.time(), wait.progress
            wait.moved = activity[node].moved if node in activity else None
            wait.tries += 1
            wait.bytes_down += size_bytes(sent)
            self.under_way[ids[0]] = site
        return pushed

    def _note_digest(self, site: str, sent: RecordDict, *, shared: bool) -> None:
        """Compute the digest of a site's request; once, if all share it."""
        if site in self.asked:
            return
        digest = self.shared if shared else ""
        self.asked[site] = digest or request_digest(self.request.type, sent)
        if shared:
            self.shared = self.asked[site]

    def _pull(self, message_id: str) -> Answer | None:
        """Fetch the reply to one message; return it if it settles its site."""
        try:
            pulled = list(self.channel.grid.pull_messages([message_id]))
        except UNREADABLE as error:
            site = self.under_way.pop(message_id)
            reason = f"the reply cannot be read: {type(error).__name__}"
            if site not in self.waiting:
                return None
            return self._end(site, "quarantined", reason)
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
                self._died(site, "failed", brief(reason))
            return None
        return self._settle(site, reply.content, superseded=superseded)

    def _settle(
        self, site: str, content: RecordDict, *, superseded: bool
    ) -> Answer | None:
        wait, bytes_up = self.waiting[site], size_bytes(content)
        try:
            with boundary("the reply cannot be used: "):
                if bytes_up > self.request.most_bytes:
                    raise MessageError(
                        f"it is of {bytes_up} bytes, expected at most "
                        f"{self.request.most_bytes}"
                    )
                code = refusal_code(content)
                signed = self.channel.participants.verify(
                    site, self.request, self.asked[site], content
                )
        except UpdateError as error:
            return self._end(site, "quarantined", str(error), bytes_up)
        if code is not None and code in self.temporary:
            if not superseded:
                wait.progress = wait.before  # to be paused is no progress
                wait.signed = signed
                self._try_later(site, "refused", code)
            return None
        if code is not None:
            return self._end(site, "refused", code, bytes_up, signed)
        return Answer(
            site=site,
            outcome=CONTRIBUTED,
            content=content,
            signed=signed,
            bytes_up=bytes_up,
            bytes_down=self.waiting.pop(site).bytes_down,
        )

    def _look(self, activity: Mapping[int, Activity]) -> None:
        """Record activity, and find messages that their node has lost."""
        nodes = self.channel.participants.nodes()
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
                # Compare, do not order: clocks jump.
                wait.moved, wait.progress = seen.moved, time.monotonic()
                wait.ended = None
            if seen.idle is not None and seen.idle - wait.sent_at > IDLE_S:
                self._died(site, "late", "its node lost the message")

    def _late(self) -> Iterator[Answer]:
        now = time.monotonic()
        passed = now - self.started
        over = passed > LONGEST * self.deadline_s or (
            passed > PATIENCE * self.deadline_s and self.enough()
        )
        for site, wait in list(self.waiting.items()):
            if over or now - wait.progress > self.deadline_s:
                seconds = passed if over else self.deadline_s
                silent: tuple[State, str]
                silent = "late", f"no answer in {seconds:.4g} s"
                state, reason = wait.ended or silent
                signed = wait.signed if state == "refused" else None
                yield self._end(site, state, reason, signed=signed)

    def _died(self, site: str, state: State, reason: str) -> None:
        """Retry a request during which the node or its app failed."""
        wait = self.waiting[site]
        wait.deaths += 1
        if wait.deaths > MAX_DEATHS:
            wait.progress = wait.before
        self._try_later(site, state, reason)

    def _try_later(self, site: str, state: State, reason: str) -> None:
        wait = self.waiting[site]
        pause = min(PAUSE_S, self.channel.poll_s * 2 ** min(wait.tries, 10))
        wait.message, wait.due = None, time.monotonic() + pause
        wait.ended = state, reason
        if wait.noted != wait.ended:
            wait.noted = wait.ended
            self._note("asked-again", site, state=state, reason=reason)

    def _end(
        self,
        site: str,
        state: State,
        reason: str,
        bytes_up: int = 0,
        signed: SignedReply | None = None,
    ) -> Answer:
        return Answer(
            site=site,
            outcome=SiteOutcome(state=state, reason=reason),
            signed=signed,
            bytes_up=bytes_up,
            bytes_down=self.waiting.pop(site).bytes_down,
        )

    def _note(self, event: str, site: str, **facts: str) -> None:
        logger.info("%s site=%s %s %s", self.request.group, site, event, facts)
        self.channel.journal.write(event, site=site, group=self.request.group, **facts)


def _text_size(record: ConfigRecord) -> int:
    return sum(
        sum(len(str(item)) for item in value) if isinstance(value, list)
        else len(str(value))
        for value in record.values()
    )  # fmt: skip
