"""A hospital's side of secure aggregation.

The file `secagg/RUN/exchange.json` holds the round's private keys, the received shares,
and every list that the coordinator committed to; the same folder holds the round's own
update. Both are replaced with the next round's keys. So a site gives the same reply to
the same request, after a restart too, and refuses, with `Code.EXCHANGE_REFUSED`,

- keys that their owners have not signed, or that are signed by another key than the
  contract pins (`Code.NOT_PINNED`) or by a revoked one, and a list without its own keys
  unchanged,
- fewer than three participants, or than the quorum,
- survivors fewer than the threshold, or that leave a gene to one or two sites,
- a second, different list of anything, and lists that t sites have not confirmed,
- a round that is over, and another attempt of one in which it gave out shares: of two
  sums that differ in one site, the difference is that site's update.

So for each peer it gives out only one kind of share.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.admission.reply_cache import AnotherRequestError, Replies
from fedgex.client.identity import Identity
from fedgex.client.settings import SiteSettings
from fedgex.client.training.secure_state import AttemptState
from fedgex.common import keys
from fedgex.common.codes import Code
from fedgex.common.errors import ConfigError, FedgexError, TrustError, UpdateError
from fedgex.common.messages.fields import AdvertisedKeys, Commitment, Participant
from fedgex.common.messages.replies import (
    ConfirmReply,
    KeysReply,
    SharesReply,
    TrainReply,
    UnmaskReply,
)
from fedgex.common.messages.requests import (
    ConfirmRequest,
    KeysRequest,
    SecureRequest,
    SharesRequest,
    TrainRequest,
    UnmaskRequest,
)
from fedgex.common.secure_aggregation import protocol, shamir, vectors
from fedgex.common.secure_aggregation.protocol import Context, Group, PrivateKeys
from fedgex.common.secure_aggregation.vectors import FixedPoint
from fedgex.common.settings import NAME_PATTERN
from fedgex.common.study import FEWEST_SUMMED, SecureAggregation, Study
from fedgex.common.transport.records import floats, to_arrays, to_record
from fedgex.common.trust.pinning import PinError, Pins
from fedgex.common.trust.receipt import reply_digest, request_digest, verify_part

Train = Callable[[TrainRequest, SiteSettings], TrainReply]
Measured = Callable[[KeysRequest, SiteSettings], NDArray[np.bool_]]
Request = SecureRequest | TrainRequest


class ExchangeError(FedgexError):
    """The coordinator's request would break secure aggregation."""

    def __init__(self, why: str, code: Code = Code.EXCHANGE_REFUSED) -> None:
        super().__init__(why)
        self.code = code


def advertise(
    measured: Measured,
) -> Callable[[KeysRequest, SiteSettings], KeysReply]:
    """Return a handler that makes the keys of an attempt, or returns its existing ones.

    Parameters
    ----------
    measured
        Returns the genes of the vocabulary that the site reported, shape (V,), or
        refuses the round.

    Raises
    ------
    ExchangeError
        If the round or the attempt is over.
    """

    def reply(request: KeysRequest, settings: SiteSettings) -> KeysReply:
        own, study = measured(request, settings), request.study
        with _guarded():
            _rule(study)
            context = _context(request)
            folder = _folder(settings, context)
            state = AttemptState.read(folder)
            if state is None or state.context != context:
                before = state
                if before is not None:
                    _require_new(before, context, study)
                genes = own if study.strategy.per_gene else np.ones_like(own)
                state = AttemptState(context, PrivateKeys.new(), genes)
                if before is None or _round(before.context) != _round(context):
                    shutil.rmtree(folder / "update", ignore_errors=True)
                state.write(folder)
            return KeysReply(
                advertised=AdvertisedKeys.of(state.public, context.attempt)
            )

    return reply


