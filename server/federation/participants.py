"""Who takes part in a run: the sites of a simulation, or a contract's hospitals.

`Simulated` is the first, `participants.Deployment` the second. Whatever conducts a run
is given one of them, and asks nowhere which.
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
from fedgex.common.trust.receipt import Part, Receipt
from fedgex.common.trust.signed import Signed
from fedgex.server.journal import Journal

State = Literal["contributed", "late", "failed", "refused", "quarantined"]


@dataclass(frozen=True, kw_only=True)
class SiteOutcome:
    """How a round, or a question, ended for one site."""

    state: State
    reason: str | None = None
    """Code or cause, for every state but `contributed`."""
    metrics: TrainingMetrics | None = None
    """Of a site that contributed to a round of training."""

    @property
    def contributed(self) -> bool:
        """Whether the site's answer counts."""
        return self.state == "contributed"

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as the journal and checkpoints hold it."""
        numbers = {} if self.metrics is None else self.metrics.by_name()
        return {"state": self.state, "reason": self.reason, **numbers}


Outcomes = Mapping[str, SiteOutcome]
"""Outcomes by site."""
CONTRIBUTED = SiteOutcome(state="contributed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The same question for several sites."""

    type: str
    message: Callable[[], Envelope]
    """Builds what every site is sent, anew for each try: a model is not kept twice."""
    group: str
    """Flower's group, and what the journal and the log call it."""
    phase: str = ""
    """Empty for a question that belongs to no round, and then `round` is 0."""
    round: int = 0
    own: Callable[[str], Own] | None = None
    """Makes what only one site is sent."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What the guard saw of a node, each in seconds since the epoch; None if never."""

    moved: float | None
    """Last byte or message in either direction."""
    idle: float | None
    """Last time that it asked for work and there was none."""


@dataclass(frozen=True, kw_only=True)
class SignedReply:
    """A site's signed part of one reply, verified."""

    part: Part
    text: str
    signature: str
    certificate: str


class Participants(Protocol):
    """The sites of a run, and what is known of them besides their answers."""

    @property
    def study(self) -> Study:
        """The study that they run."""

    @property
    def contract_hash(self) -> str:
        """Hash of the contract; in a simulation, of the study."""

    @property
    def run(self) -> str:
        """Name of the run; empty in a simulation."""

    @property
    def expected(self) -> Collection[str]:
        """Names of the sites that are known before they answer."""

    def invite(self, channel: Channel, deadline_s: float) -> Outcomes:
        """Return who can be asked, and why the others cannot."""

    def admit(self, site: str, name: str) -> None:
        """Take note of the name by which a site introduces itself.

        Raises
        ------
        UpdateError
            If it may not have that name.
        FederationError
            If another site has it.
        """

    def nodes(self) -> Mapping[str, int]:
        """Return Flower's number of each site's node, as of now."""

    def activity(self) -> Mapping[int, Activity]:
        """Return what moved, by node; empty where nobody looks."""

    def barred(self) -> Mapping[str, str]:
        """Return the sites that may not take part, and why."""

    def envelope(self, site: str) -> Envelope:
        """Return what a message to this site holds besides."""

    def verify(
        self, site: str, request: Request, asked: str, reply: RecordDict
    ) -> SignedReply | None:
        """Return the site's signed part; None where nobody signs.

        Parameters
        ----------
        asked
            Digest of what was asked.

        Raises
        ------
        TrustError, UpdateError
            If the part is missing, cannot be trusted, or is of another question.
        """

    def sign(self, receipt: Receipt) -> Signed:
        """Return the receipt, signed where there is a coordinator."""

    def committed(self, receipt: Signed, replies: Mapping[str, SignedReply]) -> None:
        """Take note of a receipt that is on the disk, and of the replies in it."""

    def resume(self, receipts: Sequence[Signed]) -> None:
        """Go on after these receipts.

        Raises
        ------
        TrustError
            If a signature does not hold.
        """


@dataclass(frozen=True, kw_only=True)
class Channel:
    """The way to the sites."""

    grid: Grid
    participants: Participants
    journal: Journal
    poll_s: float
    """Seconds between two looks for replies."""


@dataclass(kw_only=True)
class Simulated:
    """The sites of a simulation: nobody signs, and nobody watches their nodes."""

    study: Study
    n_sites: int
    """Sites to wait for."""
    by_name: dict[str, int] = field(default_factory=dict)
    """Node of each site; under a name of its own, until the site gives its name."""
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
        """Call a node by the name that its site gives."""
        if name in self.by_name:
            raise FederationError(
                f'two nodes call themselves "{name}"; give each site its own name.'
            )
        self.by_name[name] = self.by_name[site]

    def nodes(self) -> Mapping[str, int]:
        """Return the nodes by all their names."""
        return self.by_name

    def activity(self) -> Mapping[int, Activity]:
        """Return nothing."""
        return {}

    def barred(self) -> Mapping[str, str]:
        """Return nobody."""
        return {}

    def envelope(self, site: str) -> Envelope:
        """Add nothing."""
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
