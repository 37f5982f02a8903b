"""The clinical table: columns, identifiers, and values in our own units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.data.patients import ambiguous, patient_key
from fedgex.common.ingestion.findings import Findings
from fedgex.common.ingestion.readers import RawClinical
from fedgex.common.ingestion.settings import DataColumns
from fedgex.common.ingestion.tables import MISSING, parse

DAYS_PER = {"days": 1.0, "months": 30.4375, "years": 365.25}
"""Length of each unit of time, days."""

LONGEST_LIFE = 120
"""Longest plausible age and follow-up, years."""

SHORT_DAYS, LONG_YEARS = 200, 40
"""Follow-up that is nowhere longer, or somewhere longer, is of another unit."""

EVENTS = {
    **dict.fromkeys(("deceased", "dead", "died", "true", "yes", "1"), "1"),
    **dict.fromkeys(("living", "alive", "censored", "false", "no", "0"), "0"),
}
"""Words for events, in any case. Of cBioPortal's 1:DECEASED the number counts."""

OLD_AGE = {"90+": "90", ">89": "90", "> 89": "90", ">=90": "90", "≥90": "90"}
"""Ages that rules on identification (45 CFR 164.514) make of all above 89."""

COLUMNS_NAMED = 20
"""Columns of the file that a finding names; it counts the others."""

SEXES = {"female": "female", "f": "female", "male": "male", "m": "male"}
"""Accepted spellings, in any case."""

DATES = ("diagnosis_date", "last_contact_date", "death_date")
"""Columns from which follow-up is counted where the table has no duration."""

_NUMERIC_COLUMNS = ("duration", "event", "age", "library_size")


@dataclass(frozen=True)
class Clinical:
    """Clinical table under our own column names, text, None where missing."""

    file: str
    names: Mapping[str, str]  # our name of each column: its name in the file
    text: pd.DataFrame
    from_dates: bool = False  # whether the duration is counted from dates, in days

    @property
    def key(self) -> str:
        """Our name of the column with the labels of the expression file."""
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
    here = list(dict.fromkeys(map(str, raw.table.columns)))
    for own, configured in columns.model_dump().items():
        name = configured or own
        occurrences = list(raw.table.columns).count(name)
        if occurrences == 1:
            names[own] = name
        elif occurrences > 1:
            findings.add(
                Code.COLUMN_REPEATED, raw.file, name=name, occurrences=occurrences
            )
        elif configured or own == "patient":
            missing = findings.advice.missing_column.format(own)
            if near := get_close_matches(name.lower(), map(str.lower, here), 1, 0.7):
                likely = next(each for each in here if each.lower() == near[0])
                missing = f'Perhaps "{likely}" is meant. {missing}'
            columns_here = ", ".join(here[:COLUMNS_NAMED])
            if len(here) > COLUMNS_NAMED:
                columns_here += f" and {len(here) - COLUMNS_NAMED} more"
            findings.add(
                Code.COLUMN_MISSING,
                raw.file,
                name=name,
                columns=columns_here,
                missing=missing,
            )
    if "patient" not in names:
        return None
    text = raw.table[list(names.values())].set_axis(list(names), axis=1)
    text = text.apply(lambda column: column.astype("string").str.strip())
    text = text.astype(object).mask(text.isna() | text.isin(MISSING), None)
    text = text.dropna(how="all").reset_index(drop=True)
    text = _in_words(text, findings, raw.file)
    if "duration" not in names and {*DATES[:2]} <= names.keys():
        return _from_dates(Clinical(raw.file, names, text), findings)
    return Clinical(raw.file, names, text)


