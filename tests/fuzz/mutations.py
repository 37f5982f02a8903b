"""Valid inputs, changed: what `attack` gives a parser, and how it counts the outcomes.

Every outcome must be a value, or the documented error. `make test` tries a few hundred
inputs for each parser, always the same ones; `FEDGEX_FUZZ=N` tries N new ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = int(os.environ.get("FEDGEX_FUZZ", "0"))
"""Inputs for each parser; 0: as many as the test says."""

ODD = (
    b"[" * 3000,
    b'{"a":' * 2000,
    b"a." * 3000,
    b"9" * 5000,
    b"1e308",
    b"1e999",
    b"-1",
    b"0x" + b"f" * 2000,
    b"NaN",
    b"null",
    b"true",
    b'""',
    b"{}",
    b"[]",
    b'"\\ud800"',
    b"\\u0000",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    "\u202e\u200b\ud7ff".encode(),
    b"\r",
    b"\n",
    b'"',
    b"'''",
    b'"""',
    b",",
    b"\x1b[2J",
    b"../../etc/passwd",
    b"A" * 70_000,
)
"""What stands in no honest input, or not there."""

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    0.5,
    "",
    "\x00",
    "a\nb",
    "\u202e",
    "x" * 70_000,
    "2026-01-01T00:00:00",
    "2026-13-45",
    "../../x",
    [],
    {},
    [[[[[[[[[[]]]]]]]]]],
    [None],
    ["x"] * 1000,
    {"": {"": ""}},
)
"""What may stand instead of any value of JSON."""

Change = tuple[str, int, int]
_OF_BYTES = ("flip", "cut", "drop", "repeat", "splice", "odd")
_OF_JSON = (*_OF_BYTES, *["value"] * 6, *["key"] * 4)


def attack(
    name: str,
    read: Callable[[bytes], object],
    errors: type[Exception] | tuple[type[Exception], ...],
    seeds: Sequence[bytes],
    examples: int = 300,
) -> Counter[str]:
    """Read changed inputs, and return how many were accepted and refused.

    Parameters
    ----------
    read
        The parser; another error than `errors` fails the test.
    seeds
        Valid inputs; each must be accepted.
    """
    for seed in seeds:
        read(seed)
    found: Counter[str] = Counter()
    kinds = _OF_JSON if seeds[0][:1] in (b"{", b"[") else _OF_BYTES
    numbers = st.integers(0, 2**24)
    change = st.tuples(st.sampled_from(kinds), numbers, numbers)
    several = st.lists(change, min_size=1, max_size=4)
    began = time.process_time()

    @settings(
        max_examples=FUZZ or examples,
        derandomize=not FUZZ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(range(len(seeds))), several | st.binary(max_size=200))
    def tries(which: int, changes: list[Change] | bytes) -> None:
        if isinstance(changes, bytes):
            content = changes
        else:
            content = changed(seeds[which], changes, seeds)
        try:
            read(content)
        except errors:
            found["refused"] += 1
        else:
            found["accepted"] += 1

    tries()
    if FUZZ:
        sys.__stderr__.write(
            f"fuzz {name}: {found.total()} inputs, {found['refused']} refused, "
            f"{found['accepted']} accepted, {time.process_time() - began:.0f} s\n"
        )
    assert found["refused"]
    return found


def changed(
    content: bytes, changes: Sequence[Change], others: Sequence[bytes]
) -> bytes:
    """Return an input after the changes."""
    for kind, first, second in changes:
        at, length = first % (len(content) + 1), second % 64 + 1
        if kind == "flip" and content:
            flipped = bytearray(content)
            flipped[first % len(content)] ^= 1 << second % 8
            content = bytes(flipped)
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:at] + content[at + length :]
        elif kind == "repeat":
            content = content[: at + length] + content[at:]
        elif kind == "splice":
            other = others[second % len(others)]
            content = content[:at] + other[second % (len(other) + 1) :]
        elif kind == "odd":
            content = content[:at] + ODD[second % len(ODD)] + content[at:]
        elif kind in ("value", "key"):
            content = _in_json(content, kind, first, second)
    return content


def _in_json(content: bytes, kind: str, first: int, second: int) -> bytes:
    """Replace a value of JSON, or a key; what is no JSON stays as it is."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places: list[tuple[Any, Any]] = []
    waiting = [whole]
    while waiting:
        node = waiting.pop()
        keys = (
            list(node)
            if isinstance(node, dict)
            else range(len(node))
            if isinstance(node, list)
            else ()
        )
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    if not places:
        return content
    node, key = places[first % len(places)]
    if kind == "value":
        node[key] = VALUES[second % len(VALUES)]
    elif isinstance(node, dict):
        moved = node.pop(key)
        if second % 2:
            node[str(VALUES[second % len(VALUES)])[:1000]] = moved
    else:
        node.insert(key, node[key])
    try:
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return content
    return text.encode()
