"""Append-only journal of a run, one JSON event per line.

The server writes these events, each with `time` (UTC, ISO 8601) and `event`:

- `run-started`: study, study_hash, sites, plan (phase and rounds of each),
  resumed_from, epsilon (as in `round`), unknown_genes (of which no site has a value),
  genes_of_one_site (that one measures, and no other)
- `not-answered`: site, state, reason (before the first round)
- `asked-again`: site, group, state, reason (why, each time that it changes)
- `duplicate`: site, group (a second answer, dropped)
- `exchange-repeated`: group, attempt, without (secure aggregation repeats a round's
  exchange without these sites, because the sum would reveal rare genes)
- `phase-started`: phase, rounds
- `round`: phase, round, rounds, seconds, train_loss, judged_loss, sites (name → state,
  reason, num_examples, num_loss_terms, train_loss, judged_loss, seconds; null for what
  the site withholds), holdout (empty without a hold-out;
  holdout_reason says why a judgement could not be made),
  bytes_up, bytes_down, seconds_sites, epsilon (spent so far: "patient", as planned for
  a site that missed no round, and "site"; null without differential privacy)
- `phase-finished`: phase
- `run-finished`: checkpoint, peak_rss_mb, holdout_reason (as in `round`)
- `run-failed`: reason

A line without a newline was cut off by a crash: readers drop it, and the next writer
removes it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedgex.common import parsing
from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.system import failpoints, files

logger = logging.getLogger(__name__)

ENDINGS = ("run-finished", "run-failed")
"""Events that end a run."""


class Journal:
    """Writer of a journal; one at a time."""

    def __init__(self, path: Path) -> None:
        """Continue the journal at `path`, or begin it with the first event."""
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        """Add one event and return once it is on the disk.

        NaN and infinity become null.

        Raises
        ------
        FedgexError
            If the event cannot be written; the journal is then unchanged.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps(
            _without_nan({"time": now, "event": event} | fields), allow_nan=False
        )
        failpoints.reach("journal.before")
        files.append(self.path, lambda _: line.encode() + b"\n", mode=0o644)
        failpoints.reach("journal.written")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Log the failure of a run with its reason, and re-raise it."""
        try:
            yield
        except Exception as error:
            self.write("run-failed", reason=str(error))
            raise


def read(path: Path) -> list[dict[str, Any]]:
    """Return all events, oldest first; a torn last line is dropped with a warning.

    Raises
    ------
    FileNotFoundError
        If there is no journal at `path`.
    FedgexError
        If a line before the end is not an event.
    """
    content = path.read_bytes()
    events, offset = _events(content, path, start=0)
    if offset < len(content):
        logger.warning(
            "%s: dropped %d bytes of a torn last line", path, len(content) - offset
        )
    return events


def tail(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the events after byte `offset`, and the next offset.

    Begin with offset 0. A journal that does not exist yet has no events; a line that is
    still being written waits for the next call.

    Raises
    ------
    FedgexError
        If a finished line is not an event.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    events, length = _events(content, path, start=offset)
    return events, offset + length


def _events(content: bytes, path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Parse the finished lines; return them and the number of bytes they take."""
    length = content.rfind(b"\n") + 1
    events = []
    position = start
    for line in content[:length].splitlines(keepends=True):
        try:
            event = parsing.json_value(line, "the line", most=parsing.LONG_BYTES)
        except ConfigError as error:
            raise _not_an_event(path, position) from error
        if not isinstance(event, dict) or "event" not in event:
            raise _not_an_event(path, position)
        events.append(event)
        position += len(line)
    return events, length


def _not_an_event(path: Path, position: int) -> FedgexError:
    return FedgexError(
        f"{path}: the line at byte {position} is not a journal event; expected one "
        'JSON object with the key "event". The file was changed or damaged after it '
        "was written: restore it from a copy, or move it away to begin a new journal."
    )


def _without_nan(value: Any) -> Any:
    """Return `value` with plain containers, and None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
