"""Delimited text and Parquet as Arrow tables, and their cells as numbers.

Cells stay text until a column is known to hold numbers, so identifiers keep leading
zeros. Errors never quote a row.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.ingestion.findings import Findings

MISSING = (
    *("", "NA", "N/A", "na", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>"),
    *("#N/A", "-", "--", "'--", "not reported", "Not Reported", "not available"),
    *("[Not Available]", "[Not Applicable]", "[Not Evaluated]", "[Unknown]"),
    "[Discrepancy]",
)
"""Cells that count as missing: those of R, pandas, spreadsheets, GDC and TCGA."""

_DECIMAL_COMMA = r"[-+]?\d+,\d+([eE][-+]?\d+)?"
_THOUSANDS = r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?"

COMPRESSED = (".gz", ".bz2", ".zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files: what a file is called counts for nothing."""
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks, which spreadsheets write."""

DELIMITER_OF = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}
"""Delimiter of a text file by its ending."""

LINES_BEFORE_HEADER = 1000
"""Most lines of comments before the header."""

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


def read_table(path: Path) -> Any:
    """Read a CSV, TSV or Parquet file into an Arrow table.

    Cells of text files stay strings; names of columns may repeat.

    Raises
    ------
    DataError
        If the file is damaged, empty, ragged or of another format.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    for packed in COMPRESSED:
        name = name.removesuffix(packed)
    if (suffix := Path(name).suffix) in DELIMITER_OF:
        return _read_text(path, DELIMITER_OF[suffix])
    refuse(Code.FILE_UNREADABLE, path, found="a file of another format")


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
    if len(with_comma) and with_comma.str.fullmatch(_THOUSANDS).all():
        commas = Code.THOUSANDS_SEPARATORS
    elif with_comma.str.fullmatch(_DECIMAL_COMMA).any():
        commas = Code.DECIMAL_COMMA
    return values, stray, commas


def refuse(code: Code, path: Path, **fields: Any) -> NoReturn:
    """Refuse a file by one finding; see `Findings.add`."""
    findings = Findings()
    findings.add(code, path.name, **fields)
    findings.refuse()


@dataclass(frozen=True)
class _Text:
    """How a text file is packed and where its header is."""

    compression: str | None
    encoding: str
    header: list[str]
    before: int
    """Lines before the header: blank, comments, or GCT's sizes."""

    def open(self, path: Path) -> Any:
        return pa.input_stream(str(path), compression=self.compression)


def _read_text(path: Path, delimiter: str) -> Any:
    text = _look(path, delimiter)
    positions = [str(i) for i in range(len(text.header))]
    ragged: list[int] = []

    def skip(row: Any) -> str:
        ragged.append(row.actual_columns)
        return "skip"

    try:
        table = pa.csv.read_csv(
            text.open(path),
            # One row of 60 000 genes must fit into a block.
            read_options=pa.csv.ReadOptions(
                skip_rows=text.before + 1,
                column_names=positions,
                block_size=1 << 26,
                use_threads=False,  # with threads, processes were seen to abort
                encoding=text.encoding,
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter, invalid_row_handler=skip
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(positions, pa.string())
            ),
        )
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid):
        refuse(Code.FILE_UNREADABLE, path)
    if ragged:
        refuse(Code.RAGGED_ROWS, path, n_columns=len(text.header))
    return table.rename_columns(text.header)


def _look(path: Path, delimiter: str) -> _Text:
    """Find packing, encoding and header of a text file, and check its delimiter.

    Lines before the header are passed over: blank ones, comments, and those of GCT.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        packed = (name for magic, name in _MAGIC.items() if start.startswith(magic))
        compression = next(packed, None)
        with pa.input_stream(str(path), compression=compression) as stream:
            encoding = _MARKS.get(stream.read(2), "utf-8-sig")
        with (
            pa.input_stream(str(path), compression=compression) as stream,
            io.TextIOWrapper(stream, encoding=encoding, newline="") as lines,
        ):
            before, first = _pass_over(lines)
            rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
            header, second = next(rows, []), next(rows, None)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, pa.ArrowInvalid):
        refuse(Code.FILE_UNREADABLE, path)
    if not header or second is None:
        refuse(Code.FILE_EMPTY, path)
    in_words = len(header) == 1 and len(header[0].split()) == len(second[0].split()) > 2
    for other, name in _DELIMITERS.items():
        if sum(cell.count(other) for cell in header) >= len(header):
            refuse(
                Code.WRONG_DELIMITER, path, name=name, delimiter=_DELIMITERS[delimiter]
            )
    if in_words:
        refuse(
            Code.WRONG_DELIMITER, path, name="spaces", delimiter=_DELIMITERS[delimiter]
        )
    return _Text(compression, encoding, header, before)


def _pass_over(lines: Iterable[str]) -> tuple[int, str]:
    """Return the number of lines before the header, and the header."""
    sizes = -1  # the second line of GCT, version 1.2: numbers of rows and columns
    for number, line in enumerate(itertools.islice(lines, LINES_BEFORE_HEADER)):
        text = line.strip()
        if number == 0 and text == "#1.2":
            sizes = 1
        passed = not text or text.startswith("#") or text.lower().startswith("sep=")
        if not passed and number != sizes:
            return number, line
    return 0, ""


def _read_parquet(path: Path) -> Any:
    try:
        table = pa.parquet.ParquetFile(path).read(use_threads=False)
        table.validate(full=True)  # text that is UTF-8
    except (OSError, pa.ArrowException):
        refuse(Code.FILE_UNREADABLE, path, found="a damaged file, or no Parquet")
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
