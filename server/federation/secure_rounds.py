"""One round under secure aggregation: the server learns the sum of the updates only.

    keys -> shares -> train (masked) -> confirm -> unmask

The sites' replies are stored before the next step, so that a restarted server resumes
the same exchange: sites reveal shares only once. If an exchange fails before that, the
round continues with another attempt under new keys, and the sites mask the same update.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import RecordDict

from fedgex.common import keys
from fedgex.common.errors import FederationError, TrustError, UpdateError
from fedgex.common.messages.codec import boundary
from fedgex.common.messages.fields import (
    Attempt,
    Participant,
    Shared,
    Survived,
    TrainingMetrics,
)
from fedgex.common.messages.replies import (
    ConfirmReply,
    KeysReply,
    SharesReply,
    UnmaskReply,
)
from fedgex.common.messages.requests import (
    ConfirmRequest,
    Envelope,
    KeysRequest,
    Own,
    SharesRequest,
    TrainRequest,
)
from fedgex.common.secure_aggregation import protocol, shamir, vectors
from fedgex.common.secure_aggregation.protocol import Group
from fedgex.common.secure_aggregation.vectors import FixedPoint, Words
from fedgex.common.study import FEWEST_SUMMED, Study
from fedgex.common.system import failpoints
from fedgex.common.system.files import write_atomic
from fedgex.common.transport.records import packed
from fedgex.server.federation.aggregation import Array
from fedgex.server.federation.dispatch import Answer, request_all
from fedgex.server.federation.participants import (
    Channel,
    Outcomes,
    Request,
    SiteOutcome,
)
from fedgex.server.federation.rounds import RoundOutcome, Site, read_reply
from fedgex.server.federation.secure_record import Record, proof, signed_reply
from fedgex.server.federation.strategy import Spooled

logger = logging.getLogger(__name__)

ROUNDING = 1e-6
"""Relative tolerance on the norm of the sum."""

Shares = dict[str, int]
Parsed = TypeVar("Parsed")


class _RareGeneError(Exception):
    """The surviving sites would reveal a gene's update of one or two sites."""


def train_round(
    channel: Channel,
    sites: list[Site],
    request: Request,
    global_parameters: Mapping[str, Array],
    study: Study,
    *,
    absent: Outcomes,
    folder: Path,
) -> tuple[RoundOutcome, dict[str, Array]]:
    """Run one round; return its outcome, and the mean of the contributors' parameters.

    Parameters
    ----------
    request
        The message `train`, without the fields of secure aggregation.
    global_parameters
        Parameters at the start of the round.
    absent
        Outcomes of the sites that get no request.
    folder
        Folder of the exchange, kept until the next round begins.

    Raises
    ------
    FederationError
        If a step ends below the threshold or the quorum, or without a mandatory site.
    """
    lost: dict[str, SiteOutcome] = {}
    while True:
        record = Record.begin(folder, channel.participants, request)
        exchange = _Exchange(
            channel=channel,
            sites={site.name: site for site in sites if site.name not in lost},
            request=request,
            global_parameters=global_parameters,
            study=study,
            record=record,
            absent={**absent, **lost},
        )
        try:
            return exchange.conduct()
        except _RareGeneError:
            lost |= record.lost
            channel.journal.write(
                "exchange-repeated",
                group=request.group,
                attempt=record.context.attempt,
                without=sorted(lost),
            )


