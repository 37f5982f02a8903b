"""Verify receipts by themselves, against the hospital's log, and between hospitals.

Receipts may be missing honestly: one comes with the message of the next round, and a
hospital that was away then has none of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedgex.client.admission.approvals import ASKED
from fedgex.client.admission.receipts import RECEIVED, asked_of
from fedgex.client.identity import AUDIT, Identity
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.errors import TrustError
from fedgex.common.settings import Name, Settings
from fedgex.common.system import files
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.audit_log import Head
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.receipt import (
    Part,
    Receipt,
    SitePart,
    brief,
    verify_receipt,
)
from fedgex.common.trust.signed import Signed

MAX_BYTES = 1 << 30
"""Of a file of exported receipts: those of a hundred hospitals over 3000 rounds."""

Line = Mapping[str, Any]
Round = tuple[str, str, int]
"""Run, phase, and number in it."""


class Exported(Settings):
    """What `log export` writes: one hospital's receipts, of all runs."""

    format: Literal[1] = 1
    site: Name
    """Hospital that exported them."""
    receipts: tuple[Signed, ...]


@dataclass
class Checked:
    """What was found of a hospital's receipts and audit log."""

    head: Head
    """Of the audit log."""
    receipts: int = 0
    """Receipts that hold."""
    wrong: list[str] = field(default_factory=list)
    """What cannot be without a change or a forgery."""
    uncounted: list[str] = field(default_factory=list)
    """Answers that left and that no receipt counts."""


def check(settings: SiteSettings) -> Checked:
    """Verify audit log and receipts, and compare them.

    Each receipt must be signed, follow the one before, and hold of this hospital
    exactly what its log says that it answered, under a key that it had.

    Raises
    ------
    TrustError
        If a line of the log was changed, removed or reordered.
    ConfigError
        If the hospital has not joined.
    """
    path = settings.state_dir / AUDIT
    found = Checked(audit_log.verify(path))
    lines = audit_log.read(path)
    identity = Identity.load(settings.state_dir)
    known = {line["certificate"] for line in lines if line["event"] == "joined"}
    ours = _Ours(
        identity.name,
        identity,
        settings.state_dir / "contracts",
        lines,
        frozenset(known | {pki.fingerprint(identity.certificate)}),
        [line for line in lines if line["event"] == ASKED and "model" in line],
    )
    digests = {
        (line["run"], line["index"]): line["digest"]
        for line in lines
        if line["event"] == RECEIVED
    }
    by_round: dict[Round, tuple[str, Receipt]] = {}
    for run, held in _by_run(settings, found.wrong).items():
        before: list[tuple[str, Receipt]] = []
        for index, (name, signed) in sorted(held.items()):
            if digests.pop((run, index), signed.hash) != signed.hash:
                found.wrong.append(f"{name} is not the receipt that the log names")
            receipt = Receipt.read_signed(signed)
            by_round[run, receipt.phase, receipt.round] = name, receipt
            found.wrong += [f"{name} {each}" for each in ours.contradictions(receipt)]
            if before and index != before[-1][1].index + 1:
                before = []
            if not before and index > 1 and ours.contributed(receipt):
                found.wrong.append(
                    f"{name} counts an answer of ours, and the receipt before it, "
                    "which came with that request, is missing"
                )
            try:
                follows = before if before or index == 1 else None
                ours.verify(signed, receipt, follows)
            except TrustError as error:
                found.wrong.append(f"{name} does not hold: {error}")
            else:
                found.receipts += 1
            before.append((signed.hash, receipt))
    found.wrong += [
        f"receipts/{run}/{index:05d}.json is missing, and the log says that it came"
        for run, index in digests
    ]
    found.uncounted = ours.uncounted(by_round)
    return found


