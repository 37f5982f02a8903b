"""A site's stored state of one attempt at secure aggregation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedgex.common.parsing import LONG_BYTES
from fedgex.common.secure_aggregation.protocol import (
    Context,
    Group,
    PrivateKeys,
    PublicKeys,
    Shares,
)
from fedgex.common.system.files import read_json, write_atomic

FILE = "exchange.json"


@dataclass
class AttemptState:
    """State of one attempt; each step only adds to it."""

    context: Context
    private: PrivateKeys
    measured: NDArray[np.bool_]
    """Genes that this site measures, shape (V,)."""
    keys: dict[str, PublicKeys] = field(default_factory=dict)
    """Public keys of all participants; empty until known."""
    boxes: dict[str, bytes] = field(default_factory=dict)
    """Encrypted shares for each other participant."""
    shares: dict[str, Shares] = field(default_factory=dict)
    """Our shares of everybody's secrets, by owner."""
    sharers: tuple[str, ...] = ()
    """Sites whose masks our vector carries; empty until known."""
    sent: bool = False
    """Whether our vector was masked, and may have left."""
    survivors: tuple[str, ...] = ()
    """Sites whose vectors the server reports to have; empty until then."""
    revealed: bool = False
    """Whether shares may have left."""

    @property
    def public(self) -> PublicKeys:
        """Our public keys."""
        return self.private.public(self.measured)

    @property
    def group(self) -> Group:
        """All participants, once their keys are known."""
        return Group(self.context, self.keys)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what is on the disk; None if there is nothing."""
        path = folder / FILE
        if not path.exists():
            return None
        found = read_json(path, "an exchange", most=LONG_BYTES)
        private = {k: bytes.fromhex(v) for k, v in found["private"].items()}
        return cls(
            context=Context(**found["context"]),
            private=PrivateKeys(**private),
            measured=np.array(found["measured"], dtype=np.bool_),
            keys={
                name: PublicKeys(**{k: bytes.fromhex(v) for k, v in each.items()})
                for name, each in found["keys"].items()
            },
            boxes={k: bytes.fromhex(v) for k, v in found["boxes"].items()},
            shares={
                k: Shares.from_bytes(bytes.fromhex(v))
                for k, v in found["shares"].items()
            },
            sharers=tuple(found["sharers"]),
            sent=found["sent"],
            survivors=tuple(found["survivors"]),
            revealed=found["revealed"],
        )

    def write(self, folder: Path) -> None:
        """Write the state to the disk, readable by its owner only."""
        values = {
            "context": asdict(self.context),
            "private": _hex(asdict(self.private)),
            "measured": self.measured.astype(int).tolist(),
            "keys": {name: _hex(asdict(each)) for name, each in self.keys.items()},
            "boxes": _hex(self.boxes),
            "shares": {k: each.to_bytes().hex() for k, each in self.shares.items()},
            "sharers": self.sharers,
            "sent": self.sent,
            "survivors": self.survivors,
            "revealed": self.revealed,
        }
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(folder / FILE, json.dumps(values).encode())


def _hex(values: Mapping[str, bytes]) -> dict[str, str]:
    return {key: value.hex() for key, value in values.items()}
