"""The one reader of JSON and of TOML: bounded, and with one error for all faults.

Texts of other parties, and files that a person or a crash may have damaged, are read
here and nowhere else (tests/test_one_reader.py). Size and nesting are bounded before a
library sees the text: deep brackets exhaust its stack, and a key of thousands of dotted
parts costs `tomllib` time and memory in the square of their number.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from fedgex.common.errors import ConfigError, FedgexError

MAX_BYTES = 1 << 20
"""Of a text, unless a caller expects longer ones."""
LONG_BYTES = 1 << 24
"""Of a text that holds a vocabulary, or an entry for each hospital."""
MAX_DEPTH = 20
"""Of nested tables, objects and arrays, and of the parts of a dotted key."""
MAX_WORD = 1000
"""Characters of a number, or of a key without quotes, in TOML."""

_JSON = re.compile(r'"(?:[^"\\]+|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""A string, to its end or that of the text, or a bracket."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOML = re.compile(
    r'"""(?:[^"\\]+|\\.|"(?!""))*+"{0,5}'
    r"|'''(?:[^']+|'(?!''))*+'{0,5}"
    r'|"(?:[^"\\\n]+|\\.)*+"?'
    r"|'[^'\n]*+'?"
    r"|\#[^\n]*+"
    r"|[\[\]{}.,=\n]"
    r"|[\w+-]++",
    re.DOTALL,
)
"""A string or comment, a character that separates keys, or a word."""


def read_bytes(
    path: Path,
    expected: str,
    *,
    error: type[FedgexError] = ConfigError,
    most: int = MAX_BYTES,
) -> bytes:
    """Read a file of bounded size.

    Parameters
    ----------
    expected
        What the file should be, for the message.
    error
        Error to raise.
    most
        Most bytes that it may have.

    Raises
    ------
    FedgexError
        An `error` if the file cannot be read, or is longer.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as cause:
        raise error(
            f"{path}: cannot be read ({cause.strerror or cause}); expected {expected}."
        ) from cause
    _bounded(content, str(path), error, most)
    return content


def json_value(
    text: str | bytes,
    source: str,
    expected: str = "JSON in UTF-8",
    *,
    error: type[FedgexError] = ConfigError,
    most: int = MAX_BYTES,
) -> Any:
    """Return the value of a JSON text, in which no object may name a key twice.

    Parameters
    ----------
    source, expected
        What the text is, and what it should be, for the message.
    error
        Error to raise.
    most
        Most bytes that it may have, or characters.

    Raises
    ------
    FedgexError
        An `error` if the text is not JSON, or too long or too deep.
    """
    _bounded(text, source, error, most)
    try:
        text = text if isinstance(text, str) else text.decode()
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _require_shallow(_JSON, text)
        value = json.loads(text, object_pairs_hook=_distinct)
        if _SURROGATE.search(text):  # half a character, which nothing can encode
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:
        reason = f"{source} is not JSON ({_reason(cause)})"
        raise error(f"{reason}; expected {expected}.") from cause
    return value


def json_object(
    text: str | bytes,
    source: str,
    expected: str = "a JSON object in UTF-8",
    *,
    error: type[FedgexError] = ConfigError,
    most: int = MAX_BYTES,
) -> dict[str, Any]:
    """Return the object of a JSON text; parameters and errors as of `json_value`."""
    value = json_value(text, source, expected, error=error, most=most)
    if not isinstance(value, dict):
        raise error(f"{source} is not a JSON object; expected {expected}.")
    return value


def toml_table(
    text: str | bytes,
    source: str,
    expected: str = "TOML in UTF-8, with Windows paths in single quotes",
    *,
    error: type[FedgexError] = ConfigError,
    most: int = MAX_BYTES,
) -> dict[str, Any]:
    """Return the table of a TOML text; parameters and errors as of `json_value`."""
    _bounded(text, source, error, most)
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        _require_shallow(_TOML, text)
        return tomllib.loads(text)
    except (ValueError, RecursionError) as cause:
        reason = f"{source} is not TOML ({_reason(cause)})"
        raise error(f"{reason}; expected {expected}.") from cause


def _bounded(
    text: str | bytes, source: str, error: type[FedgexError], most: int
) -> None:
    if len(text) > most:
        raise error(f"{source} is longer than the {most} bytes that it may have.")


def _require_shallow(tokens: re.Pattern[str], text: str) -> None:
    """Refuse deep brackets, dotted keys of many parts, and words that are too long."""
    depth = dots = 0
    for match in tokens.finditer(text):
        token = match[0]
        if token == ".":
            dots += 1
        elif token in "[{":
            depth, dots = depth + 1, 0
        elif token in "]}":
            depth, dots = depth - 1, 0
        elif token in ",=\n":
            dots = 0
        elif len(token) > MAX_WORD and token[0] not in "\"'#":
            raise ValueError(f"it holds a word of more than {MAX_WORD} characters")
        if max(depth, dots) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _reason(error: Exception) -> str:
    """Return what a library found; its text may quote a key of another party."""
    return repr(str(error))[1:-1][:200].rstrip(".")
