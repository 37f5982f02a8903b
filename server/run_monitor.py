"""Monitor of a run, from its journal: a line a round, or a display in the terminal.

Used by `fedgex-admin run watch` and by the simulator.
"""

from __future__ import annotations

import contextlib
import json
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

POLL_S = 0.5
TREND_ROUNDS = 24
"""Rounds in the trend of the hold-out error."""
GENES_SHOWN, SITES_SHOWN = 5, 12
"""Most hospitals on the display; those absent from the last round come first."""
NO_PRIVACY = "none"
"""Epsilon of a run without differential privacy."""


@dataclass
class RunState:
    """State of a run, over all its starts."""

    study: str = ""
    plan: dict[str, int] = field(default_factory=dict)
    """Rounds of each phase, in order; empty until the run has started."""
    started: datetime | None = None
    """Time of the last start."""
    phase: str = ""
    rounds: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """Event of each finished round, by phase and number."""
    sites: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Latest state and reason of each hospital."""
    unknown_genes: tuple[str, ...] = ()
    """Genes of which no hospital has a value; the model restores none of them."""
    epsilon: dict[str, float] | None = None
    """Epsilon spent so far, by guarantee; None without any."""
    ending: dict[str, Any] | None = None
    """Event that ended the run; None while it runs."""

    def apply(self, event: Mapping[str, Any]) -> None:
        """Update the state by one event; unknown events change nothing."""
        match event["event"]:
            case "run-started":
                self.ending = None
                self.study, self.epsilon = event["study"], event.get("epsilon")
                self.plan = {p["phase"]: p["rounds"] for p in event["plan"]}
                self.started = _time(event)
                self.unknown_genes = tuple(event.get("unknown_genes", ()))
                for name in event["sites"]:
                    self.sites.setdefault(name, ("ready", ""))
            case "phase-started":
                self.phase = event["phase"]
            case "not-answered":
                self.sites[event["site"]] = (event["state"], event["reason"] or "")
            case "round":
                self.phase = event["phase"]
                self.rounds[event["phase"], event["round"]] = dict(event)
                self.epsilon = event.get("epsilon")
                for name, site in event["sites"].items():
                    self.sites[name] = (site["state"], site["reason"] or "")
            case kind if kind in journal.ENDINGS:
                self.ending = dict(event)

    @property
    def last(self) -> dict[str, Any] | None:
        """Event of the latest finished round."""
        return next(reversed(self.rounds.values()), None)

    @property
    def planned(self) -> int:
        """Number of rounds over all phases."""
        return sum(self.plan.values())

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at the mean length of a round; None before any."""
        known = [e["seconds"] for e in self.rounds.values() if e["seconds"] is not None]
        if not known:
            return None
        return max(self.planned - len(self.rounds), 0) * float(sum(known)) / len(known)

    @property
    def holdout(self) -> list[float]:
        """MSE on the hold-out with half of the genes missing, by evaluated round."""
        return [
            float(error)
            for event in self.rounds.values()
            if (
                error := (event["holdout"] or {})
                .get("mcar", {})
                .get("0.5", {})
                .get("mse")
            )
            is not None
        ]

    def contributions(self, site: str) -> int:
        """Return the number of rounds to which a hospital contributed."""
        return sum(
            event["sites"].get(site, {}).get("state") == "contributed"
            for event in self.rounds.values()
        )


def follow(
    path: Path,
    over: Callable[[RunState], bool],
    console: Console,
    *,
    title: str = "",
    as_json: bool = False,
) -> RunState:
    """Show a run until it is over; return its last state.

    A terminal gets a display that is redrawn in place; anything else (a file, a pipe)
    gets a line of text a round.

    Parameters
    ----------
    path
        The journal.
    over
        Asked before each reading, so that no event is missed.
    as_json
        One line of JSON an event instead.

    Raises
    ------
    FedgexError
        If the journal holds a line that is not an event.
    """
    state, offset = RunState(), 0
    drawn = console.is_terminal and not as_json
    with contextlib.ExitStack() as stack:
        live = Live(console=console, auto_refresh=False)
        if drawn:
            stack.enter_context(live)
        while True:
            last_look = over(state)
            events, offset = journal.tail(path, offset)
            for event in events:
                state.apply(event)
                if as_json:
                    _print(console, json.dumps(event))
                elif not drawn and event["event"] == "round":
                    _print(console, line(state))
            if drawn:
                ascii_only = console.options.ascii_only
                view = display(state, datetime.now(UTC), title, ascii_only=ascii_only)
                live.update(view, refresh=True)
            if last_look:
                return state
            time.sleep(POLL_S)


