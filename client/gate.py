"""The gate of a hospital: what comes in, what goes out, and the record of both.

It stands around the app (`client.app`) that also runs in the simulator. A message
passes if a person approved its contract here, the message is what the contract says,
and the policy lets the site answer now. What was answered is signed, stored and logged
before it leaves, and sent again, byte for byte, to whoever asks the same again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedgex.client.decisions import Desk, Refusal
from fedgex.client.identity import Identity
from fedgex.client.ledger import debit
from fedgex.client.ledger.ledger import LedgerError
from fedgex.client.replies import AnotherRequestError, Replies
from fedgex.client.settings import SiteSettings
from fedgex.common import bundle, chain, failpoints, keys, pki
from fedgex.common.chain import Chain, Head
from fedgex.common.codes import Code
from fedgex.common.contract import Contract
from fedgex.common.errors import TrustError, UpdateError
from fedgex.common.files import disk_full, write_atomic
from fedgex.common.pki import Signed
from fedgex.common.receipt import Part, Receipt, reply_digest, request_digest
from fedgex.common.records import text, to_arrays
from fedgex.common.study import NAME_PATTERN

logger = logging.getLogger(__name__)

App = Callable[[Message, Context], Message]

STORED = (keys.STATISTICS, keys.CROSS_PRODUCTS, keys.TRAIN, *keys.SECURE)
"""Answered once. `prepare` says what is so now, and may say it again."""

KEPT = "kept"
"""Event: a reply under differential privacy is stored, and may leave from now on."""

WORKING = "working.json"
"""Says what is computed now, for the daemon and for who comes after a death."""

MAX_DEATHS = 3
"""A request during which the process died this often is refused."""


class Gate:
    """What the executor calls for every message."""

    def __init__(self, site_toml: Path, app: App) -> None:
        """Open the gate of the hospital of a site.toml.

        Raises
        ------
        ConfigError
            If settings or policy cannot be used, or the hospital has not joined.
        TrustError
            If the audit log was changed.
        """
        self.site_toml, self.app = site_toml, app
        settings = SiteSettings.load(site_toml)
        self.state_dir = settings.state_dir
        self.identity = Identity.load(self.state_dir)
        self.audit = Chain(self.state_dir / "audit.jsonl")
        chain.verify(self.audit.path)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message; whatever goes wrong leaves as a code."""
        try:
            settings = SiteSettings.load(self.site_toml)
            reply = self._answer(message, context, settings)
        except Refusal as refusal:
            reply = self._refuse(message, refusal)
        except LedgerError as error:
            reply = self._refuse(message, Refusal(error.code, str(error)))
        except Exception as error:
            logger.exception("failed")
            reply = self._refuse(message, Refusal(code(error), type(error).__name__))
        return Message(reply, reply_to=message)

    def _answer(
        self, message: Message, context: Context, settings: SiteSettings
    ) -> RecordDict:
        kind, content = message.metadata.message_type, message.content
        desk = Desk.of(settings)
        run, contract_hash = _run(kind, content)
        self._same_log(content)
        phase, number = _round(content)
        request = request_digest(kind, content)
        about = {
            "contract": contract_hash,
            "run": run,
            "type": kind,
            "phase": phase,
            "round": number,
            "request": request,
        }
        if kind == keys.CONTRACT:
            return self._logged(self._contract(content, desk), about)
        contract = desk.admitted(contract_hash)
        self._keep_receipt(content, contract_hash, run)
        if kind == keys.RELEASE:
            return self._logged(self._release(content, contract_hash, run), about)
        _same(kind, content, contract)
        self._open_now(settings)
        private = contract.study.privacy.patient is not None
        if private:
            debit.ready(self.state_dir)
        question = f"{kind.removeprefix('query.')}-{phase}-{_count(content, number)}"
        replies = Replies(self.state_dir / "replies" / run)
        try:
            stored = replies.find(question, request) if kind in STORED else None
        except AnotherRequestError as error:
            raise Refusal(Code.ANSWERED_ALREADY, str(error)) from error
        if stored is not None:
            self.audit.append("replayed", **about)
            self._end()  # of a process that died once it had stored the reply
            return self._signed_now(stored, question, about, replies)
        if private:
            self._nothing_left(about)
        self._begin(request)
        self.audit.append("asked", **about)
        failpoints.reach("site.before_train")
        reply: RecordDict = self.app(message, context).content
        failpoints.reach("site.after_train")
        desk.admitted(contract_hash)  # withdrawn meanwhile: nothing leaves
        reply = self._logged(reply, about)
        if kind in STORED and _code(reply) is None:
            replies.store(question, request, reply)
            if private:
                self.audit.append(KEPT, **about)
        self._end()
        failpoints.reach("site.before_send")
        return reply

    def _nothing_left(self, about: dict[str, object]) -> None:
        """Refuse to compute anew what was stored and may have left, under one debit."""
        for line in chain.read(self.audit.path):
            if line["event"] == KEPT and about.items() <= line.items():
                raise Refusal(
                    Code.ANSWERED_ALREADY,
                    f"the reply of {line['time'][:10]} to this is no longer there, and "
                    "it may have left; another one would spend privacy that was not "
                    "debited. Restore the folder replies/ if it was lost.",
                )

    def _signed_now(
        self,
        stored: RecordDict,
        question: str,
        about: dict[str, object],
        replies: Replies,
    ) -> RecordDict:
        """Return a stored reply, signed anew if the hospital's keys were replaced."""
        signed_by = text(stored.config_records[keys.PART], keys.CERTIFICATE)
        if signed_by == pki.to_pem(self.identity.certificate):
            return stored
        del stored[keys.PART]
        stored = self._logged(stored, about)
        replies.store(question, str(about["request"]), stored)
        return stored

    def _contract(self, content: RecordDict, desk: Desk) -> RecordDict:
        """Take a contract in, and say whether it may run here."""
        record = content.config_records[keys.SIGNED_CONTRACT]
        try:
            signed = Signed.from_json(text(record, keys.JSON), "the contract sent")
        except TrustError as error:
            raise Refusal(Code.UNTRUSTED, str(error)) from error
        received = desk.receive(signed)
        desk.admitted(received.hash)  # so what is sent now is an approval
        decision = self.state_dir / "decisions" / f"{received.hash}.json"
        site = ConfigRecord(
            {keys.NAME: self.identity.name, keys.DECISION: decision.read_text()}
        )
        return RecordDict({keys.SITE: site})

    def _release(self, content: RecordDict, contract: str, run: str) -> RecordDict:
        """Keep a released model for predictions, once all of it is verified."""
        name = f"{run}{bundle.SUFFIX}"
        try:
            sent = to_arrays(content.array_records[keys.BUNDLE])[keys.BUNDLE].tobytes()
            with tempfile.TemporaryDirectory(prefix="fedgex-") as temporary:
                arrived = Path(temporary) / name
                arrived.write_bytes(sent)
                release = bundle.verify(arrived, self.identity.authority).release
        except (TrustError, UpdateError) as error:
            raise Refusal(Code.RELEASE_UNVERIFIED, str(error)) from error
        if (release.contract, release.run) != (contract, run):
            raise Refusal(
                Code.RELEASE_UNVERIFIED, "the model sent is that of another run."
            )
        folder = self.state_dir / "models"
        folder.mkdir(exist_ok=True, mode=0o700)
        write_atomic(folder / name, sent, point="release")
        self.audit.append("model-received", run=run, bytes=len(sent))
        return RecordDict({keys.SITE: ConfigRecord({keys.NAME: self.identity.name})})

    def _same_log(self, content: RecordDict) -> None:
        """Compare our log with its last line that the server holds our signature of."""
        record = content.config_records.get(keys.RECEIPT)
        known = str(record.get(keys.HEAD, "")) if record is not None else ""
        if not known:
            return
        index, _, digest = known.partition(":")
        if not self.audit.contains(Head(int(index), digest)):
            raise Refusal(
                Code.LOG_RESTORED,
                f"the server holds our signature over line {index} of the audit log, "
                "and our log does not have that line: it was cut, or restored from a "
                "backup. Nothing is answered. See docs/hospital-operation.md.",
            )

    def _keep_receipt(self, content: RecordDict, contract: str, run: str) -> None:
        """Keep the coordinator's receipt of the round before, once verified."""
        record = content.config_records.get(keys.RECEIPT)
        sent = str(record.get(keys.JSON, "")) if record is not None else ""
        if not sent:
            return
        try:
            signed = Signed.from_json(sent, "the receipt sent")
            receipt = Receipt.read_signed(signed)
            if not signed.signers(
                self.identity.authority, "coordinator", at=receipt.time
            ):
                raise TrustError("the receipt sent bears no signature.")
        except TrustError as error:
            raise Refusal(Code.UNTRUSTED, str(error)) from error
        if (receipt.contract, receipt.run) != (contract, run):
            raise Refusal(Code.OUTSIDE_CONTRACT, "the receipt sent is of another run.")
        path = self.state_dir / "receipts" / run / f"{receipt.index:05d}.json"
        if path.exists():
            held = Signed.from_json(path.read_text(), path.name)
            if held.content == signed.content:
                return
            raise Refusal(
                Code.UNTRUSTED,
                f"the coordinator signed two different receipts {receipt.index} of "
                f"{run}: it told hospitals different things. Keep {path} and the log.",
            )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, sent.encode())
        self.audit.append("receipt", run=run, index=receipt.index, digest=signed.hash)

    def _open_now(self, settings: SiteSettings) -> None:
        if (self.state_dir / "paused").exists():
            raise Refusal(Code.PAUSED, "the operator paused this site.")
        if not settings.policy.open_at(datetime.now()):
            raise Refusal(
                Code.OUTSIDE_HOURS, f"policy.toml answers {settings.policy.hours} only."
            )

    def _logged(self, reply: RecordDict, about: dict[str, object]) -> RecordDict:
        """Write down that this goes out, and sign it with the log's head beside it."""
        code = _code(reply)
        head = self.audit.append(
            "answered" if code is None else "refused",
            **about,
            code=code,
            reply=reply_digest(reply),
            bytes=_size(reply),
        )
        metrics = reply.metric_records.get(keys.METRICS)
        patients = None if metrics is None else metrics.get(keys.NUM_EXAMPLES)
        part = Part.read(
            {
                **about,
                "site": self.identity.name,
                "reply": reply_digest(reply),
                "head": {"index": head.index, "hash": head.hash},
                "patients": "suppressed" if patients is None else patients,
            },
            "our part",
        ).to_json()
        reply[keys.PART] = ConfigRecord(
            {
                keys.JSON: part,
                keys.SIGNATURE: self.identity.sign(part.encode()),
                keys.CERTIFICATE: pki.to_pem(self.identity.certificate),
            }
        )
        return reply

    def _refuse(self, message: Message, refusal: Refusal) -> RecordDict:
        logger.warning("refused: %s", refusal)
        self._end()  # first: the log may be what cannot be written
        self.audit.append(
            "refused",
            type=message.metadata.message_type,
            code=refusal.code,
            why=refusal.why,
        )
        return RecordDict({keys.REFUSAL: ConfigRecord({keys.CODE: refusal.code})})

    # ---- what the daemon needs to know of a computation ----

    def _begin(self, request: str) -> None:
        """Note what is computed, unless it has killed this process too often."""
        path = self.state_dir / WORKING
        before = read_working(self.state_dir)
        deaths = 0
        if before is not None and before["request"] == request:
            if before.get("code"):
                path.unlink()
                raise Refusal(str(before["code"]), "the computation was stopped.")
            deaths = int(str(before["deaths"])) + 1
        if deaths >= MAX_DEATHS:
            path.unlink()
            raise Refusal(
                Code.FAILED, f"the process died {deaths} times over this request."
            )
        now = {
            "request": request,
            "deaths": deaths,
            "pid": os.getpid(),
            "since": time.monotonic(),
        }
        write_atomic(path, json.dumps(now).encode())

    def _end(self) -> None:
        (self.state_dir / WORKING).unlink(missing_ok=True)


