import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from fedgex.common.errors import FedgexError
from fedgex.common.evaluation.imputation import restoration


def test_errors_are_means_over_hidden_cells_only():
    true = np.array([[0.0, 1.0], [2.0, np.nan]])
    restored = np.array([[0.5, 9.0], [0.0, 9.0]])
    hidden = np.array([[True, False], [True, False]])

    score = restoration(true, restored, hidden)

    assert score.mse == pytest.approx((0.25 + 4.0) / 2)
    assert score.mae == pytest.approx((0.5 + 2.0) / 2)
    np.testing.assert_allclose(score.gene_mse, [2.125, np.nan])


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_correlations_are_scipys_gene_by_gene_over_hidden_cells(seed):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(30, 8)).round(1)  # with ties
    restored = (true + rng.normal(size=true.shape)).round(1)
    hidden = rng.random(true.shape) < 0.5

    score = restoration(true, restored, hidden)

    for gene in range(8):
        x, y = true[hidden[:, gene], gene], restored[hidden[:, gene], gene]
        if len(x) >= 3:
            assert score.gene_pearson[gene] == pytest.approx(pearsonr(x, y)[0])
            assert score.gene_spearman[gene] == pytest.approx(spearmanr(x, y)[0])
        assert score.gene_mse[gene] == pytest.approx(np.mean((x - y) ** 2))


def test_a_gene_with_two_hidden_cells_or_constant_values_has_no_correlation():
    steps = np.arange(5.0)
    true = np.stack([steps, steps, np.full(5, 0.1), steps], axis=1)
    restored = np.stack([steps, np.full(5, 0.1), steps, steps], axis=1)
    hidden = np.ones(true.shape, dtype=bool)
    hidden[2:, 0] = False

    score = restoration(true, restored, hidden)

    np.testing.assert_allclose(score.gene_pearson, [np.nan, np.nan, np.nan, 1.0])
    np.testing.assert_allclose(score.gene_spearman, [np.nan, np.nan, np.nan, 1.0])
    assert score.n_genes_evaluated == 1


def test_genes_are_counted_by_their_pearson_correlation():
    x = np.array([-1.0, 0.0, 1.0, 0.0])
    noise = np.array([0.0, 1.0, 0.0, -1.0])  # uncorrelated with x, of equal variance
    true = np.stack([x, x, x], axis=1)
    restored = np.stack([x, x + 2 * noise, -x], axis=1)  # r of 1, 1 / sqrt(5) and -1

    score = restoration(true, restored, np.ones(true.shape, dtype=bool))

    assert score.n_genes_evaluated == 3
    assert score.n_genes_r_above_0 == 2
    assert score.n_genes_r_above_half == 1
    assert score.median_pearson == pytest.approx(0.4472136)
    assert score.median_spearman == pytest.approx(score.gene_spearman[1])


def test_spearman_sees_order_where_pearson_sees_lines():
    true = np.arange(1.0, 7.0)[:, None]
    restored = np.exp(true)

    score = restoration(true, restored, np.ones(true.shape, dtype=bool))

    assert score.median_spearman == pytest.approx(1.0)
    assert score.median_pearson < 0.9


def test_the_score_as_flat_numbers_holds_medians_and_counts():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20, 7))
    score = restoration(true, true + 1.0, np.ones(true.shape, dtype=bool))

    assert score.as_dict() == {
        "mse": pytest.approx(1.0),
        "mae": pytest.approx(1.0),
        "pearson": pytest.approx(1.0),
        "spearman": pytest.approx(1.0),
        "genes_r_above_0": 7,
        "genes_r_above_half": 7,
        "genes_judged": 7,
    }


def test_without_a_judged_gene_the_correlations_are_nan_not_zero():
    true = np.random.default_rng(0).normal(size=(9, 3))

    score = restoration(true, np.zeros_like(true), np.ones(true.shape, dtype=bool))

    assert np.isnan([score.median_pearson, score.median_spearman]).all()
    assert np.isnan(score.as_dict()["pearson"])
    assert score.n_genes_evaluated == 0
    assert score.mse == pytest.approx(np.mean(true**2))


def test_nothing_hidden_is_refused():
    true = np.zeros((2, 3))

    with pytest.raises(FedgexError, match="no cell is hidden"):
        restoration(true, true, np.zeros(true.shape, dtype=bool))


@pytest.mark.parametrize("name", ["true", "restored"])
def test_a_hidden_cell_without_a_finite_value_is_refused(name):
    values = {"true": np.zeros((2, 3)), "restored": np.zeros((2, 3))}
    values[name][0, 1] = np.nan

    with pytest.raises(FedgexError, match=f"{name} is not finite in 1 of 6"):
        restoration(**values, hidden=np.ones((2, 3), dtype=bool))


def test_shapes_that_differ_are_refused():
    with pytest.raises(FedgexError, match="expected one"):
        restoration(np.zeros((2, 3)), np.zeros((1, 3)), np.ones((2, 3), dtype=bool))
