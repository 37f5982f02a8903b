"""Every row of the threat table names the test that plays it, or what would stop it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADER = "| Attempt | Stopped or revealed by | Played in |"


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield the cells of each row of the tables under `HEADER`."""
    inside = False
    for line in (ROOT / "docs/security.md").read_text().splitlines():
        if line == HEADER:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            attempt, answer, played = (c.strip() for c in line.strip("|").split("|"))
            yield attempt, answer, played


def played_in(cell: str) -> list[tuple[Path, str]]:
    """Return file and function of each `file.py::test` of a cell."""
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", cell)
    return [(ROOT / "tests" / file, test) for file, test in named]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_a_row_is_played_or_says_that_it_is_not_stopped(
    row: tuple[str, str, str],
) -> None:
    _, answer, played = row
    if "**Not stopped" in answer:
        assert "would stop it" in answer.lower()
        return
    assert played_in(played)
    for path, test in played_in(played):
        assert re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE), test


def test_the_table_has_every_actor() -> None:
    page = (ROOT / "docs/security.md").read_text()

    assert page.count(HEADER) == 6
