"""State dicts and settings to Flower records and back, checked on the way in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedgex.common.arrays import Arrays
from fedgex.common.errors import UpdateError

PACKED = "safetensors"
"""Name and serialisation of the one array in a record."""


def to_record(arrays: Arrays) -> ArrayRecord:
    """Return the arrays as a record: one piece of bytes in safetensors' format.

    Flower moves every array by itself, in several requests; a model of sixty small ones
    takes longer to announce than to send.
    """
    content = save({name: np.asarray(arrays[name], order="C") for name in arrays})
    packed = Array(dtype="uint8", shape=(len(content),), stype=PACKED, data=content)
    return ArrayRecord({PACKED: packed})


def packed(record: ArrayRecord) -> bytes:
    """Return the bytes of a record that `to_record` made; what they hold is unchecked.

    Raises
    ------
    UpdateError
        If the record is another.
    """
    if set(record) != {PACKED}:
        raise UpdateError(f'the arrays are not packed as "{PACKED}"')
    return record[PACKED].data


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
    except Exception as error:  # whatever bytes came, they stop their sender alone
        raise UpdateError("the arrays cannot be read") from error
    return arrays


def floats(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """Return the arrays as float32, the type of every parameter."""
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def text(record: ConfigRecord, key: str) -> str:
    """Return a string from a record.

    Raises
    ------
    UpdateError
        If it is missing or no string.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise UpdateError(f'the record\'s "{key}" is {type(value).__name__}, not text')
    return value


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
            add(_canonical(dict(record)))
    return hashed.hexdigest()


def _canonical(values: Mapping[str, object]) -> bytes:
    """Return sorted JSON; bytes become an object, which no record can hold itself."""
    return json.dumps(
        values,
        sort_keys=True,
        separators=(",", ":"),
        default=lambda value: {"bytes": value.hex()},
    ).encode()
