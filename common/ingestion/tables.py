"""Text, Parquet, Feather and workbooks as Arrow tables, and their cells as numbers.

Cells stay text until a column is known to hold numbers, so identifiers keep leading
zeros. Errors never quote a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.ingestion.content import Content, look
from fedgex.common.ingestion.findings import refuse
from fedgex.common.ingestion.text import DECIMAL_COMMA, THOUSANDS, read_text

MISSING = (
    *("", "NA", "N/A", "na", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>"),
    *("#N/A", "-", "--", "'--", "not reported", "Not Reported", "not available"),
    *("[Not Available]", "[Not Applicable]", "[Not Evaluated]", "[Unknown]"),
    *("[Discrepancy]", "[Completed]", "Unknown", "unknown", "UNKNOWN", ".", "?"),
)
"""Cells that count as missing: those of R, pandas, spreadsheets, GDC and TCGA."""


def read_table(path: Path, seen: list[str] | None = None) -> Any:
    """Read text, Parquet, Feather or a workbook into an Arrow table.

    Cells of text stay strings; names of columns may repeat.

    Parameters
    ----------
    seen
        Gets what was recognised beyond the plain format of the file's ending.

    Raises
    ------
    DataError
        If the file is damaged, empty, ragged or of another format.
    """
    seen = [] if seen is None else seen
    content = look(path)
    seen.extend(content.recognised())
    if content.kind in ("parquet", "feather"):
        return _read_arrow(content)
    if content.kind == "hdf5":
        refuse(Code.FILE_UNREADABLE, path, found="an HDF5 file, no table")
    return read_text(content, seen)


def labels_first(table: Any) -> Any:
    """Move the index that pandas stores in Parquet, if any, to the first column."""
    kept = (table.schema.pandas_metadata or {}).get("index_columns", [])
    index = [name for name in kept if isinstance(name, str)]
    if len(index) != 1 or table.column_names.count(index[0]) != 1:
        return table
    place = table.column_names.index(index[0])
    others = [i for i in range(table.num_columns) if i != place]
    return table.select([place, *others])


def by_position(columns: list[Any]) -> Any:
    """Return a table of columns named 0, 1, ..., because their names may repeat."""
    return pa.Table.from_arrays(columns, names=[str(i) for i in range(len(columns))])


def to_numbers(
    cells: Any,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], Code | None]:
    """Convert an Arrow table of R rows and C columns to numbers.

    Columns of text are converted many at a time: on 20 000 single columns the calls
    would take ten times as long.

    Returns
    -------
    values
        Shape (R, C); NaN where the cell is missing or no number.
    is_text
        Shape (R, C): cells that are neither a number nor missing.
    commas
        What commas in any of these are: its code, None without.
    """
    shape = (cells.num_columns, cells.num_rows)
    values, is_text = np.empty(shape), np.zeros(shape, dtype=bool)
    text = []
    for i, column in enumerate(cells.columns):
        if _is_number(column.type):
            values[i] = column.cast(pa.float64(), safe=False).to_numpy()
        else:
            text.append(i)
    found: set[Code | None] = set()
    width = max(1, 1_000_000 // max(1, cells.num_rows))
    for start in range(0, len(text), width):
        these = text[start : start + width]
        chunks = [c.cast(pa.string()) for i in these for c in cells.column(i).chunks]
        parsed, stray, commas = parse(pa.concat_arrays(chunks))
        values[these] = parsed.reshape(len(these), -1)
        is_text[these] = stray.reshape(len(these), -1)
        found.add(commas)
    return values.T, is_text.T, next(iter(found - {None}), None)


def parse(text: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_], Code | None]:
    """Convert an Arrow array of text to numbers; returned as by `to_numbers`."""
    text = pc.utf8_trim_whitespace(text)
    missing = pc.is_in(text, value_set=pa.array(MISSING))
    text = pc.if_else(missing, None, text)
    try:
        values = text.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values, np.zeros(len(values), dtype=bool), None
    except pa.ArrowInvalid:
        cells = pd.Series(text.to_numpy(zero_copy_only=False), dtype=object)
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
    stray = cells.notna().to_numpy() & np.isnan(values)
    with_comma = cells[stray][cells[stray].str.contains(",", regex=False)]
    commas = None
    if len(with_comma) and with_comma.str.fullmatch(THOUSANDS).all():
        commas = Code.THOUSANDS_SEPARATORS
    elif with_comma.str.fullmatch(DECIMAL_COMMA).any():
        commas = Code.DECIMAL_COMMA
    return values, stray, commas


def _read_arrow(content: Content) -> Any:
    path = content.path
    try:
        if content.kind == "parquet":
            table = pa.parquet.ParquetFile(path).read(use_threads=False)
        else:
            table = pa.feather.read_table(path, use_threads=False, memory_map=False)
        table.validate(full=True)  # text that is UTF-8
    except (OSError, pa.ArrowException):
        found = f"a damaged file, or no {content.kind.capitalize()}"
        refuse(Code.FILE_UNREADABLE, path, found=found)
    if not all(map(_is_number_or_text, table.schema.types)):
        found = "columns that hold neither numbers nor text"
        refuse(Code.FILE_UNREADABLE, path, found=found)
    return table


def _is_number_or_text(kind: Any) -> bool:
    """Return whether every value of a type can be written as text."""
    if pa.types.is_nested(kind) or "binary" in str(kind):
        return False
    try:
        pa.nulls(0, kind).cast(pa.string())
    except pa.ArrowException:
        return False
    return True


def _is_number(kind: Any) -> bool:
    is_float, is_int = pa.types.is_floating(kind), pa.types.is_integer(kind)
    return bool(is_float or is_int or pa.types.is_decimal(kind))
