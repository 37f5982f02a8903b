"""Receipts: who contributed, signed by both sides, in an order that cannot change."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from flwr.app import ConfigRecord, RecordDict

from fedgex.common import keys
from fedgex.common.errors import TrustError
from fedgex.common.transport.records import to_record
from fedgex.common.trust import pki
from fedgex.common.trust.receipt import (
    NO_RECEIPT,
    Part,
    Receipt,
    parameters_digest,
    reply_digest,
    request_digest,
    verify_chain,
    verify_part,
)
from fedgex.common.trust.signed import Signed, sign

Values = dict[str, Any]

AUTHORITY_KEY, AUTHORITY = pki.new_authority("consortium")
NOW = datetime.now(UTC)


def issued(
    name: str, role: pki.Role, days: int = 30
) -> tuple[pki.Key, x509.Certificate]:
    key = pki.new_key()
    csr = pki.request(key, name, role)
    return key, pki.issue(
        AUTHORITY_KEY, AUTHORITY, csr, name=name, role=role, days=days
    )


COORDINATOR = issued("coordinator", "coordinator")
SITES = {name: issued(name, "site") for name in ("north", "south")}
PHASES = [("pretraining", 1), ("pretraining", 2), ("survival", 1)]


def named(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def part_values(site: str, phase: str = "pretraining", number: int = 1) -> Values:
    return {
        "contract": named("contract"),
        "run": "run-1",
        "site": site,
        "type": "train",
        "phase": phase,
        "round": number,
        "request": named(f"request {phase} {number}"),
        "reply": named(f"reply {site} {phase} {number}"),
        "head": {"index": 10 + number, "hash": named("head")},
        "patients": "suppressed" if site == "south" else 412,
    }


def canonical(values: Values) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def entry(part: Values, signer: str | None = None) -> Values:
    key, certificate = SITES[signer or part["site"]]
    text = canonical(part)
    return {
        "state": "contributed",
        "reason": None,
        "patients": part["patients"],
        "update": part["reply"],
        "part": text,
        "signature": sign(key, text.encode()),
        "certificate": pki.to_pem(certificate),
    }


def absent(state: str, reason: str) -> Values:
    nothing = dict.fromkeys(("patients", "update", "part", "signature", "certificate"))
    return nothing | {"state": state, "reason": reason}


def signed_receipt(values: Values) -> Signed:
    return Signed(canonical(values)).signed_by(*COORDINATOR)


def chain(change: Callable[[int, Values], None] = lambda place, values: None) -> list:
    """Return three receipts; `change` may edit each before it is signed and chained."""
    receipts: list[Signed] = []
    for place, (phase, number) in enumerate(PHASES, start=1):
        values = {
            "contract": named("contract"),
            "run": "run-1",
            "index": place,
            "phase": phase,
            "round": number,
            "incoming": named(f"model {place - 1}"),
            "outgoing": named(f"model {place}"),
            "sites": {name: entry(part_values(name, phase, number)) for name in SITES},
            "previous": receipts[-1].hash if receipts else NO_RECEIPT,
            "time": NOW.isoformat().replace("+00:00", "Z"),
        }
        change(place, values)
        receipts.append(signed_receipt(values))
    return receipts


def refusal(receipts: Sequence[Signed], authority: x509.Certificate = AUTHORITY) -> str:
    with pytest.raises(TrustError) as error:
        verify_chain(receipts, authority)
    return str(error.value)


# ---- one part ----


def test_a_part_is_canonical_json_of_what_the_site_says():
    values = part_values("north")

    part = Part.read(values, "test")

    assert part.to_json() == canonical(values)
    assert Part.from_json(canonical(values), "test") == part


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(part_values("north")),  # with spaces
        canonical(part_values("north") | {"round": "1"}),
        canonical(part_values("north") | {"round": 1.0}),
        canonical(part_values("north")).replace('"round":1', '"round":2,"round":1'),
        canonical(part_values("north") | {"head": {"index": 1, "hash": "x", "y": 1}}),
    ],
    ids=["spaces", "text", "float", "twice", "unknown"],
)
def test_one_content_has_one_text(text):
    with pytest.raises(TrustError, match=r"canonical|Fetch it again"):
        Part.from_json(text, "the part")


@pytest.mark.parametrize(
    "change",
    [{"patients": -1}, {"patients": "few"}, {"reply": "x"}, {"more": 1}, {"site": ""}],
)
def test_a_part_that_cannot_be_is_refused_by_its_source(change):
    with pytest.raises(TrustError, match=f"the part: {next(iter(change))}"):
        Part.from_json(canonical(part_values("north") | change), "the part")


def test_text_that_is_no_json_is_refused():
    with pytest.raises(TrustError, match="the part is not JSON"):
        Part.from_json("north", "the part")


def given(values: Values) -> tuple[str, str, str]:
    return values["part"], values["signature"], values["certificate"]


def test_a_part_is_trusted_by_the_site_that_it_names():
    good = entry(part_values("north"))
    of_another = entry(part_values("south"), signer="north")

    assert verify_part(*given(good), AUTHORITY).patients == 412
    with pytest.raises(TrustError, match='signed by "north" is about "south"'):
        verify_part(*given(of_another), AUTHORITY)


def test_a_part_of_a_revoked_site_or_with_another_text_is_not_trusted():
    good = entry(part_values("north"))
    serial = SITES["north"][1].serial_number
    changed = good | {"part": good["part"].replace("412", "413")}

    with pytest.raises(TrustError, match="revoked"):
        verify_part(*given(good), AUTHORITY, revoked={serial})
    with pytest.raises(TrustError, match="does not fit"):
        verify_part(*given(changed), AUTHORITY)


# ---- digests ----


def request(**changes: Any) -> RecordDict:
    records = {
        "model": to_record({"a": np.ones(3, np.float32)}),
        keys.ROUND: ConfigRecord({"phase": "survival", "number": 2}),
    }
    return RecordDict(records | changes)


def test_asking_the_same_again_gives_the_same_digest_whatever_travels_along():
    travelling = request(
        server=ConfigRecord({"version": "0.1.1"}),
        receipt=ConfigRecord({keys.JSON: "..."}),
    )

    assert request_digest("train", travelling) == request_digest("train", request())


def test_another_type_round_or_model_gives_another_digest():
    other_round = ConfigRecord({"phase": "survival", "number": 3})
    other_model = to_record({"a": np.array([1, 1, 1.0000001], np.float32)})

    digests = {
        request_digest("train", request()),
        request_digest("query.prepare", request()),
        request_digest("train", request(round=other_round)),
        request_digest("train", request(model=other_model)),
    }

    assert len(digests) == 4


def test_a_reply_is_digested_without_the_part_that_signs_it():
    part = ConfigRecord({keys.JSON: "..."})
    run = ConfigRecord({"run": "run-1"})

    assert reply_digest(request(part=part)) == reply_digest(request())
    assert reply_digest(request(run=run)) != reply_digest(request())


def test_parameters_have_one_digest_however_they_lie_in_memory():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    scalar = np.array(2.0, np.float32)

    plain = parameters_digest({"a": array, "b": scalar})

    assert plain == parameters_digest({"b": scalar, "a": np.asfortranarray(array)})
    assert plain != parameters_digest({"a": array.T.copy(), "b": scalar})
    assert plain != parameters_digest({"a": array, "b": scalar.reshape(1)})


# ---- the chain ----


def test_a_whole_chain_holds_and_so_does_its_beginning():
    receipts = chain()

    verify_chain(receipts, AUTHORITY)
    verify_chain(receipts[:2], AUTHORITY)
    verify_chain([], AUTHORITY)


def at(time: datetime) -> Callable[[int, Values], None]:
    def change(place: int, values: Values) -> None:
        values["time"] = time.isoformat().replace("+00:00", "Z")

    return change


def test_receipts_outlive_the_certificates(monkeypatch: pytest.MonkeyPatch):
    until_yesterday = issued("north", "site", days=-1)
    monkeypatch.setitem(SITES, "north", until_yesterday)

    assert 'the certificate of site "north" expired' in refusal(chain())
    verify_chain(chain(at(NOW - timedelta(hours=36))), AUTHORITY)


@pytest.mark.parametrize(
    ("order", "place"), [((0, 2), 2), ((1, 2), 1), ((0, 2, 1), 2), ((0, 1, 1), 3)]
)
def test_a_removed_reordered_or_repeated_receipt_is_found_at_its_place(order, place):
    receipts = chain()

    message = refusal([receipts[i] for i in order])

    assert message.startswith(f"receipt {place} does not hold: ")
    assert "index is" in message or "previous is" in message


def test_a_receipt_made_again_breaks_the_one_after_it():
    receipts = chain()
    values = json.loads(receipts[0].content)
    values["sites"]["south"] = absent("late", "deadline")

    message = refusal([signed_receipt(values), *receipts[1:]])

    assert message.startswith("receipt 2 does not hold: ")
    assert f"expected {signed_receipt(values).hash}" in message


def test_a_changed_receipt_is_found_by_its_signature():
    receipts = chain()
    text = receipts[1].content.replace(named("model 2"), named("model x"))
    receipts[1] = dataclasses.replace(receipts[1], content=text)

    message = refusal(receipts)

    assert message.startswith("receipt 2 does not hold: the signature does not fit")


def test_only_the_coordinator_signs_receipts():
    receipts = chain()
    by_a_site = Signed(receipts[0].content).signed_by(*SITES["north"])
    by_nobody = Signed(receipts[0].content)

    assert "expected one for the role coordinator" in refusal([by_a_site])
    assert "bears no signature" in refusal([by_nobody])
    assert "was not issued" in refusal(receipts, pki.new_authority("consortium")[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("contract", named("other")),
        ("run", "run-2"),
        ("round", 1),
        ("round", 3),
        ("incoming", named("other")),
    ],
)
def test_a_receipt_must_go_on_where_the_one_before_ended(key, value):
    def change(place: int, values: Values) -> None:
        if place == 2:
            values[key] = value

    message = refusal(chain(change))

    assert message.startswith("receipt 2 does not hold: it was changed")
    assert f"{key} is {value}" in message


def test_a_phase_that_was_left_does_not_come_back():
    def change(place: int, values: Values) -> None:
        if place == 2:
            values |= {"phase": "survival", "round": 1}
            sites = {n: entry(part_values(n, "survival", 1)) for n in SITES}
            values["sites"] = sites
        if place == 3:
            values |= {"phase": "pretraining", "round": 2}

    assert "phase is pretraining, expected survival" in refusal(chain(change))


def replace_north(new: Values) -> list[Signed]:
    def change(place: int, values: Values) -> None:
        if place == 1:
            values["sites"]["north"] = new

    return chain(change)


def test_a_site_that_did_not_contribute_stands_with_its_reason_and_without_a_part():
    verify_chain(replace_north(absent("refused", "FX-SITE-003")), AUTHORITY)

    assert "a reason stands with" in refusal(replace_north(absent("late", None)))  # type: ignore[arg-type]


def test_a_quarantined_site_may_stand_with_the_part_that_it_signed():
    quarantined = entry(part_values("north")) | {
        "state": "quarantined",
        "reason": "NaN",
        "patients": None,
    }

    verify_chain(replace_north(quarantined), AUTHORITY)


@pytest.mark.parametrize("key", ["update", "part", "signature", "certificate"])
def test_who_contributed_has_signed(key):
    values = entry(part_values("north")) | {key: None}

    assert "come together" in refusal(replace_north(values))
    nothing = absent("contributed", "") | {"reason": None}
    assert "has signed its part" in refusal(replace_north(nothing))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("contract", named("other")),
        ("run", "run-2"),
        ("type", "query.prepare"),
        ("phase", "survival"),
        ("round", 2),
    ],
)
def test_a_part_about_something_else_does_not_count(key, value):
    values = entry(part_values("north") | {key: value})

    assert f"the part of north was changed, or does not belong here: {key} is" in (
        refusal(replace_north(values))
    )


def test_the_coordinator_cannot_write_another_number_of_patients_or_another_update():
    good = entry(part_values("north"))

    more = refusal(replace_north(good | {"patients": 500}))
    other = refusal(replace_north(good | {"update": named("other")}))

    assert "patients is 412, expected 500" in more
    assert f"reply is {good['update']}, expected {named('other')}" in other


def test_a_part_of_one_site_does_not_count_for_another():
    message = refusal(replace_north(entry(part_values("south"))))

    assert "the part of north was changed" in message
    assert "site is south, expected north" in message


def test_a_site_that_was_not_issued_by_the_authority_does_not_count():
    key, authority = pki.new_authority("consortium")
    csr = pki.request(SITES["north"][0], "north", "site")
    foreign = pki.issue(key, authority, csr, name="north", role="site", days=9)
    values = entry(part_values("north")) | {"certificate": pki.to_pem(foreign)}

    assert "was not issued" in refusal(replace_north(values))


def test_a_signed_receipt_is_read_by_its_text():
    receipt = Receipt.read_signed(chain()[0])

    assert receipt.sites["south"].patients == "suppressed"
    assert receipt.sites["north"].patients == 412
