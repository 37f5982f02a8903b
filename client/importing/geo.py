"""A series of GEO: its series matrix, and the table of its platform."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from fedgex.client.importing.download import Download, header, one
from fedgex.common.errors import DataError
from fedgex.common.ingestion.content import look
from fedgex.common.ingestion.platform import COLUMNS, PROBES

_BEGIN = "!series_matrix_table_begin"
_AGE = r"age( at .*)?( ?\(?(years|yrs|y)\)?)?"
_SEX = r"sex|gender"
_FOLLOW_UP = r"surviv|follow|death|dead|vital|event|status|relapse|recur|month|days"


def find(files: Sequence[Path]) -> Download | None:
    """Return the series, if there is a series matrix.

    Raises
    ------
    ConfigError
        If there are several, or several tables of platforms.
    """
    series = [path for path in files if _is_series(path)]
    if not series:
        return None
    matrix = one(series, "the series matrix of GEO")
    platforms = [path for path in files if path != matrix and _is_platform(path)]
    platform = one(platforms, "the table of the platform") if platforms else None
    download = Download(
        source="GEO",
        expression=matrix,
        platform_table=platform,
        clinical=None,
        scale=None,
    )
    download.clinical = _clinical(matrix, download)
    if platform is None:
        download.undecided.append(
            "No table of the platform (GPL...): probes stay probes. Name it too, "
            "unless the series has symbols."
        )
    return download


def _is_series(path: Path) -> bool:
    return header(path)[:1] in (["!Series_title"], [_BEGIN])


def _is_platform(path: Path) -> bool:
    """Return whether some line near the start has a column of probes and of symbols."""
    try:
        with look(path).open() as stream:
            text = stream.read(1 << 18).decode("utf-8", errors="replace")
    except (DataError, OSError, EOFError):
        return False
    rows = (line.lower().rstrip().split("\t") for line in text.splitlines())
    return any(row[0] in PROBES and set(row) & set(COLUMNS) for row in rows)


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield key and cells of each line before the values."""
    with look(path).open() as stream:
        for line in io.TextIOWrapper(stream, "utf-8", errors="replace"):
            text = line.strip()
            if text.startswith(_BEGIN):
                return
            if text.startswith("!Sample_"):
                key, *cells = next(csv.reader([text], delimiter="\t"))
                yield key, [cell.strip() for cell in cells]


def _clinical(path: Path, download: Download) -> pd.DataFrame:
    """Return a row a sample: accession, title, and what the submitter wrote of it."""
    columns: dict[str, list[str | None]] = {}
    labels: list[str] = []
    for key, cells in _lines(path):
        if key == "!Sample_geo_accession":
            labels = cells
        elif key == "!Sample_title":
            columns["title"] = list(cells)
        elif key.startswith("!Sample_characteristics"):
            for place, cell in enumerate(cells):
                name, mark, value = cell.partition(":")
                if mark:
                    own = columns.setdefault(name.strip(), [None] * len(cells))
                    own[place] = value.strip() or None
    for ours, pattern in (("age", _AGE), ("sex", _SEX)):
        found = [name for name in columns if re.fullmatch(pattern, name.lower())]
        if len(found) == 1:
            columns[ours] = columns.pop(found[0])
            download.decided.append(f'{ours} is "{found[0]}".')
    listed = [name for name in columns if re.search(_FOLLOW_UP, name.lower())]
    download.decided.append("Each sample counts as a patient, by its accession.")
    download.undecided += [
        "data.columns.duration, data.columns.event and data.time_unit: columns that "
        f"may be of follow-up are {', '.join(listed) or 'none'}.",
        "data.columns.cancer_type: the columns are " + ", ".join(columns) + ".",
        "data.columns.patient: if patients gave several samples, name the column "
        'that says whose they are, and set data.columns.sample = "patient".',
    ]
    return pd.DataFrame({"patient": labels} | columns, dtype=object)
