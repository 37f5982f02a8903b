"""The ledger forgets no debit, makes none twice, and is refused if it is not whole."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgex.client.ledger import ledger as ledgers
from fedgex.client.ledger.book import Budget, Debit
from fedgex.client.ledger.ledger import FILE, KEY, BudgetError, LedgerError
from fedgex.common.privacy import accounting
from fedgex.common.privacy.accounting import Invocation
from fedgex.common.system import failpoints

Ledger = ledgers.Ledger
DELTA = 1e-5
AMPLE = Budget(epsilon=100.0, delta=DELTA)
ROUND = Debit(
    contract="c" * 64,
    run="run-1",
    type="train",
    phase="pretraining",
    round=1,
    request="1" * 64,
)
GAUSSIAN = Invocation(noise_multiplier=5.0, sample_rate=1)
"""Its epsilon is a formula, so that nothing has to be accumulated on a grid."""
STEPS = Invocation(noise_multiplier=2.0, sample_rate=0.125, steps=8)
DEBIT = """
import json, sys
from pathlib import Path
from fedgex.client.ledger.book import Budget, Debit
from fedgex.client.ledger.ledger import Ledger
from fedgex.common.privacy.accounting import Invocation
folder, number, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for i in range(times):
    about = Debit(contract="", run="run", type="train", phase="pretraining",
                  round=number + i, request=str(number + i))
    Ledger.open(Path(folder)).debit(
        about, [Invocation(noise_multiplier=5.0, sample_rate=1)], ["a", "b"],
        budget=Budget(epsilon=float(sys.argv[4]), delta=1e-5))
