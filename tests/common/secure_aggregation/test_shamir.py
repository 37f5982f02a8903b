import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgex.common.secure_aggregation import shamir
from fedgex.common.secure_aggregation.shamir import PRIME


def test_shares_are_values_of_the_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    coefficients = iter([3, 2])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda _: next(coefficients))
    secret = (5).to_bytes(32, "big")

    # f(x) = 5 + 3 x + 2 x^2
    assert shamir.split(secret, 4, 3) == [10, 19, 32, 49]
    assert shamir.join({1: 10, 3: 32, 4: 49}) == secret
    assert shamir.join({2: 19, 3: 32, 4: 49}) == secret


def test_the_field_is_that_of_the_least_prime_above_the_secrets() -> None:
    def is_prime(n: int) -> bool:  # Fermat's test; composites this size never pass all
        return all(pow(a, n - 1, n) == 1 for a in (2, 3, 5, 7, 11, 13, 17, 19, 23))

    assert is_prime(PRIME)
    assert not any(is_prime(2**256 + i) for i in range(297))


@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.data())
def test_any_t_shares_give_the_secret_back(
    secret: bytes, n: int, data: st.DataObject
) -> None:
    t = data.draw(st.integers(1, n))
    shares = shamir.split(secret, n, t)
    points = data.draw(st.permutations(range(1, n + 1)))[:t]
    assert shamir.join({point: shares[point - 1] for point in points}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    shares = shamir.split(bytes(32), 5, 3)
    for other in (b"\x00" * 31 + b"\x07", b"\xff" * 32):
        # A line through the other secret's point and two true shares: a third share
        # makes just as good a polynomial of degree 2 as the true one does.
        points = {0: int.from_bytes(other, "big"), 1: shares[0], 2: shares[1]}
        third = sum(
            y * (3 - a) * (3 - b) * pow((x - a) * (x - b), -1, PRIME)
            for (x, y), (a, b) in zip(
                points.items(), [(1, 2), (0, 2), (0, 1)], strict=True
            )
        )
        forged = {1: shares[0], 2: shares[1], 3: third % PRIME}
        assert shamir.join(forged) == other
