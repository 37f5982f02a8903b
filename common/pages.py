"""Tables of the documentation that are written from the code.

`python -m fedgex.common.pages docs` rewrites, in every page of a folder, what stands
between `<!-- KIND OF -->` and `<!-- end of KIND -->`:

| KIND | OF | Table |
|---|---|---|
| codes | PREFIX... : COLUMN... | codes, see `codes.Code` |
| keys | SECTION | keys of a section of the study, from their docstrings |
| rules | MEANS or ROBUST, or both | aggregation rules |
| requests, replies | nothing | keys of records of named values in messages |
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from pydantic.fields import FieldInfo

from fedgex.common import study
from fedgex.common.codes import Code
from fedgex.common.messages.codec import Fields, Message
from fedgex.common.messages.replies import REPLIES, Refusal, Reply
from fedgex.common.messages.requests import REQUESTS, Envelope
from fedgex.common.settings import Settings

HEADINGS = {"severity": "Severity", "meaning": "Meaning", "action": "What to do"}
"""Columns that a table of codes may have after the code."""

Rows = Iterator[Sequence[str]]
"""Of a table; the first is the header."""


def with_tables(page: str) -> str:
    """Return a Markdown page whose marked tables are those of the code."""
    return _TABLE.sub(_table, page)


def _table(found: re.Match[str]) -> str:
    rows = list(TABLES[found["kind"]](found["of"] or ""))
    lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]) + "\n")
    return found[1] + "\n" + "".join(lines) + "\n"


def _codes(of: str) -> Rows:
    prefixes, columns = (words.split() for words in of.split(":"))
    yield "Code", *(HEADINGS[column] for column in columns)
    for code in Code:
        if code.startswith(tuple(prefixes)):
            yield code, *(str(getattr(code, column)) for column in columns)


def _keys(section: str) -> Rows:
    model: type[Settings] = study.Study
    for name in section.split("."):
        hint = model.model_fields[name].annotation
        model = next(each for each in (*get_args(hint), hint) if each is not None)
    yield "Key", "Default", "Meaning"
    for name, field in model.model_fields.items():
        yield f"`{name}`", _default(field), _text(field)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _rules(of: str) -> Rows:
    yield "`name`", "Next model", "Paper"
    for kind in of.split():
        for name, (next_model, paper) in getattr(study, kind).items():
            yield f"`{name}`", next_model, paper


def _requests(_: str) -> Rows:
    yield "Record", "Keys", "Content"
    for record, fields in _records(Envelope, *REQUESTS.values()).items():
        texts = {f"`{key}`": text for key, text in fields.items()}
        content = "; ".join(f"{key}: {text}" for key, text in texts.items())
        if len(texts) == 1:
            content = next(iter(texts.values()))
        yield f"`{record}`", ", ".join(texts), content


def _replies(_: str) -> Rows:
    yield "Answer to", "Record", "Keys", "Content"
    replies = {f"`{kind}`": reply for kind, reply in REPLIES.items()}
    always = _records(Reply)
    found = {to: _records(reply) for to, reply in replies.items()}
    found |= {"any": _records(Refusal), "any, between hospitals": always}
    for to, records in found.items():
        for record, texts in records.items():
            if record not in always or records is always:
                for key, text in texts.items():
                    yield to, f"`{record}`", f"`{key}`", text


def _records(*messages: type[Message]) -> Mapping[str, Mapping[str, str]]:
    """Return the text of each key, by record."""
    found: dict[str, dict[str, str]] = {}
    for message in messages:
        for codec in message.codecs().values():
            if codec.fields is not None:
                found.setdefault(codec.record, {}).update(_texts(codec.fields))
    return found


def _texts(fields: type[Fields]) -> dict[str, str]:
    return {str(each.alias): _text(each) for each in fields.model_fields.values()}


TABLES: Mapping[str, Callable[[str], Rows]] = {
    "codes": _codes,
    "keys": _keys,
    "rules": _rules,
    "requests": _requests,
    "replies": _replies,
}
"""Rows of each kind of table."""

_TABLE = re.compile(
    rf"(<!-- (?P<kind>{'|'.join(TABLES)})(?: (?P<of>[^>]+))? -->\n).*?"
    r"(?=<!-- end of (?P=kind) -->)",
    re.DOTALL,
)

if __name__ == "__main__":
    for path in Path(sys.argv[1]).glob("*.md"):
        path.write_text(with_tables(path.read_text("utf-8")), "utf-8")
