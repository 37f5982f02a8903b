"""A hospital's part in secure aggregation: what it answers, and what it never does.

One file for each run, `secagg/RUN/exchange.json`, holds the present round's private
keys, the shares of others, and every list that the coordinator committed itself to;
beside it lies the round's own update. Both are replaced when the next round's keys are
made. With them a site answers the same when it is asked the same, after a restart too,
and refuses, with `Code.EXCHANGE_REFUSED`,

- keys that their owners have not signed, and a list without its own keys unchanged,
- fewer than three participants, or than the quorum,
- survivors fewer than the threshold, or that leave a gene to one or two sites,
- a second, different list of anything, and lists that t sites have not confirmed,
- a round that is over, and another attempt of one in which it gave out shares: of two
  sums that differ in one site, the difference is that site's update.

So for each peer it gives out one kind of share, once.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from fedgex.client.identity import Identity
from fedgex.client.replies import AnotherRequestError, Replies
from fedgex.client.settings import SiteSettings
from fedgex.common import exchange, keys
from fedgex.common import secure_aggregation as protocol
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, FedgexError, TrustError, UpdateError
from fedgex.common.files import write_atomic
from fedgex.common.receipt import reply_digest, request_digest, verify_part
from fedgex.common.records import floats, text, to_arrays, to_record
from fedgex.common.secure_aggregation import (
    Context,
    FixedPoint,
    Group,
    PrivateKeys,
    PublicKeys,
    Shares,
)
from fedgex.common.study import (
    FEWEST_SUMMED,
    NAME_PATTERN,
    SecureAggregation,
    Study,
)

FILE = "exchange.json"

Handler = Callable[[Message, SiteSettings, Study], RecordDict]


class ExchangeError(FedgexError):
    """The coordinator asks for what secure aggregation never gives."""

    code = Code.EXCHANGE_REFUSED


def advertise(
    message: Message,
    settings: SiteSettings,
    study: Study,
    measured: NDArray[np.bool_],
) -> RecordDict:
    """Make the keys of a round's attempt, or return those made before.

    Parameters
    ----------
    measured
        Genes of the vocabulary that the server was told of, shape (V,).

    Raises
    ------
    ExchangeError
        If the round or the attempt is over.
    """
    with _guarded():
        _rule(study)
        context = _context(message, study)
        folder = _folder(settings, context)
        before = _State.read(folder)
        if before is None or before.context != context:
            if before is not None:
                _require_new(before, context, study)
            everything = measured if study.strategy.per_gene else np.ones_like(measured)
            state = _State(context, PrivateKeys.new(), everything)
            if before is None or _round(before.context) != _round(context):
                shutil.rmtree(folder / "update", ignore_errors=True)
            state.write(folder)
        else:
            state = before
        record = exchange.keys_record(state.public, context.attempt)
        return RecordDict({keys.PUBLIC_KEYS: record})


def share(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Encrypt shares of both secrets for each participant.

    Raises
    ------
    ExchangeError
        If the list of participants cannot be trusted, or differs from one before.
    """
    with _guarded():
        state, folder = _open(message, settings, study)
        told = exchange.introduced(message.content.config_records[keys.PUBLIC_KEYS])
        public = {
            name: exchange.read_keys(ConfigRecord(dict(values)))
            for name, values in told.items()
        }
        if keys.RUN in message.content.config_records:
            authority = Identity.load(settings.state_dir).authority
            for name, values in told.items():
                _require_signed(name, public[name], values, state.context, authority)
        if public.get(settings.name) != state.public:
            raise TrustError("our keys are not in the list as we made them.")
        if len(public) < study.rounds.quorum:
            raise TrustError(
                f"{len(public)} participants; the quorum is {study.rounds.quorum}."
            )
        group = Group(state.context, public)
        for each in public.values():
            protocol.measured(each, len(state.measured))
        if not state.keys:
            shares = protocol.share_out(group, state.private)
            state.keys, state.shares = public, {settings.name: shares[settings.name]}
            state.boxes = {
                name: protocol.seal(group, state.private, settings.name, name, each)
                for name, each in shares.items()
                if name != settings.name
            }
            state.write(folder)
        elif state.keys != public:
            raise TrustError("another list of participants than before.")
        seed = protocol.commitment(group, settings.name, state.private.seed)
        return RecordDict(
            {
                keys.BOXES: exchange.to_hex(state.boxes),
                keys.EXCHANGE: ConfigRecord({keys.COMMITMENT: seed.hex()}),
            }
        )


