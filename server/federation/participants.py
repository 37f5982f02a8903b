"""The participants of a run: simulated sites, or the hospitals of a contract.

A run depends on the protocol `Participants` only. `Simulated` implements it here,
`Deployment` in server/consortium/participants.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedgex.common.errors import FederationError
from fedgex.common.messages.fields import TrainingMetrics
from fedgex.common.messages.requests import Envelope, Own
from fedgex.common.study import Study
from fedgex.common.trust.receipt import Part, Receipt, brief
from fedgex.common.trust.signed import Signed
from fedgex.server.journal import Journal

MOST_BYTES = 1 << 34
"""Size of the longest reply of any type."""

State = Literal["contributed", "late", "failed", "refused", "quarantined"]


@dataclass(frozen=True, kw_only=True)
class SiteOutcome:
    """Outcome of a round or request for one site."""

    state: State
    reason: str | None = None
    """Code or cause, for every state but `contributed`; see `brief`."""
    metrics: TrainingMetrics | None = None
    """Metrics of a site that contributed to a round of training."""

    def __post_init__(self) -> None:
        """Cut a reason that is not fit for journal and receipt."""
        if self.reason is not None:
            object.__setattr__(self, "reason", brief(self.reason))

    @property
    def contributed(self) -> bool:
        """Whether the site's answer counts."""
        return self.state == "contributed"

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as written to journal and checkpoints."""
        numbers = {} if self.metrics is None else self.metrics.by_name()
        return {"state": self.state, "reason": self.reason, **numbers}


Outcomes = Mapping[str, SiteOutcome]
"""Outcomes by site."""
CONTRIBUTED = SiteOutcome(state="contributed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to several sites."""

    type: str
    message: Callable[[], Envelope]
    """Builds the shared content, for each try, so that a model is in memory once."""
    group: str
    """Name in Flower, journal and log."""
    phase: str = ""
    """Empty outside of rounds, and then `round` is 0."""
    round: int = 0
    own: Callable[[str], Own] | None = None
    """Builds the content for one site only."""
    most_bytes: int = MOST_BYTES
    """Size of the longest reply; of a longer one nothing is read."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Last activity of a node, in seconds since the epoch; None if never."""

    moved: float | None
    """Last byte or message in either direction."""
    idle: float | None
    """Last poll without a message for it."""


@dataclass(frozen=True, kw_only=True)
class SignedReply:
    """A site's signed part of one reply, verified."""

    part: Part
    text: str
    signature: str
    certificate: str


class Participants(Protocol):
    """The sites of a run, and how to address, verify and sign."""

    @property
    def study(self) -> Study:
        """Study of the run."""

    @property
    def contract_hash(self) -> str:
        """Hash of the contract; in a simulation, of the study."""

    @property
    def run(self) -> str:
        """Name of the run; empty in a simulation."""

    @property
    def expected(self) -> Collection[str]:
        """Names of the sites that are known in advance."""

    def invite(self, channel: Channel, deadline_s: float) -> Outcomes:
        """Wait for the sites, and return an outcome for each."""

    def admit(self, site: str, name: str) -> None:
        """Register the name that a site reports.

        Raises
        ------
        UpdateError
            If it may not have that name.
        FederationError
            If another site has it.
        """

    def nodes(self) -> Mapping[str, int]:
        """Return Flower's current number of each site's node."""

    def activity(self) -> Mapping[int, Activity]:
        """Return the activity by node; empty without a guard."""

    def barred(self) -> Mapping[str, str]:
        """Return the excluded sites, with reasons."""

    def envelope(self, site: str) -> Envelope:
        """Return the envelope of a message to this site."""

    def verify(
        self, site: str, request: Request, asked: str, reply: RecordDict
    ) -> SignedReply | None:
        """Verify and return the site's signed part; None if the reply needs none.

        Parameters
        ----------
        asked
            Digest of the request.

        Raises
        ------
        TrustError, UpdateError
            If the part is missing, untrusted, or about another request.
        """

    def sign(self, receipt: Receipt) -> Signed:
        """Return the receipt, signed where there is a coordinator."""

    def committed(self, receipt: Signed, replies: Mapping[str, SignedReply]) -> None:
        """Record a receipt that was stored, and the replies in it."""

    def resume(self, receipts: Sequence[Signed]) -> None:
        """Continue after these receipts.

        Raises
        ------
        TrustError
            If a signature does not hold.
        """


@dataclass(frozen=True, kw_only=True)
class Channel:
    """Connection to the sites of a run."""

    grid: Grid
    participants: Participants
    journal: Journal
    poll_s: float
    """Polling interval, seconds."""


@dataclass(kw_only=True)
class Simulated:
    """The sites of a simulation, without signatures and without a guard."""

    study: Study
    n_sites: int
    """Number of sites to wait for."""
    by_name: dict[str, int] = field(default_factory=dict)
    """Node of each site, also by a placeholder until the site reports its name."""
    expected: Collection[str] = ()
    run: str = ""

    @property
    def contract_hash(self) -> str:
        """Hash of the study."""
        return self.study.hash

    def invite(self, channel: Channel, deadline_s: float) -> Outcomes:
        """Wait for the sites' nodes."""
        end = time.monotonic() + deadline_s
        nodes = list(channel.grid.get_node_ids())
        while len(nodes) < self.n_sites and time.monotonic() < end:
            time.sleep(channel.poll_s)
            nodes = list(channel.grid.get_node_ids())
        unnamed = {f"node {node}": node for node in sorted(nodes)}
        self.by_name.update(unnamed)
        return dict.fromkeys(unnamed, CONTRIBUTED)

    def admit(self, site: str, name: str) -> None:
        """Register a node under the name that its site reports."""
        if name in self.by_name:
            raise FederationError(
                f'two nodes call themselves "{name}"; give each site its own name.'
            )
        self.by_name[name] = self.by_name[site]

    def nodes(self) -> Mapping[str, int]:
        """Return the node of each name."""
        return self.by_name

    def activity(self) -> Mapping[int, Activity]:
        """Return no activity."""
        return {}

    def barred(self) -> Mapping[str, str]:
        """Exclude no site."""
        return {}

    def envelope(self, site: str) -> Envelope:
        """Return an empty envelope."""
        return Envelope()

    def verify(
        self, site: str, request: Request, asked: str, reply: RecordDict
    ) -> SignedReply | None:
        """Return None."""
        return None

    def sign(self, receipt: Receipt) -> Signed:
        """Return the receipt without a signature."""
        return Signed(receipt.to_json())

    def committed(self, receipt: Signed, replies: Mapping[str, SignedReply]) -> None:
        """Do nothing."""

    def resume(self, receipts: Sequence[Signed]) -> None:
        """Do nothing."""
