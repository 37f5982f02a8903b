"""The rows of a privacy ledger, and the epsilon that each patient has spent.

A row holds one mechanism on one cohort, a set of patients' HMACs. A patient's epsilon
composes all rows whose cohorts contain the patient; for several patients, the maximum
counts. So a new patient, file or study resets no epsilon.

A patient has one HMAC, of its key (`patient_key`), and, if the identifier was written
otherwise in earlier releases, a second one, of that. Cohorts with either count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self

from fedgex.common.canonical import canonical_json
from fedgex.common.privacy import accounting
from fedgex.common.privacy.accounting import Invocation
from fedgex.common.trust.audit_log import Head


@dataclass(frozen=True, kw_only=True, slots=True)
class Debit:
    """Identity of a debited computation: the request that it answers."""

    contract: str
    """Hash; empty in the simulator."""
    run: str
    """Empty in the simulator."""
    type: str
    """Type of the message."""
    phase: str
    round: int
    request: str
    """Digest of the request, see `receipt.request_digest`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Limit of each patient's epsilon, composed over all studies."""

    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One invocation of a mechanism on a cohort."""

    n: int
    """From 1."""
    time: str
    """UTC; not used in accounting."""
    about: Debit
    invocation: Invocation
    cohort: str
    """Digest of the patients' HMACs."""
    previous: str
    """Hash of the row before; that of the ledger itself for the first."""
    hash: str

    def content(self) -> dict[str, str | int | float]:
        """Return the hashed content."""
        return {
            "n": self.n,
            "time": self.time,
            **asdict(self.about),
            "noise_multiplier": float(self.invocation.noise_multiplier),
            "sample_rate": float(self.invocation.sample_rate),
            "steps": int(self.invocation.steps),
            "cohort": self.cohort,
            "previous": self.previous,
        }


@dataclass(frozen=True)
class Book:
    """Verified content of a ledger."""

    origin: str
    """Hash that identifies the ledger; `previous` of its first row."""
    rows: tuple[Row, ...]
    cohorts: dict[str, frozenset[bytes]]
    """HMACs of the patients of each cohort, by its digest."""

    @property
    def head(self) -> Head:
        """Number and hash of the last row."""
        return Head(len(self.rows), self.rows[-1].hash if self.rows else self.origin)

    def contains(self, head: Head) -> bool:
        """Return whether the ledger extends that head."""
        if head.index == 0:
            return head.hash == self.origin
        rows = self.rows
        return 0 < head.index <= len(rows) and rows[head.index - 1].hash == head.hash

    @classmethod
    def empty(cls, origin: str = "") -> Self:
        """Return a ledger without rows."""
        return cls(origin, (), {})

    def only(self, rows: Iterable[Row]) -> Book:
        """Return a ledger of these rows only."""
        kept = tuple(rows)
        named = {row.cohort for row in kept}
        cohorts = {d: found for d, found in self.cohorts.items() if d in named}
        return Book(self.origin, kept, cohorts)

    def recomputed(self, about: Debit) -> int:
        """Return how many debits of a contract repeat a round of a run, with this one.

        Its plan holds each round of a run once. Rows without a contract are those of a
        simulation, whose runs have no names, and do not count.
        """
        if not about.contract:
            return 0
        found = (row.about for row in self.rows)
        debits = {about, *(each for each in found if each.contract == about.contract)}
        rounds = {(each.run, each.phase, each.round) for each in debits}
        return len(debits) - len(rounds)

    def spent(
        self,
        delta: float,
        patients: Iterable[frozenset[bytes]] | None = None,
        adding: Sequence[Invocation] = (),
    ) -> float:
        """Return the largest epsilon of any patient.

        Parameters
        ----------
        patients
            Pseudonyms of each; None for all in the ledger.
        adding
            Invocations on all of these patients that are not in the ledger.
        """
        sets = self._sets if patients is None else self._maximal(patients)
        histories = [
            [row.invocation for row in self.rows if row.cohort in cohorts]
            for cohorts in sets or {frozenset()}
        ]
        return max(accounting.epsilon([*h, *adding], delta) for h in histories)

    @cached_property
    def pseudonyms(self) -> frozenset[bytes]:
        """HMACs of all patients in the ledger."""
        return frozenset().union(*self.cohorts.values())

    @cached_property
    def _sets(self) -> set[frozenset[str]]:
        return self._maximal(frozenset({each}) for each in self.pseudonyms)

    def _maximal(self, patients: Iterable[frozenset[bytes]]) -> set[frozenset[str]]:
        """Return each patient's set of cohorts, without subsets of others' sets.

        Epsilon is monotone in the set of cohorts, so these few sets give the maximum
        over thousands of patients.
        """
        members = self.cohorts.items()
        found = {
            frozenset(d for d, all in members if not all.isdisjoint(patient))
            for patient in patients
        }
        return {one for one in found if not any(one < other for other in found)}


def row_of(by_name: dict[str, Any]) -> Row:
    """Build a row from its columns by name."""
    of_debit = {field.name: by_name.pop(field.name) for field in fields(Debit)}
    of_mechanism = {field.name: by_name.pop(field.name) for field in fields(Invocation)}
    return Row(
        **by_name,
        about=Debit(**of_debit),
        invocation=Invocation(**of_mechanism),
    )


def content_hash(content: dict[str, str | int | float]) -> str:
    """Return the SHA-256 of canonical JSON."""
    text = canonical_json(content, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
