"""Accuracy against panel size, from files to page."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedgex.common.errors import ConfigError
from fedgex.simulations.analysis import panel_selection
from fedgex.simulations.evaluation import page
from fedgex.simulations.evaluation.classification import comparison, methods
from fedgex.simulations.evaluation.classification.methods import Answers, Panel
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import Protocol, Split, prepare

from .. import small

N_GENES = 40
SCENARIO = """\
[study]
name = "small"
minimum_cohort = 5
cross_products = true
linear_rank = 4
linear_types = ["type-1", "type-2"]
[study.pretraining]
rounds = 1
batch_size = 32
[study.classification]
rounds = {rounds}
batch_size = 32
backbone = "frozen"
classes = ["type-1", "type-2"]
[study.strategy]
name = "fedavg"
[data]
expression = "expression.parquet"
scale = "log2p1"
clinical = "clinical.csv"
[sites]
column = "institution"
minimum_patients = 10
[holdout]
institutions = ["Hold-out 01", "Hold-out 02"]
[run]
workers = 1
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.new_data(
        tmp_path_factory, n_sites=2, patients_per_site=40, n_genes=N_GENES
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


def grounds(data: Path, out: Path, *, quick: bool = False, rounds: int = 1) -> Split:
    path = out / f"small-{rounds}.toml"
    path.write_text(SCENARIO.format(rounds=rounds))
    own = {"scenario": str(path), "seeds": [1, 2], "validation": []}
    rules = Protocol.load()
    rules = Protocol.read(rules.model_dump() | own, "test")
    made = out / f"quick-{quick}-{rounds}"
    made.mkdir(exist_ok=True)
    return prepare(rules, data, made, workers=1, quick=quick)


@pytest.fixture(scope="module")
def ground(data: Path, out: Path) -> Split:
    return grounds(data, out)


@pytest.fixture(scope="module", autouse=True)
def _little() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "DRAWS", 2)
        patch.setitem(methods.BOOSTING, "max_iter", 10)
        yield


@pytest.fixture(scope="module")
def outcome(ground: Split) -> Results:
    console = Console(file=StringIO(), width=200)
    return comparison.run(ground, console)


def scores(outcome: Results) -> dict[str, Any]:
    found: dict[str, Any] = outcome.numbers["scores"]
    return found


def test_every_method_is_judged_on_every_panel_size_and_all_genes(
    outcome: Results,
) -> None:
    found = scores(outcome)

    assert list(found) == list(comparison.LABELS)
    for method, of_method in found.items():
        assert {"8", "16", "32"} <= set(of_method["random"]), method
        assert {"8", "16", "32"} <= set(of_method["selected"]), method
        assert set(of_method["all"]) == {str(N_GENES)}, method


def test_random_panels_count_once_a_seed_and_draw_and_chosen_ones_once_a_seed(
    outcome: Results,
) -> None:
    found = scores(outcome)

    for method in found:
        seeds = 1 if method == "local" else 2
        assert len(found[method]["random"]["8"]["accuracy"]) == seeds * 2, method
    for method in ("federated", "pooled", "mixture"):
        assert len(found[method]["selected"]["8"]["accuracy"]) == 2, method
    for method in ("local", "logistic", "boosting", "discriminant"):
        assert len(found[method]["selected"]["8"]["accuracy"]) == 1, method


def test_accuracy_is_the_mean_over_institutions_by_their_patients(
    outcome: Results,
) -> None:
    sizes = [*outcome.numbers["institutions"].values()]
    score = scores(outcome)["logistic"]["random"]["16"]

    by_place = np.average(score["at_institutions"], weights=sizes)

    assert by_place == pytest.approx(np.mean(score["accuracy"]))


def test_simple_methods_learn_the_types_from_all_genes(outcome: Results) -> None:
    for method in ("logistic", "boosting", "discriminant", "mixture"):
        score = scores(outcome)[method]["all"][str(N_GENES)]
        assert score["accuracy"][0] > 0.85, method


