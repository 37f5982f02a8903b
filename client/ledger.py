"""What each patient's data were used for under differential privacy, for ever.

SQLite in the hospital's state directory. One row for each invocation of a mechanism,
over all studies and runs, written before anything is computed. Rows are chained by
hashes, over all that they say. A row is about a cohort: the set of patients' HMACs,
under a key that never leaves. A patient's spend is the composition of all rows whose
cohort the patient is in; that of several patients is the largest of theirs. So a new
patient, a new file or another study resets nobody's spend, and time plays no part.

Nothing is repaired: what cannot be read in full and verified in full is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Self

from fedgex.common import failpoints, privacy
from fedgex.common.canonical import canonical_json
from fedgex.common.chain import Head
from fedgex.common.codes import Code
from fedgex.common.errors import FedgexError
from fedgex.common.files import explained, sync, write_atomic
from fedgex.common.privacy import Invocation

FILE, KEY = "ledger.sqlite", "ledger.key"
"""Names of the ledger and of its key, in the state directory."""

FORMAT = 1
WAIT_S = 60.0
"""How long a process waits for another one's debit."""

_SCHEMA = """
CREATE TABLE ledger (format INTEGER NOT NULL, key_check TEXT NOT NULL);
CREATE TABLE cohorts (digest TEXT PRIMARY KEY, patients BLOB NOT NULL);
CREATE TABLE rows (
    n INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    contract TEXT NOT NULL,
    run TEXT NOT NULL,
    type TEXT NOT NULL,
    phase TEXT NOT NULL,
    round INTEGER NOT NULL,
    request TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    cohort TEXT NOT NULL REFERENCES cohorts (digest),
    previous TEXT NOT NULL,
    hash TEXT NOT NULL
);
"""
_HMAC_BYTES = 32
_COLUMNS = (
    "n, time, contract, run, type, phase, round, request, "
    "noise_multiplier, sample_rate, steps, cohort, previous, hash"
)


class LedgerError(FedgexError):
    """The ledger is missing, unreadable, torn, changed or rolled back."""

    code = Code.LEDGER_UNUSABLE


class BudgetError(LedgerError):
    """The budget would be exceeded."""

    code = Code.BUDGET_EXCEEDED


class DeltaError(LedgerError):
    """The budget's delta could give a patient away whole."""

    code = Code.DELTA_TOO_LARGE


@dataclass(frozen=True, kw_only=True, slots=True)
class Debit:
    """What is computed on the patients: the question that a site answers."""

    contract: str
    """Hash; empty in the simulator."""
    run: str
    """Empty in the simulator."""
    type: str
    """Type of the message."""
    phase: str
    round: int
    request: str
    """Digest of what is asked, see `receipt.request_digest`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What each patient may be exposed to, over all studies together."""

    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One invocation of a mechanism on a cohort."""

    n: int
    """From 1."""
    time: str
    """UTC, for people alone."""
    about: Debit
    invocation: Invocation
    cohort: str
    """Digest of the patients' HMACs."""
    previous: str
    """Hash of the row before; that of the ledger itself for the first."""
    hash: str

    def said(self) -> dict[str, str | int | float]:
        """Return all that the hash is over."""
        return {
            "n": self.n,
            "time": self.time,
            **asdict(self.about),
            **_columns(self.invocation),
            "cohort": self.cohort,
            "previous": self.previous,
        }


