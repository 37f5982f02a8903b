"""One round under secure aggregation: the server learns the sum of the updates alone.

    keys -> shares -> train (masked) -> confirm -> unmask

Everything that the sites answered is on the disk before the next question, in the
folder of the exchange, so that a server that was killed goes on with the very exchange:
the sites give out shares once. A round whose exchange failed before that is tried again
as another attempt, under new keys; the sites mask the update that they have.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedgex.common import exchange, failpoints, keys
from fedgex.common import secure_aggregation as protocol
from fedgex.common.errors import FederationError, TrustError, UpdateError
from fedgex.common.files import write_atomic
from fedgex.common.receipt import Part
from fedgex.common.records import packed, text
from fedgex.common.secure_aggregation import (
    Context,
    FixedPoint,
    Group,
    PublicKeys,
    Words,
)
from fedgex.common.study import FEWEST_SUMMED, Study
from fedgex.server.aggregation import Array
from fedgex.server.asking import Answer, Line, Request, Sealed, ask
from fedgex.server.rounds import (
    RoundOutcome,
    Site,
    read_numbers,
    require_signed_count,
)
from fedgex.server.strategy import Spooled

logger = logging.getLogger(__name__)

FILE = "exchange.json"
ROUNDING = 1e-6
"""Share by which the sum may be longer than its bound."""

Own = Callable[[str], Mapping[str, ConfigRecord]]
Numbers = dict[str, int]
Lost = dict[str, dict[str, Any]]
"""State and reason of each site that is not heard of any more."""
Parsed = TypeVar("Parsed")


class _RareGeneError(Exception):
    """Whoever is left would show the update of one or two sites for a gene."""


def train_round(
    line: Line,
    sites: list[Site],
    request: Request,
    incoming: Mapping[str, Array],
    study: Study,
    *,
    absent: Mapping[str, Mapping[str, Any]],
    folder: Path,
    contract: str,
    run: str,
) -> tuple[RoundOutcome, dict[str, Array]]:
    """Run one round; return who contributed, and the mean of their parameters.

    Parameters
    ----------
    request
        The message `train`, without what secure aggregation adds to it.
    incoming
        Parameters that the sites' changes are of.
    absent
        State and reason of the sites that are not asked at all.
    folder
        Where the exchange lies, from the first question of a round until the next
        round begins.
    contract
        Its hash; in a simulation, the study's.
    run
        Its name; in a simulation empty, and one is drawn.

    Raises
    ------
    FederationError
        If fewer sites than the threshold or the quorum, or not all mandatory ones,
        came to the end of a step. Nothing is aggregated in any other way.
    """
    lost: Lost = {}
    while True:
        context = _begin(folder, contract, run, request)
        round_ = _Exchange(
            line=line,
            sites={site.name: site for site in sites if site.name not in lost},
            request=request,
            incoming=incoming,
            study=study,
            folder=folder,
            context=context,
            absent={name: dict(state) for name, state in absent.items()} | lost,
        )
        try:
            return round_.conduct()
        except _RareGeneError:
            lost |= round_.record["lost"]
            line.journal.write(
                "exchange-repeated",
                group=request.group,
                attempt=context.attempt,
                without=sorted(lost),
            )


def _begin(folder: Path, contract: str, run: str, request: Request) -> Context:
    """Go on with the exchange of this round, or begin its next attempt."""
    before = _read(folder)
    if before is None:
        attempt, drawn = 1, f"simulated-{secrets.token_hex(8)}"
    else:
        last = Context(**before["context"])
        drawn = last.run
        same = (last.phase, last.round) == (request.phase, request.round)
        if same and not before["over"]:
            return last
        attempt = last.attempt + 1 if same else 1
    context = Context(
        contract=contract,
        run=run or drawn,
        phase=request.phase,
        round=request.round,
        attempt=attempt,
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(folder, {"context": asdict(context), "over": False, "lost": {}})
    shutil.rmtree(folder / "masked", ignore_errors=True)
    return context


@dataclass(kw_only=True)
class _Exchange:
    """One attempt. What `record` holds is on the disk."""

    line: Line
    sites: Mapping[str, Site]
    request: Request
    incoming: Mapping[str, Array]
    study: Study
    folder: Path
    context: Context
    absent: Mapping[str, dict[str, Any]]
    record: dict[str, Any] = field(init=False)
    """Steps that are done: keys, shares, trained, tags; and who was lost, and why."""
    bytes_up: int = 0
    bytes_down: int = 0

    def conduct(self) -> tuple[RoundOutcome, dict[str, Array]]:
        """Take every step that is not done yet."""
        started = time.monotonic()
        found = _read(self.folder)
        assert found is not None, "an attempt begins on the disk"
        self.record = found
        sent = self.request.content()
        self.base = {k: sent[k] for k in (keys.STUDY, keys.VOCABULARY, keys.ROUND)}
        self.n_genes = len(next(iter(self.sites.values())).measured)
        self.size = sum(array.size for array in self.incoming.values())
        for name, step in (
            ("keys", self._keys),
            ("shares", self._shares),
            ("trained", self._train),
            ("tags", self._confirm),
        ):
            if name not in self.record:
                self.record[name] = step()
                _write(self.folder, self.record)
        total = self._sum()
        trained: dict[str, dict[str, Any]] = self.record["trained"]
        contributed = {
            name: {"state": "contributed", "reason": None, **each["numbers"]}
            for name, each in trained.items()
        }
        failpoints.reach("server.collected")
        outcome = RoundOutcome(
            updates=[],
            sites=dict(sorted({**self._missing(), **contributed}.items())),
            sealed={
                name: _sealed(each["sealed"])
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
            record = content.config_records[keys.PUBLIC_KEYS]
            protocol.measured(exchange.read_keys(record), self.n_genes)
            told = (keys.CHANNEL, keys.MASK, keys.MEASURED)
            return {key: text(record, key) for key in told} | _proof(answer.sealed)

        found = self._ask(keys.SECURE_KEYS, self.sites, parse)
        self._require(found, FEWEST_SUMMED, "made keys")
        return found

    def _shares(self) -> dict[str, Any]:
        told = {name: json.dumps(each) for name, each in self.record["keys"].items()}

        def parse(answer: Answer, content: RecordDict) -> dict[str, Any]:
            boxes = exchange.from_hex(content.config_records[keys.BOXES])
            if set(boxes) != set(told) - {answer.site}:
                raise UpdateError("its shares are not for the other participants")
            record = content.config_records[keys.EXCHANGE]
            return {
                "boxes": {name: box.hex() for name, box in boxes.items()},
                "commitment": text(record, keys.COMMITMENT),
            }

        content = {keys.PUBLIC_KEYS: ConfigRecord(dict(told))}
        found = self._ask(keys.SECURE_SHARES, told, parse, content)
        self._require(found, self._group().threshold, "shared their secrets")
        return found

    def _train(self) -> dict[str, Any]:
        shared: dict[str, Any] = self.record["shares"]

        def boxes(site: str) -> Mapping[str, ConfigRecord]:
            own = {
                name: each["boxes"][site]
                for name, each in shared.items()
                if name != site
            }
            return {keys.BOXES: ConfigRecord(dict(own))}

        def parse(answer: Answer, content: RecordDict) -> dict[str, Any]:
            path = self._path(answer.site)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomic(path, packed(content.array_records[keys.MASKED]))
            self._masked(answer.site)
            numbers = read_numbers(content, self.study)
            require_signed_count(answer.sealed, numbers["num_examples"])
            return {"numbers": numbers, "sealed": _proof(answer.sealed)}

        told = self._told({keys.SHARERS: sorted(shared)})
        found = self._ask(keys.TRAIN, shared, parse, told, own=boxes, model=True)
        group = self._group()
        self._require(found, group.threshold, "sent masked updates")
        summed = group.counts(shared, self.n_genes) >= FEWEST_SUMMED
        left = group.counts(found, self.n_genes)
        if (summed & (left > 0) & (left < FEWEST_SUMMED)).any():
            self._end()
            raise _RareGeneError
        return found

    def _confirm(self) -> dict[str, Any]:
        survivors = self.record["trained"]

        def parse(answer: Answer, content: RecordDict) -> dict[str, str]:
            tags = exchange.from_hex(content.config_records[keys.CONFIRMATIONS])
            if set(tags) != set(survivors) - {answer.site}:
                raise UpdateError("it does not confirm to the other survivors")
            return {name: tag.hex() for name, tag in tags.items()}

        silent: Lost = {}
        told, least = self._told(self._lists()), self._group().threshold
        found = self._ask(keys.SECURE_CONFIRM, survivors, parse, told, silent)
        if len(found) < least:
            self._end()
            raise self._too_few(found, least, "confirmed the list", silent)
        return found

    def _sum(self) -> Words:
        """Ask for the shares, and take the masks off the sum."""
        tags: dict[str, dict[str, str]] = self.record["tags"]
        sharers, survivors = self.record["shares"], self.record["trained"]
        gone = sorted(set(sharers) - set(survivors))

        def confirmed(site: str) -> Mapping[str, ConfigRecord]:
            own = {name: each[site] for name, each in tags.items() if name != site}
            return {keys.CONFIRMATIONS: ConfigRecord(dict(own))}

        def parse(answer: Answer, content: RecordDict) -> tuple[Numbers, Numbers]:
            records = content.config_records
            return (
                _shares(records[keys.SEED_SHARES], survivors),
                _shares(records[keys.MASK_SHARES], gone),
            )

        silent: Lost = {}
        told, group = self._told(self._lists()), self._group()
        found = self._ask(keys.SECURE_UNMASK, tags, parse, told, silent, own=confirmed)
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
        """Return the mean of the parameters that the sum leads to."""
        survivors, group = list(self.record["trained"]), self._group()
        rule = self.study.secure_aggregation
        assert rule is not None
        fixed = FixedPoint(rule.clip, len(group.keys))
        weights = [protocol.weight(self.study.strategy, name) for name in survivors]
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
        return protocol.to_mean(
            summed, self.incoming, weights, rows if by_gene else None
        )

    # ---- what the steps share ----

    def _ask(
        self,
        kind: str,
        sites: Collection[str],
        parse: Callable[[Answer, RecordDict], Parsed],
        content: Mapping[str, ConfigRecord] | None = None,
        lost: Lost | None = None,
        *,
        own: Own = lambda site: {},
        model: bool = False,
    ) -> dict[str, Parsed]:
        """Return what each site answered, read by `parse`.

        Parameters
        ----------
        content
            What is sent besides study, vocabulary, round and attempt.
        lost
            Takes the state and reason of every other site; by default the round's,
            whose updates do not count.
        model
            Whether the model travels too.
        """
        lost = self.record["lost"] if lost is None else lost
        more = {**self._told({}), **(content or {})}

        def whole() -> RecordDict:
            first = dict(self.request.content()) if model else self.base
            return RecordDict({**first, **more})

        request = dataclasses.replace(self.request, type=kind, content=whole, own=own)
        found: dict[str, Parsed] = {}
        deadline_s = self.study.rounds.deadline_s
        for answer in ask(self.line, sorted(sites), request, deadline_s=deadline_s):
            name, state, reason = answer.site, answer.state, answer.reason
            self.bytes_up += answer.bytes_up
            self.bytes_down += answer.bytes_down
            if answer.content is not None:
                try:
                    found[name] = parse(answer, answer.content)
                    continue
                except (KeyError, UpdateError, TrustError) as error:
                    state, reason = "quarantined", f"the reply cannot be used: {error}"
                finally:
                    del answer  # before the next is fetched
            lost[name] = {"state": state, "reason": reason}
            group = self.request.group
            logger.warning(
                "%s %s site=%s state=%s %s", group, kind, name, state, reason
            )
        return found

    def _told(self, lists: Mapping[str, list[str]]) -> dict[str, ConfigRecord]:
        attempt, run = self.context.attempt, self.context.run
        record = ConfigRecord({keys.ATTEMPT: attempt, keys.RUN_NAME: run})
        record.update(lists)
        return {keys.EXCHANGE: record}

    def _lists(self) -> dict[str, list[str]]:
        return {
            keys.SHARERS: sorted(self.record["shares"]),
            keys.SURVIVORS: sorted(self.record["trained"]),
        }

    def _group(self) -> Group:
        try:
            return Group(self.context, _public(self.record["keys"]))
        except TrustError as error:
            self._end()
            raise FederationError(f"{self.request.group}: {error}") from error

    def _path(self, name: str) -> Path:
        return self.folder / "masked" / f"{name}.safetensors"

    def _masked(self, name: str) -> Words:
        """Read a masked update from the disk, checked."""
        arrays = Spooled(self._path(name))
        if set(arrays) != {keys.MASKED}:
            raise UpdateError(f'the masked update is not "{keys.MASKED}" alone')
        words = np.asarray(arrays[keys.MASKED])
        if words.shape != (self.size,) or words.dtype != np.uint32:
            raise UpdateError(
                f"the masked update is {words.dtype} of shape {words.shape}, expected "
                f"uint32 of shape ({self.size},)"
            )
        return words.astype(np.uint32, copy=False)

    def _missing(self) -> Lost:
        """Return state and reason of everybody whose update does not count."""
        late = {"state": "failed", "reason": "was not there when keys were made"}
        known = {*self.record.get("keys", self.sites), *self.record["lost"]}
        came = {name: late for name in self.sites if name not in known}
        return {**self.absent, **came, **self.record["lost"]}

    def _require(self, names: Collection[str], least: int, did: str) -> None:
        rule = self.study.rounds
        least = max(least, rule.quorum)
        if len(names) < least or set(rule.mandatory_sites) - set(names):
            self._end()
            raise self._too_few(names, least, did, self._missing())

    def _end(self) -> None:
        """Have the round's next try be another attempt: no shares have left yet."""
        self.record["over"] = True
        _write(self.folder, self.record)

    def _too_few(
        self, names: Collection[str], least: int, did: str, lost: Lost
    ) -> FederationError:
        missing = sorted(set(self.study.rounds.mandatory_sites) - set(names))
        others = "; ".join(
            f"{name}: {each['state']} ({each['reason']})"
            for name, each in sorted(lost.items())
        )
        return FederationError(
            f"{self.request.group}: {len(names)} of "
            f"{len({*self.sites, *self.absent})} sites {did}, secure aggregation needs "
            f"{least}"
            + (f", and mandatory {missing} did not" if missing else "")
            + f". {others}. Mend the sites, then resume from the last checkpoint."
        )


def _public(told: Mapping[str, Mapping[str, str]]) -> dict[str, PublicKeys]:
    return {
        name: exchange.read_keys(ConfigRecord(dict(each)))
        for name, each in told.items()
    }


def _shares(record: ConfigRecord, of: Collection[str]) -> dict[str, int]:
    """Read shares of exactly these sites' secrets."""
    found = exchange.from_hex(record)
    if set(found) != set(of):
        raise UpdateError("the shares are not those that were asked for")
    return {name: protocol.share(content) for name, content in found.items()}


def _proof(sealed: Sealed | None) -> dict[str, str]:
    if sealed is None:
        return {}
    return {
        keys.JSON: sealed.text,
        keys.SIGNATURE: sealed.signature,
        keys.CERTIFICATE: sealed.certificate,
    }


def _sealed(proof: Mapping[str, str]) -> Sealed:
    return Sealed(
        part=Part.from_json(proof[keys.JSON], "a site's part"),
        text=proof[keys.JSON],
        signature=proof[keys.SIGNATURE],
        certificate=proof[keys.CERTIFICATE],
    )


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / FILE
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomic(folder / FILE, json.dumps(record, sort_keys=True).encode())
