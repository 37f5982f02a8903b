"""A hospital or outsider holds a round up, floods the server, or breaks the model."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord
from flwr.supercore.task_identity import TaskIdentity

from fedgex.common import keys
from fedgex.common.errors import FederationError
from fedgex.common.transport.records import to_arrays, to_record
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain
from fedgex.server.federation import dispatch
from fedgex.server.federation.dispatch import LONGEST, PATIENCE
from fedgex.server.service.flower import NODE_KEY_HEADER
from fedgex.server.service.superlink import (
    FLEET,
    PEERS_NAMED,
    POLL,
    Activity,
    Denials,
    PublicGuard,
)

from ..server.federation import test_dispatch as scripted
from ..support.attacked import (
    FIRST,
    NAMES,
    SECOND,
    THIRD,
    alliance_in,
    short,
    sign_again,
)

KEY = b"the public key of a hospital's node"
PUSH = FLEET + "push-object"


# ---- at the guard ----


def call(
    guard: PublicGuard, path: str, body: bytes = b"", peer: str = "192.0.2.9"
) -> int:
    """Send a request to the guard, and return the status."""
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    header = (NODE_KEY_HEADER.encode(), b64encode(KEY))
    scope = {"type": "http", "path": path, "client": (peer, 1), "headers": [header]}
    asyncio.run(guard(scope, receive, send))
    return status


def answering(status: int, body: bytes = b"") -> Any:
    """Return an app that reads a request and gives one answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


@pytest.mark.parametrize("body", [b"", b"refused"])
def test_bytes_that_only_claim_a_hospitals_key_are_no_movement(
    body: bytes, tmp_path: Path
) -> None:
    activity = Activity(tmp_path / "activity.json")
    activity.moved(KEY)  # it was there before
    activity.write(lambda key: 1)
    (tmp_path / "activity.json").unlink()
    guard = PublicGuard(answering(401, body), activity, Denials(Chain(tmp_path / "a")))

    assert call(guard, PUSH, b"x" * 100_000) == 401
    activity.write(lambda key: 1)

    assert not (tmp_path / "activity.json").exists()


@pytest.mark.parametrize(("path", "body"), [(PUSH, b""), (POLL, b"a message")])
def test_what_the_app_answered_is_movement(
    path: str, body: bytes, tmp_path: Path
) -> None:
    activity = Activity(tmp_path / "activity.json")
    guard = PublicGuard(answering(200, body), activity, Denials(Chain(tmp_path / "a")))

    assert call(guard, path, b"x") == 200
    activity.write(lambda key: 1)

    assert '"moved": 1' in (tmp_path / "activity.json").read_text()


def test_a_flood_of_denied_requests_is_one_line_of_the_audit_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    denials = Denials(Chain(path))
    guard = PublicGuard(answering(200), Activity(tmp_path / "activity"), denials)

    for number in range(1_000):
        peer = f"192.0.2.{number % 100}"
        assert call(guard, f"/v1/control/\x1b[2J{number}", peer=peer) == 404
    assert not path.exists()
    denials.write()
    denials.write()

    (line,) = audit_log.read(path)
    assert (line["event"], line["count"]) == ("denied", 1_000)
    assert sum(line["peers"].values()) == 1_000
    assert len(line["peers"]) == PEERS_NAMED + 1
    assert path.stat().st_size < 2_000
    assert len(caplog.messages) == 10
    assert "\x1b" not in caplog.text


# ---- a round that is kept open ----


