"""A privacy ledger that somebody with access to its file has prepared.

The hash chain finds rows that were changed; a schema that is not a ledger's could make
rows that are never there, or hide some.
"""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from fedgex.client.ledger.book import Budget, Debit, content_hash
from fedgex.client.ledger.ledger import FILE, Ledger, LedgerError
from fedgex.common.privacy.accounting import Invocation

ORDER = Debit(
    contract="c", run="r", type="train", phase="pretraining", round=1, request="1"
)
STEPS = Invocation(noise_multiplier=1.0, sample_rate=1.0)
PLENTY = Budget(epsilon=100.0, delta=1e-5)
OTHERS = {
    "a trigger that deletes each new row": """
        CREATE TRIGGER gone AFTER INSERT ON rows
        BEGIN DELETE FROM rows WHERE n = NEW.n; END""",
    "a trigger that adds noise to each new row": """
        CREATE TRIGGER more AFTER INSERT ON rows
        BEGIN UPDATE rows SET noise_multiplier = 1e4 WHERE n = NEW.n; END""",
    "a view in place of the rows": """
        ALTER TABLE rows RENAME TO hidden;
        CREATE VIEW rows AS SELECT * FROM hidden WHERE n < 1""",
    "another table": "CREATE TABLE more (n INTEGER)",
    "another index": "CREATE INDEX quick ON rows (contract)",
    "another column": "ALTER TABLE rows ADD COLUMN note TEXT",
}


def charge(ledger: Ledger, number: int) -> None:
    order = replace(ORDER, round=number, request=str(number))
    ledger.debit(order, [STEPS], ["a", "b"], budget=PLENTY)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger.create(tmp_path)
    charge(made, 1)
    return made


@pytest.mark.parametrize("schema", OTHERS.values(), ids=OTHERS.keys())
def test_a_ledger_of_another_schema_is_refused_before_anything_is_computed(
    ledger: Ledger, tmp_path: Path, schema: str
) -> None:
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.executescript(schema)

    with pytest.raises(LedgerError, match="not a ledger's"):
        charge(ledger, 2)
    with pytest.raises(LedgerError, match="not a ledger's"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize("noise", [0.0, -1.0])
def test_a_row_of_an_impossible_mechanism_is_refused(
    ledger: Ledger, tmp_path: Path, noise: float
) -> None:
    (row,) = ledger.rows()
    other = replace(row, invocation=replace(row.invocation, noise_multiplier=noise))
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(
            "UPDATE rows SET noise_multiplier = ?, hash = ?",
            (noise, content_hash(other.content())),
        )

    with pytest.raises(LedgerError, match="no mechanism"):
        ledger.read()


def test_a_debit_that_is_not_there_once_it_is_committed_is_an_error(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that loses what it has confirmed."""
    before = ledger.read()
    honest, reads = Ledger._read, []

    def lossy(self: Ledger, connection: sqlite3.Connection) -> object:
        reads.append(honest(self, connection))
        return reads[-1] if len(reads) == 1 else before

    monkeypatch.setattr(Ledger, "_read", lossy)

    with pytest.raises(LedgerError, match="was not kept"):
        charge(ledger, 2)
