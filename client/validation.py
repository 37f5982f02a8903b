"""RawCohort → Cohort, or every finding at once.

Each check is a small function that returns findings. Files are named in them, columns
and genes too, but never a patient: counts of patients, samples and cells below the
site's minimum cohort read "fewer than".

N samples, L labels of genes in the file, G genes kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedgex.client import sources
from fedgex.client.settings import DataSettings, SiteSettings
from fedgex.client.sources import RawClinical, RawCohort
from fedgex.common import genes as gene_names
from fedgex.common import scale as scales
from fedgex.common.codes import Code
from fedgex.common.cohort import CLINICAL_COLUMNS, Cohort
from fedgex.common.errors import DataError, Finding
from fedgex.common.genes import GeneTable
from fedgex.common.scale import CONVERTIBLE, Scale

MISSING = ("", "NA", "N/A", "na", "n/a", "NaN", "nan", "NULL", "null", "None")
"""Cells that say that nothing is known."""

DAYS_PER = {"days": 1.0, "months": 30.4375, "years": 365.25}
"""Length of each unit of time, days."""

LONGEST_LIFE = 120
"""Years; no age and no follow-up is longer."""

SEXES = {"female": "female", "f": "female", "male": "male", "m": "male"}
"""Accepted spellings, in any case."""

NEEDS: Mapping[str, tuple[str, ...]] = {
    "pretraining": (),
    "classification": ("cancer_type",),
    "survival": ("duration", "event", "cancer_type"),
}
"""Clinical columns without which a site contributes nothing to a task."""

_NUMERIC_COLUMNS = ("duration", "event", "age", "library_size")


def load_cohort(
    settings: SiteSettings, canonical_scale: Scale, tasks: Collection[str]
) -> tuple[Cohort, tuple[Finding, ...]]:
    """Read the site's files and check them; see `check`."""
    return check(sources.read(settings), settings, canonical_scale, tasks)


def assay(settings: SiteSettings) -> tuple[str, ...]:
    """Return the genes that the expression file has columns for, sorted.

    Unlike a cohort's genes they depend on labels alone, never on a patient's value.

    Raises
    ------
    DataError
        If the files cannot be read, or do not show which axis the samples are.
    """
    raw = sources.read(settings)
    clinical, _ = _name_clinical_columns(raw.clinical, settings.data)
    sheet, findings = _orient(raw, clinical, settings.data)
    if sheet is None:
        raise DataError(findings)
    names = gene_names.current_symbols(sheet.labels, raw.gene_table)
    return tuple(sorted({name for name in names.symbols if name is not None}))


def check(
    raw: RawCohort, settings: SiteSettings, scale: Scale, tasks: Collection[str]
) -> tuple[Cohort, tuple[Finding, ...]]:
    """Turn files as they are into a checked cohort.

    Parameters
    ----------
    raw
        The site's files.
    settings
        What the hospital says of them.
    scale
        Canonical scale of the study, to which the expression is converted.
    tasks
        Tasks that the cohort is for; what they lack is a warning.

    Returns
    -------
    tuple
        The cohort, and what was found that does not stand in the way.

    Raises
    ------
    DataError
        If anything stands in the way; carries all findings, also the milder ones.
    """
    tell = _Tell(settings.policy.minimum_cohort)
    clinical, findings = _name_clinical_columns(raw.clinical, settings.data)
    if clinical is not None:
        findings += _check_ids(clinical, tell)
    sheet, more = _orient(raw, clinical, settings.data)
    findings += more
    if sheet is None:
        findings += [] if clinical is None else _clinical(clinical, settings, tell)[1]
        raise DataError(findings)

    findings += _check_samples(sheet, tell)
    sheet, linked, more = _link(sheet, clinical, tell)
    findings += more
    if raw.opt_outs is not None and (clinical is None or linked is not None):
        sheet, linked, more = _leave_out(sheet, linked, raw.opt_outs, tell)
        findings += more
    findings += _check_cells(sheet, tell)
    sheet, more = _one_column_per_gene(sheet, raw.gene_table)
    findings += more
    if clinical is not None and linked is None:
        findings += _check_scale(sheet, settings.data.scale, tell)
        findings += _clinical(clinical, settings, tell)[1]
        raise DataError(findings)

    sheet, linked, more = _drop_empty(sheet, linked, tell)
    findings += more + _check_values(sheet, settings.data, tell)
    table = pd.DataFrame(index=range(len(sheet.samples)))
    if linked is not None:
        table, more = _clinical(linked, settings, tell)
        findings += more
    values, more = _on_scale(sheet, settings.data.scale, scale, table, tell)
    findings += more

    ids = sheet.samples if linked is None else tuple(linked.text["patient"])
    cohort = Cohort(
        patients=ids,
        genes=sheet.labels,
        expression=values,
        clinical=table[[name for name in CLINICAL_COLUMNS if name in table]],
    )
    findings += _check_cohort(cohort, sheet.file, tasks, tell)
    if any(finding.severity == "error" for finding in findings):
        raise DataError(findings)
    return cohort, tuple(findings)


