"""State dicts and settings to Flower records and back, checked on the way in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedgex.common.arrays import Arrays
from fedgex.common.canonical import canonical_json
from fedgex.common.errors import UpdateError

PACKED = "safetensors"
"""Name of the first array in a record, and serialisation of all."""
PIECE_BYTES = 1 << 24
"""Of the longest array in a record."""


def to_record(arrays: Arrays) -> ArrayRecord:
    """Return the arrays as a record: the bytes of safetensors' format, cut in pieces.

    Flower moves every array by itself, in several requests, and a model of sixty small
    ones takes longer to announce than to send. It also puts each array together from
    its parts in a copy, so one array of a large model would double its memory.
    """
    content = save({name: np.asarray(arrays[name], order="C") for name in arrays})
    starts = range(0, len(content), PIECE_BYTES)
    return ArrayRecord(
        {
            _name(i): _piece(content[start : start + PIECE_BYTES])
            for i, start in enumerate(starts)
        }
    )


def pieces(record: ArrayRecord) -> list[bytes]:
    """Return the pieces of a record that `to_record` made, in order and unchecked.

    Raises
    ------
    UpdateError
        If the record is another.
    """
    names = [_name(i) for i in range(len(record))]
    if not names or set(record) != set(names):
        raise UpdateError(f'the arrays are not packed as "{PACKED}"')
    return [record[name].data for name in names]


def packed(record: ArrayRecord) -> bytes:
    """Return all bytes of a record that `to_record` made; see `pieces`."""
    return b"".join(pieces(record))


def to_arrays(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """Return the record's arrays.

    Raises
    ------
    UpdateError
        If its bytes are not those of arrays.
    """
    content = packed(record)
    try:
        arrays: dict[str, NDArray[np.generic]] = load(content)
    except Exception as error:  # whatever bytes came, only their sender fails
        raise UpdateError("the arrays cannot be read") from error
    return arrays


def let_go(content: RecordDict) -> None:
    """Free the arrays of a message that is done with.

    Flower's views of a message (`array_records` and the like) hold themselves and the
    message, until Python collects its garbage.
    """
    for record in content.values():
        if isinstance(record, ArrayRecord):
            record.clear()


def floats(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """Return the arrays as float32, the type of every parameter."""
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def digest(content: RecordDict, *, without: Collection[str] = ()) -> str:
    """Return the SHA-256 of what a message holds, as hex.

    Equal before and after the network, whatever the order of records and keys; another
    name, value, type, shape or bit gives another digest.

    Parameters
    ----------
    without
        Names of records that do not count.
    """
    hashed = hashlib.sha256()

    def add(part: bytes) -> None:
        # With its length before it, no part can run into the next.
        hashed.update(len(part).to_bytes(8, "big"))
        hashed.update(part)

    for name in sorted(set(content) - set(without)):
        record = content[name]
        add(name.encode())
        add(type(record).__name__.encode())
        add(len(record).to_bytes(8, "big"))
        if isinstance(record, ArrayRecord):
            for key, array in sorted(record.items()):
                described = [key, array.dtype, list(array.shape), array.stype]
                add(json.dumps(described).encode())
                add(array.data)
        else:
            add(canonical_json(dict(record), default=_bytes).encode())
    return hashed.hexdigest()


def _bytes(value: bytes) -> dict[str, str]:
    """Return bytes as an object, which no record can hold itself."""
    return {"bytes": value.hex()}


def _name(number: int) -> str:
    """Return the name of a piece; the first is number 0."""
    return f"{PACKED}-{number}" if number else PACKED


def _piece(content: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(content),), stype=PACKED, data=content)
