"""Show a running federation in the terminal, from its journal alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedgex.server import journal

POLL_S = 0.25
TREND_ROUNDS = 24
"""Rounds that the trend of the hold-out error looks back on."""
MISSING_SHOWN = 8
"""Hospitals named on the display; the lines for a file name them all."""


def watch(journal_path: Path, finished: Callable[[], bool], console: Console) -> None:
    """Follow the run until its journal ends or `finished()` is true.

    A terminal gets a display that is redrawn in place; anything else (a file, a pipe)
    gets one line of text a round. `console` should write to stderr: stdout is for data.

    Raises
    ------
    FedgexError
        If the journal holds a line that is not an event.
    """
    if console.is_terminal:
        _watch_live(journal_path, finished, console)
    else:
        _watch_plain(journal_path, finished, console)


@dataclass
class RunState:
    """What the journal has told so far."""

    study: str = ""
    plan: dict[str, int] = field(default_factory=dict)
    """Rounds of each phase, in order; empty until the run has started."""
    started: datetime | None = None
    phase: str = ""
    last_round: dict[str, Any] | None = None
    """The latest `round` event."""
    seconds: list[float | None] = field(default_factory=list)
    """Duration of each finished round; None if the server died before it noted it."""
    holdout: list[float] = field(default_factory=list)
    """Hold-out restoration MSE of each round that was judged."""
    ending: dict[str, Any] | None = None
    """The `run-finished` or `run-failed` event."""

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the journal."""
        match event["event"]:
            case "run-started":
                self.study = event["study"]
                self.plan = {p["phase"]: p["rounds"] for p in event["plan"]}
                self.started = datetime.fromisoformat(event["time"])
            case "phase-started":
                self.phase = event["phase"]
            case "round":
                self.phase = event["phase"]
                self.last_round = dict(event)
                self.seconds.append(event["seconds"])
                if (error := holdout_mse(event)) is not None:
                    self.holdout.append(error)
            case "run-finished" | "run-failed":
                self.ending = dict(event)

    @property
    def rounds_planned(self) -> int:
        """Rounds of all phases together."""
        return sum(self.plan.values())

    def elapsed_s(self, now: datetime) -> float:
        """Seconds since the run started; 0 before that."""
        return (now - self.started).total_seconds() if self.started else 0.0

    def left_s(self) -> float | None:
        """Seconds to the end if rounds stay as long as they were; None before any."""
        known = [seconds for seconds in self.seconds if seconds is not None]
        if not known:
            return None
        left = max(self.rounds_planned - len(self.seconds), 0)
        return left * sum(known) / len(known)


def holdout_mse(event: Mapping[str, Any]) -> float | None:
    """Return the restoration MSE at rate 0.5 (completely at random), if judged."""
    rates = (event["holdout"] or {}).get("mcar", {})
    error: float | None = rates.get("0.5", {}).get("mse")
    return error


def round_line(state: RunState) -> str:
    """Return the latest round as one line; what was not measured is left out."""
    event = state.last_round
    assert event is not None, "there is a line only after a round"
    sites = event["sites"]
    values = {
        "round": f"{event['round']}/{event['rounds']}",
        "phase": event["phase"],
        "sites": f"{len(sites) - len(_missing(sites))}/{len(sites)}",
        "train_loss": _number(event["train_loss"]),
        "holdout_mse": _number(holdout_mse(event)),
        "elapsed": _clock(state.elapsed_s(datetime.fromisoformat(event["time"]))),
        "left": _clock(state.left_s()),
        "missing": f'"{"; ".join(missing)}"' if (missing := _missing(sites)) else None,
    }
    return " ".join(f"{key}={value}" for key, value in values.items() if value)