@dataclass(frozen=True)
class _Tell:
    """How counts and names are told without telling on anybody."""

    floor: int

    def count(self, n: int, noun: str) -> str:
        """Return `n nouns`, or `fewer than ...` below the minimum cohort."""
        if n < self.floor:
            return f"fewer than {self.floor} {noun}s"
        return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


@dataclass(frozen=True)
class _Sheet:
    """Expression with samples as rows."""

    file: str
    samples: tuple[str, ...]  # length N
    labels: tuple[str, ...]  # length L, later G symbols
    values: NDArray[np.float64]  # (N, L)
    is_text: NDArray[np.bool_]  # (N, L), cells that are neither number nor missing
    has_commas: bool
    may_name: bool  # the labels are surely genes, not patients

    def take(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> _Sheet:
        """Return some samples and some labels."""
        return replace(
            self,
            samples=tuple(self.samples[i] for i in rows),
            labels=tuple(self.labels[i] for i in columns),
            values=self.values[np.ix_(rows, columns)],
            is_text=self.is_text[np.ix_(rows, columns)],
        )

    def genes(self, names: Sequence[str]) -> str:
        """Return how many genes, and the first ten where naming is safe."""
        said = f"{len(names)} gene" if len(names) == 1 else f"{len(names)} genes"
        safe = [n for n in names if self.may_name and gene_names.is_gene_like(n)][:10]
        if not safe:
            return said
        rest = f" and {len(names) - len(safe)} more" if len(names) > len(safe) else ""
        return f"{said} ({', '.join(safe)}{rest})"

    def genes_where(self, mask: NDArray[np.bool_] | np.bool_) -> str:
        """Return the genes of a mask (L,), or with any cell of a mask (N, L)."""
        any_cell = np.atleast_2d(mask).any(axis=0)
        return self.genes([self.labels[i] for i in np.flatnonzero(any_cell)])


@dataclass(frozen=True)
class _Clinical:
    """Clinical table under our own column names, text, None where missing."""

    file: str
    names: Mapping[str, str]  # our name of each column: its name in the file
    text: pd.DataFrame

    @property
    def key(self) -> str:
        """Our name of the column that holds the labels of the expression file."""
        return "sample" if "sample" in self.names else "patient"

    def where(self, column: str) -> str:
        return f'{self.file}: column "{self.names[column]}"'

    def take(self, rows: NDArray[np.intp]) -> _Clinical:
        return replace(self, text=self.text.iloc[rows].reset_index(drop=True))


# ---- the clinical table: columns and identifiers ----


def _name_clinical_columns(
    raw: RawClinical | None, data: DataSettings
) -> tuple[_Clinical | None, list[Finding]]:
    """Find each column by the name in the settings, or by our own."""
    if raw is None:
        return None, []
    findings, names = [], {}
    for own, named in data.columns.model_dump().items():
        name = named or own
        occurrences = list(raw.table.columns).count(name)
        if occurrences == 1:
            names[own] = name
        elif occurrences > 1:
            finding = Code.COLUMN_REPEATED.finding(
                raw.file,
                f'column "{name}" occurs {occurrences} times',
                "each name once",
                "Rename or remove the others.",
            )
            findings.append(finding)
        elif named or own == "patient":
            finding = Code.COLUMN_MISSING.finding(
                raw.file,
                f'no column "{name}"',
                "the columns that site.toml names, and one for the patient",
                f"Set data.columns.{own} to the name in the file's header.",
            )
            findings.append(finding)
    if "patient" not in names:
        return None, findings
    text = raw.table[list(names.values())].set_axis(list(names), axis=1)
    text = text.apply(lambda column: column.astype("string").str.strip())
    text = text.astype(object).mask(text.isna() | text.isin(MISSING), None)
    text = text.dropna(how="all").reset_index(drop=True)
    return _Clinical(raw.file, names, text), findings


def _check_ids(clinical: _Clinical, tell: _Tell) -> list[Finding]:
    """Every row names its patient, and no row comes twice."""
    findings = []
    missing = int(clinical.text["patient"].isna().sum())
    if missing:
        finding = Code.ID_MISSING.finding(
            clinical.where("patient"),
            f"{tell.count(missing, 'row')} without an identifier",
            "one in every row",
            "Complete the column, or remove the rows.",
        )
        findings.append(finding)
    key = clinical.text[clinical.key].dropna()
    repeated = int(key.duplicated().sum())
    if repeated:
        finding = Code.CLINICAL_ROW_REPEATED.finding(
            clinical.where(clinical.key),
            f"{tell.count(repeated, 'row')} repeat an identifier",
            f"one row a {clinical.key}",
            "Keep one row each; for several samples of a patient, add a column with "
            "the label of the sample and name it as data.columns.sample.",
        )
        findings.append(finding)
    return findings


# ---- expression: orientation, cells, samples ----


def _orient(
    raw: RawCohort, clinical: _Clinical | None, data: DataSettings
) -> tuple[_Sheet | None, list[Finding]]:
    """Put samples into the rows, by what the labels are."""
    table = raw.expression
    rows = [label.strip() for label in table.rows]
    columns = [label.strip() for label in table.columns]
    ids: set[str] = set()
    if clinical is not None:
        ids = set(clinical.text["patient"]) | set(clinical.text[clinical.key])
    evidence = _evidence(rows, columns, ids, raw.gene_table)
    if table.rows_are_samples:
        by_rows, reason = True, "by the AnnData convention"
    elif data.orientation != "auto":
        by_rows, reason = data.orientation == "samples-by-genes", ""
    elif evidence is not None:
        by_rows, reason = evidence
    else:
        finding = Code.ORIENTATION_UNKNOWN.finding(
            table.file,
            "neither rows nor columns are recognised as samples or genes",
            "labels that occur in the clinical table, or names of genes",
            "Check the labels on both sides, or set data.orientation.",
        )
        return None, [finding]
    if evidence is not None and evidence[0] != by_rows:
        finding = Code.ORIENTATION_CONTRADICTED.finding(
            table.file,
            f"{'columns' if by_rows else 'rows'} look like samples {evidence[1]}",
            f"samples as {'rows' if by_rows else 'columns'}, as declared",
            'Correct data.orientation (or set it to "auto"), or transpose the data.',
        )
        return None, [finding]
    findings = []
    if reason:
        axis, other = ("rows", "columns") if by_rows else ("columns", "rows")
        finding = Code.ORIENTATION_RECOGNISED.finding(
            table.file,
            f"{axis} are samples and {other} are genes, {reason}",
            "either orientation",
            "Set data.orientation if this is wrong.",
        )
        findings.append(finding)
    values, is_text, has_commas = _numbers(table.cells)
    sheet = _Sheet(
        file=table.file,
        samples=tuple(rows if by_rows else columns),
        labels=tuple(columns if by_rows else rows),
        values=values if by_rows else values.T,
        is_text=is_text if by_rows else is_text.T,
        has_commas=has_commas,
        may_name=evidence is not None,
    )
    return sheet, findings


def _evidence(
    rows: Sequence[str],
    columns: Sequence[str],
    ids: Collection[str],
    table: GeneTable | None,
) -> tuple[bool, str] | None:
    """Return whether the rows are samples, and why; None if nothing tells."""
    in_rows, in_columns = (sum(x in ids for x in axis) for axis in (rows, columns))
    if in_rows != in_columns:
        return in_rows > in_columns, "by the identifiers in the clinical table"
    in_rows, in_columns = (gene_names.count_genes(x, table) for x in (rows, columns))
    if in_rows != in_columns:
        return in_columns > in_rows, "by the names of genes"
    return None


def _numbers(cells: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_], bool]:
    """Return an Arrow table as numbers, which cells are text, and any 1,5 among them.

    Text is converted many columns at a time: calls on 20 000 single columns would take
    ten times as long.
    """
    shape = (cells.num_columns, cells.num_rows)
    values, is_text = np.empty(shape), np.zeros(shape, dtype=bool)
    text = []
    for i, column in enumerate(cells.columns):
        if _is_number(column.type):
            values[i] = column.cast(pa.float64(), safe=False).to_numpy()
        else:
            text.append(i)
    has_commas = False
    width = max(1, 1_000_000 // max(1, cells.num_rows))
    for start in range(0, len(text), width):
        these = text[start : start + width]
        chunks = [c.cast(pa.string()) for i in these for c in cells.column(i).chunks]
        parsed, stray, commas = _parse(pa.concat_arrays(chunks))
        values[these] = parsed.reshape(len(these), -1)
        is_text[these] = stray.reshape(len(these), -1)
        has_commas |= commas
    return values.T, is_text.T, has_commas


def _is_number(kind: Any) -> bool:
    is_float, is_int = pa.types.is_floating(kind), pa.types.is_integer(kind)
    return bool(is_float or is_int or pa.types.is_decimal(kind))


def _parse(text: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_], bool]:
    """Return an Arrow array of text as numbers, which cells are none, any 1,5."""
    text = pc.utf8_trim_whitespace(text)
    missing = pc.is_in(text, value_set=pa.array(MISSING))
    text = pc.if_else(missing, None, text)
    try:
        values = text.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values, np.zeros(len(values), dtype=bool), False
    except pa.ArrowInvalid:
        cells = pd.Series(text.to_numpy(zero_copy_only=False), dtype=object)
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
    stray = cells.notna().to_numpy() & np.isnan(values)
    commas = cells[stray].str.fullmatch(r"[-+]?\d+,\d+([eE][-+]?\d+)?").any()
    return values, stray, bool(commas)


