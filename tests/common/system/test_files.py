"""Files are replaced whole or not at all, grow by whole lines, and say what failed."""

import errno
import fcntl
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgex.common.errors import CheckpointError, FedgexError
from fedgex.common.system import files


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(nth: int, code: int) -> Callable[..., None]:
    visits = itertools.count(1)

    def fail(*_: object) -> None:
        if next(visits) == nth:
            raise OSError(code, os.strerror(code))

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_content_is_there_and_nothing_else(tmp_path):
    files.write_atomic(tmp_path / "a", b"first, and longer")
    files.write_atomic(tmp_path / "a", b"second")

    assert (tmp_path / "a").read_bytes() == b"second"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_the_one_asked_for_even_if_the_partial_file_was_left(
    tmp_path, mode
):
    (tmp_path / ".a.partial").write_bytes(b"left by a crash, and longer")
    (tmp_path / ".a.partial").chmod(0o666)

    files.write_atomic(tmp_path / "a", b"new", mode=mode)

    assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    assert (tmp_path / "a").read_bytes() == b"new"


def test_content_then_name_are_synchronised_in_this_order(tmp_path, monkeypatch):
    seen = []

    def fsync(handle: int) -> None:
        seen.append((os.fstat(handle).st_ino, names(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomic(tmp_path / "a", b"x")

    file, folder = (tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino
    assert seen == [(file, [".a.partial"]), (folder, ["a"])]


DIES = """
import sys
from pathlib import Path
from fedgex.common.system import files
files.write_atomic(Path(sys.argv[1]), b"new" * 100_000, point="reply")
"""


@pytest.mark.parametrize(
    ("point", "content"), [("written", b"old"), ("renamed", b"new" * 100_000)]
)
def test_killed_on_the_way_the_old_content_stands_or_the_new(tmp_path, point, content):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    (tmp_path / "counts").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(path)],
        env=os.environ | {"FEDGEX_FAILPOINT": f"reply.{point}:1:{tmp_path / 'counts'}"},
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == content
    files.write_atomic(path, b"again")
    assert names(tmp_path) == ["a", "counts"]


def test_a_file_that_does_not_fit_leaves_the_old_one_and_says_what_to_do(tmp_path):
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    with at_most(1000), pytest.raises(FedgexError) as refusal:
        files.write_atomic(path, b"x" * 1001)

    assert str(refusal.value) == (
        f"{path} could not be written: File too large. Raise the limit on the size of "
        "files (ulimit -f), then do the same again; nothing half-written counts."
    )
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "No space left on device. Free space on that disk"),
        (errno.EROFS, "Read-only file system. The disk is mounted read-only"),
        (errno.EACCES, "Permission denied. Permit the user with number"),
        (errno.EIO, "Input/output error. Check that disk"),
    ],
)
def test_whatever_fails_nothing_is_left_and_it_can_be_tried_again(
    tmp_path, monkeypatch, call, code, advice
):
    path = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(1, code))
        with pytest.raises(FedgexError, match=f"{path} could not be written: {advice}"):
            files.write_atomic(path, b"new")
    assert names(tmp_path) == []

    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_an_absent_folder_is_not_made_anew_in_silence(tmp_path):
    path = tmp_path / "not-mounted" / "a"

    for write in (
        lambda: files.write_atomic(path, b"x"),
        lambda: files.append(path, lambda _: b"x\n"),
    ):
        with pytest.raises(FedgexError, match="Make the folder, or mount the disk"):
            write()

    assert names(tmp_path) == []


def test_a_disk_without_room_is_told_from_other_failures_through_every_cause(tmp_path):
    def told(number):
        with files.explained(tmp_path / "a"):
            raise OSError(number, os.strerror(number))

    for number, expected in ((errno.ENOSPC, True), (errno.EIO, False)):
        with pytest.raises(FedgexError) as caught:
            told(number)
        assert files.disk_full(caught.value) is expected
    assert not files.disk_full(RuntimeError("No space left on device"))


def test_a_lock_names_the_process_that_holds_it(tmp_path):
    path = tmp_path / "lock"
    path.write_text("123456789")  # a dead process left it

    assert files.lock_holder(path) is None
    with files.exclusive_lock(path, "another one serves."):
        assert path.read_text() == str(os.getpid())
        assert files.lock_holder(path) == os.getpid()
    assert files.lock_holder(path) is None
    assert files.lock_holder(tmp_path / "absent") is None


def test_a_lock_that_is_held_is_refused_with_its_holder_and_what_to_do(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.01)
    path = tmp_path / "lock"

    with (
        files.exclusive_lock(path, "another one serves; stop it."),
        pytest.raises(
            CheckpointError,
            match=rf"lock is locked by process {os.getpid()}: another one .*; stop it",
        ),
        files.exclusive_lock(path, "another one serves; stop it.", CheckpointError),
    ):
        pass


