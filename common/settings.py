"""Base of all settings, as read from files and from messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedgex.common.canonical import canonical_json
from fedgex.common.errors import ConfigError

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
"""Of studies and sites, since both name files: lower-case letters, digits, hyphens."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""


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
            lines = [
                f"{source}: {'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}"
                + ("" if e["type"] == "missing" else f" (found {e['input']!r:.80})")
                for e in error.errors()
            ]
            raise ConfigError("\n".join(lines)) from error

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
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON: {error}") from error
        return cls.read(values, source)


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