def display(
    state: RunState, now: datetime, *, ascii_only: bool = False
) -> RenderableType:
    """Return the whole display as it stands at `now`."""
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(ratio=1)
    rows.add_row("overall", _bar(len(state.seconds), state.rounds_planned))
    event = state.last_round
    current = event if event and event["phase"] == state.phase else None
    if state.phase:
        done = current["round"] if current else 0
        total = current["rounds"] if current else state.plan.get(state.phase, 0)
        rows.add_row(Text(_one_line(state.phase)), _bar(done, total))
    if event:
        rows.add_row("hospitals", _hospitals(event["sites"]))
        rows.add_row("training loss", Text(_number(event["train_loss"]) or "none"))
    if state.holdout:
        trend = "" if ascii_only else "  " + _trend(state.holdout[-TREND_ROUNDS:])
        rows.add_row(
            "hold-out MSE", Text(f"{_number(state.holdout[-1])}{trend}  half missing")
        )
    parts: list[RenderableType] = [rows]
    if state.ending:
        parts.append(_ending(state.ending))
    return Panel(
        Group(*parts),
        title=Text(_one_line(state.study) or "waiting for the run to start"),
        title_align="left",
        subtitle=Text(
            f"elapsed {_clock(state.elapsed_s(now))}"
            + ("" if state.ending else f", left {_clock(state.left_s()) or 'unknown'}")
        ),
        subtitle_align="right",
        border_style="dim",
        padding=(1, 2),
    )


def _watch_live(path: Path, finished: Callable[[], bool], console: Console) -> None:
    state, offset = RunState(), 0
    ascii_only = console.options.ascii_only
    with Live(console=console, auto_refresh=False) as live:
        while True:
            last_look = finished()  # asked before reading, so that nothing is missed
            events, offset = journal.tail(path, offset)
            for event in events:
                state.apply(event)
            now = (
                datetime.fromisoformat(state.ending["time"])
                if state.ending
                else datetime.now(UTC)
            )
            live.update(display(state, now, ascii_only=ascii_only), refresh=True)
            if last_look or state.ending:
                return
            time.sleep(POLL_S)


def _watch_plain(path: Path, finished: Callable[[], bool], console: Console) -> None:
    state, offset = RunState(), 0
    while True:
        last_look = finished()  # asked before reading, so that nothing is missed
        events, offset = journal.tail(path, offset)
        for event in events:
            state.apply(event)
            if event["event"] == "round":
                _say(console, round_line(state))
        if state.ending:
            _say(console, _ending(state.ending).plain)
        if last_look or state.ending:
            return
        time.sleep(POLL_S)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _missing(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return who did not contribute, and why, each as one phrase."""
    return [
        f"{_one_line(name)} {site['state']}"
        + (f" ({_one_line(site['reason'])})" if site.get("reason") else "")
        for name, site in sorted(sites.items())
        if site["state"] != "contributed"
    ]


def _hospitals(sites: Mapping[str, Mapping[str, Any]]) -> Text:
    missing = _missing(sites)
    text = Text(f"{len(sites) - len(missing)} of {len(sites)} contributed")
    for phrase in missing[:MISSING_SHOWN]:
        text.append(f"\n{phrase}", style="yellow")
    if len(missing) > MISSING_SHOWN:
        text.append(f"\nand {len(missing) - MISSING_SHOWN} more", style="yellow")
    return text


def _ending(event: Mapping[str, Any]) -> Text:
    if event["event"] == "run-finished":
        return Text(
            f"finished; checkpoint {_one_line(str(event['checkpoint']))}",
            style="green",
        )
    return Text(f"failed: {_one_line(event['reason'])}", style="bold red")


def _bar(done: int, total: int) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(
        ProgressBar(total=max(total, 1), completed=done),
        Text(f"round {done} of {total}"),
    )
    return row


def _trend(values: list[float]) -> str:
    """Draw the values as a row of bars from the lowest to the highest."""
    low, high = min(values), max(values)
    if high == low:
        return "▄" * len(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low))] for v in values)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _clock(seconds: float | None) -> str | None:
    """Return 83 seconds as 1:23, and 3 683 as 1:01:23."""
    if seconds is None:
        return None
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _one_line(text: str) -> str:
    """Keep a hospital's text from breaking the line or steering the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
