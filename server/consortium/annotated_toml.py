"""Write settings as TOML with each key's docstring as a comment."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from datetime import date
from enum import Enum
from typing import Any

from fedgex.common.settings import Settings

WIDTH = 88


def render(settings: Settings) -> str:
    """Return the settings as TOML; each key's docstring stands above it.

    Defaults are written too, so that later defaults change nothing. Keys without a
    value (None) are left out.
    """
    return "\n".join(_table(settings, ())).strip() + "\n"


def _table(settings: Settings, path: tuple[str, ...]) -> list[str]:
    """Return a table's own keys, then its tables: TOML wants them in this order."""
    lines = ["", f"[{'.'.join(path)}]"] if path else []
    tables: list[str] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if value is None:
            continue
        about = _comment(field.description)
        if isinstance(value, Settings):
            table = _table(value, (*path, name))
            tables += [table[0], *about, *table[1:]]
        elif isinstance(value, Mapping) and len(_value(value)) > WIDTH:
            tables += ["", f"[{'.'.join((*path, name))}]", *about]
            tables += [f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()]
        else:
            lines += [*about, f"{name} = {_value(value)}"]
    return lines + tables


def _comment(description: str | None) -> list[str]:
    text = " ".join((description or "").split())
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2)]


def _value(value: Any) -> str:
    if isinstance(value, Enum):
        return _value(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(k)} = {_value(v)}" for k, v in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, Sequence):
        return _list([_value(each) for each in value])
    return repr(value)


def _list(values: Sequence[str]) -> str:
    line = f"[{', '.join(values)}]"
    if len(line) <= WIDTH - 20:
        return line
    wrapped = textwrap.wrap(
        ", ".join(values), WIDTH - 4, break_long_words=False, break_on_hyphens=False
    )
    return "[\n" + "\n".join(f"    {part}" for part in wrapped) + "\n]"
