"""The shared gene list: agreed by share of the sites, placed by name."""

import hashlib

import numpy as np
import pytest

from fedgex.common.data.vocabulary import Vocabulary, agree, least_count
from fedgex.common.errors import ConfigError

PANELS = {"a": ["TP53", "KRAS", "EGFR"], "b": ["KRAS", "EGFR"], "c": ["EGFR", "ALK"]}


@pytest.mark.parametrize(
    ("min_share", "expected"),
    [
        (0.0, ("ALK", "EGFR", "KRAS", "TP53")),
        (1 / 3, ("ALK", "EGFR", "KRAS", "TP53")),
        (0.5, ("EGFR", "KRAS")),
        (2 / 3, ("EGFR", "KRAS")),
        (1.0, ("EGFR",)),
    ],
)
def test_a_gene_enters_if_enough_sites_measure_it(min_share, expected):
    assert agree(PANELS, min_share).genes == expected


def test_a_site_counts_once_however_often_it_names_a_gene():
    assert agree({"a": ["ALK", "ALK", "KRAS"], "b": ["KRAS"]}, 1.0).genes == ("KRAS",)


def test_neither_the_order_of_sites_nor_of_genes_matters():
    turned = {site: genes[::-1] for site, genes in reversed(PANELS.items())}

    assert agree(turned, 0.5) == agree(PANELS, 0.5)


def test_no_common_gene_is_refused_with_what_to_do():
    with pytest.raises(ConfigError) as refusal:
        agree({"a": ["TP53"], "b": ["ENSG00000141510"]}, 1.0)

    assert str(refusal.value) == (
        "none of 2 genes is measured by 100% of 2 sites; lower vocabulary.min_share, "
        "or check that the sites name genes alike."
    )


def test_columns_are_placed_by_name_strangers_dropped_and_gaps_nan():
    vocabulary = Vocabulary(("ALK", "EGFR", "KRAS"))
    values = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)

    placed = vocabulary.place(["KRAS", "MYC", "ALK"], values)

    expected = [[3, np.nan, 1], [6, np.nan, 4]]
    assert np.array_equal(placed, np.float32(expected), equal_nan=True)
    assert placed.dtype == np.float32


def test_a_site_without_any_gene_of_the_vocabulary_is_all_nan():
    placed = Vocabulary(("ALK",)).place(["MYC"], np.ones((2, 1), dtype=np.float32))

    assert placed.shape == (2, 1)
    assert np.isnan(placed).all()


def test_the_hash_is_that_of_the_genes_on_lines():
    vocabulary = Vocabulary(("ALK", "EGFR"))

    assert vocabulary.hash == hashlib.sha256(b"ALK\nEGFR").hexdigest()
    assert vocabulary.hash != Vocabulary(("ALK", "EGFR", "KRAS")).hash
    assert vocabulary.hash != Vocabulary(("ALKEGFR",)).hash


def test_length_and_index_follow_the_list():
    vocabulary = Vocabulary(("ALK", "EGFR", "KRAS"))

    assert len(vocabulary) == 3
    assert vocabulary.index == {"ALK": 0, "EGFR": 1, "KRAS": 2}


@pytest.mark.parametrize("genes", [(), ("KRAS", "ALK"), ("ALK", "ALK")])
def test_an_empty_unsorted_or_repeating_list_is_refused(genes):
    with pytest.raises(ConfigError, match="expected one or more, sorted, each once"):
        Vocabulary(genes)


@pytest.mark.parametrize(
    ("share", "n", "least"),
    [(0.28, 25, 7), (0.56, 25, 14), (0.14, 50, 7), (0.5, 5, 3), (0.0, 9, 0), (1, 9, 9)],
)
def test_a_share_counts_as_it_is_written(share: float, n: int, least: int) -> None:
    assert least_count(share, n) == least
