"""An audit log shows whether any of its lines was changed, removed or moved."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedgex.common.errors import FedgexError, TrustError
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain, Head

N = 6


@pytest.fixture
def log(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "audit.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return a log of N lines and its content."""
    path = tmp_path_factory.mktemp("chain") / "audit.jsonl"
    for number in range(N):
        Chain(path).append("asked", round=number, why="K\u00f6ln\n\u2028")
    return path, path.read_bytes()


def naive(path: Path) -> Head:
    """The definition of a chain, written out."""
    index, previous = 0, "0" * 64
    for line in path.read_text("ascii").splitlines():
        entry = json.loads(line)
        said = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == said
        assert entry["previous"] == previous
        assert entry["n"] == index + 1
        index, previous = index + 1, said
    return Head(index, previous)


def test_lines_come_back_and_the_head_is_that_of_the_definition(log):
    heads = [log.head]
    heads.append(log.append("approved", contract="ab12", by="Dr K\u00f6hler"))
    heads.append(log.append("replied", round=1, sizes={"10": 1, "9": [0.5, None]}))

    first, second = audit_log.read(log.path)

    assert (first["event"], first["by"], first["n"]) == (
        "approved",
        "Dr K\u00f6hler",
        1,
    )
    assert (second["round"], second["sizes"]) == (1, {"10": 1, "9": [0.5, None]})
    assert heads[0] == Head(0, "0" * 64)
    assert heads[1] == Head(1, first["hash"])
    assert heads[2] == log.head == audit_log.verify(log.path) == naive(log.path)


def test_the_time_is_now_in_utc(log):
    log.append("started")

    time = datetime.fromisoformat(audit_log.read(log.path)[0]["time"])

    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)


def test_keys_that_are_numbers_are_hashed_as_they_are_read_back(log):
    log.append("sizes", by={10: 1, 9: 2})

    assert audit_log.read(log.path)[0]["by"] == {"10": 1, "9": 2}
    assert audit_log.verify(log.path) == log.head


def test_a_log_that_does_not_exist_is_empty(log):
    assert log.head == audit_log.verify(log.path) == Head(0, "0" * 64)
    assert audit_log.read(log.path) == []
    assert not log.path.exists()


def test_only_the_operator_may_read_a_log(log):
    log.append("started")

    assert log.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", ["n", "time", "previous", "hash"])
def test_what_the_log_itself_sets_cannot_be_given(log, key):
    with pytest.raises(AssertionError):
        log.append("forged", **{key: "x"})


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_what_is_not_json_is_refused_before_anything_is_written(log, value):
    with pytest.raises((ValueError, TypeError)):
        log.append("odd", value=value)

    assert not log.path.exists()


def test_a_log_contains_its_earlier_heads_and_no_others(log, tmp_path):
    heads = [log.head] + [log.append("asked", round=number) for number in range(4)]
    other = Chain(tmp_path / "other.jsonl")
    foreign = [other.append("asked", round=number) for number in range(6)]

    assert all(log.contains(head) for head in heads)
    assert not any(log.contains(head) for head in foreign)
    assert not log.contains(Head(0, heads[1].hash))
    assert not log.contains(Head(-1, heads[-1].hash))
    assert not Chain(tmp_path / "absent").contains(heads[1])


@given(st.data())
def test_any_changed_byte_is_found_in_its_line(whole, data):
    path, content = whole
    at = data.draw(st.integers(0, len(content) - 2))  # without the last newline
    new = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
    path.write_bytes(content[:at] + bytes([new]) + content[at + 1 :])

    number = content[:at].count(b"\n") + 1
    with pytest.raises(TrustError, match=f"line {number}: "):
        audit_log.verify(path)


@given(
    number=st.integers(0, N - 1),
    key=st.sampled_from(["n", "time", "event", "round", "why", "previous", "hash"]),
    value=st.none() | st.integers() | st.text() | st.lists(st.integers()),
)
def test_any_changed_value_is_found_in_its_line(whole, number, key, value):
    path, content = whole
    lines = content.splitlines(keepends=True)
    entry = json.loads(lines[number])
    assume(entry[key] != value)
    text = json.dumps(entry | {key: value}, sort_keys=True, separators=(",", ":"))
    lines[number] = text.encode() + b"\n"
    path.write_bytes(b"".join(lines))

    with pytest.raises(TrustError, match=f"line {number + 1}: "):
        audit_log.verify(path)


@pytest.mark.parametrize(
    ("old", "new"), [(b'"n":3', b'"n": 3'), (b"\\u00f6", b"\\u00F6")]
)
def test_bytes_that_change_without_changing_the_meaning_are_found(whole, old, new):
    path, content = whole
    lines = content.splitlines(keepends=True)
    lines[2] = lines[2].replace(old, new)
    path.write_bytes(b"".join(lines))

    with pytest.raises(TrustError, match="line 3: it is not a line of an audit log as"):
        audit_log.verify(path)