@dataclass(kw_only=True)
class _Exchange:
    """One attempt at a round."""

    channel: Channel
    sites: Mapping[str, Site]
    request: Request
    global_parameters: Mapping[str, Array]
    study: Study
    record: Record
    absent: Outcomes
    bytes_up: int = 0
    bytes_down: int = 0

    def conduct(self) -> tuple[RoundOutcome, dict[str, Array]]:
        """Run the steps that are not done yet."""
        started = time.monotonic()
        self.context, self.done = self.record.context, self.record.values
        asked = self._train_request()
        self._asked = {k: getattr(asked, k) for k in ("study", "vocabulary", "round")}
        self.n_genes = len(asked.vocabulary)
        self.size = sum(array.size for array in self.global_parameters.values())
        for name, step in (
            ("keys", self._keys),
            ("shares", self._shares),
            ("trained", self._train),
            ("tags", self._confirm),
        ):
            if name not in self.done:
                self.done[name] = step()
                self.record.write()
        total = self._sum()
        trained: dict[str, dict[str, Any]] = self.done["trained"]
        contributed = {
            name: SiteOutcome(
                state="contributed",
                metrics=TrainingMetrics.from_names(each["numbers"]),
            )
            for name, each in trained.items()
        }
        failpoints.reach("server.collected")
        outcome = RoundOutcome(
            updates=[],
            sites=dict(sorted({**self._missing(), **contributed}.items())),
            signed={
                name: signed_reply(each["sealed"])
                for name, each in trained.items()
                if each["sealed"]
            },
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            seconds=time.monotonic() - started,
        )
        return outcome, self._mean(total)

    # ---- the steps ----

    def _keys(self) -> dict[str, Any]:
        def parse(answer: Answer, content: RecordDict) -> dict[str, str]:
            advertised = KeysReply.from_records(content).advertised
            protocol.measured(advertised.public, self.n_genes)
            public = {k: v for k, v in advertised.encode().items() if k != keys.ATTEMPT}
            return public | proof(answer.signed)

        scale = self._train_request().standardisation
        request = KeysRequest(
            **self._asked, standardisation=scale, attempt=Attempt(**self._attempt)
        )
        found, lost = self._request_all(
            keys.SECURE_KEYS, self.sites, lambda: request, parse
        )
        times = Counter(
            each[part] for each in found.values() for part in ("channel", "mask")
        )
        for name, each in list(found.items()):
            if times[each["channel"]] + times[each["mask"]] > 2:
                reason = "it advertises a key that another site does too"
                lost[name] = SiteOutcome(state="quarantined", reason=reason)
                del found[name]
        self.record.lose(lost)
        self._require(found, FEWEST_SUMMED, "made keys")
        return found

    def _shares(self) -> dict[str, Any]:
        participants = self._participants()

        def parse(answer: Answer, content: RecordDict) -> dict[str, Any]:
            reply = SharesReply.from_records(content)
            if set(reply.boxes) != set(participants) - {answer.site}:
                raise UpdateError("its shares are not for the other participants")
            return {
                "boxes": {name: box.hex() for name, box in reply.boxes.items()},
                "commitment": reply.commitment.commitment,
            }

        request = SharesRequest(
            **self._asked, attempt=Attempt(**self._attempt), participants=participants
        )
        sites = list(participants)
        found, lost = self._request_all(
            keys.SECURE_SHARES, sites, lambda: request, parse
        )
        self.record.lose(lost)
        self._require(found, self._group().threshold, "shared their secrets")
        return found

    def _train(self) -> dict[str, Any]:
        shared: dict[str, Any] = self.done["shares"]

        def own(site: str) -> Own:
            boxes = {n: each["boxes"] for n, each in shared.items() if n != site}
            return Own(
                boxes={n: bytes.fromhex(each[site]) for n, each in boxes.items()}
            )

        def parse(answer: Answer, content: RecordDict) -> dict[str, Any]:
            reply = read_reply(answer, self.study)
            if reply.masked is None:
                raise UpdateError(f'the reply has no "{keys.MASKED}"')
            path = self._path(answer.site)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomic(path, packed(reply.masked))
            self._masked(answer.site)
            return {
                "numbers": reply.metrics.by_name(),
                "sealed": proof(answer.signed),
            }

        attempt = Shared(**self._attempt, sharers=tuple(sorted(shared)))

        def message() -> TrainRequest:
            return dataclasses.replace(self._train_request(), attempt=attempt)

        found, lost = self._request_all(keys.TRAIN, shared, message, parse, own=own)
        self.record.lose(lost)
        group = self._group()
        self._require(found, group.threshold, "sent masked updates")
        summed = group.counts(shared, self.n_genes) >= FEWEST_SUMMED
        left = group.counts(found, self.n_genes)
        if (summed & (left > 0) & (left < FEWEST_SUMMED)).any():
            self.record.end()
            raise _RareGeneError
        return found

    def _confirm(self) -> dict[str, Any]:
        survivors = self.done["trained"]

        def parse(answer: Answer, content: RecordDict) -> dict[str, str]:
            tags = ConfirmReply.from_records(content).confirmations
            if set(tags) != set(survivors) - {answer.site}:
                raise UpdateError("it does not confirm to the other survivors")
            return {name: tag.hex() for name, tag in tags.items()}

        request = ConfirmRequest(**self._asked, attempt=self._survived())
        sites = list(survivors)
        found, silent = self._request_all(
            keys.SECURE_CONFIRM, sites, lambda: request, parse
        )
        if len(found) < (least := self._group().threshold):
            self.record.end()
            raise self._too_few(found, least, "confirmed the list", silent)
        return found

    def _sum(self) -> Words:
        """Request the shares, and unmask the sum."""
        tags: dict[str, dict[str, str]] = self.done["tags"]
        sharers, survivors = self.done["shares"], self.done["trained"]
        gone = sorted(set(sharers) - set(survivors))

        def own(site: str) -> Own:
            own = {name: each[site] for name, each in tags.items() if name != site}
            return Own(confirmations={n: bytes.fromhex(t) for n, t in own.items()})

        def parse(answer: Answer, content: RecordDict) -> tuple[Shares, Shares]:
            reply = UnmaskReply.from_records(content)
            return _shares(reply.seeds, survivors), _shares(reply.masks, gone)

        group = self._group()
        request = ConfirmRequest(**self._asked, attempt=self._survived())
        found, silent = self._request_all(
            keys.SECURE_UNMASK, list(tags), lambda: request, parse, own=own
        )
        if len(found) < group.threshold:
            raise self._too_few(found, group.threshold, "gave out shares", silent)
        total = np.zeros(self.size, dtype=np.uint32)
        for name in survivors:
            total += self._masked(name)
        try:
            return protocol.unmasked(
                group,
                tuple(sharers),
                tuple(survivors),
                total,
                {
                    v: {u: seeds[v] for u, (seeds, _) in found.items()}
                    for v in survivors
                },
                {v: {u: masks[v] for u, (_, masks) in found.items()} for v in gone},
                {v: bytes.fromhex(sharers[v]["commitment"]) for v in survivors},
            )
        except (UpdateError, TrustError) as error:
            raise FederationError(f"{self.request.group}: {error}") from error

    def _mean(self, total: Words) -> dict[str, Array]:
        """Return the mean of the parameters from the unmasked sum."""
        survivors, group = list(self.done["trained"]), self._group()
        rule = self.study.secure_aggregation
        assert rule is not None
        fixed = FixedPoint(rule.clip, len(group.keys))
        weights = [vectors.weight(self.study.strategy, name) for name in survivors]
        summed = fixed.decode(total)
        rounding = len(survivors) * fixed.step * np.sqrt(total.size)
        longest = rule.clip * sum(weights) * (1 + ROUNDING) + rounding
        if float(np.linalg.norm(summed)) > longest:
            raise FederationError(
                f"{self.request.group}: the sum of the updates is longer than updates "
                f"no longer than {rule.clip:g} can make it, so one site or more did "
                "not send what it should. Which one cannot be seen under secure "
                "aggregation. Ask the hospitals for their logs, then begin a new run."
            )
        rows = [protocol.measured(group.keys[n], self.n_genes) for n in survivors]
        by_gene = self.study.strategy.per_gene
        return vectors.to_mean(
            summed, self.global_parameters, weights, rows if by_gene else None
        )

    # ---- what the steps share ----

    def _request_all(
        self,
        kind: str,
        sites: Collection[str],
        message: Callable[[], Envelope],
        parse: Callable[[Answer, RecordDict], Parsed],
        *,
        own: Callable[[str], Own] | None = None,
    ) -> tuple[dict[str, Parsed], dict[str, SiteOutcome]]:
        """Return the parsed replies, and the outcomes of the other sites."""
        request = dataclasses.replace(self.request, type=kind, message=message, own=own)
        found: dict[str, Parsed] = {}
        lost: dict[str, SiteOutcome] = {}
        for answer in request_all(
            self.channel,
            sorted(sites),
            request,
            deadline_s=self.study.rounds.deadline_s,
        ):
            name, outcome = answer.site, answer.outcome
            self.bytes_up += answer.bytes_up
            self.bytes_down += answer.bytes_down
            if answer.content is not None:
                try:
                    with boundary("the reply cannot be used: "):
                        found[name] = parse(answer, answer.content)
                    continue
                except UpdateError as error:
                    outcome = SiteOutcome(state="quarantined", reason=str(error))
                finally:
                    del answer  # before the next is fetched
            lost[name] = outcome
            where = self.request.group, kind, name, outcome.state, outcome.reason
            logger.warning("%s %s site=%s state=%s %s", *where)
        return found, lost

    def _train_request(self) -> TrainRequest:
        asked = self.request.message()
        assert isinstance(asked, TrainRequest)
        return asked

    @property
    def _attempt(self) -> dict[str, Any]:
        return {"attempt": self.context.attempt, "run": self.context.run}

    def _survived(self) -> Survived:
        return Survived(
            **self._attempt,
            sharers=tuple(sorted(self.done["shares"])),
            survivors=tuple(sorted(self.done["trained"])),
        )

    def _participants(self) -> dict[str, Participant]:
        found: dict[str, dict[str, str]] = self.done["keys"]
        return {name: Participant.decode(each) for name, each in found.items()}

    def _group(self) -> Group:
        public = {name: each.public for name, each in self._participants().items()}
        try:
            return Group(self.context, public)
        except TrustError as error:
            self.record.end()
            raise FederationError(f"{self.request.group}: {error}") from error

    def _path(self, name: str) -> Path:
        return self.record.folder / "masked" / f"{name}.safetensors"

    def _masked(self, name: str) -> Words:
        """Read and check a masked update."""
        arrays = Spooled(self._path(name))
        if set(arrays) != {keys.MASKED}:
            raise UpdateError(f'the masked update is not only "{keys.MASKED}"')
        words = np.asarray(arrays[keys.MASKED])
        if words.shape != (self.size,) or words.dtype != np.uint32:
            raise UpdateError(
                f"the masked update is {words.dtype} of shape {words.shape}, expected "
                f"uint32 of shape ({self.size},)"
            )
        return words.astype(np.uint32, copy=False)

    def _missing(self) -> dict[str, SiteOutcome]:
        """Return the outcomes of the sites that did not contribute."""
        late = SiteOutcome(state="failed", reason="was not there when keys were made")
        known = {*self.done.get("keys", self.sites), *self.done["lost"]}
        came = {name: late for name in self.sites if name not in known}
        return {**self.absent, **came, **self.record.lost}

    def _require(self, names: Collection[str], least: int, did: str) -> None:
        rule = self.study.rounds
        least = max(least, rule.quorum)
        if len(names) < least or set(rule.mandatory_sites) - set(names):
            self.record.end()
            raise self._too_few(names, least, did, self._missing())

    def _too_few(
        self, names: Collection[str], least: int, did: str, lost: Outcomes
    ) -> FederationError:
        missing = sorted(set(self.study.rounds.mandatory_sites) - set(names))
        others = "; ".join(
            f"{name}: {each.state} ({each.reason})"
            for name, each in sorted(lost.items())
        )
        return FederationError(
            f"{self.request.group}: {len(names)} of "
            f"{len({*self.sites, *self.absent})} sites {did}, secure aggregation needs "
            f"{least}"
            + (f", and mandatory {missing} did not" if missing else "")
            + f". {others}. Mend the sites, then resume from the last checkpoint."
        )


def _shares(found: Mapping[str, bytes], of: Collection[str]) -> Shares:
    """Decode the shares; they must be exactly those of the given sites."""
    if set(found) != set(of):
        raise UpdateError("the shares are not those that were asked for")
    return {name: shamir.share(content) for name, content in found.items()}
