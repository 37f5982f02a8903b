"""Every code that can leave a hospital is explained to those who meet it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"FX-(?:SITE|STUDY|RUN|PRIV)-\d{3}")
PAGES = ("findings.md", "hospital-operation.md", "messages.md")


def used() -> set[str]:
    """Return every code that stands in what a hospital runs."""
    files = [*(ROOT / "client").rglob("*.py"), *(ROOT / "common").glob("*.py")]
    return {code for path in files for code in CODE.findall(path.read_text("utf-8"))}


def explained(page: str) -> list[str]:
    """Return the codes at the beginning of a row of a table, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^\| (FX-(?:SITE|STUDY|RUN|PRIV)-\d{3}) \|", text, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_explains_every_code_once_and_no_other(page: str) -> None:
    assert sorted(explained(page)) == sorted(used())


def test_there_are_codes_of_each_kind() -> None:
    assert {code.split("-")[1] for code in used()} == {"SITE", "STUDY", "RUN", "PRIV"}
