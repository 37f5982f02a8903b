import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA

from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.moments import GeneMoments, Standardisation
from fedgex.common.errors import ConfigError
from fedgex.common.evaluation.imputation import restoration
from fedgex.common.evaluation.imputers import (
    GaussianImputer,
    MeanImputer,
    MixtureImputer,
    NearestNeighbours,
    fit_mixture,
    ppca,
)
from fedgex.common.models.masking import mcar


def patients(n: int, V: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Return correlated rows about `shift`; the correlation is that of the seed 0."""
    loadings = np.random.default_rng(0).normal(size=(3, V))
    rng = np.random.default_rng(seed)
    return shift + rng.normal(size=(n, 3)) @ loadings + rng.normal(size=(n, V)) / 2


def with_gaps(values: np.ndarray, rate: float, seed: int = 0) -> np.ndarray:
    gaps = np.random.default_rng(seed).random(values.shape) < rate
    return np.where(gaps, np.nan, values).astype(values.dtype)


def every_imputer(V: int) -> list:
    rows = patients(60, V)
    covariance = np.cov(rows, rowvar=False)
    return [
        MeanImputer(),
        MeanImputer(rows.mean(axis=0)),
        NearestNeighbours(rows, k=3),
        GaussianImputer(covariance),
        ppca(covariance, 2),
        fit_mixture(rows, ["a", "b", "c"] * 20),
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
def test_missing_cells_are_filled_and_measured_ones_untouched_bit_for_bit(rate, dtype):
    values = with_gaps(patients(7, 9, seed=1).astype(dtype), rate)
    before = values.copy()
    missing = np.isnan(values)

    for imputer in every_imputer(9):
        filled = imputer.impute(values)

        assert filled.dtype == dtype
        assert np.isfinite(filled).all()
        assert filled[~missing].tobytes() == values[~missing].tobytes()
        np.testing.assert_array_equal(values, before)


def test_the_mean_imputer_fills_with_0_or_with_the_mean_given():
    values = np.array([[1.0, np.nan], [np.nan, np.nan]])

    assert MeanImputer().impute(values).tolist() == [[1, 0], [0, 0]]
    assert MeanImputer(np.array([5.0, 7.0])).impute(values).tolist() == [[1, 7], [5, 7]]


def test_the_gaussian_of_two_genes_follows_the_regression_line():
    covariance = np.array([[1.0, 0.6], [0.6, 1.0]])
    values = np.array([[2.0, np.nan], [np.nan, -1.0], [np.nan, np.nan]])

    filled = GaussianImputer(covariance, ridge=0.5).impute(values)

    np.testing.assert_allclose(filled, [[2.0, 0.8], [-0.4, -1.0], [0.0, 0.0]])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_gaussian_fills_with_the_conditional_mean_of_its_definition(rate):
    mean = np.linspace(-1, 1, 12)
    covariance = np.cov(patients(40, 12), rowvar=False)
    values = with_gaps(patients(20, 12, seed=2), rate)
    one_panel = np.isnan(values[4])
    values[5:8] = np.where(one_panel, np.nan, patients(3, 12, seed=3))

    filled = GaussianImputer(covariance, mean=mean).impute(values)

    S = covariance + 0.05 * np.eye(12)
    for row, result in zip(values, filled, strict=True):
        M, O = np.isnan(row), ~np.isnan(row)  # noqa: E741
        slope = S[np.ix_(M, O)] @ np.linalg.inv(S[np.ix_(O, O)])
        np.testing.assert_allclose(
            result[M], mean[M] + slope @ (row - mean)[O], atol=1e-10
        )


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8])
def test_the_log_density_is_that_of_the_measured_genes(rate):
    mean = np.linspace(-1, 1, 12)
    covariance = np.cov(patients(40, 12), rowvar=False)
    values = with_gaps(patients(20, 12, seed=2), rate)
    values[0] = np.nan

    _, log_density = GaussianImputer(covariance, mean=mean).condition(values)

    S = covariance + 0.05 * np.eye(12)
    assert log_density[0] == pytest.approx(0.0)  # nothing measured, nothing learnt
    for row, result in zip(values[1:], log_density[1:], strict=True):
        seen = ~np.isnan(row)
        if seen.any():
            truth = multivariate_normal(mean[seen], S[np.ix_(seen, seen)])
            assert result == pytest.approx(truth.logpdf(row[seen]))


def test_a_gene_that_was_never_measured_is_imputed_0_and_changes_nothing():
    rows = patients(50, 6)
    values = with_gaps(patients(8, 6, seed=3), 0.4)
    wider = np.column_stack([rows, np.full(50, np.nan)])
    wider_values = np.column_stack([values, np.full(8, np.nan)])

    without = GaussianImputer(CrossProducts.of(rows).covariance()).impute(values)
    filled = GaussianImputer(CrossProducts.of(wider).covariance()).impute(wider_values)
    typed = fit_mixture(wider, ["a", "b"] * 25).impute(wider_values)

    np.testing.assert_allclose(filled[:, :6], without)
    np.testing.assert_allclose(filled[:, 6], 0, atol=1e-12)
    np.testing.assert_allclose(typed[:, 6], 0, atol=1e-12)


def test_a_covariance_with_negative_eigenvalues_still_imputes():
    # Three panels of two genes each: every pair is fine, the three together are not.
    covariance = np.array([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]])
    assert np.linalg.eigvalsh(covariance)[0] < -0.05

    filled = GaussianImputer(covariance).impute(np.array([[np.nan, 1.0, 1.0]]))

    assert np.isfinite(filled).all()
    assert abs(filled[0, 0]) < 3


def test_a_covariance_that_cannot_be_inverted_is_refused():
    with pytest.raises(ConfigError, match="zero variance"):
        GaussianImputer(np.ones((3, 3)), ridge=0.0)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_ppca_covariance_is_scikit_learns(rank):
    rows = patients(40, 8)

    imputer = ppca(np.cov(rows, rowvar=False), rank)

    expected = PCA(n_components=rank, svd_solver="full").fit(rows).get_covariance()
    np.testing.assert_allclose(imputer.covariance, expected, atol=1e-10)


def test_ppca_of_a_covariance_without_variance_to_spare_still_imputes():
    # As in the test above, of panels; and of fewer patients than the rank.
    panels = np.array([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]])
    few = np.cov(patients(4, 12), rowvar=False)

    for covariance in (panels, few):
        V = len(covariance)
        filled = ppca(covariance, V - 1).impute(np.array([[np.nan] + (V - 1) * [1.0]]))

        assert np.isfinite(filled).all()
        assert abs(filled[0, 0]) < 3


@pytest.mark.parametrize("rank", [0, 8])
def test_a_ppca_rank_out_of_range_is_refused(rank):
    with pytest.raises(ConfigError, match="expected 1 to 7"):
        ppca(np.eye(8), rank)


def test_neighbours_are_the_nearest_patients_who_have_the_gene():
    training = np.array([[0.0, 1.0], [0.1, np.nan], [0.2, 3.0], [9.0, 90.0]])

    filled = NearestNeighbours(training, k=2).impute(np.array([[0.1, np.nan]]))

    assert filled[0, 1] == pytest.approx((1.0 + 3.0) / 2)


def test_a_gene_that_no_neighbour_has_is_imputed_0():
    training = np.array([[0.0, np.nan], [1.0, np.nan]])

    filled = NearestNeighbours(training, k=2).impute(np.array([[0.1, np.nan]]))

    assert filled.tolist() == [[0.1, 0.0]]


def test_each_component_is_the_types_mean_and_half_shared_half_own_covariance():
    rows = np.concatenate([patients(30, 5), 2 * patients(60, 5, seed=4, shift=3.0)])
    labels = ["kidney"] * 30 + ["breast"] * 60

    mixture = fit_mixture(rows, labels)

    breast, kidney = rows[30:], rows[:30]
    own = np.cov(breast, rowvar=False, ddof=0)
    shared = (60 * own + 30 * np.cov(kidney, rowvar=False, ddof=0)) / 90
    assert mixture.types == ("breast", "kidney")
    np.testing.assert_allclose(mixture.shares, [2 / 3, 1 / 3])
    np.testing.assert_allclose(mixture.components[0].mean, breast.mean(axis=0))
    np.testing.assert_allclose(
        mixture.components[0].covariance, (shared + own) / 2 + 0.05 * np.eye(5)
    )


def test_responsibilities_follow_bayes_rule_on_the_measured_genes():
    rows = np.concatenate([patients(30, 5), patients(60, 5, seed=4, shift=1.0)])
    mixture = fit_mixture(rows, ["kidney"] * 30 + ["breast"] * 60)
    values = with_gaps(patients(9, 5, seed=5), 0.5)
    values[0] = np.nan

    responsibilities = mixture.responsibilities(values)

    np.testing.assert_allclose(responsibilities[0], [2 / 3, 1 / 3])
    for row, result in zip(values[1:], responsibilities[1:], strict=True):
        seen = ~np.isnan(row)
        joint = [
            share
            * (
                multivariate_normal(
                    part.mean[seen], part.covariance[np.ix_(seen, seen)]
                ).pdf(row[seen])
                if seen.any()
                else 1.0
            )
            for share, part in zip(mixture.shares, mixture.components, strict=True)
        ]
        np.testing.assert_allclose(result, np.array(joint) / sum(joint), rtol=1e-6)


def test_a_mixture_weighs_its_components_means_by_their_responsibilities():
    rows = np.concatenate([patients(30, 5), patients(60, 5, seed=4, shift=1.0)])
    mixture = fit_mixture(rows, ["kidney"] * 30 + ["breast"] * 60)
    values = with_gaps(patients(9, 5, seed=5), 0.5)

    filled = mixture.impute(values)

    parts = np.stack([part.impute(values) for part in mixture.components])
    shares = mixture.responsibilities(values)
    expected = (parts * shares.T[:, :, None]).sum(axis=0)
    np.testing.assert_allclose(filled, expected)
    assert shares.min() < 0.3  # the patients are not all of one type ...
    assert shares.max() > 0.7  # ... so a wrong weight would show


def test_a_mixture_of_one_type_is_a_single_gaussian():
    rows = patients(40, 6)
    values = with_gaps(patients(5, 6, seed=6), 0.5)

    filled = fit_mixture(rows, ["kidney"] * 40).impute(values)

    alone = GaussianImputer(
        np.cov(rows, rowvar=False, ddof=0), mean=rows.mean(axis=0)
    ).impute(values)
    np.testing.assert_allclose(filled, alone)


def test_on_real_hospitals_the_linear_references_reach_their_published_errors(
    shared_data,
):
    """Half the genes missing in 60 patients of institutions kept apart."""
    Z, types, T = _institutions_apart(shared_data)
    hidden = mcar(
        torch.ones(T.shape, dtype=torch.bool), 0.5, torch.Generator().manual_seed(1)
    ).numpy()
    shown = np.where(hidden, np.nan, T)
    covariance = CrossProducts.of(Z).covariance()

    def error(imputer: GaussianImputer | MixtureImputer) -> float:
        return restoration(T, imputer.impute(shown), hidden).mse

    gaussian = error(GaussianImputer(covariance))
    assert gaussian == pytest.approx(0.290, abs=0.04)
    assert error(ppca(covariance, 32)) == pytest.approx(0.371, abs=0.04)
    assert error(fit_mixture(Z, types)) / gaussian == pytest.approx(0.93, abs=0.03)


def _institutions_apart(folder):
    """Return training patients, their cancer types, and 60 patients from elsewhere."""
    files = sorted((folder / "tcga" / "rsem_log2").glob("*.parquet"))
    tables = {file.stem: pd.read_parquet(file) for file in files}
    genes = sorted(set.intersection(*(set(t.columns) for t in tables.values())))
    values = pd.concat([table[genes] for table in tables.values()])
    types = np.concatenate([[name] * len(table) for name, table in tables.items()])
    clinical = pd.read_csv(folder / "tcga" / "clinical.csv", index_col="patient")
    institution = clinical["institution"].reindex(values.index).fillna("unknown")
    apart = np.random.default_rng(0).permutation(sorted(set(institution)))[:20]
    test = institution.isin(apart).to_numpy()
    moments = GeneMoments.of(values.to_numpy()[~test])
    scale = Standardisation(mean=moments.mean, sd=moments.sd)
    standardised = scale.apply(values.to_numpy(dtype=np.float32))
    some = np.random.default_rng(1).choice(np.flatnonzero(test), 60, replace=False)
    return standardised[~test], list(types[~test]), standardised[some]
