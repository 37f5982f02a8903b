"""The expression file: which axis holds the samples, cells, names of genes.

N samples, L labels of genes in the file, G genes kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.data import genes as gene_names
from fedgex.common.data.genes import GeneTable
from fedgex.common.data.patients import ambiguous, patient_key
from fedgex.common.ingestion.findings import Findings
from fedgex.common.ingestion.labels import (
    ANNOTATION,
    KINDS,
    MEASURES,
    SUMMARIES,
    SURE,
    damaged,
    kind_of,
)
from fedgex.common.ingestion.readers import RawExpression
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.ingestion.tables import to_numbers

_BARCODE = re.compile(r"(TCGA-\w{2}-\w{4})(?:-(\d{2})[A-Z]?(?:-.*)?)?", re.IGNORECASE)
_BY_GENES = "by the names of genes"
_NUMBERED = re.compile(r"(.+)\.\d+")


@dataclass(frozen=True)
class Axes:
    """Which axis of an expression file holds the samples."""

    samples: tuple[str, ...]
    """Length N."""
    labels: tuple[str, ...]
    """Of the genes, length L."""
    rows_are_samples: bool
    recognised: bool
    """Whether the labels confirm it, so that those of genes cannot be patients."""


@dataclass(frozen=True)
class Sheet:
    """Expression with samples as rows."""

    file: str
    samples: tuple[str, ...]  # length N
    labels: tuple[str, ...]  # length L, later G symbols
    values: NDArray[np.float64]  # (N, L)
    is_text: NDArray[np.bool_]  # (N, L), cells that are neither number nor missing
    commas: Code | None  # what commas in these cells are
    may_name: bool  # the labels are surely genes, not patients
    rows: NDArray[np.intp]  # (N,), place of each sample in the file
    columns: NDArray[np.intp]  # (L,), place of each label in the file

    @classmethod
    def parse(cls, table: RawExpression, axes: Axes) -> Sheet:
        """Convert the cells of a file to numbers, samples as rows."""
        values, is_text, commas = to_numbers(table.cells)
        return cls(
            file=table.file,
            samples=axes.samples,
            labels=axes.labels,
            values=values if axes.rows_are_samples else values.T,
            is_text=is_text if axes.rows_are_samples else is_text.T,
            commas=commas,
            may_name=axes.recognised,
            rows=np.arange(len(axes.samples)),
            columns=np.arange(len(axes.labels)),
        )

    def take(
        self,
        rows: NDArray[np.intp] | None = None,
        columns: NDArray[np.intp] | None = None,
    ) -> Sheet:
        """Return some samples and some labels, values in C order; None is all.

        Nothing is copied where everything is asked for.
        """
        all_rows, all_columns = map(np.arange, self.values.shape)
        rows = all_rows if rows is None else rows
        columns = all_columns if columns is None else columns
        same = np.array_equal(rows, all_rows) and np.array_equal(columns, all_columns)
        if same and self.values.flags.c_contiguous:
            return self
        return replace(
            self,
            samples=tuple(self.samples[i] for i in rows),
            labels=tuple(self.labels[i] for i in columns),
            values=self.values[np.ix_(rows, columns)],
            is_text=self.is_text[np.ix_(rows, columns)],
            rows=self.rows[rows],
            columns=self.columns[columns],
        )

    def genes(self, names: Sequence[str]) -> str:
        """Return the number of genes, and the names of ten if that is safe."""
        total = f"{len(names)} gene" if len(names) == 1 else f"{len(names)} genes"
        safe = [n for n in names if self.may_name and gene_names.is_gene_like(n)][:10]
        if not safe:
            return total
        rest = f" and {len(names) - len(safe)} more" if len(names) > len(safe) else ""
        return f"{total} ({', '.join(safe)}{rest})"

    def genes_where(self, mask: NDArray[np.bool_] | np.bool_) -> str:
        """Return the genes of a mask (L,), or with any cell of a mask (N, L)."""
        any_cell = np.atleast_2d(mask).any(axis=0)
        return self.genes([self.labels[i] for i in np.flatnonzero(any_cell)])


def orient(
    table: RawExpression,
    ids: Collection[str],
    gene_table: GeneTable | None,
    data: DataSettings,
    findings: Findings,
) -> Axes | None:
    """Find the axis of the samples by the labels; None, with a finding, if unclear.

    Parameters
    ----------
    ids
        Keys of the identifiers in the clinical table.
    """
    evidence = _evidence(table.rows, table.columns, ids, gene_table)
    if data.unknown_genes == "refuse" and (
        evidence is None or evidence[1] == _BY_GENES
    ):
        for labels in (table.rows, table.columns):
            if kind_of(labels) in SURE:
                _refuse_labels(labels, 0, table.file, findings)
                return None
    if table.rows_are_samples:
        by_rows, reason = True, "by the AnnData convention"
    elif data.orientation != "auto":
        by_rows, reason = data.orientation == "samples-by-genes", ""
    elif evidence is not None:
        by_rows, reason = evidence
    else:
        findings.add(Code.ORIENTATION_UNKNOWN, table.file)
        return None
    axis, other = ("rows", "columns") if by_rows else ("columns", "rows")
    contradicted = evidence is not None and evidence[0] != by_rows
    if contradicted or reason:
        findings.add(
            Code.ORIENTATION_CONTRADICTED
            if contradicted
            else Code.ORIENTATION_RECOGNISED,
            table.file,
            axis=axis,
            other=other,
            reason=evidence[1] if evidence is not None and contradicted else reason,
        )
    if contradicted:
        return None
    rows, columns = table.rows, table.columns
    samples, labels = (rows, columns) if by_rows else (columns, rows)
    return Axes(samples, labels, by_rows, recognised=evidence is not None)


def drop_annotation(sheet: Sheet, data: DataSettings, findings: Findings) -> Sheet:
    """Leave out labels that annotate genes or patients, or sum up reads of no gene.

    Raises
    ------
    DataError
        If nothing else is there: the file is of one sample, or a test's result.
    """
    names = [label.lower() for label in sheet.samples]
    other = np.array([n in ANNOTATION or n in MEASURES for n in names], dtype=bool)
    if len(names) and other.all():
        listed = ", ".join(sheet.samples)
        findings.add(Code.RESULT_OF_ONE_SAMPLE, sheet.file, names=listed)
        findings.refuse()
    other = np.array([n in ANNOTATION for n in names], dtype=bool)
    given = data.columns.model_dump()
    clinical = {*given, *filter(None, given.values())}
    among = np.array(
        [label in clinical or label.lower() in SUMMARIES for label in sheet.labels],
        dtype=bool,
    )
    for axis, mask, labels in (
        ("samples", other, sheet.samples),
        ("genes", among, sheet.labels),
    ):
        if mask.any():
            left_out = ", ".join(labels[i] for i in np.flatnonzero(mask))
            findings.add(Code.ANNOTATION, sheet.file, axis=axis, names=left_out)
    return sheet.take(np.flatnonzero(~other), np.flatnonzero(~among))


def is_normal(label: str) -> bool:
    """Return whether a label is the barcode of normal tissue."""
    barcode = _BARCODE.fullmatch(label)
    return barcode is not None and (barcode[2] or "").startswith("1")


def check_normal(sheet: Sheet, findings: Findings) -> None:
    """Report samples whose barcode says normal tissue."""
    normal = sum(map(is_normal, sheet.samples))
    findings.add_if(normal, Code.NORMAL_TISSUE, sheet.file)


def check_persons(sheet: Sheet, findings: Findings) -> None:
    """Report labels of one person, where no clinical table says who is who."""
    every = set(sheet.samples)
    persons = [m[1] for label in every if (m := _BARCODE.fullmatch(label))]
    numbered = [m for label in every if (m := _NUMBERED.fullmatch(label))]
    for n, how in (
        (len(persons) - len(set(persons)), "barcodes of one patient"),
        (sum(m[1] in every for m in numbered), "numbered as pandas does: P001.1"),
    ):
        where = sheet.file
        findings.add_if(n, Code.ONE_PERSON, where, how=how)


def check_samples(sheet: Sheet, findings: Findings) -> None:
    """Check that every sample has a label of its own, in one spelling."""
    labels = pd.Series(sheet.samples, dtype=object)
    missing = labels.map(patient_key) == ""
    findings.add_if(
        missing.sum(),
        Code.ID_MISSING,
        sheet.file,
        found="{n:sample} without a label",
        expected="one for every sample",
        action="Complete the labels, or remove the samples.",
    )
    repeated = labels[~missing].duplicated().sum()
    findings.add_if(repeated, Code.SAMPLE_REPEATED, sheet.file)
    findings.add_if(ambiguous(labels[~missing]), Code.ID_AMBIGUOUS, sheet.file)


def check_cells(sheet: Sheet, findings: Findings) -> None:
    """Check that every cell is a finite number or empty."""
    if sheet.is_text.any():
        if sheet.commas is not None:
            findings.add(sheet.commas, sheet.file)
        findings.add(
            Code.NOT_A_NUMBER,
            sheet.file,
            n=sheet.is_text.sum(),
            genes=sheet.genes_where(sheet.is_text),
            found="{n:cell} that are no numbers, in {genes}",
            expected="numbers, or empty cells or NA where nothing was measured",
            action="Correct the cells, or remove rows and columns that hold no "
            "expression.",
        )
    infinite = np.isinf(sheet.values)
    if infinite.any():
        findings.add(
            Code.INFINITE,
            sheet.file,
            n=infinite.sum(),
            genes=sheet.genes_where(infinite),
            found="{n:infinite value} in {genes}",
            action="Export again; log(0) is a usual cause, so add 1 before the "
            "logarithm.",
        )


def check_labels(
    sheet: Sheet, table: GeneTable | None, data: DataSettings, findings: Findings
) -> bool:
    """Check that the labels of genes name genes, as those of patients would not."""
    known, total = gene_names.count_genes(sheet.labels, table), len(sheet.labels)
    if data.unknown_genes == "keep" or known >= gene_names.KNOWN_SHARE * total:
        return True
    _refuse_labels(sheet.labels, known, sheet.file, findings)
    return False


def _refuse_labels(
    labels: Sequence[str], known: int, file: str, findings: Findings
) -> None:
    """Report labels that name no genes: what they are, and what to do."""
    kind = kind_of(labels)
    action = None if kind is None else KINDS[kind][1]
    if kind is not None and kind not in SURE:
        action = f"Correct {{orientation}} if the labels are patients; else: {action}"
    findings.add(
        Code.LABELS_NOT_GENES,
        file,
        known=known,
        total=len(labels),
        kind=kind or "labels of no known kind",
        action=action,
    )


def known_genes(
    genes: Sequence[str], data: DataSettings, fixed: Collection[str]
) -> tuple[str, ...]:
    """Return the genes whose names may leave: HGNC's, and those that a study fixes."""
    if data.unknown_genes == "keep" or data.hgnc_table is not None:
        return tuple(genes)  # all of them are the table's
    table, asked = GeneTable.packaged(), set(fixed)
    return tuple(gene for gene in genes if gene in asked or table.knows(gene))


