"""The key of a patient: one for all spellings of an identifier.

Spreadsheets and exports change case, quotes, zeros and invisible characters. Linking,
grouping, splits, opt-outs and the privacy ledger compare keys, so that one person is
one patient in all of them.
"""
# ruff: noqa: RUF001 (characters that look alike are what this is about)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

INVISIBLE = frozenset({"Cc", "Cf"})
"""Unicode categories of control and format characters, which are left out."""

HYPHENS = dict.fromkeys(map(ord, "‐‑‒–—―−"), "-")
"""Dashes that word processors put in place of a hyphen."""

AROUND = " ,;\"'`´‘’‚‛“”„‟«»‹›"
"""Quotes and delimiters, which count for nothing at either end."""

_WHOLE = re.compile(r"(\d+)([.,]0*)?")


def patient_key(identifier: str) -> str:
    """Return the key of an identifier of a patient or a sample.

    Unicode NFKC, case folded, dashes as hyphens, without control and format characters,
    one space for several, without quotes, commas and semicolons around it. An
    identifier that is an integer counts by its value: 017, 17 and 17.0 have one
    key, P017 and P17 two.
    """
    text = unicodedata.normalize("NFKC", identifier)
    seen = (c for c in text if c.isspace() or unicodedata.category(c) not in INVISIBLE)
    text = unicodedata.normalize("NFKC", "".join(seen).casefold())
    text = " ".join(text.translate(HYPHENS).split()).strip(AROUND)
    number = _WHOLE.fullmatch(text)
    if number is None:
        return text
    digits = "".join(str(unicodedata.decimal(c)) for c in number[1])
    return digits.lstrip("0") or "0"


def ambiguous(identifiers: Iterable[str]) -> int:
    """Return how many distinct identifiers share their key with another of them."""
    spelt: dict[str, int] = {}
    for identifier in set(identifiers):
        key = patient_key(identifier)
        spelt[key] = spelt.get(key, 0) + 1
    return sum(n for n in spelt.values() if n > 1)
