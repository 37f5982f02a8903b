"""Admission control around the hospital's app (`client.app`), between hospitals.

A message reaches the app if a person approved its contract here, its content follows
the contract, and the policy is open now. Each reply is signed, stored and logged before
it leaves; a repeated request gets the stored bytes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedgex.client.admission.approvals import (
    ASKED,
    ApprovalStore,
    Refusal,
    require_pins,
)
from fedgex.client.admission.receipts import Receipts
from fedgex.client.admission.reply_cache import AnotherRequestError, Replies
from fedgex.client.identity import Identity, keep_revocations
from fedgex.client.ledger import debit
from fedgex.client.ledger.ledger import LedgerError
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.codes import Code
from fedgex.common.errors import MessageError, TrustError, UpdateError
from fedgex.common.messages.codec import boundary
from fedgex.common.messages.fields import (
    Decision,
    Hospital,
    LastReceipt,
    Run,
    SignedPart,
)
from fedgex.common.messages.replies import ContractReply, ReleaseReply, Reply, read_part
from fedgex.common.messages.replies import Refusal as RefusalReply
from fedgex.common.messages.requests import (
    REQUESTS,
    ContractRequest,
    Envelope,
    ReleaseRequest,
    SecureRequest,
    SharesRequest,
    StatisticsRequest,
    StudyRequest,
    TrainRequest,
    read_request,
)
from fedgex.common.settings import NAME_PATTERN
from fedgex.common.system import failpoints
from fedgex.common.system.files import disk_full, read_json, write_atomic
from fedgex.common.transport.records import to_arrays
from fedgex.common.trust import audit_log, bundle, pki
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.receipt import Part, reply_digest, request_digest
from fedgex.common.trust.signed import Signed

logger = logging.getLogger(__name__)

App = Callable[[Message, Context], Message]

STORED = (keys.STATISTICS, keys.CROSS_PRODUCTS, keys.TRAIN, *keys.SECURE)
"""Message types whose reply is cached and replayed; `prepare` is recomputed."""

KEPT = "kept"
"""Logged once a reply under differential privacy is stored and may leave."""

WORKING = "working.json"
"""File that names the computation under way, read by the daemon and after a crash."""

MAX_DEATHS = 3
"""A request that killed the process this often is refused."""


class Gate:
    """Handler of every message that reaches this hospital."""

    def __init__(self, site_toml: Path, app: App) -> None:
        """Load identity and audit log of the hospital of a site.toml.

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
        audit_log.verify(self.audit.path)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message; errors leave the hospital as a code."""
        about = _about(message)
        try:
            settings = SiteSettings.load(self.site_toml)
            reply = self._answer(message, context, settings, about)
        except Refusal as refusal:
            reply = self._refuse(message, about, refusal)
        except LedgerError as error:
            reply = self._refuse(message, about, Refusal(error.code, str(error)))
        except Exception as error:
            logger.exception("failed")
            unforeseen = Refusal(code(error), type(error).__name__)
            reply = self._refuse(message, about, unforeseen)
        return Message(reply, reply_to=message)

    def _answer(
        self,
        message: Message,
        context: Context,
        settings: SiteSettings,
        about: Mapping[str, Any],
    ) -> RecordDict:
        kind = message.metadata.message_type
        approvals = ApprovalStore.of(settings)
        try:
            request = read_request(kind, message.content)
        except MessageError as error:
            raise Refusal(Code.OUTSIDE_CONTRACT, str(error)) from error
        run = _run(request)
        self._same_log(request.receipt)
        if isinstance(request, ContractRequest):
            return self._logged(self._contract(request, settings).to_records(), about)
        contract = approvals.admitted(run.contract)
        receipts = Receipts(self.state_dir, run.run)
        receipts.keep(request.receipt, run, self.identity, self.audit)
        if isinstance(request, ReleaseRequest):
            return self._logged(self._release(request, run).to_records(), about)
        assert isinstance(request, StudyRequest)
        require_pins(contract)
        _same(kind, request, contract)
        approvals.admit_run(run.contract, run.run)
        sent = {}
        if isinstance(request, TrainRequest):
            sent = {"model": receipts.follow(request)}
        self._open_now(settings)
        private = contract.study.privacy.patient is not None
        if private:
            debit.ready(self.state_dir)
        question = f"{kind.removeprefix('query.')}-{_place(request)}"
        replies = Replies(self.state_dir / "replies" / run.run)
        try:
            stored = replies.find(question, request.digest) if kind in STORED else None
        except AnotherRequestError as error:
            raise Refusal(Code.ANSWERED_ALREADY, str(error)) from error
        if stored is not None:
            self.audit.append("replayed", **about)
            self._end()  # of a process that died once it had stored the reply
            return self._signed_now(stored, question, about, replies)
        if private:
            self._nothing_left(about)
        self._begin(request.digest)
        self.audit.append(ASKED, **about, **sent)
        failpoints.reach("site.before_train")
        reply: RecordDict = self.app(message, context).content
        failpoints.reach("site.after_train")
        approvals.admitted(run.contract)  # withdrawn meanwhile: nothing leaves
        reply = self._logged(reply, about)
        if kind in STORED and keys.REFUSAL not in reply:
            replies.store(question, request.digest, reply)
            if private:
                self.audit.append(KEPT, **about)
        self._end()
        failpoints.reach("site.before_send")
        return reply

    def _nothing_left(self, about: Mapping[str, Any]) -> None:
        """Refuse to recompute, under one debit, a reply that may have left."""
        for line in audit_log.events(self.audit.path, KEPT):
            if about.items() <= line.items():
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
        about: Mapping[str, Any],
        replies: Replies,
    ) -> RecordDict:
        """Return a stored reply, signed anew if the hospital's keys were replaced."""
        part = read_part(stored)
        ours = pki.to_pem(self.identity.certificate)
        if part is not None and part.certificate == ours:
            return stored
        stored.pop(keys.PART, None)
        stored = self._logged(stored, about)
        replies.store(question, str(about["request"]), stored)
        return stored

    def _contract(
        self, request: ContractRequest, settings: SiteSettings
    ) -> ContractReply:
        """Store a contract; reply with the approval, if there is one."""
        try:
            if request.revocations is not None:
                keep_revocations(self.state_dir, request.revocations.crl)
            signed = Signed.from_json(request.contract.json_, "the contract sent")
        except TrustError as error:
            raise Refusal(Code.UNTRUSTED, str(error)) from error
        approvals = ApprovalStore.of(settings)  # after the revocations were kept
        received = approvals.receive(signed)
        require_pins(received.contract)
        approvals.admitted(received.hash)  # so what is sent now is an approval
        if request.run is not None and request.run.run:
            approvals.admit_run(received.hash, request.run.run)
        decision = approvals.signed_decision(received.hash)
        return ContractReply(site=Decision(name=self.identity.name, decision=decision))

    def _release(self, request: ReleaseRequest, run: Run) -> ReleaseReply:
        """Verify a released model and store it for predictions."""
        name = f"{run.run}{bundle.SUFFIX}"
        try:
            sent = to_arrays(request.bundle)[keys.BUNDLE].tobytes()
            with tempfile.TemporaryDirectory(prefix="fedgex-") as temporary:
                arrived = Path(temporary) / name
                arrived.write_bytes(sent)
                release = bundle.verify(arrived, self.identity.authority).release
        except (TrustError, UpdateError) as error:
            raise Refusal(Code.RELEASE_UNVERIFIED, str(error)) from error
        if (release.contract, release.run) != (run.contract, run.run):
            raise Refusal(
                Code.RELEASE_UNVERIFIED, "the model sent is that of another run."
            )
        folder = self.state_dir / "models"
        folder.mkdir(exist_ok=True, mode=0o700)
        write_atomic(folder / name, sent, point="release")
        self.audit.append("model-received", run=run.run, bytes=len(sent))
        return ReleaseReply(site=Hospital(name=self.identity.name))

    def _same_log(self, last: LastReceipt | None) -> None:
        """Check that our log still holds its last line known to the server."""
        known = None if last is None else last.known
        if known is not None and not self.audit.contains(known):
            raise Refusal(
                Code.LOG_RESTORED,
                f"the server holds our signature over line {known.index} of the log, "
                "and our log does not have that line: it was cut, or restored from a "
                "backup. Nothing is answered. See docs/hospital-operation.md.",
            )

    def _open_now(self, settings: SiteSettings) -> None:
        if (self.state_dir / "paused").exists():
            raise Refusal(Code.PAUSED, "the operator paused this site.")
        if not settings.policy.open_at(datetime.now()):
            raise Refusal(
                Code.OUTSIDE_HOURS, f"policy.toml answers {settings.policy.hours} only."
            )

    def _logged(
        self, reply: RecordDict, about: Mapping[str, Any], **more: str
    ) -> RecordDict:
        """Log a reply, then sign its digest together with the log's head.

        Parameters
        ----------
        more
            What else is logged, and does not leave.
        """
        refused = keys.REFUSAL in reply
        code = RefusalReply.from_records(reply).refusal.code if refused else None
        metrics = reply.metric_records.get(keys.METRICS)
        patients = None if metrics is None else metrics.get(keys.NUM_EXAMPLES)
        signed_of = {
            "reply": reply_digest(reply),
            "patients": "suppressed" if patients is None else patients,
        }
        head = self.audit.append(
            "answered" if code is None else "refused",
            **about,
            **signed_of,
            **more,
            code=code,
            bytes=_size(reply),
        )
        part = Part.read(
            {
                **about,
                **signed_of,
                "site": self.identity.name,
                "head": {"index": head.index, "hash": head.hash},
            },
            "our part",
        ).to_json()
        signed = SignedPart(
            json_=part,
            signature=self.identity.sign(part.encode()),
            certificate=pki.to_pem(self.identity.certificate),
        )
        return RecordDict({**reply, **Reply(part=signed).to_records()})

    def _refuse(
        self, message: Message, about: Mapping[str, Any], refusal: Refusal
    ) -> RecordDict:
        """Log a refusal; sign it where the request names a run."""
        logger.warning("refused: %s", refusal)
        self._end()  # first: the log may be what cannot be written
        reply = RefusalReply.of(refusal.code).to_records()
        if about:
            return self._logged(reply, about, why=refusal.why)
        kind = message.metadata.message_type[:64]
        self.audit.append("refused", type=kind, code=refusal.code, why=refusal.why)
        return reply

    # ---- the computation under way, read by the daemon ----

    def _begin(self, request: str) -> None:
        """Record the request under way, unless it killed the process too often."""
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
    """Return the code of an unforeseen error; its text stays here."""
    return Code.DISK_FULL if disk_full(error) else Code.FAILED


