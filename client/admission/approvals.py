"""A hospital's decisions about study contracts, and the contracts that they admit.

No contract is admitted by default. A contract counts once its verification is logged. A
decision counts while the signed file and the last line of the audit log about the
contract agree; a withdrawal counts in either. So a file that was restored, changed or
written by hand admits nothing.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from fedgex.client.identity import AUDIT, Identity, described
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, FedgexError, TrustError
from fedgex.common.settings import Settings, added
from fedgex.common.system.files import write_atomic
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.pinning import PinError
from fedgex.common.trust.signed import Signed

logger = logging.getLogger(__name__)

Verdict = Literal["approved", "rejected", "withdrawn"]
"""Decisions of a person about a contract."""

HASH_PATTERN = re.compile(r"[0-9a-f]{64}")
RECEIVED, DECIDED, ASKED = "contract-received", "decision", "asked"
"""Events of the audit log; the last one before a computation, with the digest of a
model that was sent."""


class Refusal(FedgexError):  # noqa: N818, the word that hospitals read
    """The hospital refuses a request of a study; only `code` leaves the hospital."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code
        self.why = why


class Decision(Settings):
    """A person's decision about a contract, as the site signs it."""

    contract: str = Field(pattern=rf"^{HASH_PATTERN.pattern}$")
    """Hash of the contract's text."""
    decision: Verdict
    by: str = Field(min_length=1, pattern=r"\S")
    """Name of the person."""
    at: AwareDatetime
    """Time of the decision, UTC."""
    expires: date | None
    """Last day of an approval, UTC; null for the others."""
    reason: str = ""
    """Reason of a rejection or withdrawal; never leaves the hospital."""
    runs: int | None = added(None, ge=1, le=1000)
    """Runs of the contract that an approval permits, those before it included. None in
    decisions of fedgex 0.1.0, whose approvals are for any number."""

    @model_validator(mode="after")
    def _what_each_needs(self) -> Self:
        if (self.decision == "approved") != (self.expires is not None):
            raise ValueError("an approval has a last day, and nothing else has")
        if (self.decision == "approved") == bool(self.reason.strip()):
            raise ValueError(
                "a rejection or withdrawal needs a reason, and an approval has none"
            )
        if self.decision != "approved" and self.runs is not None:
            raise ValueError("an approval is for a number of runs, and nothing else is")
        return self


@dataclass(frozen=True)
class Received:
    """A received contract with valid signatures."""

    hash: str
    text: str
    """Signed TOML."""
    contract: Contract
    signers: tuple[str, ...]
    """Names of the administrators who signed."""