def line(state: RunState) -> str:
    """Return the latest round as one line, for a file or a pipe."""
    event = state.last
    assert event is not None, "there is a line only after a round"
    absent = [
        f"{name} {condition}" + (f" ({one_line(reason)})" if reason else "")
        for name, (condition, reason) in sorted(state.sites.items())
        if condition != "contributed"
    ]
    values = {
        "phase": event["phase"],
        "round": f"{event['round']}/{event['rounds']}",
        "train_loss": _number(event.get("train_loss")),
        "restoration_mse": _number(state.holdout[-1] if state.holdout else None),
        "epsilon": epsilon(state.epsilon),
        "left": _clock(state.left_s),
        "absent": "; ".join(absent) or "nobody",
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def epsilon(spent: Mapping[str, float] | None) -> str:
    """Format epsilon so far, such as `patient:3.21,site:1.50`."""
    if not spent:
        return NO_PRIVACY
    return ",".join(f"{unit}:{value:.2f}" for unit, value in spent.items())


def display(
    state: RunState, now: datetime, title: str = "", *, ascii_only: bool = False
) -> RenderableType:
    """Render the display at time `now`.

    Parameters
    ----------
    title
        Name of the run; without it, that of the study.
    """
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(ratio=1)
    rows.add_row("study", Text(one_line(state.study) or "not started"))
    rows.add_row("overall", _bar(len(state.rounds), state.planned))
    event = state.last
    if state.phase:
        current = event if event and event["phase"] == state.phase else None
        done = current["round"] if current else 0
        total = current["rounds"] if current else state.plan.get(state.phase, 0)
        rows.add_row(Text(one_line(state.phase)), _bar(done, total))
    if event:
        rows.add_row("training loss", _number(event.get("train_loss")))
    trend = state.holdout[-TREND_ROUNDS:]
    restoration = _number(trend[-1] if trend else None)
    bars = "" if ascii_only else f"  {_bars(trend)}"
    rows.add_row("hold-out MSE", f"{restoration}{bars}  half missing")
    rows.add_row("epsilon", epsilon(state.epsilon))
    if unknown := state.unknown_genes:
        some = ", ".join(unknown[:GENES_SHOWN]) + ", ..." * (len(unknown) > GENES_SHOWN)
        rows.add_row("unknown genes", Text(f"{len(unknown)}, not restored: {some}"))
    parts: list[RenderableType] = [rows, Text(""), *_hospitals(state)]
    if state.ending:
        parts.append(_ending(state.ending))
    until = (_time(state.ending) if state.ending else None) or now
    elapsed = (until - state.started).total_seconds() if state.started else 0.0
    left = "" if state.ending else f", left {_clock(state.left_s)}"
    return Panel(
        Group(*parts),
        title=Text(title or one_line(state.study) or "waiting for the run to start"),
        title_align="left",
        subtitle=Text(f"elapsed {_clock(elapsed)}{left}"),
        subtitle_align="right",
        border_style="dim",
    )


def one_line(text: str) -> str:
    """Keep a hospital's text from breaking the line or steering the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _hospitals(state: RunState) -> list[RenderableType]:
    """Return hospitals with state, contributions and reason, those absent first."""
    names = sorted(state.sites, key=lambda n: (state.sites[n][0] == "contributed", n))
    present = sum(state.sites[name][0] == "contributed" for name in names)
    table = Table("hospital", "state", "contributed", "reason", box=None)
    for name in names[:SITES_SHOWN]:
        condition, reason = state.sites[name]
        table.add_row(
            Text(one_line(name)),
            Text(condition, style="" if condition == "contributed" else "yellow"),
            f"{state.contributions(name)} rounds",
            Text(one_line(reason)),
        )
    parts: list[RenderableType] = [table]
    if len(names) > SITES_SHOWN:
        parts.append(Text(f"and {len(names) - SITES_SHOWN} more", style="dim"))
    if state.last:
        parts.append(Text(f"{present} of {len(names)} contributed to the last round"))
    return parts


def _ending(event: Mapping[str, Any]) -> Text:
    if event["event"] == "run-finished":
        checkpoint = one_line(str(event.get("checkpoint")))
        return Text(f"finished; checkpoint {checkpoint}", style="green")
    return Text(f"failed: {one_line(event['reason'])}", style="bold red")


def _bar(done: int, total: int) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar = ProgressBar(total=max(total, 1), completed=done)
    row.add_row(bar, Text(f"round {done} of {total}"))
    return row


def _bars(values: list[float]) -> str:
    """Draw the values as a row of bars from the lowest to the highest."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return "▄" * len(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low))] for v in values)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _time(event: Mapping[str, Any]) -> datetime | None:
    return datetime.fromisoformat(event["time"]) if "time" in event else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _clock(seconds: float | None) -> str:
    """Return 83 seconds as 0:01:23."""
    if seconds is None:
        return "unknown"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"
