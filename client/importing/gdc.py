"""A download of the Genomic Data Commons: files of a cart, sample sheet, clinical."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedgex.client.importing.download import Download, column, header, table
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.ingestion.samples.formats import STAR_GDC, recognise

_SHEET = {"File ID", "File Name", "Case ID", "Sample ID"}
_PATIENT = ("cases.submitter_id", "case_submitter_id")
_VITAL = ("demographic.vital_status", "vital_status")
_DIED = ("demographic.days_to_death", "days_to_death")
_LAST = ("diagnoses.days_to_last_follow_up", "days_to_last_follow_up")
_FOLLOWED = ("follow_ups.days_to_follow_up", "days_to_follow_up")
_AGE = ("diagnoses.age_at_diagnosis", "age_at_diagnosis")
_SEX = ("demographic.gender", "gender", "demographic.sex_at_birth")
_PROJECT = ("project.project_id", "project_id")
_PRIMARY = ("diagnoses.diagnosis_is_primary_disease", "diagnosis_is_primary_disease")
"""Columns since 2024 and before."""

_EVENT = {"dead": "1", "alive": "0"}


def find(files: Sequence[Path]) -> Download | None:
    """Return the download, if the files are the GDC's.

    Raises
    ------
    ConfigError
        If the sample sheet, or all files of expression, are missing.
    """
    headers = {path: header(path) for path in files}
    sheets = [path for path in files if set(headers[path]) >= _SHEET]
    star = tuple(STAR_GDC.columns)
    quantified = [p for p in files if tuple(headers[p][: len(star)]) == star]
    if not sheets and not quantified:
        return None
    if not sheets:
        raise ConfigError(
            "files of the GDC without its sample sheet, which says whose they are. "
            'Download it from the same cart ("Sample Sheet") and name it too.'
        )
    sheet = pd.concat(map(table, sheets), ignore_index=True).drop_duplicates("File ID")
    if "Data Type" in sheet:
        kinds = column(sheet, ["Data Type"])
        sheet = sheet[kinds.isna() | (kinds == "Gene Expression Quantification")]
    others = [p for p in files if p not in sheets and len(headers[p]) in (2, 9)]
    quantified = quantified or [p for p in others if recognise(p) is not None]
    if not quantified:
        raise ConfigError(
            "a sample sheet of the GDC without its files of expression. Name the "
            "folder into which gdc-client downloaded them too."
        )
    download = Download(
        source="GDC",
        expression=Path(os.path.commonpath([path.parent for path in quantified])),
        clinical=None,
        scale=Scale.LINEAR,
    )
    download.sheet = sheet = _tumours(sheet, download)
    clinical = [p for p in files if _has(headers[p], _PATIENT, _VITAL)]
    follow_ups = [p for p in files if _has(headers[p], _PATIENT, _FOLLOWED)]
    patients = _patients(clinical, follow_ups, download)
    samples = pd.DataFrame({"patient": sheet["Case ID"], "sample": sheet["Sample ID"]})
    table_ = samples.merge(patients, on="patient", how="left")
    project = column(table_, ["project"])
    project = project.where(project.notna(), list(column(sheet, ["Project ID"])))
    table_["cancer_type"] = project.str.removeprefix("TCGA-")
    download.clinical = table_.drop(columns="project", errors="ignore")
    download.decided.append("cancer_type is the project without TCGA-.")
    return download


def _tumours(sheet: pd.DataFrame, download: Download) -> pd.DataFrame:
    """Return a row a sample, of tumours only, with one case and one label."""
    kind = column(sheet, ["Tissue Type"]).fillna("") + column(
        sheet, ["Sample Type"]
    ).fillna("")
    normal = kind.str.lower().str.contains("normal").astype(bool)
    if normal.any():
        download.decided.append("Samples of normal tissue were left out.")
    sheet = sheet[~normal].copy()
    for name in ("Case ID", "Sample ID"):  # "A, A" where several aliquots were pooled
        sheet[name] = sheet[name].str.split(",").str[0].str.strip()
    repeated = sheet["Sample ID"].duplicated()
    if repeated.any():
        download.undecided.append(
            "Some samples have several files, of which the first by File ID is used: "
            "correct samples.csv, name it as data.sample_sheet, and the folder as "
            "data.expression."
        )
        sheet = sheet.sort_values("File ID").drop_duplicates("Sample ID")
    kept = ["File ID", "File Name", "Project ID", "Case ID", "Sample ID", "Sample Type"]
    return sheet[[name for name in kept if name in sheet]].reset_index(drop=True)


def _patients(
    clinical: Sequence[Path], follow_ups: Sequence[Path], download: Download
) -> pd.DataFrame:
    """Return a row a patient, of a table with a row for each treatment or diagnosis."""
    if not clinical:
        download.undecided.append(
            "No clinical.tsv: no follow-up, age or sex. Download the cart's clinical "
            "data (TSV), and name them too."
        )
        return pd.DataFrame({"patient": pd.Series(dtype=object)})
    rows = pd.concat(map(table, clinical), ignore_index=True)
    rows["patient"] = column(rows, _PATIENT)
    primary = column(rows, _PRIMARY).str.lower() == "true"
    rows = rows.assign(first=~primary).sort_values("first", kind="stable")
    patients = rows["patient"]
    days = pd.DataFrame(
        {
            "died": _days(rows, _DIED).groupby(patients).max(),
            "last": _days(rows, _LAST).groupby(patients).max(),
        }
    )
    for path in follow_ups:
        seen = table(path)
        again = _days(seen, _FOLLOWED).groupby(column(seen, _PATIENT)).max()
        days["last"] = pd.concat([days["last"], again], axis=1).max(axis=1)
    text = pd.DataFrame(
        {
            "event": column(rows, _VITAL).str.lower().map(_EVENT),
            "age": (_days(rows, _AGE) / 365.25).round(1),
            "sex": column(rows, _SEX),
            "project": column(rows, _PROJECT),
        }
    )
    first = text.groupby(patients).first()
    duration = days["died"].where(first["event"] == "1", days["last"])
    download.decided.append(
        "duration is days_to_death of the dead, and the longest days_to_last_follow_up "
        "(or days_to_follow_up of follow_up.tsv) of the living, from diagnosis."
    )
    return first.assign(duration=duration).rename_axis("patient").reset_index()


def _days(rows: pd.DataFrame, names: Sequence[str]) -> pd.Series[float]:
    return pd.to_numeric(column(rows, names), errors="coerce").astype(float)


def _has(names: Sequence[str], *groups: Sequence[str]) -> bool:
    return all(any(name in names for name in group) for group in groups)
