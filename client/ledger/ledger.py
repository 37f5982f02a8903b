"""Privacy ledger: every use of a patient's data under differential privacy.

An SQLite file in the hospital's state directory, with one row for each invocation of
a mechanism, over all studies and runs. Rows are written before the computation, chained
by hash, and never removed; patients are stored as HMACs under a key that never leaves.

A ledger that cannot be read and verified completely is refused, never repaired.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Self

from fedgex.client.ledger.book import Book, Budget, Debit, Row, content_hash, row_of
from fedgex.common.codes import Code
from fedgex.common.data.patients import patient_key
from fedgex.common.errors import FedgexError
from fedgex.common.privacy.accounting import Invocation
from fedgex.common.system import failpoints
from fedgex.common.system.files import explained, sync, write_atomic
from fedgex.common.trust.audit_log import Head

FILE, KEY = "ledger.sqlite", "ledger.key"
"""Names of the ledger and of its key, in the state directory."""

FORMAT = 1
RECOMPUTED = 2
"""Rounds that a contract may have debited again, under other bytes, in all its runs:
a server that lost its last checkpoint repeats one, and so does secure aggregation."""
WAIT_S = 60.0
"""Longest wait for another process's debit."""

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


class LedgerError(FedgexError):
    """The ledger is missing, unreadable, torn, changed or rolled back."""

    code = Code.LEDGER_UNUSABLE


class BudgetError(LedgerError):
    """The budget would be exceeded."""

    code = Code.BUDGET_EXCEEDED


class PlanError(LedgerError):
    """The contract would debit more than it plans."""

    code = Code.PLAN_EXCEEDED


class DeltaError(LedgerError):
    """The budget's delta could expose a patient completely."""

    code = Code.DELTA_TOO_LARGE