def with_hash(entry: dict[str, object]) -> bytes:
    """Return a forged line whose own hash is right."""
    bare = {key: value for key, value in entry.items() if key != "hash"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()
    whole = bare | {"hash": hashlib.sha256(text).hexdigest()}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_a_last_line_that_says_another_number_is_found_though_its_hash_is_right(whole):
    path, content = whole
    lines = content.splitlines(keepends=True)
    lines[-1] = with_hash(json.loads(lines[-1]) | {"n": N + 1})
    path.write_bytes(b"".join(lines))

    with pytest.raises(TrustError, match=f"line {N}: it says that it is line {N + 1}"):
        audit_log.verify(path)


@pytest.mark.parametrize("number", range(N - 1))
def test_a_changed_line_with_its_hash_made_anew_is_found_in_the_next(whole, number):
    path, content = whole
    lines = content.splitlines(keepends=True)
    lines[number] = with_hash(json.loads(lines[number]) | {"why": "other"})
    path.write_bytes(b"".join(lines))

    with pytest.raises(TrustError, match=rf"line {number + 2}: .*removed, added or re"):
        audit_log.verify(path)


@pytest.mark.parametrize("number", range(N - 1))
def test_a_removed_line_is_found_at_its_place(whole, number):
    path, content = whole
    lines = content.splitlines(keepends=True)
    del lines[number]
    path.write_bytes(b"".join(lines))

    with pytest.raises(TrustError, match=rf"line {number + 1}: .*that it is line"):
        audit_log.verify(path)


@given(st.sets(st.integers(0, N - 1), min_size=2, max_size=2))
def test_two_swapped_lines_are_found_at_the_first(whole, pair):
    path, content = whole
    first, second = sorted(pair)
    lines = content.splitlines(keepends=True)
    lines[first], lines[second] = lines[second], lines[first]
    path.write_bytes(b"".join(lines))

    with pytest.raises(TrustError, match=rf"line {first + 1}: .*reordered"):
        audit_log.verify(path)


@pytest.mark.parametrize("kept", range(N))
def test_a_log_cut_at_its_end_no_longer_contains_the_head_that_was_given_away(
    whole, kept
):
    path, content = whole
    path.write_bytes(content)
    known = Chain(path).head

    path.write_bytes(b"".join(content.splitlines(keepends=True)[:kept]))

    assert audit_log.verify(path).index == kept
    assert not Chain(path).contains(known)


@pytest.mark.parametrize("torn", [b'{"event":"ask', b"\0\0\0", b"{}"])
def test_a_torn_end_is_passed_over_by_readers_and_cut_by_the_next_writer(
    whole, torn, caplog
):
    path, content = whole
    path.write_bytes(content + torn)

    assert audit_log.verify(path).index == Chain(path).head.index == N
    assert len(audit_log.read(path)) == N
    assert Chain(path).append("asked").index == N + 1

    assert path.read_bytes().startswith(content + b'{"event":"asked",')
    assert audit_log.verify(path) == naive(path)
    assert f"cut {len(torn)} bytes of a torn last line" in caplog.text


@pytest.mark.parametrize("last", [b"\n", b"[]\n", b"{}\n", b'{"n":1}\n', b"[" * 99999])
def test_nothing_is_added_after_a_line_that_is_none_of_the_log(whole, last):
    path, content = whole
    damaged = content + last.rstrip() + b"\n"
    path.write_bytes(damaged)

    with pytest.raises(TrustError, match="the last line: it is not a line of an audit"):
        Chain(path).append("asked")

    assert path.read_bytes() == damaged


def test_a_line_that_does_not_fit_on_the_disk_is_not_there_and_can_be_added_later(log):
    before = log.append("asked")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = log.path.stat().st_size + 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(FedgexError, match=r"audit.jsonl could not be written"):
            log.append("asked")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert log.head == audit_log.verify(log.path) == before
    assert log.append("asked") == audit_log.verify(log.path)


ADDS = """
import sys
from pathlib import Path
from fedgex.common.trust.audit_log import Chain
for number in range(100):
    Chain(Path(sys.argv[1])).append("asked", who=sys.argv[2], number=number)
"""


def test_two_processes_may_append_and_each_line_is_there_once(log):
    writers = [
        subprocess.Popen([sys.executable, "-c", ADDS, str(log.path), who])
        for who in "ab"
    ]
    while any(writer.poll() is None for writer in writers):
        audit_log.verify(log.path)

    assert [writer.returncode for writer in writers] == [0, 0]
    assert audit_log.verify(log.path).index == 200
    said = audit_log.read(log.path)
    for who in "ab":
        numbers = [entry["number"] for entry in said if entry["who"] == who]
        assert numbers == list(range(100))


DIES = """
import sys
from pathlib import Path
from fedgex.common.trust.audit_log import Chain
Chain(Path(sys.argv[1])).append("asked")
"""


@pytest.mark.parametrize(("point", "lines"), [("before", 1), ("appended", 2)])
def test_killed_around_an_append_the_line_is_whole_or_not_there(
    log, tmp_path, point, lines
):
    log.append("started")
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(log.path)],
        env=os.environ | {"FEDGEX_FAILPOINT": f"audit.{point}:1:{tmp_path}"},
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    assert audit_log.verify(log.path).index == lines
    assert log.append("went on") == audit_log.verify(log.path)
