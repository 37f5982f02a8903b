"""Debit the privacy ledger, and record each debit in the audit log.

The log holds the ledger's head after each debit; the log's own head leaves with every
reply and returns in the coordinator's receipts. So restoring an old ledger or an old
log is detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedgex.client.identity import AUDIT
from fedgex.client.ledger.book import Budget, Debit
from fedgex.client.ledger.ledger import FILE, Ledger, LedgerError
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.errors import TrustError
from fedgex.common.privacy import accounting
from fedgex.common.system.files import exclusive_lock, explained
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain, Head

if TYPE_CHECKING:  # imports torch, which takes seconds
    from fedgex.common.messages.requests import TrainRequest

CREATED, DEBITED = "ledger-created", "debited"
"""Events of the audit log, with the ledger's head in `ledger`."""

LOCK = "ledger.lock"
"""Lock file, held while the ledger is created."""


def charge(
    request: TrainRequest, settings: SiteSettings, patients: Sequence[str]
) -> None:
    """Debit a round before its computation; studies without patient privacy are free.

    Parameters
    ----------
    patients
        All in the cohort, whether the round draws them or not.

    Raises
    ------
    BudgetError
        If the round would exceed the budget.
    LedgerError
        If the ledger cannot be used.
    """
    study, order = request.study, request.round
    if study.privacy.patient is None:
        return
    about = Debit(
        contract="" if request.run is None else request.run.contract,
        run="" if request.run is None else request.run.run,  # none in the simulator
        type=keys.TRAIN,
        phase=order.phase,
        round=order.number,
        request=request.digest,
    )
    head = ready(settings.state_dir).debit(
        about,
        accounting.invocations(study, order.phase, order.number),
        patients,
        budget=budget(settings.policy),
    )
    if head not in heads(settings.state_dir):
        audit = Chain(settings.state_dir / AUDIT)
        audit.append(DEBITED, **asdict(about), ledger=asdict(head))


def budget(policy: Policy) -> Budget:
    """Return the budget of `policy.toml`."""
    return Budget(epsilon=policy.privacy_epsilon, delta=policy.privacy_delta)


def ready(state_dir: Path) -> Ledger:
    """Return the ledger, creating it if the audit log records none.

    Raises
    ------
    LedgerError
        As for `existing`.
    """
    if (found := existing(state_dir)) is not None:
        return found
    with explained(state_dir):
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with exclusive_lock(state_dir / LOCK):
        if (found := existing(state_dir)) is not None:  # made while we waited
            return found
        made = state_dir / FILE
        ledger = Ledger.open(state_dir) if made.exists() else Ledger.create(state_dir)
        # Last: a process that died before this left an empty ledger, which goes on.
        Chain(state_dir / AUDIT).append(CREATED, ledger=asdict(ledger.head))
        return ledger


def existing(state_dir: Path) -> Ledger | None:
    """Return the verified ledger, None if the audit log records none.

    Raises
    ------
    LedgerError
        If it is missing or unusable, or lacks a head that the log holds, as after a
        restore from a backup. It may be ahead of the log by the debit of a process
        that died.
    """
    known = heads(state_dir)
    if not known:
        _not_without_log(state_dir)
        return None
    ledger = Ledger.open(state_dir)
    book, last = ledger.read(), max(known, key=lambda head: head.index)
    if not book.contains(last):
        raise LedgerError(
            f"{ledger.path} ends with row {book.head.index}, and the audit log names "
            f"row {last.index} with another hash or none; expected a ledger that holds "
            "it. It was restored from a backup, or replaced. Nothing is computed under "
            "differential privacy. Put the newest ledger back, see "
            "docs/hospital-operation.md."
        )
    return ledger


def heads(state_dir: Path) -> list[Head]:
    """Return every head of the ledger that the audit log holds, oldest first.

    Raises
    ------
    LedgerError
        If the audit log cannot be read.
    """
    try:
        return [
            Head(**line["ledger"])
            for line in audit_log.events(state_dir / AUDIT, CREATED, DEBITED)
        ]
    except (TrustError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{state_dir / AUDIT} does not show what the privacy ledger was ({error}); "
            "expected the audit log as fedgex left it. Nothing is computed under "
            "differential privacy. Put the newest one back, see "
            "docs/hospital-operation.md."
        ) from error


def _not_without_log(state_dir: Path) -> None:
    """Refuse a ledger with rows of which the audit log has none."""
    if (state_dir / FILE).exists() and Ledger.open(state_dir).head.index:
        raise LedgerError(
            f"{state_dir / FILE} holds debits, and the audit log records "
            "none; expected both from one hospital and one time. Put the newest "
            f"{AUDIT} back, see docs/hospital-operation.md."
        )
