"""Names of genes onto current symbols, with a small table in HGNC's format."""

from pathlib import Path

import numpy as np
import pytest

from fedgex.common.data.genes import (
    GeneTable,
    count_genes,
    current_symbols,
    is_gene_like,
    one_column_each,
    retired_symbols,
    spelt_as,
)
from fedgex.common.errors import ConfigError

HEADER = "hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id"
ROWS = """\
HGNC:11998\tTP53\ttumor protein p53\tApproved\tp53|LFS1\t\tENSG00000141510
HGNC:7526\tMMUT\tmethylmalonyl-CoA mutase\tApproved\tMCM\tMUT\tENSG00000146085
HGNC:12840\tYARS1\ttyrosyl-tRNA synthetase 1\tApproved\t"tyrRS|TYRRS"\tYARS\t\
ENSG00000134684
HGNC:1\tAAA1\tone\tApproved\tTWIN|p53b\tOLD\t
HGNC:2\tAAA2\ttwo\tApproved\tTWIN\tOLD|LFS1\t
HGNC:3\tMUT~withdrawn\tentry withdrawn\tEntry Withdrawn\tGHOST\t\t
HGNC:4\tMCM\tnow a gene of its own\tApproved\t\t\tENSG00000000004
"""


@pytest.fixture
def table(tmp_path: Path) -> GeneTable:
    path = tmp_path / "hgnc_complete_set.txt"
    path.write_text(f"{HEADER}\n{ROWS}", encoding="utf-8")
    return GeneTable.read(path)


@pytest.mark.parametrize(
    ("label", "symbol"),
    [
        ("TP53", "TP53"),
        ("ENSG00000141510", "TP53"),
        ("ENSG00000141510.18", "TP53"),
        ("MUT", "MMUT"),
        ("YARS", "YARS1"),
        ("TYRRS", "YARS1"),
        ("p53", "TP53"),
    ],
)
def test_a_name_finds_its_current_symbol(
    table: GeneTable, label: str, symbol: str
) -> None:
    assert current_symbols([label], table).symbols == (symbol,)


def test_only_retired_names_count_as_updated(table: GeneTable) -> None:
    names = current_symbols(["TP53", "MUT", "p53", "ENSG00000146085.3"], table)

    assert names.updated == ("MUT", "p53")


def test_an_approved_symbol_is_never_taken_for_the_alias_of_another(
    table: GeneTable,
) -> None:
    assert current_symbols(["MCM"], table).symbols == ("MCM",)


def test_a_previous_symbol_comes_before_an_alias(table: GeneTable) -> None:
    assert current_symbols(["LFS1"], table).symbols == ("AAA2",)


@pytest.mark.parametrize("label", ["OLD", "TWIN"])
def test_a_name_that_several_genes_had_is_ambiguous(
    table: GeneTable, label: str
) -> None:
    names = current_symbols([label, "TP53"], table)

    assert names.symbols == (None, "TP53")
    assert names.ambiguous == (label,)
    assert names.unmapped == ()


@pytest.mark.parametrize(
    "label",
    ["NOSUCH", "ENSG00000999999", "GHOST", "", "7157", "ENSG00000141510.18_PAR_Y"],
)
def test_a_name_that_the_table_does_not_hold_is_unmapped(
    table: GeneTable, label: str
) -> None:
    names = current_symbols([label], table)

    assert names.symbols == (None,)
    assert names.unmapped == (label,)


def test_without_a_table_symbols_stay_and_ensembl_ids_are_looked_up() -> None:
    names = current_symbols(
        ["TP53", "MUT", "C1orf112", "HLA-A", "ENSG00000141510.2", "ENSG99999999999"],
        None,
    )

    assert names.symbols == ("TP53", "MUT", "C1orf112", "HLA-A", "TP53", None)
    assert names.unmapped == ("ENSG99999999999",)


