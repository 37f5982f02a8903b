"""Bad luck: one patient under several spellings, as spreadsheets and exports make them.

An opt-out that is spelt differently still counts; one patient is clipped once and
charged once; and nobody comes out of a new spelling with a fresh budget.
"""
# ruff: noqa: RUF001 (characters that look alike are what this is about)

import unicodedata
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgex.client.ledger import ledger as ledgers
from fedgex.client.ledger.book import Budget, Debit
from fedgex.client.ledger.ledger import BudgetError, Ledger
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.data.patients import patient_key
from fedgex.common.data.scales import Scale
from fedgex.common.errors import DataError, Finding
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.privacy import accounting
from fedgex.common.privacy.accounting import Invocation

from ..client.data.cases import expression

SPELLINGS = {
    "other case": ("Pat-003", "PAT-003"),
    "decomposed, as macOS stores it": (
        "Müller-3",
        unicodedata.normalize("NFD", "Müller-3"),
    ),
    "a German capital": ("Groß-3", "GROSS-3"),
    "quoted": ("Pat-003", '"Pat-003"'),
    "quoted by a word processor": ("Pat-003", "„Pat-003“"),
    "with a trailing comma": ("Pat-003", "Pat-003,"),
    "a column of a CSV file": ("Pat-003", '"Pat-003",,'),
    "without its leading zeros": ("0042", "42"),
    "as a float": ("42", "42.0"),
    "as a float with a decimal comma": ("42", "42,00"),
    "in full-width digits": ("42", "４２"),
    "in full-width letters": ("Pat-003", "Ｐａｔ-００３"),
    "with a zero-width space": ("Pat-003", "Pat-\u200b003"),
    "with a byte order mark": ("Pat-003", "\ufeffPat-003"),
    "with a soft hyphen": ("Pat-003", "Pat-\u00ad003"),
    "with a mark of direction": ("Pat-003", "\u200ePat-003\u200f"),
    "with a control character": ("Pat-003", "Pat-003\x00"),
    "with a space that does not break": ("Pat 003", "Pat\u00a0003"),
    "with two spaces": ("Pat 003", "Pat  003 "),
    "with a dash for the hyphen": ("Pat-003", "Pat–003"),
}
"""What the hospital's files say, and what its opt-out list says."""

EACH_WAY = [
    pytest.param(*pair, id=f"{name}, {way}")
    for name, (there, here) in SPELLINGS.items()
    for way, pair in (("listed", (there, here)), ("in the files", (here, there)))
]

ORDER = Debit(
    contract="c", run="r", type="train", phase="pretraining", round=1, request="1"
)
PLENTY = Budget(epsilon=100.0, delta=1e-5)
ONE_ROUND = [Invocation(noise_multiplier=1.0, sample_rate=1.0)]


def cohort(
    folder: Path, patients: list[str], samples: list[str] | None = None, **data: object
) -> tuple[tuple[str, ...], dict[str, Finding]]:
    """Return who is in the cohort, and the findings; of refused data, nobody."""
    sheet = expression()
    sheet.index = pd.Index(samples or patients)
    sheet.to_parquet(folder / "e.parquet")
    table = pd.DataFrame({"patient": patients, "sample": samples or patients})
    table.to_parquet(folder / "c.parquet")
    settings = SiteSettings(
        name="north",
        policy=Policy.proposed(minimum_cohort=10),
        data=DataSettings.model_validate(
            {
                "scale": Scale.LOG2P1,
                "expression": folder / "e.parquet",
                "clinical": folder / "c.parquet",
                "orientation": "samples-by-genes",
                **data,
            }
        ),
    )
    try:
        read, found = read_cohort(
            settings.data, settings.policy.minimum_cohort, Scale.LOG2P1, ()
        )
    except DataError as error:
        return (), {each.code: each for each in error.findings}
    return read.patients, {each.code: each for each in found}


def order(number: int) -> Debit:
    return replace(ORDER, round=number, request=str(number))


def others(n: int = 19) -> list[str]:
    return [f"other {i}" for i in range(101, 101 + n)]


# ---- opting out ----


@pytest.mark.parametrize(("there", "here"), EACH_WAY)
def test_an_opt_out_counts_however_the_identifier_is_spelt(
    tmp_path: Path, there: str, here: str
) -> None:
    (tmp_path / "out.txt").write_text(f"{here}\n", encoding="utf-8")

    patients, findings = cohort(
        tmp_path, [there, *others()], opt_outs=tmp_path / "out.txt"
    )

    assert patients == tuple(others())
    assert "FX-DATA-076" not in findings


@pytest.mark.parametrize("listed", ["Pat-03", "Pat-0003", "Pat-003-2", "Pat003", "3"])
def test_an_opt_out_of_another_patient_leaves_nobody_out(
    tmp_path: Path, listed: str
) -> None:
    (tmp_path / "out.txt").write_text(listed)

    patients, findings = cohort(
        tmp_path, ["Pat-003", *others()], opt_outs=tmp_path / "out.txt"
    )

    assert len(patients) == 20
    assert "FX-DATA-076" in findings


def test_check_data_says_how_many_lines_of_the_opt_out_list_match_nobody(
    tmp_path: Path,
) -> None:
    (tmp_path / "out.txt").write_text("OTHER 101\nstranger\nPat 4711 # moved\n")

    patients, findings = cohort(
        tmp_path, ["Pat-003", *others()], opt_outs=tmp_path / "out.txt"
    )

    assert patients == ("Pat-003", *others()[1:])
    assert findings["FX-DATA-076"].severity == "warning"
    assert "2 identifiers" in findings["FX-DATA-076"].found
    assert not any("4711" in str(each) for each in findings.values())


