"""Bytes that are hashed and signed: recorded once, and the same ever since."""

import hashlib
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedgex.client.admission.approvals import Decision
from fedgex.client.ledger.book import content_hash
from fedgex.common.canonical import canonical_json
from fedgex.common.secure_aggregation.protocol import Context, Group, PublicKeys
from fedgex.common.transport.records import digest, to_record
from fedgex.common.trust import audit_log
from fedgex.common.trust.enrolment import EnrolmentRequest
from fedgex.common.trust.receipt import Part
from fedgex.common.trust.signed import Signature, Signed

ROOT = Path(__file__).parents[2]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def public(i: int) -> PublicKeys:
    return PublicKeys(
        channel=bytes([i]) * 32, mask=bytes([i + 9]) * 32, measured=b"\xff"
    )


ENROLMENT = EnrolmentRequest(name="north", certificate_request="é\n")
SIGNED = Signed("ü", (Signature("north", "PEM\n", "c2ln"),))
DECISION = Decision(
    contract="0" * 64,
    decision="approved",
    by="Dr. Curié",
    at=datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC),
    expires=date(2027, 3, 31),
)
PART = Part.read(
    {
        "contract": "0" * 64,
        "run": "r",
        "type": "train",
        "phase": "pretraining",
        "round": 1,
        "request": "1" * 64,
        "site": "north",
        "reply": "2" * 64,
        "head": {"index": 3, "hash": "4" * 64},
        "patients": "suppressed",
    },
    "part",
)
LINE = {"event": "asked", "n": 1, "phase": "prétraining", "rates": [0.1, 1e-9]}
ROW: dict[str, str | int | float] = {"n": 1, "noise_multiplier": 0.1, "run": "é"}
MESSAGE = RecordDict(
    {
        "m": MetricRecord({"b": float("nan"), "a": [1, 2]}),
        "c": ConfigRecord({"é": b"\x00\xff", "list": [b"a", b""], "t": True, "s": "ü"}),
        "x": to_record({"w": np.arange(3, dtype=np.float32)}),
    }
)
GROUP = Group(
    Context(contract="c", run="r", phase="p", round=2, attempt=1),
    {name: public(i) for i, name in enumerate("cab")},
)


@pytest.mark.parametrize(
    ("found", "recorded"),
    [
        (
            ENROLMENT.fingerprint,
            "18bd05be6494563d6cc791c4dfdb9891ac9658af37743f720b4804372ecd05be",
        ),
        (
            sha256(SIGNED.to_json()),
            "618369f200057086cf190e5e4ab53093f28cde93f8f1588249451cf42d6e9912",
        ),
        (
            sha256(DECISION.to_json()),
            "308193840adeca3598da2352c1b2e5dc7f04a10b48800197bf7fbea6900c1b4b",
        ),
        (
            sha256(PART.to_json()),
            "b93d21d9d8f8ca42c601da8c8c5887ce396c9d91c95edc92f83509bec33191b6",
        ),
        (
            audit_log._hash(LINE),
            "6a705a03b8d14515e3fca4b1c868b68a35182e67495c67914a3f2cebb1bedc75",
        ),
        (
            content_hash(ROW),
            "7e96b8be5792bb0289efcab5c6d6f2dd7dec1870e53005b4690e955f3f4916ac",
        ),
        (
            digest(MESSAGE),
            "7540b8a2b75dcd67d0614b1587e1208fb186eb718166d5ef84578ede1c192937",
        ),
        (
            GROUP.binding.hex(),
            "c6dfb355862987ec93a019d5a587afb9c160b89f018cc223f718ab0ad6d67465",
        ),
    ],
    ids=["enrolment", "signed", "decision", "part", "log", "ledger", "digest", "group"],
)
def test_a_recorded_hash_is_still_that_of_the_same_content(
    found: str, recorded: str
) -> None:
    assert found == recorded


def test_keys_are_sorted_and_nothing_else_stands_between_them() -> None:
    values = {"b": [1, None, True], "a": {"d": 0.1, "c": "é\n"}}

    assert canonical_json(values) == (
        '{"a":{"c":"\\u00e9\\n","d":0.1},"b":[1,null,true]}'
    )


def test_numbers_that_are_not_finite_stand_only_where_they_may() -> None:
    assert canonical_json([float("nan"), float("inf")]) == "[NaN,Infinity]"
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([float("nan")], allow_nan=False)


def test_what_json_cannot_hold_is_refused() -> None:
    for value in (ROOT, b""):
        with pytest.raises(TypeError, match="not JSON serializable"):
            canonical_json({"a": value})


def test_no_other_module_writes_canonical_json() -> None:
    sources = [
        path
        for package in ("client", "common", "server", "simulations")
        for path in (ROOT / package).rglob("*.py")
    ]

    assert [p.name for p in sources if "separators=" in p.read_text("utf-8")] == [
        "canonical.py"
    ]
