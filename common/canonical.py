"""The one text of a JSON value: what is hashed and signed, here and at every peer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def canonical_json(
    values: Any,
    *,
    allow_nan: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Return the ASCII text of a JSON value: keys sorted, no spaces.

    Parameters
    ----------
    allow_nan
        Whether NaN and infinity may stand in it, as `NaN` and `Infinity`.
    default
        Returns what to write for a value that JSON does not have.

    Raises
    ------
    TypeError
        If JSON does not have a value, and there is no `default`.
    ValueError
        If a number is not finite and `allow_nan` is false.
    """
    return json.dumps(
        values,
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=allow_nan,
        default=default,
    )