def _check_samples(sheet: _Sheet, tell: _Tell) -> list[Finding]:
    """Every sample has a label, and no label comes twice."""
    findings = []
    labels = pd.Series(sheet.samples)
    missing = int((labels == "").sum())
    if missing:
        finding = Code.ID_MISSING.finding(
            sheet.file,
            f"{tell.count(missing, 'sample')} without a label",
            "one for every sample",
            "Complete the labels, or remove the samples.",
        )
        findings.append(finding)
    repeated = int(labels[labels != ""].duplicated().sum())
    if repeated:
        finding = Code.SAMPLE_REPEATED.finding(
            sheet.file,
            f"{tell.count(repeated, 'sample')} repeat a label",
            "each sample once",
            "Keep one of each; for several samples of a patient, label them apart and "
            "name a data.columns.sample.",
        )
        findings.append(finding)
    return findings


def _link(
    sheet: _Sheet, clinical: _Clinical | None, tell: _Tell
) -> tuple[_Sheet, _Clinical | None, list[Finding]]:
    """Keep the samples that have a clinical row, and that row for each of them.

    The second result is None if there is no clinical table or no sample is in it.
    """
    if clinical is None:
        return sheet, None, []
    first = clinical.text[clinical.key].dropna().drop_duplicates()
    row_of = {label: row for row, label in first.items()}
    linked = [i for i, label in enumerate(sheet.samples) if label in row_of]
    where = f"{sheet.file} and {clinical.file}"
    if not linked:
        finding = Code.NOTHING_LINKED.finding(
            where,
            "no sample has a clinical row",
            f"labels of samples in {clinical.where(clinical.key)}",
            "Name the column with these labels as data.columns.sample or, if they are "
            "the patients' own, as data.columns.patient.",
        )
        return sheet, None, [finding]
    findings = []
    lost = len(sheet.samples) - len(linked)
    if lost:
        finding = Code.SAMPLE_WITHOUT_CLINICAL.finding(
            where,
            f"{tell.count(lost, 'sample')} without a clinical row, left out",
            "a clinical row for every sample",
            "Add the rows (all but the identifier may be empty), if they belong.",
        )
        findings.append(finding)
    unused = len(clinical.text) - len({sheet.samples[i] for i in linked})
    if unused:
        finding = Code.CLINICAL_WITHOUT_SAMPLE.finding(
            where,
            f"{tell.count(unused, 'clinical row')} without a sample, left out",
            "rows without a sample are fine",
            "Nothing, unless their samples should be there.",
        )
        findings.append(finding)
    rows = np.array([row_of[sheet.samples[i]] for i in linked], dtype=np.intp)
    kept = sheet.take(np.array(linked, dtype=np.intp), np.arange(len(sheet.labels)))
    used = clinical.take(rows)
    return kept, used, findings + _check_patients(used, tell)


