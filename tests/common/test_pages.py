"""Tables that the documentation has from the code are those of the code."""

from pathlib import Path

import pytest

from fedgex.common.codes import Code
from fedgex.common.pages import TABLES, with_tables

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


@pytest.mark.parametrize("path", PAGES)
def test_the_tables_of_a_page_are_those_of_the_code(path: Path) -> None:
    page = path.read_text(encoding="utf-8")

    assert with_tables(page) == page, "run python -m fedgex.common.pages docs"


def test_a_table_is_rewritten_between_its_markers_and_nowhere_else() -> None:
    page = "# A\n<!-- codes FX-RUN-004 : action -->\nold\n<!-- end of codes -->\nend\n"

    assert with_tables(page) == (
        "# A\n<!-- codes FX-RUN-004 : action -->\n\n"
        "| Code | What to do |\n|---|---|\n"
        f"| FX-RUN-004 | {Code.RELEASE_UNVERIFIED.action} |\n\n"
        "<!-- end of codes -->\nend\n"
    )


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_table_stands_in_some_page(kind: str) -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]

    assert any(f"<!-- {kind}" in page for page in pages)


def test_a_row_is_written_from_the_docstring_of_its_field() -> None:
    page = with_tables("<!-- keys pretraining.masking -->\n<!-- end of keys -->\n")

    assert "| `min_rate` | `0.1` | Least share of the measured genes to hide. |" in page


def test_no_key_of_a_table_lacks_its_explanation() -> None:
    unexplained = [
        line
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.endswith("|  |")
    ]

    assert unexplained == []
