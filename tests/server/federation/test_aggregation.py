import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgex.server.federation.aggregation import (
    Array,
    Weight,
    median,
    trimmed_mean,
    weighted_mean,
)

Aggregate = Callable[[list[Array], list[Weight], Array], Array]


def trimmed_by_a_fifth(
    arrays: list[Array], weights: list[Weight], incoming: Array
) -> Array:
    return trimmed_mean(arrays, weights, incoming, 0.2)


def scalars(*weights: float) -> list[Weight]:
    return [np.asarray(weight, dtype=np.float64) for weight in weights]


def single(*rows: list[float] | float) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32)


def test_a_site_with_three_times_the_patients_counts_three_times() -> None:
    arrays: list[Array] = [single(0, 8), single(4, 0)]

    mean = weighted_mean(arrays, scalars(30, 10), single(9, 9))

    assert mean.tolist() == [1.0, 6.0]


def test_a_site_of_weight_zero_does_not_count() -> None:
    arrays: list[Array] = [single(2, 4), single(1e6, -1e6)]

    mean = weighted_mean(arrays, scalars(7, 0), single(9, 9))

    assert mean.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("aggregate", [weighted_mean, median, trimmed_by_a_fifth])
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5),
    weights=st.lists(st.integers(1, 10_000), min_size=1, max_size=7),
)
def test_equal_updates_average_to_themselves(
    aggregate: Aggregate, values: list[float], weights: list[int]
) -> None:
    update = single(*values)

    result = aggregate(
        [update] * len(weights), scalars(*weights), np.zeros_like(update)
    )

    np.testing.assert_array_equal(result, update)


@pytest.mark.parametrize("aggregate", [weighted_mean, median, trimmed_by_a_fifth])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_of_the_incoming_parameter_is_kept(
    aggregate: Aggregate, dtype: type[np.floating]
) -> None:
    incoming: Array = np.zeros((2, 3), dtype=dtype)
    arrays: list[Array] = [np.ones((2, 3), dtype=np.float16) for _ in range(3)]
    by_gene = [np.array([1.0, 0.0])] * 3

    assert aggregate(arrays, scalars(1, 2, 3), incoming).dtype == dtype
    assert aggregate(arrays, by_gene, incoming).dtype == dtype


@pytest.mark.parametrize("aggregate", [weighted_mean, median, trimmed_by_a_fifth])
def test_nothing_that_was_handed_over_is_changed(aggregate: Aggregate) -> None:
    incoming = single([1, 2], [3, 4])
    arrays: list[Array] = [incoming + 1, incoming + 2, incoming + 5]
    before = [array.copy() for array in (incoming, *arrays)]

    aggregate(arrays, [np.array([1.0, 0.0])] * 3, incoming)

    for array, as_it_was in zip((incoming, *arrays), before, strict=True):
        np.testing.assert_array_equal(array, as_it_was)


def test_each_genes_row_is_averaged_over_the_sites_that_measured_it() -> None:
    incoming = single([-1, -1], [-2, -2], [-3, -3], [-4, -4])
    small = single([1, 2], [5, 6], [100, 100], [100, 100])
    large = single([3, 6], [100, 100], [7, 8], [100, 100])
    weights = [
        np.array([10.0, 10.0, 0.0, 0.0]),
        np.array([30.0, 0.0, 30.0, 0.0]),
    ]

    mean = weighted_mean([small, large], weights, incoming)

    assert mean.tolist() == [
        [2.5, 5.0],  # (10 * 1 + 30 * 3) / 40, (10 * 2 + 30 * 6) / 40
        [5.0, 6.0],  # the small site alone
        [7.0, 8.0],  # the large site alone
        [-4.0, -4.0],  # nobody measured it
    ]


@given(
    seed=st.integers(0, 2**32 - 1),
    n_sites=st.integers(1, 6),
    n_genes=st.integers(1, 7),
)
def test_the_mean_by_gene_is_its_definition(
    seed: int, n_sites: int, n_genes: int
) -> None:
    rng = np.random.default_rng(seed)
    incoming = rng.normal(size=(n_genes, 2))
    x = rng.normal(size=(n_sites, n_genes, 2))
    w = rng.integers(1, 500, n_sites)[:, None] * (rng.random((n_sites, n_genes)) < 0.5)
    expected = incoming.copy()
    for g in range(n_genes):
        if sum(w[:, g]) > 0:
            expected[g] = sum(w[s, g] * x[s, g] for s in range(n_sites)) / sum(w[:, g])

    mean = weighted_mean(list(x), list(w.astype(np.float64)), incoming)

    np.testing.assert_allclose(mean, expected, rtol=1e-12)