def _leave_out(
    sheet: _Sheet, clinical: _Clinical | None, opt_outs: Set[str], tell: _Tell
) -> tuple[_Sheet, _Clinical | None, list[Finding]]:
    """Leave out the patients who opted out; few and none look the same."""
    ids = sheet.samples if clinical is None else tuple(clinical.text["patient"])
    rows = np.array([i for i, x in enumerate(ids) if x not in opt_outs], dtype=np.intp)
    n_left_out = len(opt_outs & set(ids))
    finding = Code.OPTED_OUT.finding(
        sheet.file,
        "patients who opted out are left out: "
        + (str(n_left_out) if n_left_out >= tell.floor else "suppressed"),
        "the patients of data.opt_outs, who may be unknown here",
        "Nothing.",
    )
    kept = sheet.take(rows, np.arange(len(sheet.labels)))
    return kept, None if clinical is None else clinical.take(rows), [finding]


def _check_patients(clinical: _Clinical, tell: _Tell) -> list[Finding]:
    """One patient may have several samples, with the same follow-up."""
    of_patient = clinical.text.groupby("patient")
    several = int((of_patient.size() > 1).sum())
    if not several or clinical.key == "patient":
        return []
    finding = Code.SEVERAL_SAMPLES.finding(
        clinical.where("patient"),
        f"{tell.count(several, 'patient')} with several samples",
        "one sample or more a patient",
        "Nothing: a patient's samples count, and are split, as one patient.",
    )
    findings = [finding]
    fixed = [c for c in ("duration", "event", "sex") if c in clinical.names]
    differ = of_patient[fixed].nunique() > 1  # one row a patient
    contradictory = int(differ.any(axis=1).sum())
    if contradictory:
        finding = Code.PATIENT_CONTRADICTORY.finding(
            clinical.where("patient"),
            f"{tell.count(contradictory, 'patient')} whose rows differ in "
            f"{', '.join(clinical.names[c] for c in fixed)}",
            "the same follow-up and sex in all rows of a patient",
            "Correct the rows.",
        )
        findings.append(finding)
    return findings


