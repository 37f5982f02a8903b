"""Matrices as tools write them, read to the numbers that were written."""

import bz2
import csv
import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from scipy import sparse

from fedgex.common.codes import Code
from fedgex.common.data.scales import Scale
from fedgex.common.errors import DataError
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.ingestion.readers import read
from fedgex.common.ingestion.settings import DataSettings

from .matrices import GENES, SAMPLES, found, matrix, refusal, same

# ---- written by the tools themselves ----


def to_workbook(path: Path) -> None:
    book = openpyxl.Workbook()
    book.create_sheet("notes")  # left empty
    sheet = book.active
    assert sheet is not None
    sheet.append(["gene", *SAMPLES])
    for gene, row in matrix().iterrows():
        sheet.append([gene, *row])
    book.save(path)


def to_module_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        rows.writerow(["gene", *SAMPLES])
        rows.writerows([gene, *row] for gene, row in matrix().iterrows())


def to_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._e.tsv", b"\0")
        archive.writestr("data/e.tsv", matrix().to_csv(sep="\t"))


def arrow() -> Any:
    return pa.Table.from_pandas(matrix().reset_index(), preserve_index=False)


def to_h5ad(path: Path) -> None:
    values = matrix().T
    made = anndata.AnnData(sparse.csr_matrix(values), layers={"half": values / 2})
    made.obs_names, made.var_names = SAMPLES, GENES
    made.write_h5ad(path, compression="gzip")


WRITERS: dict[str, Callable[[Path], object]] = {
    "pandas.csv": lambda path: matrix().to_csv(path),
    "pandas.tsv.gz": lambda path: matrix().to_csv(path, sep="\t"),
    "pandas-german.csv": lambda path: matrix().to_csv(path, sep=";", decimal=","),
    "pandas-utf16.txt": lambda path: matrix().to_csv(path, sep="\t", encoding="utf-16"),
    "pandas.csv.zip": lambda path: matrix().to_csv(path),
    "pandas.csv.zst": lambda path: arrow_text(path, "zstd"),
    "pandas.xlsx": lambda path: matrix().to_excel(path),
    "pandas.parquet": lambda path: matrix().to_parquet(path),
    "pandas.feather": lambda path: matrix().reset_index().to_feather(path),
    "openpyxl.xlsx": to_workbook,
    "csv-module.csv": to_module_csv,
    "gzip-module.csv.gz": lambda path: path.write_bytes(
        gzip.compress(matrix().to_csv().encode())
    ),
    "bz2-module.CSV.BZ2": lambda path: path.write_bytes(
        bz2.compress(matrix().to_csv().encode())
    ),
    "zipfile-module.zip": to_zip,
    "pyarrow.csv": lambda path: pa.csv.write_csv(arrow(), path),
    "pyarrow-zstd.parquet": lambda path: pa.parquet.write_table(
        arrow(), path, compression="zstd"
    ),
    "pyarrow-zstd.feather": lambda path: pa.feather.write_feather(
        arrow(), path, compression="zstd"
    ),
    "anndata.h5ad": to_h5ad,
}


def arrow_text(path: Path, compression: str) -> None:
    with pa.output_stream(path, compression=compression) as stream:
        stream.write(matrix().to_csv().encode())


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_tool_writes_is_read_back_to_the_same_numbers(
    tmp_path: Path, name: str
) -> None:
    WRITERS[name](tmp_path / name)

    frame, _ = found(tmp_path / name)

    same(frame)
    assert set(frame.columns) == set(SAMPLES)


def write_table(frame: pd.DataFrame, path: Path, sep: str = "\t") -> None:
    """Write as R's write.table(x, sep = "\\t"): quoted, the header a field short."""
    lines = [sep.join(f'"{name}"' for name in frame.columns)]
    for label, row in frame.iterrows():
        lines.append(sep.join([f'"{label}"', *(repr(float(x)) for x in row)]))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["r.tsv", "R.TXT"])
def test_the_header_of_r_is_one_field_short(tmp_path: Path, name: str) -> None:
    write_table(matrix(), tmp_path / name)

    frame, note = found(tmp_path / name)

    same(frame)
    assert "one field short" in note


def test_rows_that_end_in_a_delimiter_are_not_taken_for_r(tmp_path: Path) -> None:
    text = matrix().to_csv(sep="\t", lineterminator="\t\n")
    (tmp_path / "e.tsv").write_text(text.replace("S11\t\n", "S11\n"))

    frame, note = found(tmp_path / "e.tsv")

    same(frame)
    assert not note


# ---- delimiters, decimals, encodings ----


@pytest.mark.parametrize(
    ("name", "sep", "word"),
    [
        ("e.csv", "\t", "tabs"),
        ("e.tsv", ",", "commas"),
        ("e.txt", ";", "semicolons"),
        ("e.csv", "|", "vertical bars"),
        ("sampleMap_HiSeqV2", "\t", "tabs"),
    ],
)
def test_the_delimiter_is_seen_where_the_ending_says_another(
    tmp_path: Path, name: str, sep: str, word: str
) -> None:
    matrix().to_csv(tmp_path / name, sep=sep)

    frame, note = found(tmp_path / name)

    same(frame)
    assert f"{word} between the cells" in note


