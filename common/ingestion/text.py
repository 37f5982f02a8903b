"""Delimited text as an Arrow table of strings, whichever program wrote it.

Encoding, delimiter, decimal sign and what stands before the header are recognised where
the file leaves one reading only; else it is refused. Errors never quote a row.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fedgex.common.codes import Code
from fedgex.common.ingestion.content import MARKS, Content
from fedgex.common.ingestion.findings import refuse

DELIMITER_OF = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t", ".gct": "\t"}
"""Delimiter of a text file by its ending."""

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}

LINES_BEFORE_HEADER = 1000
"""Most lines of comments before the header."""

DECIMAL_COMMA = r"[-+]?\d+,\d+([eE][-+]?\d+)?"
THOUSANDS = r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?"
_DECIMAL_POINT = r"[-+]?\d*\.\d+([eE][-+]?\d+)?"

_LATIN = bytes([*range(9, 14), *range(32, 127), 0xA0, 0xB0, 0xB5, *range(0xC0, 0x100)])
"""Bytes of text in Latin-1: ASCII, letters with accents, ° and µ."""

_GCT = re.compile(r"#1\.([23])\s*")
_SERIES = "a GEO series matrix"


@dataclass(frozen=True)
class _Layout:
    """Where the header of a text file is, and what divides its cells."""

    header: list[str]
    delimiter: str
    before: int
    """Lines before the header: blank, comments, or GCT's sizes."""
    after: int = 0
    """Lines after the header that are no rows: what GCT 1.3 says of columns."""
    annotation: int = 0
    """Columns after the first that are no samples: what GCT 1.3 says of rows."""


def read_text(content: Content, seen: list[str]) -> Any:
    """Read delimited text into an Arrow table of strings.

    Parameters
    ----------
    seen
        Gets what was recognised beyond commas or tabs, as the ending says, in UTF-8.

    Raises
    ------
    DataError
        If the text is damaged, empty, ragged, or leaves several readings.
    """
    with content.open() as stream:
        encoding = "utf-16" if stream.read(2) in MARKS else "utf-8"
    found: list[str] = []
    try:
        if encoding != "utf-8":
            found.append("UTF-16 text")
        table = _read(content, encoding, found)
    except UnicodeError:
        if encoding != "utf-8" or not _is_latin(content):
            refuse(
                Code.FILE_UNREADABLE,
                content.path,
                action="Save it as UTF-8 (in spreadsheets: CSV UTF-8).",
            )
        found = ["Latin-1 text"]
        table = _read(content, "latin-1", found)
    seen += found
    return table


def _read(content: Content, encoding: str, seen: list[str]) -> Any:
    """Read text of a known encoding; raise UnicodeError if it is of another."""
    path = content.path
    try:
        with content.open() as stream:
            sig = "utf-8-sig" if encoding == "utf-8" else encoding
            layout = _look(content, io.TextIOWrapper(stream, sig, newline=""), seen)
    except (OSError, EOFError, csv.Error, pa.ArrowInvalid):
        refuse(Code.FILE_UNREADABLE, path)
    positions = [str(i) for i in range(len(layout.header))]
    ragged: list[int] = []

    def skip(row: Any) -> str:
        if not (row.text or "").startswith("!"):  # the last line of a series matrix
            ragged.append(row.actual_columns)
        return "skip"

    try:
        table = pa.csv.read_csv(
            content.open(),
            # One row of 60 000 genes must fit into a block.
            read_options=pa.csv.ReadOptions(
                skip_rows=layout.before + 1 + layout.after,
                column_names=positions,
                block_size=1 << 26,
                use_threads=False,  # with threads, processes were seen to abort
                encoding="utf8" if encoding == "utf-8" else encoding,
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=layout.delimiter, invalid_row_handler=skip
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(positions, pa.string())
            ),
        )
    except pa.ArrowInvalid as error:
        if "invalid UTF8" in str(error):
            raise UnicodeError from None
        refuse(Code.FILE_UNREADABLE, path)
    except (OSError, EOFError):
        refuse(Code.FILE_UNREADABLE, path)
    if ragged:
        refuse(Code.RAGGED_ROWS, path, n_columns=len(layout.header))
    table = _filled(table.rename_columns(layout.header), layout.annotation)
    if layout.delimiter != ",":
        table = _with_points(table, seen)
    return table


def _look(content: Content, lines: Any, seen: list[str]) -> _Layout:
    """Find the header and the delimiter."""
    first, layout = _pass_over(lines, seen)
    following = list(itertools.islice(lines, 20 + layout["after"]))[layout["after"] :]
    rows = [line for line in following if line.strip() and not line.startswith("!")]
    if not first or not rows:
        empty = f"{_SERIES} without values" if _SERIES in seen else None
        action = (
            "Its numbers are in the series' supplementary files." if empty else None
        )
        refuse(Code.FILE_EMPTY, content.path, found=empty, action=action)
    cells = {d: _divided([first], d) for d in DELIMITERS}
    more = {d: len(_divided(rows, d)) - len(cells[d]) for d in DELIMITERS}
    fits = [d for d in DELIMITERS if len(cells[d]) > 1 and more[d] in (0, 1)]
    usual = DELIMITER_OF.get(content.ending, ",")
    if usual in fits:
        delimiter = usual
    elif len(fits) == 1 and len(cells[fits[0]]) > len(cells[usual]):
        (delimiter,) = fits
        seen.append(f"{DELIMITERS[delimiter]} between the cells")
    elif len(cells[usual]) > 1:
        delimiter = usual  # and the rows are ragged
    else:
        _refuse_delimiter(content, first, rows[0])
    header = cells[delimiter]
    if delimiter in fits and more[delimiter]:
        # R names no column of labels; others end each row in a delimiter.
        open_end = _divided(rows, delimiter)[-1] == ""
        header = [*header, ""] if open_end else ["", *header]
        if not open_end:
            seen.append("a header one field short, as R writes it")
    return _Layout(header, delimiter, **layout)