def _check_cells(sheet: _Sheet, tell: _Tell) -> list[Finding]:
    """Every cell is a finite number or empty."""
    findings = []
    if sheet.is_text.any():
        if sheet.has_commas:
            finding = Code.DECIMAL_COMMA.finding(
                sheet.file,
                "numbers with a decimal comma",
                "decimal points",
                "Export with decimal points (1.5, not 1,5).",
            )
            findings.append(finding)
        finding = Code.NOT_A_NUMBER.finding(
            sheet.file,
            f"{tell.count(int(sheet.is_text.sum()), 'cell')} that are no numbers, in "
            f"{sheet.genes_where(sheet.is_text)}",
            "numbers, or empty cells or NA where nothing was measured",
            "Correct the cells, or remove rows and columns that hold no expression.",
        )
        findings.append(finding)
    infinite = np.isinf(sheet.values)
    if infinite.any():
        finding = Code.INFINITE.finding(
            sheet.file,
            f"{tell.count(int(infinite.sum()), 'infinite value')} in "
            f"{sheet.genes_where(infinite)}",
            "finite numbers",
            "Export again; log(0) is a usual cause, so add 1 before the logarithm.",
        )
        findings.append(finding)
    return findings


# ---- genes ----


def _one_column_per_gene(
    sheet: _Sheet, table: GeneTable | None
) -> tuple[_Sheet, list[Finding]]:
    """Rename labels to current symbols and keep one column of each."""
    names = gene_names.current_symbols(sheet.labels, table)
    chosen = gene_names.one_column_each(sheet.labels, names.symbols, sheet.values)
    findings = _check_names(sheet, names, has_table=table is not None)
    if chosen.repeated:
        finding = Code.GENES_REPEATED.finding(
            sheet.file,
            f"{sheet.genes(chosen.repeated)} with several columns, of which one is "
            "kept: the one under the current symbol, or one of equal ones",
            "one column a gene",
            "Nothing, unless another column is the right one.",
        )
        findings.append(finding)
    if chosen.contradictory:
        finding = Code.GENES_CONTRADICTORY.finding(
            sheet.file,
            f"{sheet.genes(chosen.contradictory)} with several columns that differ, "
            "left out",
            "one column a gene",
            "Keep the right column, or combine them as fits your pipeline.",
        )
        findings.append(finding)
    if not chosen.genes:
        finding = Code.NO_GENES.finding(
            sheet.file,
            "no gene is left",
            "HGNC symbols, or Ensembl gene ids and a data.hgnc_table",
            "Check the labels of the genes; Ensembl ids need HGNC's complete set.",
        )
        findings.append(finding)
    columns = np.array(chosen.columns, dtype=np.intp)
    kept = sheet.take(np.arange(len(sheet.samples)), columns)
    return replace(kept, labels=chosen.genes), findings


def _check_names(
    sheet: _Sheet, names: gene_names.GeneNames, *, has_table: bool
) -> list[Finding]:
    """Every label names one gene, by its current symbol."""
    findings = []
    if names.unmapped:
        finding = Code.GENES_UNMAPPED.finding(
            sheet.file,
            f"{sheet.genes(names.unmapped)} that have no known symbol, left out",
            "HGNC symbols or Ensembl gene ids",
            "Nothing if they do not matter; a newer data.hgnc_table may know them."
            if has_table
            else "Name a data.hgnc_table, which Ensembl ids need, or correct the names "
            "(spreadsheets turn SEPT2 into a date).",
        )
        findings.append(finding)
    if names.ambiguous:
        finding = Code.GENES_AMBIGUOUS.finding(
            sheet.file,
            f"{sheet.genes(names.ambiguous)} that several genes were called, left out",
            "names of one gene each",
            "Use current symbols or Ensembl gene ids for these.",
        )
        findings.append(finding)
    if names.updated:
        finding = Code.GENES_UPDATED.finding(
            sheet.file,
            f"{sheet.genes(names.updated)} renamed to current symbols",
            "retired symbols are fine",
            "Nothing.",
        )
        findings.append(finding)
    return findings