def test_a_lock_of_which_a_look_was_taken_is_waited_for(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    with path.open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        release = threading.Timer(0.2, fcntl.flock, (look, fcntl.LOCK_UN))
        release.start()
        with files.exclusive_lock(path, "another one serves."):
            assert path.read_text() == str(os.getpid())
        release.join()


def test_a_lock_without_words_is_waited_for_and_holds_no_number(tmp_path):
    path, order = tmp_path / "lock", []

    def other():
        with files.exclusive_lock(path):
            order.append("other")

    with files.exclusive_lock(path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()

    assert order == ["first", "other"]
    assert path.read_text() == ""


def test_a_lock_that_cannot_be_written_says_why(tmp_path):
    with (
        pytest.raises(FedgexError, match="Make the folder"),
        files.exclusive_lock(tmp_path / "absent" / "lock"),
    ):
        pass
    with (
        pytest.raises(FedgexError, match="full could not be written"),
        files.exclusive_lock(Path("/dev/full"), "another one serves."),
    ):
        pass


def test_no_other_module_locks_by_hand():
    root = Path(__file__).parents[3]
    sources = [
        path
        for package in ("client", "common", "server", "simulations")
        for path in (root / package).rglob("*.py")
    ]

    by_hand = {path.name for path in sources if "flock(" in path.read_text("utf-8")}

    assert by_hand == {"files.py", "failpoints.py"}  # files stands on fail-points


def test_the_error_is_of_the_class_asked_for_and_others_pass_unchanged(tmp_path):
    with (
        pytest.raises(CheckpointError, match="a could not be written"),
        files.explained(tmp_path / "a", CheckpointError),
    ):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(KeyError), files.explained(tmp_path / "a"):
        raise KeyError("other")


REPLACES = """
import sys
from pathlib import Path
from fedgex.common.system import files
for _ in range(50):
    files.write_atomic(Path(sys.argv[1]), sys.argv[2].encode() * 10_000)
"""


def test_processes_that_replace_the_same_file_never_mix(tmp_path):
    path = tmp_path / "a"
    files.write_atomic(path, b"a" * 10_000)
    writers = [
        subprocess.Popen([sys.executable, "-c", REPLACES, str(path), letter])
        for letter in "bc"
    ]

    while any(writer.poll() is None for writer in writers):
        content = path.read_bytes()
        assert content in (b"a" * 10_000, b"b" * 10_000, b"c" * 10_000)

    assert [writer.returncode for writer in writers] == [0, 0]
    assert names(tmp_path) == ["a"]


def test_each_line_is_given_the_one_before(tmp_path):
    given_lines = []

    def line_after(last: bytes) -> bytes:
        given_lines.append(last)
        return b"%d\n" % len(given_lines)

    for _ in range(3):
        files.append(tmp_path / "log", line_after)

    assert given_lines == [b"", b"1\n", b"2\n"]
    assert (tmp_path / "log").read_bytes() == b"1\n2\n3\n"


def test_a_torn_end_is_cut_with_a_warning(tmp_path, caplog):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")

    with caplog.at_level(logging.WARNING):
        files.append(path, lambda last: b"after " + last)

    assert path.read_bytes() == b"one\nafter one\n"
    assert "cut 2 bytes of a torn last line" in caplog.text


@given(st.binary().map(lambda b: b.replace(b"1", b"\n")), st.integers(1, 8))
def test_the_last_line_is_that_of_splitlines_for_any_content_and_block(
    tmp_path_factory, content, block
):
    path = tmp_path_factory.mktemp("x") / "log"
    path.write_bytes(content)
    finished = content[: content.rfind(b"\n") + 1]
    expected = (finished.split(b"\n")[-2] + b"\n") if finished else b""

    with pytest.MonkeyPatch.context() as patch, path.open("rb", buffering=0) as file:
        patch.setattr(files, "BLOCK", block)
        assert files.last_line(file) == (expected, len(finished))


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_line_that_does_not_fit_is_taken_back_and_can_be_added_later(tmp_path, room):
    path = tmp_path / "log"
    files.append(path, lambda _: b"one\n")

    with at_most(4 + room), pytest.raises(FedgexError, match="log could not be wri"):
        files.append(path, lambda _: b"second\n")

    assert path.read_bytes() == b"one\n"
    files.append(path, lambda _: b"second\n")
    assert path.read_bytes() == b"one\nsecond\n"


def test_a_line_that_was_not_synchronised_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log"
    files.append(path, lambda _: b"one\n")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(1, errno.EIO))
        with pytest.raises(FedgexError, match="Check that disk"):
            files.append(path, lambda _: b"two\n")

    assert path.read_bytes() == b"one\n"
