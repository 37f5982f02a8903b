"""Durable files, written atomically or line by line, and locks between processes.

What these functions wrote is on the disk when they return. If a write fails, by a full
or read-only disk for instance, nothing half-written stands under the final name, the
error says what to do, and the same call may be made again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from fedgex.common import parsing
from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.system import failpoints

logger = logging.getLogger(__name__)

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors of a disk that a person can mend while everything goes on."""
BLOCK = 4096
"""Bytes that are read at a time when the last line of a file is looked for."""
LOCK_WAIT_S = 1.0
"""Longest wait for a lock that `lock_holder` may hold for a moment, seconds."""


def write_atomic(
    path: Path, content: bytes, *, point: str | None = None, mode: int = 0o600
) -> None:
    """Write a file so that `path` holds the old content or the new, never less.

    Several processes may write the same path; the last one stands. The folder must
    exist: a state folder that is suddenly absent is not made anew in silence.

    Parameters
    ----------
    point
        Fail-points `{point}.written` and `{point}.renamed` are reached on the way.
    mode
        Permissions of the file.

    Raises
    ------
    FedgexError
        If it cannot be written.
    """
    with explained(path):
        partial = path.with_name(f".{path.name}.partial")
        with _locked(partial, mode, os.O_NOFOLLOW) as file:
            try:
                os.fchmod(file.fileno(), mode)
                file.truncate(0)
                _write(file, content)
                os.fsync(file.fileno())
                if point:
                    failpoints.reach(f"{point}.written")
                os.replace(partial, path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            if point:
                failpoints.reach(f"{point}.renamed")
            sync(path.parent)


@contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` once all of it is written.

    It is for a folder that other accounts may write: the file's name until then is
    random and new, so that no link that one of them planted is followed.

    Raises
    ------
    OSError
        If it cannot be written; `path` is then as before.
    """
    with NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    sync(path.parent)


def append(
    path: Path,
    line_after: Callable[[bytes], bytes],
    mode: int = 0o600,
    *,
    kept_as: Callable[[bytes, int], Path | None] = lambda last, size: None,
) -> None:
    """Add one line to a file of lines, under a lock against other processes.

    A torn last line is cut off first, with a warning.

    Parameters
    ----------
    line_after
        Given the last line, or b"" if there is none, returns the one to add. Both end
        in a newline.
    mode
        Permissions of the file if it is new, less those that the umask forbids.
    kept_as
        Given the last line and the file's size, returns another name for the file if a
        new one should begin with the line; `path` is never absent meanwhile.

    Raises
    ------
    FedgexError
        If it cannot be written.
    """
    with explained(path), _locked(path, mode) as file:
        last, end = last_line(file)
        torn = os.fstat(file.fileno()).st_size - end
        if torn:
            logger.warning("%s: cut %d bytes of a torn last line", path, torn)
            file.truncate(end)
        line = line_after(last)
        kept = kept_as(last, end)
        if kept is not None:
            _begin_anew(path, kept, line, mode)
            return
        try:
            file.seek(end)
            _write(file, line)
            os.fsync(file.fileno())
            if end == 0:  # the file may be new
                sync(path.parent)
        except OSError:
            with suppress(OSError):  # then the next call cuts the line
                file.truncate(end)
            raise


def last_line(file: FileIO) -> tuple[bytes, int]:
    """Return the last finished line, and the offset at which it ends.

    It reads only as much of the end of the file as it needs. Where no line is finished
    they are b"" and 0.
    """
    start = file.seek(0, os.SEEK_END)
    tail = b""
    while start > 0:
        step = min(BLOCK, start)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
        end = tail.rfind(b"\n") + 1
        if not end:
            continue
        begin = tail.rfind(b"\n", 0, end - 1) + 1
        if begin or start == 0:
            return tail[begin:end], start + end
    return b"", 0


@contextmanager
def explained(path: Path, error: type[FedgexError] = FedgexError) -> Iterator[None]:
    """Turn an OSError while `path` is written into an `error` that says what to do."""
    try:
        yield
    except OSError as cause:
        raise error(
            f"{path} could not be written: {cause.strerror or cause}. "
            f"{_advice(cause.errno)}, then do the same again; nothing half-written "
            "counts."
        ) from cause


@contextmanager
def exclusive_lock(
    path: Path, busy: str | None = None, error: type[FedgexError] = FedgexError
) -> Iterator[None]:
    """Hold a lock file, made if need be and never removed, against other processes.

    Parameters
    ----------
    busy
        What it means that another process holds the lock, and what to do about it; the
        file then holds the number of the process. None: wait until the lock is free.

    Raises
    ------
    FedgexError
        An `error` if another process holds the lock and `busy` is given; if the file
        cannot be written.
    """
    with explained(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with FileIO(handle, "r+") as file:
        if busy is None:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif not _locked_soon(file):
            number = file.read().decode() or "unknown"
            raise error(f"{path} is locked by process {number}: {busy}")
        else:
            with explained(path):
                file.truncate(0)
                _write(file, str(os.getpid()).encode())
        yield


def lock_holder(path: Path) -> int | None:
    """Return the number of the process that holds a lock file; None if none does.

    It is 0 as long as the process has not written it. A file that a dead process left
    is not locked.
    """
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except FileNotFoundError:
        pass
    return None


@contextmanager
def shared_lock(path: Path) -> Iterator[FileIO]:
    """Open a file for reading, and keep others from appending to it meanwhile.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    """
    while True:
        with FileIO(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_at(file, path):  # else a new file began as we waited
                yield file
                return


def warn_of_others(folder: Path) -> None:
    """Log that other accounts may enter a folder that is for its owner only."""
    mode = folder.stat().st_mode & 0o777
    if mode & 0o077:
        logger.warning(
            "%s has mode %o, so that other accounts may enter it; expected 700. "
            "Set it: chmod 700 %s",
            folder, mode, folder,
        )  # fmt: skip


def disk_full(error: BaseException) -> bool:
    """Whether an error came of a disk that takes nothing now, and may do so later."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return True
        cause = cause.__cause__
    return False


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _advice(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "Free space on that disk, or raise the quota"
    if code == errno.EROFS:
        return "The disk is mounted read-only: see why, and mount it for writing"
    if code in (errno.EACCES, errno.EPERM):
        return f"Permit the user with number {os.geteuid()} to write there"
    if code in (errno.ENOENT, errno.ENOTDIR):
        return "Make the folder, or mount the disk that holds it"
    if code == errno.EFBIG:
        return "Raise the limit on the size of files (ulimit -f)"
    return "Check that disk"


@contextmanager
def _locked(path: Path, mode: int, flags: int = 0) -> Iterator[FileIO]:
    """Open `path` for reading and writing, making it if need be, and lock it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | flags, mode)
        with FileIO(handle, "r+") as file:  # unbuffered: what failed is not tried again
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # else another process renamed it as we waited
                yield file
                return


def _begin_anew(path: Path, kept: Path, line: bytes, mode: int) -> None:
    """Keep a locked file under another name, and begin a new one with a line."""
    try:
        os.link(path, kept)
    except FileExistsError:  # of a process that died here
        if not path.samefile(kept):
            raise
    partial = path.with_name(f".{path.name}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with FileIO(handle, "w") as file:
        _write(file, line)
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def _locked_soon(file: FileIO) -> bool:
    """Lock a file exclusively if it becomes free within LOCK_WAIT_S."""
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(LOCK_WAIT_S / 10)
        else:
            return True


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _write(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def read_json(
    path: Path,
    expected: str,
    *,
    missing: type[ConfigError] = ConfigError,
    most: int = parsing.MAX_BYTES,
) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    expected
        What the file should be, for the message.
    missing
        Error to raise if the file cannot be read.
    most
        Most bytes that it may have.

    Raises
    ------
    ConfigError
        If the file cannot be read, is longer, or holds something else.
    """
    content = parsing.read_bytes(path, expected, error=missing, most=most)
    return parsing.json_object(content, f"{path}:", expected, most=most)
