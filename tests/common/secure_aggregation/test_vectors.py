import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgex.common.arrays import PER_GENE
from fedgex.common.errors import UpdateError
from fedgex.common.secure_aggregation import vectors
from fedgex.common.secure_aggregation.vectors import FixedPoint
from fedgex.common.study import StrategyRule

# ---- fixed point ----


def test_numbers_are_rounded_to_the_nearest_step() -> None:
    fixed = FixedPoint(1.0, 2**31 - 1)  # one step each way
    values = np.array([-1, -0.51, -0.49, 0, 0.49, 0.51, 1, 7, -7], dtype=np.float64)
    found = fixed.encode(values).view(np.int32).tolist()
    assert found == [-1, -1, 0, 0, 0, 1, 1, 1, -1]


@given(st.integers(3, 100), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_a_sum_differs_by_half_a_step_a_site_at_most(
    n: int, bound: float, seed: int
) -> None:
    fixed = FixedPoint(bound, n)
    values = np.random.default_rng(seed).uniform(-bound, bound, (n, 20))
    values[:, 0], values[:, 1] = bound, -bound  # as far as it goes
    total = np.zeros(20, dtype=np.uint32)
    for row in values:
        total += fixed.encode(row)
    worst = np.abs(fixed.decode(total) - values.sum(axis=0)).max()
    assert worst <= n * fixed.step * (0.5 + 1e-6) + 1e-9 * bound


# ---- updates ----


def test_an_update_becomes_one_vector_in_order_of_name() -> None:
    change = {"b": np.array([[3.0, 4.0]]), "a": np.array([1.0])}
    found = vectors.to_vector(change, 100, None)
    assert found.tolist() == [1, 3, 4]
    assert found.dtype == np.float32


def test_a_long_update_is_scaled_down_as_a_whole() -> None:
    change = {"a": np.array([3.0, 4.0])}
    np.testing.assert_allclose(vectors.to_vector(change, 1.0, None), [0.6, 0.8])


def test_rows_that_are_not_kept_are_zero() -> None:
    name = f"backbone.{PER_GENE[0]}"
    change = {name: np.ones((3, 2)), "other": np.ones(3)}
    kept = np.array([True, False, True])
    found = vectors.to_vector(change, 100, kept)
    assert found.tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_no_number_does_not_leave(value: float) -> None:
    with pytest.raises(UpdateError, match="NaN or infinity"):
        vectors.to_vector({"a": np.array([1.0, value])}, 1.0, None)


def test_a_mean_is_over_the_sites_that_measure_a_gene() -> None:
    name = f"backbone.{PER_GENE[0]}"
    incoming = {
        "a": np.zeros(1, dtype=np.float32),
        name: np.full((3, 1), 10, dtype=np.float32),
    }
    rows = [np.array(row, dtype=np.bool_) for row in ([1, 1, 0], [1, 1, 0], [1, 0, 1])]
    rows.append(np.array([1, 1, 1], dtype=np.bool_))
    weights = [1.0, 0.5, 0.25, 0.25]
    total = np.array([2.0, 6.0, 7.0, 9.0])  # in order: a, then the genes
    found = vectors.to_mean(total, incoming, weights, rows)

    # Gene 1: all four, gene 2: the sites of 1 + 0.5 + 0.25, gene 3: two sites only.
    assert found["a"].tolist() == [1.0]
    assert found[name].ravel().tolist() == [13.0, 14.0, 10.0]
    assert found[name].dtype == np.float32


def test_fixed_weights_are_shares_of_the_greatest() -> None:
    rule = StrategyRule(
        name="fedavg", weights="fixed", site_weights={"north": 300, "south": 100}
    )
    assert vectors.weight(rule, "north") == 1
    assert vectors.weight(rule, "south") == pytest.approx(1 / 3)
    with pytest.raises(UpdateError, match="no fixed weight"):
        vectors.weight(rule, "west")