class ApprovalStore:
    """Store of received contracts and of the hospital's decisions about them."""

    def __init__(
        self, state_dir: Path, identity: Identity, audit: Chain, policy: Policy
    ) -> None:
        self._contracts = state_dir / "contracts"
        self._decisions = state_dir / "decisions"
        self._identity, self._audit, self._policy = identity, audit, policy

    @classmethod
    def of(cls, settings: SiteSettings) -> Self:
        """Open the store of a hospital that has joined.

        Raises
        ------
        ConfigError
            If it has not joined yet.
        TrustError
            If its key and certificate do not belong together.
        """
        state_dir = settings.state_dir
        audit = Chain(state_dir / AUDIT)
        return cls(state_dir, Identity.load(state_dir), audit, settings.policy)

    @property
    def administrators(self) -> str:
        """Whose signatures a contract needs here, in words."""
        return described(self._identity)

    def receive(self, signed: Signed) -> Received:
        """Verify a contract and keep it for a person to decide about.

        Raises
        ------
        Refusal
            `Code.UNTRUSTED` if a signature does not hold, is missing, or is not an
            administrator's, or if the text is no contract that names this hospital.
        """
        received = self._verify(signed, at=None)
        path = self._contracts / f"{signed.hash}.json"
        content = signed.to_json().encode()
        if self._received_at(signed.hash) and _bytes(path) == content:
            return received  # sent again, as at the start of each run
        self._contracts.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, content, point="contract")
        self._audit.append(
            RECEIVED, contract=signed.hash, signers=list(received.signers)
        )
        logger.info("contract=%s received; it awaits a decision", signed.hash[:16])
        return received

    def find(self, prefix: str) -> list[str]:
        """Return the hashes of the contracts here that begin with `prefix`."""
        hashes = sorted(path.stem for path in self._contracts.glob("*.json"))
        return [hash for hash in hashes if hash.startswith(prefix.lower())]

    def contracts(self) -> list[Received]:
        """Return every contract that can be read and trusted, in order of hash."""
        found = []
        for hash in self.find(""):
            try:
                found.append(self.contract(hash))
            except Refusal as refusal:  # one torn file does not hide the others
                logger.warning("contract=%s: %s", hash[:16], refusal.why)
        return found

    def contract(self, hash: str) -> Received:
        """Return a contract from the disk, verified as of when it was received.

        Raises
        ------
        Refusal
            `Code.NOT_APPROVED` if there is none, `Code.UNTRUSTED` if it was changed
            since.
        """
        path = self._contracts / f"{hash}.json"
        if not HASH_PATTERN.fullmatch(hash) or not path.exists():
            raise Refusal(
                Code.NOT_APPROVED,
                f"no contract with the hash {hash[:64]} was received here; expected "
                "one of those that fedgex-site study list shows.",
            )
        at = self._received_at(hash)
        if at is None:
            raise Refusal(
                Code.UNTRUSTED,
                f"contracts/{path.name} lies here, but the audit log does not say that "
                "it came from the consortium; remove the file, and find out who put "
                "it there.",
            )
        try:
            signed = Signed.from_json(path.read_text(encoding="utf-8"), path.name)
        except (TrustError, UnicodeDecodeError) as error:
            raise Refusal(
                Code.UNTRUSTED, f"{path.name} cannot be read: {error}"
            ) from error
        if signed.hash != hash:
            raise Refusal(
                Code.UNTRUSTED,
                f"the text of contract {hash[:16]} was changed: it hashes to "
                f"{signed.hash[:16]}. Find out who changed {path}; the server sends "
                "the contract again.",
            )
        return self._verify(signed, at)

    def decide(
        self,
        hash: str,
        decision: Verdict,
        *,
        by: str,
        expires: date | None = None,
        reason: str = "",
        runs: int | None = 1,
    ) -> Decision:
        """Sign, log and store a person's decision.

        The log is written first and the decision takes effect with its file, so an
        interrupted call admits nothing and can be repeated.

        Raises
        ------
        Refusal
            If the contract is unknown, changed or, to be approved, expired; or if it
            was withdrawn, which is final.
        ConfigError
            If `by`, `expires`, `reason` or `runs` cannot be what they are.
        TrustError
            If the hospital's own certificate does not hold now.
        """
        now = datetime.now(UTC).replace(microsecond=0)
        pki.verify(self._identity.certificate, self._identity.authority, "site", at=now)
        received = self.contract(hash)
        before = self.decision(hash)
        if before is not None and before.decision == "withdrawn":
            raise Refusal(Code.WITHDRAWN, _withdrawn(before))
        if decision == "approved":
            self._may_expire(received.contract, expires, now)
        elif (decision == "withdrawn") != (
            before is not None and before.decision == "approved"
        ):
            raise ConfigError(
                f"contract {hash[:16]} is {before.decision if before else 'undecided'}"
                "; withdraw takes back what was approved, reject declines what was "
                "not."
            )
        values = {
            "contract": hash,
            "decision": decision,
            "by": by.strip(),
            "at": now,
            "expires": expires,
            "reason": reason.strip(),
            "runs": runs if decision == "approved" else None,
        }
        made = Decision.read(values, "the decision")
        dumped = made.model_dump(mode="json")
        signed = Signed(made.to_json()).signed_by(
            self._identity.key, self._identity.certificate
        )
        self._audit.append(DECIDED, **dumped)
        self._decisions.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(
            self._decisions / f"{hash}.json",
            signed.to_json().encode(),
            point="decision",
        )
        return made

    def signed_decision(self, hash: str) -> str:
        """Return the stored decision, signed anew if our keys were replaced since."""
        path, ours = self._decisions / f"{hash}.json", self._identity
        signed = Signed.from_json(path.read_text(encoding="utf-8"), path.name)
        if [s.certificate for s in signed.signatures] != [pki.to_pem(ours.certificate)]:
            signed = Signed(signed.content).signed_by(ours.key, ours.certificate)
            write_atomic(path, signed.to_json().encode(), point="decision")
        return signed.to_json()

    def decision(self, hash: str) -> Decision | None:
        """Return the valid decision about a contract, None without one.

        File and audit log must agree; where they do not, only a withdrawal counts.
        """
        logged, on_file = self._logged(hash), self._on_file(hash)
        for each in (*logged, on_file):
            if each is not None and each.decision == "withdrawn":
                return each
        if on_file is not None and logged and on_file == logged[-1]:
            return on_file
        if on_file is not None or logged:
            logger.warning(
                "contract=%s: decision file and audit log differ; decide again",
                hash[:16],
            )
        return None

    def runs(self, hash: str) -> tuple[str, ...]:
        """Return the runs of a contract that used patients here, oldest first.

        A run that asked only who would take part used none, and does not count.
        """
        asked = [x for x in self._events(ASKED, hash) if x["type"] != keys.PREPARE]
        return tuple(dict.fromkeys(line["run"] for line in asked))

    def admit_run(self, hash: str, run: str) -> None:
        """Refuse a run of a contract beyond the number that a person approved.

        Raises
        ------
        Refusal
            `Code.RUNS_USED`. A run that goes on, or is resumed, counts once.
        """
        decision, begun = self.decision(hash), self.runs(hash)
        if decision is None or decision.runs is None or run in begun:
            return
        if len(begun) >= decision.runs:
            raise Refusal(
                Code.RUNS_USED,
                f"{decision.by} approved {runs_of(decision)} of contract {hash[:16]}, "
                f"and {len(begun)} began: {', '.join(begun)}. For another one, approve "
                f"it again with --runs {len(begun) + 1}.",
            )

    def admitted(self, hash: str) -> Contract:
        """Return the contract if it may run here now.

        Raises
        ------
        Refusal
            With a code and the reason.
        """
        contract = self.contract(hash).contract
        decision = self.decision(hash)
        short = hash[:16]
        if decision is None:
            raise Refusal(
                Code.NOT_APPROVED,
                f"nobody here has approved contract {short}; read it with fedgex-site "
                "study show, then approve or reject it.",
            )
        if decision.decision == "withdrawn":
            raise Refusal(Code.WITHDRAWN, _withdrawn(decision))
        if decision.expires is None:
            raise Refusal(
                Code.REJECTED,
                f"{decision.by} rejected contract {short} on "
                f"{decision.at:%Y-%m-%d}: {decision.reason}",
            )
        now = datetime.now(UTC)
        if contract.expired(now):
            raise Refusal(Code.EXPIRED, _expired_contract(contract))
        if now.date() > decision.expires:
            raise Refusal(
                Code.EXPIRED,
                f"the approval of contract {short} ended on {decision.expires}; to go "
                "on, approve it again.",
            )
        if not contract.supports(version("fedgex")):
            raise Refusal(Code.OUTSIDE_VERSIONS, _unsupported(contract))
        if against := self._policy.objections(contract.study):
            raise Refusal(Code.AGAINST_POLICY, " ".join(against))
        return contract

    def _verify(self, signed: Signed, at: datetime | None) -> Received:
        """Return a contract whose signatures held at that time; None is now."""
        name = f"contract {signed.hash[:16]}"
        try:
            signers = signed.signers(
                self._identity.authority,
                "administrator",
                at=at,
                revoked=self._identity.revoked,
            )
            if not signers:
                raise TrustError(
                    "it bears no signature; expected an administrator's. Ask the "
                    "coordinator to have it signed."
                )
            contract = Contract.read_signed(signed)
            signers = self._identity.counted(signed, contract.administrator_keys)
        except PinError as error:
            raise Refusal(Code.NOT_PINNED, f"{name}: {error}") from error
        except (TrustError, ConfigError) as error:
            raise Refusal(Code.UNTRUSTED, f"{name}: {error}") from error
        if self._identity.name not in contract.sites:
            raise Refusal(
                Code.UNTRUSTED,
                f"{name} is between {', '.join(contract.sites)}; expected "
                f"{self._identity.name} among them. Ask the coordinator why it was "
                "sent here.",
            )
        return Received(signed.hash, signed.content, contract, signers)

    def _may_expire(
        self, contract: Contract, expires: date | None, now: datetime
    ) -> None:
        if contract.expired(now):
            raise Refusal(Code.EXPIRED, _expired_contract(contract))
        if expires is None or not now.date() <= expires <= contract.expires:
            raise ConfigError(
                f"the approval would expire on {expires}; expected a day from "
                f"{now.date()} to {contract.expires}, when the contract expires."
            )

    def _received_at(self, hash: str) -> datetime | None:
        times = [line["time"] for line in self._events(RECEIVED, hash)]
        return datetime.fromisoformat(times[-1]) if times else None

    def _logged(self, hash: str) -> list[Decision]:
        """Return all decisions in the audit log, oldest first."""
        names = Decision.model_fields
        lines = self._events(DECIDED, hash)
        return [
            Decision.read({k: v for k, v in line.items() if k in names}, "audit.jsonl")
            for line in lines
        ]

    def _events(self, event: str, hash: str) -> list[dict[str, Any]]:
        try:
            lines = audit_log.events(self._audit.path, event)
        except TrustError as error:
            raise Refusal(Code.UNTRUSTED, str(error)) from error
        return [line for line in lines if line.get("contract") == hash]

    def _on_file(self, hash: str) -> Decision | None:
        """Return the stored decision, None if there is none that we signed."""
        path = self._decisions / f"{hash}.json"
        if (content := _bytes(path)) is None:
            return None
        try:
            signed = Signed.from_json(content.decode(), path.name)
            made = Decision.from_json(signed.content, path.name)
            signers = signed.signers(self._identity.authority, "site", at=made.at)
        except (TrustError, ConfigError, ValueError) as error:
            logger.warning("decisions/%s is not trusted: %s", path.name, error)
            return None
        if signers != (self._identity.name,) or made.contract != hash:
            logger.warning("decisions/%s is not this hospital's", path.name)
            return None
        return made