def test_three_digits_after_each_comma_may_be_thousands(tmp_path: Path) -> None:
    counts = pd.DataFrame(1234, matrix().index, SAMPLES)
    text = counts.to_csv(sep=";").replace("1234", "1,234")
    (tmp_path / "e.csv").write_text(text)

    codes = refused_codes(tmp_path / "e.csv")

    assert {"FX-DATA-008", "FX-DATA-030"} <= codes


def test_commas_and_points_in_one_table_are_refused(tmp_path: Path) -> None:
    text = matrix().round(2).astype(str)
    text.iloc[0, 0] = "8,25"
    text.to_csv(tmp_path / "e.tsv", sep="\t")

    assert refused_codes(tmp_path / "e.tsv") == {"FX-DATA-006", "FX-DATA-030"}


def refused_codes(path: Path) -> set[str]:
    with pytest.raises(DataError) as refused:
        found(path)
    return {str(f.code) for f in refused.value.findings if f.severity == "error"}


def test_latin_1_is_read_with_a_note(tmp_path: Path) -> None:
    named = matrix().rename(columns={"S03": "Müller-3"})
    named.to_csv(tmp_path / "e.csv", encoding="latin-1")

    frame, note = found(tmp_path / "e.csv")

    same(frame, named)
    assert "Latin-1" in note


def test_an_encoding_that_may_be_several_is_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    named = matrix().rename(columns={"S03": "Łukasz"})
    named.to_csv(tmp_path / "e.csv", encoding="cp1250")

    assert "Save it as UTF-8" in refusal(tmp_path / "e.csv")


def test_blank_lines_and_blank_rows_are_no_genes(tmp_path: Path) -> None:
    lines = matrix().to_csv(sep="\t").splitlines()
    lines[3:3] = ["", "\t" * 12]
    (tmp_path / "e.tsv").write_text("\n".join([*lines, "\t" * 12, ""]))

    frame, _ = found(tmp_path / "e.tsv")

    same(frame)
    assert len(frame) == 6


@pytest.mark.parametrize("sep", [",", ";"])
def test_a_header_of_many_genes_is_no_single_field(tmp_path: Path, sep: str) -> None:
    genes = [f"GENE{i:05d}" for i in range(20_000)]
    wide = pd.DataFrame(8.5, SAMPLES, genes)
    wide.to_csv(tmp_path / "e.csv", sep=sep, index_label="sample")

    raw = read(DataSettings(expression=tmp_path / "e.csv", scale=Scale.LOG2P1))

    assert raw.expression.columns == tuple(genes)
    assert raw.expression.rows == tuple(SAMPLES)


# ---- other formats, named and refused ----


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # ids of tests must not change


def archive_of(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.xls", b"\xd0\xcf\x11\xe0" + bytes(99), "old kind (.xls)"),
        (
            "e.rds",
            gzip.compress(b"X\n\0\0\0\3" + bytes(99), mtime=0),
            "a file of R (.rds)",
        ),
        ("e.csv", b"<!DOCTYPE html><p>log in</p>", "a web page"),
        ("e.csv", b'{"data": []}', "JSON"),
        ("e.zip", archive_of("a.csv", "b.csv"), "zip archive of 2 files"),
        ("e.zip", archive_of("a.parquet"), "a .parquet file in a zip archive"),
        (
            "e.tar.gz",
            gzip.compress(bytes(257) + b"ustar" + bytes(250), mtime=0),
            "tar archive",
        ),
        ("e.h5ad", b"gene,S1\nTP53,1\n", "no .h5ad"),
        ("e.rda", b"neither text\0nor known", "another format"),
    ],
)
def test_a_format_that_is_not_read_is_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)

    message = refusal(tmp_path / name)

    assert message.startswith("FX-DATA-002")
    assert words in message


def test_a_workbook_with_two_tables_is_refused(tmp_path: Path) -> None:
    with pd.ExcelWriter(tmp_path / "e.xlsx") as book:
        matrix().to_excel(book, sheet_name="a")
        matrix().to_excel(book, sheet_name="b")

    assert "2 sheets that hold a table" in refusal(tmp_path / "e.xlsx")


# ---- what spreadsheets do to genes ----


@pytest.mark.parametrize("date", ["2-Sep", "Sep-02", "02.Sep", "2024-09-02"])
def test_genes_that_a_spreadsheet_made_dates_are_named(
    tmp_path: Path, date: str
) -> None:
    matrix().rename({"VIM": date, "KRAS": "1-Mar"}).to_csv(tmp_path / "e.csv")
    settings = DataSettings.model_validate(
        {"expression": tmp_path / "e.csv", "scale": "log2p1"}
    )

    cohort, findings = read_cohort(settings, 1, settings.scale, ())

    (finding,) = [f for f in findings if f.code == Code.GENES_AS_DATES]
    assert "2 labels" in finding.found
    assert "likely genes: MARCHF1 or MTARC1, SEPTIN2" in finding.found
    assert cohort.genes == ("ACTB", "EGFR", "MYC", "TP53")
    assert Code.GENES_UNMAPPED not in {f.code for f in findings}


def test_dates_in_a_workbook_are_found_too(tmp_path: Path) -> None:
    frame = matrix().rename({"VIM": pd.Timestamp("2024-09-07")})
    frame.to_excel(tmp_path / "e.xlsx")
    settings = DataSettings.model_validate(
        {"expression": tmp_path / "e.xlsx", "scale": "log2p1"}
    )

    _, findings = read_cohort(settings, 1, settings.scale, ())

    assert "SEPTIN7" in next(f.found for f in findings if f.code == Code.GENES_AS_DATES)
