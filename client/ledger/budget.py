"""A hospital's privacy budget: spent, left, and the cost of a study.

The numbers are exact, and none of them leaves the hospital.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from fedgex.client.ledger import debit
from fedgex.client.ledger.book import Book, Budget, Debit, Row
from fedgex.client.settings import SiteSettings
from fedgex.common.privacy import accounting
from fedgex.common.privacy.accounting import Invocation
from fedgex.common.study import Study


@dataclass(frozen=True, kw_only=True)
class Use:
    """Mechanism that one run invoked in one phase, with one setting."""

    contract: str
    run: str
    phase: str
    mechanism: str
    noise_multiplier: float
    sample_rate: float
    rounds: int
    steps: int
    """Steps of all rounds."""
    patients: int
    """Distinct pseudonyms of all rounds; a patient may have one of an earlier release."""
    epsilon: float
    """Largest epsilon of any patient, from these rows only."""


@dataclass(frozen=True)
class Account:
    """A hospital's ledger and its budget."""

    book: Book
    budget: Budget

    @classmethod
    def of(cls, settings: SiteSettings) -> Self:
        """Return the account as it stands; an empty one if there is no ledger yet.

        Raises
        ------
        LedgerError
            If the ledger cannot be used, or is older than the audit log.
        """
        ledger = debit.existing(settings.state_dir)
        book = Book.empty() if ledger is None else ledger.read()
        return cls(book, debit.budget(settings.policy))

    @property
    def spent(self) -> float:
        """Largest epsilon of any patient, over everything in the ledger."""
        return self.book.spent(self.budget.delta)

    @property
    def left(self) -> float:
        """Rest of the budget; not the cost of a study, since epsilons do not add up."""
        return max(0.0, self.budget.epsilon - self.spent)

    def uses(self) -> list[Use]:
        """Group the ledger's rows by contract, run, phase and setting."""
        found: dict[tuple[str, str, str, float, float], list[Row]] = {}
        for row in self.book.rows:
            about, done = row.about, row.invocation
            setting = (done.noise_multiplier, done.sample_rate)
            key = (about.contract, about.run, about.phase, *setting)
            found.setdefault(key, []).append(row)
        return [self._use(*key, rows) for key, rows in found.items()]

    def study_epsilon(self, study: Study) -> float:
        """Return the epsilon of all planned rounds of a study, at the budget's delta.

        Raises
        ------
        ConfigError
            If the study has no patient-level privacy, or no noise meets its epsilon.
        """
        return accounting.epsilon(accounting.planned(study), self.budget.delta)

    def after(self, contract: str, study: Study) -> float:
        """Return the epsilon spent once the study's planned rounds are done."""
        return self._with(list(self._planned(contract, study)))

    def rounds_left(self, contract: str, study: Study) -> tuple[int, int]:
        """Return how many more rounds the budget permits, and how many are planned.

        Rounds that the contract's last run has begun are not counted.
        """
        rounds = list(self._planned(contract, study))
        least, most = 0, len(rounds)
        while least < most:  # spend grows with every round, so halving finds the last
            middle = (least + most + 1) // 2
            if self._with(rounds[:middle]) <= self.budget.epsilon:
                least = middle
            else:
                most = middle - 1
        return least, len(rounds)

    def _with(self, rounds: list[list[Invocation]]) -> float:
        adding = list(itertools.chain.from_iterable(rounds))
        return self.book.spent(self.budget.delta, adding=adding)

    def _planned(self, contract: str, study: Study) -> Iterator[list[Invocation]]:
        """Yield the invocations of each round that has not begun."""
        ours = [row.about for row in self.book.rows if row.about.contract == contract]
        begun = {(one.phase, one.round) for one in ours if one.run == ours[-1].run}
        for phase, training in study.phases.items():
            for number in range(1, training.rounds + 1):
                if (phase, number) not in begun:
                    yield accounting.invocations(study, phase, number)

    def _use(
        self,
        contract: str,
        run: str,
        phase: str,
        noise: float,
        rate: float,
        rows: list[Row],
    ) -> Use:
        book = self.book.only(rows)
        cohorts = book.cohorts.values()
        # A round asked again has further rows, for patients who were new to it.
        first: dict[Debit, str] = {}
        once = [r for r in rows if first.setdefault(r.about, r.cohort) == r.cohort]
        return Use(
            contract=contract,
            run=run,
            phase=phase,
            mechanism="DP-SGD" if rate < 1 else "Gaussian",
            noise_multiplier=noise,
            sample_rate=rate,
            rounds=len({row.about.round for row in rows}),
            steps=sum(row.invocation.steps for row in once),
            patients=len(frozenset[bytes]().union(*cohorts)),
            epsilon=book.spent(self.budget.delta),
        )