def _from_dates(clinical: Clinical, findings: Findings) -> Clinical:
    """Return the table with follow-up in days from diagnosis to death or last contact.

    A date of death is the event, unless the table has one.
    """
    text, names, dates = clinical.text.copy(), dict(clinical.names), {}
    for name in DATES:
        if name in names:
            day = pd.to_datetime(text[name], format="%Y-%m-%d", errors="coerce")
            unread = int((day.isna() & text[name].notna()).sum())
            findings.add_if(unread, Code.DATES_UNREADABLE, clinical.where(name))
            dates[name] = day
    end = dates["last_contact_date"]
    if "death_date" in dates:
        end = dates["death_date"].where(dates["death_date"].notna(), end)
        if "event" not in names:
            died = dates["death_date"].notna()
            text["event"] = died.map({True: "1", False: "0"}).where(end.notna(), None)
            names["event"] = names["death_date"]
    days = (end - dates["diagnosis_date"]).dt.days
    findings.add_if(
        int((days < 0).sum()), Code.DATES_UNREADABLE, clinical.where("diagnosis_date")
    )
    known = days.where(days >= 0)
    text["duration"] = [None if np.isnan(day) else str(int(day)) for day in known]
    names["duration"] = names["diagnosis_date"]
    return Clinical(clinical.file, names, text, from_dates=True)


def _in_words(text: pd.DataFrame, findings: Findings, file: str) -> pd.DataFrame:
    """Return the table with numbers for events in words and for ages above 89."""
    if "event" in text:
        number = text["event"].str.replace(r"^([01]):.*", r"\1", regex=True)
        known = number.str.lower().map(EVENTS)
        if (known.notna() & ~text["event"].isin(("0", "1"))).any():
            findings.add(Code.EVENTS_IN_WORDS, file)
        text["event"] = known.where(known.notna(), text["event"])
    if "age" in text:
        capped = text["age"].isin(OLD_AGE.keys())
        findings.add_if(capped.sum(), Code.AGES_CAPPED, file)
        text["age"] = text["age"].replace(OLD_AGE)
    return text


def complete(clinical: Clinical) -> Clinical:
    """Return the table with what is known of a patient in each row of the patient."""
    text = clinical.text.copy()
    key = text["patient"].map(patient_key, na_action="ignore")
    for name in {"duration", "event", "age", "sex", "cancer_type"} & set(text):
        known = text.groupby(key)[name].transform("first")
        text[name] = text[name].where(text[name].notna(), known)
    return replace(clinical, text=text)


def check_ids(clinical: Clinical, findings: Findings) -> None:
    """Check that every row names its patient, and that no row repeats.

    One patient, or one sample, has one spelling.
    """
    key, patient = clinical.text[clinical.key], clinical.text["patient"]
    where = clinical.where("patient")
    missing = patient.fillna("").map(patient_key) == ""
    findings.add_if(missing.sum(), Code.ID_MISSING, where)
    for name in {"patient", clinical.key}:
        spelt, where = ambiguous(clinical.text[name].dropna()), clinical.where(name)
        findings.add_if(spelt, Code.ID_AMBIGUOUS, where)
    repeated, where = key.dropna().duplicated().sum(), clinical.where(clinical.key)
    findings.add_if(repeated, Code.CLINICAL_ROW_REPEATED, where, key=clinical.key)


def check_patients(clinical: Clinical, findings: Findings) -> None:
    """Check that all samples of a patient have the same follow-up and sex."""
    key = clinical.text["patient"].map(patient_key, na_action="ignore")
    of_patient, where = clinical.text.groupby(key), clinical.where("patient")
    sizes = of_patient.size()
    several = int((sizes > 1).sum())
    if not several or clinical.key == "patient":
        return
    unused = findings.count(int((sizes - 1).sum()))
    findings.add(Code.SEVERAL_SAMPLES, where, n=several, unused=unused)
    fixed = [c for c in ("duration", "event", "sex") if c in clinical.names]
    differ = of_patient[fixed].nunique() > 1  # one row a patient
    columns = ", ".join(clinical.names[c] for c in fixed)
    contradictory = int(differ.any(axis=1).sum())
    findings.add_if(contradictory, Code.PATIENT_CONTRADICTORY, where, columns=columns)


