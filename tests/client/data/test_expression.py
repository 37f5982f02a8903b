"""Axes, scales and names of genes of an expression file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgex.common.data.scales import Scale

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

    straight, _ = load(tmp_path, sheet, clinical())
    turned, findings = load(tmp_path, sheet.T, clinical())

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
    cohort, _ = load(tmp_path, sheet.T, orientation="genes-by-samples")
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


def test_ensembl_ids_without_a_table_leave_no_genes(tmp_path: Path) -> None:
    ids = [f"ENSG0000000000{i}.1" for i in range(6)]

    codes = reported(tmp_path, expression().set_axis(ids, axis=1), clinical())

    assert {"FX-DATA-040", "FX-DATA-041"} <= set(codes)


def test_only_the_first_ten_genes_are_named(tmp_path: Path) -> None:
    sheet = expression()
    for i in range(25):
        sheet[f"FLAT{i:02d}"] = 1.0

    found = reported(tmp_path, sheet, clinical())["FX-DATA-047"].found

    assert found.startswith("25 genes (FLAT00, ")
    assert "FLAT09 and 15 more)" in found
