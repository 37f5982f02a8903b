"""The files that `site.toml` names, read and not yet checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from fedgex.common.codes import Code
from fedgex.common.data.genes import GeneTable
from fedgex.common.errors import ConfigError, DataError, Finding
from fedgex.common.ingestion import labels
from fedgex.common.ingestion.annotated import read_h5ad
from fedgex.common.ingestion.content import look
from fedgex.common.ingestion.findings import Advice, Findings, refuse
from fedgex.common.ingestion.platform import read_platform, to_symbols
from fedgex.common.ingestion.samples.folder import read_folder
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.ingestion.tables import by_position, labels_first, read_table

_Content = TypeVar("_Content")


@dataclass(frozen=True, kw_only=True)
class RawExpression:
    """An unchecked expression file; its samples may be rows or columns."""

    file: str
    """Name of the file."""
    rows: tuple[str, ...]
    """Labels of the rows, from the first column, trimmed."""
    columns: tuple[str, ...]
    """Labels of the columns, from the header, trimmed; with duplicates."""
    cells: pa.Table
    """One column for each of `columns`, named by position; text stays text."""
    rows_are_samples: bool
    """True where the format says so (AnnData)."""


@dataclass(frozen=True, kw_only=True)
class RawClinical:
    """An unchecked clinical table."""

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
    notes: tuple[Finding, ...] = ()
    """What was recognised in the files."""


def read(data: DataSettings, advice: Advice | None = None) -> RawCohort:
    """Read all files that the settings name.

    Raises
    ------
    DataError
        If any file is missing or cannot be read; carries the findings of all files.
    """
    findings = Findings(advice=advice or Advice())
    notes = Findings()
    if data.sample_sheet is not None and not data.sample_sheet.is_file():
        findings.add(Code.FILE_MISSING, str(data.sample_sheet))
        findings.refuse()

    def read_with(
        reader: Callable[[Path, list[str]], _Content], path: Path | None
    ) -> _Content | None:
        if path is None:
            return None
        if not path.is_file() and not (path.is_dir() and path == data.expression):
            findings.add(Code.FILE_MISSING, str(path))
            return None
        seen: list[str] = []
        try:
            content = reader(path, seen)
        except DataError as error:
            findings.found.extend(error.findings)
        except Exception as error:  # each library has its own for a damaged file
            found = f"a damaged file ({type(error).__name__})"
            findings.add(Code.FILE_UNREADABLE, path.name, found=found)
        else:
            if seen:
                notes.add(Code.FORMAT_RECOGNISED, path.name, kinds=", ".join(seen))
            return content
        return None

    read_expression = partial(_read_expression, data=data)
    expression, obs = read_with(read_expression, data.expression) or (None, None)
    clinical = read_with(_read_clinical, data.clinical)
    read_gene_table = partial(_read_gene_table, advice=findings.advice)
    gene_table = read_with(read_gene_table, data.hgnc_table)
    opt_outs = read_with(_read_opt_outs, data.opt_outs)
    platform = read_with(read_platform, data.platform_table)
    if findings.found or expression is None:
        findings.refuse()
    if platform is not None and data.platform_table is not None:
        expression = to_symbols(expression, platform, data.platform_table, notes)
    return RawCohort(
        expression=expression,
        clinical=clinical or obs,
        gene_table=gene_table,
        opt_outs=opt_outs,
        notes=tuple(notes.found),
    )


def _read_expression(
    path: Path, seen: list[str], data: DataSettings
) -> tuple[RawExpression, RawClinical | None]:
    """Read an expression file, and the clinical table that AnnData may carry."""
    if path.is_dir():
        return _read_samples(path, seen, data), None
    if look(path).kind == "hdf5":
        return _read_anndata(path, seen, data)
    table = labels.symbols_first(labels_first(read_table(path, seen)), seen)
    table = labels.without_second_header(table, seen)
    if table.num_columns < 2 or table.num_rows == 0:
        refuse(
            Code.FILE_EMPTY,
            path,
            expected="a row of labels, a column of labels, and values",
        )
    if labels.begins_with_values(table.column_names):
        refuse(Code.HEADER_IS_VALUES, path)
    names = table.column(0).cast(pa.string()).to_pylist()
    rows = tuple((name or "").strip() for name in names)
    columns = tuple(name.strip() for name in table.column_names[1:])
    expression = RawExpression(
        file=path.name,
        rows=labels.unjoined(rows, seen),
        columns=labels.unjoined(columns, seen),
        cells=by_position(table.columns[1:]),
        rows_are_samples=False,
    )
    return expression, None


def _read_samples(path: Path, seen: list[str], data: DataSettings) -> RawExpression:
    """Read a folder with files of one sample each."""
    matrix = read_folder(path, data.sample_sheet, data.scale, data.value_column, seen)
    return RawExpression(
        file=path.name,
        rows=matrix.genes,
        columns=matrix.samples,
        cells=matrix.cells,
        rows_are_samples=False,
    )


def _read_clinical(path: Path, seen: list[str]) -> RawClinical:
    """Read a clinical table; an index that pandas kept in Parquet is a column."""
    table = read_table(path, seen)
    if table.num_rows == 0:
        refuse(Code.FILE_EMPTY, path, expected="a header and one row a patient")
    frame = table.to_pandas()
    if frame.index.name is not None or not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    return RawClinical(file=path.name, table=frame.astype("string"))


def _read_gene_table(path: Path, _seen: list[str], advice: Advice) -> GeneTable:
    try:
        return GeneTable.read(path)
    except ConfigError:
        findings = Findings(advice=advice)
        findings.add(Code.GENE_TABLE_UNUSABLE, path.name)
        findings.refuse()


def _read_opt_outs(path: Path, _seen: list[str]) -> frozenset[str]:
    """Read identifiers, one a line; # begins a comment at a line's start or a space."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        refuse(
            Code.FILE_UNREADABLE,
            path,
            expected="UTF-8 text, one patient identifier a line",
            action="Write the file again; until then no patient's data are used.",
        )
    identifiers = (re.split(r"(?:^|\s)#", line)[0].strip() for line in lines)
    return frozenset(filter(None, identifiers))


def _read_anndata(
    path: Path, seen: list[str], data: DataSettings
) -> tuple[RawExpression, RawClinical | None]:
    """Read X, or a layer, and obs if it has any of the clinical columns."""
    X, genes, obs = read_h5ad(path, data.layer, seen)
    names = pd.Series(obs.index.astype(str), dtype="string")
    expression = RawExpression(
        file=path.name,
        rows=tuple(name.strip() for name in names),
        columns=tuple(name.strip() for name in genes),
        cells=by_position([pa.array(column) for column in np.asfortranarray(X).T]),
        rows_are_samples=True,
    )
    columns = data.columns
    wanted = {name or own for own, name in columns.model_dump().items()}
    if not wanted & set(obs.columns):
        return expression, None
    obs = obs.astype("string").reset_index(drop=True)
    obs[columns.sample or "sample"] = names  # whatever obs says, rows of X go by these
    if columns.patient is None and "patient" not in obs:
        obs["patient"] = names
    return expression, RawClinical(file=f"{path.name} (obs)", table=obs)
