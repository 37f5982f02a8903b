"""Make and verify the receipt of each round.

A receipt is stored with its parameters and holds the hash of the previous receipt.
Between hospitals it is signed by the coordinator and holds the sites' signed parts; in
the simulator it has the same form, without signatures.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from fedgex.common import federation
from fedgex.common.errors import CheckpointError
from fedgex.common.models import tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.trust.receipt import NO_RECEIPT, Receipt, SitePart, parameters_digest
from fedgex.common.trust.signed import Signed
from fedgex.server.federation.participants import Participants
from fedgex.server.federation.rounds import RoundOutcome


def make(
    last: Checkpoint,
    new: Checkpoint,
    outcome: RoundOutcome,
    participants: Participants,
    model_sent: str,
) -> Signed:
    """Make the receipt of the round between two checkpoints.

    Parameters
    ----------
    model_sent
        Digest of the model that the round's message held.
    """
    if last.receipt is None:
        index, previous = 1, NO_RECEIPT
        incoming = parameters_digest(last.parameters)
    else:
        signed = Signed.from_json(last.receipt, "the last receipt")
        before = Receipt.read_signed(signed)
        index, previous, incoming = before.index + 1, signed.hash, before.outgoing
    receipt = Receipt(
        contract=participants.contract_hash,
        run=participants.run or new.study.name,
        index=index,
        phase=new.phase,
        round=new.round,
        incoming=incoming,
        outgoing=parameters_digest(new.parameters),
        model_sent=model_sent,
        model_next=_model_next(new),
        sites={name: _entry(name, outcome) for name in outcome.sites},
        previous=previous,
        time=datetime.now(UTC),
    )
    return participants.sign(receipt)


def verify(checkpoints: Path, last: Checkpoint, participants: Participants) -> None:
    """Refuse to resume from a checkpoint with invalid receipts.

    Parameters
    ----------
    checkpoints
        Folder of the run's checkpoints.
    last
        Checkpoint to resume from.

    Raises
    ------
    CheckpointError
        If a receipt is missing, changed, or of another model.
    TrustError
        If a signature is invalid.
    """
    paths = sorted(checkpoints.glob("[0-9]*/receipt.json"))
    receipts = [Signed.from_json(path.read_bytes(), str(path)) for path in paths]
    participants.resume(receipts)
    read = [Receipt.read_signed(signed) for signed in receipts]
    hashes = [NO_RECEIPT, *(signed.hash for signed in receipts)]
    for path, receipt, previous in zip(paths, read, hashes, strict=False):
        if receipt.previous != previous:
            raise CheckpointError(
                f"{path} does not follow the receipt before it: one was changed or "
                "removed. Restore the run's folder from a copy."
            )
    for before, after in itertools.pairwise(read):
        if after.incoming != before.outgoing:
            raise CheckpointError(
                f"receipt {after.index} begins with other parameters than receipt "
                f"{before.index} ended with. Restore the run's folder from a copy."
            )
    if not last.round and not read:
        return
    if not read or read[-1].outgoing != parameters_digest(last.parameters):
        raise CheckpointError(
            f"the last checkpoint in {checkpoints} and its receipt are not of the same "
            "parameters, or the receipt is missing, as in runs of fedgex 0.1.0. "
            "Restore the run's folder from a copy, or begin a new run."
        )


def _model_next(new: Checkpoint) -> str | None:
    """Return the digest of the model that the next round's message holds."""
    study, phase = new.study, new.phase
    if new.round == study.phases[phase].rounds:
        order = list(study.phases)
        to_come = order[order.index(phase) + 1 :]
        phase = next((p for p in to_come if study.phases[p].rounds), "")
        if not phase or study.public.epochs:
            return None
    state = federation.begin_phase(study, phase, new.parameters, None)
    return parameters_digest(tasks.download_state(study, phase, state))


def _entry(name: str, outcome: RoundOutcome) -> SitePart:
    site, signed = outcome.sites[name], outcome.signed.get(name)
    facts: Mapping[str, object] = {}
    if signed is not None:
        facts = {
            "patients": signed.part.patients if site.contributed else None,
            "update": signed.part.reply,
            "part": signed.text,
            "signature": signed.signature,
            "certificate": signed.certificate,
        }
    elif site.metrics is not None:
        patients = site.metrics.num_examples
        facts = {"patients": "suppressed" if patients is None else patients}
    return SitePart.read(
        {"state": site.state, "reason": site.reason, **facts}, f"the part of {name}"
    )