def code(error: Exception) -> Code:
    """Return the code of something unforeseen, which says nothing of its text."""
    return Code.DISK_FULL if disk_full(error) else Code.FAILED


def read_working(state_dir: Path) -> dict[str, object] | None:
    """Return what the site computes now: request, deaths, pid, since (monotonic, s).

    The process may be dead; then it is what it died over.
    """
    try:
        found: dict[str, object] = json.loads((state_dir / WORKING).read_text())
    except FileNotFoundError:
        return None
    return found


def stop_working(state_dir: Path, code: Code) -> None:
    """Have the present request refused with a code when it is asked again."""
    found = read_working(state_dir)
    if found is not None:
        content = json.dumps(found | {"code": code}).encode()
        write_atomic(state_dir / WORKING, content)


def _run(kind: str, content: RecordDict) -> tuple[str, str]:
    """Return run and contract hash of a message; only a contract may be of no run."""
    record = content.config_records.get(keys.RUN)
    if record is None:
        raise Refusal(
            Code.UNKNOWN_RUN,
            "the message names no run and no contract; it does not come from "
            "fedgex-admin run launch.",
        )
    run = text(record, keys.RUN_NAME)
    published = kind == keys.CONTRACT and not run
    if not published and not re.fullmatch(NAME_PATTERN, run):
        raise Refusal(Code.UNKNOWN_RUN, "the run's name cannot name a file.")
    return run, text(record, keys.CONTRACT_HASH)