def share(request: SharesRequest, settings: SiteSettings) -> SharesReply:
    """Encrypt shares of both secrets for each participant.

    Raises
    ------
    ExchangeError
        If the list of participants cannot be trusted, or differs from an earlier one.
    """
    with _guarded():
        study, (state, folder) = request.study, _open(request, settings)
        public = {name: each.public for name, each in request.participants.items()}
        if request.run is not None:
            own = Identity.load(settings.state_dir)
            held = ApprovalStore.of(settings).contract(request.run.contract)
            pins = held.contract.site_keys
            for name, each in request.participants.items():
                if name != settings.name:  # ours are compared below
                    _require_signed(name, each, state.context, own, pins)
        if public.get(settings.name) != state.public:
            raise TrustError("our keys are not in the list as we made them.")
        if len(public) < study.rounds.quorum:
            raise TrustError(
                f"{len(public)} participants; the quorum is {study.rounds.quorum}."
            )
        group = Group(state.context, public)
        for keys_of_one in public.values():
            protocol.measured(keys_of_one, len(state.measured))
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
        commitment = Commitment(commitment=seed.hex())
        return SharesReply(boxes=state.boxes, commitment=commitment)


def masked(train: Train) -> Train:
    """Wrap a training handler so that its update is masked, if the study asks.

    A round is trained once: the plain update stays here until the next round, and each
    attempt masks it anew.
    """

    @wraps(train)
    def reply(request: TrainRequest, settings: SiteSettings) -> TrainReply:
        if request.study.secure_aggregation is None:
            return train(request, settings)
        with _guarded():
            state, folder = _open(request, settings)
            _receive(request, settings, state)
            state.write(folder)
        plain = _trained(request, settings, train, folder)
        words = _mask(plain, settings, request.study, state)
        state.sent = True
        state.write(folder)
        record = to_record({keys.MASKED: words})
        return replace(plain, update=None, masked=record)

    return reply


def confirm(request: ConfirmRequest, settings: SiteSettings) -> ConfirmReply:
    """Commit to a list of survivors, and confirm it to each of them.

    Raises
    ------
    ExchangeError
        If it is too short, unsafe, or differs from an earlier one.
    """
    with _guarded():
        state, folder = _open(request, settings)
        sharers, survivors = _lists(request, settings, state)
        state.survivors = survivors
        state.write(folder)
        tags = {
            name: protocol.confirm(
                state.group, state.private, settings.name, name, sharers, survivors
            )
            for name in survivors
            if name != settings.name
        }
        return ConfirmReply(confirmations=tags)


def unmask(request: UnmaskRequest, settings: SiteSettings) -> UnmaskReply:
    """Reveal a share of each survivor's seed, and of each dropped site's mask key.

    Raises
    ------
    ExchangeError
        Unless enough survivors confirmed the lists that this site committed to.
    """
    with _guarded():
        state, folder = _open(request, settings)
        sharers, survivors = _lists(request, settings, state)
        if state.survivors != survivors:
            raise TrustError("asked for shares before this list was confirmed.")
        protocol.require_confirmed(
            state.group,
            state.private,
            settings.name,
            sharers,
            survivors,
            request.confirmations,
        )
        state.revealed = True
        state.write(folder)
        gone = [name for name in sharers if name not in survivors]
        return UnmaskReply(
            seeds={name: _share_bytes(state.shares[name].seed) for name in survivors},
            masks={name: _share_bytes(state.shares[name].mask) for name in gone},
        )


@contextmanager
def _guarded() -> Iterator[None]:
    """Raise protocol errors as ExchangeError, whose code leaves the hospital."""
    try:
        yield
    except PinError as error:
        raise ExchangeError(f"secure aggregation: {error}", Code.NOT_PINNED) from error
    except (TrustError, UpdateError) as error:
        raise ExchangeError(f"secure aggregation: {error}") from error


def _rule(study: Study) -> SecureAggregation:
    if study.secure_aggregation is None:
        raise ConfigError(
            "the study does not use secure aggregation, and was asked for it"
        )
    return study.secure_aggregation


def _context(request: Request) -> Context:
    """Return a request's context; between hospitals the gate has checked it."""
    attempt, run = request.attempt, request.run
    if attempt is None:
        raise UpdateError("the request is of no attempt")
    contract = request.study.hash if run is None else run.contract
    name = attempt.run if run is None else run.run
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrustError("the run's name cannot name a folder.")
    return Context(
        contract=contract,
        run=name,
        phase=request.round.phase,
        round=request.round.number,
        attempt=attempt.attempt,
    )


def _folder(settings: SiteSettings, context: Context) -> Path:
    return settings.state_dir / "secagg" / context.run


