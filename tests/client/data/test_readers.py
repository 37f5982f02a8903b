"""Files of a hospital are read as they are, or refused with a finding each."""

import gzip
import traceback
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fedgex.common.codes import Code
from fedgex.common.data.scales import Scale
from fedgex.common.errors import DataError
from fedgex.common.ingestion.readers import RawCohort, read
from fedgex.common.ingestion.settings import DataColumns, DataSettings

CSV = "id,TP53,MYC\n007,1.50,NA\n008,,3\n"


def site(**data: Any) -> DataSettings:
    return DataSettings(scale=Scale.LOG2P1, **data)


def cells(raw: RawCohort) -> list[list[Any]]:
    return [column.to_pylist() for column in raw.expression.cells.columns]


def test_opt_outs_are_one_identifier_a_line_with_comments(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(CSV)
    path = tmp_path / "opt-outs.txt"
    path.write_text(
        "# since May\n007\n\n  MRN#12  # by letter\n008\t#by phone\n", "utf-8-sig"
    )

    raw = read(site(expression=tmp_path / "e.csv", opt_outs=path))

    assert raw.opt_outs == {"007", "MRN#12", "008"}


def test_without_a_file_of_opt_outs_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(CSV)

    assert read(site(expression=tmp_path / "e.csv")).opt_outs is None


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, Code.FILE_MISSING), (b"\xff\xfe0", Code.FILE_UNREADABLE)],
)
def test_opt_outs_that_cannot_be_read_refuse_everything(
    tmp_path: Path, content: bytes | None, code: Code
) -> None:
    (tmp_path / "e.csv").write_text(CSV)
    path = tmp_path / "opt-outs.txt"
    if content is not None:
        path.write_bytes(content)

    codes = refused(site(expression=tmp_path / "e.csv", opt_outs=path))

    assert codes == [code]


def refused(settings: DataSettings) -> list[str]:
    with pytest.raises(DataError) as refusal:
        read(settings)
    return [finding.code for finding in refusal.value.findings]


