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
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedgex.common.canonical import canonical_json
from fedgex.common.errors import TrustError
from fedgex.common.system import failpoints, files

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

        failpoints.reach("audit.before")
        files.append(self.path, line_after)
        failpoints.reach("audit.appended")
        return new

    def contains(self, head: Head) -> bool:
        """Whether this log once had that head, and so goes on from it.

        Only one line is compared; `verify` checks the lines before it.
        """
        if head.index == 0:
            return head == EMPTY
        lines = _lines(self.path)
        if not 0 < head.index <= len(lines):
            return False
        return _head(lines[head.index - 1], self.path) == head


def verify(path: Path) -> Head:
    """Verify every line, and return the head for comparison with a known one.

    Raises
    ------
    TrustError
        If a line was changed, removed or moved; it names the first that is wrong.
    """
    head = EMPTY
    for number, line in enumerate(_lines(path), start=1):
        entry = _entry(line, f"{path}: line {number}")
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
    return [
        _entry(line, f"{path}: line {number}")
        for number, line in enumerate(_lines(path), start=1)
    ]


def _lines(path: Path) -> list[bytes]:
    """Return the finished lines, each with its newline; none if there is no file."""
    try:
        with files.shared_lock(path) as file:
            content = file.readall()
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")[:-1]  # what follows the last newline is torn
    return [line + b"\n" for line in lines]


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
