"""The one text of a JSON value: what is hashed and signed, here and at every peer."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(values: Any, *, allow_nan: bool = True) -> str:
    """Return the ASCII text of a JSON value: keys sorted, no spaces.

    Bytes, which only the records of a message hold, become `{"bytes": hex}`.

    Parameters
    ----------
    values
        What `json` can write, or bytes.
    allow_nan
        Whether NaN and infinity may stand in it, as `NaN` and `Infinity`.

    Raises
    ------
    TypeError
        If a value is of another kind.
    ValueError
        If a number is not finite and `allow_nan` is false.
    """
    return json.dumps(
        values,
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=allow_nan,
        default=_bytes,
    )


def _bytes(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
