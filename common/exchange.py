"""What secure aggregation sends, as Flower's records and back."""

from __future__ import annotations

import json
from collections.abc import Mapping

from flwr.app import ConfigRecord

from fedgex.common import keys
from fedgex.common.errors import TrustError, UpdateError
from fedgex.common.records import text
from fedgex.common.secure_aggregation import PublicKeys


def keys_record(public: PublicKeys, attempt: int) -> ConfigRecord:
    """Return a site's public keys as it sends them, and as it signs them."""
    return ConfigRecord(
        {
            keys.ATTEMPT: attempt,
            keys.CHANNEL: public.channel.hex(),
            keys.MASK: public.mask.hex(),
            keys.MEASURED: public.measured.hex(),
        }
    )


def read_keys(record: ConfigRecord) -> PublicKeys:
    """Read what `keys_record` returned.

    Raises
    ------
    UpdateError
        If it is anything else.
    """
    channel, mask, measured = (
        _bytes(text(record, key)) for key in (keys.CHANNEL, keys.MASK, keys.MEASURED)
    )
    if len(channel) != 32 or len(mask) != 32:
        raise UpdateError("a public key is not of 32 bytes")
    return PublicKeys(channel=channel, mask=mask, measured=measured)


def to_hex(parts: Mapping[str, bytes]) -> ConfigRecord:
    """Return bytes by name as a record."""
    return ConfigRecord({name: part.hex() for name, part in parts.items()})


def from_hex(record: ConfigRecord) -> dict[str, bytes]:
    """Read what `to_hex` returned.

    Raises
    ------
    UpdateError
        If it is anything else.
    """
    return {name: _bytes(text(record, name)) for name in record}


def names(record: ConfigRecord, key: str) -> tuple[str, ...]:
    """Return a list of distinct sites, sorted.

    Raises
    ------
    UpdateError
        If it is none.
    """
    listed = record.get(key)
    if not isinstance(listed, list) or len(set(listed)) < len(listed):
        raise UpdateError(f'"{key}" is no list of distinct sites')
    return tuple(sorted(map(str, listed)))


def introduced(record: ConfigRecord) -> dict[str, dict[str, str]]:
    """Return the keys of each participant as the server sent them, and their signer.

    Raises
    ------
    TrustError
        If it is no such thing.
    """
    participants: dict[str, dict[str, str]] = {}
    for name in record:
        try:
            values = json.loads(text(record, name))
        except (ValueError, UpdateError) as error:
            raise TrustError(f"the keys of {name} are no JSON.") from error
        if not isinstance(values, dict):
            raise TrustError(f"the keys of {name} are no JSON object.")
        participants[name] = {key: str(value) for key, value in values.items()}
    return participants


def _bytes(content: str) -> bytes:
    try:
        return bytes.fromhex(content)
    except ValueError as error:
        raise UpdateError("what should be hexadecimal is not") from error