"""


def number(i: int) -> Debit:
    return replace(ROUND, round=i, request=f"{i:064d}")


def gaussians(times: int) -> float:
    """Return the epsilon of the Gaussian mechanism above, invoked so often."""
    return accounting.epsilon([GAUSSIAN] * times, DELTA)


def debit(
    ledger: ledgers.Ledger,
    i: int,
    patients: Sequence[str],
    invocations: Sequence[Invocation] = (GAUSSIAN,),
    budget: Budget = AMPLE,
) -> ledgers.Head:
    return ledger.debit(number(i), invocations, patients, budget=budget)


@pytest.fixture
def ledger(tmp_path: Path) -> ledgers.Ledger:
    return Ledger.create(tmp_path)


# ---- whose spend is what ----


def test_an_empty_ledger_has_spent_nothing(ledger: ledgers.Ledger) -> None:
    assert ledger.head.index == 0
    assert ledger.rows() == ()
    assert ledger.spent(None, DELTA) == 0.0
    assert ledger.spent(["a"], DELTA) == 0.0
    assert ledger.spent([], DELTA) == 0.0


def test_a_row_says_what_was_done_for_what(ledger: ledgers.Ledger) -> None:
    head = debit(ledger, 1, ["b", "a", "a"], [STEPS, GAUSSIAN])

    first, second = ledger.rows()
    assert (first.about, first.invocation) == (number(1), STEPS)
    assert (second.about, second.invocation) == (number(1), GAUSSIAN)
    assert first.cohort == second.cohort
    assert (second.n, second.hash, second.previous) == (*astuple(head), first.hash)


def test_the_spend_is_the_composition_of_a_patients_rows(
    ledger: ledgers.Ledger,
) -> None:
    debit(ledger, 1, ["a", "b"], [STEPS])
    debit(ledger, 2, ["a"], [STEPS, GAUSSIAN])

    assert ledger.spent(["b"], DELTA) == accounting.epsilon([STEPS], DELTA)
    twice = accounting.epsilon([STEPS, STEPS, GAUSSIAN], DELTA)
    assert ledger.spent(["a"], DELTA) == twice
    assert ledger.spent(["a", "b", "new"], DELTA) == twice
    assert ledger.spent(None, DELTA) == twice


def test_a_new_patient_does_not_thin_the_others_spend(ledger: ledgers.Ledger) -> None:
    debit(ledger, 1, ["a"])
    debit(ledger, 2, ["a", *(f"new-{i}" for i in range(1000))])

    assert ledger.spent(None, DELTA) == gaussians(2)
    assert ledger.spent(["new-1"], DELTA) == gaussians(1)


def test_who_leaves_stays_in_the_ledger(ledger: ledgers.Ledger) -> None:
    debit(ledger, 1, ["a", "b"])
    debit(ledger, 2, ["b"])

    assert ledger.spent(["a"], DELTA) == gaussians(1)


@pytest.mark.parametrize("spelt", [" A-1", "a-1\t", "\uff21-1"])
def test_a_patient_spelt_otherwise_is_the_same(
    ledger: ledgers.Ledger, spelt: str
) -> None:
    debit(ledger, 1, ["A-1"])

    assert ledger.spent([spelt], DELTA) == gaussians(1)


def test_no_identifier_is_on_the_disk_and_another_key_gives_other_names(
    tmp_path: Path,
) -> None:
    cohorts = set()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        debit(Ledger.create(tmp_path / name), 1, ["patient-0042"])
        cohorts.add(Ledger.open(tmp_path / name).rows()[0].cohort)
        assert b"patient-0042" not in (tmp_path / name / FILE).read_bytes()

    assert len(cohorts) == 2


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), max_size=7))
def test_the_spend_is_its_definition(
    tmp_path_factory: pytest.TempPathFactory, cohorts: list[set[str]]
) -> None:
    ledger = Ledger.create(tmp_path_factory.mktemp("ledger"))
    for i, cohort in enumerate(cohorts):
        debit(ledger, i, sorted(cohort))

    for asked in ({"a"}, {"b", "c"}, set("abcdef")):
        naive = max(gaussians(sum(p in cohort for cohort in cohorts)) for p in asked)
        assert ledger.spent(sorted(asked), DELTA) == naive


def test_thousands_of_patients_and_hundreds_of_rows_are_quick(
    ledger: ledgers.Ledger,
) -> None:
    patients = [f"patient-{i}" for i in range(3000)]
    debit(ledger, 0, patients, [GAUSSIAN] * 300)
    for i in range(1, 21):
        debit(ledger, i, patients[i:])

    began = time.process_time()
    assert ledger.spent(None, DELTA) == gaussians(320)
    assert time.process_time() - began < 2


# ---- the budget ----


def test_a_round_that_would_exceed_the_budget_is_not_written(
    ledger: ledgers.Ledger,
) -> None:
    budget = Budget(epsilon=gaussians(2), delta=DELTA)
    debit(ledger, 1, ["a", "b"], budget=budget)
    last = debit(ledger, 2, ["a"], budget=budget)

    with pytest.raises(BudgetError) as refusal:
        debit(ledger, 3, ["a", "b"], budget=budget)

    assert ledger.head == last
    assert refusal.value.code == "FX-PRIV-002"
    assert f"epsilon to {gaussians(3):.4g} at delta 1e-05" in str(refusal.value)
    debit(ledger, 3, ["b"], budget=budget)  # whoever has it left, may


def test_a_delta_that_is_not_below_one_in_all_patients_is_refused(
    ledger: ledgers.Ledger,
) -> None:
    quarter = Budget(epsilon=100.0, delta=0.25)
    debit(ledger, 1, ["a", "b", "c", "c"], budget=quarter)

    with pytest.raises(LedgerError, match=r"privacy_delta .* is 0\.25") as refusal:
        debit(ledger, 2, ["a", "b", "c", "d"], budget=quarter)

    assert refusal.value.code == "FX-PRIV-001"
    assert ledger.head.index == 1


def test_the_same_again_charges_nothing_even_under_a_lower_budget(
    ledger: ledgers.Ledger,
) -> None:
    head = debit(ledger, 1, ["a", "b"])

    nothing = Budget(epsilon=1e-6, delta=DELTA)
    assert debit(ledger, 1, ["a", "b"], budget=nothing) == head
    assert debit(ledger, 1, ["b"], budget=nothing) == head  # one opted out


def test_the_same_again_charges_a_patient_who_is_new(ledger: ledgers.Ledger) -> None:
    debit(ledger, 1, ["a"])
    debit(ledger, 1, ["a", "b"])

    assert ledger.spent(["a"], DELTA) == ledger.spent(["b"], DELTA) == gaussians(1)
    assert debit(ledger, 1, ["a", "b"]).index == 2


@pytest.mark.parametrize("field", Debit.__dataclass_fields__)
def test_another_question_is_charged(ledger: ledgers.Ledger, field: str) -> None:
    debit(ledger, 1, ["a"])
    other = {"round": 2}.get(field, "other")

    ledger.debit(replace(number(1), **{field: other}), [GAUSSIAN], ["a"], budget=AMPLE)

    assert ledger.spent(["a"], DELTA) == gaussians(2)


def test_the_same_question_with_other_noise_is_refused(ledger: ledgers.Ledger) -> None:
    debit(ledger, 1, ["a"])

    with pytest.raises(LedgerError, match="round 1 was debited with other noise"):
        debit(ledger, 1, ["a"], [STEPS])


def test_a_clock_that_is_set_back_changes_nothing(
    ledger: ledgers.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(epsilon=gaussians(1), delta=DELTA)
    debit(ledger, 1, ["a"], budget=budget)

    class Earlier(ledgers.datetime):
        @classmethod
        def now(cls, tz: object = None) -> ledgers.datetime:
            return cls(1999, 1, 1, tzinfo=ledgers.UTC)

    monkeypatch.setattr(ledgers, "datetime", Earlier)

    with pytest.raises(BudgetError):
        debit(ledger, 2, ["a"], budget=budget)
    debit(ledger, 2, ["b"], budget=budget)
    assert [row.time[:2] for row in ledger.rows()] == ["20", "19"]
    assert ledger.spent(None, DELTA) == gaussians(1)


# ---- what is not whole is refused ----


def changed(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE rows SET noise_multiplier = 50.0 WHERE n = 2", "row 2 was changed"),
        ("UPDATE rows SET steps = 0 WHERE n = 1", "row 1 was changed"),
        ("UPDATE rows SET time = 'x' WHERE n = 3", "row 3 was changed"),
        ("UPDATE rows SET run = x'00' WHERE n = 3", "cannot be used"),
        ("DELETE FROM rows WHERE n = 1", "row 1 is not what follows"),
        ("DELETE FROM rows WHERE n = 2", "row 2 is not what follows"),
        ("UPDATE rows SET cohort = (SELECT cohort FROM rows WHERE n = 1)", "row 3 was"),
        ("DELETE FROM cohorts", "row 1 is not what follows"),
        ("UPDATE cohorts SET patients = x'00'", "was changed"),
        ("UPDATE ledger SET format = 2", "another format"),
        ("DELETE FROM ledger", "another format"),
        ("DROP TABLE rows", "not a ledger's"),
    ],
)
def test_a_changed_ledger_is_refused(
    ledger: ledgers.Ledger, tmp_path: Path, statement: str, found: str
) -> None:
    for i, patients in enumerate(["ab", "ab", "a"], start=1):
        debit(ledger, i, list(patients))
    changed(tmp_path, statement)

    with pytest.raises(LedgerError, match=found) as refusal:
        Ledger.open(tmp_path)
    with pytest.raises(LedgerError, match=found):
        debit(ledger, 4, ["a"])

    assert refusal.value.code == "FX-PRIV-003"
    assert "put the newest ledger.sqlite and ledger.key back" in str(refusal.value)


def test_every_byte_counts_or_does_not_matter(
    ledger: ledgers.Ledger, tmp_path: Path
) -> None:
    for i in range(3):
        debit(ledger, i, ["a", "b"][: i + 1])
    whole, book = (tmp_path / FILE).read_bytes(), ledger.read()

    refused = 0
    for position in range(0, len(whole), 61):
        torn = bytearray(whole)
        torn[position] ^= 0xFF
        (tmp_path / FILE).write_bytes(torn)
        try:
            assert ledger.read() == book
        except LedgerError:
            refused += 1

    assert refused > 20  # of these bytes; the rest are of no row, such as free space


@pytest.mark.parametrize("kept", [0, 1, 100, 4096, 6000])
def test_a_torn_file_is_refused(
    ledger: ledgers.Ledger, tmp_path: Path, kept: int
) -> None:
    debit(ledger, 1, ["a"])
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:kept])

    with pytest.raises(LedgerError, match="expected the privacy ledger as fedgex"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize("name", [FILE, KEY])
def test_a_ledger_or_key_that_is_missing_is_refused(
    ledger: ledgers.Ledger, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).unlink()

    with pytest.raises(LedgerError, match=f"{name}: .*(not there|cannot be read)"):
        Ledger.open(tmp_path)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("key", ["", "no key", "00" * 32])
def test_another_key_is_refused(
    ledger: ledgers.Ledger, tmp_path: Path, key: str
) -> None:
    (tmp_path / KEY).write_text(key)

    with pytest.raises(LedgerError, match=r"key"):
        Ledger.open(tmp_path)


def test_a_ledger_is_for_its_owner_alone_and_never_overwritten(
    ledger: ledgers.Ledger, tmp_path: Path
) -> None:
    assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.glob("ledger.*")} == {
        FILE: 0o600,
        KEY: 0o600,
    }
    with pytest.raises(LedgerError, match="never overwritten"):
        Ledger.create(tmp_path)


# ---- deaths, and two at once ----


def process(
    folder: Path, first: int, times: int = 1, epsilon: float = 100, point: str = ""
) -> subprocess.Popen[str]:
    arguments = map(str, (folder, first, times, epsilon))
    return subprocess.Popen(
        [sys.executable, "-c", DEBIT, *arguments],
        env=os.environ | {failpoints.VARIABLE: point},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("point", "charged"), [("ledger.before", 0), ("ledger.debited", 1)]
)
def test_a_killed_debit_is_whole_or_not_there_and_is_not_made_twice(
    ledger: ledgers.Ledger, tmp_path: Path, point: str, charged: int
) -> None:
    (tmp_path / "kill").mkdir()
    killed = process(tmp_path, 1, point=f"{point}:1:{tmp_path / 'kill'}")
    killed.communicate()

    assert killed.returncode == -signal.SIGKILL
    assert len(ledger.rows()) == charged
    again = process(tmp_path, 1)
    assert again.communicate()[1] == ""
    assert ledger.spent(["a"], DELTA) == gaussians(1)
    assert len(ledger.rows()) == 1


def test_a_kill_while_it_is_written_leaves_the_state_before(
    ledger: ledgers.Ledger, tmp_path: Path
) -> None:
    debit(ledger, 1, ["a"])
    code = (
        "import os, signal, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_spill = 1'); c.execute('PRAGMA cache_size = 1')\n"
        "c.execute('BEGIN IMMEDIATE')\n"
        "for i in range(500):\n"
        "    c.execute('INSERT INTO cohorts VALUES (?, ?)', (str(i), bytes(999)))\n"
        "c.execute('UPDATE rows SET steps = 9')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = ledger.read()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / FILE)], check=False)
    assert (tmp_path / f"{FILE}-journal").stat().st_size > 0  # torn, and to be undone

    assert ledger.read() == before


def test_two_processes_at_once_never_pass_the_budget_together(
    ledger: ledgers.Ledger, tmp_path: Path
) -> None:
    both = [process(tmp_path, first, 6, gaussians(7)) for first in (0, 100)]
    errors = [each.communicate()[1] for each in both]

    assert len(ledger.rows()) == 7
    assert ledger.spent(None, DELTA) == gaussians(7)
    assert sum("BudgetError" in error for error in errors) in (1, 2)
    assert len({json.dumps(row.content()) for row in ledger.rows()}) == 7
    assert all(b.previous == a.hash for a, b in itertools.pairwise(ledger.rows()))
