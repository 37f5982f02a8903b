"""A dishonest coordinator: it asks hospitals of a real alliance whatever it likes.

It names runs as it pleases, all of them under contracts that people approved.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from flwr.app import Message, RecordDict

from fedgex.common import keys
from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.moments import GeneMoments, Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.messages.fields import Run, Server
from fedgex.common.messages.replies import CrossProductsReply, StatisticsReply
from fedgex.common.messages.requests import REQUESTS
from fedgex.common.trust.contract import Contract

from .alliance import TODAY, Alliance, code


class Refused(Exception):  # noqa: N818, what the coordinator sees
    """A hospital answered with a code."""


@dataclass
class Coordinator:
    """Asks the hospitals of an alliance under one contract."""

    alliance: Alliance
    contract: str

    def __post_init__(self) -> None:
        signed = self.alliance.signed(self.contract)
        self.study = Contract.read_signed(signed).study
        self.vocabulary = Vocabulary(tuple(sorted(self.study.vocabulary.genes)))
        last = TODAY + timedelta(days=20)
        for name in self.alliance.names:  # as many runs as the coordinator names
            approvals = self.alliance.approvals(name)
            approvals.decide(
                self.contract, "approved", by="Dr. N.", expires=last, runs=None
            )

    def content(self, kind: str, run: str, **fields: Any) -> RecordDict:
        """Return a request of a type as an honest server would write it."""
        if kind != keys.PREPARE:
            fields = {"vocabulary": self.vocabulary, **fields}
        request = REQUESTS[kind](
            server=Server(version=version("fedgex")),
            run=Run(contract=self.contract, run=run),
            study=self.study,
            **fields,
        )
        return request.to_records()

    def send(self, site: str, kind: str, content: RecordDict) -> RecordDict:
        """Send any content to a hospital, whose process was just started.

        Raises
        ------
        Refused
            With the code.
        """
        grid = self.alliance.grid()
        message = Message(content, grid.nodes[site].number, kind)
        message.metadata.__dict__["_message_id"] = "message-1"
        reply: RecordDict = grid.ask(site, message).content
        if (refused := code(reply)) is not None:
            raise Refused(refused)
        return reply

    def ask(self, site: str, kind: str, run: str, **fields: Any) -> RecordDict:
        return self.send(site, kind, self.content(kind, run, **fields))

    def prepare(self, site: str, run: str) -> RecordDict:
        return self.ask(site, keys.PREPARE, run)

    def moments(self, site: str, run: str) -> GeneMoments:
        reply = self.ask(site, keys.STATISTICS, run)
        return StatisticsReply.from_records(reply).moments

    def products(
        self, site: str, run: str, scale: Standardisation
    ) -> dict[str, CrossProducts]:
        reply = self.ask(site, keys.CROSS_PRODUCTS, run, standardisation=scale)
        return dict(CrossProductsReply.from_records(reply).products)
