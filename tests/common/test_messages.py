"""What travels: nothing but what docs/messages.md lists, and no content ends a run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgex.common import keys
from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.moments import GeneMoments, Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import MessageError
from fedgex.common.messages.codec import Message, boundary
from fedgex.common.messages.fields import (
    AdvertisedKeys,
    Attempt,
    CohortSize,
    Commitment,
    Decision,
    Hospital,
    Introduction,
    LastReceipt,
    Participant,
    Round,
    Run,
    Server,
    Shared,
    SignedPart,
    SignedText,
    Survived,
    TrainingMetrics,
)
from fedgex.common.messages.replies import (
    REPLIES,
    ConfirmReply,
    ContractReply,
    CrossProductsReply,
    KeysReply,
    PrepareReply,
    Refusal,
    ReleaseReply,
    Reply,
    SharesReply,
    StatisticsReply,
    TrainReply,
    UnmaskReply,
)
from fedgex.common.messages.requests import (
    REQUESTS,
    ConfirmRequest,
    ContractRequest,
    CrossProductsRequest,
    Envelope,
    KeysRequest,
    PrepareRequest,
    ReleaseRequest,
    SharesRequest,
    StatisticsRequest,
    TrainRequest,
    UnmaskRequest,
    read_request,
)
from fedgex.common.study import Study
from fedgex.common.transport.records import to_arrays, to_record
from fedgex.common.trust.receipt import reply_digest, request_digest

PAGE = Path(__file__).parents[2] / "docs" / "messages.md"
GENES = Vocabulary(("EGFR", "KRAS", "TP53"))
VALUES = np.random.default_rng(0).normal(8, 1, (12, len(GENES)))
ENVELOPE: dict[str, Any] = {
    "server": Server(version="0.1.0"),
    "run": Run(contract="c" * 64, run="run-1"),
    "receipt": LastReceipt(json_="{}", head=f"7:{'a' * 64}"),
}
OF_STUDY: dict[str, Any] = ENVELOPE | {
    "study": Study.read({"name": "small"}, "a test's study")
}
OF_GENES: dict[str, Any] = OF_STUDY | {"vocabulary": GENES}
OF_SCALE: dict[str, Any] = OF_GENES | {
    "standardisation": Standardisation(mean=np.full(3, 8.0), sd=np.ones(3))
}
OF_ROUND: dict[str, Any] = OF_GENES | {"round": Round(phase="pretraining", number=2)}
ATTEMPT: dict[str, Any] = {"attempt": 1, "run": "run-1"}
KEYS = {"channel": "ab" * 32, "mask": "cd" * 32, "measured": "e0"}
SITES = ("north", "south")
SURVIVED = Survived(**ATTEMPT, sharers=SITES, survivors=SITES)
BOXES = {"north": b"shares", "south": b""}
MODEL = to_record({"weight": np.ones((2, 2), np.float32)})

ASKED: dict[str, Envelope] = {
    keys.CONTRACT: ContractRequest(**ENVELOPE, contract=SignedText(json_="{}")),
    keys.PREPARE: PrepareRequest(**OF_STUDY),
    keys.STATISTICS: StatisticsRequest(**OF_GENES),
    keys.CROSS_PRODUCTS: CrossProductsRequest(**OF_SCALE),
    keys.TRAIN: TrainRequest(
        **OF_SCALE | OF_ROUND,
        model=MODEL,
        attempt=Shared(**ATTEMPT, sharers=SITES),
        boxes=BOXES,
    ),
    keys.SECURE_KEYS: KeysRequest(**OF_SCALE | OF_ROUND, attempt=Attempt(**ATTEMPT)),
    keys.SECURE_SHARES: SharesRequest(
        **OF_ROUND,
        attempt=Attempt(**ATTEMPT),
        participants={"north": Participant(**KEYS), "south": Participant(**KEYS)},
    ),
    keys.SECURE_CONFIRM: ConfirmRequest(**OF_ROUND, attempt=SURVIVED),
    keys.SECURE_UNMASK: UnmaskRequest(
        **OF_ROUND, attempt=SURVIVED, confirmations=BOXES
    ),
    keys.RELEASE: ReleaseRequest(
        **ENVELOPE, bundle=to_record({keys.BUNDLE: np.zeros(3, np.uint8)})
    ),
}
PART: dict[str, Any] = {"part": SignedPart(json_="{}", signature="s", certificate="c")}
INTRODUCTION: dict[str, Any] = {
    "name": "north",
    "version": "0.1.0",
    "genes": GENES.genes,
    "shares_cross_products": True,
}
ANSWERED: dict[str, Reply] = {
    keys.CONTRACT: ContractReply(**PART, site=Decision(name="north", decision="{}")),
    keys.PREPARE: PrepareReply(
        **PART, site=Introduction(**INTRODUCTION, num_patients=12)
    ),
    keys.STATISTICS: StatisticsReply(
        **PART,
        sums=GeneMoments.of(VALUES),
        metrics=CohortSize(num_patients=12),
    ),
    keys.CROSS_PRODUCTS: CrossProductsReply(
        **PART, products={"others": CrossProducts.of(VALUES)}
    ),
    keys.TRAIN: TrainReply(
        **PART, update=MODEL, metrics=TrainingMetrics(num_examples=12, train_loss=0.5)
    ),
    keys.SECURE_KEYS: KeysReply(**PART, advertised=AdvertisedKeys(**KEYS, attempt=1)),
    keys.SECURE_SHARES: SharesReply(
        **PART, boxes=BOXES, commitment=Commitment(commitment="f" * 64)
    ),
    keys.SECURE_CONFIRM: ConfirmReply(**PART, confirmations=BOXES),
    keys.SECURE_UNMASK: UnmaskReply(**PART, seeds=BOXES, masks={}),
    keys.RELEASE: ReleaseReply(**PART, site=Hospital(name="north")),
}
EVERY: dict[str, Message] = (
    {f"request {kind}": message for kind, message in ASKED.items()}
    | {f"reply {kind}": message for kind, message in ANSWERED.items()}
    | {"refusal": Refusal.of("FX-SITE-001")}
)
every_message = pytest.mark.parametrize("message", EVERY.values(), ids=EVERY.keys())


def arrived(message: Message) -> RecordDict:
    """Return the records as the other side has them: a test may change these."""
    return recorddict_from_proto(recorddict_to_proto(message.to_records()))


def test_there_is_an_example_of_every_message() -> None:
    assert {k: type(m) for k, m in ASKED.items()} == REQUESTS
    assert {k: type(m) for k, m in ANSWERED.items()} == REPLIES


@every_message
def test_a_message_is_read_as_it_was_written(message: Message) -> None:
    sent = message.to_records()

    read = type(message).from_records(sent)

    assert reply_digest(read.to_records()) == reply_digest(sent)


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_has_the_digest_of_what_came(kind: str) -> None:
    sent = ASKED[kind].to_records()

    assert read_request(kind, sent).digest == request_digest(kind, sent)


# ---- whatever else a message holds ----


@every_message
def test_another_record_is_refused_by_its_name(message: Message) -> None:
    sent = arrived(message)
    sent["smuggled"] = ConfigRecord({keys.ATTEMPT: 7})

    with pytest.raises(MessageError, match="'smuggled', which is not asked for"):
        type(message).from_records(sent)


@every_message
def test_another_key_or_array_in_a_record_is_refused_by_its_name(
    message: Message,
) -> None:
    for codec in message.codecs().values():
        sent = arrived(message)
        if codec.record not in sent or not codec.keys:
            continue  # absent, or named by hospitals or parameters
        record = sent[codec.record]
        if not isinstance(record, ArrayRecord):
            record["smuggled"] = 7
        elif codec.record in (keys.BUNDLE, keys.MASKED):
            continue  # unpacked, and compared, where they are used
        else:
            arrays = {**to_arrays(record), "smuggled": np.zeros(3)}
            sent[codec.record] = to_record(arrays)

        with pytest.raises(MessageError, match=f"\"{codec.record}\": .*'smuggled'"):
            type(message).from_records(sent)


@every_message
def test_a_record_that_is_missing_or_of_another_kind_is_refused_by_its_name(
    message: Message,
) -> None:
    for name, codec in message.codecs().items():
        sent = arrived(message)
        if codec.record not in sent:
            continue
        packed = isinstance(sent.pop(codec.record), ArrayRecord)
        other = Array(np.zeros(1))
        sent[codec.record] = ConfigRecord() if packed else ArrayRecord({"a": other})

        with pytest.raises(MessageError, match=f'"{codec.record}": it is of type'):
            type(message).from_records(sent)
        del sent[codec.record]
        if not hasattr(type(message), name):
            with pytest.raises(MessageError, match=f'"{codec.record}": it is missing'):
                type(message).from_records(sent)


def test_there_is_no_other_type_of_message() -> None:
    with pytest.raises(MessageError, match=r"of the type 'query\.rows'"):
        read_request("query.rows", RecordDict())


# ---- values that cannot be ----


def set_in(record: str, key: str, value: Any) -> Callable[[RecordDict], None]:
    def change(sent: RecordDict) -> None:
        sent[record][key] = value

    return change


def array_of(record: str, name: str, array: Any) -> Callable[[RecordDict], None]:
    def change(sent: RecordDict) -> None:
        packed = sent.array_records[record]
        sent[record] = to_record(dict(to_arrays(packed)) | {name: array})

    return change


WRONG: list[tuple[str, Callable[[RecordDict], None]]] = [
    ("request query.prepare", set_in(keys.STUDY, keys.JSON, "[" * 100_000)),
    ("request query.prepare", set_in(keys.STUDY, "hash", "0" * 64)),
    ("request query.prepare", set_in(keys.RECEIPT, "head", "7")),
    ("request query.statistics", set_in(keys.VOCABULARY, "genes", ["B", "A"])),
    ("request query.statistics", set_in(keys.VOCABULARY, "genes", "EGFR")),
    (
        "request query.cross_products",
        array_of(keys.STANDARDISATION, "sd", np.zeros(3)),
    ),
    (
        "request query.cross_products",
        array_of(keys.STANDARDISATION, "mean", np.array([0, np.nan, 0])),
    ),
    (
        "request query.cross_products",
        array_of(keys.STANDARDISATION, "mean", np.zeros(3, np.float32)),
    ),
    (
        "request query.cross_products",
        array_of(keys.STANDARDISATION, "mean", np.zeros((3, 1))),
    ),
    ("request train", set_in(keys.ROUND, "number", 0)),
    ("request train", set_in(keys.ROUND, "number", 1.5)),
    ("request train", set_in(keys.ROUND, "phase", "../secret")),
    ("request train", set_in(keys.BOXES, "north", "not hexadecimal")),
    ("request train", set_in(keys.BOXES, "north", 7)),
    ("request query.secagg_shares", set_in(keys.PUBLIC_KEYS, "north", "{")),
    (
        "request query.secagg_shares",
        set_in(keys.PUBLIC_KEYS, "north", '{"channel":"","mask":"","measured":""}'),
    ),
    ("reply query.prepare", set_in(keys.SITE, "genes", ["G" * 4_000_000])),
    ("reply query.prepare", set_in(keys.SITE, "genes", ["A"] * 200_001)),
    ("reply query.prepare", set_in(keys.SITE, keys.NUM_PATIENTS, 1e308)),
    ("reply query.prepare", set_in(keys.SITE, keys.NUM_PATIENTS, True)),
    ("reply query.statistics", array_of(keys.MOMENTS, "count", np.full(3, 99))),
    ("reply query.statistics", array_of(keys.MOMENTS, "total", np.full(3, np.inf))),
    ("reply query.statistics", array_of(keys.MOMENTS, "count", np.zeros(3))),
    (
        "reply query.cross_products",
        array_of(keys.PRODUCTS, "others/totals", np.zeros(4)),
    ),
    ("reply train", set_in(keys.METRICS, keys.NUM_EXAMPLES, 1e308)),
    ("reply train", set_in(keys.METRICS, keys.NUM_EXAMPLES, -1)),
    ("reply train", set_in(keys.METRICS, "train-loss", float("nan"))),
    ("reply train", set_in(keys.WITHHELD, keys.METRICS, ["seconds"])),
    ("reply query.secagg_shares", set_in(keys.EXCHANGE, "commitment", "f")),
    ("refusal", set_in(keys.REFUSAL, "code", "FX-SITE-001\n" * 10)),
]


@pytest.mark.parametrize(("name", "change"), WRONG)
def test_a_value_that_cannot_be_is_refused_in_few_words(
    name: str, change: Callable[[RecordDict], None]
) -> None:
    sent = arrived(EVERY[name])
    change(sent)

    with pytest.raises(MessageError) as caught:
        type(EVERY[name]).from_records(sent)
    assert len(str(caught.value)) < 500


def scalars() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.integers(-(2**40), 2**70),
        st.floats(),
        st.booleans(),
        st.text(max_size=9),
        st.binary(max_size=9),
        st.lists(st.text(max_size=3), max_size=3),
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_came_raises_the_error_of_messages_or_nothing(
    data: st.DataObject,
) -> None:
    message = data.draw(st.sampled_from(list(EVERY.values())))
    sent = arrived(message)
    name = data.draw(st.sampled_from(list(sent)))
    record = sent[name]
    if isinstance(record, ArrayRecord):
        content = data.draw(st.binary(max_size=64))
        name_of_array = data.draw(st.sampled_from([*record, "other"]))
        array = Array("uint8", (len(content),), "safetensors", content)
        record[name_of_array] = array
    else:
        key = data.draw(st.sampled_from([*record, "other"]))
        try:
            record[key] = data.draw(scalars())
        except (TypeError, ValueError, OverflowError):
            return  # no record can hold it

    with contextlib.suppress(MessageError):
        type(message).from_records(sent)


def test_a_full_disk_is_not_blamed_on_who_sent_the_message() -> None:
    with pytest.raises(OSError, match="No space"), boundary():
        raise OSError("No space left on device")


# ---- the page ----


def rows(part: str) -> Iterator[list[str]]:
    """Yield the cells of the rows of the tables in a part of the page."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.split(f"\n## {part}", 1)[1].split("\n## ", 1)[0]
    for line in section.split("\n### ", 1)[0].splitlines():
        if line.startswith("|") and "---" not in line:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def keys_of(messages: Mapping[str, type[Message]]) -> dict[str, set[str]]:
    """Return all keys of each record, in any of the messages."""
    found: dict[str, set[str]] = {}
    for kind in messages.values():
        for codec in kind.codecs().values():
            found.setdefault(codec.record, set()).update(codec.keys)
    return found