def test_the_mean_lets_go_of_each_sites_array_before_it_reads_the_one_after_next() -> (
    None
):
    alive_at_each_read: list[int] = []
    made: list[weakref.ref[Array]] = []

    def arrays() -> Iterator[Array]:
        for site in range(20):
            alive_at_each_read.append(sum(ref() is not None for ref in made))
            array: Array = np.full((4, 2), site, dtype=np.float32)
            made.append(weakref.ref(array))
            yield array
            del array

    mean = weighted_mean(arrays(), scalars(*[1] * 20), np.zeros((4, 2), np.float32))

    assert mean.tolist() == [[9.5, 9.5]] * 4
    assert max(alive_at_each_read) <= 1


def test_as_many_weights_as_arrays_are_needed() -> None:
    with pytest.raises(ValueError, match="longer"):
        weighted_mean([single(1)], scalars(1, 2), single(0))


def test_the_median_is_numpys_and_outvotes_one_absurd_site() -> None:
    arrays: list[Array] = [single(1, 5), single(2, 7), single(1e30, -1e30)]

    result = median(arrays, scalars(1, 1, 1), single(0, 0))

    assert result.tolist() == [2.0, 5.0]


def test_the_median_of_an_even_number_of_sites_lies_half_way() -> None:
    arrays: list[Array] = [single(1), single(2), single(4), single(100)]

    assert median(arrays, scalars(1, 1, 1, 1), single(0)).tolist() == [3.0]


def test_the_median_of_a_gene_is_over_the_sites_that_measured_it() -> None:
    x = np.random.default_rng(1).normal(size=(4, 3, 2)).astype(np.float32)
    incoming = single([9, 9], [9, 9], [9, 9])
    weights = [np.array(w, dtype=float) for w in ([1, 0, 0], [1, 1, 0], [0, 1, 0])]
    weights.append(np.array([1.0, 0.0, 0.0]))

    result = median(list(x), weights, incoming)

    np.testing.assert_array_equal(result[0], np.median(x[[0, 1, 3], 0], axis=0))
    np.testing.assert_allclose(result[1], (x[1, 1] + x[2, 1]) / 2, rtol=1e-6)
    assert result[2].tolist() == [9.0, 9.0]


def test_the_trimmed_mean_leaves_out_the_ends_of_each_number() -> None:
    # first number: 1 and 1000 go, (2 + 3 + 4) / 3; second: -500 and 9, (1 + 2 + 6) / 3
    arrays: list[Array] = [
        single(3, 9),
        single(1000, 1),
        single(2, 6),
        single(1, 2),
        single(4, -500),
    ]

    result = trimmed_mean(arrays, scalars(1, 1, 1, 1, 1), single(0, 0), 0.2)

    assert result.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((0, 3, 6, 1000), 0.2, 4.5),  # one of four at either end, not none
        ((0, 3, 1000), 0.2, 3.0),
        ((0, 3), 0.2, 1.5),  # of two none can go
        ((0, 3, 6, 1000), 0.0, 252.25),
        (range(25), 0.28, 12.0),
    ],
)
def test_of_few_sites_one_is_cut_off_at_either_end(
    values: Sequence[float], share: float, expected: float
) -> None:
    arrays: list[Array] = [single(value) for value in values]
    ones = scalars(*[1] * len(values))

    assert trimmed_mean(arrays, ones, single(0), share).tolist() == [expected]


def test_the_trimmed_mean_of_a_gene_counts_the_sites_that_measured_it() -> None:
    column = [[7, 1], [1, 2], [2, 3], [3, 4], [100, 6]]  # five sites, two genes
    arrays: list[Array] = [single(*([float(x)] for x in site)) for site in column]
    weights = [np.array([1.0, float(s < 4)]) for s in range(5)]

    result = trimmed_mean(arrays, weights, single([0], [0]), 0.2)

    # gene 0, five sites, one cut off at either end: (2 + 3 + 7) / 3
    # gene 1, four sites, one cut off at either end: (2 + 3) / 2
    assert result.tolist() == [[4.0], [2.5]]
