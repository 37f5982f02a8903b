"""Audit logs: lines that are only ever added, each bound to the one before by a hash.

A line is one JSON object in canonical form (keys sorted, no spaces, ASCII):

    {"event":...,fields...,"hash":...,"n":1,"previous":...,"time":...}

`n` counts from 1, `time` is UTC in ISO 8601, `previous` is the hash of the line before
(64 zeros for the first), and `hash` is the SHA-256 of the canonical form of all the
rest. With a known head, number and hash of the last line, any change, removal or
reordering of the lines up to it is detected. Without one, a log that was cut at its
end, or written anew from some line on, looks complete: so heads leave the machine,
inside signed receipts and replies.

A line counts once its newline is on the disk. What follows the last newline was torn
off by a crash; readers pass over it and the next writer cuts it away.

A file longer than `SEGMENT_BYTES` is kept under the number of its last line, such as
audit.000081234.jsonl, and a new one begins with the next line, whose `previous` is the
last hash of the one before. A log is all its segments.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

from fedgex.common.canonical import canonical_json
from fedgex.common.errors import TrustError
from fedgex.common.system import failpoints, files

SEGMENT_BYTES = 32 * 2**20
"""Size from which a file is kept as it is, and the next line begins another."""
RESERVED = frozenset({"n", "time", "event", "previous", "hash"})


@dataclass(frozen=True, slots=True)
class Head:
    """A state of an audit log: how many lines it has, and the hash of the last."""

    index: int
    hash: str


EMPTY = Head(0, "0" * 64)
"""Head of a log without lines."""


class Chain:
    """An audit log that several processes may add to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def head(self) -> Head:
        """The head as of now; that of an empty log if there is no file.

        Raises
        ------
        TrustError
            If the last line is no line of an audit log.
        """
        try:
            with files.shared_lock(self.path) as file:
                last, _ = files.last_line(file)
        except FileNotFoundError:
            return EMPTY
        return _head(last, self.path)

    def append(self, event: str, **fields: Any) -> Head:
        """Add a line and return the new head once the line is on the disk.

        Parameters
        ----------
        fields
            Values of JSON, without NaN and infinity. Never a patient's identifier or
            value: the log is shown, and its heads travel.

        Raises
        ------
        TrustError
            If the last line is no line of an audit log.
        FedgexError
            If the line cannot be written; then none of it is there.
        """
        assert not RESERVED & fields.keys(), "the log itself sets these"
        written = json.loads(
            _canonical({"event": event} | fields)
        )  # as it is read back
        new = EMPTY

        def line_after(last: bytes) -> bytes:
            nonlocal new
            head = _head(last, self.path)
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            entry = written | {"n": head.index + 1, "time": now, "previous": head.hash}
            new = Head(head.index + 1, _hash(entry))
            return _canonical(entry | {"hash": new.hash}) + b"\n"

        def kept_as(last: bytes, size: int) -> Path | None:
            number = _head(last, self.path).index
            return _segment(self.path, number) if size >= SEGMENT_BYTES else None

        failpoints.reach("audit.before")
        files.append(self.path, line_after, kept_as=kept_as)
        failpoints.reach("audit.appended")
        return new

    def contains(self, head: Head) -> bool:
        """Whether this log once had that head, and so goes on from it.

        Only one line is compared; `verify` checks the lines before it.
        """
        if head.index == 0:
            return head == EMPTY
        index = _index(self.path)
        if not 0 < head.index <= index.refreshed():
            return False
        (line,) = index.entries([head.index])
        return Head(line["n"], line["hash"]) == head


def verify(path: Path) -> Head:
    """Verify every line, and return the head for comparison with a known one.

    Raises
    ------
    TrustError
        If a line was changed, removed or moved; it names the first that is wrong.
    """
    head = EMPTY
    for number, entry in enumerate(read(path), start=1):
        if entry["n"] != number or entry["previous"] != head.hash:
            raise _broken(
                f"{path}: line {number}",
                f"it says that it is line {entry['n']} after {entry['previous'][:12]}, "
                f"expected line {number} after {head.hash[:12]}: lines were removed, "
                "added or reordered",
            )
        carried = entry.pop("hash")
        if carried != _hash(entry):
            raise _broken(
                f"{path}: line {number}",
                "its content does not have the hash that it carries: it was changed",
            )
        head = Head(number, carried)
    return head


def read(path: Path) -> list[dict[str, Any]]:
    """Return all lines as they were written, oldest first, without following the chain.

    Raises
    ------
    TrustError
        If a line is no line of an audit log.
    """
    try:
        with files.shared_lock(path):
            contents = [each.read_bytes() for each in _paths(path)]
    except FileNotFoundError:
        return []
    lines = (line for content in contents for line in _finished(content))
    return [
        _entry(line, f"{path}: line {number}")
        for number, line in enumerate(lines, start=1)
    ]


def events(path: Path, *names: str) -> list[dict[str, Any]]:
    """Return the lines of these events, oldest first, as `read` does.

    A process reads each line of the log once to know its event, and later only those
    that were added: the cost of a message does not grow with the log. Changes of older
    lines are for `verify` to find.

    Raises
    ------
    TrustError
        If a line is no line of an audit log.
    """
    index = _index(path)
    index.refreshed()
    numbers = sorted(n for name in names for n in index.of_event.get(name, ()))
    return index.entries(numbers)


