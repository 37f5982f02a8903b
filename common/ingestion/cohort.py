"""Check raw files, and return a cohort or all findings.

Findings name files, columns and genes, but never a patient: counts of patients, samples
and cells below the site's minimum cohort read "fewer than".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.data import genes as gene_names
from fedgex.common.data.cohort import CLINICAL_COLUMNS, Cohort
from fedgex.common.data.patients import patient_key
from fedgex.common.data.scales import Scale
from fedgex.common.errors import Finding, Severity
from fedgex.common.ingestion import clinical as clinicals
from fedgex.common.ingestion import expression as expressions
from fedgex.common.ingestion.clinical import Clinical
from fedgex.common.ingestion.expression import Sheet
from fedgex.common.ingestion.findings import Findings
from fedgex.common.ingestion.readers import RawCohort, read
from fedgex.common.ingestion.scale import check_scale, on_scale
from fedgex.common.ingestion.settings import DataSettings

NEEDS: Mapping[str, tuple[str, ...]] = {
    "pretraining": (),
    "classification": ("cancer_type",),
    "survival": ("duration", "event", "cancer_type"),
}
"""Clinical columns without which a site contributes nothing to a task."""


@dataclass(frozen=True, kw_only=True)
class CheckedCohort:
    """A cohort of N samples, with its rows and columns in the file."""

    cohort: Cohort
    sheet: Sheet
    """The file: every sample and label of it."""
    rows: NDArray[np.intp]
    """Place of each sample of the cohort in the sheet, shape (N,)."""
    columns: Mapping[str, int]
    """Place in the sheet of each gene's column, also where no value was measured."""
    library_size: NDArray[np.float64] | None
    """All reads of each sample, shape (N,), if the clinical table has them."""


def read_cohort(
    data: DataSettings,
    min_cell_count: int,
    canonical_scale: Scale,
    tasks: Collection[str],
) -> tuple[Cohort, tuple[Finding, ...]]:
    """Read and check the files; return the cohort and the milder findings.

    Parameters
    ----------
    data
        The files, and what the numbers in them mean.
    min_cell_count
        Smallest count that a finding may name; also the fewest patients allowed.
    canonical_scale, tasks
        As for `check`.

    Raises
    ------
    DataError
        If anything stands in the way; carries all findings, also the milder ones.
    """
    raw = read(data)
    findings = Findings(min_cell_count)
    checked = check(raw, data, canonical_scale, tasks, findings)
    return _best_first(checked), tuple(findings.found)


def _best_first(checked: CheckedCohort) -> Cohort:
    """Return the cohort with each patient's best sample before the others.

    A tumour before normal tissue, then the sample with most genes, then the first: one
    sample a patient is used (`Cohort.first_samples`).
    """
    cohort = checked.cohort
    order = np.arange(len(cohort.patients))
    if cohort.n_patients == len(order):
        return cohort
    labels = [checked.sheet.samples[i] for i in checked.rows]
    normal = [expressions.is_normal(label) for label in labels]
    genes = np.isfinite(cohort.expression).sum(axis=1)
    places: dict[str, list[int]] = {}
    for row, key in enumerate(cohort.keys):
        places.setdefault(key, []).append(row)
    for rows in places.values():
        order[rows] = sorted(rows, key=lambda row: (normal[row], -genes[row], row))
    return cohort.take(order)


def assay(data: DataSettings) -> tuple[str, ...]:
    """Return the genes that the expression file has columns for, sorted.

    Unlike a cohort's genes they depend on labels only, never on a patient's value.

    Raises
    ------
    DataError
        If the files cannot be read, or do not show which axis the samples are.
    """
    raw, findings = read(data), Findings()
    clinical = _name_columns(raw, data, Findings())
    axes = _orient(raw, clinical, data, findings)
    if axes is None:
        findings.refuse()
    names = gene_names.current_symbols(axes.labels, raw.gene_table)
    return tuple(sorted({name for name in names.symbols if name is not None}))


