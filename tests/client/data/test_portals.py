"""Matrices as portals and anndata give them, read to the numbers that were written."""

import csv
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from fedgex.common.codes import Code
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.ingestion.readers import read
from fedgex.common.ingestion.settings import DataSettings

from .matrices import GENES, SAMPLES, found, matrix, refusal, same

# ---- portals ----


def test_cbioportal_names_genes_twice(tmp_path: Path) -> None:
    sheet = matrix().rename_axis("Hugo_Symbol").reset_index()
    sheet.insert(1, "Entrez_Gene_Id", range(1, 7))
    sheet.loc[6] = ["TP53", 99, *sheet.iloc[0, 2:]]  # twice, the same values
    sheet.loc[7] = ["MYC", 98, *([1.0] * 12)]  # twice, other values
    sheet.to_csv(tmp_path / "data_mrna.txt", sep="\t", index=False)
    settings = DataSettings.model_validate(
        {"expression": tmp_path / "data_mrna.txt", "scale": "log2p1"}
    )

    cohort, findings = read_cohort(settings, 1, settings.scale, ())

    texts = {f.code: f.found for f in findings}
    assert cohort.patients == tuple(SAMPLES)
    assert "Entrez_Gene_Id" in texts[Code.ANNOTATION]
    assert "TP53" in texts[Code.GENES_REPEATED]
    assert "MYC" in texts[Code.GENES_CONTRADICTORY]
    assert "MYC" not in cohort.genes


@pytest.mark.parametrize("first", ["Entrez_Gene_Id", "", "ID_REF"])
def test_symbols_in_the_second_column_are_the_labels(
    tmp_path: Path, first: str
) -> None:
    sheet = matrix().rename_axis("Hugo_Symbol").reset_index()
    sheet.insert(0, first, range(1, 7))
    sheet.to_csv(tmp_path / "e.tsv", sep="\t", index=False)

    frame, note = found(tmp_path / "e.tsv")

    same(frame)
    assert set(frame.columns) == set(SAMPLES)
    assert "Hugo_Symbol" in note


def test_firehose_joins_two_names_and_names_the_measure_twice(tmp_path: Path) -> None:
    entrez = dict(
        zip(GENES, ["7157", "4609", "1956", "60", "3845", "7431"], strict=True)
    )
    sheet = matrix().rename(lambda gene: f"{gene}|{entrez[gene]}")
    sheet.loc["?|100130426"] = 0.0
    lines = sheet.rename_axis("Hybridization REF").to_csv(sep="\t").splitlines()
    lines.insert(1, "\t".join(["gene_id", *["normalized_count"] * 12]))
    (tmp_path / "e.data.txt").write_text("\n".join(lines))

    frame, note = found(tmp_path / "e.data.txt")

    same(frame)
    assert "SYMBOL|ENTREZ" in note
    assert "normalized_count" in note


def test_gct_1_3_holds_annotation_of_rows_and_of_columns(tmp_path: Path) -> None:
    rows = [["id", "pr_gene_symbol", "chr", *SAMPLES]]
    rows += [["dose", "na", "na", *["10"] * 12], ["cell", "na", "na", *["x"] * 12]]
    rows += [[gene, gene, "1", *map(repr, row)] for gene, row in matrix().T.items()]
    rows = [*rows[:3], *([g, g, "1", *map(repr, r)] for g, r in matrix().iterrows())]
    text = "\n".join("\t".join(map(str, row)) for row in rows)
    (tmp_path / "e.gct").write_text(f"#1.3\n6\t12\t2\t2\n{text}\n")

    frame, note = found(tmp_path / "e.gct")

    same(frame)
    assert "GCT 1.3" in note


SERIES = """\
!Series_title\t"Tumours"
!Series_platform_id\t"GPL570"

!Sample_title\t{samples}
!series_matrix_table_begin
{table}!series_matrix_table_end
"""

