"""The contract: what it must say, what it is compared with, and when it is over."""

import hashlib
import re
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import ConfigError
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "contract.md"

GENES = ["TP53", "BRCA1", "ESR1"]  # in any order
STUDY: dict[str, Any] = {"name": "test", "vocabulary": {"genes": GENES}}
CONTRACT: dict[str, Any] = {
    "purpose": "Restoration of panels",
    "expires": "2027-06-30",
    "code_version": "0.1",
    "vocabulary_hash": hashlib.sha256(b"BRCA1\nESR1\nTP53").hexdigest(),
    "sites": ["north", "south", "west"],
    "study": STUDY,
}


def contract(**changes: Any) -> Contract:
    return Contract.read(CONTRACT | changes, "contract.toml")


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        contract(**changes)
    return str(error.value)


def example() -> str:
    found = re.search(r"```toml\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_documented_example_can_be_used():
    found = Contract.from_toml(example(), "docs/contract.md")

    assert found.expires == date(2027, 6, 30)
    assert found.study.strategy.site_weights["north"] == 2.0


def test_a_release_takes_two_administrators_unless_the_contract_says_otherwise():
    assert contract().release.administrators == 2
    assert contract(release={"administrators": 1}).release.administrators == 1
    assert "release.administrators" in refusal(release={"administrators": 0})


def test_everything_missing_unknown_and_unusable_is_named_at_once():
    message = refusal(
        purpose="short",
        code_version="0.1.3",
        vocabulary_hash="abc",
        sites=["north"],
        release={"administrators": 0},
        puprose="Restoration of panels",
    )

    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "purpose",
        "code_version",
        "vocabulary_hash",
        "sites",
        "release.administrators",
        "puprose",
    ]


@pytest.mark.parametrize("key", ["purpose", "expires", "code_version", "study"])
def test_what_a_person_approves_has_no_default(key):
    rest = {name: value for name, value in CONTRACT.items() if name != key}

    with pytest.raises(ConfigError, match=f"{key}: Field required"):
        Contract.read(rest, "contract.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ["north", "south", "north"]}, "sites must be distinct"),
        ({"study": {"name": "test"}}, r"study\.vocabulary\.genes is empty"),
        (
            {"vocabulary_hash": hashlib.sha256(b"TP53\nBRCA1\nESR1").hexdigest()},
            f"that of study.vocabulary.genes is {CONTRACT['vocabulary_hash']}",
        ),
        (
            {"study": STUDY | {"rounds": {"quorum": 4}}},
            r"study\.rounds\.quorum is 4, more than the 3 sites",
        ),
        (
            {"study": STUDY | {"rounds": {"quorum": 0}}},
            r"study\.rounds\.quorum: .*greater than or equal to 1",
        ),
        (
            {"study": STUDY | {"rounds": {"mandatory_sites": ["north", "east"]}}},
            "mandatory_sites not among sites: east",
        ),
    ],
)
def test_a_contract_that_contradicts_its_study_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        contract(**changes)


def fixed(**weights: float) -> dict[str, Any]:
    strategy = {"name": "fedavg", "weights": "fixed", "site_weights": weights}
    return {"study": STUDY | {"strategy": strategy}}


def test_fixed_weights_are_for_exactly_the_sites():
    contract(**fixed(north=1, south=2, west=3))

    message = refusal(**fixed(north=1, east=2, far=3))

    assert "site_weights lacks south, west; " in message
    assert "site_weights not among sites: east, far" in message


def test_a_text_that_is_no_toml_is_refused_by_its_source():
    with pytest.raises(ConfigError, match=r"^contract\.toml is not TOML"):
        Contract.from_toml("purpose = ", "contract.toml")


def test_a_signed_contract_is_read_by_its_text_and_named_by_its_hash():
    signed = Signed(example())

    assert Contract.read_signed(signed) == Contract.from_toml(example(), "test")
    with pytest.raises(ConfigError, match=Signed("x").hash[:12]):
        Contract.read_signed(Signed("x"))


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.1.0", True),
        ("0.1.27", True),
        ("0.1rc1", True),
        ("0.1", True),
        ("0.10.0", False),
        ("0.2.0", False),
        ("1.1.0", False),
        ("10.1.0", False),
        ("", False),
    ],
)
def test_a_version_is_supported_if_major_and_minor_are_the_same(version, supported):
    assert contract().supports(version) is supported


def test_a_contract_holds_until_its_last_day_is_over_in_utc():
    last = datetime(2027, 6, 30, 23, 59, 59, tzinfo=UTC)
    later = last + timedelta(seconds=1)
    in_tokyo = timezone(timedelta(hours=9))

    assert not contract().expired(last)
    assert contract().expired(later)
    assert not contract().expired(last.astimezone(in_tokyo))  # 1 July there
    assert contract(expires="2020-01-01").expired()
