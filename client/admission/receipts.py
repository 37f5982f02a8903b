"""The coordinator's receipts at a hospital, and what they say of the next message.

A receipt comes with the message of the next round and is kept under receipts/RUN. It
names the model that its round sent, and the one that the next round sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedgex.client.admission.approvals import ASKED, Refusal
from fedgex.client.identity import Identity
from fedgex.common.codes import Code
from fedgex.common.errors import TrustError
from fedgex.common.messages.fields import LastReceipt, Run
from fedgex.common.messages.requests import TrainRequest
from fedgex.common.study import Study
from fedgex.common.system.files import write_atomic
from fedgex.common.transport.records import to_arrays
from fedgex.common.trust.audit_log import Chain, events
from fedgex.common.trust.receipt import Receipt, parameters_digest
from fedgex.common.trust.signed import Signed

RECEIVED = "receipt"
"""Event of the audit log for a receipt that was kept."""
CONTRADICTED = "contradicted"
"""Event of the audit log for a receipt that names another model than we were sent."""


class Receipts:
    """Receipts of one run."""

    def __init__(self, state_dir: Path, run: str) -> None:
        self.run = run
        self.folder = state_dir / "receipts" / run

    def keep(
        self, last: LastReceipt | None, run: Run, identity: Identity, audit: Chain
    ) -> None:
        """Verify and store the receipt that a message brings.

        Raises
        ------
        Refusal
            `Code.UNTRUSTED` if the coordinator did not sign it, or signed another of
            the same index; `Code.OUTSIDE_CONTRACT` if it is of another run;
            `Code.ANOTHER_MODEL` if it, or an earlier one, names another model than we
            were sent: nothing more of that run is answered.
        """
        for line in events(audit.path, CONTRADICTED):
            if line["run"] == self.run:
                raise _another_model(line["index"], self.folder)
        if last is None or not last.json_:
            return
        try:
            signed = Signed.from_json(last.json_, "the receipt sent")
            receipt = Receipt.read_signed(signed)
            if not signed.signers(identity.authority, "coordinator", at=receipt.time):
                raise TrustError("the receipt sent bears no signature.")
        except TrustError as error:
            raise Refusal(Code.UNTRUSTED, str(error)) from error
        if (receipt.contract, receipt.run) != (run.contract, run.run):
            raise Refusal(Code.OUTSIDE_CONTRACT, "the receipt sent is of another run.")
        path = self._path(receipt.index)
        if path.exists():
            held = Signed.from_json(path.read_text(), path.name)
            if held.content != signed.content:
                raise Refusal(
                    Code.UNTRUSTED,
                    f"the coordinator signed two different receipts {receipt.index} of "
                    f"{run.run}: hospitals received different ones. Keep {path} and "
                    "the log.",
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(path, last.json_.encode())
            audit.append(RECEIVED, run=run.run, index=receipt.index, digest=signed.hash)
        asked = (line for line in events(audit.path, ASKED) if "model" in line)
        for line in asked_of(receipt, asked):
            if receipt.model_sent not in (None, line["model"]):
                audit.append(CONTRADICTED, run=self.run, index=receipt.index)
                raise _another_model(receipt.index, self.folder)

    def follow(self, request: TrainRequest) -> str:
        """Return the digest of the model sent, if the last receipt announced it.

        Raises
        ------
        Refusal
            `Code.ANOTHER_MODEL` if the receipt of the round before announced another
            model, or does not come though earlier ones did.
        """
        found = parameters_digest(to_arrays(request.model))
        index = place(request.study, request.round.phase, request.round.number)
        before = self._path(index - 1)
        if not before.exists():
            if index > 1 and any(self.folder.glob("*.json")):
                raise Refusal(
                    Code.ANOTHER_MODEL,
                    f"the message of round {index} of the run comes without the "
                    f"receipt of round {index - 1}.",
                )
            return found
        signed = Signed.from_json(before.read_text(), before.name)
        expected = Receipt.read_signed(signed).model_next
        if expected not in (None, found):
            raise Refusal(
                Code.ANOTHER_MODEL,
                f"the model sent has digest {found[:16]}, and receipt {index - 1} "
                f"announced {str(expected)[:16]}: hospitals were sent different "
                "models, or the server does not go on from its own. Keep the log.",
            )
        return found

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.json"


def _another_model(index: int, folder: Path) -> Refusal:
    return Refusal(
        Code.ANOTHER_MODEL,
        f"receipt {index} of the run names another model than we were sent: hospitals "
        f"received different ones. Nothing more of it is answered. Keep {folder} and "
        "the log.",
    )


def asked_of(receipt: Receipt, asked: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return those of the log's lines about models that are of a receipt's round."""
    of_round = {
        "run": receipt.run,
        "contract": receipt.contract,
        "phase": receipt.phase,
        "round": receipt.round,
    }
    return [line for line in asked if of_round.items() <= line.items()]


def place(study: Study, phase: str, number: int) -> int:
    """Return the number of a round in its run, over all phases; that of its receipt."""
    before = 0
    for name, training in study.phases.items():
        if name == phase:
            break
        before += training.rounds
    return before + number