PLATFORM = """\
#ID = Affymetrix Probe Set ID
!platform_table_begin
ID\tGB_ACC\tGene Symbol
201746_at\tx\tTP53
211300_s_at\tx\tTP53
202431_s_at\tx\tMYC
201983_s_at\tx\tEGFR /// EGFR-AS1
200801_x_at\tx\tACTB
204009_s_at\tx\tKRAS
201426_s_at\tx\tVIM
1007_s_at\tx\t
!platform_table_end
"""
PROBES = [line.split("\t")[0] for line in PLATFORM.splitlines()[3:11]]


def series(path: Path, probes: list[str]) -> pd.DataFrame:
    """Write a series matrix of GEO; return its probes by samples."""
    values = np.random.default_rng(4).normal(8, 1, (len(probes), 12))
    frame = pd.DataFrame(values, pd.Index(probes, name="ID_REF"), SAMPLES)
    table = frame.to_csv(sep="\t", quoting=csv.QUOTE_NONNUMERIC)
    path.write_text(SERIES.format(samples="\t".join(SAMPLES), table=table))
    return frame


@pytest.mark.parametrize("name", ["GPL570.annot", "GPL570-55999.txt"])
def test_a_series_matrix_becomes_genes_by_its_platform(
    tmp_path: Path, name: str
) -> None:
    frame = series(tmp_path / "GSE1_series_matrix.txt", PROBES)
    (tmp_path / name).write_text(PLATFORM)

    read_back, note = found(
        tmp_path / "GSE1_series_matrix.txt", platform_table=tmp_path / name
    )

    brightest = frame.loc[["201746_at", "211300_s_at"]].mean(axis=1).idxmax()
    places = {
        **{"TP53": brightest, "MYC": "202431_s_at", "ACTB": "200801_x_at"},
        **{"KRAS": "204009_s_at", "VIM": "201426_s_at"},
    }
    assert set(read_back.index) == set(places)  # of several genes, or none: left out
    same(read_back, frame.loc[list(places.values())].set_axis(list(places)))
    assert "a GEO series matrix" in note


def test_the_rule_for_several_probes_stands_in_one_note(tmp_path: Path) -> None:
    series(tmp_path / "e.txt", PROBES)
    (tmp_path / "GPL.txt").write_text(PLATFORM)
    data = {"expression": tmp_path / "e.txt", "platform_table": tmp_path / "GPL.txt"}

    raw = read(DataSettings.model_validate(data | {"scale": "log2p1"}))

    (note,) = [f for f in raw.notes if f.code == Code.PROBES_MAPPED]
    assert "8 probes, of 5 genes" in note.found
    assert "1 genes have several" in note.found
    assert "greatest mean" in note.found


def test_probes_without_their_platform_are_one_error_with_the_way_out(
    tmp_path: Path,
) -> None:
    series(tmp_path / "e.txt", PROBES)

    message = refusal(tmp_path / "e.txt")

    assert "Affymetrix probes" in message
    assert "data.platform_table" in message


def test_the_table_of_another_platform_is_refused(tmp_path: Path) -> None:
    series(tmp_path / "e.txt", [f"ILMN_{i}" for i in range(8)])
    (tmp_path / "GPL.txt").write_text(PLATFORM)

    message = refusal(tmp_path / "e.txt", platform_table=tmp_path / "GPL.txt")

    assert "few of the probes" in message


def test_a_platform_without_symbols_is_refused(tmp_path: Path) -> None:
    series(tmp_path / "e.txt", PROBES)
    (tmp_path / "GPL.txt").write_text("ID\tGB_ACC\n1007_s_at\tx\n")

    message = refusal(tmp_path / "e.txt", platform_table=tmp_path / "GPL.txt")

    assert message.startswith("FX-DATA-016")


def test_a_series_matrix_without_values_says_where_they_are(tmp_path: Path) -> None:
    table = "\t".join(["ID_REF", *SAMPLES]) + "\n"
    (tmp_path / "e.txt").write_text(SERIES.format(samples="", table=table))

    assert "supplementary files" in refusal(tmp_path / "e.txt")


