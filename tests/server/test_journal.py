import json
import logging
import math
import os
import resource
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedgex.common.errors import FedgexError
from fedgex.server import journal
from fedgex.server.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_events_are_read_back_in_the_order_written(path: Path) -> None:
    writer = Journal(path)
    writer.write("phase-started", phase="pretraining", rounds=2)
    writer.write("round", phase="pretraining", round=1, sites={"h1": {"state": "late"}})

    events = journal.read(path)

    assert [event["event"] for event in events] == ["phase-started", "round"]
    assert events[0]["rounds"] == 2
    assert events[1]["sites"] == {"h1": {"state": "late"}}


def test_each_event_is_one_line_of_json_even_with_line_breaks_inside(
    path: Path,
) -> None:
    Journal(path).write("run-failed", reason="first\nsecond\u2028third")

    lines = path.read_text("utf-8").split("\n")

    assert len(lines) == 2
    assert lines[1] == ""
    assert json.loads(lines[0])["reason"] == "first\nsecond\u2028third"


def test_the_time_is_now_in_utc(path: Path) -> None:
    Journal(path).write("run-finished", checkpoint="model")

    time = datetime.fromisoformat(journal.read(path)[0]["time"])

    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)


def test_each_event_is_synchronised_to_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):  # the folder is synchronised too
            sizes.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = Journal(path)

    writer.write("phase-finished", phase="survival")
    first = path.stat().st_size
    writer.write("run-finished", checkpoint="model")

    assert sizes == [first, path.stat().st_size]


def test_nan_and_infinity_become_null_wherever_they_are(path: Path) -> None:
    Journal(path).write("round", loss=math.nan, sites={"h1": [1.5, math.inf]})

    event = json.loads(path.read_text(), parse_constant=pytest.fail)

    assert event["loss"] is None
    assert event["sites"] == {"h1": [1.5, None]}


def test_a_torn_last_line_is_dropped_with_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(path).write("run-started", study="tiny")
    with path.open("a") as file:
        file.write('{"event": "rou')

    with caplog.at_level(logging.WARNING):
        events = journal.read(path)

    assert [event["event"] for event in events] == ["run-started"]
    assert "dropped 14 bytes of a torn last line" in caplog.text


@pytest.mark.parametrize("damage", ['{"event": "rou', "[1, 2]", "{}", "\xff"])
def test_a_line_in_the_middle_that_is_no_event_is_an_error_that_says_where(
    path: Path, damage: str
) -> None:
    Journal(path).write("run-started", study="tiny")
    where = path.stat().st_size
    with path.open("a", encoding="latin-1") as file:
        file.write(damage + "\n")
    Journal(path).write("run-finished", checkpoint="model")

    with pytest.raises(FedgexError, match=f"byte {where} is not a journal event"):
        journal.read(path)


def test_a_journal_that_was_torn_can_be_continued(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(path).write("run-started", study="tiny")
    with path.open("a") as file:
        file.write('{"event": "rou')

    with caplog.at_level(logging.WARNING):
        Journal(path).write("run-failed", reason="crash")

    assert [e["event"] for e in journal.read(path)] == ["run-started", "run-failed"]
    assert "cut 14 bytes" in caplog.text


def test_an_event_that_does_not_fit_is_refused_and_leaves_no_trace(path: Path) -> None:
    writer = Journal(path)
    writer.write("run-started", study="tiny")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(FedgexError, match=r"journal.jsonl could not be written: F"):
            writer.write("run-finished", checkpoint="model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert path.read_bytes() == before
    writer.write("run-finished", checkpoint="model")
    assert [e["event"] for e in journal.read(path)] == ["run-started", "run-finished"]


def test_the_tail_gives_each_event_once(path: Path) -> None:
    writer = Journal(path)
    writer.write("run-started", study="tiny")

    first, offset = journal.tail(path, 0)
    nothing, same = journal.tail(path, offset)
    writer.write("run-finished", checkpoint="model")
    second, _ = journal.tail(path, offset)

    assert [event["event"] for event in first] == ["run-started"]
    assert (nothing, same) == ([], offset)
    assert [event["event"] for event in second] == ["run-finished"]


def test_the_tail_waits_for_a_line_that_is_still_being_written(path: Path) -> None:
    path.write_text('{"event": "rou')

    early = journal.tail(path, 0)
    with path.open("a") as file:
        file.write('nd", "round": 1}\n')
    late, _ = journal.tail(path, early[1])

    assert early == ([], 0)
    assert late == [{"event": "round", "round": 1}]


def test_the_tail_of_a_journal_not_yet_begun_is_empty(path: Path) -> None:
    assert journal.tail(path, 0) == ([], 0)
