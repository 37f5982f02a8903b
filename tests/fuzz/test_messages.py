"""Every content of a message is read, or refused with `MessageError`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedgex.common.errors import MessageError, UpdateError
from fedgex.common.messages.replies import REPLIES, read_part
from fedgex.common.messages.requests import read_request
from fedgex.common.transport.flower import from_bytes, to_bytes
from fedgex.common.transport.records import PACKED, pieces, to_arrays
from fedgex.server.federation.dispatch import UNREADABLE, refusal_code, size_bytes

from ..common.test_messages import ANSWERED, ASKED, MODEL
from .mutations import attack

TYPES: Mapping[str, Any] = {
    each.__name__: each for each in (ArrayRecord, ConfigRecord, MetricRecord)
}


class UnsendableError(Exception):
    """Flower itself takes no such record, at the sender already."""


def as_json(content: RecordDict) -> bytes:
    """Return records as JSON, whose values can be changed."""
    written = {
        name: [
            type(record).__name__,
            {
                key: value.data.hex() if isinstance(value, Array) else value
                for key, value in record.items()
            },
        ]
        for name, record in content.items()
    }
    return json.dumps(written).encode()


def from_json(content: bytes) -> RecordDict:
    """Return the records that `as_json` wrote, or what was made of them."""
    try:
        return RecordDict(
            {
                name: TYPES[kind](
                    {key: _array(value) for key, value in values.items()}
                    if kind == "ArrayRecord"
                    else values
                )
                for name, (kind, values) in json.loads(content).items()
            }
        )
    except Exception as error:
        raise UnsendableError from error


def _array(text: str) -> Array:
    data = bytes.fromhex(text)
    return Array(dtype="uint8", shape=(len(data),), stype=PACKED, data=data)


def over_the_network(read: Callable[[RecordDict], object]) -> Callable[[bytes], object]:
    """Return a parser of a message's bytes, which Flower parses first."""

    def parse(content: bytes) -> object:
        try:
            found = from_bytes(content)
        except UNREADABLE as error:
            raise UnsendableError from error
        return read(found)

    return parse


@pytest.mark.parametrize("kind", ASKED)
def test_a_request_is_read_or_refused(kind: str) -> None:
    def read(content: RecordDict) -> object:
        return read_request(kind, content).to_records()

    errors, seed = (MessageError, UnsendableError), ASKED[kind].to_records()
    attack(kind, lambda c: read(from_json(c)), errors, [as_json(seed)], 150)
    attack(f"{kind}, bytes", over_the_network(read), errors, [to_bytes(seed)], 150)


@pytest.mark.parametrize("kind", ANSWERED)
def test_a_reply_is_read_or_refused(kind: str) -> None:
    def read(content: RecordDict) -> object:
        size_bytes(content)
        refusal_code(content)
        read_part(content)
        return REPLIES[kind].from_records(content).to_records()

    errors, seed = (MessageError, UnsendableError), ANSWERED[kind].to_records()
    attack(kind, lambda c: read(from_json(c)), errors, [as_json(seed)], 150)
    attack(f"{kind}, bytes", over_the_network(read), errors, [to_bytes(seed)], 150)


def test_arrays_are_read_or_refused() -> None:
    def read(content: bytes) -> object:
        array = Array("uint8", (len(content),), PACKED, content)
        return to_arrays(ArrayRecord({PACKED: array}))

    attack("arrays", read, UpdateError, [b"".join(pieces(MODEL))])