def read_working(state_dir: Path) -> dict[str, object] | None:
    """Return the computation under way: request, deaths, pid, since (monotonic, s).

    If that process is dead, it died during this computation.
    """
    path = state_dir / WORKING
    return read_json(path, "the computation under way") if path.exists() else None


def stop_working(state_dir: Path, code: Code) -> None:
    """Have the request under way refused with a code when it is repeated."""
    found = read_working(state_dir)
    if found is not None:
        content = json.dumps(found | {"code": code}).encode()
        write_atomic(state_dir / WORKING, content)


def _about(message: Message) -> dict[str, Any]:
    """Return what a reply is about; empty if the request names no run and round."""
    kind, content = message.metadata.message_type, message.content
    codecs = TrainRequest.codecs()
    try:
        run = codecs["run"].read(content)
        ordered = keys.ROUND in content
        order = codecs["round"].read(content) if ordered else None
        with boundary():
            asked = request_digest(kind, content)
    except MessageError:
        return {}
    if kind not in REQUESTS or not _can_be(run):
        return {}
    return {
        "contract": run.contract,
        "run": run.run,
        "type": kind,
        "phase": "" if order is None else order.phase,
        "round": 0 if order is None else order.number,
        "request": asked,
    }


def _can_be(run: Run) -> bool:
    """Whether contract and run have names that can stand in the log."""
    named = not run.run or re.fullmatch(NAME_PATTERN, run.run)
    return bool(named and re.fullmatch("[0-9a-f]{64}", run.contract))