def one_column_per_gene(
    sheet: Sheet, table: GeneTable | None, findings: Findings
) -> Sheet:
    """Rename labels to current symbols and keep one column of each."""
    names = gene_names.current_symbols(sheet.labels, table)
    chosen = gene_names.one_column_each(sheet.labels, names.symbols, sheet.values)
    dates = {label: gene for label in names.unmapped if (gene := damaged(label))}
    if dates:
        likely = ", ".join(sorted(set(dates.values()))) if sheet.may_name else "genes"
        findings.add(Code.GENES_AS_DATES, sheet.file, count=len(dates), likely=likely)
    unmapped = tuple(label for label in names.unmapped if label not in dates)
    known = "Nothing if they do not matter; a newer {hgnc_table} may know them."
    actions = {Code.GENES_UNMAPPED: known} if table is not None else {}
    for code, genes in (
        (Code.GENES_UNMAPPED, unmapped),
        (Code.GENES_AMBIGUOUS, names.ambiguous),
        (Code.GENES_UPDATED, names.updated),
        (Code.GENES_REPEATED, chosen.repeated),
        (Code.GENES_CONTRADICTORY, chosen.contradictory),
    ):
        if genes:
            named, action = sheet.genes(genes), actions.get(code)
            findings.add(code, sheet.file, genes=named, action=action)
    if not chosen.genes:
        findings.add(Code.NO_GENES, sheet.file)
    kept = sheet.take(columns=np.array(chosen.columns, dtype=np.intp))
    return replace(kept, labels=chosen.genes)


