"""What a benchmark found, and the files that it leaves: numbers, page, pictures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    lines: Sequence[str]
    """Markdown."""
    figure: str | None = None
    """Name of the picture that stands in it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section, its picture, named in the section, and its numbers."""

    section: Section
    figure: Figure
    numbers: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a benchmark found."""

    name: str
    """Names the files: imputation, survival."""
    sections: Sequence[Section]
    numbers: Mapping[str, Any]
    """All of it, for scripts: what JSON can hold, NaN as None."""
    figures: Mapping[str, Figure] = field(default_factory=dict)


def write(
    outcome: Outcome, out: Path, *, command: str, commit: str, started: float
) -> list[str]:
    """Write NAME.json, NAME.md and the pictures to a folder; return the page's lines.

    Parameters
    ----------
    command
        What was typed.
    commit
        Of the code, or "unknown".
    started
        `time.monotonic()` when it began.
    """
    seconds = time.monotonic() - started
    versions = {name: version(name) for name in ("fedgex", "torch", "scikit-learn")}
    record = {
        "command": command,
        "commit": commit,
        "seconds": round(seconds),
        "versions": versions,
        "found": outcome.numbers,
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    (out / f"{outcome.name}.json").write_text(text + "\n")
    lines = [f"# {outcome.name.capitalize()}", ""]
    for section in outcome.sections:
        lines += [f"## {section.title}", "", *section.lines, ""]
        if section.figure is not None:
            lines += [f"![{section.title}]({outcome.name}-{section.figure}.png)", ""]
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines += [
        f"`{command}`; commit {commit}, {seconds / 60:.0f} minutes with what was "
        f"trained before left out; {said}."
    ]
    for name, figure in outcome.figures.items():
        figure.savefig(out / f"{outcome.name}-{name}.png", dpi=120)
    (out / f"{outcome.name}.md").write_text("\n".join(lines) + "\n")
    return lines


def plain(value: Any) -> Any:
    """Return what JSON can hold: NaN as None, numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