def _same(kind: str, content: RecordDict, contract: Contract) -> None:
    """Refuse a message whose study, round or vocabulary is not the contract's."""
    study = text(content.config_records[keys.STUDY], keys.JSON)
    if study != contract.study.to_json():
        raise Refusal(
            Code.OUTSIDE_CONTRACT,
            "the study of the message is not the contract's.",
        )
    phase, number = _round(content)
    training = contract.study.phases.get(phase)
    if kind in (keys.TRAIN, *keys.SECURE):
        planned = training is not None and 1 <= number <= training.rounds
        if contract.study.secure_aggregation is None:  # then a round has one attempt
            planned = planned and kind == keys.TRAIN and keys.EXCHANGE not in content
    else:  # asked once in a run, whatever a number would make of it
        planned = (phase, number) == ("", 0)
    if not planned:
        raise Refusal(
            Code.OUTSIDE_CONTRACT, f"the contract has no {kind} {phase} {number}."
        )
    participants = content.config_records.get(keys.PUBLIC_KEYS, ConfigRecord())
    if strange := set(participants) - set(contract.sites):
        raise Refusal(
            Code.OUTSIDE_CONTRACT, f"the contract does not name {sorted(strange)}."
        )
    vocabulary = content.config_records.get(keys.VOCABULARY)
    if vocabulary is None:
        return
    genes = vocabulary[keys.GENES]
    if sorted(contract.study.vocabulary.genes) != genes:
        raise Refusal(
            Code.OUTSIDE_CONTRACT,
            "the genes of the message are not the contract's.",
        )


def _round(content: RecordDict) -> tuple[str, int]:
    record = content.config_records.get(keys.ROUND)
    if record is None:
        return "", 0
    return text(record, keys.PHASE), int(str(record[keys.NUMBER]))


def _count(content: RecordDict, number: int) -> str:
    """Return a round's number for a file's name, with its attempt if it has one."""
    record = content.config_records.get(keys.EXCHANGE)
    if record is None:
        return f"{number:05d}"
    return f"{number:05d}.{int(str(record[keys.ATTEMPT])):03d}"


def _code(reply: RecordDict) -> str | None:
    refusal = reply.config_records.get(keys.REFUSAL)
    return None if refusal is None else text(refusal, keys.CODE)


def _size(reply: RecordDict) -> int:
    return sum(
        len(array.data)
        for record in reply.array_records.values()
        for array in record.values()
    )
