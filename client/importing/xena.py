"""UCSC Xena's downloads: a genomic matrix, a phenotype and a survival table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedgex.client.importing.download import Download, column, header, one, table
from fedgex.common import parsing
from fedgex.common.data.genes import count_genes
from fedgex.common.data.scales import Scale, scale_of
from fedgex.common.ingestion.samples.formats import first_rows

_GENES = ("sample", "xena_sample", "ensembl_id", "gene", "id", "hugo_symbol")
"""First column of Xena's matrices, in lower case; most say sample and hold genes."""

_SAMPLE = ("sample", "sampleID", "submitter_id.samples", "xena_sample")
_PATIENT = ("_PATIENT", "submitter_id", "cases.submitter_id", "bcr_patient_barcode")
_TYPE = (
    "cancer type abbreviation",
    "project_id.project",
    "_primary_disease",
    "primary disease or tissue",
)
_AGE = ("age_at_initial_pathologic_diagnosis", "age_at_index.demographic")
_SEX = ("gender", "gender.demographic", "_gender")

_DATA_SETS = {
    r"HiSeqV2(\.gz)?": "log2p1",
    r".*star_tpm.*": "log2(tpm+1)",
    r".*(star|htseq)_fpkm.*": "log2(fpkm+1)",
    r".*_rsem_gene_tpm.*": "log2(tpm+0.001)",
    r".*_rsem_gene_fpkm.*": "log2(fpkm+0.001)",
}
"""Scale of Xena's data sets by their names, where no metadata lie next to them."""


def find(files: Sequence[Path]) -> Download | None:
    """Return the download, if there is a matrix of Xena.

    Raises
    ------
    ConfigError
        If there are several matrices, or several survival tables.
    """
    headers = {path: header(path) for path in files}
    matrices = [path for path in files if _is_matrix(path, headers[path])]
    survival = [path for path in files if {"OS", "OS.time"} <= set(headers[path])]
    if not matrices or not _is_of_xena(matrices, survival, headers):
        return None
    matrix = one(matrices, "the matrix of Xena")
    phenotypes = [
        path
        for path in files
        if path not in (matrix, *survival) and headers[path][:1]
        if headers[path][0] in _SAMPLE
    ]
    download = Download(
        source="Xena", expression=matrix, clinical=None, scale=_scale(matrix)
    )
    if survival:
        one(survival, "the survival table of Xena")
    else:
        download.undecided.append(
            "No survival table: no follow-up. Download the one with OS and OS.time."
        )
    tables = [table(path) for path in (*survival, *phenotypes)]
    if tables:
        download.clinical = _clinical(tables, download)
    return download


def _is_matrix(path: Path, names: Sequence[str]) -> bool:
    label = (first_rows(path)[1] or [""])[0]
    known = names[:1] and names[0].lower() in _GENES
    return bool(known) and len(names) > 2 and count_genes([label], None) == 1


def _is_of_xena(
    matrices: Sequence[Path],
    survival: Sequence[Path],
    headers: dict[Path, list[str]],
) -> bool:
    """Return whether more than a matrix, as others have too, speaks for Xena."""
    named = any(re.fullmatch(name, p.name) for name in _DATA_SETS for p in matrices)
    first = {headers[path][0].lower() for path in matrices}
    return bool(survival) or named or bool(first - {"gene", "id", "hugo_symbol"})


def _scale(matrix: Path) -> Scale | None:
    """Return what Xena's metadata say, else what the data set's name does."""
    said = None
    for place in (matrix, matrix.with_suffix("")):
        metadata = place.with_name(place.name + ".json")
        if metadata.is_file():
            text = metadata.read_bytes()
            said = parsing.json_object(text, metadata.name).get("unit")
    if said is None:
        fits = (s for n, s in _DATA_SETS.items() if re.fullmatch(n, matrix.name))
        said = next(fits, None)
    try:
        return None if said is None else scale_of(str(said).replace(" ", ""))
    except ValueError:
        return None


def _clinical(tables: Sequence[pd.DataFrame], download: Download) -> pd.DataFrame:
    """Return a row a sample, of all tables together."""
    rows: pd.DataFrame | None = None
    for each in tables:
        own = each.assign(sample=column(each, _SAMPLE)).drop_duplicates("sample")
        if rows is None:
            rows = own
            continue
        new = [name for name in own if name == "sample" or name not in rows]
        rows = rows.merge(own[new], on="sample", how="outer")
    assert rows is not None
    barcode = rows["sample"].str.extract(r"^(TCGA-\w{2}-\w{4})", expand=False)
    patient = column(rows, _PATIENT)
    kind = column(rows, _TYPE).str.removeprefix("TCGA-")
    if kind.notna().any():
        name = next(name for name in _TYPE if column(rows, [name]).notna().any())
        download.decided.append(f"cancer_type is {name}.")
    else:
        download.undecided.append(
            "No cancer type: add a column cancer_type to clinical.csv."
        )
    frame = pd.DataFrame(
        {
            "patient": patient.where(patient.notna(), barcode.fillna(rows["sample"])),
            "sample": rows["sample"],
            "duration": column(rows, ["OS.time"]),
            "event": column(rows, ["OS"]),
            "age": column(rows, _AGE),
            "sex": column(rows, _SEX),
            "cancer_type": kind,
        }
    )
    return frame.dropna(axis=1, how="all")
