"""Messages and replies that were changed, and logs that were cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedgex.client.identity import Identity
from fedgex.common import keys
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import FederationError, TrustError
from fedgex.common.transport.records import floats, to_arrays, to_record
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.signed import Signed

from ...support.alliance import (
    GENES,
    Alliance,
    code,
    trainings,
)
from ..conftest import _bytes, _parse
from .conftest import (
    CONTRIBUTED,
    FIRST,
    SECOND,
    THIRD,
    Change,
    Tamper,
    Undisturbed,
    answered,
    asked,
    short,
    small,
)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (keys.STATISTICS, 0),
        (keys.CROSS_PRODUCTS, 0),
        (keys.TRAIN, 1),
        (keys.TRAIN, 2),
    ],
)
def test_a_repeated_request_is_answered_with_the_stored_bytes_and_trains_nothing(
    ran: Alliance, undisturbed: Undisturbed, kind: str, number: int
) -> None:
    before = undisturbed.exchange(FIRST, kind, number)

    with trainings() as trained:
        again = answered(ran, before)

    assert again.reply_bytes == before.reply_bytes
    assert not trained
    assert len(ran.log(FIRST, "replayed")) == 1
    audit_log.verify(ran.state(FIRST) / "audit.jsonl")


def test_a_request_repeated_with_a_newer_receipt_is_still_the_same_request(
    ran: Alliance, undisturbed: Undisturbed
) -> None:
    before = undisturbed.exchange(FIRST, keys.TRAIN, 1)
    newer = undisturbed.exchange(FIRST, keys.TRAIN, 2).message

    def renew(content: RecordDict) -> None:
        content[keys.RECEIPT] = newer.config_records[keys.RECEIPT]

    assert answered(ran, before, renew).reply_bytes == before.reply_bytes


def _another_model(content: RecordDict) -> None:
    arrays = floats(to_arrays(content.array_records[keys.MODEL]))
    content[keys.MODEL] = to_record({n: a + np.float32(1) for n, a in arrays.items()})


def _another_study(content: RecordDict) -> None:
    study = small(seed=2)
    record = content.config_records[keys.STUDY]
    record[keys.JSON], record["hash"] = study.to_json(), study.hash


def _another_vocabulary(content: RecordDict) -> None:
    vocabulary = Vocabulary(GENES[:-1])
    record = content.config_records[keys.VOCABULARY]
    record["genes"], record["hash"] = list(vocabulary.genes), vocabulary.hash


def _round_beyond_the_last(content: RecordDict) -> None:
    content.config_records[keys.ROUND]["number"] = 3


def _unplanned_phase(content: RecordDict) -> None:
    content.config_records[keys.ROUND]["phase"] = "survival"


def _no_run(content: RecordDict) -> None:
    del content[keys.RUN]


def _nameless_run(content: RecordDict) -> None:
    content.config_records[keys.RUN]["run"] = ""


def _escaping_run(content: RecordDict) -> None:
    content.config_records[keys.RUN]["run"] = "../../elsewhere"


def _unknown_contract(content: RecordDict) -> None:
    content.config_records[keys.RUN]["contract"] = "0" * 64


def _another_runs_receipt(content: RecordDict) -> None:
    content.config_records[keys.RUN]["run"] = "small-2"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_another_model, "FX-RUN-007"),
        (_another_study, "FX-STUDY-006"),
        (_another_vocabulary, "FX-STUDY-006"),
        (_round_beyond_the_last, "FX-STUDY-006"),
        (_unplanned_phase, "FX-STUDY-006"),
        (_another_runs_receipt, "FX-STUDY-006"),
        (_no_run, "FX-RUN-001"),
        (_nameless_run, "FX-RUN-001"),
        (_escaping_run, "FX-RUN-001"),
        (_unknown_contract, "FX-STUDY-001"),
    ],
)
def test_a_message_that_the_contract_and_the_run_do_not_cover_is_refused(
    ran: Alliance, undisturbed: Undisturbed, change: Change, expected: str
) -> None:
    with trainings() as trained:
        reply = asked(ran, undisturbed.exchange(FIRST, keys.TRAIN, 2), change)

    assert code(reply) == expected
    assert set(reply) <= {keys.REFUSAL, keys.PART}
    assert not trained
    assert ran.log(FIRST, "refused")[-1]["code"] == expected


def test_statistics_are_not_told_again_under_another_number(
    ran: Alliance, undisturbed: Undisturbed
) -> None:
    def number(content: RecordDict) -> None:
        content[keys.ROUND] = ConfigRecord({"phase": "", "number": 1})

    reply = asked(ran, undisturbed.exchange(FIRST, keys.STATISTICS), number)

    assert code(reply) == "FX-STUDY-006"


def _changed(ran: Alliance, signed: Signed) -> Signed:
    other = json.loads(signed.content) | {"outgoing": "0" * 64}
    text = json.dumps(other, sort_keys=True, separators=(",", ":"))
    return Signed(text, signed.signatures)


def _unsigned(ran: Alliance, signed: Signed) -> Signed:
    return Signed(signed.content)


def _signed_by_a_hospital(ran: Alliance, signed: Signed) -> Signed:
    site = Identity.load(ran.state(SECOND))
    return Signed(signed.content).signed_by(site.key, site.certificate)


@pytest.mark.parametrize("forge", [_changed, _unsigned, _signed_by_a_hospital])
def test_a_forged_receipt_is_refused_and_not_kept(
    ran: Alliance,
    undisturbed: Undisturbed,
    forge: Callable[[Alliance, Signed], Signed],
) -> None:
    def change(content: RecordDict) -> None:
        record = content.config_records[keys.RECEIPT]
        signed = Signed.from_json(str(record[keys.JSON]), "test")
        record[keys.JSON] = forge(ran, signed).to_json()

    shutil.rmtree(ran.state(FIRST) / "receipts")

    reply = asked(ran, undisturbed.exchange(FIRST, keys.TRAIN, 2), change)

    assert code(reply) == "FX-STUDY-005"
    assert not (ran.state(FIRST) / "receipts").exists()


@pytest.fixture
def tamper(alliance: Alliance) -> Tamper:
    """Return what runs rounds in which the third hospital's updates are changed."""

    def run(change: Change, n_rounds: int = 1) -> list[tuple[str, str | None]]:
        contract = alliance.agree(short(n_rounds))

        def after(site: str, reply: Message) -> None:
            if site == THIRD and keys.UPDATE in reply.content.array_records:
                change(reply.content)

        alliance.conduct(contract, after=after)
        assert alliance.states(FIRST) == [CONTRIBUTED] * n_rounds
        return alliance.states(THIRD)

    return run