def drop_empty(sheet: Sheet, findings: Findings) -> tuple[Sheet, NDArray[np.intp]]:
    """Leave out samples and genes without a value; return also the rows that stay."""
    measured = ~np.isnan(sheet.values)
    samples, genes = measured.any(axis=1), measured.any(axis=0)
    findings.add_if((~samples).sum(), Code.SAMPLES_EMPTY, sheet.file)
    if not genes.all():
        findings.add(Code.GENES_EMPTY, sheet.file, genes=sheet.genes_where(~genes))
    rows = np.flatnonzero(samples)
    return sheet.take(rows, np.flatnonzero(genes)), rows


def check_values(sheet: Sheet, data: DataSettings, findings: Findings) -> None:
    """Report constant genes, and genes and samples with many missing cells."""
    if not sheet.values.size:
        return
    least = np.fmin.reduce(sheet.values, axis=0)
    constant = least == np.fmax.reduce(sheet.values, axis=0)
    if constant.any() and len(sheet.samples) > 1:
        findings.add(Code.GENES_CONSTANT, sheet.file, genes=sheet.genes_where(constant))
    missing, share = np.isnan(sheet.values), data.max_missing_per_gene
    often = missing.mean(axis=0) > share
    if often.any():
        genes = sheet.genes_where(often)
        findings.add(Code.GENES_OFTEN_MISSING, sheet.file, genes=genes, share=share)
    share = data.max_missing_per_patient
    sparse = int((missing.mean(axis=1) > share).sum())
    findings.add_if(sparse, Code.SAMPLES_OFTEN_MISSING, sheet.file, share=share)


def _evidence(
    rows: Sequence[str],
    columns: Sequence[str],
    ids: Collection[str],
    table: GeneTable | None,
) -> tuple[bool, str] | None:
    """Return whether the rows are samples, and why; None without evidence."""
    in_rows, in_columns = (
        sum(patient_key(x) in ids for x in axis) if ids else 0
        for axis in (rows, columns)
    )
    if in_rows != in_columns:
        return in_rows > in_columns, "by the identifiers in the clinical table"
    in_rows, in_columns = (gene_names.count_genes(x, table) for x in (rows, columns))
    if in_rows != in_columns:
        return in_columns > in_rows, _BY_GENES
    return None