def test_a_site_may_refuse_its_data_until_every_opt_out_is_found(
    tmp_path: Path,
) -> None:
    (tmp_path / "out.txt").write_text("other 101\nstranger\n")

    patients, findings = cohort(
        tmp_path,
        ["Pat-003", *others()],
        opt_outs=tmp_path / "out.txt",
        unknown_opt_outs="refuse",
    )

    assert patients == ()
    assert findings["FX-DATA-076"].severity == "error"


def test_an_opt_out_whose_sample_is_not_there_is_known_all_the_same(
    tmp_path: Path,
) -> None:
    (tmp_path / "out.txt").write_text("pat-003\n")
    table = pd.DataFrame({"patient": ["Pat-003", *others(20)]})
    table.to_parquet(tmp_path / "all.parquet")

    patients, findings = cohort(
        tmp_path,
        others(20),
        clinical=tmp_path / "all.parquet",
        opt_outs=tmp_path / "out.txt",
        unknown_opt_outs="refuse",
    )

    assert len(patients) == 20
    assert "FX-DATA-076" not in findings


# ---- one patient, one row ----


@pytest.mark.parametrize(("one", "other"), EACH_WAY)
def test_two_spellings_in_one_column_are_refused_without_naming_them(
    tmp_path: Path, one: str, other: str
) -> None:
    samples = [f"S{i}" for i in range(20)]

    patients, findings = cohort(tmp_path, [one, other, *others(18)], samples)

    assert patients == ()
    assert findings["FX-DATA-075"].severity == "error"
    assert not any(one in str(each) for each in findings.values())


def test_two_spellings_of_a_sample_are_refused(tmp_path: Path) -> None:
    samples = ["S1", "s1", *(f"S{i}" for i in range(2, 20))]

    patients, findings = cohort(tmp_path, ["Pat-003", *others()], samples)

    assert patients == ()
    assert "FX-DATA-075" in findings


def test_several_samples_of_a_patient_are_no_two_spellings(tmp_path: Path) -> None:
    samples = [f"S{i}" for i in range(20)]

    patients, findings = cohort(tmp_path, ["Pat-003", "Pat-003", *others(18)], samples)

    assert len(patients) == 20
    assert "FX-DATA-075" not in findings


@pytest.mark.parametrize(("one", "other"), EACH_WAY)
def test_a_sample_finds_its_clinical_row_under_another_spelling(
    tmp_path: Path, one: str, other: str
) -> None:
    sheet, rows = [one, *others()], [other, *others()]
    table = pd.DataFrame({"patient": rows})
    table.to_parquet(tmp_path / "spelt.parquet")

    patients, _ = cohort(tmp_path, sheet, clinical=tmp_path / "spelt.parquet")

    assert len(patients) == 20


# ---- one patient, one account ----


@pytest.mark.parametrize(("one", "other"), EACH_WAY)
def test_no_spelling_has_a_budget_of_its_own(
    tmp_path: Path, one: str, other: str
) -> None:
    ledger = Ledger.create(tmp_path)
    once = Budget(epsilon=6.0, delta=1e-5)
    ledger.debit(ORDER, ONE_ROUND, [one], budget=once)

    with pytest.raises(BudgetError):
        ledger.debit(order(2), ONE_ROUND, [other], budget=once)


@pytest.mark.parametrize(("one", "other"), EACH_WAY)
def test_a_key_stays_what_it_is(one: str, other: str) -> None:
    assert patient_key(one) == patient_key(other) == patient_key(patient_key(one))


@given(st.text())
def test_the_key_of_a_key_is_itself(identifier: str) -> None:
    assert patient_key(patient_key(identifier)) == patient_key(identifier)


def earlier_release(ledger: Ledger, identifier: str) -> None:
    """Charge an identifier as releases did that knew no key of a patient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ledgers,
            "patient_key",
            lambda spelt: unicodedata.normalize("NFKC", spelt).strip().casefold(),
        )
        ledger.debit(ORDER, ONE_ROUND, [identifier], budget=PLENTY)


@pytest.mark.parametrize("identifier", ["0042", "42.0", '"Pat-003"', "Pat\u00ad003"])
def test_what_an_earlier_release_charged_stays_charged(
    tmp_path: Path, identifier: str
) -> None:
    ledger = Ledger.create(tmp_path)
    earlier_release(ledger, identifier)

    spent = ledger.spent([identifier], PLENTY.delta)
    ledger.debit(order(2), ONE_ROUND, [identifier], budget=PLENTY)

    assert spent == accounting.epsilon(ONE_ROUND, PLENTY.delta)
    twice = accounting.epsilon(2 * ONE_ROUND, PLENTY.delta)
    assert ledger.spent([identifier], PLENTY.delta) == twice
    assert ledger.spent(None, PLENTY.delta) == twice


def test_a_round_begun_by_an_earlier_release_is_not_charged_again(
    tmp_path: Path,
) -> None:
    ledger = Ledger.create(tmp_path)
    earlier_release(ledger, "0042")

    ledger.debit(ORDER, ONE_ROUND, ["0042"], budget=PLENTY)

    assert len(ledger.rows()) == 1
