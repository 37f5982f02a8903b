"""Read a hospital's files as they are.

Nothing is interpreted here: text stays text, so that a patient called 007 keeps both
zeros and a gene column with a stray word is seen by `validation`.
"""

from __future__ import annotations

import csv
import gzip
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fedgex.client.settings import DataColumns, SiteSettings
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, DataError, Finding
from fedgex.common.genes import GeneTable


@dataclass(frozen=True, kw_only=True)
class RawExpression:
    """An expression file as it is; which axis holds the samples is not known yet."""

    file: str
    """Name of the file."""
    rows: tuple[str, ...]
    """Labels of the rows, from the first column."""
    columns: tuple[str, ...]
    """Labels of the columns, from the header; repetitions stay."""
    cells: pa.Table
    """One column for each of `columns`, named by position; text stays text."""
    rows_are_samples: bool
    """True where the format says so (AnnData)."""


@dataclass(frozen=True, kw_only=True)
class RawClinical:
    """A clinical table as it is."""

    file: str
    """Name of the file."""
    table: pd.DataFrame
    """Every column as text, under the names in the file."""


@dataclass(frozen=True, kw_only=True)
class RawCohort:
    """A hospital's files, read and not yet checked."""

    expression: RawExpression
    clinical: RawClinical | None
    """None if no file is named and the expression file carries no clinical columns."""
    gene_table: GeneTable | None
    opt_outs: frozenset[str] | None
    """Patients to leave out; None if no file is named."""


def read(settings: SiteSettings) -> RawCohort:
    """Read all files that the settings name.

    Raises
    ------
    DataError
        If any file is missing or cannot be read; carries the findings of all files.
    """
    data, findings = settings.data, list[Finding]()
    expression: RawExpression | None = None
    clinical: RawClinical | None = None
    gene_table: GeneTable | None = None
    opt_outs: frozenset[str] | None = None
    with _collected(findings):
        expression, clinical = _expression(data.expression, data.columns)
    if data.clinical is not None:
        with _collected(findings):
            clinical = _clinical(data.clinical)
    if data.hgnc_table is not None:
        with _collected(findings):
            gene_table = _gene_table(data.hgnc_table)
    if data.opt_outs is not None:
        with _collected(findings):
            opt_outs = _opt_outs(data.opt_outs)
    if findings or expression is None:
        raise DataError(findings)
    return RawCohort(
        expression=expression,
        clinical=clinical,
        gene_table=gene_table,
        opt_outs=opt_outs,
    )


@contextmanager
def _collected(findings: list[Finding]) -> Iterator[None]:
    """Keep the findings of one file and go on to the next."""
    try:
        yield
    except DataError as error:
        findings.extend(error.findings)


def _expression(
    path: Path, columns: DataColumns
) -> tuple[RawExpression, RawClinical | None]:
    """Read an expression file, and the clinical table that AnnData may carry."""
    if path.suffix == ".h5ad":
        return _anndata(path, columns)
    table = _labels_first(_table(path))
    if table.num_columns < 2 or table.num_rows == 0:
        _refuse_empty(path, "a row of labels, a column of labels, and values")
    labels = table.column(0).cast(pa.string()).to_pylist()
    expression = RawExpression(
        file=path.name,
        rows=tuple(label or "" for label in labels),
        columns=tuple(table.column_names[1:]),
        cells=_by_position(table.columns[1:]),
        rows_are_samples=False,
    )
    return expression, None


def _clinical(path: Path) -> RawClinical:
    """Read a clinical table; an index that pandas kept in Parquet is a column."""
    table = _table(path)
    if table.num_rows == 0:
        _refuse_empty(path, "a header and one row a patient")
    frame = table.to_pandas()
    if frame.index.name is not None or not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    return RawClinical(file=path.name, table=frame.astype("string"))


def _gene_table(path: Path) -> GeneTable:
    _refuse_missing(path)
    try:
        return GeneTable.read(path)
    except ConfigError as error:
        finding = Code.GENE_TABLE_UNUSABLE.finding(
            path.name,
            "not a readable gene table",
            "HGNC's complete set, tab-separated, with its header",
            "Download it again, or remove data.hgnc_table.",
        )
        raise DataError([finding]) from error


def _opt_outs(path: Path) -> frozenset[str]:
    """Read identifiers, one a line; # begins a comment at a line's start or a space."""
    _refuse_missing(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        finding = Code.FILE_UNREADABLE.finding(
            path.name,
            "damaged text, or text that is not UTF-8",
            "UTF-8 text, one patient identifier a line",
            "Write the file again; until then nobody's data are used.",
        )
        raise DataError([finding]) from None
    identifiers = (re.split(r"(?:^|\s)#", line)[0].strip() for line in lines)
    return frozenset(filter(None, identifiers))


def _anndata(
    path: Path, columns: DataColumns
) -> tuple[RawExpression, RawClinical | None]:
    """Read X and, if it has any of the clinical columns, obs."""
    _refuse_missing(path)
    import anndata  # takes a second, and most hospitals need no AnnData

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # repeated names become findings
            data = anndata.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError):
        _refuse_unreadable(path, "a damaged file, or no AnnData")
    if data.X is None or 0 in data.shape:
        _refuse_empty(path, "values in X")
    X = data.to_df().to_numpy()  # dense, whatever X was
    names = pd.Series(data.obs_names.astype(str), dtype="string")
    expression = RawExpression(
        file=path.name,
        rows=tuple(names),
        columns=tuple(data.var_names.astype(str)),
        cells=_by_position([pa.array(column) for column in np.asfortranarray(X).T]),
        rows_are_samples=True,
    )
    wanted = {name or own for own, name in columns.model_dump().items()}
    if not wanted & set(data.obs.columns):
        return expression, None
    obs = data.obs.astype("string").reset_index(drop=True)
    obs[columns.sample or "sample"] = names  # whatever obs says, rows of X go by these
    if columns.patient is None and "patient" not in obs:
        obs["patient"] = names
    return expression, RawClinical(file=f"{path.name} (obs)", table=obs)


