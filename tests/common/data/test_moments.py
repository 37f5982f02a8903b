from collections import Counter
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgex.common.data.cross_products import (
    OTHERS,
    CrossProducts,
    by_type,
    pack,
    pool_types,
    unpack,
)
from fedgex.common.data.moments import (
    SUPPRESSED,
    GeneMoments,
    Standardisation,
    foreign_scales,
    pool,
)
from fedgex.common.errors import UpdateError

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


def test_products_about_the_mean_are_those_of_the_deviations():
    values = np.random.default_rng(0).normal(3, 2, size=(20, 4))

    sums = CrossProducts.of(values)

    np.testing.assert_allclose(sums.mean, values.mean(axis=0))
    expected = 20 * np.cov(values, rowvar=False, ddof=0)
    np.testing.assert_allclose(sums.about_mean(), expected)


def test_where_panels_differ_a_gene_deviates_from_the_mean_of_all_who_have_it():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [8.0, np.nan]])  # means 4 and 3

    sums = CrossProducts.of(values)

    pairs = 1 * 2 + 3 * 4 - 2 * 4 * 3  # of the two who have both
    assert sums.about_mean().tolist() == [[9 + 1 + 16, pairs], [pairs, 1 + 1]]


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
    with pytest.raises(UpdateError, match="totals holds 1 numbers"):
        CrossProducts(
            products=np.ones((2, 2)),
            pair_counts=np.ones((2, 2), dtype=np.int64),
            totals=np.array([1.0, np.nan]),
        )


@pytest.mark.parametrize("totals", [np.ones(3), np.ones((2, 2)), np.array(1.0)])
def test_totals_of_other_genes_than_the_products_are_refused(totals):
    with pytest.raises(UpdateError, match=r"\(V,\) for totals"):
        CrossProducts(
            products=np.ones((2, 2)),
            pair_counts=np.ones((2, 2), dtype=np.int64),
            totals=totals,
        )


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
    assert told.totals.tolist() == [9.0, 0.0]


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
        CrossProducts(
            products=np.ones((1, 1)),
            pair_counts=np.full((1, 1), SUPPRESSED),
            totals=np.zeros(1),
        )
    with pytest.raises(UpdateError, match="1 pairs are impossible"):
        CrossProducts(
            products=np.zeros((2, 2)),
            pair_counts=np.array([[SUPPRESSED, 3], [3, 3]]),
            totals=np.ones(2),
        )


def test_an_sd_of_zero_is_refused():
    with pytest.raises(UpdateError, match="sd of 1 genes"):
        Standardisation(mean=np.zeros(2), sd=np.array([1.0, 0.0]))


# ---- by cancer type ----


GENES = 4
FIRST = 0
"""A gene that everybody has, so that its counts are the sizes of the groups."""