def _divided(lines: list[str], delimiter: str) -> list[str]:
    """Return the cells of the first row; none if a cell is longer than csv reads."""
    try:
        return next(csv.reader(lines, delimiter=delimiter), [])
    except csv.Error:
        return []


def _pass_over(lines: Iterable[str], seen: list[str]) -> tuple[str, dict[str, int]]:
    """Return the header, and how many lines and columns around it are no matrix."""
    sizes = -1  # the second line of GCT: numbers of rows and columns
    layout = {"before": 0, "after": 0, "annotation": 0}
    for number, line in enumerate(itertools.islice(lines, LINES_BEFORE_HEADER)):
        text = line.strip()
        if number == 0 and (gct := _GCT.match(text)):
            seen.append(f"GCT 1.{gct[1]}")
            sizes = 1
        elif number == sizes:
            counts = [int(count) for count in text.split() if count.isdecimal()]
            if len(counts) == 4:  # version 1.3
                _, _, layout["annotation"], layout["after"] = counts
        elif kind := _before_header(text):
            if kind not in seen:
                seen.append(kind)
        else:
            return line, layout | {"before": number}
    return "", layout


def _before_header(text: str) -> str | None:
    """Return what a line before the header is; None for the header."""
    if not text:
        return "blank lines before the header"
    if text.startswith(("!Series_", "!Sample_", "!series_matrix_table_")):
        return _SERIES
    if text.startswith("#") and "featureCounts" in text:
        return "a table of featureCounts"
    if text.startswith(("#", "!", "^")):
        return "lines of comments before the header"
    if text.lower().startswith("sep="):
        return "a spreadsheet's line with the delimiter"
    return None


def _refuse_delimiter(content: Content, first: str, second: str) -> NoReturn:
    """Refuse text that no delimiter divides evenly."""
    usual = DELIMITER_OF.get(content.ending)
    name = max(DELIMITERS, key=first.count)
    if len(first.split()) > 2 and not first.count(name):
        name = " "
    if not first.count(name) or name == usual:
        if usual is None:
            refuse(Code.FILE_UNREADABLE, content.path, found="a file of another format")
        refuse(Code.FILE_EMPTY, content.path, expected="two columns or more")
    refuse(
        Code.WRONG_DELIMITER,
        content.path,
        name=DELIMITERS.get(name, "spaces"),
        delimiter=DELIMITERS[usual or ","],
    )


def _filled(table: Any, annotation: int) -> Any:
    """Leave out GCT's annotation, and rows and unnamed columns that are empty."""
    names = table.column_names
    kept = [
        place
        for place, name in enumerate(names)
        if not 0 < place <= annotation
        and (name or not place or _any_text(table.column(place)))
    ]
    if len(kept) < len(names):
        table = table.select(kept).rename_columns([names[place] for place in kept])
    no_label = pc.equal(table.column(0), "")
    if pc.any(no_label).as_py():
        full = pc.invert(no_label)
        for column in table.columns[1:]:
            full = pc.or_(full, pc.not_equal(column, ""))
        table = table.filter(full)
    return table


def _any_text(column: Any) -> bool:
    return bool(pc.any(pc.not_equal(column, "")).as_py())


def _with_points(table: Any, seen: list[str]) -> Any:
    """Write decimal points for decimal commas, where no number reads otherwise.

    1,234 only may be thousands: some other number must have other digits.
    """
    columns = list(table.columns)
    commas = {
        place: pc.utf8_trim_whitespace(column)
        for place, column in enumerate(columns)
        if pc.any(pc.match_substring(column, ",")).as_py()
    }
    if not any(
        _any_full(each, DECIMAL_COMMA, but=THOUSANDS) for each in commas.values()
    ):
        return table
    if any(_any_full(each, _DECIMAL_POINT) for each in columns[1:]):  # 0 has labels
        return table
    seen.append("decimal commas")
    for place, column in commas.items():
        number = pc.match_substring_regex(column, f"^{DECIMAL_COMMA}$")
        points = pc.replace_substring(column, ",", ".")
        columns[place] = pc.if_else(number, points, column)
    return pa.Table.from_arrays(columns, names=table.column_names)


def _any_full(column: Any, pattern: str, but: str = "^$") -> bool:
    """Return whether a pattern, and not the other, is all of any cell."""
    found = pc.match_substring_regex(column, f"^({pattern})$")
    other = pc.match_substring_regex(column, f"^({but})$")
    return bool(pc.any(pc.and_not(found, other)).as_py())


def _is_latin(content: Content) -> bool:
    """Return whether every byte is of plain text in Latin-1."""
    with content.open() as stream:
        return not any(
            block.translate(None, _LATIN)
            for block in iter(lambda: stream.read(1 << 24), b"")
        )
