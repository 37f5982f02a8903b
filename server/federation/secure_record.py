"""The server's stored record of one attempt at secure aggregation."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fedgex.common import keys
from fedgex.common.parsing import LONG_BYTES
from fedgex.common.secure_aggregation.protocol import Context
from fedgex.common.system.files import read_json, write_atomic
from fedgex.common.trust.receipt import Part
from fedgex.server.federation.participants import (
    Outcomes,
    Participants,
    Request,
    SignedReply,
    SiteOutcome,
)

FILE = "exchange.json"


@dataclass(frozen=True)
class Record:
    """Finished steps of an attempt with the sites' replies, and the lost sites."""

    folder: Path
    values: dict[str, Any]

    @classmethod
    def begin(cls, folder: Path, participants: Participants, request: Request) -> Self:
        """Resume the attempt of this round, or begin the next one."""
        path = folder / FILE
        if not path.exists():
            attempt, drawn = 1, f"simulated-{secrets.token_hex(8)}"
        else:
            before = cls(folder, read_json(path, "an exchange", most=LONG_BYTES))
            last = before.context
            drawn = last.run
            same = (last.phase, last.round) == (request.phase, request.round)
            if same and not before.values["over"]:
                return before
            attempt = last.attempt + 1 if same else 1
        context = Context(
            contract=participants.contract_hash,
            run=participants.run or drawn,
            phase=request.phase,
            round=request.round,
            attempt=attempt,
        )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = cls(folder, {"context": asdict(context), "over": False, "lost": {}})
        made.write()
        shutil.rmtree(folder / "masked", ignore_errors=True)
        return made

    @property
    def context(self) -> Context:
        """Protocol context of the attempt."""
        return Context(**self.values["context"])

    @property
    def lost(self) -> dict[str, SiteOutcome]:
        """Outcomes of the lost sites."""
        return {name: SiteOutcome(**each) for name, each in self.values["lost"].items()}

    def lose(self, lost: Outcomes) -> None:
        """Exclude sites from the next steps; written with the next step."""
        self.values["lost"] |= {name: each.to_json() for name, each in lost.items()}

    def end(self) -> None:
        """End the attempt, so that the round continues with a new one."""
        self.values["over"] = True
        self.write()

    def write(self) -> None:
        """Write the record to disk."""
        content = json.dumps(self.values, sort_keys=True)
        write_atomic(self.folder / FILE, content.encode())


def proof(signed: SignedReply | None) -> dict[str, str]:
    """Encode a signed reply for the record; empty in a simulation."""
    if signed is None:
        return {}
    return {
        keys.JSON: signed.text,
        keys.SIGNATURE: signed.signature,
        keys.CERTIFICATE: signed.certificate,
    }


def signed_reply(proof: Mapping[str, str]) -> SignedReply:
    """Decode a signed reply from the record."""
    return SignedReply(
        part=Part.from_json(proof[keys.JSON], "a site's part"),
        text=proof[keys.JSON],
        signature=proof[keys.SIGNATURE],
        certificate=proof[keys.CERTIFICATE],
    )
