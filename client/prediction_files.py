"""Files in and out of a prediction: samples that passed the checks, table and card.

N samples, L labels of genes in the file, G genes kept.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from fedgex.client import sources, validation
from fedgex.client.policy import Policy
from fedgex.client.settings import DataColumns, DataSettings, SiteSettings
from fedgex.client.sources import RawCohort
from fedgex.common import genes as gene_names
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, DataError, Finding
from fedgex.common.genes import GeneTable
from fedgex.common.scale import Scale
from fedgex.common.vocabulary import Vocabulary

FORMATS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
"""Endings of a table that can be written."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a file, after the checks that a site's own data pass."""

    labels: tuple[str, ...]
    """Every sample of the file in its order, length N."""
    expression: pd.DataFrame
    """On the study's scale, checked samples by genes (symbols), float32; samples that
    the checks leave out are not here."""
    clinical: pd.DataFrame
    """One row for each row of `expression`."""
    findings: tuple[Finding, ...]
    """What the checks found, and does not stand in the way."""
    raw: RawCohort

    def as_in_file(self, vocabulary: Vocabulary) -> pd.DataFrame:
        """Return every number of the file as it is, shape (N, L).

        Columns of the vocabulary's genes bear their symbols, all others the file's
        labels. Of columns with one label and the same values the first is kept.

        Raises
        ------
        DataError
            If columns share a label and differ.
        """
        table = self.raw.expression
        by_rows = _rows_are_samples(self.raw, self.labels)
        labels = [x.strip() for x in (table.columns if by_rows else table.rows)]
        values, _, _ = validation._numbers(table.cells)
        values = values if by_rows else values.T
        if all(pa.types.is_float32(kind) for kind in table.cells.schema.types):
            values = values.astype(np.float32)  # as exact as the file, half the size
        symbols = gene_names.current_symbols(labels, self.raw.gene_table).symbols
        chosen = gene_names.one_column_each(labels, symbols, values)
        for gene, column in zip(chosen.genes, chosen.columns, strict=True):
            if gene in vocabulary.index:
                labels[column] = gene
        names, first = {labels[i] for i in chosen.columns}, set(chosen.columns)
        kept = [i for i, x in enumerate(labels) if i in first or x not in names]
        columns = pd.Index([labels[i] for i in kept])
        if columns.has_duplicates:
            raise DataError([_repeated(table.file, int(columns.duplicated().sum()))])
        return pd.DataFrame(values[:, kept], index=list(self.labels), columns=columns)


def read(
    data: DataSettings,
    scale: Scale,
    vocabulary: Vocabulary,
    clinical_columns: Collection[str],
) -> Samples:
    """Read and check the samples to predict for.

    Parameters
    ----------
    data
        The files, and what their numbers mean.
    scale
        The study's scale, to which the expression is converted.
    vocabulary
        Its genes tell which axis holds the genes, unless `data` does.
    clinical_columns
        Our names of the clinical columns to read; without any, no clinical table is.

    Raises
    ------
    DataError
        If the files cannot be used; carries all findings.
    """
    raw = sources.read(_settings(data))
    raw, columns = _only(raw, data.columns, clinical_columns)
    data = data.model_copy(update={"columns": columns})
    if data.orientation == "auto":
        orientation = _orientation(raw, vocabulary)
        data = data.model_copy(update={"orientation": orientation})
    # Predictions stay here, so a single sample is welcome and counts are told.
    cohort, findings = validation.check(raw, _settings(data), scale, ())
    table, index = raw.expression, list(cohort.patients)
    by_rows = _rows_are_samples(raw, cohort.patients)
    labels = table.rows if by_rows else table.columns
    return Samples(
        labels=tuple(label.strip() for label in labels),
        expression=pd.DataFrame(cohort.expression, index, list(cohort.genes)),
        clinical=cohort.clinical.set_axis(index, axis=0),
        findings=findings,
        raw=raw,
    )


def write(
    table: pd.DataFrame, card: Mapping[str, Any], output: Path, card_path: Path
) -> None:
    """Write a table and its card; neither path ever holds a part of its file.

    The index becomes the first column, `sample`. The card comes first, so that no table
    is without one.

    Raises
    ------
    ConfigError
        If a file cannot be written.
    """
    partial = output.with_name(f".{output.name}.partial")
    partial_card = card_path.with_name(f".{card_path.name}.partial")
    text = json.dumps(card, indent=1, ensure_ascii=False)
    try:
        partial_card.write_text(text + "\n", encoding="utf-8")
        _write_table(table.rename_axis("sample"), partial, ending(output))
        os.replace(partial_card, card_path)
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written ({error.strerror}); expected a folder that "
            "exists, with room and permission to write."
        ) from error
    finally:
        for path in (partial, partial_card):
            path.unlink(missing_ok=True)


def ending(path: Path) -> str | None:
    """Return which of `FORMATS` a path ends in, or None."""
    return next((form for form in FORMATS if path.name.endswith(form)), None)


def _settings(data: DataSettings) -> SiteSettings:
    return SiteSettings(
        name="prediction", policy=Policy.proposed(minimum_cohort=1), data=data
    )


def _only(
    raw: RawCohort, columns: DataColumns, wanted: Collection[str]
) -> tuple[RawCohort, DataColumns]:
    """Keep the wanted clinical columns, linked by the label of the sample.

    Nothing else in the table can then stand in the way, and two samples of one patient
    are two rows.
    """
    if raw.clinical is None or not wanted:
        return replace(raw, clinical=None), columns
    table = raw.clinical.table
    label = columns.sample or ("sample" if "sample" in table else columns.patient)
    named = {own: name for own, name in columns.model_dump().items() if own in wanted}
    keep = {label or "patient"} | {name or own for own, name in named.items()}
    clinical = replace(raw.clinical, table=table.loc[:, table.columns.isin(keep)])
    return replace(raw, clinical=clinical), DataColumns(patient=label, **named)


def _orientation(raw: RawCohort, vocabulary: Vocabulary) -> str:
    """Return on which axis the vocabulary's genes are; `auto` if that is not clear."""
    in_rows, in_columns = (
        _count(labels, raw.gene_table, vocabulary)
        for labels in (raw.expression.rows, raw.expression.columns)
    )
    if in_rows == in_columns:
        return "auto"
    return "samples-by-genes" if in_columns > in_rows else "genes-by-samples"


def _count(
    labels: tuple[str, ...], table: GeneTable | None, vocabulary: Vocabulary
) -> int:
    names = gene_names.current_symbols([x.strip() for x in labels], table)
    return sum(symbol in vocabulary.index for symbol in names.symbols)


def _rows_are_samples(raw: RawCohort, samples: Collection[str]) -> bool:
    table = raw.expression
    return table.rows_are_samples or set(samples) <= {x.strip() for x in table.rows}


def _write_table(table: pd.DataFrame, path: Path, form: str | None) -> None:
    if form == ".parquet":
        table.reset_index().to_parquet(path, index=False)
        return
    delimiter = "\t" if form in (".tsv", ".tsv.gz") else ","
    if form in (".csv", ".tsv"):
        table.to_csv(path, sep=delimiter)
        return
    # Without name and time inside, the same table gives the same bytes.
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        table.to_csv(text, sep=delimiter)


def _repeated(file: str, n: int) -> Finding:
    return Code.GENE_COLUMNS_DIFFER.finding(
        where=file,
        found=f"{n} columns repeat the label of another and differ from it",
        expected="one column a gene",
        action="Keep the right one, or label them apart.",
    )