def export(settings: SiteSettings) -> Exported:
    """Return all receipts of a hospital, which hold nothing of a patient.

    Raises
    ------
    TrustError
        If a file is no receipt.
    """
    wrong: list[str] = []
    runs = _by_run(settings, wrong)
    if wrong:
        raise TrustError(f"{'; '.join(wrong)}. See fedgex-site log verify.")
    held = [signed for run in runs.values() for _, (_, signed) in sorted(run.items())]
    return Exported(site=settings.name, receipts=tuple(held))


def compare(settings: SiteSettings, path: Path) -> tuple[int, list[str]]:
    """Compare this hospital's receipts with those that another exported.

    Returns
    -------
    tuple
        How many were compared, and what the coordinator signed in two versions.

    Raises
    ------
    ConfigError
        If the file cannot be read.
    TrustError
        If the coordinator did not sign what the file holds.
    """
    theirs = Exported.read(
        files.read_json(path, "what log export wrote", most=MAX_BYTES), path.name
    )
    authority = Identity.load(settings.state_dir).authority
    own = _read(export(settings).receipts)
    other = _read(theirs.receipts)
    for (run, index), (signed, receipt) in other.items():
        if not signed.signers(authority, "coordinator", at=receipt.time):
            raise TrustError(
                f"{path.name}: receipt {index} of {run} bears no signature of our "
                "coordinator. Ask that hospital to export its receipts again."
            )
    compared, found = 0, []
    for (run, index), (signed, receipt) in sorted(other.items()):
        mine = own.get((run, index))
        if mine is not None:
            compared += 1
            if mine[0].content != signed.content:
                found.append(
                    f"receipt {index} of {run} is {mine[0].hash[:16]} here and "
                    f"{signed.hash[:16]} at {theirs.site}: the coordinator signed both"
                )
        for earlier, later in (
            (own.get((run, index - 1)), (signed, receipt)),
            ((signed, receipt), own.get((run, index + 1))),
        ):
            if earlier and later and later[1].previous != earlier[0].hash:
                found.append(
                    f"receipts {earlier[1].index} and {later[1].index} of {run}, one "
                    f"from here and one from {theirs.site}, do not follow each other"
                )
    return compared, found


