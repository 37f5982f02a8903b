"""The clinical table: columns, identifiers, and values in our own units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from fedgex.client.data.codes import Code
from fedgex.client.data.findings import Findings
from fedgex.client.data.readers import RawClinical
from fedgex.client.data.tables import MISSING, check_commas, parse
from fedgex.client.settings import DataColumns

DAYS_PER = {"days": 1.0, "months": 30.4375, "years": 365.25}
"""Length of each unit of time, days."""

LONGEST_LIFE = 120
"""Years; no age and no follow-up is longer."""

SEXES = {"female": "female", "f": "female", "male": "male", "m": "male"}
"""Accepted spellings, in any case."""

_NUMERIC_COLUMNS = ("duration", "event", "age", "library_size")


@dataclass(frozen=True)
class Clinical:
    """Clinical table under our own column names, text, None where missing."""

    file: str
    names: Mapping[str, str]  # our name of each column: its name in the file
    text: pd.DataFrame

    @property
    def key(self) -> str:
        """Our name of the column that holds the labels of the expression file."""
        return "sample" if "sample" in self.names else "patient"

    def where(self, column: str) -> str:
        """Return file and column, as findings name them."""
        return f'{self.file}: column "{self.names[column]}"'

    def take(self, rows: NDArray[np.intp]) -> Clinical:
        """Return some rows, in the order given."""
        return replace(self, text=self.text.iloc[rows].reset_index(drop=True))


def name_columns(
    raw: RawClinical, columns: DataColumns, findings: Findings
) -> Clinical | None:
    """Find each column by its configured name, or by our own; None without patients."""
    names = {}
    for own, configured in columns.model_dump().items():
        name = configured or own
        occurrences = list(raw.table.columns).count(name)
        if occurrences == 1:
            names[own] = name
        elif occurrences > 1:
            findings.add(
                Code.COLUMN_REPEATED,
                raw.file,
                f'column "{name}" occurs {occurrences} times',
            )
        elif configured or own == "patient":
            findings.add(
                Code.COLUMN_MISSING,
                raw.file,
                f'no column "{name}"',
                action=findings.advice.missing_column.format(own),
            )
    if "patient" not in names:
        return None
    text = raw.table[list(names.values())].set_axis(list(names), axis=1)
    text = text.apply(lambda column: column.astype("string").str.strip())
    text = text.astype(object).mask(text.isna() | text.isin(MISSING), None)
    text = text.dropna(how="all").reset_index(drop=True)
    return Clinical(raw.file, names, text)


def check_ids(clinical: Clinical, findings: Findings) -> None:
    """Check that every row names its patient, and that no row repeats."""
    missing = int(clinical.text["patient"].isna().sum())
    if missing:
        findings.add(
            Code.ID_MISSING,
            clinical.where("patient"),
            f"{findings.count(missing, 'row')} without an identifier",
        )
    key = clinical.text[clinical.key].dropna()
    repeated = int(key.duplicated().sum())
    if repeated:
        findings.add(
            Code.CLINICAL_ROW_REPEATED,
            clinical.where(clinical.key),
            f"{findings.count(repeated, 'row')} repeat an identifier",
            expected=f"one row a {clinical.key}",
        )


def check_patients(clinical: Clinical, findings: Findings) -> None:
    """Check that all samples of a patient have the same follow-up and sex."""
    of_patient = clinical.text.groupby("patient")
    several = int((of_patient.size() > 1).sum())
    if not several or clinical.key == "patient":
        return
    findings.add(
        Code.SEVERAL_SAMPLES,
        clinical.where("patient"),
        f"{findings.count(several, 'patient')} with several samples",
    )
    fixed = [c for c in ("duration", "event", "sex") if c in clinical.names]
    differ = of_patient[fixed].nunique() > 1  # one row a patient
    contradictory = int(differ.any(axis=1).sum())
    if contradictory:
        findings.add(
            Code.PATIENT_CONTRADICTORY,
            clinical.where("patient"),
            f"{findings.count(contradictory, 'patient')} whose rows differ in "
            f"{', '.join(clinical.names[c] for c in fixed)}",
        )


def to_values(clinical: Clinical, time_unit: str, findings: Findings) -> pd.DataFrame:
    """Return the clinical values under our own names and in our own units."""
    table = pd.DataFrame(index=range(len(clinical.text)))
    for name in _NUMERIC_COLUMNS:
        if name in clinical.names:
            text = pa.array(clinical.text[name], type=pa.string(), from_pandas=True)
            values, is_text, has_commas = parse(text)
            table[name] = values
            where = clinical.where(name)
            check_commas(has_commas, where, findings)
            _check_numbers(where, values, is_text, findings)
    if "duration" in table:
        table["duration"] *= DAYS_PER[time_unit]
        where = clinical.where("duration")
        _check_duration(where, table["duration"], time_unit, findings)
    if "event" in table:
        _check_event(clinical.where("event"), table["event"], findings)
    if "duration" in table and "event" in table:
        _check_follow_up(clinical.file, table, findings)
    if "age" in table:
        _check_age(clinical.where("age"), table["age"], findings)
    if "sex" in clinical.names:
        text = clinical.text["sex"]
        table["sex"] = text.str.lower().map(SEXES).astype(object)
        unknown = text.notna() & table["sex"].isna()
        _check_sex(clinical.where("sex"), int(unknown.sum()), findings)
        table["sex"] = table["sex"].where(table["sex"].notna(), None)
    if "cancer_type" in clinical.names:
        table["cancer_type"] = clinical.text["cancer_type"]
    return table


def _check_numbers(
    where: str,
    values: NDArray[np.float64],
    is_text: NDArray[np.bool_],
    findings: Findings,
) -> None:
    if is_text.any():
        findings.add(
            Code.NOT_A_NUMBER,
            where,
            f"{findings.count(int(is_text.sum()), 'cell')} that are no numbers",
        )
    infinite = int(np.isinf(values).sum())
    if infinite:
        findings.add(Code.INFINITE, where, findings.count(infinite, "infinite value"))


def _check_duration(
    where: str, days: pd.Series[float], unit: str, findings: Findings
) -> None:
    negative = int((days < 0).sum())
    if negative:
        findings.add(
            Code.TIME_NEGATIVE,
            where,
            findings.count(negative, "negative time"),
            expected=f"{unit} ≥ 0",
        )
    too_long = int(((days > LONGEST_LIFE * 365.25) & np.isfinite(days)).sum())
    if too_long:
        findings.add(
            Code.TIME_IMPOSSIBLE,
            where,
            f"{findings.count(too_long, 'time')} above {LONGEST_LIFE} years",
            expected=f"time in {unit}, as declared",
        )


def _check_event(where: str, event: pd.Series[float], findings: Findings) -> None:
    other = int((event.notna() & ~event.isin((0, 1))).sum())
    if other:
        findings.add(
            Code.EVENT_NOT_BINARY,
            where,
            f"{findings.count(other, 'value')} other than 0 and 1",
        )


def _check_follow_up(file: str, table: pd.DataFrame, findings: Findings) -> None:
    """Report the samples that survival cannot use."""
    missing = int(table[["duration", "event"]].isna().any(axis=1).sum())
    if missing:
        findings.add(
            Code.FOLLOW_UP_MISSING,
            file,
            f"{findings.count(missing, 'sample')} without time or event, left out of "
            "survival",
        )
    zero = int((table["duration"] == 0).sum())
    if zero:
        findings.add(
            Code.TIME_ZERO,
            file,
            f"{findings.count(zero, 'sample')} with time zero, left out of survival",
        )


def _check_age(where: str, age: pd.Series[float], findings: Findings) -> None:
    outside = int(((age < 0) | (age > LONGEST_LIFE)).sum())
    if outside:
        findings.add(
            Code.AGE_IMPOSSIBLE,
            where,
            f"{findings.count(outside, 'age')} outside 0 to {LONGEST_LIFE}",
        )


def _check_sex(where: str, unknown: int, findings: Findings) -> None:
    if unknown:
        findings.add(
            Code.SEX_UNKNOWN,
            where,
            f"{findings.count(unknown, 'value')} that are not recognised, taken as "
            "unknown",
        )
