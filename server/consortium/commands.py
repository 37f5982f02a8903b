"""Administrators' orders: signed files, each executed once by the supervisor.

    orders/pending/TOKEN.json   signed order
    orders/done/TOKEN.json      executed or refused order, with its outcome

The token makes an order idempotent: a repeated order is the same order, and a finished
token is never executed again, even if its file is copied back.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field

from fedgex.common.errors import ConfigError, FedgexError, TrustError
from fedgex.common.settings import NAME_PATTERN, Settings
from fedgex.common.system.files import write_atomic
from fedgex.common.trust import pki
from fedgex.common.trust.pinning import Pins, pinned_signers
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium.store import Consortium

logger = logging.getLogger(__name__)

Kind = Literal["publish", "launch", "stop", "resume", "release"]
TOKEN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$"
"""Pattern of tokens, which are file names."""


class Order(Settings):
    """Content of an order, signed by an administrator."""

    kind: Kind
    token: str = Field(pattern=TOKEN_PATTERN)
    """Identifier of the order."""
    subject: str
    """Hash of the contract for publish and launch, else name of the run."""
    administrator: str = Field(pattern=NAME_PATTERN)
    at: AwareDatetime
    """Time of the order, UTC."""
    run: str = Field(default="", pattern=rf"{NAME_PATTERN}|^$")
    """launch: name of the run."""
    model: str = ""
    """release: SHA-256 of the manifest of the checkpoint that is to be released."""
    audit: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """release: SHA-256 of the audit report, see `releases.keep_audit`; "" for none."""


class Outcome(Settings):
    """Outcome of an order."""

    state: Literal["pending", "accepted", "refused"]
    reason: str = ""
    """Reason of a refusal."""
    at: AwareDatetime | None = None
    """Time of the outcome, UTC."""
    signed: str
    """The signed order."""


def submit(
    consortium: Consortium,
    kind: Kind,
    subject: str,
    key: pki.Key,
    *,
    token: str | None = None,
    run: str = "",
    model: str = "",
    audit: str = "",
) -> Order:
    """Sign an order and store it for the supervisor; return the valid one.

    Parameters
    ----------
    key
        Key of the administrator.
    token
        A used token returns the earlier order of the same content; None makes a new
        one.

    Raises
    ------
    TrustError
        If the key belongs to no registered administrator.
    ConfigError
        If the token was used for another order, or its order was refused.
    """
    name, certificate = consortium.administrator(key)
    values = {
        "kind": kind,
        "token": token or uuid.uuid4().hex,
        "subject": subject,
        "administrator": name,
        "at": datetime.now(UTC),
        "run": run,
        "model": model,
        "audit": audit,
    }
    order = Order.read(values, "the order")
    with consortium.locked():
        earlier = outcome(consortium, order.token)
        if earlier is not None:
            return _same(order, earlier)
        signed = Signed(order.model_dump_json()).signed_by(key, certificate)
        path = _pending(consortium) / f"{order.token}.json"
        write_atomic(path, signed.to_json().encode(), point="order")
    return order


def launch(
    consortium: Consortium,
    contract: str,
    run: str,
    key: pki.Key,
    *,
    token: str | None = None,
) -> Order:
    """Order a run of a contract; see `submit`.

    Parameters
    ----------
    contract
        Hash of a published contract.
    token
        None derives one from run and contract, so that a repeated launch is the same.

    Raises
    ------
    ConfigError
        Also if another launch has the name already.
    """
    token = token or f"launch-{run}-{contract[:16]}"
    other = launches(consortium).get(run)
    taken = other is None and (consortium.folder / "runs" / run).exists()
    if taken or (other is not None and other.token != token):
        raise ConfigError(
            f'there is a run "{run}" already'
            + (f", launched with the token {other.token}" if other else "")
            + "; give this one another --name, or that token to mean the same run."
        )
    return submit(consortium, "launch", contract, key, token=token, run=run)


def take(consortium: Consortium) -> Iterator[Order]:
    """Yield each valid pending order, oldest first; refuse the invalid ones.

    An order is yielded again until `finish` is called for it, so that a crash loses
    none.
    """
    waiting = []
    for path in sorted(_pending(consortium).glob("*.json")):
        if (_done(consortium) / path.name).exists():
            logger.warning("order=%s was done before; its copy is removed", path.stem)
            path.unlink()
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            waiting.append(_trusted(consortium, text, path.stem))
        except FedgexError as error:
            consortium.audit.append("order-refused", token=path.stem, reason=str(error))
            _close(consortium, path, text, "refused", str(error))
    yield from sorted(waiting, key=lambda order: (order.at, order.token))


def finish(consortium: Consortium, order: Order, *, refused: str | None = None) -> None:
    """Record that an order was executed, or the reason of its refusal."""
    path = _pending(consortium) / f"{order.token}.json"
    if not path.exists():
        return  # finished before
    facts = {
        "token": order.token,
        "kind": order.kind,
        "subject": order.subject,
        "administrator": order.administrator,
    }
    if refused is None:
        consortium.audit.append("order-accepted", **facts)
    else:
        consortium.audit.append("order-refused", **facts, reason=refused)
    state: Literal["accepted", "refused"] = "refused" if refused else "accepted"
    _close(consortium, path, path.read_text(), state, refused or "")


def outcome(consortium: Consortium, token: str) -> Outcome | None:
    """Return the outcome of an order, None if the token was never used.

    Raises
    ------
    ConfigError
        If the token is malformed.
    """
    if not re.fullmatch(TOKEN_PATTERN, token):
        raise ConfigError(
            f'"{token:.80}" cannot be a token; expected up to 128 letters, digits, '
            "hyphens and underscores."
        )
    # Pending first: an order is written to done before it is removed from there.
    waiting = _read(_pending(consortium) / f"{token}.json")
    done = _read(_done(consortium) / f"{token}.json")
    if done is not None:
        return Outcome.from_json(done, f"the outcome of {token}")
    return None if waiting is None else Outcome(state="pending", signed=waiting)


def launches(consortium: Consortium) -> dict[str, Order]:
    """Return the launch orders by run name, without refused ones."""
    orders = (order for order in _standing(consortium) if order.kind == "launch")
    return {order.run: order for order in sorted(orders, key=lambda o: o.at)}


def approvals(
    consortium: Consortium, run: str, model: str, pins: Pins | None = None
) -> tuple[str, ...]:
    """Return the distinct administrators who ordered the release, see `consents`."""
    return tuple(sorted(consents(consortium, run, model, pins)))


def consents(
    consortium: Consortium, run: str, model: str, pins: Pins | None = None
) -> dict[str, Signed]:
    """Return each administrator's signed order to release this model.

    Pending and accepted orders count while the administrator's certificate is valid.

    Parameters
    ----------
    pins
        The contract's `administrator_keys`; orders under another key do not count.
    """
    found = {}
    for order in _standing(consortium):
        if (order.kind, order.subject, order.model) == ("release", run, model):
            known = outcome(consortium, order.token)
            assert known is not None, "a standing order has an outcome"
            signed = Signed.from_json(known.signed, order.token)
            if pinned_signers(signed, pins, "the contract"):
                found[order.administrator] = signed
    return found


def _standing(consortium: Consortium) -> Iterator[Order]:
    """Yield every order that was not refused and has a valid signature."""
    folders = (_pending(consortium), _done(consortium))
    tokens = {path.stem for folder in folders for path in folder.glob("*.json")}
    for token in sorted(tokens):
        if not re.fullmatch(TOKEN_PATTERN, token):
            continue
        known = outcome(consortium, token)
        if known is None or known.state == "refused":
            continue
        try:
            yield _trusted(consortium, known.signed, token)
        except FedgexError as error:
            logger.warning("order=%s does not count: %s", token, error)


def _trusted(consortium: Consortium, text: str, token: str) -> Order:
    """Verify and return an order.

    Raises
    ------
    TrustError
        If it is not signed by one registered administrator under this token.
    """
    signed = Signed.from_json(text, f"the order {token}")
    signers = consortium.signers(signed)
    try:
        order = Order.from_json(signed.content, "the order")
    except ConfigError as error:
        raise TrustError(
            f"the order {token} cannot be read; expected one that fedgex-admin wrote. "
            "Give the order again."
        ) from error
    if signers != (order.administrator,):
        raise TrustError(
            f'the order {token} is of "{order.administrator}" and signed by '
            f"{', '.join(signers) or 'nobody'}; expected that administrator's "
            "signature only. Give the order again."
        )
    if order.token != token:
        raise TrustError(
            f"the order {order.token} lies under the name {token}; expected its own. "
            "A copied order is not carried out again: give a new one."
        )
    return order


def _same(order: Order, earlier: Outcome) -> Order:
    """Return the earlier order of a token if it asks for the same and was not refused.

    Raises
    ------
    ConfigError
        If it does not, or was.
    """
    what = f"the order {order.token}"
    before = Order.from_json(Signed.from_json(earlier.signed, what).content, what)
    used = f"the token {order.token} was used on {before.at:%Y-%m-%d %H:%M} UTC"
    asked = {"kind", "subject", "run", "model", "audit"}
    if order.model_dump(include=asked) != before.model_dump(include=asked):
        raise ConfigError(
            f"{used} for another order ({before.kind} of {before.subject[:16]}); "
            "expected the same, or a token of its own."
        )
    if earlier.state == "refused":
        raise ConfigError(
            f"{used}, and that order was refused: {earlier.reason} Once this is "
            "remedied, order it with another --submit-token."
        )
    return before


def _close(
    consortium: Consortium,
    pending: Path,
    text: str,
    state: Literal["accepted", "refused"],
    reason: str,
) -> None:
    """Store the outcome of an order, then remove the pending file."""
    closed = Outcome(state=state, reason=reason, at=datetime.now(UTC), signed=text)
    path = _done(consortium) / pending.name
    write_atomic(path, closed.model_dump_json(indent=1).encode(), point="order")
    pending.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _pending(consortium: Consortium) -> Path:
    return consortium.folder / "orders" / "pending"


def _done(consortium: Consortium) -> Path:
    return consortium.folder / "orders" / "done"
