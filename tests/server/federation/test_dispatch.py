"""Asking sites over a grid with a clock of its own: what is lost is asked again."""

import gc
import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedgex.common import codes, keys
from fedgex.common.messages.requests import Envelope
from fedgex.common.study import Study
from fedgex.common.transport.records import to_record
from fedgex.server import journal
from fedgex.server.federation import dispatch
from fedgex.server.federation.dispatch import MAX_DEATHS, Answer
from fedgex.server.federation.participants import Activity, Channel, Request, Simulated
from fedgex.server.journal import Journal

SITES = {"h1": 1, "h2": 2, "h3": 3}
DEADLINE_S, POLL_S = 60.0, 1.0
STUDY = Study.read({"name": "small"}, "a test's study")

Reply = RecordDict | Error
Script = Sequence[tuple[float, Reply] | None]
"""What a node does with its 1st, 2nd, ... message: seconds until it replies, and what;
None is silence. The last stands for all that follow."""


def yes(note: str = "yes") -> RecordDict:
    return RecordDict({keys.SITE: ConfigRecord({"name": note})})


def no(code: str) -> RecordDict:
    return RecordDict({keys.REFUSAL: ConfigRecord({"code": code})})


CRASHED = Error(code=8, reason="ClientApp stopped responding")


class Clock:
    """Stands in for the module `time`; sleeping is what moves it."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class ScriptedGrid:
    clock: Clock
    scripts: Mapping[int, Script]
    away: Mapping[int, float] = field(default_factory=dict)
    """Nodes that connect at a time only."""
    sent: list[tuple[float, Message]] = field(default_factory=list)
    replies: dict[str, tuple[float, Reply]] = field(default_factory=dict)

    def get_node_ids(self) -> list[int]:
        return [n for n in self.scripts if self.clock.now >= self.away.get(n, 0)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        (message,) = messages
        node, name = message.metadata.dst_node_id, f"message-{len(self.sent)}"
        script, place = self.scripts[node], len(self.times(node))
        step = script[min(place, len(script) - 1)]
        if step is not None:
            self.replies[name] = (self.clock.now + step[0], step[1])
        message.metadata.__dict__["_message_id"] = name
        self.sent.append((self.clock.now, message))
        return [name]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (name,) = message_ids
        if name not in self.replies or self.replies[name][0] > self.clock.now:
            return []
        _, reply = self.replies.pop(name)
        message = next(m for _, m in self.sent if m.metadata.message_id == name)
        return [Message(reply, reply_to=message)]

    def times(self, node: int) -> list[float]:
        """Return when a node was sent something, from the start."""
        return [t - 1_000 for t, m in self.sent if m.metadata.dst_node_id == node]


def simulated(by_name: Mapping[str, int]) -> Simulated:
    return Simulated(study=STUDY, n_sites=len(by_name), by_name=dict(by_name))


@dataclass(kw_only=True)
class Watched(Simulated):
    """Sites of whom the guard saw something, as of the clock."""

    clock: Clock
    moved: Mapping[int, Sequence[float]] = field(default_factory=dict)
    idle: Mapping[int, Sequence[float]] = field(default_factory=dict)
    revoked: Mapping[str, float] = field(default_factory=dict)

    def activity(self) -> Mapping[int, Activity]:
        def last(times: Sequence[float]) -> float | None:
            past = [1_000 + t for t in times if 1_000 + t <= self.clock.now]
            return max(past, default=None)

        return {
            node: Activity(
                moved=last(self.moved.get(node, ())), idle=last(self.idle.get(node, ()))
            )
            for node in self.by_name.values()
        }

    def barred(self) -> Mapping[str, str]:
        now = self.clock.now
        return {s: "revoked" for s, t in self.revoked.items() if now >= 1_000 + t}


@pytest.fixture(autouse=True)
def _flower_knows_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(dispatch, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def ask(
    grid: ScriptedGrid,
    path: Path,
    sites: Simulated | None = None,
    *,
    enough: bool = False,
) -> list[Answer]:
    channel = Channel(
        grid=cast(Grid, grid),
        participants=sites
        or simulated({s: n for s, n in SITES.items() if n in grid.scripts}),
        journal=Journal(path),
        poll_s=POLL_S,
    )
    asked = [site for site, node in SITES.items() if node in grid.scripts]
    request = Request(type=keys.PREPARE, message=Envelope, group="prepare")
    return list(
        dispatch.request_all(
            channel, asked, request, deadline_s=DEADLINE_S, enough=lambda: enough
        )
    )


def events(path: Path, name: str) -> list[dict[str, object]]:
    written = journal.read(path) if path.exists() else []
    return [event for event in written if event["event"] == name]


def test_each_site_is_answered_for_once_and_the_late_ones_come_last(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(
        clock, {1: [None], 2: [(0, yes())], 3: [(0, no("FX-SITE-001"))]}
    )

    answers = ask(grid, path)

    assert [(a.site, a.outcome.state, a.outcome.reason) for a in answers] == [
        ("h2", "contributed", None),
        ("h3", "refused", "FX-SITE-001"),
        ("h1", "late", "no answer in 60 s"),
    ]
    assert len(grid.sent) == 3
    assert not path.exists()


def test_every_message_says_which_version_the_server_runs(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(clock, {1: [(0, yes())]})

    ask(grid, path)

    (_, message), *_ = grid.sent
    assert message.content.config_records[keys.SERVER] == {"version": version("fedgex")}


def test_a_site_whose_app_died_is_asked_again(clock: Clock, path: Path) -> None:
    grid = ScriptedGrid(clock, {1: [(10, CRASHED), (5, yes())]})

    (answer,) = ask(grid, path)

    assert answer.outcome.state == "contributed"
    assert len(grid.times(1)) == 2
    (again,) = events(path, "asked-again")
    assert again["site"] == "h1"
    assert again["reason"] == "Flower error 8: ClientApp stopped responding"


def test_a_paused_site_is_asked_every_five_seconds_at_most_and_noted_once(
    clock: Clock, path: Path
) -> None:
    paused = (0, no("FX-SITE-004"))
    grid = ScriptedGrid(clock, {1: [*[paused] * 6, (0, yes())]})

    (answer,) = ask(grid, path)

    assert answer.outcome.state == "contributed"
    times = grid.times(1)
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert min(pauses) >= POLL_S
    assert max(pauses) <= 5 + POLL_S
    assert len(events(path, "asked-again")) == 1


@pytest.mark.parametrize("code", sorted(codes.TEMPORARY))
def test_what_passes_and_does_not_within_the_deadline_is_the_sites_reason(
    clock: Clock, path: Path, code: str
) -> None:
    grid = ScriptedGrid(clock, {1: [(0, no(code))]})

    (answer,) = ask(grid, path)

    assert (answer.outcome.state, answer.outcome.reason) == ("refused", code)
    assert DEADLINE_S < clock.now - 1_000 < DEADLINE_S + 10


def test_bytes_of_refusals_do_not_hold_a_paused_site_in_the_round(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(clock, {1: [(1, no("FX-SITE-004"))]})
    peers = Watched(
        study=STUDY, n_sites=1, by_name={"h1": 1}, clock=clock, moved={1: range(10_000)}
    )

    (answer,) = ask(grid, path, peers)

    assert (answer.outcome.state, answer.outcome.reason) == ("refused", "FX-SITE-004")
    assert clock.now - 1_000 < DEADLINE_S + 10


def test_a_node_that_is_away_is_asked_when_it_is_back(clock: Clock, path: Path) -> None:
    grid = ScriptedGrid(clock, {1: [(0, yes())]}, away={1: 1_030})

    (answer,) = ask(grid, path)

    assert answer.outcome.state == "contributed"
    (time,) = grid.times(1)
    assert 30 <= time <= 36


def test_a_node_that_stays_away_has_failed(clock: Clock, path: Path) -> None:
    grid = ScriptedGrid(clock, {1: [(0, yes())]}, away={1: 9_999})

    (answer,) = ask(grid, path)

    assert (answer.outcome.state, answer.outcome.reason) == (
        "failed",
        "its node is not connected",
    )


def test_a_node_that_is_idle_without_an_answer_is_asked_again(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(clock, {1: [None, (0, yes())]})
    peers = Watched(
        study=STUDY,
        n_sites=1,
        by_name={"h1": 1},
        clock=clock,
        moved={1: [1]},
        idle={1: [20]},
    )

    (answer,) = ask(grid, path, peers)

    assert answer.outcome.state == "contributed"
    first, second = grid.times(1)
    assert (first, second >= 20, second < 30) == (0, True, True)


def test_an_empty_poll_just_before_the_message_arrived_loses_nothing(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(clock, {1: [(30, yes())]})
    peers = Watched(
        study=STUDY, n_sites=1, by_name={"h1": 1}, clock=clock, idle={1: [2.9]}
    )

    (answer,) = ask(grid, path, peers)

    assert answer.outcome.state == "contributed"
    assert grid.times(1) == [0]


def test_the_answer_to_a_superseded_message_counts_and_a_second_is_a_duplicate(
    clock: Clock, path: Path
) -> None:
    slow, again, other = (40, yes("first")), (30, yes("second")), (58, yes())
    grid = ScriptedGrid(clock, {1: [slow, again], 2: [other]})
    peers = Watched(
        study=STUDY, n_sites=1, by_name={"h1": 1, "h2": 2}, clock=clock, idle={1: [20]}
    )

    answers = ask(grid, path, peers)

    assert [answer.site for answer in answers] == ["h1", "h2"]
    assert answers[0].content == yes("first")
    (duplicate,) = events(path, "duplicate")
    assert duplicate["site"] == "h1"


def test_the_death_of_a_superseded_message_changes_nothing(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(clock, {1: [(25, CRASHED), (20, yes())]})
    peers = Watched(
        study=STUDY, n_sites=1, by_name={"h1": 1}, clock=clock, idle={1: [15]}
    )

    (answer,) = ask(grid, path, peers)

    assert answer.outcome.state == "contributed"
    assert len(grid.times(1)) == 2


def test_whoever_moves_is_not_late(clock: Clock, path: Path) -> None:
    grid = ScriptedGrid(clock, {1: [(700, yes())], 2: [None]})
    peers = Watched(
        study=STUDY,
        n_sites=1,
        by_name={"h1": 1, "h2": 2},
        clock=clock,
        moved={1: range(0, 700, 50)},
    )

    answers = ask(grid, path, peers)

    assert [(a.site, a.outcome.state) for a in answers] == [
        ("h2", "late"),
        ("h1", "contributed"),
    ]


def test_whoever_stops_moving_is_late_so_much_later(clock: Clock, path: Path) -> None:
    grid = ScriptedGrid(clock, {1: [None]})
    peers = Watched(
        study=STUDY, n_sites=1, by_name={"h1": 1}, clock=clock, moved={1: [30, 80]}
    )

    (answer,) = ask(grid, path, peers)

    assert answer.outcome.state == "late"
    assert 80 + DEADLINE_S <= clock.now - 1_000 <= 80 + DEADLINE_S + 5


def test_an_app_that_dies_whenever_it_is_asked_does_not_hold_up_the_round(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(clock, {1: [(30, CRASHED)]})
    peers = Watched(
        study=STUDY,
        n_sites=1,
        by_name={"h1": 1},
        clock=clock,
        moved={1: range(100_000)},
    )

    (answer,) = ask(grid, path, peers)

    assert answer.outcome.state == "failed"
    assert clock.now - 1_000 < (MAX_DEATHS + 3) * 60


def test_a_revoked_site_is_not_asked_and_its_answer_is_not_waited_for(
    clock: Clock, path: Path
) -> None:
    grid = ScriptedGrid(clock, {1: [(0, yes())], 2: [(50, yes())]})
    peers = Watched(
        study=STUDY,
        n_sites=1,
        by_name={"h1": 1, "h2": 2},
        clock=clock,
        revoked={"h1": 0, "h2": 10},
    )

    answers = ask(grid, path, peers)

    assert [(a.site, a.outcome.state, a.outcome.reason) for a in answers] == [
        ("h1", "refused", "revoked"),
        ("h2", "refused", "revoked"),
    ]
    assert grid.times(1) == []
    assert clock.now - 1_000 < 15


def test_the_arrays_of_one_answer_are_in_memory_at_a_time(
    clock: Clock, path: Path
) -> None:
    """Without any help of the garbage collector, which comes when it comes."""
    arrays: list[weakref.ref[Array]] = []

    class Forgetful(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            pulled = super().pull_messages(message_ids)
            for message in pulled:  # another than the one that the script holds
                message.content = RecordDict({keys.MODEL: to_record({"a": np.ones(3)})})
            assert not any(array() for array in arrays)
            return pulled

    grid = Forgetful(clock, {node: [(0, yes())] for node in SITES.values()})
    channel = Channel(
        grid=cast(Grid, grid),
        participants=simulated(SITES),
        journal=Journal(path),
        poll_s=POLL_S,
    )
    request = Request(type=keys.PREPARE, message=Envelope, group="prepare")
    gc.disable()
    try:
        for answer in dispatch.request_all(
            channel, SITES, request, deadline_s=DEADLINE_S
        ):
            assert answer.content is not None
            (array,) = answer.content.array_records[keys.MODEL].values()
            arrays.append(weakref.ref(array))
            del answer, array
    finally:
        gc.enable()

    assert len(arrays) == 3