class Ledger:
    """A hospital's ledger, which several processes may debit at once."""

    def __init__(self, state_dir: Path, key: bytes) -> None:
        self.path = state_dir / FILE
        self._key = key

    @classmethod
    def create(cls, state_dir: Path) -> Self:
        """Create an empty ledger and its key; the caller holds the lock.

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
        ledger.read()
        return ledger

    @property
    def head(self) -> Head:
        """Number and hash of the last row; index 0 for an empty ledger."""
        return self.read().head

    def rows(self) -> tuple[Row, ...]:
        """Return all rows, oldest first."""
        return self.read().rows

    def spent(self, patients: Sequence[str] | None, delta: float) -> float:
        """Return the largest epsilon of any of these patients; of all, for None."""
        book = self.read()
        named = None if patients is None else self._pseudonyms(patients).values()
        return book.spent(delta, named)

    def debit(
        self,
        about: Debit,
        invocations: Sequence[Invocation],
        patients: Sequence[str],
        *,
        budget: Budget,
    ) -> Head:
        """Charge a computation before it runs; the debit is on disk on return.

        A repeated debit charges only patients who are new to it, even if the budget was
        lowered since.

        Parameters
        ----------
        patients
            Identifiers; those with one key count once.

        Returns
        -------
        Head
            Head of the ledger that holds the debit.

        Raises
        ------
        DeltaError
            If the budget's delta is not below 1 / patients; nothing is charged.
        BudgetError
            If any patient's spend would exceed the budget; nothing is charged.
        PlanError
            If the contract had rounds of its runs debited again `RECOMPUTED` times, and
            this would be one more; nothing is charged.
        LedgerError
            If the ledger cannot be used, or was debited otherwise for the same.
        """
        ours = self._pseudonyms(patients)
        if budget.delta * len(ours) >= 1:
            raise DeltaError(
                f"privacy_delta in policy.toml is {budget.delta:g}, and there are 1 / "
                "privacy_delta patients or more; expected it far below 1 / patients, "
                "or a patient's data could be revealed completely. Set a smaller one."
            )
        with self._exclusive() as connection:
            book = self._read(connection)
            before = book.only(row for row in book.rows if row.about == about)
            if before.rows and {r.invocation for r in before.rows} != set(invocations):
                raise LedgerError(
                    f"{self.path}: {about.phase} round {about.round} was debited with "
                    "other noise, rate or steps than it would be computed with now. "
                    "Install the release of fedgex that the round began with."
                )
            fresh = {k: p for k, p in ours.items() if p.isdisjoint(before.pseudonyms)}
            if not fresh or not invocations:
                return book.head
            if not before.rows and book.recomputed(about) > RECOMPUTED:
                raise PlanError(
                    f"{about.phase} round {about.round} was debited before, for another"
                    f" request, as {RECOMPUTED} more of this contract were. Nothing was"
                    " computed. See docs/privacy.md, the budget."
                )
            after = book.spent(budget.delta, fresh.values(), invocations)
            if after > budget.epsilon:
                raise BudgetError(
                    f"{about.phase} round {about.round} would bring a patient's "
                    f"epsilon to {after:.4g} at delta {budget.delta:g}; policy.toml "
                    f"permits {budget.epsilon:g}. Nothing was computed; the study goes "
                    "on without this hospital. See docs/privacy.md, the budget."
                )
            # A pseudonym of an earlier release goes on, so that it shows all it spent.
            earlier = frozenset().union(*fresh.values()) & book.pseudonyms
            charged = earlier.union(fresh)
            head = _insert(connection, book, about, invocations, charged)
            failpoints.reach("ledger.before")
            connection.execute("COMMIT")
            if not self._read(connection).contains(head):
                raise _unusable(self.path, f"row {head.index} was not kept")
        failpoints.reach("ledger.debited")
        return head

    def read(self) -> Book:
        """Return the content of the ledger, verified.

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
    def _exclusive(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction during which no other process can write."""
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection  # what is not committed is undone as it is closed

    def _read(self, connection: sqlite3.Connection) -> Book:
        try:
            return self._parsed(connection)
        except (KeyError, TypeError, ValueError) as error:  # other columns or types
            raise _unusable(self.path, f"it cannot be used ({error})") from error

    def _parsed(self, connection: sqlite3.Connection) -> Book:
        checked = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if checked != ("ok",):
            raise _unusable(self.path, f"it is damaged ({checked[0]})")
        if _objects(connection) != _our_objects():
            raise _unusable(
                self.path,
                "it holds tables, views, triggers or indices that are not a ledger's",
            )
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
        origin = content_hash({"format": FORMAT, "key_check": about[0][1]})
        head, rows = Head(0, origin), list[Row]()
        found = connection.execute("SELECT * FROM rows ORDER BY n")
        names = [column[0] for column in found.description]
        for values in found:
            row = row_of(dict(zip(names, values, strict=True)))
            in_order = (row.n, row.previous) == (head.index + 1, head.hash)
            if not in_order or row.cohort not in cohorts:
                raise _unusable(
                    self.path,
                    f"row {head.index + 1} is not what follows the row before: rows or "
                    "cohorts were removed, added or reordered",
                )
            if not row.invocation.is_possible:
                raise _unusable(self.path, f"row {row.n} holds no mechanism")
            if row.hash != content_hash(row.content()):
                raise _unusable(self.path, f"row {row.n} was changed")
            rows.append(row)
            head = Head(row.n, row.hash)
        return Book(origin, tuple(rows), cohorts)

    def _members(self, digest: str, content: bytes) -> frozenset[bytes]:
        if hashlib.sha256(content).hexdigest() != digest:
            raise _unusable(self.path, f"cohort {digest[:12]} was changed")
        starts = range(0, len(content), _HMAC_BYTES)
        return frozenset(content[i : i + _HMAC_BYTES] for i in starts)

    def _pseudonyms(self, patients: Iterable[str]) -> dict[bytes, frozenset[bytes]]:
        """Return all pseudonyms of each patient, by the one of its key."""
        found: dict[bytes, frozenset[bytes]] = {}
        for patient in set(patients):
            key = self._hmac(patient_key(patient))
            both = {key, self._hmac(_earlier_key(patient))}
            found[key] = found.get(key, frozenset()) | both
        return found

    def _hmac(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode(), "sha256")


def _earlier_key(patient: str) -> str:
    """Return what stood for a patient in the ledgers of fedgex 0.1.0."""
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
        values = row.content()
        head = Head(row.n, content_hash(values))
        values["hash"] = head.hash
        connection.execute(
            f"INSERT INTO rows ({', '.join(values)}) "
            f"VALUES ({', '.join('?' * len(values))})",
            tuple(values.values()),
        )
    return head


@cache
def _our_objects() -> frozenset[tuple[str | None, ...]]:
    """Return what the schema makes."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_SCHEMA)
        return _objects(connection)


def _objects(connection: sqlite3.Connection) -> frozenset[tuple[str | None, ...]]:
    """Return type, name, table and SQL of everything in a database."""
    found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
    return frozenset(found)


def _key_check(key: bytes) -> str:
    """Return a check value that identifies the key without revealing it."""
    return hmac.digest(key, b"fedgex ledger\n", "sha256").hex()


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing SQLite file; raise its errors as LedgerError.

    With a rollback journal, not a write-ahead log, the ledger is one file. EXTRA
    also syncs the journal's removal, so that a power cut undoes no logged debit.
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
