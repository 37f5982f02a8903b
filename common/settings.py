"""Base of all settings, as read from files and from messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fedgex.common import parsing
from fedgex.common.canonical import canonical_json
from fedgex.common.errors import ConfigError

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
"""Of studies and sites, since both name files: lower-case letters, digits, hyphens."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""
Norm = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Euclidean norm; beyond, float32 loses what is clipped to it, or added."""
Noise = Annotated[float, Field(gt=0, le=1e4)]
"""Standard deviation of noise, in the unit that its field names."""
Rate = Annotated[float, Field(ge=1e-6, le=1e3)]
"""Learning rate."""

MAX_ERRORS = 50
"""Errors of one text that are named."""


class Settings(BaseModel):
    """Base of all settings read from files: frozen, finite, without unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> Self:
        """Check `values`, read from `source`, and name everything wrong at once.

        Raises
        ------
        ConfigError
            If any key is unknown, missing, or holds a value that cannot be used.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = error.errors()
            lines = [
                f"{source}: {'.'.join(map(_part, e['loc'])) or 'settings'}: {e['msg']}"
                + ("" if cls._hides(e) else f" (found {shown(e['input'])})")
                for e in wrong[:MAX_ERRORS]
            ]
            if len(wrong) > MAX_ERRORS:
                lines.append(f"{source}: and {len(wrong) - MAX_ERRORS} errors more")
            raise ConfigError("\n".join(lines)) from error

    @classmethod
    def _hides(cls, error: ErrorDetails) -> bool:
        """Whether an error's value is absent, or may be a secret (`repr=False`)."""
        field = cls.model_fields.get(str(error["loc"][0])) if error["loc"] else None
        return error["type"] == "missing" or (field is not None and not field.repr)

    def anchored(self, folder: Path) -> Self:
        """Return the settings with relative paths that start at a folder."""
        paths = {k: folder / path for k, path in self if isinstance(path, Path)}
        return self.model_copy(update=paths)

    def to_json(self) -> str:
        """Return the canonical form, which is hashed and signed."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str, source: str) -> Self:
        """Read the canonical form back.

        Raises
        ------
        ConfigError
            If the text is not JSON, or holds anything wrong.
        """
        most = parsing.LONG_BYTES
        return cls.read(parsing.json_value(text, source, most=most), source)


def added(default: Any, **bounds: Any) -> Any:
    """Return a field that earlier releases did not have.

    At its default it is left out of the canonical form, so that every study from before
    keeps its text and hash.

    Parameters
    ----------
    bounds
        As for pydantic's `Field`.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **bounds)


def retired(value: str, instead: str) -> BeforeValidator:
    """Refuse a value that earlier releases knew, and say what to do instead.

    The key stays with the one value that is left: it is part of every study's hash.
    """

    def refuse(found: object) -> object:
        if found == value:
            raise ValueError(f'"{value}" was retired; {instead}')
        return found

    return BeforeValidator(refuse)


class _Shown(reprlib.Repr):
    """Values that were refused, for an error's text: short, printable, no password."""

    def repr_str(self, x: str, level: int) -> str:
        """Leave out what stands before an @, as the password in a proxy's address."""
        _, at, rest = x.rpartition("@")
        return super().repr_str(f"...@{rest}" if at else x, level)

    def repr_int(self, x: int, level: int) -> str:
        """Name only the size of what Python does not print."""
        if x.bit_length() > 512:
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_SHOWN = _Shown()
_SHOWN.maxstring = 60


def shown(value: object) -> str:
    """Return what was found instead of a value, in at most 80 characters."""
    return f"{_SHOWN.repr(value):.80}"


def _part(key: object) -> str:
    """Return a part of the path to a value, which another party may have named."""
    return repr(str(key))[1:-1][:80]
