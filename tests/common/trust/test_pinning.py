"""A pinned key, its renewals, and the keys that replace it by its own word."""

import pytest
from cryptography import x509

from fedgex.common.errors import TrustError
from fedgex.common.trust import pinning, pki
from fedgex.common.trust.pinning import PinError

AUTHORITY = pki.new_authority("alliance")
Holder = tuple[pki.Key, x509.Certificate]


def issued(name: str, replaces: bytes = b"", key: pki.Key | None = None) -> Holder:
    key = key or pki.new_key()
    csr = pki.request(key, name, "site", replaces)
    return key, pki.issue(*AUTHORITY, csr, name=name, role="site", days=9)


def replacing(old: Holder) -> Holder:
    key = pki.new_key()
    return issued("north", pinning.replacement(*old, key), key)


def pins(held: Holder) -> dict[str, str]:
    return {"north": pki.fingerprint(held[1])}


def test_the_pinned_key_and_its_renewal_fit() -> None:
    held = issued("north")
    renewed = pki.renew(*AUTHORITY, held[1], days=30)

    pinning.require(held[1], pins(held), "the contract")
    pinning.require(renewed, pins(held), "the contract")
    assert renewed.serial_number != held[1].serial_number


def test_another_key_under_the_name_does_not_fit() -> None:
    with pytest.raises(PinError, match=r'pins the key .* of "north", and this is'):
        pinning.require(issued("north")[1], pins(issued("north")), "the contract")


def test_a_name_without_a_pin_does_not_fit() -> None:
    with pytest.raises(PinError, match='pins no key of "east"'):
        pinning.require(issued("east")[1], pins(issued("north")), "the contract")


def test_a_key_fits_after_several_replacements_and_a_renewal() -> None:
    first = issued("north")
    second = replacing(first)
    third = replacing(second)

    for held in (second, third):
        pinning.require(held[1], pins(first), "the contract")
    pinning.require(pki.renew(*AUTHORITY, third[1], 9), pins(first), "the contract")
    assert pinning.replaced(third[1]) == tuple(
        pki.fingerprint(held[1]) for held in (first, second)
    )


def test_the_key_before_does_not_fit_the_pin_of_the_key_after() -> None:
    first = issued("north")
    second = replacing(first)

    with pytest.raises(PinError):
        pinning.require(first[1], pins(second), "the contract")


@pytest.mark.parametrize("name", ["north", "south"])
def test_a_statement_is_for_one_key_under_one_name(name: str) -> None:
    first = issued("north")
    key = pki.new_key()
    statement = pinning.replacement(*first, key)
    taken = issued(name, statement, key if name == "south" else None)

    with pytest.raises(TrustError, match="not signed by the key before"):
        pinning.replaced(taken[1])


@pytest.mark.parametrize(
    "content",
    [b"[", b"{}", b'[{"key": "x"}]', b"[" * 70_000, b'[{"key":"","signature":""}]'],
)
def test_a_statement_that_cannot_be_read_is_refused(content: bytes) -> None:
    with pytest.raises(TrustError, match="fedgex-site rotate"):
        pinning.replaced(issued("north", content)[1])
