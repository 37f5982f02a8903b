"""The table that names the sample of each file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from fedgex.common.codes import Code
from fedgex.common.ingestion.findings import refuse
from fedgex.common.ingestion.tables import read_table

FILES = ("file name", "file_name", "filename", "file", "path", "folder")
"""Columns that hold a file's name or path, in any case; the first that is there."""

SAMPLES = ("sample id", "sample_id", "sample", "label")
"""Columns that hold the sample's label, in any case; the first that is there."""

_FOLDER = "file id"
"""GDC's column with the name of the folder that its client makes for each file."""


@dataclass(frozen=True)
class Sheet:
    """Which file is of which sample."""

    file: str
    """Name of the table."""
    rows: tuple[tuple[int, tuple[str, ...], str], ...]
    """Line in the table, names under which the file may lie, and label."""


def read_sheet(path: Path) -> Sheet:
    """Read a sample sheet: CSV or TSV, as written by hand or by the GDC.

    Raises
    ------
    DataError
        If it cannot be read, lacks a column, or a row lacks file or label.
    """
    table = read_table(path)
    columns = {name.strip().lower(): i for i, name in enumerate(table.column_names)}
    file = next((name for name in FILES if name in columns), None)
    sample = next((name for name in SAMPLES if name in columns), None)
    if file is None or sample is None:
        refuse(Code.SAMPLE_SHEET_UNUSABLE, path)

    def texts(name: str) -> list[str]:
        cells = table.column(columns[name]).cast(pa.string()).to_pylist()
        return [(cell or "").strip() for cell in cells]

    names, labels = texts(file), texts(sample)
    folders = texts(_FOLDER) if _FOLDER in columns else [""] * len(names)
    empty = [
        i for i, both in enumerate(zip(names, labels, strict=True)) if not all(both)
    ]
    if empty:
        found = f"rows without file or sample (first line {empty[0] + 2})"
        refuse(Code.SAMPLE_SHEET_UNUSABLE, path, found=found)
    return Sheet(
        path.name,
        tuple(
            (line, (f"{folder}/{name}", name) if folder else (name,), label)
            for line, (folder, name, label) in enumerate(
                zip(folders, names, labels, strict=True), 2
            )
        ),
    )