def _drop_empty(
    sheet: _Sheet, clinical: _Clinical | None, tell: _Tell
) -> tuple[_Sheet, _Clinical | None, list[Finding]]:
    """Leave out samples and genes of which nothing was measured."""
    findings = []
    measured = ~np.isnan(sheet.values)
    samples, genes = measured.any(axis=1), measured.any(axis=0)
    if not samples.all():
        finding = Code.SAMPLES_EMPTY.finding(
            sheet.file,
            f"{tell.count(int((~samples).sum()), 'sample')} without a single value, "
            "left out",
            "values",
            "Remove these samples, or export their values.",
        )
        findings.append(finding)
    if not genes.all():
        finding = Code.GENES_EMPTY.finding(
            sheet.file,
            f"{sheet.genes_where(~genes)} without a single value, left out",
            "values, but not every gene need be measured",
            "Nothing.",
        )
        findings.append(finding)
    rows = np.flatnonzero(samples)
    kept = sheet.take(rows, np.flatnonzero(genes))
    return kept, None if clinical is None else clinical.take(rows), findings


def _check_values(sheet: _Sheet, data: DataSettings, tell: _Tell) -> list[Finding]:
    """Report genes that never change, and what is often missing."""
    if not sheet.values.size:
        return []
    findings = []
    least = np.fmin.reduce(sheet.values, axis=0)
    constant = least == np.fmax.reduce(sheet.values, axis=0)
    if constant.any() and len(sheet.samples) > 1:
        finding = Code.GENES_CONSTANT.finding(
            sheet.file,
            f"{sheet.genes_where(constant)} with the same value in every sample",
            "values that vary",
            "Leave cells empty where a gene was not measured; a zero says that it was.",
        )
        findings.append(finding)
    missing = np.isnan(sheet.values)
    often = missing.mean(axis=0) > data.max_missing_per_gene
    if often.any():
        finding = Code.GENES_OFTEN_MISSING.finding(
            sheet.file,
            f"{sheet.genes_where(often)} missing in more than "
            f"{data.max_missing_per_gene:.0%} of the samples",
            "values in most samples",
            "Nothing if that is known; data.max_missing_per_gene moves the limit.",
        )
        findings.append(finding)
    seldom = missing.mean(axis=1) > data.max_missing_per_patient
    if seldom.any():
        finding = Code.SAMPLES_OFTEN_MISSING.finding(
            sheet.file,
            f"{tell.count(int(seldom.sum()), 'sample')} without more than "
            f"{data.max_missing_per_patient:.0%} of the genes",
            "values of most genes",
            "Nothing if that is known; data.max_missing_per_patient moves the limit.",
        )
        findings.append(finding)
    return findings


# ---- scale ----


def _on_scale(
    sheet: _Sheet, source: Scale, target: Scale, clinical: pd.DataFrame, tell: _Tell
) -> tuple[NDArray[np.float32], list[Finding]]:
    """Convert to the canonical scale; all NaN if any finding is an error."""
    values, findings = sheet.values, _check_scale(sheet, source, tell)
    if source == Scale.COUNTS and target in CONVERTIBLE and "library_size" in clinical:
        library_size = clinical["library_size"].to_numpy(dtype=np.float64)
        findings += _check_library_size(sheet, library_size, tell)
        with np.errstate(divide="ignore", invalid="ignore"):  # reported just above
            values = scales.counts_per_million(values, library_size)
        source = Scale.LINEAR
    if not scales.is_convertible(source, target):
        finding = Code.SCALE_NOT_CONVERTIBLE.finding(
            sheet.file,
            f"expression on the {source} scale",
            f"the study's scale, {target}, or one that leads there",
            "Add all reads of each sample to the clinical table as library_size, or "
            "export normalised values; reads are not summed from a panel."
            if source == Scale.COUNTS
            else f"Export the expression as {target}.",
        )
        findings.append(finding)
    if any(finding.severity == "error" for finding in findings):
        return np.full(values.shape, np.nan, dtype=np.float32), findings
    return scales.convert(values, source, target), findings


