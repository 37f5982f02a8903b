"""Logs in several files: their chain goes on, and each line is read once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import TrustError
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain, Follower, Head

N = 20


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """Return a log whose files hold about four lines each."""
    monkeypatch.setattr(audit_log, "SEGMENT_BYTES", 1_000)
    return Chain(tmp_path / "audit.jsonl")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines that were read so far, by where they stand."""
    lines: list[str] = []
    honest = audit_log._entry

    def entry(line: bytes, where: str) -> dict[str, Any]:
        lines.append(where)
        return honest(line, where)

    monkeypatch.setattr(audit_log, "_entry", entry)
    return lines


def fill(log: Chain, n: int = N) -> list[Head]:
    return [
        log.append("asked" if number % 5 else "decided", number=number)
        for number in range(n)
    ]


def segments(log: Chain) -> list[Path]:
    return sorted(log.path.parent.glob("audit.0*.jsonl"))


def test_a_log_of_several_files_is_one_chain(log: Chain) -> None:
    heads = fill(log)

    assert len(segments(log)) >= 3
    assert log.head == audit_log.verify(log.path) == heads[-1]
    assert [line["number"] for line in audit_log.read(log.path)] == list(range(N))
    decided = audit_log.events(log.path, "decided")
    assert [line["number"] for line in decided] == [0, 5, 10, 15]
    assert all(log.contains(head) for head in heads)
    assert not log.contains(Head(3, heads[3].hash))
    for path in segments(log):
        last = path.read_text().splitlines()[-1]
        assert f'"n":{int(path.name.split(".")[1])},' in last


def test_the_first_line_of_a_file_holds_the_last_hash_of_the_one_before(
    log: Chain,
) -> None:
    heads = fill(log)
    paths = [*segments(log), log.path]

    for path in paths[1:]:
        first = path.read_text().splitlines()[0]
        number = next(i for i, h in enumerate(heads, 1) if h.hash in first)
        assert f'"previous":"{heads[number - 1].hash}"' in first


def test_a_log_from_before_goes_on_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Chain(tmp_path / "audit.jsonl")
    fill(log)
    assert not segments(log)
    monkeypatch.setattr(audit_log, "SEGMENT_BYTES", 1_000)

    head = log.append("asked")

    assert audit_log.verify(log.path) == head == Head(N + 1, head.hash)
    assert len(segments(log)) == 1


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_file_that_is_missing_or_changed_is_found(log: Chain, place: int) -> None:
    fill(log)
    path = segments(log)[place]
    content = path.read_bytes()

    path.unlink()
    with pytest.raises(TrustError, match="lines were removed, added or reordered"):
        audit_log.verify(log.path)
    path.write_bytes(content.replace(b'"number":', b'"numbed":', 1))
    with pytest.raises(TrustError, match="its content does not have the hash"):
        audit_log.verify(log.path)
    path.write_bytes(content)
    audit_log.verify(log.path)


def test_a_process_that_died_while_a_file_was_kept_leaves_one_log(log: Chain) -> None:
    while not segments(log):
        last = log.head
        log.append("asked")
    os.replace(segments(log)[0], log.path)  # as before
    os.link(log.path, audit_log._segment(log.path, last.index))

    assert audit_log.verify(log.path) == last
    assert len(audit_log.events(log.path, "asked")) == last.index
    head = log.append("asked")

    assert audit_log.verify(log.path) == head == Head(last.index + 1, head.hash)
    assert len(segments(log)) == 1


def test_a_message_reads_the_lines_that_are_new_and_those_that_it_needs(
    log: Chain, read: list[str]
) -> None:
    """The cost of a message grew with the log: four times each of its lines."""
    heads = fill(log, 200)
    audit_log.events(log.path, "decided")
    read.clear()

    log.append("refused")
    found = audit_log.events(log.path, "decided")
    assert log.contains(heads[17])

    needed = len(found) + 1 + 1  # the decisions, the line of the head, the new line
    assert len(read) <= needed + 2  # the last line, when one was added
    fill(log, 200)
    before = len(found)
    read.clear()
    found = audit_log.events(log.path, "decided")
    assert len(read) == 200 + len(found)
    assert len(found) == before + 40


@pytest.mark.parametrize("how", ["in place", "anew", "copied"])
def test_a_log_that_was_replaced_is_read_again(
    log: Chain, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "SEGMENT_BYTES", 1 << 20)
    fill(log)
    assert len(audit_log.events(log.path, "decided")) == 4
    other = Chain(tmp_path / "other.jsonl")
    for _ in range(N):
        other.append("decided", number=0)
    content = other.path.read_bytes()

    if how == "in place":
        log.path.write_bytes(content)
    elif how == "anew":
        log.path.unlink()
        assert audit_log.events(log.path, "decided") == []
        log.path.write_bytes(content)
    else:
        os.replace(other.path, log.path)

    assert len(audit_log.events(log.path, "decided")) == N


def test_a_follower_is_given_each_line_once_over_all_files(log: Chain) -> None:
    follower = Follower(log.path)
    assert follower.new() == []
    seen: list[int] = []
    for number in range(N):
        log.append("asked", number=number)
        if number % 3 == 0:
            seen += [line["number"] for line in follower.new()]

    seen += [line["number"] for line in follower.new()]

    assert seen == list(range(N))


ADDS = """
import sys
from pathlib import Path
from fedgex.common.trust import audit_log
audit_log.SEGMENT_BYTES = 1_000
log = audit_log.Chain(Path(sys.argv[1]))
for number in range(60):
    log.append("asked", who=sys.argv[2])
    audit_log.events(log.path, "asked")
"""


def test_two_processes_may_append_while_files_are_kept(log: Chain) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", ADDS, str(log.path), who])
        for who in "ab"
    ]
    while any(writer.poll() is None for writer in writers):
        audit_log.verify(log.path)

    assert [writer.returncode for writer in writers] == [0, 0]
    assert audit_log.verify(log.path).index == 120
    assert len(audit_log.events(log.path, "asked")) == 120