def test_the_packaged_table_knows_symbols_of_today_and_before_and_no_alias() -> None:
    table = GeneTable.packaged()

    assert all(map(table.knows, ("TP53", "MARCH1", "MARCHF1", "C1orf112")))
    assert not any(map(table.knows, ("P001", "Trp53", "P53", "S1", "patient")))
    assert table.by_ensembl["ENSG00000141510"] == "TP53"


@pytest.mark.parametrize("label", ["2-Sep", "Mar-01", "7157", "", "?|10357", "1.5"])
def test_dates_and_numbers_are_no_genes(label: str) -> None:
    assert not is_gene_like(label)
    assert current_symbols([label], None).unmapped == (label,)


def test_a_file_that_is_no_gene_table_is_refused_with_the_columns(
    tmp_path: Path,
) -> None:
    path = tmp_path / "hgnc.txt"
    path.write_text("symbol,status\nTP53,Approved\n", encoding="utf-8")

    with pytest.raises(ConfigError, match="prev_symbol"):
        GeneTable.read(path)


def test_columns_are_sorted_by_symbol() -> None:
    chosen = one_column_each(["b", "a"], ["B", "A"], np.zeros((2, 2)))

    assert chosen.genes == ("A", "B")
    assert chosen.columns == (1, 0)


def test_the_column_under_the_current_symbol_wins() -> None:
    values = np.array([[1.0, 2.0, 3.0]])

    chosen = one_column_each(["MUT", "MMUT", "TP53"], ["MMUT", "MMUT", "TP53"], values)

    assert chosen.genes == ("MMUT", "TP53")
    assert chosen.columns == (1, 2)
    assert chosen.repeated == ("MMUT",)


def test_equal_columns_are_one_and_missing_equals_missing() -> None:
    values = np.array([[1.0, 1.0], [np.nan, np.nan]])

    chosen = one_column_each(["TP53", "TP53"], ["TP53", "TP53"], values)

    assert chosen.columns == (0,)
    assert chosen.repeated == ("TP53",)


def test_columns_that_differ_are_all_left_out() -> None:
    values = np.array([[1.0, 1.0, 5.0], [2.0, 3.0, 5.0]])

    chosen = one_column_each(["TP53", "TP53", "MYC"], ["TP53", "TP53", "MYC"], values)

    assert chosen.genes == ("MYC",)
    assert chosen.contradictory == ("TP53",)


def test_sure_genes_are_ensembl_ids_and_symbols_that_are_known(
    table: GeneTable,
) -> None:
    labels = ["TP53", "ENSG00000000001.2", "AAA1", "P001"]

    assert count_genes(labels, None) == 2
    assert count_genes(labels, table) == 3


def test_a_retired_symbol_finds_the_gene_that_has_it_now() -> None:
    retired = retired_symbols(["MARCH1", "SEPT2", "TP53", "GENE0001", "MARCHF1"])

    assert retired == {"MARCH1": "MARCHF1", "SEPT2": "SEPTIN2"}


@pytest.mark.parametrize(
    ("in_file", "in_study", "spelt"),
    [
        (("MARCH1", "TP53"), ("MARCHF1", "TP53"), ("MARCHF1", "TP53")),
        (("MARCHF1", "TP53"), ("MARCH1", "TP53"), ("MARCH1", "TP53")),
        (("MARCH1", "MARCHF1"), ("MARCHF1",), ("MARCH1", "MARCHF1")),
        (("MARCH1", "MARCHF1"), ("MARCH1",), ("MARCH1", "MARCHF1")),
        (("MARCH1", "SEPT2"), ("SEPTIN2",), ("MARCH1", "SEPTIN2")),
        (("MARCH1", "SEPT2"), (), ("MARCH1", "SEPT2")),
    ],
)
def test_a_file_s_genes_are_spelt_as_the_study_spells_them(
    in_file: tuple[str, ...], in_study: tuple[str, ...], spelt: tuple[str, ...]
) -> None:
    assert spelt_as(in_file, in_study) == spelt