@dataclass(frozen=True)
class Book:
    """All that a ledger said at one moment, verified."""

    origin: str
    """Hash that the first row names: of this ledger and no other."""
    rows: tuple[Row, ...]
    cohorts: dict[str, frozenset[bytes]]
    """HMACs of the patients of each cohort, by its digest."""

    @property
    def head(self) -> Head:
        """Number and hash of the last row."""
        return Head(len(self.rows), self.rows[-1].hash if self.rows else self.origin)

    def contains(self, head: Head) -> bool:
        """Whether the ledger once had that head, and so goes on from it."""
        if head.index == 0:
            return head.hash == self.origin
        rows = self.rows
        return 0 < head.index <= len(rows) and rows[head.index - 1].hash == head.hash

    def only(self, rows: Iterable[Row]) -> Book:
        """Return what the ledger would be if it held these rows alone."""
        kept = tuple(rows)
        named = {row.cohort for row in kept}
        cohorts = {d: found for d, found in self.cohorts.items() if d in named}
        return Book(self.origin, kept, cohorts)

    def spent(
        self,
        delta: float,
        patients: Collection[bytes] | None = None,
        adding: Sequence[Invocation] = (),
    ) -> float:
        """Return the largest epsilon of any patient.

        Parameters
        ----------
        patients
            HMACs; None for all that the ledger knows.
        adding
            Invocations on all of these patients that are not in the ledger.
        """
        sets = self._sets if patients is None else self._maximal(patients)
        histories = [
            [row.invocation for row in self.rows if row.cohort in cohorts]
            for cohorts in sets or {frozenset()}
        ]
        return max(privacy.epsilon([*h, *adding], delta) for h in histories)

    @cached_property
    def _sets(self) -> set[frozenset[str]]:
        return self._maximal(frozenset().union(*self.cohorts.values()))

    def _maximal(self, patients: Collection[bytes]) -> set[frozenset[str]]:
        """Return the sets of cohorts that patients are in, but for those within others.

        Patients of the same cohorts have the same spend, and who is in more of them has
        spent no less: so few sets stand for thousands of patients.
        """
        members = self.cohorts.items()
        found = {frozenset(d for d, all in members if p in all) for p in patients}
        return {one for one in found if not any(one < other for other in found)}