@dataclass(frozen=True)
class _Ours:
    """What a hospital knows of itself."""

    name: str
    identity: Identity
    contracts: Path
    lines: Sequence[Line]
    keys: frozenset[str]
    """Fingerprints of all keys that it had."""
    asked: Sequence[Line]
    """Lines about models that it was sent."""

    def verify(
        self,
        signed: Signed,
        receipt: Receipt,
        before: Sequence[tuple[str, Receipt]] | None,
    ) -> None:
        """Verify a receipt, and that it follows those before it."""
        path = self.contracts / f"{receipt.contract}.json"
        if not path.exists():
            raise TrustError(f"its contract {receipt.contract[:16]} is not here.")
        contract = Contract.read_signed(Signed.from_json(path.read_bytes(), path.name))
        verify_receipt(
            signed,
            self.identity.authority,
            before,
            contract.site_keys,
            secure=contract.study.secure_aggregation is not None,
        )

    def contributed(self, receipt: Receipt) -> bool:
        entry = receipt.sites.get(self.name)
        return entry is not None and entry.state == "contributed"

    def contradictions(self, receipt: Receipt) -> list[str]:
        """Return where a receipt contradicts the log."""
        entry = receipt.sites.get(self.name)
        if entry is None:
            return ["does not name this hospital"]
        try:
            found = [] if entry.part is None else self._of_part(entry)
        except TrustError as error:
            found = [f"holds a part in our name that cannot be read: {error}"]
        for line in asked_of(receipt, self.asked):
            if receipt.model_sent not in (None, line["model"]):
                found.append(
                    f"names model {str(receipt.model_sent)[:16]}, and we were sent "
                    f"{line['model'][:16]}: hospitals were sent different ones"
                )
        return found

    def uncounted(self, receipts: Mapping[Round, tuple[str, Receipt]]) -> list[str]:
        """Return answers to training that no receipt counts, though it should."""
        answers: dict[Round, list[Line]] = defaultdict(list)
        for line in self.lines:
            if _trained(line):
                answers[line["run"], line["phase"], line["round"]].append(line)
        found = []
        for (run, phase, number), of_round in answers.items():
            where = f"{run}, {phase} {number}: we answered"
            name, receipt = receipts.get((run, phase, number), ("", None))
            if receipt is None:
                if self._went_on(run, of_round[-1]):
                    found.append(f"{where}, the run went on, and no receipt of it came")
                continue
            entry = receipt.sites.get(self.name)
            if entry is None or entry.state != "contributed":
                said = "nothing" if entry is None else entry.state
                reason = "" if entry is None else f" ({brief(entry.reason or '')})"
                found.append(f"{where}, and {name} says {said} of us{reason}")
            elif entry.update not in {line["reply"] for line in of_round}:
                found.append(f"{where}, and {name} counts another answer")
        return found

    def _of_part(self, entry: SitePart) -> list[str]:
        assert entry.part is not None
        assert entry.certificate is not None
        part = Part.from_json(entry.part, "our part")
        key = pki.fingerprint(pki.from_pem(entry.certificate))
        found = []
        if key not in self.keys:
            found.append(
                f"holds a part in our name under key {key[:16]}, which this hospital "
                "never had: who holds the authority's key forged it"
            )
        at = part.head.index
        line = self.lines[at - 1] if 0 < at <= len(self.lines) else {}
        if line.get("hash") != part.head.hash:
            return [
                *found,
                f"holds our signature over line {at} of the audit log, "
                f"and the log of {len(self.lines)} lines does not have that line: its "
                "end was cut, or it was restored from a backup",
            ]
        expected = part.model_dump(mode="json", exclude={"site", "head"})
        expected["event"] = "refused" if entry.state == "refused" else "answered"
        wrong = [
            f"{name} {value}, the log says {line.get(name)}"
            for name, value in expected.items()
            # Earlier releases did not log the number of patients.
            if line.get(name, value if name == "patients" else None) != value
        ]
        if wrong:
            found.append(
                "holds a part in our name that is not what line "
                f"{part.head.index} of the log says: {'; '.join(wrong)}"
            )
        return found

    def _went_on(self, run: str, answer: Line) -> bool:
        """Whether the run went on after an answer: a receipt or another round came."""
        place = answer["phase"], answer["round"]
        later = (x for x in self.lines[answer["n"] :] if x.get("run") == run)
        return any(
            line["event"] == RECEIVED
            or (_trained(line) and (line["phase"], line["round"]) != place)
            for line in later
        )


def _trained(line: Line) -> bool:
    return bool(line["event"] == "answered" and line["type"] == keys.TRAIN)


def _by_run(
    settings: SiteSettings, wrong: list[str]
) -> dict[str, dict[int, tuple[str, Signed]]]:
    """Return the receipts that are kept, by run and index, with their files' names."""
    held: dict[str, dict[int, tuple[str, Signed]]] = defaultdict(dict)
    for file in sorted((settings.state_dir / "receipts").glob("*/*.json")):
        run, name = file.parent.name, f"receipts/{file.parent.name}/{file.name}"
        try:
            signed = Signed.from_json(file.read_bytes(), name)
            receipt = Receipt.read_signed(signed)
            if (receipt.run, f"{receipt.index:05d}") != (run, file.stem):
                raise TrustError(f"it is receipt {receipt.index} of {receipt.run}")
        except TrustError as error:
            wrong.append(f"{name} does not hold: {error}")
            continue
        held[run][receipt.index] = name, signed
    return held


def _read(
    receipts: Iterable[Signed],
) -> dict[tuple[str, int], tuple[Signed, Receipt]]:
    read = ((signed, Receipt.read_signed(signed)) for signed in receipts)
    return {(receipt.run, receipt.index): (s, receipt) for s, receipt in read}