def runs_of(decision: Decision) -> str:
    """Return the number of runs of an approval, in words."""
    if decision.runs is None:
        return "any number of runs"
    return f"{decision.runs} run{'' if decision.runs == 1 else 's'}"


def require_pins(contract: Contract) -> None:
    """Refuse secure aggregation under a contract that pins no keys.

    Raises
    ------
    Refusal
        `Code.NOT_PINNED`.
    """
    if contract.study.secure_aggregation is not None and not contract.site_keys:
        raise Refusal(
            Code.NOT_PINNED,
            "the contract asks for secure aggregation and pins no keys, so that who "
            "holds the authority's key could play the other hospitals. Ask the "
            "coordinator for a new contract, which pins them.",
        )


def _expired_contract(contract: Contract) -> str:
    return (
        f"the contract expired on {contract.expires}; ask the coordinator for a new "
        "one, and check this machine's clock if that day is not past."
    )


def _withdrawn(decision: Decision) -> str:
    return (
        f"{decision.by} withdrew contract {decision.contract[:16]} on "
        f"{decision.at:%Y-%m-%d}, and that is final: {decision.reason}"
    )


def _unsupported(contract: Contract) -> str:
    return (
        f"fedgex {version('fedgex')} is installed, and the contract is for "
        f"{contract.code_version}; install a release of that, or ask the coordinator "
        "for a contract for yours."
    )


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