@pytest.mark.parametrize(
    "lines",
    [
        ["ENSG00000141510\t2690", "ENSG00000136997\t17", "__no_feature\t9"],
        ["N_unmapped\t9\t9\t9", "N_multimapping\t1\t1\t1", "ENSG00000141510\t5\t2\t3"],
        ["TP53\t5.1\t2.5", "MYC\t1\t2"],
    ],
)
def test_a_file_without_header_is_refused_as_that(
    tmp_path: Path, lines: list[str]
) -> None:
    (tmp_path / "e.txt").write_text("\n".join(lines))

    assert refusal(tmp_path / "e.txt").startswith("FX-DATA-013")


def test_sums_of_reads_are_no_genes(tmp_path: Path) -> None:
    counted = matrix()
    counted.loc["N_unmapped"] = counted.loc["__no_feature"] = 9.0
    counted.to_csv(tmp_path / "e.csv")

    frame, _ = found(tmp_path / "e.csv")

    same(frame)
    assert len(frame) == 6


def test_numbers_may_name_samples(tmp_path: Path) -> None:
    numbered = matrix().set_axis([str(i) for i in range(12)], axis=1)
    numbered.to_csv(tmp_path / "e.csv")

    frame, _ = found(tmp_path / "e.csv")

    same(frame, numbered)


# ---- AnnData ----


def test_a_layer_and_raw_are_read_by_option(tmp_path: Path) -> None:
    values = matrix().T
    made = anndata.AnnData(values, layers={"counts": values + 1})
    made.raw = made.copy()
    made = made[:, :4].copy()
    made.X = made.X / 2
    made.write_h5ad(tmp_path / "e.h5ad")

    layer, note = found(tmp_path / "e.h5ad", layer="counts")
    raw, _ = found(tmp_path / "e.h5ad", layer="raw")

    same(layer, matrix() + 1)
    same(raw)
    assert (len(layer), len(raw)) == (4, 6)
    assert '"counts"' in note


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path,
) -> None:
    layered(tmp_path / "e.h5ad")

    message = refusal(tmp_path / "e.h5ad", layer="counts")

    assert message.startswith("FX-DATA-086")
    assert "half" in message


@pytest.mark.parametrize("part", ["uns/made", "obsm/pca", "obs/batch"])
def test_parts_of_a_newer_anndata_that_are_not_needed_are_read_around(
    tmp_path: Path, part: str
) -> None:
    made = anndata.AnnData(matrix().T, uns={"made": {"by": "us"}})
    made.obsm["pca"], made.obs["batch"] = np.ones((12, 2)), 1.0
    made.write_h5ad(tmp_path / "e.h5ad")
    of_next_century(tmp_path / "e.h5ad", part)

    frame, note = found(tmp_path / "e.h5ad", columns={"sex": "batch"})

    same(frame)
    assert ("batch" in note) == (part == "obs/batch")


@pytest.mark.parametrize("part", ["X", "var/gene"])
def test_a_part_of_a_newer_anndata_that_is_needed_is_refused_as_that(
    tmp_path: Path, part: str
) -> None:
    layered(tmp_path / "e.h5ad")
    of_next_century(tmp_path / "e.h5ad", part)

    assert "a newer anndata than the one installed" in refusal(tmp_path / "e.h5ad")


def test_anndata_from_before_0_7_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "e.h5ad", "w") as file:
        file["X"] = matrix().T.to_numpy()
        for name, labels in (("obs", SAMPLES), ("var", GENES)):
            rows = [(label.encode(),) for label in labels]
            file[name] = np.array(rows, dtype=[("index", "S8")])

    frame, _ = found(tmp_path / "e.h5ad")

    same(frame)


def test_hdf5_that_is_no_anndata_is_refused_as_that(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "e.loom", "w") as file:
        file["matrix"] = matrix().to_numpy()

    assert "no AnnData" in refusal(tmp_path / "e.loom")


def layered(path: Path) -> None:
    made = anndata.AnnData(matrix().T, layers={"half": matrix().T / 2})
    made.write_h5ad(path)


def of_next_century(path: Path, part: str) -> None:
    with h5py.File(path, "a") as file:
        file[part].attrs["encoding-version"] = "9.0.0"
        file[part].attrs["encoding-type"] = "of-the-next-century"
