"""The privacy guarantee to a patient as a page, in the terms of NIST SP 800-226.

References
----------
Near, Darais, Lefkovitz, Howarth (2025), Guidelines for Evaluating Differential Privacy
Guarantees, NIST SP 800-226, doi 10.6028/NIST.SP.800-226.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version

from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.ledger.budget import Account, Use
from fedgex.client.settings import SiteSettings


def statement(settings: SiteSettings) -> str:
    """Return the privacy guarantee at this hospital today, as Markdown.

    Raises
    ------
    LedgerError
        If the ledger cannot be used: then nothing can be stated.
    ConfigError
        If the hospital has not joined a consortium.
    """
    account = Account.of(settings)
    budget, head = account.budget, account.book.head
    return _TEXT.format(
        name=settings.name,
        day=f"{datetime.now(UTC):%Y-%m-%d}",
        version=version("fedgex"),
        spent=f"{account.spent:.3f}",
        delta=f"{budget.delta:g}",
        budget=f"{budget.epsilon:g}",
        rows=len(account.book.rows),
        head=head.hash or "none",
        uses=_table(account.uses()),
        unprotected=_unprotected(settings),
    )


def _table(uses: list[Use]) -> str:
    if not uses:
        return "None yet."
    head = (
        "| Contract | Run | Phase | Rounds | Mechanism | Noise multiplier | Sampling "
        "rate | Steps | Own epsilon |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(
        f"| {use.contract[:16] or 'none'} | {use.run or 'none'} | {use.phase} | "
        f"{use.rounds} | {use.mechanism} | {use.noise_multiplier:.4g} | "
        f"{use.sample_rate:g} | {use.steps} | {use.epsilon:.3f} |"
        for use in uses
    )


def _unprotected(settings: SiteSettings) -> str:
    """List the approved studies without patient-level privacy."""
    approvals = ApprovalStore.of(settings)
    named = []
    for received in approvals.contracts():
        decision = approvals.decision(received.hash)
        approved = decision is not None and decision.decision != "rejected"
        if approved and received.contract.study.privacy.patient is None:
            named.append(f"{received.contract.study.name} ({received.hash[:16]})")
    if not named:
        return "None was approved here."
    return f"Approved here: {', '.join(named)}. **They are not covered.**"


_TEXT = """\
# Differential privacy at {name}

As of {day}, by fedgex {version}. In the terms of NIST SP 800-226.

| | |
|---|---|
| Unit of privacy | one patient of this hospital, with all samples under one identifier |
| Neighbouring data | differ by one patient, added or removed |
| Guarantee | (epsilon, delta)-differential privacy |
| Epsilon spent | **{spent}** at delta {delta}, of the patient who was used most |
| Budget | epsilon {budget} at delta {delta}, for each patient, over all studies, without end |
| Model of trust | the hospital is trusted with its data; the consortium's server, the other hospitals and every reader of the model are not |

A round that would bring any patient above the budget is declined before it is computed.

## What was released

{uses}

Epsilon does not add up over the table: all rows compose to {spent}.

## Mechanism

- **DP-SGD.** In each step every patient takes part with the sampling rate,
  independently of the others; each one's gradient is scaled down to a fixed norm; Gaussian noise of the
  noise multiplier times that norm is added to the sum. What leaves is the model after a round's steps.
- **Gaussian.** Where the sampling rate is 1: counts of patients in each class, with noise.
- Noise and sampling come from the operating system's cryptographic generator.

## Sampling

Poisson, and secret: nobody outside learns who took part in a step. The accounting relies on that. The number of steps, the
rate and the divisor of the sum are public and do not depend on the data.

## Accounting

PRV accountant (Gopi, Lee, Wutschitz 2021), an upper bound; RDP (Mironov 2017) where that is tighter or epsilon is above 100.
Composition is adaptive and sequential, over all rounds, phases, runs and studies of the ledger: {rows} rows, head
`{head}`. A patient's epsilon is that of the rows that the patient is in; who left the data stays in the ledger. A round that
was computed again before its first answer left is charged once. Each contract holds settings under which all planned
rounds meet a target.

## What is not covered

- Studies without patient-level privacy. {unprotected}
- What left this hospital by any other way than fedgex, and what fedgex sent before the ledger began.
- Which genes the hospital measures, that it participates, when it answers and after how long, and the codes with which it
  refuses: a hospital that declines because a budget is exhausted or a cohort is too small says so.
- Relatives. A patient's data reveal something about those who share genes with the patient; a family of k is protected
  as a group, at about k times epsilon.
- Patients under more than one identifier: each identifier is a unit.
- What is learnt about a patient from what holds of people at large; the model is for that.
- Predictions that the hospital itself makes with a model and passes on.
- Reading of memory, timing or power on the hospital's own machine, and people with access to its data.

## Tuning

Each run stands in the ledger, also one made to choose a setting: trials are charged like everything else. What
was tuned on public or simulated data costs nothing here. The hold-out on which models are judged is public and the server's.

## How to check

`fedgex-site ledger verify` follows the chain of the ledger and compares it with the audit log; `ledger export` prints all rows
for another accountant."""  # noqa: E501
