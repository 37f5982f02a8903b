"""Axes, scales and names of genes of an expression file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgex.common.data.scales import Scale
from fedgex.common.ingestion.expression import known_genes
from fedgex.common.ingestion.settings import DataSettings

from .cases import (
    GENES,
    HGNC,
    PATIENTS,
    clinical,
    expression,
    load,
    reported,
)

# ---- orientation ----


def test_orientation_is_recognised_by_identifiers(tmp_path: Path) -> None:
    unknown = [f"XGENE{i}" for i in range(6)]
    sheet = expression().set_axis(unknown, axis=1)

    straight, _ = load(tmp_path, sheet, clinical(), unknown_genes="keep")
    turned, findings = load(tmp_path, sheet.T, clinical(), unknown_genes="keep")

    assert turned.genes == straight.genes == tuple(unknown)
    np.testing.assert_array_equal(turned.expression, straight.expression)
    assert "columns are samples" in findings[0].found
    assert "identifiers" in findings[0].found


def test_orientation_is_recognised_by_genes_without_a_clinical_table(
    tmp_path: Path,
) -> None:
    turned, findings = load(tmp_path, expression().T)

    assert turned.patients == tuple(PATIENTS)
    assert "names of genes" in findings[0].found


def test_orientation_that_nothing_tells_is_refused_unless_declared(
    tmp_path: Path,
) -> None:
    sheet = expression().set_axis([f"X{i}" for i in range(6)], axis=1)

    assert "FX-DATA-011" in reported(tmp_path, sheet)
    told = {"orientation": "genes-by-samples", "unknown_genes": "keep"}
    cohort, _ = load(tmp_path, sheet.T, **told)
    assert cohort.patients == tuple(PATIENTS)


@pytest.mark.parametrize("with_clinical", [True, False])
def test_a_declared_orientation_that_the_labels_contradict_is_refused(
    tmp_path: Path, with_clinical: bool
) -> None:
    table = clinical() if with_clinical else None

    assert "FX-DATA-012" in reported(
        tmp_path, expression(), table, orientation="genes-by-samples"
    )


# ---- scale ----


def test_values_are_converted_to_the_scale_of_the_study(tmp_path: Path) -> None:
    linear = (2 ** expression().astype(float) - 1).round(6)

    cohort, _ = load(tmp_path, linear, scale=Scale.LINEAR)

    np.testing.assert_allclose(
        cohort.expression, expression()[sorted(GENES)].to_numpy(float), atol=1e-4
    )


def test_counts_with_library_sizes_are_counts_per_million(tmp_path: Path) -> None:
    counts = expression().astype(float).mul(10).round().astype(int)
    table = clinical().assign(library_size=2_000_000)

    cohort, findings = load(
        tmp_path, counts, table, scale=Scale.COUNTS, target=Scale.LINEAR
    )

    expected = counts[sorted(GENES)].to_numpy() / 2
    np.testing.assert_allclose(cohort.expression, expected)
    assert "FX-DATA-037" in {finding.code for finding in findings}


@pytest.mark.parametrize("library_size", ["", 0, 100, "inf"])
def test_a_library_size_that_cannot_be_is_refused(
    tmp_path: Path, library_size: Any
) -> None:
    counts = expression().astype(float).mul(10).round().astype(int)
    table = clinical().assign(library_size=2_000_000).astype(object)
    table.loc[3, "library_size"] = library_size

    assert "FX-DATA-036" in reported(tmp_path, counts, table, scale=Scale.COUNTS)


def test_relative_values_pass_where_the_study_is_relative(tmp_path: Path) -> None:
    relative = expression().astype(float) - 8

    cohort, _ = load(tmp_path, relative, scale=Scale.RELATIVE, target=Scale.RELATIVE)

    assert (cohort.expression < 0).any()


# ---- genes ----


def test_ensembl_ids_and_retired_symbols_become_current(tmp_path: Path) -> None:
    (tmp_path / "hgnc.txt").write_text(HGNC)
    names = ["ENSG00000141510.18", "bHLHe39", "ERBB", "ACTB", "KRAS2", "NOSUCH"]
    sheet = expression().set_axis(names, axis=1)

    cohort, findings = load(tmp_path, sheet, hgnc_table=tmp_path / "hgnc.txt")

    assert cohort.genes == ("ACTB", "EGFR", "KRAS", "MYC", "TP53")
    by_code = {finding.code: finding.found for finding in findings}
    assert by_code["FX-DATA-041"].startswith("1 gene (NOSUCH)")
    assert by_code["FX-DATA-043"].startswith("3 genes (bHLHe39, ERBB, KRAS2)")


def test_ensembl_ids_need_no_table_of_the_hospitals(tmp_path: Path) -> None:
    ids = ["ENSG00000141510.18", "ENSG00000136997", "ENSG00000146648"]
    known, _ = load(tmp_path, expression().iloc[:, :3].set_axis(ids, axis=1))
    unknown = [f"ENSG9999999999{i}.1" for i in range(6)]
    codes = reported(tmp_path, expression().set_axis(unknown, axis=1), clinical())

    assert known.genes == ("EGFR", "MYC", "TP53")
    assert {"FX-DATA-040", "FX-DATA-041"} <= set(codes)


KINDS = {
    "Ensembl transcripts": [f"ENST0000026930{i}.9" for i in range(6)],
    "mouse symbols": ["Trp53", "Egfr", "Kras", "Myc", "Actb", "Vim"],
    "Illumina probes": [f"ILMN_16517{i}" for i in range(6)],
    "Entrez ids": ["7157", "1956", "3845", "4609", "60", "7431"],
    "RefSeq transcripts": [f"NM_00054{i}.6" for i in range(6)],
    "Affymetrix probes": [f"20174{i}_s_at" for i in range(6)],
    "Agilent probes": [f"A_23_P10000{i}" for i in range(6)],
    "methylation probes": [f"cg0000002{i}" for i in range(6)],
    "microRNAs": [f"hsa-miR-{i}-5p" for i in range(6)],
    "symbols in lower case": ["tp53", "egfr", "kras", "myc", "actb", "vim"],
    "labels of no known kind": [f"P{i:03d}" for i in range(6)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_name_no_genes_are_refused_by_their_kind(
    tmp_path: Path, kind: str
) -> None:
    sheet = expression().set_axis(KINDS[kind], axis=1)

    finding = reported(tmp_path, sheet, clinical())["FX-DATA-049"]

    assert kind in finding.found
    assert "0 of 6" in finding.found
    assert not any(label in str(finding) for label in KINDS[kind][:4])


def test_half_of_the_labels_may_be_of_other_genes(tmp_path: Path) -> None:
    novel = expression().rename(columns={"TP53": "X1", "MYC": "X2", "EGFR": "X3"})

    cohort, _ = load(tmp_path, novel, clinical())

    assert {"X1", "X2", "X3"} < set(cohort.genes)


def test_only_names_of_genes_may_leave() -> None:
    genes, data = ("P001", "TP53", "X1"), settings()

    assert known_genes(genes, data, fixed=()) == ("TP53",)
    assert known_genes(genes, data, fixed=("X1",)) == ("TP53", "X1")
    assert known_genes(genes, settings(unknown_genes="keep"), ()) == genes


def settings(**data: Any) -> DataSettings:
    return DataSettings(expression=Path("e.csv"), scale=Scale.LOG2P1, **data)


def test_only_the_first_ten_genes_are_named(tmp_path: Path) -> None:
    sheet = expression()
    for i in range(25):
        sheet[f"FLAT{i:02d}"] = 1.0

    keep = {"unknown_genes": "keep"}
    found = reported(tmp_path, sheet, clinical(), **keep)["FX-DATA-047"].found

    assert found.startswith("25 genes (FLAT00, ")
    assert "FLAT09 and 15 more)" in found


def test_a_matrix_of_xena_is_read_by_what_was_added(tmp_path: Path) -> None:
    tpm = np.exp2(expression().astype(float)) - 1
    tpm.iloc[:, 0] = 0.0
    declared = "log2(tpm+0.001)"

    cohort, _ = load(tmp_path, np.log2(tpm + 0.001).round(4), scale=declared)

    np.testing.assert_allclose(
        np.exp2(cohort.expression) - 1, tpm[list(cohort.genes)], rtol=1e-3, atol=1e-4
    )


def test_zeros_on_a_floor_show_what_was_added(tmp_path: Path) -> None:
    sheet = expression().astype(float)
    sheet.iloc[:5, 0] = -9.9658

    finding = reported(tmp_path, sheet)["FX-DATA-032"]

    assert "log2(x+0.001)" in finding.action


def test_a_logarithm_without_what_was_added_is_refused() -> None:
    with pytest.raises(ValueError, match="what was added before the logarithm"):
        DataSettings.model_validate({"expression": "e.csv", "scale": "log2"})
