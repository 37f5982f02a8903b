"""The words of the field in code, help and docs: a list that may only get shorter.

`english.txt` names the files that are not rewritten yet, each with how many of WORDS
its prose holds. After rewriting one, run `python tests/test_english.py`.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("english.txt")
PACKAGES = ("client", "common", "server", "simulations")
WORDS = (
    "told",
    "said",
    "tells",
    "whole",
    "alone",
    "beside",
    "whoever",
    "nobody's",
    "it takes",
    "comes to",
)
"""Words that hide who does what; "reports", "only", "next to" or a name do not."""

_WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b".replace(" ", r"\s+"), re.IGNORECASE)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def files() -> list[Path]:
    """Return every file whose prose is checked."""
    sources = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    return sorted([*sources, *pages, ROOT / "CONTRIBUTING.md"])


def found(path: Path) -> list[str]:
    """Return the words that stand in a file's prose, in order."""
    text = path.read_text(encoding="utf-8")
    prose = "\n".join(in_python(text)) if path.suffix == ".py" else text
    return [" ".join(each.lower().split()) for each in _WORD.findall(strip(prose))]


def in_python(source: str) -> Iterator[str]:
    """Yield comments, docstrings, and the sentences of messages and help."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and " " in text:  # else a name, or a wire value
            yield text


def strip(prose: str) -> str:
    """Return prose without the code that stands in it."""
    return _CODE.sub("", prose)


def listed() -> dict[str, int]:
    """Return the files that are not rewritten yet, and how many words each holds."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return {name: int(count) for name, count in map(str.split, lines)}


def counted() -> dict[str, int]:
    """Return how many words each file holds, without those that hold none."""
    counts = {path.relative_to(ROOT).as_posix(): len(found(path)) for path in files()}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_files_prose_holds_no_more_of_the_words_than_listed(path: Path) -> None:
    allowed = listed().get(path.relative_to(ROOT).as_posix(), 0)

    words = found(path)

    assert len(words) == allowed, (
        f"{words}: write it in other words"
        if len(words) > allowed
        else "run python tests/test_english.py"
    )


def test_every_listed_file_is_there() -> None:
    assert set(listed()) <= {path.relative_to(ROOT).as_posix() for path in files()}


def test_words_are_found_in_prose_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        '"""The `whole` is told.\n\nIt\ntakes time."""\n'
        'told = {"said": f"nobody\'s {1}"}  # alone, besides\n'
    )

    assert sorted(found(path)) == ["alone", "it takes", "nobody's", "told"]


if __name__ == "__main__":
    counts = counted()
    if sum(counts.values()) > sum(listed().values()):
        raise SystemExit("there are more of the words than listed; the list may shrink")
    lines = [f"{name} {count}\n" for name, count in counts.items()]
    LIST.write_text("".join(lines), encoding="utf-8")