def test_a_reply_of_the_first_round_replayed_in_the_second_is_quarantined(
    tamper: Tamper,
) -> None:
    kept: list[bytes] = []

    def replay(content: RecordDict) -> None:
        kept.append(_bytes(content))
        for name, record in _parse(kept[0]).items():
            content[name] = record

    first, (state, reason) = tamper(replay, 2)

    assert first == CONTRIBUTED
    assert state == "quarantined"
    assert "signed for round 1, this is 2" in str(reason)


def test_a_reply_signed_by_another_hospital_is_quarantined(
    alliance: Alliance, tamper: Tamper
) -> None:
    other = alliance.grid().nodes[SECOND].gate.identity

    def sign(content: RecordDict) -> None:
        record = content.config_records[keys.PART]
        part = str(record[keys.JSON]).encode()
        record[keys.SIGNATURE] = other.sign(part)

    ((state, reason),) = tamper(sign)

    assert state == "quarantined"
    assert "the signature does not fit" in str(reason)


def test_an_update_with_one_flipped_byte_is_quarantined(
    tamper: Tamper,
) -> None:
    def flip(content: RecordDict) -> None:
        (array,) = content.array_records[keys.UPDATE].values()
        flipped = bytearray(array.data)
        flipped[-1] ^= 1
        array.data = bytes(flipped)

    ((state, reason),) = tamper(flip)

    assert state == "quarantined"
    assert "signed for reply" in str(reason)


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))


def _restored_and_grown(path: Path, keep: int) -> None:
    lines = len(path.read_bytes().splitlines())
    _cut(path, keep)
    for _ in range(lines - keep + 5):
        Chain(path).append("daemon-started", pid=1)


@pytest.mark.parametrize("spoil", [_cut, _restored_and_grown])
def test_a_hospital_whose_log_lacks_what_it_signed_answers_nothing(
    ran: Alliance, undisturbed: Undisturbed, spoil: Callable[[Path, int], None]
) -> None:
    before = undisturbed.exchange(FIRST, keys.TRAIN, 2)
    head = str(before.message.config_records[keys.RECEIPT]["head"])
    spoil(ran.state(FIRST) / "audit.jsonl", int(head.partition(":")[0]) - 1)

    with trainings() as trained:
        reply = asked(ran, before)
        with pytest.raises(FederationError, match=rf"{FIRST}: refused \(FX-RUN-003\)"):
            ran.conduct(undisturbed.contract)

    assert code(reply) == "FX-RUN-003"
    assert set(reply) == {keys.REFUSAL, keys.PART}
    assert not trained


def test_a_log_that_was_changed_keeps_the_gate_shut(ran: Alliance) -> None:
    path = ran.state(FIRST) / "audit.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"event":"', '"event":"not-')
    path.write_text("".join(lines))

    with pytest.raises(TrustError, match="line 3"):
        ran.grid()
