"""A code is defined once, is used, and every page explains it in the same words."""

import re
from pathlib import Path

import pytest

from fedgex.common.codes import TEMPORARY, Code

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "common", "server", "simulations")
SOURCES = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
NUMBER = re.compile(r"FX-[A-Z]+-\d+")
ANSWERS = ("FX-SITE", "FX-STUDY", "FX-PRIV", "FX-RUN")
PAGES = {
    "findings.md": ("FX-DATA", *ANSWERS),
    "hospital-operation.md": ANSWERS,
    "messages.md": ANSWERS,
    "predict.md": ("FX-PREDICT",),
}


def test_no_module_but_codes_writes_a_code_as_text() -> None:
    literals = {
        path.name: NUMBER.findall(path.read_text(encoding="utf-8"))
        for path in SOURCES
        if path.name != "codes.py"
    }

    assert {name: found for name, found in literals.items() if found} == {}


@pytest.mark.parametrize("code", Code)
def test_every_code_is_raised_somewhere(code: Code) -> None:
    assert NUMBER.fullmatch(code)
    assert any(
        re.search(rf"\bCode\.{code.name}\b", path.read_text(encoding="utf-8"))
        for path in SOURCES
        if path.parts[-2] != "common"
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_page_explains_each_of_its_codes_once(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")

    explained = re.findall(rf"^\| ({NUMBER.pattern}) \|", text, re.M)

    assert sorted(explained) == sorted(c for c in Code if c.startswith(PAGES[page]))


def test_rounds_md_names_the_refusals_that_pass() -> None:
    text = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"for a reason that passes: ([^|]*)\|", text)

    assert set(NUMBER.findall(row)) == TEMPORARY
