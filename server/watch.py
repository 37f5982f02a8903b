"""Show a run between hospitals in the terminal, from its journal alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedgex.server import journal

NO_PRIVACY = "none"
"""Epsilon of a run without differential privacy: there is no bound."""


@dataclass
class Progress:
    """What the journal has told so far, over every start of the run."""

    study: str = ""
    plan: dict[str, int] = field(default_factory=dict)
    """Rounds of each phase, in order."""
    rounds: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """Each finished round once: (phase, number) → its event."""
    sites: dict[str, tuple[str, str]] = field(default_factory=dict)
    """State and reason of each hospital, as of the last that was heard."""
    epsilon: dict[str, float] | None = None
    """Spent so far, of each guarantee; None without any."""
    ending: dict[str, Any] | None = None
    """The event that ended the run, None while it is under way."""

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event; those that are unknown tell nothing here."""
        match event["event"]:
            case "run-started":
                self.ending = None
                self.study, self.epsilon = event["study"], event.get("epsilon")
                self.plan = {p["phase"]: p["rounds"] for p in event["plan"]}
                for name in event["sites"]:
                    self.sites.setdefault(name, ("ready", ""))
            case "not-answered":
                self.sites[event["site"]] = (event["state"], event["reason"] or "")
            case "round":
                self.rounds[event["phase"], event["round"]] = dict(event)
                self.epsilon = event.get("epsilon")
                for name, site in event["sites"].items():
                    self.sites[name] = (site["state"], site["reason"] or "")
            case kind if kind in journal.ENDINGS:
                self.ending = dict(event)

    @property
    def last(self) -> dict[str, Any] | None:
        """The latest finished round."""
        return next(reversed(self.rounds.values()), None)

    @property
    def planned(self) -> int:
        """Rounds of all phases together."""
        return sum(self.plan.values())

    @property
    def left_s(self) -> float | None:
        """Seconds to the end if rounds stay as long as they were; None before any."""
        known = [e["seconds"] for e in self.rounds.values() if e["seconds"] is not None]
        if not known:
            return None
        return max(self.planned - len(self.rounds), 0) * float(sum(known)) / len(known)

    @property
    def restoration(self) -> float | None:
        """Mean squared error on the hold-out with half of the genes missing.

        Of the last round that was judged; None if none was.
        """
        for event in reversed(self.rounds.values()):
            mcar = (event["holdout"] or {}).get("mcar", {})
            error = mcar.get("0.5", {}).get("mse")
            if error is not None:
                return float(error)
        return None

    def contributions(self, site: str) -> int:
        """Return to how many rounds a hospital contributed."""
        return sum(
            event["sites"].get(site, {}).get("state") == "contributed"
            for event in self.rounds.values()
        )


def line(progress: Progress) -> str:
    """Return the latest round as one line, for a file or a pipe."""
    event = progress.last
    assert event is not None, "there is a line only after a round"
    absent = [
        f"{name} {state}" + (f" ({one_line(reason)})" if reason else "")
        for name, (state, reason) in sorted(progress.sites.items())
        if state != "contributed"
    ]
    told = {
        "phase": event["phase"],
        "round": f"{event['round']}/{event['rounds']}",
        "restoration_mse": _number(progress.restoration),
        "epsilon": epsilon(progress.epsilon),
        "left": _clock(progress.left_s),
        "absent": "; ".join(absent) or "nobody",
    }
    return " ".join(f"{key}={value}" for key, value in told.items())


def epsilon(spent: Mapping[str, float] | None) -> str:
    """Return epsilon so far in a few words, such as `patient:3.21,site:1.50`."""
    if not spent:
        return NO_PRIVACY
    return ",".join(f"{unit}:{value:.2f}" for unit, value in spent.items())


def display(run: str, state: str, progress: Progress) -> RenderableType:
    """Return the whole display as it stands."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    last = progress.last
    facts.add_row("study", Text(one_line(progress.study) or "not started"))
    facts.add_row("state", state)
    facts.add_row("rounds", f"{len(progress.rounds)} of {progress.planned}")
    if last:
        facts.add_row("phase", f"{last['phase']} {last['round']} of {last['rounds']}")
    facts.add_row("restoration", f"{_number(progress.restoration)}  hold-out MSE")
    facts.add_row("epsilon", epsilon(progress.epsilon))
    facts.add_row("time left", _clock(progress.left_s))
    hospitals = Table("hospital", "state", "contributed", "reason", box=None)
    for name, (condition, reason) in sorted(progress.sites.items()):
        hospitals.add_row(
            Text(one_line(name)),
            Text(condition, style="" if condition == "contributed" else "yellow"),
            f"{progress.contributions(name)} rounds",
            Text(one_line(reason)),
        )
    parts: list[RenderableType] = [facts, Text(""), hospitals]
    return Panel(Group(*parts), title=Text(run), title_align="left", expand=False)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _clock(seconds: float | None) -> str:
    """Return 83 seconds as 0:01:23."""
    if seconds is None:
        return "unknown"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"


def one_line(text: str) -> str:
    """Keep a hospital's text from breaking the line or steering the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