def _open(request: Request, settings: SiteSettings) -> tuple[AttemptState, Path]:
    """Return the state and folder of a request's attempt."""
    _rule(request.study)
    context = _context(request)
    folder = _folder(settings, context)
    state = AttemptState.read(folder)
    if state is None or state.context != context:
        raise TrustError(
            f"{context.phase} {context.round}, attempt {context.attempt}, is not the "
            "one that this site made its last keys for."
        )
    return state, folder


def _round(context: Context) -> tuple[str, str, int]:
    return context.contract, context.phase, context.round


def _require_new(before: AttemptState, context: Context, study: Study) -> None:
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
        f"{before.context.attempt}. A second sum could reveal one site's update."
    )


def _require_signed(
    name: str, participant: Participant, context: Context, own: Identity, pins: Pins
) -> None:
    """Refuse keys that their owner has not signed for this attempt.

    The owner is who holds the key that the contract pins, and was not revoked.
    """
    part = verify_part(
        participant.json_ or "",
        participant.signature or "",
        participant.certificate or "",
        own.authority,
        revoked=own.revoked,
        pins=pins,
    )
    keys_sent = AdvertisedKeys.of(participant.public, context.attempt)
    expected = {
        "site": name,
        "contract": context.contract,
        "run": context.run,
        "type": keys.SECURE_KEYS,
        "phase": context.phase,
        "round": context.round,
        "reply": reply_digest(KeysReply(advertised=keys_sent).to_records()),
    }
    wrong = [key for key, value in expected.items() if getattr(part, key) != value]
    if wrong:
        raise TrustError(f"the keys of {name} are signed for another {wrong}.")


def _receive(
    request: TrainRequest, settings: SiteSettings, state: AttemptState
) -> None:
    """Decrypt the received shares, and commit to the list of sharers."""
    assert request.attempt is not None
    assert request.boxes is not None
    sharers, boxes = _distinct(request.attempt.sharers), request.boxes
    group = state.group
    _require_list(sharers, group.names, settings, request.study, state)
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
    request: TrainRequest, settings: SiteSettings, train: Train, folder: Path
) -> TrainReply:
    """Return the round's plain update, trained once."""
    order = request.round
    question = f"update-{order.phase}-{order.number:05d}"
    asked = TrainRequest(
        study=request.study,
        vocabulary=request.vocabulary,
        standardisation=request.standardisation,
        model=request.model,
        round=order,
    )
    digest = request_digest(keys.TRAIN, asked.to_records())
    kept = Replies(folder / "update")
    try:
        found = kept.find(question, digest)
    except AnotherRequestError as error:
        raise ExchangeError(
            f"secure aggregation: {error} One round is trained on one model."
        ) from error
    if found is not None:
        return TrainReply.from_records(found)
    reply = train(request, settings)
    kept.store(question, digest, reply.to_records())
    return reply


def _mask(
    plain: TrainReply, settings: SiteSettings, study: Study, state: AttemptState
) -> vectors.Words:
    """Return our clipped, weighted change in fixed point, masked."""
    group, rule = state.group, _rule(study)
    kept = None
    if study.strategy.per_gene:
        counts = group.counts(state.sharers, len(state.measured))
        kept = state.measured & (counts >= FEWEST_SUMMED)
    assert plain.update is not None
    change = floats(to_arrays(plain.update))
    vector = vectors.to_vector(change, rule.clip, kept)
    vector *= np.float32(vectors.weight(study.strategy, settings.name))
    words = FixedPoint(rule.clip, len(group.keys)).encode(vector)
    return protocol.masked(group, state.private, settings.name, state.sharers, words)


def _lists(
    request: ConfirmRequest, settings: SiteSettings, state: AttemptState
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return sharers and survivors of a request, verified as safe."""
    sharers = _distinct(request.attempt.sharers)
    survivors = _distinct(request.attempt.survivors)
    if not state.sent or sharers != state.sharers:
        raise TrustError("our vector was not masked with these sharers.")
    _require_list(survivors, sharers, settings, request.study, state)
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
    state: AttemptState,
) -> None:
    state.group.require(names, among)
    if settings.name not in names or len(names) < study.rounds.quorum:
        raise TrustError("the list lacks this site, or is below the quorum.")


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise UpdateError("a site is listed twice")
    return tuple(sorted(names))


def _share_bytes(number: int) -> bytes:
    return number.to_bytes(shamir.SHARE_BYTES, "big")
