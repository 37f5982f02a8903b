"""Every code has a case, and no finding names or counts a few patients."""

import re
from pathlib import Path

import pytest

from fedgex.common.codes import Code

from .cases import (
    CASES,
    ELSEWHERE,
    IN_SOURCES,
    ROOT,
    clinical,
    expression,
    load,
    reported,
    reported_at_all,
)

# ---- every code ----


@pytest.mark.parametrize("code", CASES)
def test_a_code_is_told_for_its_case(tmp_path: Path, code: str) -> None:
    case = CASES[code]
    sheet, table, data = case(tmp_path) if callable(case) else case

    assert code in reported(tmp_path, sheet, table, **data)


@pytest.mark.parametrize("code", sorted(set(CASES) - {"FX-DATA-010"}))
def test_no_other_error_is_told_for_the_same_cause(tmp_path: Path, code: str) -> None:
    case = CASES[code]
    sheet, table, data = case(tmp_path) if callable(case) else case
    findings = reported(tmp_path, sheet, table, **data)

    errors = {f.code for f in findings.values() if f.severity == "error"}

    follows = {"FX-DATA-030"} if code in ("FX-DATA-006", "FX-DATA-008") else set()
    assert errors - {code} <= follows  # a comma makes text of the number


@pytest.mark.parametrize(
    ("row", "code"), [("samples", "FX-DATA-050"), ("often", "FX-DATA-051")]
)
def test_samples_without_values_are_reported(
    tmp_path: Path, row: str, code: str
) -> None:
    sheet = expression()
    sheet.iloc[3, : 6 if row == "samples" else 4] = ""

    cohort, findings = load(tmp_path, sheet, clinical())

    assert code in {finding.code for finding in findings}
    assert len(cohort.patients) == len(cohort.clinical) == 20 - (row == "samples")


def test_every_code_has_a_case_and_a_line_in_the_docs_and_no_other() -> None:
    codes = [code for code in Code if code.startswith("FX-DATA")]
    severities = {code.value: code.severity for code in codes}
    docs = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| (FX-DATA-\d{3}) \| (\w+) \|", docs, re.M))

    cases = {*CASES, *ELSEWHERE, *IN_SOURCES}

    assert documented == severities
    assert cases == set(severities)
    files = {
        *(ROOT / "client").rglob("*.py"),
        *(ROOT / "common/ingestion").rglob("*.py"),
    } - {ROOT / "common/ingestion/findings.py"}
    source = "".join(path.read_text() for path in files)
    for code in codes:
        assert re.search(rf"Code\.{code.name}\b", source)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    sheet, table = expression(), clinical()
    sheet.iloc[0, 0], sheet.iloc[1, 1], sheet.iloc[2, 2] = "high", "inf", -3
    table.loc[0, "event"], table.loc[1, "duration"], table.loc[2, "age"] = 7, -1, 999

    codes = reported(tmp_path, sheet, table)

    assert {f"FX-DATA-0{i}" for i in (30, 31, 32, 60, 61, 65)} <= set(codes)


def test_a_lost_orientation_does_not_hide_the_clinical_table(tmp_path: Path) -> None:
    sheet = expression().set_axis(list("abcdef"), axis=1).set_axis(range(20))
    table = clinical()
    table.loc[0, "event"] = 7

    assert {"FX-DATA-011", "FX-DATA-060"} <= set(reported(tmp_path, sheet, table))


def test_lost_links_do_not_hide_anything(tmp_path: Path) -> None:
    sheet, table = expression(), clinical().assign(patient=range(20))
    sheet.iloc[0, 0] = -3
    table.loc[0, "event"] = 7

    codes = set(reported(tmp_path, sheet, table))

    assert {"FX-DATA-025", "FX-DATA-032", "FX-DATA-060"} <= codes


# ---- nobody is told on ----


@pytest.mark.parametrize("code", CASES)
def test_no_identifier_and_no_value_is_ever_reported(tmp_path: Path, code: str) -> None:
    case = CASES[code]
    sheet, table, data = case(tmp_path) if callable(case) else case
    # An identifier in the shape of a gene, and a value that is wrong everywhere.
    identifier, value = "MRN4711X", ["-31415", "31415.5x", "31415,5"][len(sheet) % 3]
    sheet = sheet.astype(object).set_axis([identifier, *sheet.index[1:]])
    sheet.iloc[1, 1] = value
    if table is not None:
        table = table.astype(object)
        table.iloc[0, 0] = identifier
        table.iloc[1, 1:] = value

    for turned in (sheet, sheet.T):
        for declared in ("auto", "samples-by-genes", "genes-by-samples"):
            settings = {**data, "orientation": declared}
            text = "\n".join(
                map(str, reported_at_all(tmp_path, turned, table, **settings))
            )

            assert "FX-DATA" in text
            for hidden in (identifier, "31415", "PAT-"):
                assert hidden not in text


def test_small_counts_read_fewer_than_and_few_events_look_like_none(
    tmp_path: Path,
) -> None:
    few = clinical().assign(event=[1] * 3 + [0] * 17)
    none = clinical().assign(event=0)

    told_few = reported(tmp_path, expression(), few, tasks=("survival",))
    told_none = reported(tmp_path, expression(), none, tasks=("survival",))

    assert told_few == told_none
    assert "fewer than 10 patients" in told_few["FX-DATA-071"].found
