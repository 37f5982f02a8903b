"""How messages, their fields and records are written and read, and what is refused.

A message is a frozen dataclass whose fields are annotated with their record: its
`Codec`, or its name where the field is of `Fields`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, Self, TypeVar, get_args, get_type_hints

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ConfigDict, ValidationError

from fedgex.common import keys
from fedgex.common.errors import FederationError, FedgexError, MessageError
from fedgex.common.settings import NAME_PATTERN, Settings
from fedgex.common.transport.records import to_arrays, to_record

SHOWN = 300
"""Characters of an error's text that are kept: it may stand in every receipt."""

MAX_TEXT = 1 << 17
"""Characters of one text for, or of, one hospital."""

RENAMED = {"pre_training_loss": keys.PRE_TRAINING_LOSS}
"""Keys of fields that have another name on the wire."""

Record = ArrayRecord | ConfigRecord | MetricRecord
Value = TypeVar("Value")


@contextmanager
def boundary(what: str = "") -> Iterator[None]:
    """Turn whatever reading another party's content raises into `MessageError`.

    Only failures of this machine's disk, and of the federation, go through as they are.

    Parameters
    ----------
    what
        Stands before the error's text.
    """
    try:
        yield
    except Exception as error:
        passes = isinstance(error, OSError | FederationError)
        if passes or type(error) is FedgexError:
            raise
        ours = isinstance(error, FedgexError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        raise MessageError(f"{what}{text:.{SHOWN}}") from error


class Fields(Settings):
    """Base of a record of named values: strict types, absent values are None."""

    model_config = ConfigDict(
        strict=True,
        populate_by_name=True,
        alias_generator=lambda name: (
            RENAMED.get(name) or name.removesuffix("_").replace("_", "-")
        ),
    )

    KIND: ClassVar[type[Record]] = ConfigRecord
    """How Flower carries the values."""

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Return the keys that the record may hold."""
        return tuple(str(each.alias) for each in cls.model_fields.values())

    @classmethod
    def decode(cls, record: Mapping[str, Any]) -> Self:
        """Read a record.

        Raises
        ------
        MessageError
            If it lacks a key, has another one, or holds what cannot be used.
        """
        refuse_strange(record, cls.keys())
        try:
            return cls.model_validate(dict(record))
        except ValidationError as error:
            wrong = (
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
            )
            raise MessageError("; ".join(wrong)) from error

    def encode(self) -> dict[str, Any]:
        """Return the values that are there, by key."""
        values = self.model_dump(by_alias=True, exclude_none=True)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


FieldsType = type[Fields]


@dataclass(frozen=True)
class Codec(Generic[Value]):
    """How a value is written as a record of a message, and read from it."""

    record: str
    type: type[Record]
    keys: tuple[str, ...]
    """Keys, or arrays, of the record; empty where parameters or hospitals name them."""
    encode: Callable[[Value], Any]
    decode: Callable[[Any], Value]
    fields: FieldsType | None = None
    """Of a record of named values."""

    def read(self, content: RecordDict) -> Value:
        """Return the value.

        Raises
        ------
        MessageError
            If the record is missing, or another than it should be.
        """
        with boundary(f'"{self.record}": '):
            if self.record not in content:
                raise MessageError("it is missing")
            record = content[self.record]
            if type(record) is not self.type:
                raise MessageError(f"it is of type {type(record).__name__}")
            return self.decode(record)

    def write(self, value: Value) -> Record:
        """Return the record."""
        written = self.encode(value)
        return written if isinstance(written, self.type) else self.type(written)


def named_values(record: str, annotated: Any) -> Codec[Any]:
    """Return the codec of a field that is `Annotated[Fields, record]`, or optional."""
    hint = annotated.__origin__
    of: type[Fields] = next(iter(get_args(hint)), hint)
    return Codec(record, of.KIND, of.keys(), of.encode, of.decode, of)


def converted(
    record: str,
    of: type[Fields],
    encode: Callable[[Value], Fields],
    decode: Callable[[Any], Value],
) -> Codec[Value]:
    """Return the codec of a value that travels as other named values."""
    return Codec(
        record,
        ConfigRecord,
        of.keys(),
        lambda value: encode(value).encode(),
        lambda found: decode(of.decode(found)),
        of,
    )


def packed(record: str, *names: str) -> Codec[ArrayRecord]:
    """Return the codec of arrays that stay packed, see `records.to_arrays`."""
    return Codec(record, ArrayRecord, names, lambda value: value, lambda found: found)


def arrays(
    record: str,
    types: Mapping[str, str],
    encode: Callable[[Value], dict[str, NDArray[Any]]],
    decode: Callable[[dict[str, Any]], Value],
) -> Codec[Value]:
    """Return the codec of arrays of these names and types.

    Parameters
    ----------
    types
        Type by name. A name such as `GROUP/totals` stands for that of any group.
    """

    def read(record: ArrayRecord) -> Value:
        found = to_arrays(record)
        wanted = {name: types.get(name) or types.get(_any(name)) for name in found}
        refuse_strange(found, [name for name, kind in wanted.items() if kind])
        for name, kind in wanted.items():
            if found[name].dtype != kind:
                raise MessageError(f"{name} is {found[name].dtype}, expected {kind}")
        return decode(dict(found))

    return Codec(
        record, ArrayRecord, tuple(types), lambda value: to_record(encode(value)), read
    )


def by_hospital(
    record: str,
    encode: Callable[[Any], str],
    decode: Callable[[str], Value],
    most: int = 10_000,
) -> Codec[Mapping[str, Value]]:
    """Return the codec of one text a hospital."""

    def read(record: ConfigRecord) -> dict[str, Value]:
        if len(record) > most:
            raise MessageError(f"it names {len(record)} hospitals")
        wrong = [
            name
            for name, text in record.items()
            if not isinstance(text, str)
            or len(text) > MAX_TEXT
            or not re.fullmatch(NAME_PATTERN, name)
        ]
        if wrong:
            raise MessageError(f"it holds no text of a hospital in {shown(wrong)}")
        return {name: decode(str(text)) for name, text in record.items()}

    return Codec(
        record,
        ConfigRecord,
        (),
        lambda value: {name: encode(each) for name, each in value.items()},
        read,
    )


def refuse_strange(found: Collection[str], permitted: Collection[str]) -> None:
    """Refuse what may not be there, by name.

    Raises
    ------
    MessageError
        If anything is found that is not permitted.
    """
    if strange := set(found) - set(permitted):
        raise MessageError(f"it holds {shown(strange)}, which is not asked for")


def shown(names: Collection[str]) -> str:
    """Return names that another party chose, for the text of an error."""
    return ", ".join(repr(name[:64]) for name in sorted(names)[:5])


def _any(name: str) -> str:
    return f"GROUP/{name.rpartition('/')[2]}"


class Message:
    """Base of every message and reply."""

    @classmethod
    @cache
    def codecs(cls) -> dict[str, Codec[Any]]:
        """Return the codec of each field that stands in a record."""
        hints = get_type_hints(cls, include_extras=True)
        return {
            name: found if isinstance(found, Codec) else named_values(found, hint)
            for name, hint in hints.items()
            for found in getattr(hint, "__metadata__", ())
        }

    @classmethod
    def from_records(cls, content: RecordDict) -> Self:
        """Read what came from another party.

        Raises
        ------
        MessageError
            If a record or key is missing, is not one of this message, or holds what
            cannot be used.
        """
        with boundary():
            codecs = cls.codecs()
            refuse_strange(content, [codec.record for codec in codecs.values()])
            found = cls(
                **{
                    name: codec.read(content)
                    for name, codec in codecs.items()
                    if codec.record in content or not hasattr(cls, name)
                }
            )
            found.check()
            return found

    def to_records(self) -> RecordDict:
        """Return the message as Flower carries it; fields that are None stay out."""
        return RecordDict(
            {
                codec.record: codec.write(getattr(self, name))
                for name, codec in self.codecs().items()
                if getattr(self, name) is not None
            }
        )

    def check(self) -> None:
        """Refuse fields that contradict each other."""
