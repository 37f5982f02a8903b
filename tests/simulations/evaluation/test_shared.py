"""What all comparisons share: the cache, the tidy table and the page."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import wilcoxon

from fedgex.simulations import resumable
from fedgex.simulations.evaluation import page, table
from fedgex.simulations.reporting.schema import plain


def refuse(*_: object) -> Any:
    raise AssertionError("it was computed before")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", {"x": [1.5, None]}), ("a.safetensors", {"x": np.arange(3.0)})],
)
def test_a_result_is_computed_once_and_read_afterwards(
    tmp_path: Path, name: str, content: Any
) -> None:
    path = tmp_path / "folder" / name

    first = resumable.cached(path, lambda: content)
    second = resumable.cached(path, refuse)

    assert list(first) == list(second) == ["x"]
    np.testing.assert_array_equal(first["x"], content["x"])
    np.testing.assert_array_equal(second["x"], content["x"])


def test_a_result_that_broke_off_leaves_no_file_to_resume_from(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    with pytest.raises(AssertionError, match="computed before"):
        resumable.cached(path, refuse)
    with pytest.raises(TypeError):  # half written
        resumable.cached(path, lambda: {"x": [1.0] * 1000, "y": object()})

    assert not path.exists()
    assert resumable.cached(path, lambda: 1) == 1


def test_only_absent_results_are_computed_and_each_is_reported(tmp_path: Path) -> None:
    paths = {tmp_path / f"{n}.json": n for n in (1, 2, 3)}
    resumable.save(tmp_path / "2.json", "kept")
    said = StringIO()

    resumable.compute_all(
        lambda n: 10 * n, paths, 1, Console(file=said), lambda n: f"job {n}"
    )

    assert [resumable.load(path) for path in paths] == [10, "kept", 30]
    lines = said.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1 of 2: job 1", "2 of 2: job 3"]


def test_a_digest_depends_on_text_and_on_arrays_but_not_on_their_layout() -> None:
    x = np.arange(6.0).reshape(2, 3)

    assert resumable.digest("a", x) == resumable.digest("a", np.asfortranarray(x))
    assert resumable.digest("a", x) != resumable.digest("b", x)
    assert resumable.digest("a", x) != resumable.digest("a", x + 1)


def results() -> Any:
    rows = [
        ("ours", "half", 1, "b", 0.5),
        ("ours", "half", 1, "a", 0.1),
        ("ours", "half", 2, "b", 0.7),
        ("ours", "half", 2, "a", 0.3),
        ("mean", "half", 1, "b", 1.0),
    ]
    keys = ("method", "setting", "seed", "group", "value")
    return table.tidy(dict(zip(keys, row, strict=True)) for row in rows)


def test_results_are_collected_by_their_keys_in_the_order_of_the_rows() -> None:
    found = table.nested(results(), "method", "group")

    assert found == {"ours": {"b": [0.5, 0.7], "a": [0.1, 0.3]}, "mean": {"b": [1.0]}}
    some = table.where(results(), method="ours", seed=2)
    assert some["value"].tolist() == [0.7, 0.3]


def test_the_mean_over_seeds_keeps_the_groups_apart() -> None:
    found = table.mean_over(results(), "seed", "setting", "method")["half"]

    assert found["ours"] == pytest.approx([0.6, 0.2])
    assert found["mean"] == pytest.approx([1.0])


def test_a_table_has_mean_and_sd_and_a_dash_where_there_is_nothing() -> None:
    cells = table.summary(results(), "method", "group", digits=1)

    assert table.markdown("method", cells).splitlines() == [
        "| method | b | a |",
        "|---|---|---|",
        "| ours | 0.6 ± 0.1 | 0.2 ± 0.1 |",
        "| mean | 1.0 | - |",
    ]


def test_unknown_values_do_not_count() -> None:
    assert table.mean_sd([0.25, math.nan, 0.75], 2) == "0.50 ± 0.35"
    assert table.mean_sd([math.nan]) == "-"
    assert table.mean_known([1.0, math.nan, 2.0]) == 1.5
    assert math.isnan(table.mean_known([]))


def test_pairs_are_compared_by_wilcoxon_where_five_are_known() -> None:
    one = np.array([1.0, 2.0, 3.0, 4.0, 5.5, math.nan])
    other = np.array([1.5, 1.0, 1.0, 1.0, 1.0, 1.0])

    assert table.paired_p(one, other) == wilcoxon(one[:5] - other[:5]).pvalue
    assert math.isnan(table.paired_p(one[:4], other[:4]))
    assert math.isnan(table.paired_p(other, other))


def test_a_section_with_a_field_that_is_none_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pages").mkdir()
    template = "# Test\n\n## One\n\n{x:.1f}\n\n## Two\n\n{y[0]}\n"
    (tmp_path / "pages" / "test.md").write_text(template)
    monkeypatch.setattr(page.resources, "files", lambda _: tmp_path)

    def text(**fields: Any) -> str:
        return page.Results(name="test", numbers={}, fields=fields).page

    assert text(x=0.25, y=["both"]) == "# Test\n\n## One\n\n0.2\n\n## Two\n\nboth\n"
    assert text(x=0.25, y=None) == "# Test\n\n## One\n\n0.2\n"
    with pytest.raises(KeyError, match="y"):
        text(x=0.25)


def test_numbers_become_what_json_can_hold() -> None:
    found = plain({1: np.float64(0.5), "b": (np.nan, np.array([1, 2]))})

    assert found == {"1": 0.5, "b": [None, [1, 2]]}