def _table(path: Path) -> Any:
    """Read a CSV, TSV or Parquet file into an Arrow table."""
    _refuse_missing(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".csv":
        return _text_table(path, ",")
    if suffix == ".tsv":
        return _text_table(path, "\t")
    if path.suffix == ".parquet":
        return _parquet_table(path)
    _refuse_unreadable(path, "a file of another format")


def _text_table(path: Path, delimiter: str) -> Any:
    """Read delimited text, every cell as a string, names repeated if they are."""
    header = _header(path, delimiter)
    positions = [str(i) for i in range(len(header))]
    ragged: list[int] = []

    def skip(row: Any) -> str:
        ragged.append(row.actual_columns)
        return "skip"

    try:
        table = pa.csv.read_csv(
            path,
            # One row of 60 000 genes must fit into a block.
            read_options=pa.csv.ReadOptions(
                skip_rows=1, column_names=positions, block_size=1 << 26
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter, invalid_row_handler=skip
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(positions, pa.string())
            ),
        )
    except (OSError, pa.ArrowInvalid):
        _refuse_unreadable(path, "damaged text, or text that is not UTF-8")
    if ragged:
        finding = Code.RAGGED_ROWS.finding(
            path.name,
            "rows with more or fewer cells than the header",
            f"{len(header)} cells in every row, as in the header",
            "Give the column of labels a name (in R: col.names = NA), and quote cells "
            "that hold the delimiter.",
        )
        raise DataError([finding])
    return table.rename_columns(header)


def _header(path: Path, delimiter: str) -> list[str]:
    """Return the cells of the first line, if a second line and the delimiter fit."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter)
            header, second = next(lines, []), next(lines, None)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error):
        _refuse_unreadable(path, "damaged text, or text that is not UTF-8")
    if not header or second is None:
        _refuse_empty(path, "a header and one or more rows")
    for other, name in _DELIMITERS.items():
        if sum(cell.count(other) for cell in header) >= len(header):
            finding = Code.WRONG_DELIMITER.finding(
                path.name,
                f"a header divided by {name}",
                f"{_DELIMITERS[delimiter]} in a file of this ending",
                "Export with that delimiter and decimal points, or use the ending "
                ".tsv for tabs and .csv for commas.",
            )
            raise DataError([finding])
    return header


def _parquet_table(path: Path) -> Any:
    try:
        table = pa.parquet.ParquetFile(path).read(use_threads=False)
    except (OSError, pa.ArrowException):
        _refuse_unreadable(path, "a damaged file, or no Parquet")
    if any(pa.types.is_nested(t) or pa.types.is_binary(t) for t in table.schema.types):
        _refuse_unreadable(path, "columns that hold lists or bytes")
    return table


def _labels_first(table: Any) -> Any:
    """Move the index that pandas kept in Parquet, if any, to the front."""
    kept = (table.schema.pandas_metadata or {}).get("index_columns", [])
    index = [name for name in kept if isinstance(name, str)]
    if len(index) != 1 or table.column_names.count(index[0]) != 1:
        return table
    place = table.column_names.index(index[0])
    others = [i for i in range(table.num_columns) if i != place]
    return table.select([place, *others])


def _by_position(columns: list[Any]) -> Any:
    """Return a table of columns named 0, 1, ..., because their names may repeat."""
    return pa.Table.from_arrays(columns, names=[str(i) for i in range(len(columns))])


_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        finding = Code.FILE_MISSING.finding(
            str(path),
            "no such file",
            "a file",
            "Correct the path in site.toml; relative paths start at its folder.",
        )
        raise DataError([finding])


# The two below hide the error that they come from: it may quote a row of the file.


def _refuse_unreadable(path: Path, found: str) -> NoReturn:
    finding = Code.FILE_UNREADABLE.finding(
        path.name,
        found,
        "UTF-8 text as .csv, .tsv, .csv.gz or .tsv.gz; .parquet; or, for expression, "
        ".h5ad",
        "Export the file again in one of these formats.",
    )
    raise DataError([finding]) from None


def _refuse_empty(path: Path, expected: str) -> NoReturn:
    finding = Code.FILE_EMPTY.finding(
        path.name, "nothing to read", expected, "Export the file again."
    )
    raise DataError([finding]) from None