def _check_scale(sheet: _Sheet, scale: Scale, tell: _Tell) -> list[Finding]:
    """Compare the numbers with the declared scale."""
    finite = np.where(np.isfinite(sheet.values), sheet.values, np.nan)
    reason = scales.misfit(finite, scale)
    if reason is None:
        if not scales.is_faint(finite, scale):
            return []
        finding = Code.SCALE_FAINT.finding(
            sheet.file,
            f"no gene of {len(sheet.labels)} is abundant on the {scale} scale",
            "some abundant genes in most panels",
            "Check data.scale: logarithms declared linear, or the wrong base.",
        )
        return [finding]
    fitting = ", ".join(sorted(scales.recognise(finite))) or "none that we know"
    action = f"Correct data.scale or the export; the numbers could be: {fitting}."
    negative = scales.below_floor(finite, scale)
    if negative.any():
        finding = Code.NEGATIVE_EXPRESSION.finding(
            sheet.file,
            f"{tell.count(int(negative.sum()), 'value')} below "
            f"{scales.floor(scale):g} in {sheet.genes_where(negative)}",
            f"{scales.floor(scale):g} or more on the {scale} scale",
            action,
        )
    else:
        finding = Code.SCALE_IMPOSSIBLE.finding(
            sheet.file, reason, f"values on the {scale} scale, as declared", action
        )
    return [finding]


def _check_library_size(
    sheet: _Sheet, library_size: NDArray[np.float64], tell: _Tell
) -> list[Finding]:
    """All reads of a sample are at least those of the genes given."""
    given = np.nansum(np.where(np.isinf(sheet.values), 0, sheet.values), axis=1)
    bad = ~((library_size > 0) & (library_size >= given) & np.isfinite(library_size))
    if bad.any():
        finding = Code.LIBRARY_SIZE_UNUSABLE.finding(
            sheet.file,
            f"{tell.count(int(bad.sum()), 'sample')} whose library size is missing, "
            "not above zero, or less than its counts add up to",
            "all reads of the sample",
            "Correct the library sizes in the clinical table.",
        )
        return [finding]
    finding = Code.COUNTS_PER_MILLION.finding(
        sheet.file,
        "counts, taken as counts per million of the library size",
        "TPM, FPKM or RSEM normalised, which account for gene length or the like",
        "Export normalised values if other sites do; else make sure that all use CPM.",
    )
    return [finding]


# ---- the clinical table: values ----


def _clinical(
    clinical: _Clinical, settings: SiteSettings, tell: _Tell
) -> tuple[pd.DataFrame, list[Finding]]:
    """Return the clinical values under our own names and in our own units."""
    findings: list[Finding] = []
    table = pd.DataFrame(index=range(len(clinical.text)))
    for name in _NUMERIC_COLUMNS:
        if name in clinical.names:
            text = pa.array(clinical.text[name], type=pa.string(), from_pandas=True)
            values, is_text, has_commas = _parse(text)
            table[name] = values
            where = clinical.where(name)
            findings += _check_numbers(where, values, is_text, has_commas, tell)
    if "duration" in table:
        unit = settings.data.time_unit
        table["duration"] *= DAYS_PER[unit]
        where = clinical.where("duration")
        findings += _check_duration(where, table["duration"], unit, tell)
    if "event" in table:
        findings += _check_event(clinical.where("event"), table["event"], tell)
    if "duration" in table and "event" in table:
        findings += _check_follow_up(clinical.file, table, tell)
    if "age" in table:
        findings += _check_age(clinical.where("age"), table["age"], tell)
    if "sex" in clinical.names:
        text = clinical.text["sex"]
        table["sex"] = text.str.lower().map(SEXES).astype(object)
        unknown = text.notna() & table["sex"].isna()
        findings += _check_sex(clinical.where("sex"), int(unknown.sum()), tell)
        table["sex"] = table["sex"].where(table["sex"].notna(), None)
    if "cancer_type" in clinical.names:
        table["cancer_type"] = clinical.text["cancer_type"]
    return table, findings


def _check_numbers(
    where: str,
    values: NDArray[np.float64],
    is_text: NDArray[np.bool_],
    has_commas: bool,
    tell: _Tell,
) -> list[Finding]:
    findings = []
    if has_commas:
        finding = Code.DECIMAL_COMMA.finding(
            where,
            "numbers with a decimal comma",
            "decimal points",
            "Export with decimal points (1.5, not 1,5).",
        )
        findings.append(finding)
    if is_text.any():
        finding = Code.NOT_A_NUMBER.finding(
            where,
            f"{tell.count(int(is_text.sum()), 'cell')} that are no numbers",
            "numbers, or empty cells or NA where nothing is known",
            "Correct the cells.",
        )
        findings.append(finding)
    infinite = int(np.isinf(values).sum())
    if infinite:
        finding = Code.INFINITE.finding(
            where,
            tell.count(infinite, "infinite value"),
            "finite numbers",
            "Correct the cells, or leave them empty.",
        )
        findings.append(finding)
    return findings