def test_the_page_lists_the_records_of_each_request() -> None:
    listed = {
        kind: set(named(cells[2]))
        for cells in rows("Down")
        for kind in named(cells[0])
        if len(cells) == 3 and kind in REQUESTS
    }
    (always,) = (
        set(named(cells[2])) for cells in rows("Down") if cells[0] == "every message"
    )

    assert listed == {
        kind: {codec.record for codec in message.codecs().values()} - always
        for kind, message in REQUESTS.items()
    }
    assert always == {codec.record for codec in Envelope.codecs().values()}


def test_the_page_lists_the_keys_of_each_record_of_a_request() -> None:
    listed = {
        record: set(named(cells[1]))
        for cells in rows("Down")
        for record in named(cells[0])
        if record not in REQUESTS
    }

    assert listed == keys_of(REQUESTS)


def test_the_page_lists_records_and_keys_of_each_reply() -> None:
    listed: dict[str, dict[str, set[str]]] = {kind: {} for kind in REPLIES}
    refusal: dict[str, set[str]] = {}
    to, records = "", [""]
    for cells in rows("Up"):
        if len(cells) != 4 or cells[0] == "Answer to":
            continue
        to, records = cells[0] or to, named(cells[1]) or records
        kinds = [kind for kind in REPLIES if f"`{kind}`" in to]
        for place in (listed[kind] for kind in kinds):
            for record in records:
                place.setdefault(record, set()).update(named(cells[2]))
        if not kinds:
            for record in records:
                refusal.setdefault(record, set()).update(named(cells[2]))

    part = {keys.PART: refusal[keys.PART]}
    assert {kind: each | part for kind, each in listed.items()} == {
        kind: keys_of({kind: message}) for kind, message in REPLIES.items()
    }
    assert refusal == keys_of({"": Refusal})


def test_metrics_are_metrics_to_flower() -> None:
    sent = ANSWERED[keys.TRAIN].to_records()

    assert type(sent[keys.METRICS]) is MetricRecord
    assert sent.config_records[keys.WITHHELD] == {
        keys.METRICS: ["judged-loss", "num-loss-terms", "seconds"]
    }
