"""Write the report of a simulated federation: numbers as JSON, and one page to read.

The page needs nothing but itself: styles and charts are inline, and there are no
scripts. docs/report.md explains every key of the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fedgex.simulations.reporting import charts, headlines, rows
from fedgex.simulations.reporting.schema import Report, headline_key, plain

DIGITS = 6
"""Significant digits of the numbers in report.json."""


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.html to `folder`, which is made if need be.

    The same report gives the same bytes. NaN and infinity become null.

    Raises
    ------
    ConfigError
        If the report does not follow its schema; nothing is written then.
    """
    numbers = plain(report, DIGITS)
    page = _page(Report.read(numbers, "report"))
    text = json.dumps(
        numbers, allow_nan=False, ensure_ascii=False, indent=1, sort_keys=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(text + "\n", "utf-8")
    (folder / "report.html").write_text(page, "utf-8")


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the headline results as about ten lines, each `Topic: sentence`.

    Raises
    ------
    ConfigError
        If the report does not follow its schema.
    """
    return headlines.headlines(Report.read(plain(report, DIGITS), "report"))


def _page(report: Report) -> str:
    """Return the page; the template escapes all text but the charts."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": headlines.count,
        "duration": headlines.duration,
        "label": charts.LABELS.__getitem__,
        "number": rows.number,
        "percent": lambda key: f"{float(key):.0%}",
        "sentence": lambda text: f"{text[0].upper()}{text[1:]}.",
    }
    template = resources.files(__package__) / "report_template.html"
    return environment.from_string(template.read_text("utf-8")).render(
        report=report,
        study=report.study,
        charts=charts,
        headlines=headlines,
        headline_key=headline_key,
        rows=rows,
    )