@pytest.mark.parametrize(("enough", "deadlines"), [(True, PATIENCE), (False, LONGEST)])
def test_a_site_that_moves_for_ever_does_not_keep_a_round_open(
    enough: bool, deadlines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    clock = scripted.Clock()
    monkeypatch.setattr(dispatch, "time", clock)
    grid = scripted.ScriptedGrid(clock, {1: [None], 2: [(1, scripted.yes())]})
    peers = scripted.Watched(
        study=scripted.STUDY,
        n_sites=2,
        by_name={"h1": 1, "h2": 2},
        clock=clock,
        moved={1: range(0, 100_000, 10)},
    )
    answers = scripted.ask(grid, tmp_path / "journal", peers, enough=enough)

    assert [a.site for a in answers] == ["h2", "h1"]
    assert answers[-1].outcome.state == "late"
    assert 0 <= clock.now - 1_000 - deadlines * scripted.DEADLINE_S <= 10


# ---- what a hospital sends ----


def attacked(
    tmp_path: Path,
    change: Callable[[Message], None],
    sites: tuple[str, ...] = (FIRST,),
    again: bool = True,
    **study: Any,
) -> Any:
    """Run a study in which a site's updates are changed, and signed again by it."""
    alliance = alliance_in(tmp_path)

    def hook(name: str, reply: Message) -> None:
        if name in sites and reply.metadata.message_type == keys.TRAIN:
            change(reply)
            if again:
                sign_again(alliance, name, reply.content)

    try:
        alliance.conduct(alliance.agree(short(1, **study)), after=hook)
    except FederationError as error:
        return alliance, str(error)
    return alliance, ""


def report(**changes: Any) -> Callable[[Message], None]:
    """Return a change of the numbers that a site reports."""

    def change(reply: Message) -> None:
        numbers = dict(reply.content.metric_records[keys.METRICS])
        numbers |= {name.replace("_", "-"): value for name, value in changes.items()}
        reply.content[keys.METRICS] = MetricRecord(numbers)

    return change


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_examples": 1e308},
        {"num_examples": 1e12},
        {"num_examples": 10**9},
        {"num_examples": 31},
        {"num_examples": -30},
        {"num_loss_terms": 10**9},
        {"num_loss_terms": 1e300},
    ],
    ids=str,
)
def test_a_site_does_not_weigh_more_than_its_patients(
    numbers: dict[str, Any], tmp_path: Path
) -> None:
    alliance, _ = attacked(tmp_path, report(**numbers))

    (outcome,) = alliance.states(FIRST)

    assert outcome[0] == "quarantined"
    assert [alliance.states(name) for name in (SECOND,)] == [[("contributed", None)]]
    assert finite(alliance)


def test_terms_of_the_loss_are_covered_by_the_signature(tmp_path: Path) -> None:
    alliance, _ = attacked(tmp_path, report(num_loss_terms=77), again=False)

    ((state, reason),) = alliance.states(FIRST)

    assert state == "quarantined"
    assert "signed for reply" in str(reason)


def longer(reply: Message) -> None:
    arrays = to_arrays(reply.content.array_records[keys.UPDATE])
    more = np.zeros(16 << 20, np.float32)  # 64 MiB for a model of less than one
    reply.content[keys.UPDATE] = to_record({**arrays, "more": more})


def test_an_upload_longer_than_the_model_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(
        "fedgex.server.federation.rounds.pieces", lambda record: read.append(record)
    )
    alliance, failure = attacked(tmp_path, longer, NAMES)

    assert not read
    assert "expected at most" in failure
    assert not list(alliance.run_dir.glob("spool/*"))


def huge(reply: Message) -> None:
    arrays = to_arrays(reply.content.array_records[keys.UPDATE])
    moved = {name: np.full_like(array, 3e38) for name, array in arrays.items()}
    reply.content[keys.UPDATE] = to_record(moved)


OVERFLOWING = {
    "strategy": {"name": "fedadam"},
    "rounds": {"quorum": 1},
}


def test_an_update_that_overflows_the_model_ends_its_site_and_not_the_run(
    tmp_path: Path,
) -> None:
    """Two of three send it: then neither is far beyond the median of the others."""
    alliance, failure = attacked(tmp_path, huge, (FIRST, SECOND), **OVERFLOWING)

    assert failure == ""
    for name in (FIRST, SECOND):
        assert alliance.states(name) == [
            ("quarantined", "its update makes the next model overflow")
        ]
    assert alliance.states(THIRD) == [("contributed", None)]
    assert finite(alliance)


def test_a_model_that_would_not_be_finite_is_never_written(tmp_path: Path) -> None:
    alliance, failure = attacked(tmp_path, huge, NAMES, **OVERFLOWING)

    assert "its update makes the next model overflow" in failure
    assert alliance.outcome.final.round == 0
    assert finite(alliance)


def finite(alliance: Any) -> bool:
    last = alliance.outcome.final
    arrays = (*last.parameters.values(), *last.server.values())
    return all(np.isfinite(array).all() for array in arrays)
