"""The files that `site.toml` names, read and not yet checked."""

from __future__ import annotations

import re
import warnings
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
from fedgex.common.errors import ConfigError, DataError
from fedgex.common.ingestion.findings import Advice, Findings
from fedgex.common.ingestion.settings import DataColumns, DataSettings
from fedgex.common.ingestion.tables import by_position, labels_first, read_table, refuse

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


def read(data: DataSettings, advice: Advice | None = None) -> RawCohort:
    """Read all files that the settings name.

    Raises
    ------
    DataError
        If any file is missing or cannot be read; carries the findings of all files.
    """
    findings = Findings(advice=advice or Advice())

    def read_with(
        reader: Callable[[Path], _Content], path: Path | None
    ) -> _Content | None:
        if path is None:
            return None
        if not path.is_file():
            findings.add(Code.FILE_MISSING, str(path))
            return None
        try:
            return reader(path)
        except DataError as error:
            findings.found.extend(error.findings)
        except Exception as error:  # each library has its own for a damaged file
            found = f"a damaged file ({type(error).__name__})"
            findings.add(Code.FILE_UNREADABLE, path.name, found=found)
        return None

    read_expression = partial(_read_expression, columns=data.columns)
    expression, obs = read_with(read_expression, data.expression) or (None, None)
    clinical = read_with(_read_clinical, data.clinical)
    read_gene_table = partial(_read_gene_table, advice=findings.advice)
    gene_table = read_with(read_gene_table, data.hgnc_table)
    opt_outs = read_with(_read_opt_outs, data.opt_outs)
    if findings.found or expression is None:
        findings.refuse()
    return RawCohort(
        expression=expression,
        clinical=clinical or obs,
        gene_table=gene_table,
        opt_outs=opt_outs,
    )


def _read_expression(
    path: Path, columns: DataColumns
) -> tuple[RawExpression, RawClinical | None]:
    """Read an expression file, and the clinical table that AnnData may carry."""
    if path.suffix == ".h5ad":
        return _read_anndata(path, columns)
    table = labels_first(read_table(path))
    if table.num_columns < 2 or table.num_rows == 0:
        refuse(
            Code.FILE_EMPTY,
            path,
            expected="a row of labels, a column of labels, and values",
        )
    labels = table.column(0).cast(pa.string()).to_pylist()
    expression = RawExpression(
        file=path.name,
        rows=tuple((label or "").strip() for label in labels),
        columns=tuple(label.strip() for label in table.column_names[1:]),
        cells=by_position(table.columns[1:]),
        rows_are_samples=False,
    )
    return expression, None


def _read_clinical(path: Path) -> RawClinical:
    """Read a clinical table; an index that pandas kept in Parquet is a column."""
    table = read_table(path)
    if table.num_rows == 0:
        refuse(Code.FILE_EMPTY, path, expected="a header and one row a patient")
    frame = table.to_pandas()
    if frame.index.name is not None or not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    return RawClinical(file=path.name, table=frame.astype("string"))


def _read_gene_table(path: Path, advice: Advice) -> GeneTable:
    try:
        return GeneTable.read(path)
    except ConfigError:
        findings = Findings(advice=advice)
        findings.add(Code.GENE_TABLE_UNUSABLE, path.name)
        findings.refuse()


def _read_opt_outs(path: Path) -> frozenset[str]:
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
    path: Path, columns: DataColumns
) -> tuple[RawExpression, RawClinical | None]:
    """Read X and, if it has any of the clinical columns, obs."""
    import anndata  # a second to import, and most hospitals need no AnnData

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # repeated names become findings
            data = anndata.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError):
        refuse(Code.FILE_UNREADABLE, path, found="a damaged file, or no AnnData")
    if data.X is None or 0 in data.shape:
        refuse(Code.FILE_EMPTY, path, expected="values in X")
    X = data.to_df().to_numpy()  # dense, whatever X was
    names = pd.Series(data.obs_names.astype(str), dtype="string")
    expression = RawExpression(
        file=path.name,
        rows=tuple(name.strip() for name in names),
        columns=tuple(name.strip() for name in data.var_names.astype(str)),
        cells=by_position([pa.array(column) for column in np.asfortranarray(X).T]),
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
