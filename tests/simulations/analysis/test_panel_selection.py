"""Panels from sums: what is chosen, and what the sites make of it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import multivariate_normal

from fedgex.common.data.cross_products import CrossProducts, by_type, pool_types
from fedgex.common.errors import ConfigError
from fedgex.common.evaluation.imputers import RIDGE
from fedgex.simulations.analysis import panel_selection
from fedgex.simulations.analysis.panel_selection import Types

NAMES = ("A", "B", "C")
FLOOR = 2


def patients(
    seed: int = 1, n: int = 300, n_genes: int = 12
) -> tuple[NDArray[np.float64], list[str]]:
    """Return values and types; correlated genes, of which some tell types apart."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(n_genes, n_genes)) / 2
    shift = np.random.default_rng(5).normal(size=(3, n_genes))
    label = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    noise = rng.normal(size=(n, n_genes)) @ (np.eye(n_genes) + mixing)
    return noise + shift[label], [NAMES[i] for i in label]


def types_of(values: NDArray[np.float64], labels: list[str]) -> Types:
    return Types.of(by_type(values, labels, NAMES, FLOOR), NAMES)


def naive_bound(
    values: NDArray[np.float64], labels: list[str], panel: list[int]
) -> float:
    """Return the bound by its definition, from the rows."""
    x, label = values[:, panel], np.array(labels)
    means = {name: x[label == name].mean(axis=0) for name in NAMES}
    centred = x - np.array([means[name] for name in labels])
    within = centred.T @ centred / len(x) + RIDGE * np.eye(len(panel))
    total = 0.0
    for i, one in enumerate(NAMES):
        for other in NAMES[i + 1 :]:
            gap = means[one] - means[other]
            distance = gap @ np.linalg.inv(within) @ gap
            shares = (label == one).mean() * (label == other).mean()
            total += np.sqrt(shares) * np.exp(-distance / 8)
    return total


def test_each_gene_lowers_the_bound_most_given_those_before() -> None:
    values, labels = patients()

    found = panel_selection.select(types_of(values, labels), 5)

    panel: list[int] = []
    for gene, bound in zip(found.genes.tolist(), found.bound, strict=True):
        others = [g for g in range(values.shape[1]) if g not in panel]
        naive = {g: naive_bound(values, labels, [*panel, g]) for g in others}
        assert gene == min(naive, key=lambda g: naive[g])
        assert bound == pytest.approx(naive[gene], rel=1e-9)
        panel.append(gene)


def test_the_sums_of_sites_choose_as_all_rows_together_do() -> None:
    values, labels = patients()
    sites = [
        by_type(values[rows], [labels[i] for i in rows], NAMES, FLOOR)
        for rows in np.array_split(np.arange(len(values)), 4)
    ]

    split = panel_selection.select(Types.of(pool_types(sites), NAMES), 6)
    whole = panel_selection.select(types_of(values, labels), 6)

    assert split.genes.tolist() == whole.genes.tolist()
    assert split.bound == pytest.approx(whole.bound)


def test_a_copy_of_a_chosen_gene_is_passed_over() -> None:
    rng = np.random.default_rng(3)
    labels = [NAMES[i % 3] for i in range(300)]
    strong = rng.normal(size=300) + 4 * np.array([name == "A" for name in labels])
    copy = strong + 0.01 * rng.normal(size=300)
    weak = rng.normal(size=300) + 1.5 * np.array([name == "B" for name in labels])
    values = np.stack([strong, copy, weak], axis=1)

    found = panel_selection.select(types_of(values, labels), 2)

    assert set(found.genes.tolist()) & {0, 1}
    assert found.genes[1] == 2


def test_a_pair_of_types_that_no_strong_gene_tells_apart_is_not_forgotten() -> None:
    rng = np.random.default_rng(4)
    labels = [NAMES[i % 3] for i in range(600)]
    is_a, is_b = (np.array([name == each for name in labels]) for each in "AB")
    values = rng.normal(size=(600, 5))
    values[:, :4] += 6 * is_a[:, None]  # four genes that all know A
    values[:, 4] += 1.5 * is_b  # one that knows B from C, with the smallest F

    found = panel_selection.select(types_of(values, labels), 2)

    assert found.genes[1] == 4


def test_a_gene_that_is_unknown_in_one_type_is_never_chosen() -> None:
    values, labels = patients()
    values[np.array(labels) == "B", 7] = np.nan
    types = types_of(values, labels)

    found = panel_selection.select(types, 11)

    assert 7 not in found.genes
    with pytest.raises(ConfigError, match="12 genes was asked for; expected 1 to the"):
        panel_selection.select(types, 12)


def test_a_covariance_that_no_patients_can_have_is_mended_before_genes_are_chosen() -> (
    None
):
    products = 10 * np.array([[1.0, 1, -1], [1, 1, 1], [-1, 1, 1]])
    sums = CrossProducts(
        products=products, pair_counts=np.full((3, 3), 10), totals=np.array([1.0, 2, 3])
    )
    other = CrossProducts(
        products=products, pair_counts=sums.pair_counts, totals=-sums.totals
    )

    types = Types.of({"A": sums, "B": other}, ("A", "B"))
    found = panel_selection.select(types, 3)

    assert np.linalg.eigvalsh(types.within).min() == pytest.approx(RIDGE)
    assert sorted(found.genes) == [0, 1, 2]
    assert (np.diff(found.bound) <= 0).all()


def test_fewer_than_two_types_are_refused() -> None:
    values, _ = patients(n=20)

    with pytest.raises(ConfigError, match="describe 1 of the cancer types A, B, C"):
        types_of(values, ["A"] * 20)


def test_the_discriminant_says_which_normal_density_is_the_highest() -> None:
    values, labels = patients()
    unseen, truth = patients(seed=2)
    panel, label = [1, 4, 6], np.array(labels)
    means = {name: values[label == name][:, panel].mean(axis=0) for name in NAMES}
    centred = values[:, panel] - np.array([means[name] for name in labels])
    within = centred.T @ centred / len(values) + RIDGE * np.eye(3)
    densities = [
        (label == name).mean()
        * multivariate_normal(means[name], within).pdf(unseen[:, panel])
        for name in NAMES
    ]
    expected = np.argmax(densities, axis=0)

    types = types_of(values, labels)
    found = panel_selection.classify(types, np.array(panel), unseen)
    right = panel_selection.n_right(types, np.array(panel), unseen, truth)

    assert found.tolist() == expected.tolist()
    assert right == (np.array(NAMES)[expected] == np.array(truth)).sum()


def test_a_patient_of_another_or_no_type_is_never_classified_right() -> None:
    values, labels = patients()

    found = panel_selection.n_right(
        types_of(values, labels), np.arange(3), values[:2], [None, "D"]
    )

    assert found == 0


def test_enough_is_the_smallest_panel_that_reaches_the_share() -> None:
    right = {4: 80, 8: 95, 16: 94, 32: 99, 64: 100}

    assert panel_selection.enough(right, 0.95) == 8
    assert panel_selection.enough(right, 0.99) == 32
    assert panel_selection.enough(right, 1.0) == 64
