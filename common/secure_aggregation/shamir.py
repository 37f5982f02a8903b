"""Shamir's secret sharing over a prime field (Shamir 1979)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from fedgex.common.errors import TrustError, UpdateError

PRIME = 2**256 + 297
"""Smallest prime above 2^256, so that every secret of 32 bytes is in the field."""
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, n: int, t: int) -> list[int]:
    """Return n shares of 32 bytes, at the points 1 to n; any t of them give it back."""
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [secrets.randbelow(PRIME) for _ in range(t - 1)]
    return [_at(coefficients, point) for point in range(1, n + 1)]


def join(shares: Mapping[int, int]) -> bytes:
    """Return the secret that t or more shares, by their points, belong to.

    Fewer, or a wrong one among them, give other bytes.

    Raises
    ------
    UpdateError
        If they give a number that no 32 bytes are.
    """
    total = 0
    for point, value in shares.items():
        others = [other for other in shares if other != point]
        above, below = 1, 1
        for other in others:  # Lagrange's basis at 0
            above = above * other % PRIME
            below = below * (other - point) % PRIME
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    if total >> (8 * SECRET_BYTES):
        raise UpdateError("the shares do not belong to one secret.")
    return total.to_bytes(SECRET_BYTES, "big")


def share(content: bytes) -> int:
    """Read one share.

    Raises
    ------
    TrustError
        If it is no number of the field.
    """
    number = int.from_bytes(content, "big")
    if len(content) != SHARE_BYTES or number >= PRIME:
        raise TrustError("a share is no number of the field.")
    return number


def _at(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value