def check(
    raw: RawCohort,
    data: DataSettings,
    scale: Scale,
    tasks: Iterable[str],
    findings: Findings,
) -> CheckedCohort:
    """Check raw files, and convert them to a cohort.

    Parameters
    ----------
    raw, data
        The site's files, and how its settings describe them.
    scale
        Canonical scale of the study, to which the expression is converted.
    tasks
        Tasks that the cohort is for; what they lack is a warning.
    findings
        Collects what is found; its minimum count is also the fewest patients allowed.

    Raises
    ------
    DataError
        If anything stands in the way; carries all findings, also the milder ones.
    """
    findings.found.extend(raw.notes)
    clinical = _name_columns(raw, data, findings)
    if clinical is not None:
        clinicals.check_ids(clinical, findings)
    axes = _orient(raw, clinical, data, findings)
    if axes is None:
        if clinical is not None:
            clinicals.to_values(clinical, data.time_unit, findings)
        findings.refuse()

    in_file = expressions.drop_annotation(
        Sheet.parse(raw.expression, axes), data, findings
    )
    expressions.check_samples(in_file, findings)
    sheet, linked = _link(in_file, clinical, findings)
    if raw.opt_outs is not None and (clinical is None or linked is not None):
        known = _patients(in_file, clinical)
        opted_out = _opted_out(raw.opt_outs, known, data, findings)
        sheet, linked = _leave_out(sheet, linked, opted_out, findings)
    if clinical is None:
        expressions.check_persons(sheet, findings)
    expressions.check_normal(sheet, findings)
    named = expressions.check_labels(sheet, raw.gene_table, data, findings)
    expressions.check_cells(sheet, findings)
    if not named:
        findings.refuse()
    sheet = expressions.one_column_per_gene(sheet, raw.gene_table, findings)
    columns = dict(zip(sheet.labels, sheet.columns.tolist(), strict=True))
    if clinical is not None and linked is None:
        check_scale(sheet, data.scale, findings)
        clinicals.to_values(clinical, data.time_unit, findings)
        findings.refuse()

    sheet, rows = expressions.drop_empty(sheet, findings)
    expressions.check_values(sheet, data, findings)
    table = pd.DataFrame(index=range(len(sheet.samples)))
    patients = sheet.samples
    if linked is not None:
        linked = linked.take(rows)
        table = clinicals.to_values(linked, data.time_unit, findings)
        patients = tuple(linked.text["patient"])
    values = on_scale(sheet, data.scale, scale, table, findings)
    cohort = Cohort(
        patients=patients,
        genes=sheet.labels,
        expression=values,
        clinical=table[[name for name in CLINICAL_COLUMNS if name in table]],
    )
    file = sheet.file if clinical is None else clinical.file
    _check_cohort(cohort, sheet.file, file, tasks, findings)
    findings.refuse_errors()
    library_size = None
    if "library_size" in table:
        library_size = table["library_size"].to_numpy(dtype=np.float64)
    return CheckedCohort(
        cohort=cohort,
        sheet=in_file,
        rows=sheet.rows,
        columns=columns,
        library_size=library_size,
    )


def _name_columns(
    raw: RawCohort, data: DataSettings, findings: Findings
) -> Clinical | None:
    if raw.clinical is None:
        return None
    return clinicals.name_columns(raw.clinical, data.columns, findings)


def _orient(
    raw: RawCohort, clinical: Clinical | None, data: DataSettings, findings: Findings
) -> expressions.Axes | None:
    ids: set[str] = set()
    if clinical is not None:
        named = {"patient", clinical.key}
        ids = {patient_key(x) for name in named for x in clinical.text[name].dropna()}
    return expressions.orient(raw.expression, ids, raw.gene_table, data, findings)


def _link(
    sheet: Sheet, clinical: Clinical | None, findings: Findings
) -> tuple[Sheet, Clinical | None]:
    """Keep the samples that have a clinical row, and that row for each of them.

    The second result is None if there is no clinical table or no sample is in it.
    """
    if clinical is None:
        return sheet, None
    first = clinical.text[clinical.key].dropna().drop_duplicates()
    row_of = {patient_key(label): row for row, label in first.items()}
    samples = list(map(patient_key, sheet.samples))
    linked = [i for i, key in enumerate(samples) if key in row_of]
    where = f"{sheet.file} and {clinical.file}"
    if not linked:
        column = clinical.where(clinical.key)
        findings.add(Code.NOTHING_LINKED, where, column=column)
        return sheet, None
    lost = len(sheet.samples) - len(linked)
    findings.add_if(lost, Code.SAMPLE_WITHOUT_CLINICAL, where)
    unused = len(clinical.text) - len({samples[i] for i in linked})
    findings.add_if(unused, Code.CLINICAL_WITHOUT_SAMPLE, where)
    rows = np.array([row_of[samples[i]] for i in linked], dtype=np.intp)
    used = clinical.take(rows)
    clinicals.check_patients(used, findings)
    return sheet.take(np.array(linked, dtype=np.intp)), clinicals.complete(used)


