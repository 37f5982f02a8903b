"""Talk to the sites: ask, wait until a deadline, and check what comes back.

Flower carries the messages. What we add: a deadline, one reply in memory at a time, who
answered what under which message, and a reason for everybody who did not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedgex.common import keys
from fedgex.common.errors import FederationError, UpdateError
from fedgex.common.records import check, to_arrays
from fedgex.common.study import RoundRule
from fedgex.server.strategy import Update, spool

logger = logging.getLogger(__name__)

State = Literal["contributed", "late", "failed", "refused", "quarantined"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site that takes part in the run."""

    name: str
    node: int
    """Flower's number of its node."""
    measured: NDArray[np.bool_]
    """Genes of the vocabulary that it measures, shape (V,)."""
    n_patients: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one node answered; `content` is absent unless it did as asked."""

    node: int
    state: State
    reason: str | None = None
    """Code or cause, for every state but `contributed`."""
    content: RecordDict | None = None
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """Who contributed to a round with what, and who did not and why."""

    updates: list[Update]
    sites: dict[str, dict[str, Any]]
    """State, reason and numbers of every site asked, as in the journal."""
    bytes_up: int
    bytes_down: int
    seconds: float


def ask(
    grid: Grid,
    nodes: list[int],
    content: RecordDict,
    message_type: str,
    *,
    group: str,
    deadline_s: float,
    poll_s: float,
) -> Iterator[Answer]:
    """Send the same content to all nodes and yield each answer as it comes.

    Nodes that have not answered by the deadline are yielded last, as late.
    """
    sent: dict[str, int] = {}
    for node in nodes:
        message = Message(content, node, message_type, group_id=group)
        ids = list(grid.push_messages([message]))
        if ids:
            sent[ids[0]] = node
        else:
            yield Answer(node=node, state="failed", reason="message not accepted")
    end = time.monotonic() + deadline_s
    while sent and time.monotonic() < end:
        waiting = len(sent)
        for message_id in list(sent):
            for reply in grid.pull_messages([message_id]):
                yield _answer(sent.pop(message_id), reply)
        if len(sent) == waiting:
            time.sleep(poll_s)
    for node in sent.values():
        yield Answer(node=node, state="late", reason=f"no answer in {deadline_s:g} s")


def train_round(
    grid: Grid,
    sites: list[Site],
    content: RecordDict,
    expected: Mapping[str, tuple[int, ...]],
    rule: RoundRule,
    *,
    floor: int,
    group: str,
    spool_dir: Path,
    poll_s: float,
) -> RoundOutcome:
    """Run one round of training, and spool every acceptable update to disk.

    Parameters
    ----------
    content
        What every site is sent.
    expected
        Shape of each parameter that must come back, no more and no fewer.
    floor
        Updates from fewer patients are quarantined.

    Raises
    ------
    FederationError
        If fewer sites than the quorum, or not all mandatory ones, contributed.
    """
    started = time.monotonic()
    by_node = {site.node: site for site in sites}
    outcome: dict[str, dict[str, Any]] = {}
    updates: list[Update] = []
    bytes_up = 0
    answers = ask(
        grid,
        list(by_node),
        content,
        keys.TRAIN,
        group=group,
        deadline_s=rule.deadline_s,
        poll_s=poll_s,
    )
    for answer in answers:
        site = by_node[answer.node]
        bytes_up += answer.size_bytes
        state, reason, numbers = answer.state, answer.reason, {}
        if answer.content is not None:
            path = spool_dir / f"{site.name}.safetensors"
            try:
                numbers = _accept(answer.content, expected, floor, path)
            except UpdateError as error:
                state, reason = "quarantined", str(error)
            else:
                updates.append(
                    Update(
                        site=site.name,
                        path=path,
                        num_examples=int(numbers["num_examples"]),
                        num_loss_terms=int(numbers["num_loss_terms"]),
                        measured=site.measured,
                    )
                )
        outcome[site.name] = {"state": state, "reason": reason, **numbers}
        if state != "contributed":
            logger.warning("%s site=%s state=%s %s", group, site.name, state, reason)
    _require_quorum(updates, outcome, rule, group)
    return RoundOutcome(
        updates=sorted(updates, key=lambda update: update.site),
        sites=dict(sorted(outcome.items())),
        bytes_up=bytes_up,
        bytes_down=_size(content) * len(sites),
        seconds=time.monotonic() - started,
    )


def _accept(
    content: RecordDict,
    expected: Mapping[str, tuple[int, ...]],
    floor: int,
    path: Path,
) -> dict[str, float]:
    """Check an update and spool it; return its numbers.

    Raises
    ------
    UpdateError
        If it lacks a record, or holds anything that cannot be aggregated.
    """
    if keys.UPDATE not in content.array_records:
        raise UpdateError(f'the reply has no "{keys.UPDATE}"')
    arrays = to_arrays(content.array_records[keys.UPDATE])
    check(expected, arrays, exact=True)
    metrics = content.metric_records.get(keys.METRICS)
    if metrics is None:
        raise UpdateError(f'the reply has no "{keys.METRICS}"')
    numbers: dict[str, float] = {}
    for key in (
        keys.NUM_EXAMPLES,
        keys.NUM_LOSS_TERMS,
        keys.TRAIN_LOSS,
        keys.JUDGED_LOSS,
        keys.SECONDS,
    ):
        value = metrics.get(key)
        if not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
            raise UpdateError(f'"{key}" is not a number of 0 or more')
        numbers[key.replace("-", "_")] = value
    if numbers["num_examples"] < floor:
        raise UpdateError(f"trained on fewer than {floor} patients")
    spool(arrays, path)
    return numbers


def _require_quorum(
    updates: list[Update],
    outcome: Mapping[str, Mapping[str, Any]],
    rule: RoundRule,
    group: str,
) -> None:
    contributed = {update.site for update in updates}
    missing = set(rule.mandatory_sites) - contributed
    if len(updates) >= rule.quorum and not missing:
        return
    others = "; ".join(
        f"{name}: {site['state']} ({site['reason']})"
        for name, site in sorted(outcome.items())
        if name not in contributed
    )
    raise FederationError(
        f"{group}: {len(updates)} of {len(outcome)} sites contributed, the quorum is "
        f"{rule.quorum}"
        + (f", and mandatory {sorted(missing)} did not" if missing else "")
        + f". {others}. Mend the sites, then resume from the last checkpoint."
    )


def _answer(node: int, reply: Message) -> Answer:
    if reply.has_error():
        reason = f"Flower error {reply.error.code}: {reply.error.reason}"
        return Answer(node=node, state="failed", reason=reason)
    size = _size(reply.content)
    refusal = reply.content.config_records.get(keys.REFUSAL)
    if refusal is not None:
        code = str(refusal.get(keys.CODE, "without a code"))
        return Answer(node=node, state="refused", reason=code, size_bytes=size)
    return Answer(
        node=node, state="contributed", content=reply.content, size_bytes=size
    )


def _size(content: RecordDict) -> int:
    """Return the bytes of arrays and of lists of names in a message."""
    arrays = sum(
        len(array.data)
        for record in content.array_records.values()
        for array in record.values()
    )
    return arrays + sum(map(_text_size, content.config_records.values()))


def _text_size(record: ConfigRecord) -> int:
    return sum(
        sum(len(str(item)) for item in value) if isinstance(value, list)
        else len(str(value))
        for value in record.values()
    )  # fmt: skip
