"""What is measured of secure aggregation is the protocol itself."""

import numpy as np
import pytest

from . import secure_aggregation
from .secure_aggregation import QUICK


@pytest.mark.parametrize("gone", [0, 1])
def test_the_measured_exchange_ends_in_the_sum(gone: int) -> None:
    rng = np.random.default_rng(1)
    change = {"a": rng.normal(size=(3, 2)).astype(np.float32)}
    found = secure_aggregation.exchange(QUICK, change, gone=gone)
    expected = (QUICK.n_sites - gone) * change["a"].ravel()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_quick_measurement_gives_two_positive_ratios() -> None:
    rows = secure_aggregation.measure(quick=True)
    assert [row.goal for row in rows] == ["below 0.1"] * 2
    assert all(row.value > 0 for row in rows)