def test_chosen_genes_are_named_in_the_order_of_choice_in_numbers_and_page(
    outcome: Results, ground: Split
) -> None:
    found = outcome.numbers["panel_selection"]
    agreed = found["agreed"]["0.95"]

    assert set(found["selected"]) <= set(ground.genes.genes)
    assert len(set(found["selected"])) == len(found["selected"]) == 32
    assert (np.diff(found["bound"]) <= 0).all()
    assert 0 < agreed <= N_GENES
    assert ", ".join(found["selected"][: min(agreed, 32)][:4]) in outcome.page


def test_the_page_can_be_written_with_its_pictures(
    outcome: Results, tmp_path: Path
) -> None:
    page.write(outcome, tmp_path, command="test", commit="unknown", started=0.0)

    assert json.loads((tmp_path / "classification.json").read_text())["found"]
    for figure in outcome.figures:
        assert f"(classification-{figure}.png)" in outcome.page
        assert (tmp_path / f"classification-{figure}.png").is_file()


def test_a_second_run_reads_what_was_said_and_finds_the_same(
    ground: Split, outcome: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(methods, "_answer", refuse)
    monkeypatch.setattr(methods, "share_right", refuse)

    again = comparison.run(ground, Console(file=StringIO()))

    assert again.numbers == outcome.numbers


def test_quick_leaves_out_hospitals_alone_and_most_panels(
    data: Path, out: Path
) -> None:
    found = comparison.run(grounds(data, out, quick=True), Console(file=StringIO()))

    assert "local" not in scores(found)
    assert set(scores(found)["federated"]["random"]) == {"8", "32"}
    assert len(scores(found)["federated"]["random"]["8"]["accuracy"]) == 1


def test_a_study_without_classification_is_refused(data: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match='"small" has no classification'):
        comparison.run(grounds(data, out, rounds=0), Console(file=StringIO()))


def test_what_sites_tell_right_comes_from_panels_chosen_without_them(
    ground: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    chose: list[tuple[str, ...]] = []
    judged: list[int] = []
    types_of, n_right = methods.types_of, panel_selection.n_right

    def types(of: Split, sites: list[str]) -> Any:
        chose.append(tuple(sites))
        return types_of(of, sites)

    def right(types: Any, panel: Any, values: Any, truth: Any) -> int:
        judged.append(len(values))
        count: int = n_right(types, panel, values, truth)
        return count

    monkeypatch.setattr(methods, "types_of", types)
    monkeypatch.setattr(panel_selection, "n_right", right)

    shares = methods.share_right(ground, [4])

    names = sorted(ground.sites)
    assert chose == [tuple(n for n in names if n != one) for one in names]
    assert sum(judged) == 2 * sum(len(ground.sites[n].patients) for n in names)
    assert set(shares) == {4, N_GENES}


def test_the_paired_comparison_and_confusion_are_counted_by_hand(
    ground: Split,
) -> None:
    task = methods.task_of(ground)
    wrong = task.truth.copy()
    wrong[0] = 1 - wrong[0]
    answers: Answers = {
        ("federated", "random", 8, "1-0"): [task.truth, wrong],
        ("logistic", "random", 8, "1-0"): [wrong],
    }

    found = comparison.Scores.of(comparison._results(task, answers))
    confusion = comparison._confusion(task, answers, "logistic")

    n = len(task.truth)
    against = found.against("random", 8)
    assert found.accuracy["federated"]["random"][8] == pytest.approx([1 - 0.5 / n])
    assert against["logistic"]["difference"] == pytest.approx(0.5 / n)
    own, other = task.truth[0], wrong[0]
    assert confusion[own, other] == pytest.approx(1 / (task.truth == own).sum())


def test_panels_of_a_draw_hold_all_smaller_ones(ground: Split) -> None:
    first, *_ = methods.drawn(ground, 1)
    by_size: list[Panel] = sorted(first, key=lambda panel: len(panel.genes))

    for less, more in itertools.pairwise(by_size):
        assert set(less.genes) < set(more.genes)