@st.composite
def labelled(draw) -> tuple[np.ndarray, list[str | None], int]:
    """Return values (N, 4), the cancer type of each patient, and a floor."""
    kinds = st.sampled_from(["a", "b", "c", "d", None])
    types = draw(st.lists(kinds, max_size=30))
    shares = draw(st.lists(st.floats(0, 1), min_size=GENES, max_size=GENES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(size=(len(types), GENES))
    values[rng.random(values.shape) < shares] = np.nan
    values[:, FIRST] = rng.normal(size=len(types))
    return values, types, draw(st.integers(1, 6))


def members(
    types: list[str | None], groups: Collection[str]
) -> dict[str, NDArray[np.bool_]]:
    """Return who is in each group: a type's patients, or all who are of no group."""
    group = [t if t is not None and t in groups else OTHERS for t in types]
    return {name: np.array([g == name for g in group]) for name in groups}


@given(labelled())
def test_groups_hold_the_floor_or_more_and_add_up_to_the_site(site):
    values, types, floor = site

    groups = by_type(values, types, "abc", floor)

    assert groups.keys() <= {"a", "b", "c", OTHERS}
    if 0 < len(types) < floor:
        assert groups.keys() == {OTHERS}
        assert (groups[OTHERS].pair_counts == SUPPRESSED).all()
        return
    sizes = [sums.counts[FIRST] for sums in groups.values()]
    assert all(size >= floor for size in sizes)
    assert sum(sizes) == len(types)


@given(labelled())
def test_nothing_that_few_patients_tell_is_left_when_groups_are_taken_from_the_site(
    site,
):
    values, types, floor = site

    groups = by_type(values, types, "abc", floor)

    whole = CrossProducts.of(values)
    told = {name: sums.counts for name, sums in groups.items()}
    for gene in range(GENES):
        known = [counts[gene] for counts in told.values() if counts[gene] > 0]
        assert all(count >= floor for count in known)
        assert sum(known) in (0, whole.counts[gene])
        if known:
            total = sum(sums.totals[gene] for sums in groups.values())
            np.testing.assert_allclose(total, whole.totals[gene], atol=1e-9)
            square = sum(sums.products[gene, gene] for sums in groups.values())
            np.testing.assert_allclose(square, whole.products[gene, gene])


@given(labelled())
def test_a_group_tells_of_its_own_patients_what_the_floor_of_them_know(site):
    values, types, floor = site

    groups = by_type(values, types, "abc", floor)

    who = members(types, groups)
    have = {name: (~np.isnan(values[rows])).sum(axis=0) for name, rows in who.items()}
    for name, sums in groups.items():
        x = np.nan_to_num(values[who[name]])
        for i, j in np.ndindex(GENES, GENES):
            both = (~np.isnan(values[who[name]][:, [i, j]])).all(axis=1).sum()
            few = any(0 < n[g] < floor for n in have.values() for g in (i, j))
            if few or both < floor:
                assert sums.pair_counts[i, j] == SUPPRESSED
                assert sums.products[i, j] == 0
            else:
                assert sums.pair_counts[i, j] == both
                np.testing.assert_allclose(sums.products[i, j], x[:, i] @ x[:, j])
            if i == j and sums.pair_counts[i, i] == SUPPRESSED:
                assert sums.totals[i] == 0
            elif i == j:
                np.testing.assert_allclose(sums.totals[i], x[:, i].sum(), atol=1e-9)


@pytest.mark.parametrize(
    ("types", "sizes"),
    [
        pytest.param("aaaaabbbb", {"a": 5, "b": 4}, id="nobody else"),
        pytest.param("aaaaabbbbccc", {"a": 5, "b": 4, "c": 3}, id="just the floor"),
        pytest.param("aaaaaddd", {"a": 5, OTHERS: 3}, id="enough of no type"),
        pytest.param("aaaaabbcd", {"a": 5, OTHERS: 4}, id="too few of three types"),
        pytest.param("aaaaabbbbd", {"a": 5, OTHERS: 5}, id="the smallest joins one"),
        pytest.param("aaabbbd", {"b": 3, OTHERS: 4}, id="of two smallest the first"),
        pytest.param("aaaaacc", {OTHERS: 7}, id="the only one joins two"),
        pytest.param("aabbcc", {OTHERS: 6}, id="too few of each"),
    ],
)
def test_who_is_too_few_is_among_the_others_with_the_smallest_type_if_need_be(
    types, sizes
):
    groups = by_type(np.ones((len(types), 1)), list(types), "abc", min_cell_count=3)

    assert {name: sums.counts[0] for name, sums in groups.items()} == sizes


def test_without_types_the_site_is_one_group():
    values = sites(0)[2]

    groups = by_type(values, ["a"] * 30, (), min_cell_count=3)

    assert groups.keys() == {OTHERS}
    whole = CrossProducts.of(values).suppressed(3)
    np.testing.assert_array_equal(groups[OTHERS].pair_counts, whole.pair_counts)
    np.testing.assert_array_equal(groups[OTHERS].products, whole.products)


def test_a_gene_of_few_patients_of_one_type_is_suppressed_in_every_group():
    values = np.ones((9, 3))
    values[:3, 1] = np.nan  # of type a 2 patients have it
    values[:5, 2] = np.nan  # of type a none has it

    groups = by_type(values, list("aaaaabbbb"), "ab", min_cell_count=3)

    assert groups["a"].counts.tolist() == [5, SUPPRESSED, SUPPRESSED]
    assert groups["b"].counts.tolist() == [4, SUPPRESSED, 4]
    assert groups["b"].pair_counts[0].tolist() == [4, SUPPRESSED, 4]
    assert groups["b"].totals.tolist() == [4, 0, 4]


def told(**sizes: int) -> dict[str, CrossProducts]:
    """Return groups of so many patients, all of whom have 1 in one gene."""
    return {name: CrossProducts.of(np.ones((n, 1))) for name, n in sizes.items()}


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        pytest.param(
            [told(a=5, b=4), told(a=3, b=7)], {"a": 8, "b": 11}, id="two of each"
        ),
        pytest.param(
            [told(a=5, b=4), told(a=3, others=6)],
            {"a": 8, OTHERS: 10},
            id="one alone tells of b",
        ),
        pytest.param(
            [told(a=5, b=4), told(a=3), told(a=2, c=3)],
            {"a": 10, OTHERS: 7},
            id="one alone of b, another of c",
        ),
        pytest.param([told(a=5), told(b=4)], {OTHERS: 9}, id="nothing in common"),
        pytest.param([told(a=5, b=4)], {"a": 5, "b": 4}, id="a single site"),
        pytest.param(
            [told(a=5, others=4)], {"a": 5, OTHERS: 4}, id="a single site with others"
        ),
    ],
)
def test_a_type_that_one_of_several_sites_tells_alone_is_among_the_others(
    groups, sizes
):
    pooled = pool_types(groups)

    assert {name: sums.counts[0] for name, sums in pooled.items()} == sizes
    assert {name: sums.totals[0] for name, sums in pooled.items()} == sizes


