"""The participants of a run between hospitals: certificates, nodes, signatures.

They are read from the consortium's state directory, anew at each use:

    contracts/HASH.json            the contract, signed by administrators
    contracts/HASH.answers.json    decision of each site about it
    (server/consortium/contracts.py) contracts/HASH/delivered.json  how far it came to
    each site nodes.json                     Flower's number of each site's node
    activity.json                  when each node last moved a byte, or was idle
    heads/SITE.json                last line of a site's audit log that a receipt holds
    releases/RUN.delivered.json    who has a released model
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedgex.common import codes, keys
from fedgex.common.errors import ConfigError, FederationError, TrustError, UpdateError
from fedgex.common.messages.fields import LastReceipt, Revocations, Run, SignedText
from fedgex.common.messages.replies import ContractReply, read_part
from fedgex.common.messages.requests import ContractRequest, Envelope, ReleaseRequest
from fedgex.common.models import checkpoint
from fedgex.common.study import Study
from fedgex.common.system.files import read_json, write_atomic
from fedgex.common.transport.records import to_record
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.receipt import Receipt, reply_digest, verify_chain, verify_part
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import contracts
from fedgex.server.consortium.store import Consortium
from fedgex.server.federation.dispatch import refusal_code, request_all
from fedgex.server.federation.participants import (
    Activity,
    Channel,
    Outcomes,
    Request,
    SignedReply,
    SiteOutcome,
)
from fedgex.server.journal import Journal
from fedgex.server.settings import ServerSettings

logger = logging.getLogger(__name__)

PUBLISHED_ONCE: frozenset[str] = frozenset()
"""While a contract is published, every refusal ends a site's request: no approval can
arrive meanwhile."""


@dataclass(kw_only=True)
class Deployment:
    """The hospitals of a contract; implements `Participants`."""

    consortium: Consortium
    signed: Signed
    contract: Contract
    run: str
    """Empty while a contract is published."""
    last_receipt: str = ""
    """The run's last receipt, JSON, which is part of every message."""

    @classmethod
    def load(cls, settings: ServerSettings) -> Self:
        """Open the contract that the settings name.

        Raises
        ------
        ConfigError
            If there is no such consortium or contract, or this fedgex is outside the
            contract's window.
        TrustError
            If the contract does not match its name or its signatures.
        FederationError
            If the contract expired.
        """
        assert settings.state_dir is not None, "settings of a simulation"
        consortium = Consortium(settings.state_dir)
        path = settings.state_dir / "contracts" / f"{settings.contract}.json"
        try:
            signed = Signed.from_json(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if signed.hash != settings.contract:
            raise TrustError(
                f"{path} hashes to {signed.hash[:16]}, expected "
                f"{settings.contract[:16]}: the contract was changed. Restore the file."
            )
        contract = Contract.read_signed(signed)
        if contract.expired():
            raise FederationError(
                f"contract {signed.hash[:16]} expired on {contract.expires}; have a "
                "new one signed, published and approved."
            )
        if not contract.supports(version("fedgex")):
            raise ConfigError(
                f"this server runs fedgex {version('fedgex')}, and contract "
                f"{signed.hash[:16]} is for {contract.code_version}; install fedgex "
                f"{contract.code_version}.x here, or have a contract for "
                f"{version('fedgex')} signed and approved."
            )
        return cls(
            consortium=consortium, signed=signed, contract=contract, run=settings.run
        )

    @property
    def study(self) -> Study:
        """The contract's study."""
        return self.contract.study

    @property
    def contract_hash(self) -> str:
        """The contract's hash."""
        return self.signed.hash

    @property
    def expected(self) -> Collection[str]:
        """The sites that the contract names."""
        return self.contract.sites

    def admit(self, site: str, name: str) -> None:
        """Refuse a site that reports another name than that of its node."""
        if name != site:
            raise UpdateError(
                f'it calls itself "{name}", and its node is that of "{site}"'
            )

    def nodes(self) -> Mapping[str, int]:
        """Return Flower's current number of each node, from nodes.json."""
        return _read(self.consortium.folder / "nodes.json")

    def activity(self) -> Mapping[int, Activity]:
        """Return the current activity of the nodes, from activity.json."""
        seen = _read(self.consortium.folder / "activity.json")
        return {int(node): Activity(**each) for node, each in seen.items()}

    def barred(self) -> Mapping[str, str]:
        """Return the contract's sites that are revoked or unknown."""
        known = self.consortium.sites()
        unknown = set(self.contract.sites) - set(known)
        revoked = {n for n, entry in known.items() if entry.state == "revoked"}
        return dict.fromkeys(revoked, "revoked") | dict.fromkeys(
            unknown, "not among the consortium's sites"
        )

    def envelope(self, site: str) -> Envelope:
        """Return contract, run, last receipt and the site's last known log head."""
        head = _read(self._head(site))
        known = f"{head['index']}:{head['hash']}" if head else ""
        return Envelope(
            run=Run(contract=self.signed.hash, run=self.run),
            receipt=LastReceipt(json_=self.last_receipt, head=known),
        )

    def verify(
        self, site: str, request: Request, asked: str, reply: RecordDict
    ) -> SignedReply | None:
        """Verify and return the site's signed part; None if the reply needs none.

        Replies about a contract or a release need none, and temporary refusals: for a
        contract the signed decision is stored instead. All else is signed under the
        site's registered certificate, refusals too.

        Raises
        ------
        TrustError, UpdateError
            If it is missing, untrusted, or of another site, run, round, request or
            reply.
        """
        code = refusal_code(reply)
        if request.type == keys.CONTRACT and code is None:
            self._keep_decision(site, reply)
        if request.type in (keys.CONTRACT, keys.RELEASE):
            return None
        found = read_part(reply)
        if found is None:
            if code in codes.TEMPORARY:
                return None
            what = "the reply" if code is None else f"the refusal {code}"
            raise TrustError(f'{what} is not signed: it has no "{keys.PART}"')
        certificate = self.consortium.site(site).certificate
        part = verify_part(
            found.json_,
            found.signature,
            certificate,
            self.consortium.authority,
            revoked=self.consortium.revoked(),
            pins=self.contract.site_keys,
        )
        expected = {
            "site": site,
            "contract": self.signed.hash,
            "run": self.run,
            "type": request.type,
            "phase": request.phase,
            "round": request.round,
            "request": asked,
            "reply": reply_digest(reply),
        }
        wrong = [
            f"signed for {key} {_short(getattr(part, key))}, this is {_short(value)}"
            for key, value in expected.items()
            if getattr(part, key) != value
        ]
        if wrong:
            raise TrustError("; ".join(wrong))
        return SignedReply(
            part=part,
            text=found.json_,
            signature=found.signature,
            certificate=certificate,
        )

    # ---- receipts ----

    def sign(self, receipt: Receipt) -> Signed:
        """Sign the receipt with the coordinator's key."""
        return Signed(receipt.to_json()).signed_by(
            self.consortium.coordinator_key, self.consortium.coordinator
        )

    def committed(self, receipt: Signed, replies: Mapping[str, SignedReply]) -> None:
        """Record a stored receipt, and the sites' log heads in it."""
        self.last_receipt = receipt.to_json()
        for site, reply in replies.items():
            facts = {
                **asdict(reply.part.head),
                "part": reply.text,
                "signature": reply.signature,
                "certificate": reply.certificate,
            }
            path = self._head(site)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomic(path, json.dumps(facts).encode())

    def resume(self, receipts: Sequence[Signed]) -> None:
        """Verify the chain of receipts, and continue with the last one."""
        secure = self.study.secure_aggregation is not None
        pins = self.contract.site_keys
        verify_chain(receipts, self.consortium.authority, pins, secure=secure)
        self.last_receipt = receipts[-1].to_json() if receipts else ""

    # ---- the contract ----

    def invite(
        self,
        channel: Channel,
        deadline_s: float,
        temporary: Collection[str] = codes.TEMPORARY,
    ) -> Outcomes:
        """Send the contract to its sites; store each reply as it arrives."""
        revoked = self.consortium.revocation_list
        offer = ContractRequest(
            contract=SignedText(json_=self.signed.to_json()),
            revocations=Revocations(crl=revoked) if revoked else None,
        )
        request = Request(
            type=keys.CONTRACT, message=lambda: offer, group=keys.CONTRACT
        )
        folder = self.consortium.folder / "contracts" / self.signed.hash
        return _collect(
            channel,
            self.contract.sites,
            request,
            folder / "delivered.json",
            deadline_s=deadline_s,
            temporary=temporary,
        )

    def _keep_decision(self, site: str, reply: RecordDict) -> None:
        """Verify and store a site's approval of a contract.

        Raises
        ------
        TrustError, UpdateError
            If it is missing, or of another site.
        """
        decision = ContractReply.from_records(reply).site.decision
        signed = Signed.from_json(decision, f"the decision of {site}")
        signer = contracts.record_answer(self.consortium, self.signed.hash, signed)
        if signer != site:
            raise TrustError(f"the decision is signed by {signer}, expected {site}")

    def _head(self, site: str) -> Path:
        return self.consortium.folder / "heads" / f"{site}.json"


def publish(grid: Grid, settings: ServerSettings) -> None:
    """Send a signed contract to its sites, without waiting for approvals.

    Raises
    ------
    ConfigError, TrustError, FederationError
        As for `Deployment.load`, or if no administrator signed the contract.
    """
    deployment = Deployment.load(settings)
    if not deployment.consortium.signers(deployment.signed):
        raise TrustError(
            f"contract {deployment.signed.hash[:16]} bears no administrator's "
            "signature; have it signed, then publish it."
        )
    channel = _channel(grid, deployment, settings)
    deployment.invite(channel, settings.start_deadline_s, PUBLISHED_ONCE)


def deliver(grid: Grid, settings: ServerSettings) -> None:
    """Send a released model to the sites of its contract, and record the deliveries.

    Raises
    ------
    ConfigError, TrustError, FederationError
        As for `Deployment.load`, or if the bundle cannot be read.
    """
    deployment = Deployment.load(settings)
    bundle = settings.bundle
    assert bundle is not None, "settings without a bundle are refused"
    try:
        content = np.fromfile(bundle, dtype=np.uint8)
    except OSError as error:
        raise ConfigError(f"{bundle} cannot be read: {error}") from error
    run = deployment.consortium.folder / "runs" / settings.run
    last = checkpoint.latest(run / "checkpoints")
    if last is not None and (last / "receipt.json").exists():
        deployment.last_receipt = (last / "receipt.json").read_text()
    request = Request(
        type=keys.RELEASE,
        message=lambda: ReleaseRequest(bundle=to_record({keys.BUNDLE: content})),
        group=keys.RELEASE,
    )
    folder = deployment.consortium.folder / "releases"
    _collect(
        _channel(grid, deployment, settings),
        deployment.contract.sites,
        request,
        folder / f"{settings.run}.delivered.json",
        deadline_s=settings.start_deadline_s,
        temporary=codes.TEMPORARY,
    )


def _channel(grid: Grid, deployment: Deployment, settings: ServerSettings) -> Channel:
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Channel(
        grid=grid,
        participants=deployment,
        journal=Journal(settings.run_dir / "journal.jsonl"),
        poll_s=settings.poll_s,
    )


def _collect(
    channel: Channel,
    sites: Collection[str],
    request: Request,
    path: Path,
    *,
    deadline_s: float,
    temporary: Collection[str],
) -> Outcomes:
    """Send a request to all sites, and store each outcome as it arrives."""
    outcomes: dict[str, SiteOutcome] = {}

    def keep() -> None:
        waiting = {site: {"state": "waiting", "reason": None} for site in sites}
        known = waiting | {site: each.to_json() for site, each in outcomes.items()}
        at = datetime.now(UTC).isoformat(timespec="seconds")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = json.dumps({"at": at, "sites": known}, indent=1, sort_keys=True)
        write_atomic(path, content.encode())

    keep()
    for answer in request_all(
        channel, sorted(sites), request, deadline_s=deadline_s, temporary=temporary
    ):
        outcomes[answer.site] = answer.outcome
        keep()
    return dict(sorted(outcomes.items()))


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is no file."""
    return read_json(path, "what this server wrote") if path.exists() else {}


def _short(value: object) -> object:
    """Shorten digests."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