class Follower:
    """A log that grows: each line is given out once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the lines added since the last call; none if there is no file.

        Raises
        ------
        TrustError
            If a line is no line of an audit log; the next call meets it again.
        """
        index = _index(self.path)
        numbers = range(self._seen + 1, index.refreshed() + 1)
        lines = index.entries(numbers)
        self._seen += len(lines)
        return lines


@dataclass
class _File:
    """A segment as far as it was read."""

    first: int
    """Number of its first line."""
    identity: tuple[int, int]
    end: int = 0
    changed: int = 0
    """When it was last changed, ns."""


@dataclass
class _Index:
    """Where each line of a log stands, and its event, as far as the log was read."""

    path: Path
    read: list[_File] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    """Of each line in its file."""
    of_event: dict[str, array[int]] = field(default_factory=dict)
    """Numbers of the lines of each event."""
    last: bytes = b""
    """The last line that was read."""
    lock: Lock = field(default_factory=Lock)

    def refreshed(self) -> int:
        """Read the lines that are new; return how many lines there are."""
        with self.lock:
            try:
                with files.shared_lock(self.path):
                    self._read(_paths(self.path))
            except FileNotFoundError:
                self._forget()
            return len(self.offsets)

    def entries(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Read lines by their numbers, in ascending order."""
        firsts = [each.first for each in self.read]
        by_file = groupby(numbers, lambda number: bisect_right(firsts, number) - 1)
        found = []
        for place, of_file in by_file:
            # Its place among the segments stays, whatever is added meanwhile.
            with files.shared_lock(self.path):
                file = _paths(self.path)[place].open("rb")
            with file:
                for number in of_file:
                    file.seek(self.offsets[number - 1])
                    where = f"{self.path}: line {number}"
                    found.append(_entry(file.readline(), where))
        return found

    def _read(self, paths: list[Path]) -> None:
        if not self._goes_on(paths):
            self._forget()
        for path in paths[max(len(self.read) - 1, 0) :]:
            stat = path.stat()
            identity = stat.st_dev, stat.st_ino
            if not self.read or self.read[-1].identity != identity:
                self.read.append(_File(len(self.offsets) + 1, identity))
            self._add(path, self.read[-1])
            self.read[-1].changed = stat.st_mtime_ns

    def _add(self, path: Path, known: _File) -> None:
        with path.open("rb") as file:
            file.seek(known.end)
            content = file.read()
        for line in _finished(content):
            number = len(self.offsets) + 1
            entry = _entry(line, f"{self.path}: line {number}")
            self.of_event.setdefault(entry["event"], array("Q")).append(number)
            self.offsets.append(known.end)
            known.end += len(line)
            self.last = line

    def _goes_on(self, paths: list[Path]) -> bool:
        """Whether what was read still stands there, as far as it can be seen."""
        if len(paths) < len(self.read):
            return False
        for path, known in zip(paths, self.read, strict=False):
            stat = path.stat()
            if (stat.st_dev, stat.st_ino) != known.identity or stat.st_size < known.end:
                return False
            edited = stat.st_mtime_ns != known.changed
            if edited and (known is not self.read[-1] or not self._grew(path, known)):
                return False
        return True

    def _grew(self, path: Path, known: _File) -> bool:
        """Whether the last line that was read is still the same, and others follow."""
        if not known.end:
            return True
        with path.open("rb") as file:
            file.seek(known.end - len(self.last))
            return file.read(len(self.last) + 1)[:-1] == self.last

    def _forget(self) -> None:
        self.read, self.offsets, self.of_event, self.last = [], array("Q"), {}, b""


@cache
def _index(path: Path) -> _Index:
    return _Index(path)


def _segment(path: Path, number: int) -> Path:
    """Return the name under which the segment is kept that ends with a line."""
    return path.with_name(f"{path.stem}.{number:09d}{path.suffix}")


def _paths(path: Path) -> list[Path]:
    """Return all segments of a log whose file is locked, oldest first."""
    kept = path.parent.glob(f"{path.stem}.{'[0-9]' * 9}{path.suffix}")
    # One that is the file itself was kept by a process that died then.
    return [*(each for each in sorted(kept) if not each.samefile(path)), path]


def _finished(content: bytes) -> Iterator[bytes]:
    """Return the finished lines, each with its newline; what follows them is torn."""
    return (line + b"\n" for line in content.split(b"\n")[:-1])


def _head(line: bytes, path: Path) -> Head:
    if not line:
        return EMPTY
    entry = _entry(line, f"{path}: the last line")
    return Head(entry["n"], entry["hash"])


def _entry(line: bytes, where: str) -> dict[str, Any]:
    """Parse a line; it must be, byte for byte, what `append` would have written."""
    try:
        entry = json.loads(line)
        exact = isinstance(entry, dict) and _canonical(entry) + b"\n" == line
    except (ValueError, RecursionError):
        exact = False
    if not exact or not _is_whole(entry):
        raise _broken(where, "it is not a line of an audit log as fedgex writes them")
    return entry  # type: ignore[no-any-return]


def _is_whole(entry: dict[str, Any]) -> bool:
    words = ("time", "event", "previous", "hash")
    return type(entry.get("n")) is int and all(
        isinstance(entry.get(word), str) for word in words
    )


def _broken(where: str, why: str) -> TrustError:
    return TrustError(
        f"{where}: {why}. The log cannot be trusted from there on: keep the file as it "
        "is, and find out with the consortium's administrators who changed it."
    )


def _canonical(content: Any) -> bytes:
    return canonical_json(content, allow_nan=False).encode()


def _hash(entry: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()
