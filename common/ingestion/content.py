"""What a file holds, by its first bytes, and its text unpacked.

What a file is called counts only where its bytes leave a choice: browsers unpack
without a word, and people rename.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from fedgex.common.codes import Code
from fedgex.common.ingestion.findings import refuse

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zip": "zip"}
"""How a file of this ending is packed."""

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}

_KINDS = {
    b"PAR1": "parquet",
    b"ARROW1": "feather",
    b"FEA1": "feather",
    b"\x89HDF": "hdf5",
    b"PK\x03\x04": "zip",
}

MARKS = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16, which spreadsheets write."""

_REFUSED = {
    b"\xd0\xcf\x11\xe0": ("an Excel workbook of the old kind (.xls)", "as .xlsx"),
    b"rdx2\n": ("a file of R (.RData)", "with write.table, as .tsv"),
    b"rdx3\n": ("a file of R (.RData)", "with write.table, as .tsv"),
    b"x\n\0\0": ("a file of R (.rds)", "with write.table, as .tsv"),
    b"<?xml": ("XML", "as .csv or .tsv"),
    b"<!doc": ("a web page", "by the page's download link"),
    b"<html": ("a web page", "by the page's download link"),
    b"%pdf": ("a PDF", "as .csv or .tsv"),
    b"{": ("JSON", "as .csv or .tsv"),
    b"[{": ("JSON", "as .csv or .tsv"),
    b"$fl2": ("a file of SPSS", "as .csv or .tsv"),
}
"""First bytes, in lower case, of formats that are named and refused."""

_ENDINGS = {
    ".parquet": "parquet",
    ".feather": "feather",
    ".arrow": "feather",
    ".h5ad": "hdf5",
    ".xlsx": "workbook",
    ".xlsm": "workbook",
}
"""Kind of a file by its ending, where it is not text."""


@dataclass(frozen=True)
class Content:
    """A file of a hospital: its kind, and how it is packed."""

    path: Path
    kind: str
    """text, parquet, feather, hdf5 or workbook."""
    packing: str | None
    """gzip, bz2, zstd or zip; None for plain bytes."""
    ending: str
    """In lower case, without that of the packing: `.tsv` of `E.TSV.gz`."""
    member: str = ""
    """The one file in a zip archive."""

    def open(self) -> Any:
        """Open the text, unpacked; of a workbook as CSV."""
        if self.kind == "workbook":
            return io.BytesIO(self._sheet)
        if self.packing == "zip":
            return zipfile.ZipFile(self.path).open(self.member)
        return pa.input_stream(str(self.path), compression=self.packing)

    @cached_property
    def _sheet(self) -> bytes:
        return _as_csv(self.path)  # seconds, and opened several times

    def recognised(self) -> Iterator[str]:
        """Yield what the name does not say of the packing."""
        suffix = self.path.suffix.lower()
        if self.packing is not None and COMPRESSED.get(suffix) != self.packing:
            yield f"packed by {self.packing}, though not called so"
        elif self.packing is None and suffix in COMPRESSED:
            yield f"plain text called {suffix}"
        if self.packing == "zip":
            yield "a zip archive of one file"
        if self.kind == "workbook":
            yield "an Excel workbook"


def look(path: Path) -> Content:
    """Recognise a file.

    Raises
    ------
    DataError
        If it is of a format that is not read; names the format and the way out.
    OSError
        If it cannot be opened, or is damaged.
    """
    name, ending = Path(path.name.lower()), path.suffix.lower()
    if ending in COMPRESSED:
        ending = name.with_suffix("").suffix
    with path.open("rb") as file:
        start = file.read(512)
    packing = _first(_PACKED, start)
    if packing is not None:
        with pa.input_stream(str(path), compression=packing) as stream:
            start = stream.read(512)
        if start[257:262] == b"ustar":
            _refuse_format(path, "a tar archive", "by unpacking it, one file a table")
    refused = _first(_REFUSED, start.lstrip().lower())
    if refused is not None:
        _refuse_format(path, *refused)
    kind = _first(_KINDS, start) or "text"
    if kind == "zip":
        return _in_zip(path, ending)
    if kind == "text" and b"\0" in start and not start.startswith(MARKS):
        refuse(Code.FILE_UNREADABLE, path, found="a file of another format")
    misnamed = kind == "text" and ending in _ENDINGS
    if misnamed or (kind != "text" and packing is not None):
        found = f"a damaged file, or one that is no {ending}"
        refuse(Code.FILE_UNREADABLE, path, found=found)
    return Content(path, kind, packing, ending)


def _in_zip(path: Path, ending: str) -> Content:
    """Return the workbook, or the one file, that a zip archive is."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if "xl/workbook.xml" in names:
        return Content(path, "workbook", None, ".csv")
    files = [
        name
        for name in names
        if not name.endswith("/") and not Path(name).name.startswith((".", "__"))
        if "__MACOSX" not in name
    ]
    if len(files) != 1:
        _refuse_format(path, f"a zip archive of {len(files)} files", "one of them")
    inner = Path(files[0].lower()).suffix
    if inner in _ENDINGS or inner in COMPRESSED:
        _refuse_format(path, f"a {inner} file in a zip archive", "by unpacking it")
    return Content(path, "text", "zip", inner or ending, files[0])


def _refuse_format(path: Path, found: str, how: str) -> NoReturn:
    action = f"Save or export it {how}."
    refuse(Code.FILE_UNREADABLE, path, found=found, action=action)


def _as_csv(path: Path) -> bytes:
    """Return the one filled sheet of a workbook as CSV in UTF-8."""
    import openpyxl  # half a second to import, and most hospitals need none

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    filled = []
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # what other programs wrote there may be wrong
        rows = [list(map(_text, row)) for row in sheet.iter_rows(values_only=True)]
        if sum(any(row) for row in rows) > 1:
            filled.append(rows)
    book.close()
    if len(filled) != 1:
        refuse(
            Code.FILE_UNREADABLE,
            path,
            found=f"a workbook with {len(filled)} sheets that hold a table",
            expected="one",
            action="Save the sheet as a file of its own, or as .csv.",
        )
    (rows,) = filled
    width = max(map(len, rows))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        row + [""] * (width - len(row)) for row in rows if any(row)
    )
    return text.getvalue().encode()


def _text(cell: object) -> str:
    if isinstance(cell, datetime):
        return cell.date().isoformat()
    return "" if cell is None else str(cell)


def _first(table: dict[bytes, Any], start: bytes) -> Any:
    return next(
        (kind for magic, kind in table.items() if start.startswith(magic)), None
    )
