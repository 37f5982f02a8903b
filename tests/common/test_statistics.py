import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgex.common.errors import UpdateError
from fedgex.common.statistics import (
    SUPPRESSED,
    CrossProducts,
    GeneMoments,
    Standardisation,
    pack,
    pool,
    unpack,
)

PANELS = {"a": (0, 1, 2, 3), "b": (0, 1, 2), "c": (1, 2, 4)}
"""Genes that three sites measure, of six; nobody measures gene 5."""


def sites(seed: int, mean: float = 8.0, sd: float = 2.0) -> list[np.ndarray]:
    """Return three sites of 12, 7 and 30 patients with panels and scattered gaps."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(6, 6))
    made = []
    for n, panel in zip((12, 7, 30), PANELS.values(), strict=True):
        values = mean + sd * rng.normal(size=(n, 6)) @ loadings
        values[rng.random(values.shape) < 0.1] = np.nan
        values[:, [gene for gene in range(6) if gene not in panel]] = np.nan
        made.append(values)
    return made


@pytest.mark.parametrize(("mean", "sd"), [(8.0, 2.0), (20.0, 1e-3), (0.0, 1.0)])
def test_pooled_mean_and_sd_are_those_of_all_patients_together(mean, sd):
    rows = sites(0, mean, sd)

    pooled = pool(GeneMoments.of(site) for site in rows)

    everyone = np.concatenate(rows)[:, :5]
    np.testing.assert_allclose(pooled.mean[:5], np.nanmean(everyone, 0), atol=1e-6)
    np.testing.assert_allclose(
        pooled.sd[:5], np.nanstd(everyone, 0), rtol=1e-6, atol=1e-6
    )
    assert pooled.n_patients == 49
    assert pooled.count.tolist() == [*(~np.isnan(everyone)).sum(0), 0]


@given(st.integers(0, 2**32 - 1), st.permutations(range(3)))
def test_the_order_of_the_sites_is_irrelevant(seed, order):
    moments = [GeneMoments.of(site) for site in sites(seed)]

    pooled, reordered = pool(moments), pool([moments[i] for i in order])

    np.testing.assert_allclose(reordered.mean, pooled.mean, rtol=1e-12)
    np.testing.assert_allclose(reordered.sd, pooled.sd, rtol=1e-9)


def test_a_gene_that_nobody_measures_has_mean_0_and_sd_1():
    pooled = pool(GeneMoments.of(site) for site in sites(0))

    assert (pooled.mean[5], pooled.sd[5]) == (0.0, 1.0)


def test_a_constant_gene_has_sd_1_whatever_rounding_does_to_its_sums():
    values = np.full((1000, 3), [0.0, 0.1, 20.3], dtype=np.float32)

    moments = pool([GeneMoments.of(values[:333]), GeneMoments.of(values[333:])])

    assert moments.sd.tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(moments.mean, values[0])


def test_standardising_gives_mean_0_and_sd_1_in_float32_and_can_be_undone():
    values = np.random.default_rng(0).normal(9, 3, size=(50, 4)).astype(np.float32)
    values[3, 1] = np.nan
    moments = GeneMoments.of(values)
    scale = Standardisation(mean=moments.mean, sd=moments.sd)

    standardised = scale.apply(values)

    assert standardised.dtype == np.float32
    np.testing.assert_allclose(np.nanmean(standardised, 0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(standardised, 0), 1, atol=1e-6)
    np.testing.assert_allclose(scale.undo(standardised), values, rtol=1e-6)


def test_pooled_covariance_is_that_of_all_patients_together():
    rows = [site[:, 1:3] for site in sites(1)]
    rows = [site[~np.isnan(site).any(axis=1)] for site in rows]
    moments = pool(GeneMoments.of(site) for site in rows)
    scale = Standardisation(mean=moments.mean, sd=moments.sd)

    pooled = pool(CrossProducts.of(scale.apply(site)) for site in rows)

    everyone = np.concatenate(rows)
    np.testing.assert_allclose(
        pooled.covariance(), np.corrcoef(everyone, rowvar=False), atol=1e-6
    )


def test_where_panels_differ_each_pair_counts_the_patients_who_have_both():
    rows = sites(2)
    moments = pool(GeneMoments.of(site) for site in rows)
    scale = Standardisation(mean=moments.mean, sd=moments.sd)

    pooled = pool(CrossProducts.of(scale.apply(site)) for site in rows)

    everyone = scale.apply(np.concatenate(rows)).astype(np.float64)
    expected = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            both = ~np.isnan(everyone[:, i] * everyone[:, j])
            assert pooled.pair_counts[i, j] == both.sum()
            if both.any():
                expected[i, j] = np.mean(everyone[both, i] * everyone[both, j])
    np.testing.assert_allclose(pooled.covariance(), expected, atol=1e-6)
    np.testing.assert_allclose(np.diagonal(pooled.covariance())[:5], 1, atol=1e-6)
    assert pooled.covariance()[0, 4] == 0  # no site measures both
    assert not pooled.covariance()[5].any()


def test_packing_halves_a_symmetric_matrix_and_unpacking_restores_it():
    product = CrossProducts.of(np.random.default_rng(0).normal(size=(9, 4)))

    triangle = pack(product.products)

    assert triangle.shape == (10,)
    np.testing.assert_array_equal(unpack(triangle), product.products)
    assert unpack(pack(product.pair_counts)).dtype == product.pair_counts.dtype


@given(st.integers(1, 60))
def test_packing_works_for_any_number_of_genes(size):
    matrix = np.arange(size**2, dtype=np.float64).reshape(size, size)
    symmetric = matrix + matrix.T

    np.testing.assert_array_equal(unpack(pack(symmetric)), symmetric)


@pytest.mark.parametrize("length", [2, 4, 5, 11])
def test_a_packed_matrix_of_impossible_length_is_refused(length):
    with pytest.raises(UpdateError, match="expected"):
        unpack(np.zeros(length))


def test_sites_that_disagree_in_the_number_of_genes_are_refused():
    one, other = np.ones((3, 4)), np.ones((3, 5))

    with pytest.raises(UpdateError, match="of 4 and of 5 genes"):
        pool([GeneMoments.of(one), GeneMoments.of(other)])
    with pytest.raises(UpdateError, match="of 4 and of 5 genes"):
        pool([CrossProducts.of(one), CrossProducts.of(other)])


def test_statistics_of_no_site_are_refused():
    with pytest.raises(UpdateError, match="no site"):
        pool([])


def test_numbers_that_are_not_finite_are_refused_and_named():
    with pytest.raises(UpdateError, match="total holds 1 numbers"):
        GeneMoments.of(np.array([[1.0, np.inf]]))
    with pytest.raises(UpdateError, match="products holds"):
        CrossProducts.of(np.array([[1.0, np.inf]]))


def test_counts_above_the_number_of_patients_are_refused():
    with pytest.raises(UpdateError, match="1 genes are impossible"):
        GeneMoments(
            count=np.array([3, 4]),
            total=np.ones(2),
            square_total=np.ones(2),
            n_patients=3,
        )


def test_what_few_patients_tell_is_suppressed_and_exactly_the_floor_is_told():
    cells = np.full((4, 3), np.nan)
    cells[:3, 0], cells[:2, 1] = (1.0, 2.0, 4.0), (3.0, 5.0)

    told = GeneMoments.of(cells).suppressed(3)

    assert told.count.tolist() == [3, SUPPRESSED, SUPPRESSED]
    assert told.total.tolist() == [7.0, 0.0, 0.0]
    assert told.square_total.tolist() == [21.0, 0.0, 0.0]
    assert told.n_patients == 4


def test_pairs_of_few_patients_are_suppressed():
    cells = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, np.nan]])

    told = CrossProducts.of(cells).suppressed(3)

    assert told.pair_counts.tolist() == [[3, SUPPRESSED], [SUPPRESSED, SUPPRESSED]]
    assert told.products.tolist() == [[35.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("floor", [1, 2, 3])
def test_suppressed_counts_are_as_if_the_site_had_not_measured_the_gene(floor):
    one = np.array([[1.0, np.nan], [2.0, 5.0], [np.nan, np.nan]])
    other = np.array([[4.0, 6.0], [8.0, 7.0], [9.0, 1.0]])
    seen = np.where((~np.isnan(one)).sum(axis=0) >= floor, one, np.nan)

    moments = pool(GeneMoments.of(cells).suppressed(floor) for cells in (one, other))
    products = pool(CrossProducts.of(cells).suppressed(floor) for cells in (one, other))

    expected = pool([GeneMoments.of(seen), GeneMoments.of(other)])
    np.testing.assert_array_equal(moments.count, expected.count)
    np.testing.assert_array_equal(moments.mean, expected.mean)
    np.testing.assert_array_equal(moments.sd, expected.sd)
    np.testing.assert_array_equal(np.diag(products.pair_counts), expected.count)


def test_a_gene_that_every_site_suppresses_has_mean_zero_and_sd_one():
    nothing = GeneMoments.of(np.ones((2, 1))).suppressed(3)

    for moments in (pool([nothing]), pool([nothing, nothing])):
        assert moments.mean.tolist() == [0.0]
        assert moments.sd.tolist() == [1.0]


def test_sums_beside_a_suppressed_count_are_refused():
    with pytest.raises(UpdateError, match="1 genes are impossible"):
        GeneMoments(
            count=np.array([SUPPRESSED, 3]),
            total=np.ones(2),
            square_total=np.ones(2),
            n_patients=3,
        )
    with pytest.raises(UpdateError, match="1 pairs are impossible"):
        CrossProducts(products=np.ones((1, 1)), pair_counts=np.full((1, 1), SUPPRESSED))


def test_an_sd_of_zero_is_refused():
    with pytest.raises(UpdateError, match="sd of 1 genes"):
        Standardisation(mean=np.zeros(2), sd=np.array([1.0, 0.0]))
