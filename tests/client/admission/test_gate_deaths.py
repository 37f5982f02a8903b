"""What the gate knows of a computation after the death of the process that did it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgex.client.admission.gate import MAX_DEATHS, Gate, read_working, stop_working
from fedgex.common import keys
from fedgex.common.errors import FedgexError

from ...support import hospital
from ...support.hospital import Died, as_bytes, code, death_at, join_and_approve

SECRET = "patient-0042"
CONTRACT = f"{hospital.CONTRACT}pretraining.rounds = 9\n"


@dataclass
class Hospital(hospital.Hospital):
    """A hospital whose app may fail."""

    fails_with: BaseException | None = None

    def app(self, message: Message, context: Context) -> Message:
        reply = super().app(message, context)
        if self.fails_with is not None:
            raise self.fails_with
        return reply


@pytest.fixture
def north(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return Hospital(*join_and_approve(tmp_path, CONTRACT))


def die(hospital: Hospital, number: int = 1) -> None:
    """Have the process die while it computes a round."""
    hospital.fails_with = Died()
    with pytest.raises(Died):
        hospital.ask(number)
    hospital.fails_with = None


def test_a_request_that_killed_the_process_three_times_is_refused(
    north: Hospital,
) -> None:
    for _ in range(MAX_DEATHS):
        die(north)

    assert MAX_DEATHS == 3
    assert code(north.ask()) == "FX-SITE-001"
    assert north.computed[1] == 3  # and not a fourth time
    assert code(north.ask()) is None  # whoever asks yet again begins anew


def test_two_deaths_are_no_reason_to_refuse(north: Hospital) -> None:
    die(north)
    die(north)

    assert code(north.ask()) is None
    assert read_working(north.state_dir) is None


def test_deaths_over_one_request_do_not_count_for_the_next(north: Hospital) -> None:
    die(north, 1)
    die(north, 1)
    die(north, 2)

    assert code(north.ask(2)) is None


def test_a_refusal_says_that_nothing_is_computed_any_more(north: Hospital) -> None:
    north.fails_with = ValueError(f"of {SECRET}")

    reply = north.ask()

    assert code(reply) == "FX-SITE-001"
    assert SECRET.encode() not in as_bytes(reply)
    assert SECRET not in (north.state_dir / "audit.jsonl").read_text()
    assert read_working(north.state_dir) is None


def test_a_request_that_took_too_long_is_refused_once_with_that_code(
    north: Hospital,
) -> None:
    die(north)
    stop_working(north.state_dir, "FX-SITE-007")

    assert code(north.ask()) == "FX-SITE-007"
    assert north.computed[1] == 1
    assert code(north.ask()) is None


def test_stopping_while_nothing_is_computed_does_nothing(north: Hospital) -> None:
    stop_working(north.state_dir, "FX-SITE-007")

    assert code(north.ask()) is None


@pytest.mark.parametrize(
    ("point", "nth", "computed"),
    [
        ("audit.before", 1, 1),  # before it says "asked"
        ("audit.appended", 1, 1),
        ("site.before_train", 1, 1),
        ("site.after_train", 1, 2),
        ("audit.before", 2, 2),  # before it says "answered"
        ("audit.appended", 2, 2),
        ("reply.written", 1, 2),
        ("reply.renamed", 1, 1),  # stored: sent again, and not computed again
        ("site.before_send", 1, 1),
    ],
)
def test_after_a_death_at_any_step_one_answer_stands(
    north: Hospital, point: str, nth: int, computed: int
) -> None:
    with death_at(point, nth):
        north.ask()

    again, once_more = north.ask(), north.ask()

    assert as_bytes(again) == as_bytes(once_more)
    assert north.computed[1] == computed
    assert again.metric_records[keys.METRICS]["times"] == computed
    assert "replayed" in north.events()
    assert read_working(north.state_dir) is None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_log_that_cannot_be_written_lets_nothing_out_until_it_can(
    north: Hospital, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    honest = os.fsync

    def fsync(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("audit.jsonl"):
            raise OSError(error, os.strerror(error))
        honest(handle)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        for _ in range(MAX_DEATHS + 1):
            with pytest.raises(FedgexError, match="could not be written"):
                north.ask()

    assert not north.computed
    assert code(north.ask()) is None  # a full disk is no death
    assert north.events()[-2:] == ["asked", "answered"]


def test_a_reply_that_finds_no_room_on_the_disk_is_given_once_there_is_some(
    north: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.fsync

    def fsync(handle: int) -> None:
        if "/replies/" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(handle)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        assert code(north.ask()) == "FX-SITE-009"

    assert code(north.ask()) is None
    assert as_bytes(north.ask()) == as_bytes(north.ask())


def test_a_policy_that_cannot_be_read_lets_nothing_out(north: Hospital) -> None:
    gate = Gate(north.site_toml, north.app)
    north.site_toml.with_name("policy.toml").write_text("minimum_cohort = ")
    message = Message(RecordDict(), 1, keys.TRAIN)
    message.metadata.__dict__["_message_id"] = "message-1"
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}
    )

    assert code(gate(message, context).content) == "FX-SITE-001"
    assert not north.computed