def test_text_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "expression.csv"
    path.write_text(CSV)

    raw = read(site(expression=path))

    assert raw.expression.rows == ("007", "008")
    assert raw.expression.columns == ("TP53", "MYC")
    assert cells(raw) == [["1.50", ""], ["NA", "3"]]
    assert raw.clinical is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.tsv", CSV.replace(",", "\t").encode()),
        ("e.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("e.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode(), mtime=0)),
        ("e.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("e.csv", CSV.replace("\n", "\r\n").encode()),
        ("e.csv", b'"id","TP53","MYC"\n"007","1.50","NA"\n"008","","3"\n'),
    ],
)
def test_every_kind_of_text_file_reads_the_same(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    raw = read(site(expression=path))

    assert raw.expression.rows == ("007", "008")
    assert raw.expression.columns == ("TP53", "MYC")
    assert cells(raw) == [["1.50", ""], ["NA", "3"]]


def test_repeated_genes_stay_repeated(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text("id,TP53,TP53\nP1,1,2\n")

    assert read(site(expression=path)).expression.columns == ("TP53", "TP53")


@pytest.mark.parametrize("index", [True, False])
def test_parquet_labels_are_the_index_or_else_the_first_column(
    tmp_path: Path, index: bool
) -> None:
    frame = pd.DataFrame({"TP53": [1.5, 2.0]}, index=pd.Index(["007", "008"], name="p"))
    path = tmp_path / "e.parquet"
    (frame if index else frame.reset_index()).to_parquet(path)

    raw = read(site(expression=path))

    assert raw.expression.rows == ("007", "008")
    assert raw.expression.columns == ("TP53",)
    assert cells(raw) == [[1.5, 2.0]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_clinical_table_is_text_whatever_its_format(
    tmp_path: Path, suffix: str
) -> None:
    expression, clinical = tmp_path / "e.csv", tmp_path / f"c{suffix}"
    expression.write_text(CSV)
    frame = pd.DataFrame({"patient": ["007", "008"], "event": [1, 0]})
    if suffix == ".csv":
        frame.to_csv(clinical, index=False)
    else:
        frame.set_index("patient").to_parquet(clinical)

    raw = read(site(expression=expression, clinical=clinical))

    assert raw.clinical is not None
    assert raw.clinical.table["patient"].tolist() == ["007", "008"]
    assert raw.clinical.table["event"].tolist() == ["1", "0"]


def test_a_clinical_table_may_be_a_workbook(tmp_path: Path) -> None:
    expression, clinical = tmp_path / "e.csv", tmp_path / "c.xlsx"
    expression.write_text(CSV)
    frame = pd.DataFrame(
        {"patient": ["007", "008"], "event": [1, 0], "age": [1.5, None]}
    )
    frame.assign(seen=pd.Timestamp("2024-03-01")).to_excel(clinical, index=False)

    raw = read(site(expression=expression, clinical=clinical))

    assert raw.clinical is not None
    assert raw.clinical.table.fillna("").to_numpy().tolist() == [
        ["007", "1", "1.5", "2024-03-01"],
        ["008", "0", "", "2024-03-01"],
    ]
    assert ["an Excel workbook" in note.found for note in raw.notes] == [True]


def annotated(X: Any, **obs: list[Any]) -> anndata.AnnData:
    return anndata.AnnData(
        X=X,
        obs=pd.DataFrame(obs, index=["007", "008"]),
        var=pd.DataFrame(index=["TP53", "MYC"]),
    )


@pytest.mark.parametrize("pack", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_anndata_is_read_dense_or_sparse(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "e.h5ad"
    annotated(pack(np.array([[1.5, 0.0], [0.0, 3.0]]))).write_h5ad(path)

    raw = read(site(expression=path))

    assert raw.expression.rows == ("007", "008")
    assert raw.expression.columns == ("TP53", "MYC")
    assert raw.expression.rows_are_samples
    assert cells(raw) == [[1.5, 0.0], [0.0, 3.0]]
    assert raw.clinical is None


def test_obs_is_the_clinical_table_if_it_has_a_clinical_column(tmp_path: Path) -> None:
    path = tmp_path / "e.h5ad"
    annotated(np.ones((2, 2)), dead=[1, 0], batch=["a", "b"]).write_h5ad(path)

    ignored = read(site(expression=path))
    used = read(site(expression=path, columns=DataColumns(event="dead")))

    assert ignored.clinical is None
    assert used.clinical is not None
    assert used.clinical.table["sample"].tolist() == ["007", "008"]
    assert used.clinical.table["patient"].tolist() == ["007", "008"]
    assert used.clinical.table["dead"].tolist() == ["1", "0"]


def test_a_clinical_file_goes_before_obs(tmp_path: Path) -> None:
    path, clinical = tmp_path / "e.h5ad", tmp_path / "c.csv"
    annotated(np.ones((2, 2)), event=[1, 0]).write_h5ad(path)
    clinical.write_text("patient,event\n007,0\n")

    raw = read(site(expression=path, clinical=clinical))

    assert raw.clinical is not None
    assert raw.clinical.file == "c.csv"


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("e.csv", b"", Code.FILE_EMPTY),
        ("e.csv", b"id,TP53\n", Code.FILE_EMPTY),
        ("e.csv", b"id\nP1\n", Code.FILE_EMPTY),
        ("e.csv", b"id TP53 MYC\nP1 1 2\n", Code.WRONG_DELIMITER),
        ("e.csv", b"id;TP53;MYC\nP1;1\n", Code.WRONG_DELIMITER),
        ("e.csv", b"TP53,MYC\nP1,1,2\nP2,1\n", Code.RAGGED_ROWS),
        ("e.csv", b"id,TP53\nP1,1,5\nP2,2\n", Code.RAGGED_ROWS),
        ("e.csv", "id,TP53\nŁukasz,1\n".encode("cp1250"), Code.FILE_UNREADABLE),
        (
            "e.csv.gz",
            gzip.compress(CSV.encode() * 999, mtime=0)[:60],
            Code.FILE_UNREADABLE,
        ),
        ("e.parquet", b"PAR1 torn", Code.FILE_UNREADABLE),
        ("e.h5ad", b"torn", Code.FILE_UNREADABLE),
        ("e.xlsx", b"PK", Code.FILE_UNREADABLE),
    ],
)
def test_a_file_that_cannot_be_used_is_one_finding(
    tmp_path: Path, name: str, content: bytes, code: Code
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    assert refused(site(expression=path)) == [code]


def test_all_files_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "hgnc.txt").write_text("symbol\nTP53\n")
    settings = site(
        expression=tmp_path / "absent.csv",
        clinical=tmp_path,
        hgnc_table=tmp_path / "hgnc.txt",
    )

    assert refused(settings) == [
        Code.FILE_MISSING,
        Code.FILE_MISSING,
        Code.GENE_TABLE_UNUSABLE,
    ]


def test_a_refusal_does_not_carry_the_row_that_caused_it(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_bytes("id,TP53\nŁukasz-4711,1\n".encode("cp1250"))

    with pytest.raises(DataError) as refusal:
        read(site(expression=path))

    assert "4711" not in "".join(traceback.format_exception(refusal.value))


# ---- as tools and portals write them ----


def frame() -> pd.DataFrame:
    index = pd.Index([f"P{i}" for i in range(4)], name="id")
    values = np.arange(8.0).reshape(4, 2) / 4
    return pd.DataFrame(values, index, ["TP53", "MYC"])


PACKED = {
    "e.csv.gz": {"compression": "gzip"},
    "e.csv.bz2": {"compression": "bz2"},
    "plain.csv.gz": {"compression": None},
    "E.CSV": {},
    "e.tsv": {"sep": "\t"},
    "e.txt": {"sep": "\t"},
    "e.tab": {"sep": "\t"},
    "utf16.csv": {"encoding": "utf-16"},
    "bom.csv": {"encoding": "utf-8-sig"},
}


@pytest.mark.parametrize("name", PACKED)
def test_text_is_read_however_it_is_packed_or_called(tmp_path: Path, name: str) -> None:
    frame().to_csv(tmp_path / name, **PACKED[name])

    raw = read(site(expression=tmp_path / name))

    assert raw.expression.rows == tuple(frame().index)
    numbers = [[float(cell) for cell in column] for column in cells(raw)]
    assert numbers == frame().T.to_numpy().tolist()


BEFORE = {
    "comments": "# Program:featureCounts v2.0.6; Command:...\n#second\n",
    "blank lines": "\n\n",
    "a spreadsheet's delimiter": "sep=\t\n",
    "GCT's version and sizes": "#1.2\n2\t4\n",
    "GCT from a spreadsheet": "#1.2\t\t\t\n2\t4\t\t\n",
}


@pytest.mark.parametrize("kind", BEFORE)
def test_lines_before_the_header_are_passed_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "e.tsv"
    path.write_text(BEFORE[kind] + frame().to_csv(sep="\t"))

    raw = read(site(expression=path))

    assert raw.expression.columns == ("TP53", "MYC")
    assert len(raw.expression.rows) == 4


def test_a_header_divided_by_spaces_is_refused_as_that(tmp_path: Path) -> None:
    path = tmp_path / "e.tsv"
    path.write_text(frame().to_csv(sep=" "))

    with pytest.raises(DataError, match="divided by spaces"):
        read(site(expression=path))


def test_only_comments_are_nothing_to_read(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text("# one\n# two\n")

    assert refused(site(expression=path)) == [Code.FILE_EMPTY]