def masked(handler: Handler) -> Handler:
    """Have a training's update leave under masks, if the study says so.

    A round is trained once: its plain answer stays here until the next round, and
    another attempt masks it anew.
    """

    @wraps(handler)
    def reply(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
        if study.secure_aggregation is None:
            return handler(message, settings, study)
        with _guarded():
            state, folder = _open(message, settings, study)
            _receive(message, settings, study, state)
            state.write(folder)
        plain = _trained(message, settings, study, handler, folder)
        words = _mask(plain, settings, study, state)
        state.sent = True
        state.write(folder)
        others = {name: plain[name] for name in plain if name != keys.UPDATE}
        return RecordDict({keys.MASKED: to_record({keys.MASKED: words}), **others})

    return reply


def confirm(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Commit to a list of survivors, and tell each of them which.

    Raises
    ------
    ExchangeError
        If it is too short, unsafe, or differs from one before.
    """
    with _guarded():
        state, folder = _open(message, settings, study)
        sharers, survivors = _lists(message, settings, study, state)
        state.survivors = survivors
        state.write(folder)
        tags = {
            name: protocol.confirm(
                state.group, state.private, settings.name, name, sharers, survivors
            )
            for name in survivors
            if name != settings.name
        }
        return RecordDict({keys.CONFIRMATIONS: exchange.to_hex(tags)})


def unmask(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Give out a share of each survivor's seed, and of each other's mask key.

    Raises
    ------
    ExchangeError
        Unless enough survivors confirmed the lists that this site committed to.
    """
    with _guarded():
        state, folder = _open(message, settings, study)
        sharers, survivors = _lists(message, settings, study, state)
        if state.survivors != survivors:
            raise TrustError("asked for shares before this list was confirmed.")
        told = message.content.config_records[keys.CONFIRMATIONS]
        protocol.require_confirmed(
            state.group,
            state.private,
            settings.name,
            sharers,
            survivors,
            exchange.from_hex(told),
        )
        state.revealed = True
        state.write(folder)
        gone = [name for name in sharers if name not in survivors]
        seeds = {name: _share_bytes(state.shares[name].seed) for name in survivors}
        mask_keys = {name: _share_bytes(state.shares[name].mask) for name in gone}
        return RecordDict(
            {
                keys.SEED_SHARES: exchange.to_hex(seeds),
                keys.MASK_SHARES: exchange.to_hex(mask_keys),
            }
        )


@dataclass
class _State:
    """What a site keeps of one attempt; each step adds to it, none takes back."""

    context: Context
    private: PrivateKeys
    measured: NDArray[np.bool_]
    """Genes that this site measures, shape (V,)."""
    keys: dict[str, PublicKeys] = field(default_factory=dict)
    """Of all participants; empty until they are known."""
    boxes: dict[str, bytes] = field(default_factory=dict)
    """Encrypted shares for each other participant."""
    shares: dict[str, Shares] = field(default_factory=dict)
    """Our shares of everybody's secrets, by owner."""
    sharers: tuple[str, ...] = ()
    """Those with whom our vector is masked; empty until they are known."""
    sent: bool = False
    """Whether our vector was masked, and may have left."""
    survivors: tuple[str, ...] = ()
    """Those whose vectors the server says it has; empty until it says so."""
    revealed: bool = False
    """Whether shares may have left."""

    @property
    def public(self) -> PublicKeys:
        return self.private.public(self.measured)

    @property
    def group(self) -> Group:
        return Group(self.context, self.keys)

    @classmethod
    def read(cls, folder: Path) -> _State | None:
        """Return what is on the disk; None if there is nothing."""
        path = folder / FILE
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        private = {k: bytes.fromhex(v) for k, v in found["private"].items()}
        return cls(
            context=Context(**found["context"]),
            private=PrivateKeys(**private),
            measured=np.array(found["measured"], dtype=np.bool_),
            keys={
                name: PublicKeys(**{k: bytes.fromhex(v) for k, v in each.items()})
                for name, each in found["keys"].items()
            },
            boxes={k: bytes.fromhex(v) for k, v in found["boxes"].items()},
            shares={
                k: Shares.from_bytes(bytes.fromhex(v))
                for k, v in found["shares"].items()
            },
            sharers=tuple(found["sharers"]),
            sent=found["sent"],
            survivors=tuple(found["survivors"]),
            revealed=found["revealed"],
        )

    def write(self, folder: Path) -> None:
        """Put it on the disk, readable by its owner alone."""
        values = {
            "context": asdict(self.context),
            "private": _hex(asdict(self.private)),
            "measured": self.measured.astype(int).tolist(),
            "keys": {name: _hex(asdict(each)) for name, each in self.keys.items()},
            "boxes": _hex(self.boxes),
            "shares": {k: each.to_bytes().hex() for k, each in self.shares.items()},
            "sharers": self.sharers,
            "sent": self.sent,
            "survivors": self.survivors,
            "revealed": self.revealed,
        }
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(folder / FILE, json.dumps(values).encode())


@contextmanager
def _guarded() -> Iterator[None]:
    """Give what does not fit the code under which it leaves."""
    try:
        yield
    except (TrustError, UpdateError) as error:
        raise ExchangeError(f"secure aggregation: {error}") from error


def _rule(study: Study) -> SecureAggregation:
    if study.secure_aggregation is None:
        raise ConfigError("the study knows no secure aggregation, and was asked for it")
    return study.secure_aggregation


def _context(message: Message, study: Study) -> Context:
    """Return what a message is about; between hospitals the gate has checked it."""
    records = message.content.config_records
    told, order = records[keys.EXCHANGE], records[keys.ROUND]
    run = records.get(keys.RUN)
    if run is None:
        contract, name = study.hash, text(told, keys.RUN_NAME)
    else:
        contract, name = text(run, keys.CONTRACT_HASH), text(run, keys.RUN_NAME)
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrustError("the run's name cannot name a folder.")
    return Context(
        contract=contract,
        run=name,
        phase=text(order, keys.PHASE),
        round=int(str(order[keys.NUMBER])),
        attempt=int(str(told[keys.ATTEMPT])),
    )


def _folder(settings: SiteSettings, context: Context) -> Path:
    return settings.state_dir / "secagg" / context.run


def _open(
    message: Message, settings: SiteSettings, study: Study
) -> tuple[_State, Path]:
    """Return the state of the attempt that a message is about."""
    _rule(study)
    context = _context(message, study)
    folder = _folder(settings, context)
    state = _State.read(folder)
    if state is None or state.context != context:
        raise TrustError(
            f"{context.phase} {context.round}, attempt {context.attempt}, is not the "
            "one that this site made its last keys for."
        )
    return state, folder


def _round(context: Context) -> tuple[str, str, int]:
    return context.contract, context.phase, context.round


def _require_new(before: _State, context: Context, study: Study) -> None:
    """Refuse a round that is over, and a second attempt once shares have left."""
    order = list(study.phases)
    last = (order.index(before.context.phase), before.context.round)
    now = (order.index(context.phase), context.round)
    again = now == last and context.attempt > before.context.attempt
    if before.context.contract != context.contract:
        raise TrustError("the run was begun under another contract.")
    if now > last or (again and not before.revealed):
        return
    raise TrustError(
        f"{context.phase} {context.round}, attempt {context.attempt}, is over: this "
        f"site has answered {before.context.phase} {before.context.round}, attempt "
        f"{before.context.attempt}. Another sum over this round would tell of one site."
    )


def _require_signed(
    name: str,
    public: PublicKeys,
    values: Mapping[str, str],
    context: Context,
    authority: x509.Certificate,
) -> None:
    """Refuse keys that are not their owner's answer to this very attempt."""
    proof = (keys.JSON, keys.SIGNATURE, keys.CERTIFICATE)
    signed, signature, certificate = (values.get(key, "") for key in proof)
    part = verify_part(signed, signature, certificate, authority)
    answer = exchange.keys_record(public, context.attempt)
    expected = {
        "site": name,
        "contract": context.contract,
        "run": context.run,
        "type": keys.SECURE_KEYS,
        "phase": context.phase,
        "round": context.round,
        "reply": reply_digest(RecordDict({keys.PUBLIC_KEYS: answer})),
    }
    wrong = [key for key, value in expected.items() if getattr(part, key) != value]
    if wrong:
        raise TrustError(f"the keys of {name} are signed for another {wrong}.")


def _receive(
    message: Message, settings: SiteSettings, study: Study, state: _State
) -> None:
    """Open the shares of everybody who gave some, and commit to who they are."""
    records = message.content.config_records
    sharers = exchange.names(records[keys.EXCHANGE], keys.SHARERS)
    group = state.group
    _require_list(sharers, group.names, settings, study, state)
    boxes = exchange.from_hex(records[keys.BOXES])
    if set(boxes) != set(sharers) - {settings.name}:
        raise TrustError("the shares are not those of the sharers.")
    if state.sharers not in ((), sharers):
        raise TrustError("another list of sharers than before.")
    state.sharers = sharers
    for sender, box in boxes.items():
        state.shares[sender] = protocol.unseal(
            group, state.private, sender, settings.name, box
        )


def _trained(
    message: Message,
    settings: SiteSettings,
    study: Study,
    handler: Handler,
    folder: Path,
) -> RecordDict:
    """Return the round's plain answer, computed once."""
    content, order = message.content, message.content.config_records[keys.ROUND]
    phase, number = text(order, keys.PHASE), int(str(order[keys.NUMBER]))
    question = f"update-{phase}-{number:05d}"
    asked = (
        keys.STUDY,
        keys.VOCABULARY,
        keys.STANDARDISATION,
        keys.MODEL,
        keys.ROUND,
    )
    request = request_digest(
        keys.TRAIN, RecordDict({name: content[name] for name in asked})
    )
    kept = Replies(folder / "update")
    try:
        found = kept.find(question, request)
    except AnotherRequestError as error:
        raise ExchangeError(
            f"secure aggregation: {error} One round is trained on one model."
        ) from error
    if found is None:
        found = handler(message, settings, study)
        kept.store(question, request, found)
    return found


def _mask(
    plain: RecordDict, settings: SiteSettings, study: Study, state: _State
) -> protocol.Words:
    """Return our weighted change, clipped, in fixed point and under masks."""
    group, rule = state.group, _rule(study)
    kept = None
    if study.strategy.per_gene:
        counts = group.counts(state.sharers, len(state.measured))
        kept = state.measured & (counts >= FEWEST_SUMMED)
    change = floats(to_arrays(plain.array_records[keys.UPDATE]))
    vector = protocol.to_vector(change, rule.clip, kept)
    vector *= np.float32(protocol.weight(study.strategy, settings.name))
    words = FixedPoint(rule.clip, len(group.keys)).encode(vector)
    return protocol.masked(group, state.private, settings.name, state.sharers, words)


def _lists(
    message: Message, settings: SiteSettings, study: Study, state: _State
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return sharers and survivors of a message, once they are safe to act upon."""
    told = message.content.config_records[keys.EXCHANGE]
    sharers = exchange.names(told, keys.SHARERS)
    survivors = exchange.names(told, keys.SURVIVORS)
    if not state.sent or sharers != state.sharers:
        raise TrustError("our vector was not masked with these sharers.")
    _require_list(survivors, sharers, settings, study, state)
    if state.survivors not in ((), survivors):
        raise TrustError("another list of survivors than before.")
    n_genes = len(state.measured)
    summed = state.group.counts(sharers, n_genes) >= FEWEST_SUMMED
    left = state.group.counts(survivors, n_genes)
    if (summed & (left > 0) & (left < FEWEST_SUMMED)).any():
        raise TrustError("the survivors leave a gene to one or two of them.")
    return sharers, survivors


def _require_list(
    names: tuple[str, ...],
    among: Collection[str],
    settings: SiteSettings,
    study: Study,
    state: _State,
) -> None:
    state.group.require(names, among)
    if settings.name not in names or len(names) < study.rounds.quorum:
        raise TrustError("the list lacks this site, or is below the quorum.")


def _share_bytes(number: int) -> bytes:
    return number.to_bytes(protocol.SHARE_BYTES, "big")


def _hex(values: Mapping[str, bytes]) -> dict[str, str]:
    return {key: value.hex() for key, value in values.items()}