def _check_duration(
    where: str, days: pd.Series[float], unit: str, tell: _Tell
) -> list[Finding]:
    findings = []
    negative = int((days < 0).sum())
    if negative:
        finding = Code.TIME_NEGATIVE.finding(
            where,
            tell.count(negative, "negative time"),
            f"{unit} ≥ 0",
            "Correct the export, or leave unknown times empty.",
        )
        findings.append(finding)
    too_long = int(((days > LONGEST_LIFE * 365.25) & np.isfinite(days)).sum())
    if too_long:
        finding = Code.TIME_IMPOSSIBLE.finding(
            where,
            f"{tell.count(too_long, 'time')} above {LONGEST_LIFE} years",
            f"time in {unit}, as declared",
            "Correct data.time_unit or the export.",
        )
        findings.append(finding)
    return findings


def _check_event(where: str, event: pd.Series[float], tell: _Tell) -> list[Finding]:
    other = int((event.notna() & ~event.isin((0, 1))).sum())
    if not other:
        return []
    finding = Code.EVENT_NOT_BINARY.finding(
        where,
        f"{tell.count(other, 'value')} other than 0 and 1",
        "1 where the event was observed, 0 where follow-up ended before",
        "Recode the column.",
    )
    return [finding]


def _check_follow_up(file: str, table: pd.DataFrame, tell: _Tell) -> list[Finding]:
    """Say who will be left out of survival."""
    findings = []
    missing = int(table[["duration", "event"]].isna().any(axis=1).sum())
    if missing:
        finding = Code.FOLLOW_UP_MISSING.finding(
            file,
            f"{tell.count(missing, 'sample')} without time or event, left out of "
            "survival",
            "both, where they are known",
            "Nothing, unless they are known.",
        )
        findings.append(finding)
    zero = int((table["duration"] == 0).sum())
    if zero:
        finding = Code.TIME_ZERO.finding(
            file,
            f"{tell.count(zero, 'sample')} with time zero, left out of survival",
            "times above zero",
            "Nothing, unless zero stands for unknown or for less than a day.",
        )
        findings.append(finding)
    return findings


def _check_age(where: str, age: pd.Series[float], tell: _Tell) -> list[Finding]:
    outside = int(((age < 0) | (age > LONGEST_LIFE)).sum())
    if not outside:
        return []
    finding = Code.AGE_IMPOSSIBLE.finding(
        where,
        f"{tell.count(outside, 'age')} outside 0 to {LONGEST_LIFE}",
        "years",
        "Correct the export; an age in days, or a year of birth, must be converted.",
    )
    return [finding]


def _check_sex(where: str, unknown: int, tell: _Tell) -> list[Finding]:
    if not unknown:
        return []
    finding = Code.SEX_UNKNOWN.finding(
        where,
        f"{tell.count(unknown, 'value')} that are not recognised, taken as unknown",
        "female, male, f or m in any case, or empty",
        "Recode the column if it uses a code.",
    )
    return [finding]


# ---- the cohort as a whole ----


def _check_cohort(
    cohort: Cohort, file: str, tasks: Iterable[str], tell: _Tell
) -> list[Finding]:
    """Enough patients, and what each task needs."""
    findings = []
    if cohort.n_patients < tell.floor:
        finding = Code.TOO_FEW_PATIENTS.finding(
            file,
            tell.count(cohort.n_patients, "patient"),
            f"{tell.floor} or more (minimum_cohort)",
            "Add patients; a site below its minimum takes no part.",
        )
        findings.append(finding)
    for task in tasks:
        lacking = [c for c in NEEDS[task] if c not in cohort.clinical]
        if lacking:
            finding = Code.TASK_WITHOUT_COLUMNS.finding(
                file,
                f"no {', '.join(lacking)} for {task}, to which nothing is contributed",
                f"clinical columns {', '.join(NEEDS[task])}",
                "Add them, or name them in data.columns; else remove the task.",
            )
            findings.append(finding)
        elif task == "survival":
            findings += _check_events(cohort, file, tell)
    return findings


def _check_events(cohort: Cohort, file: str, tell: _Tell) -> list[Finding]:
    """Few events are not counted, so that few and none look the same."""
    observed = cohort.with_survival() & (cohort.clinical["event"] == 1).to_numpy()
    events = len({cohort.patients[i] for i in np.flatnonzero(observed)})
    if events >= tell.floor:
        return []
    finding = Code.FEW_EVENTS.finding(
        file,
        f"{tell.count(events, 'patient')} with an observed event",
        f"{tell.floor} or more for survival",
        "Follow up longer; without any event a site contributes nothing to survival.",
    )
    return [finding]
