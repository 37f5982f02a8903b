"""Results of one question, and their files: JSON, Markdown page and figures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of one question."""

    name: str
    """Of the question; names the page template and the files."""
    numbers: Mapping[str, Any]
    """All results, for scripts: what JSON can hold, NaN as None."""
    fields: Mapping[str, Any]
    """Fields of the page template: tables as text, numbers that it formats."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Written as NAME-KEY.png; the template places them."""

    @property
    def page(self) -> str:
        """The page, Markdown; sections with a field that is None are left out."""
        template = resources.files(__package__) / "pages" / f"{self.name}.md"
        sections = re.split(r"(?m)^(?=## )", template.read_text("utf-8"))
        kept = [
            section
            for section in sections
            if not any(self.fields.get(name, "") is None for name in _fields(section))
        ]
        return "".join(kept).format_map(self.fields).rstrip("\n") + "\n"


def write(
    results: Results, out: Path, *, command: str, commit: str, started: float
) -> str:
    """Write NAME.json, NAME.md and the figures to a folder; return the page.

    Parameters
    ----------
    command
        As typed.
    commit
        Of the code, or "unknown".
    started
        `time.monotonic()` when the command began.
    """
    seconds = time.monotonic() - started
    versions = {name: version(name) for name in ("fedgex", "torch", "scikit-learn")}
    record = {
        "command": command,
        "commit": commit,
        "seconds": round(seconds),
        "versions": versions,
        "found": results.numbers,
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    (out / f"{results.name}.json").write_text(text + "\n")
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    page = (
        f"{results.page}\n`{command}`; commit {commit}, {seconds / 60:.0f} minutes "
        f"with what was trained before left out; {used}.\n"
    )
    for name, figure in results.figures.items():
        figure.savefig(out / f"{results.name}-{name}.png", dpi=120)
    (out / f"{results.name}.md").write_text(page)
    return page


def _fields(template: str) -> set[str]:
    """Return the names of a template's fields."""
    found = (name for _, name, _, _ in Formatter().parse(template) if name)
    return {re.split(r"[.\[]", name)[0] for name in found}