def _run(request: Envelope) -> Run:
    """Return the run of a request; only a contract may be of no run."""
    if request.run is None:
        raise Refusal(
            Code.UNKNOWN_RUN,
            "the message names no run and no contract; it does not come from "
            "fedgex-admin run launch.",
        )
    published = isinstance(request, ContractRequest) and not request.run.run
    if not published and not re.fullmatch(NAME_PATTERN, request.run.run):
        raise Refusal(Code.UNKNOWN_RUN, "the run's name cannot name a file.")
    return request.run


def _same(kind: str, request: StudyRequest, contract: Contract) -> None:
    """Refuse a request whose study, round or vocabulary is not the contract's."""
    study = contract.study
    if request.study.to_json() != study.to_json():
        raise Refusal(
            Code.OUTSIDE_CONTRACT, "the study of the message is not the contract's."
        )
    if isinstance(request, TrainRequest | SecureRequest):
        order, training = request.round, study.phases.get(request.round.phase)
        planned = training is not None and order.number <= training.rounds
        if study.secure_aggregation is None:  # then a round has one attempt
            planned = planned and request.attempt is None
        if not planned:
            place = f"{order.phase} {order.number}"
            raise Refusal(Code.OUTSIDE_CONTRACT, f"the contract has no {kind} {place}.")
    if isinstance(request, SharesRequest):
        strange = set(request.participants) - set(contract.sites)
        if strange:
            raise Refusal(
                Code.OUTSIDE_CONTRACT, f"the contract does not name {sorted(strange)}."
            )
    genes = sorted(study.vocabulary.genes)
    if isinstance(request, StatisticsRequest) and genes != [*request.vocabulary.genes]:
        raise Refusal(
            Code.OUTSIDE_CONTRACT, "the genes of the message are not the contract's."
        )


def _place(request: StudyRequest) -> str:
    """Return phase, number and attempt of a request, for a file's name."""
    if not isinstance(request, TrainRequest | SecureRequest):
        return "-00000"
    order, attempt = request.round, request.attempt
    more = "" if attempt is None else f".{attempt.attempt:03d}"
    return f"{order.phase}-{order.number:05d}{more}"


def _size(reply: RecordDict) -> int:
    return sum(
        len(array.data)
        for record in reply.array_records.values()
        for array in record.values()
    )