class Ledger:
    """A hospital's ledger, which several processes may debit at once."""

    def __init__(self, state_dir: Path, key: bytes) -> None:
        self.path = state_dir / FILE
        self._key = key

    @classmethod
    def create(cls, state_dir: Path) -> Self:
        """Make an empty ledger and its key; the caller sees to it that it is alone.

        Raises
        ------
        LedgerError
            If there is a ledger already; it is never overwritten.
        """
        path = state_dir / FILE
        if path.exists():
            raise LedgerError(f"{path} exists; a ledger is never overwritten.")
        key = secrets.token_bytes(32)
        write_atomic(state_dir / KEY, key.hex().encode() + b"\n")
        partial = state_dir / f".{FILE}.partial"
        with explained(path):
            partial.unlink(missing_ok=True)  # left by a call that was cut off
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o600))
            with _connected(partial) as connection:
                connection.executescript(_SCHEMA)
                values = (FORMAT, _key_check(key))
                connection.execute("INSERT INTO ledger VALUES (?, ?)", values)
            sync(partial)
            partial.rename(path)
            sync(state_dir)
        return cls.open(state_dir)

    @classmethod
    def open(cls, state_dir: Path) -> Self:
        """Open a ledger and verify all of it.

        Raises
        ------
        LedgerError
            If it or its key is missing, unreadable, torn, changed, or another's.
        """
        path = state_dir / KEY
        try:
            key = bytes.fromhex(path.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it holds no key"
            raise _unusable(path, f"the ledger's key cannot be read ({why})") from error
        ledger = cls(state_dir, key)
        ledger.verify()
        return ledger

    @property
    def head(self) -> Head:
        """Number and hash of the last row; index 0 for an empty ledger."""
        return self.read().head

    def rows(self) -> tuple[Row, ...]:
        """Return all rows, oldest first."""
        return self.read().rows

    def verify(self) -> Head:
        """Follow the whole chain and every cohort, and return the head.

        Raises
        ------
        LedgerError
            Naming what is wrong first.
        """
        return self.read().head

    def spent(self, patients: Sequence[str] | None, delta: float) -> float:
        """Return the largest epsilon of any of these patients; of all, for None."""
        book = self.read()
        return book.spent(delta, None if patients is None else self._hmacs(patients))

    def debit(
        self,
        about: Debit,
        invocations: Sequence[Invocation],
        patients: Sequence[str],
        *,
        budget: Budget,
    ) -> Head:
        """Charge what is about to be computed; it is on the disk when this returns.

        Asked again about the same, whoever was charged is not charged again, even where
        the budget was lowered since: what was debited may be computed.

        Parameters
        ----------
        patients
            Identifiers; of a patient with several samples, once or more.

        Returns
        -------
        Head
            Of the ledger, which holds the debit.

        Raises
        ------
        DeltaError
            If the budget's delta is not below 1 / patients; nothing is charged.
        BudgetError
            If any patient's spend would exceed the budget; nothing is charged.
        LedgerError
            If the ledger cannot be used, or was debited otherwise for the same.
        """
        ours = self._hmacs(patients)
        if budget.delta * len(ours) >= 1:
            raise DeltaError(
                f"privacy_delta in policy.toml is {budget.delta:g}, and there are 1 / "
                "privacy_delta patients or more; expected it far below 1 / patients, "
                "or some patient may be given away whole. Set a smaller one."
            )
        with self._alone() as connection:
            book = self._read(connection)
            before = book.only(row for row in book.rows if row.about == about)
            if before.rows and {r.invocation for r in before.rows} != set(invocations):
                raise LedgerError(
                    f"{self.path}: {about.phase} round {about.round} was debited with "
                    "other noise, rate or steps than it would be computed with now. "
                    "Install the release of fedgex that the round began with."
                )
            fresh = ours.difference(*before.cohorts.values())
            if not fresh or not invocations:
                return book.head
            after = book.spent(budget.delta, fresh, invocations)
            if after > budget.epsilon:
                raise BudgetError(
                    f"{about.phase} round {about.round} would bring a patient's "
                    f"epsilon to {after:.4g} at delta {budget.delta:g}; policy.toml "
                    f"permits {budget.epsilon:g}. Nothing was computed; the study goes "
                    "on without this hospital. See docs/privacy.md, the budget."
                )
            head = _insert(connection, book, about, invocations, fresh)
            failpoints.reach("ledger.before")
            connection.execute("COMMIT")
        failpoints.reach("ledger.debited")
        return head

    def read(self) -> Book:
        """Return all that the ledger says.

        Raises
        ------
        LedgerError
            If it is missing, or anything of it is unreadable, torn or changed.
        """
        with self._open() as connection:
            connection.execute("BEGIN")
            return self._read(connection)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if not self.path.exists():
            raise _unusable(self.path, "it is not there")
        with _connected(self.path) as connection:
            yield connection

    @contextmanager
    def _alone(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction that no other process writes beside."""
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection  # what is not committed is undone as it is closed

    def _read(self, connection: sqlite3.Connection) -> Book:
        try:
            return self._parsed(connection)
        except (TypeError, ValueError) as error:  # values of another type
            raise _unusable(self.path, f"it cannot be used ({error})") from error

    def _parsed(self, connection: sqlite3.Connection) -> Book:
        checked = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if checked != ("ok",):
            raise _unusable(self.path, f"it is damaged ({checked[0]})")
        about = connection.execute("SELECT format, key_check FROM ledger").fetchall()
        if about != [(FORMAT, _key_check(self._key))]:
            raise _unusable(
                self.path,
                f"it was written in another format than {FORMAT}, or under another key "
                f"than {KEY} holds",
            )
        cohorts = {
            digest: self._members(digest, content)
            for digest, content in connection.execute(
                "SELECT digest, patients FROM cohorts"
            )
        }
        head = Head(0, _hash({"format": FORMAT, "key_check": about[0][1]}))
        book = Book(head.hash, (), {})
        rows: list[Row] = []
        for values in connection.execute(f"SELECT {_COLUMNS} FROM rows ORDER BY n"):
            row = _row(values)
            in_order = (row.n, row.previous) == (head.index + 1, head.hash)
            if not in_order or row.cohort not in cohorts:
                raise _unusable(
                    self.path,
                    f"row {head.index + 1} is not what follows the row before: rows or "
                    "cohorts were removed, added or reordered",
                )
            if row.hash != _hash(row.said()):
                raise _unusable(self.path, f"row {row.n} was changed")
            rows.append(row)
            head = Head(row.n, row.hash)
        return Book(book.origin, tuple(rows), cohorts)

    def _members(self, digest: str, content: bytes) -> frozenset[bytes]:
        if hashlib.sha256(content).hexdigest() != digest:
            raise _unusable(self.path, f"cohort {digest[:12]} was changed")
        starts = range(0, len(content), _HMAC_BYTES)
        return frozenset(content[i : i + _HMAC_BYTES] for i in starts)

    def _hmacs(self, patients: Iterable[str]) -> frozenset[bytes]:
        return frozenset(
            hmac.digest(self._key, _normal(patient).encode(), "sha256")
            for patient in set(patients)
        )


def _normal(patient: str) -> str:
    """Return an identifier without what spreadsheets and exports change.

    Two patients who are told apart by such a thing alone would share one spend, which
    is at least each one's own.
    """
    return unicodedata.normalize("NFKC", patient).strip().casefold()


def _insert(
    connection: sqlite3.Connection,
    book: Book,
    about: Debit,
    invocations: Sequence[Invocation],
    patients: frozenset[bytes],
) -> Head:
    content = b"".join(sorted(patients))
    cohort = hashlib.sha256(content).hexdigest()
    connection.execute("INSERT OR IGNORE INTO cohorts VALUES (?, ?)", (cohort, content))
    head, now = book.head, datetime.now(UTC).isoformat(timespec="seconds")
    for invocation in invocations:
        row = Row(
            n=head.index + 1,
            time=now,
            about=about,
            invocation=invocation,
            cohort=cohort,
            previous=head.hash,
            hash="",
        )
        said = row.said()
        head = Head(row.n, _hash(said))
        marks = ", ".join("?" * (len(said) + 1))
        connection.execute(
            f"INSERT INTO rows ({_COLUMNS}) VALUES ({marks})",
            (*said.values(), head.hash),
        )
    return head


def _columns(invocation: Invocation) -> dict[str, float | int]:
    return {
        "noise_multiplier": float(invocation.noise_multiplier),
        "sample_rate": float(invocation.sample_rate),
        "steps": int(invocation.steps),
    }


def _row(values: tuple[object, ...]) -> Row:
    by_name = dict(zip(_COLUMNS.split(", "), values, strict=True))
    of_debit = {field.name: by_name.pop(field.name) for field in fields(Debit)}
    of_mechanism = {field.name: by_name.pop(field.name) for field in fields(Invocation)}
    return Row(
        **by_name,  # type: ignore[arg-type]  # the hash vouches for the types
        about=Debit(**of_debit),  # type: ignore[arg-type]
        invocation=Invocation(**of_mechanism),  # type: ignore[arg-type]
    )


def _hash(said: dict[str, str | int | float]) -> str:
    text = canonical_json(said, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _key_check(key: bytes) -> str:
    """Return what tells this key from another without telling the key."""
    return hmac.digest(key, b"fedgex ledger\n", "sha256").hex()


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an SQLite file that exists, and turn what goes wrong into a LedgerError.

    A rollback journal, not a write-ahead log: at rest, one file is the ledger. EXTRA
    also makes the journal's end survive a power cut, so that no debit is undone that
    the audit log knows of.
    """
    address = f"{path.absolute().as_uri()}?mode=rw"
    try:
        with closing(
            sqlite3.connect(address, uri=True, isolation_level=None, timeout=WAIT_S)
        ) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = EXTRA")
            yield connection
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _unusable(path, f"it cannot be used ({error})") from error


def _unusable(path: Path, found: str) -> LedgerError:
    return LedgerError(
        f"{path}: {found}; expected the privacy ledger as fedgex left it. Nothing is "
        f"computed under differential privacy. Keep what is there, and put the newest "
        f"{FILE} and {KEY} back, see docs/hospital-operation.md."
    )