def _patients(sheet: Sheet, clinical: Clinical | None) -> set[str]:
    """Return the keys of all patients in the files, with or without a sample."""
    ids = list(sheet.samples)
    if clinical is not None:
        listed = list(clinical.text["patient"].dropna())
        ids = listed if clinical.key == "sample" else listed + ids
    return set(map(patient_key, ids))


def _opted_out(
    identifiers: Iterable[str], known: set[str], data: DataSettings, findings: Findings
) -> set[str]:
    """Return the keys of an opt-out list, and report those that match nobody.

    Their exact number stays in the house: the hospital must know of a list that does
    not do what it is for.
    """
    listed = set(map(patient_key, identifiers)) - {""}
    unknown, where = len(listed - known), str(data.opt_outs and data.opt_outs.name)
    if unknown:
        refused = data.unknown_opt_outs == "refuse"
        severity: Severity | None = "error" if refused else None
        findings.add(Code.OPT_OUTS_UNKNOWN, where, severity=severity, count=unknown)
    return listed


def _leave_out(
    sheet: Sheet, clinical: Clinical | None, opted_out: set[str], findings: Findings
) -> tuple[Sheet, Clinical | None]:
    """Drop the patients who opted out; a small count reads like none."""
    ids = sheet.samples if clinical is None else tuple(clinical.text["patient"])
    keys = [patient_key(x or "") for x in ids]
    rows = np.array([i for i, x in enumerate(keys) if x not in opted_out], np.intp)
    n = len(opted_out & set(keys))
    count = n if n >= findings.min_cell_count else "suppressed"
    findings.add(Code.OPTED_OUT, sheet.file, count=count)
    return sheet.take(rows), None if clinical is None else clinical.take(rows)


def _check_cohort(
    cohort: Cohort,
    sheet: str,
    file: str,
    tasks: Iterable[str],
    findings: Findings,
) -> None:
    """Check that there are enough patients, and what each task needs.

    Parameters
    ----------
    sheet, file
        The expression file, and the file with the clinical columns.
    """
    n, least = cohort.n_patients, findings.min_cell_count
    if n < least:
        findings.add(Code.TOO_FEW_PATIENTS, sheet, n=n, least=least)
    for task in tasks:
        lacking = [c for c in NEEDS[task] if c not in cohort.clinical]
        if lacking:
            findings.add(
                Code.TASK_WITHOUT_COLUMNS,
                file,
                task=task,
                lacking=", ".join(lacking),
                needed=", ".join(NEEDS[task]),
            )
        elif task == "survival" and not findings.has_errors:
            _check_events(cohort, file, findings)
            _check_covariates(cohort, file, findings)


def _check_events(cohort: Cohort, file: str, findings: Findings) -> None:
    """Report few events without their count, so that few and none look the same."""
    observed = cohort.with_survival() & (cohort.clinical["event"] == 1).to_numpy()
    events = len({cohort.keys[i] for i in np.flatnonzero(observed)})
    least = findings.min_cell_count
    if events < least:
        findings.add(Code.FEW_EVENTS, file, n=events, least=least)


def _check_covariates(cohort: Cohort, file: str, findings: Findings) -> None:
    """Report patients without age or sex, where they are enough to be counted."""
    one = cohort.take(cohort.first_samples())
    followed = one.clinical[one.with_survival()]
    for name, taken in (("age", "60 years"), ("sex", "female")):
        known = followed[name].notna() if name in followed else pd.Series(dtype=bool)
        unknown = len(followed) - int(known.sum())
        if unknown >= findings.min_cell_count:
            code = Code.COVARIATES_UNKNOWN
            findings.add(code, file, n=unknown, name=name, taken=taken)
