"""A study's folder of cBioPortal: meta files, matrices, clinical tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from fedgex.client.importing.download import Download, column, table
from fedgex.common.data.scales import Scale, scale_of
from fedgex.common.errors import ConfigError

_PREFERRED = (
    "data_mrna_seq_v2_rsem.txt",
    "data_RNA_Seq_v2_expression_median.txt",
    "data_mrna_seq_tpm.txt",
    "data_mrna_seq_fpkm.txt",
    "data_mrna_seq_rpkm.txt",
)
"""Matrices of expression, best first, where a study has several."""

_TYPES = ("CANCER_TYPE_ACRONYM", "ONCOTREE_CODE", "CANCER_TYPE")


def find(files: Sequence[Path]) -> Download | None:
    """Return the study, if the files are cBioPortal's.

    Raises
    ------
    ConfigError
        If there is no matrix of expression, or there are several studies.
    """
    metas = {p: _meta(p) for p in files if re.fullmatch(r"meta_\w+\.txt", p.name)}
    clinical = [p for p in files if re.fullmatch(r"data_clinical_\w+\.txt", p.name)]
    if not metas or not clinical:
        return None
    folders = {path.parent for path in metas}
    if len(folders) > 1:
        raise ConfigError(
            f"{len(folders)} studies of cBioPortal; expected one a command."
        )
    (folder,) = folders
    profiles = {
        folder / meta["data_filename"]: meta
        for meta in metas.values()
        if meta.get("genetic_alteration_type") == "MRNA_EXPRESSION"
        and meta.get("datatype") == "CONTINUOUS"
        and (folder / meta.get("data_filename", "")).is_file()
    } or {folder / name: {} for name in _PREFERRED if (folder / name).is_file()}
    if not profiles:
        raise ConfigError(
            "a study of cBioPortal without a matrix of expression (z-scores do not "
            "count). Choose a study with data_mrna_seq_v2_rsem.txt or the like."
        )
    best, *others = sorted(profiles, key=_rank)
    download = Download(
        source="cBioPortal",
        expression=best,
        clinical=_clinical(folder, metas.values(), clinical),
        scale=_scale(best, profiles[best]),
        time_unit="months",
    )
    download.decided.append(f"Expression is {best.name}.")
    if others:
        named = ", ".join(path.name for path in others)
        download.undecided.append(
            f"Expression may also be {named}: name it as data.expression, and its "
            "data.scale."
        )
    _name_types(download)
    return download


def _rank(path: Path) -> tuple[int, str]:
    known = path.name in _PREFERRED
    return (_PREFERRED.index(path.name) if known else len(_PREFERRED), path.name)


def _meta(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, mark, value in pairs if mark}


def _scale(path: Path, meta: Mapping[str, str]) -> Scale | None:
    """Return the scale, by what the study says of the profile."""
    text = " ".join([path.name, *meta.values()]).lower()
    if "log" in text:
        formula = re.search(r"(log2|log10|ln)\s*\([^)]*\)", text)
        try:
            return None if formula is None else scale_of(formula[0].replace(" ", ""))
        except ValueError:
            return None
    linear = any(unit in text for unit in ("rsem", "tpm", "fpkm", "rpkm"))
    return Scale.LINEAR if linear else None


def _clinical(
    folder: Path, metas: Sequence[Mapping[str, str]] | object, named: Sequence[Path]
) -> pd.DataFrame:
    """Return a row a sample, with what is known of its patient."""
    frames = [table(path) for path in named]
    samples = [frame for frame in frames if "SAMPLE_ID" in frame]
    patients = [f for f in frames if "PATIENT_ID" in f and "SAMPLE_ID" not in f]
    if not samples:
        raise ConfigError(
            f"{folder.name}: no clinical table with SAMPLE_ID and PATIENT_ID; expected "
            "data_clinical_sample.txt. Download the study again."
        )
    rows = pd.concat(samples, ignore_index=True)
    for frame in patients:
        new = [name for name in frame if name == "PATIENT_ID" or name not in rows]
        rows = rows.merge(frame[new], on="PATIENT_ID", how="left")
    status = column(rows, ["OS_STATUS"])
    found = {
        "patient": rows["PATIENT_ID"],
        "sample": rows["SAMPLE_ID"],
        "duration": column(rows, ["OS_MONTHS"]),
        "event": status.str.replace(r"^([01]):.*", r"\1", regex=True),
        "age": column(rows, ["AGE", "AGE_AT_DIAGNOSIS", "DIAGNOSIS_AGE"]),
        "sex": column(rows, ["SEX", "GENDER"]),
        **{name: column(rows, [name]) for name in (*_TYPES, "SAMPLE_TYPE")},
    }
    return pd.DataFrame(found)


def _name_types(download: Download) -> None:
    """Take the shortest name of types that the study has, and leave out normals."""
    frame = download.clinical
    assert frame is not None
    normal = frame["SAMPLE_TYPE"].str.lower().str.contains("normal").eq(True)
    if normal.any():
        download.decided.append("Samples of normal tissue were left out.")
    known = next((name for name in _TYPES if frame[name].notna().any()), None)
    if known is not None:
        frame = frame.assign(cancer_type=frame[known])
        download.decided.append(f"cancer_type is {known}.")
    frame = frame[~normal].drop(columns=[*_TYPES, "SAMPLE_TYPE"])
    download.clinical = frame.dropna(axis=1, how="all")
    if not {"duration", "event"} <= set(download.clinical):
        download.undecided.append(
            "No OS_MONTHS and OS_STATUS: no follow-up. If the study has another, name "
            "its columns as data.columns.duration and data.columns.event."
        )