def to_values(clinical: Clinical, time_unit: str, findings: Findings) -> pd.DataFrame:
    """Return the clinical values under our own names and in our own units."""
    table = pd.DataFrame(index=range(len(clinical.text)))
    where = {name: clinical.where(name) for name in clinical.names}
    time_unit = "days" if clinical.from_dates else time_unit
    for name in _NUMERIC_COLUMNS:
        if name in where:
            text = pa.array(clinical.text[name], type=pa.string(), from_pandas=True)
            table[name], is_text, commas = parse(text)
            if commas is not None:
                findings.add(commas, where[name])
            else:
                findings.add_if(is_text.sum(), Code.NOT_A_NUMBER, where[name])
            findings.add_if(np.isinf(table[name]).sum(), Code.INFINITE, where[name])
    if "duration" in table:
        table["duration"] *= DAYS_PER[time_unit]
        _check_duration(where["duration"], table["duration"], time_unit, findings)
        if not clinical.from_dates:
            _doubt_unit(where["duration"], table["duration"], time_unit, findings)
    if "event" in table:
        event = table["event"]
        other = event.notna() & ~event.isin((0, 1))
        of_r = set(event.dropna()) == {1, 2}
        action = "Subtract 1: R codes 1 ended before, 2 observed." if of_r else None
        findings.add_if(
            other.sum(), Code.EVENT_NOT_BINARY, where["event"], action=action
        )
        if "censor" in clinical.names["event"].lower():
            findings.add(Code.EVENT_NAME_DOUBTFUL, where["event"])
        followed = event[table.get("duration", event).notna()].dropna()
        if len(followed) > findings.min_cell_count and (followed == 1).all():
            findings.add(Code.NOBODY_CENSORED, where["event"])
    if "duration" in table and "event" in table and not findings.has_errors:
        missing = table[["duration", "event"]].isna().any(axis=1)
        findings.add_if(missing.sum(), Code.FOLLOW_UP_MISSING, clinical.file)
        zero = table["duration"] == 0
        findings.add_if(zero.sum(), Code.TIME_ZERO, clinical.file)
    if "age" in table:
        age, longest = table["age"], LONGEST_LIFE
        n = int(((age < 0) | (age > longest)).sum())
        findings.add_if(n, Code.AGE_IMPOSSIBLE, where["age"], longest=longest)
    if "sex" in where:
        text = clinical.text["sex"]
        table["sex"] = text.str.lower().map(SEXES).astype(object)
        unknown = text.notna() & table["sex"].isna()
        findings.add_if(unknown.sum(), Code.SEX_UNKNOWN, where["sex"])
        table["sex"] = table["sex"].where(table["sex"].notna(), None)
    if "cancer_type" in where:
        table["cancer_type"] = clinical.text["cancer_type"]
    return table


def _check_duration(
    where: str, days: pd.Series[float], unit: str, findings: Findings
) -> None:
    longest = LONGEST_LIFE
    findings.add_if((days < 0).sum(), Code.TIME_NEGATIVE, where, unit=unit)
    too_long = int(((days > longest * 365.25) & np.isfinite(days)).sum())
    findings.add_if(too_long, Code.TIME_IMPOSSIBLE, where, unit=unit, longest=longest)


def _doubt_unit(
    where: str, days: pd.Series[float], unit: str, findings: Findings
) -> None:
    """Report follow-up that speaks for dates, or for another unit than declared."""
    named = re.findall("day|month|year", where.rpartition("column")[2].lower())
    if len(set(named)) == 1 and f"{named[0]}s" != unit:
        reason = f"a column whose name says {named[0]}s"
        findings.add(Code.TIME_UNIT_DOUBTFUL, where, reason=reason, unit=unit)
    known = days[np.isfinite(days) & (days > 0)]
    least, most = max(findings.min_cell_count, 2), LONGEST_LIFE * 365.25
    if len(known) < least or known.max() > most:
        return
    written = known / DAYS_PER[unit]
    years = unit != "years" and (written == written.round()).all()
    if known.min() > LONG_YEARS * 365.25 or (
        years and written.between(1900, 2100).all()
    ):
        findings.add(Code.TIMES_ARE_DATES, where, years=LONG_YEARS, unit=unit)
    elif known.max() < SHORT_DAYS:
        reason = f"no follow-up above {SHORT_DAYS} days in any patient"
        findings.add(Code.TIME_UNIT_DOUBTFUL, where, reason=reason, unit=unit)
    elif known.max() > LONG_YEARS * 365.25:
        reason = f"follow-up above {LONG_YEARS} years"
        findings.add(Code.TIME_UNIT_DOUBTFUL, where, reason=reason, unit=unit)