@given(st.lists(labelled(), min_size=1, max_size=4))
def test_pooled_groups_add_up_to_what_the_sites_told(rows):
    told_by = [by_type(v, types, "abc", floor) for v, types, floor in rows if types]

    pooled = pool_types(told_by)

    told_of = Counter(name for groups in told_by for name in groups)
    for name in pooled.keys() - {OTHERS}:
        assert told_of[name] >= min(2, len(told_by))
    if told_by:
        ours = pool(pooled.values())
        theirs = pool(sums for groups in told_by for sums in groups.values())
        np.testing.assert_array_equal(
            np.maximum(ours.pair_counts, 0), np.maximum(theirs.pair_counts, 0)
        )
        np.testing.assert_allclose(ours.products, theirs.products, atol=1e-9)
        np.testing.assert_allclose(ours.totals, theirs.totals, atol=1e-9)


# ---- a foreign scale ----


def hospitals(n_genes: int, n_sites: int = 4) -> dict[str, np.ndarray]:
    """Return sites of 20 patients, each with cancers of its own, in log2(x + 1)."""
    rng = np.random.default_rng(n_genes)
    level = rng.gamma(8, 1, n_genes)
    return {
        f"site-{i}": level + rng.normal(0, 1, n_genes) + rng.normal(0, 2, (20, n_genes))
        for i in range(n_sites)
    }


def judged(rows: dict[str, np.ndarray], floor: int = 10) -> dict[str, float]:
    return foreign_scales(
        {name: GeneMoments.of(site).suppressed(floor) for name, site in rows.items()}
    )


@pytest.mark.parametrize("factor", [np.log(2), np.log10(2), 1 / np.log(2)])
@pytest.mark.parametrize("n_sites", [3, 4, 9])
def test_a_site_in_another_base_is_told_from_the_others(factor, n_sites):
    rows = hospitals(300, n_sites)
    rows["site-1"] *= factor

    assert judged(rows) == {"site-1": pytest.approx(factor, rel=0.1)}


def test_sites_with_other_cancers_other_genes_and_gaps_are_on_one_scale():
    rows = hospitals(300)
    rows["site-0"][:, :150] = np.nan
    rows["site-1"][:, 120:] = np.nan
    rows["site-2"][rows["site-2"] < 6] = np.nan  # the faint ones drop out
    rows["site-3"][:5, 7] = np.nan

    assert judged(rows) == {}


def test_a_foreign_site_is_told_by_the_genes_that_others_measure_too():
    rows = hospitals(300)
    rows["site-1"] *= np.log(2)
    rows["site-1"][:, :100] = np.nan
    for other in ("site-0", "site-2", "site-3"):
        rows[other][:, 250:] = np.nan

    assert set(judged(rows)) == {"site-1"}


@pytest.mark.parametrize(("n_genes", "n_sites"), [(300, 2), (60, 4)])
def test_of_two_sites_and_of_few_genes_nothing_is_said(n_genes, n_sites):
    rows = hospitals(n_genes, n_sites)
    rows["site-1"] *= np.log10(2)

    assert judged(rows) == {}


def test_genes_that_no_site_tells_of_say_nothing():
    rows = hospitals(300)
    rows["site-1"] *= np.log(2)

    assert judged(rows, floor=21) == {}
