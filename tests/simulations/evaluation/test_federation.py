"""What federation contributes, from files to page; and the command that asks."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module, resources
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedgex.common.data.scales import Scale
from fedgex.common.study import Classification, Study, Survival
from fedgex.server import evaluation
from fedgex.simulations import scenario, training
from fedgex.simulations.analysis import foreign_scale
from fedgex.simulations.cli import Question, app
from fedgex.simulations.data.split import split
from fedgex.simulations.evaluation.arms import FEDERATED, Arm, arms, models
from fedgex.simulations.evaluation.federation import comparison, scores, variants
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import Protocol, Split, prepare

from .. import small

SCENARIO = """
[study]
name = "small"
minimum_cohort = 5
cross_products = true
linear_rank = 4
linear_types = ["type-1", "type-2"]
[study.vocabulary]
min_share = 0.5
[study.pretraining]
rounds = 1
batch_size = 64
[study.classification]
rounds = 1
batch_size = 64
backbone = "frozen"
classes = ["type-1", "type-2"]
[study.survival]
rounds = 1
batch_size = 64
cancer_types = ["type-1", "type-2"]
[study.strategy]
name = "fedavg"
[data]
expression = "expression.parquet"
scale = "log2p1"
clinical = "clinical.csv"
[sites]
column = "institution"
minimum_patients = 5
[holdout]
institutions = [
    "Hold-out 01", "Hold-out 02", "Hold-out 03", "Hold-out 04", "Hold-out 05",
]
"""
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.new_data(
        tmp_path_factory, n_sites=3, n_holdouts=5, patients_per_site=20, n_genes=114
    )


@pytest.fixture(scope="module")
def ground(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "small.toml").write_text(SCENARIO)
    protocol = Protocol.read(
        {
            "scenario": str(folder / "small.toml"),
            "seeds": SEEDS,
            "validation": [],
            "quick": {"rounds": 1, "patients": 500},
        },
        "test",
    )
    made = prepare(protocol, data, folder / "out", workers=1, quick=True)
    return dataclasses.replace(made, seeds=SEEDS)


def ask(ground: Split, said: StringIO) -> Results:
    return comparison.run(ground, Console(file=said, width=200))


@pytest.fixture(scope="module")
def outcome(ground: Split) -> Results:
    return ask(ground, StringIO())


@pytest.fixture(scope="module")
def numbers(outcome: Results) -> Any:
    """Return what a script reads."""
    return json.loads(json.dumps(outcome.numbers, allow_nan=False))


def test_the_federated_model_is_judged_as_the_server_judges_it(
    ground: Split, numbers: Any
) -> None:
    console = Console(file=StringIO())
    for position, seed in enumerate(SEEDS):
        [(_, model)] = models(ground, arms(ground, seed, (FEDERATED,)), console)
        study, whole = model.study, model.parameters
        unseen = model.patients(ground.unseen)

        found = numbers["central"][FEDERATED][position]

        imputer = evaluation.model_imputer(study, whole, len(ground.genes))
        restored = evaluation.evaluate_imputer(
            imputer, unseen, scores.RESTORED, seed, ("mcar", "panel")
        )
        dropped = evaluation.evaluate_imputer(
            imputer, unseen, scores.DROPPED_OUT, seed, ("mnar",)
        )
        assert found["mse-0.5"] == pytest.approx(restored["mcar"]["0.5"].mse, rel=1e-4)
        assert found["mse-panel-100"] == pytest.approx(
            restored["panel"]["100"].mse, rel=1e-4
        )
        assert found["mse-mnar-0.5"] == pytest.approx(
            dropped["mnar"]["0.5"].mse, rel=1e-4
        )
        everything = torch.ones(len(ground.genes), dtype=torch.bool)
        accuracy, _ = evaluation.evaluate_classes(study, whole, unseen, everything)
        assert found["accuracy"] == pytest.approx(accuracy)
        survival = evaluation.evaluate_survival(study, whole, unseen).values()
        enough = [s["c_index"] for s in survival if s["events"] >= 10]
        assert found["c-index"] == pytest.approx(np.mean(enough))


def test_every_seed_has_both_and_one_seed_everything_else(numbers: Any) -> None:
    assert {len(values) for values in numbers["central"].values()} == {len(SEEDS)}
    assert set(numbers["error_against_pooled"]) == {
        "federated",
        "pooled",
        "local, mean over sites",
        "FedProx",
        "large sites and those of ten",
        "large sites only",
        "different panels, per gene",
        "without the largest site",
        "one site in log10(x + 1)",
    }
    assert set(numbers["error_against_pooled"]["pooled"].values()) == {1.0}


def test_institutions_are_compared_in_pairs(numbers: Any) -> None:
    assert 0 < numbers["p"]["mse-0.5"] <= 1
    assert numbers["p"]["c-index"] is None


def test_a_site_counts_where_unseen_patients_of_its_cancers_can_tell(
    numbers: Any,
) -> None:
    for key, name in (("mse-0.5", "MSE, 50 % hidden"), ("c-index", "C-index")):
        able = [s for s in numbers["sites"].values() if key in s["local"]]
        better = [
            s
            for s in able
            if key != "c-index" and s["federated"][key] < s["local"][key]
        ]
        tally = numbers["sites_against_local"][name]

        assert sum(tally.values()) == len(able) > 0
        assert key == "c-index" or tally["better"] == len(better)


def test_restricted_to_a_sites_cancers_the_model_is_right_as_often_or_more(
    numbers: Any,
) -> None:
    able = [s for s in numbers["sites"].values() if "accuracy" in s["local"]]

    assert able
    for site in able:
        assert site["federated among"]["accuracy"] >= site["federated"]["accuracy"]
        assert "c-index" not in site["local"] or (
            site["federated among"]["c-index"] == site["federated"]["c-index"]
        )
    tallies = numbers["sites_against_local"]
    tally = tallies["accuracy, all genes, restricted to the cancers"]
    assert sum(tally.values()) == len(able)


def test_without_deaths_and_with_one_type_a_site_is_not_estimable(
    ground: Split, tmp_path: Path
) -> None:
    rows = np.array([t == "type-1" for t in ground.unseen.clinical["cancer_type"]])
    clinical = ground.unseen.clinical.assign(event=0.0)
    censored = dataclasses.replace(ground.unseen, clinical=clinical)
    one_type = censored.take(rows)
    poor = dataclasses.replace(
        ground,
        unseen=one_type,
        institution=ground.institution[rows],
        seeds=SEEDS[:1],
    )

    found = ask(poor, StringIO())

    each_site = found.page.split("## Each site")[1].split("## Ways")[0]
    assert "each of the 0 evaluable sites of 3" in each_site
    assert "not estimable" in each_site
    assert found.numbers["central"][FEDERATED][0]["c-index"] is None


def test_a_foreign_scale_is_found_at_the_door_or_by_the_server(
    numbers: Any,
) -> None:
    checks = numbers["checks"]

    assert checks["counts"] == {"enters": False, "findings": ["FX-DATA-033 error"]}
    assert checks["log10"]["enters"]
    assert checks["log10"]["findings"] == ["FX-DATA-034 warning"]
    assert checks["log10"]["level_ratio"] == pytest.approx(np.log10(2), rel=0.15)
    assert checks["log10"]["norm_ratio"] > 0
    assert checks["ln"]["enters"]
    assert checks["ln"]["findings"] == []
    assert checks["ln"]["level_ratio"] == pytest.approx(np.log(2), rel=0.15)


def test_a_foreign_scale_is_what_the_site_sends(ground: Split) -> None:
    site = sorted(ground.sites)[0]

    cohort, _ = foreign_scale.at_the_door(
        ground.folder / "sites" / site,
        ground.study,
        Scale.LOG2P1,
        foreign_scale.MISTAKES["log10"],
    )

    assert cohort is not None
    x = 2 ** ground.sites[site].expression.astype(float) - 1
    assert cohort.expression == pytest.approx(np.log10(x + 1), abs=1e-5, nan_ok=True)


def test_few_and_many_local_steps_keep_the_epochs_of_the_study() -> None:
    study = Study.read(
        {
            "name": "paced",
            "pretraining": {"rounds": 8, "local_epochs": 2},
            "classification": {"rounds": 20, "classes": ["a", "b"]},
            "strategy": {"name": "fedavg"},
        },
        "test",
    )

    ways = variants.ways_to_train(study, quick=False)

    def pace(name: str) -> list[tuple[int, int]]:
        phases = ways[name][1].phases.values()
        return [(phase.local_epochs, phase.rounds) for phase in phases]

    assert pace("few-local-steps") == [(1, 16), (1, 20)]
    assert pace("many-local-steps") == [(4, 4), (2, 10)]
    assert pace("fedprox") == [(2, 8), (1, 20)]


def test_a_server_side_optimiser_trains_without_an_engine(ground: Split) -> None:
    study = ground.study.model_copy(
        update={
            "strategy": ground.study.strategy.model_copy(update={"name": "fedadam"}),
            "classification": Classification(),
            "survival": Survival(),
        }
    )
    arm = Arm(name="adaptive", study=study, sites=ground.sites)

    [(_, model)] = models(ground, [arm], Console(file=StringIO()))

    bias = model.parameters["backbone.decoder.bias.weight"]
    assert 0 < np.abs(bias).max() < 1


def test_studies_that_differ_in_fine_tuning_alone_share_one_pretraining(
    ground: Split, tmp_path: Path
) -> None:
    fresh = dataclasses.replace(ground, folder=tmp_path)
    study = ground.study
    slower = study.classification.model_copy(update={"learning_rate": 1e-4})
    studies = [study, study.model_copy(update={"classification": slower})]
    wanted = [Arm(name="both", study=s, sites=ground.sites) for s in studies]

    found = [model for _, model in models(fresh, wanted, Console(file=StringIO()))]

    begun = training.begin(study, ground.genes, ground.sites)
    patients = {name: fresh.patients(c) for name, c in ground.sites.items()}
    at_once = training.train(begun, patients).parameters
    assert found[0].parameters.keys() == at_once.keys()
    for name, array in at_once.items():
        np.testing.assert_array_equal(found[0].parameters[name], array, err_msg=name)
    head = "classification.head.linear.weight"
    assert (found[0].parameters[head] != found[1].parameters[head]).any()
    assert len(list((tmp_path / "models").glob("both-pretrained-*"))) == 1


def test_panels_are_those_of_a_scenario_with_such_a_share(
    ground: Split, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "panels.toml"
    path.write_text(SCENARIO.replace("[sites]", "[sites]\npanel_share = 0.6"))
    parts = split(scenario.find(str(path)), data, tmp_path / "split")

    for site in parts.sites:
        file = tmp_path / "split" / "sites" / site / "expression.parquet"
        some = variants.some_genes(ground.sites[site], 1, site)

        assert some.genes == tuple(pd.read_parquet(file).columns)


def test_a_benchmark_that_goes_on_trains_nothing_again_and_says_the_same(
    ground: Split, outcome: Results
) -> None:
    said = StringIO()

    again = ask(ground, said)

    assert said.getvalue() == ""
    assert again.numbers == outcome.numbers
    assert again.page == outcome.page


def test_no_line_of_the_page_names_a_patient(outcome: Results) -> None:
    assert "Hospital-0" not in outcome.page  # how patients are called
    assert "Hold-out-0" not in outcome.page


def test_all_questions_of_the_command_have_an_answer() -> None:
    for question in get_args(Question):
        module = import_module(f"fedgex.simulations.evaluation.{question}")
        page = resources.files("fedgex.simulations.evaluation") / "pages"

        assert callable(module.run)
        assert (page / f"{question}.md").is_file()


def test_an_unknown_question_is_a_usage_error(tmp_path: Path) -> None:
    arguments = ["benchmark", "weather", "--data", ".", "--out", str(tmp_path / "out")]

    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_protocol_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.toml")
    arguments = ["benchmark", "federation", "--data", ".", "--out", str(tmp_path)]

    result = CliRunner().invoke(app, [*arguments, "--protocol", absent])

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "absent.toml" in result.stderr
