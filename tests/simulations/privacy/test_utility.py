"""What privacy costs in usefulness, from files to table."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedgex.common.data.dataset import Patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.errors import ConfigError, DataError
from fedgex.simulations.cli import app
from fedgex.simulations.privacy import measures, utility
from fedgex.simulations.scenario import Scenario

from .. import small

TYPES = ["type-1", "type-2"]


def scenario(**changes: Any) -> Scenario:
    training = {"rounds": 1, "batch_size": 32}
    study = {
        "linear_rank": 4,
        "privacy": {
            "patient": {
                "epsilon": 4,
                "delta": 1e-3,
                "clip": 1,
                "sample_rate": 1,
                "label_noise": 20,
            }
        },
        "public": {"statistics": True, "epochs": 1},
        "classification": training | {"classes": TYPES, "backbone": "frozen"},
    }
    return small.scenario(study | changes, public={"institutions": ["Hospital 01"]})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.new_data(tmp_path_factory, n_sites=3, patients_per_site=40, n_genes=80)


def compare(data: Path, out: Path, said: StringIO | None = None) -> utility.Report:
    console = Console(file=said or StringIO(), width=200)
    return utility.utility(scenario(), data, out, console, epsilons=(8.0,), seeds=2)


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished comparison."""
    out = tmp_path_factory.mktemp("utility") / "out"
    compare(data, out)
    return out


def test_each_condition_is_judged_once_a_seed(done: Path) -> None:
    report = json.loads((done / "utility.json").read_text())

    assert [each["name"] for each in report["conditions"]] == [
        "public cohort only",
        "epsilon 8",
        "without privacy, same start",
        "without privacy, all of it",
    ]
    assert [each["epsilon"] for each in report["conditions"]] == [None, 8, None, None]
    assert report["seeds"] == [1, 2]
    for each in report["conditions"]:
        assert {len(values) for values in each["values"].values()} == {2}
        assert {"mse-mcar-0.5", "mse-mcar-0.9", "accuracy", "accuracy-64"} <= set(
            each["values"]
        )
    assert report["conditions"][1]["noise_multiplier"] > 0
    assert (done / "utility.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_that_goes_on_trains_nothing_again_and_says_the_same(
    done: Path, data: Path
) -> None:
    before, said = (done / "utility.json").read_text(), StringIO()

    compare(data, done, said)

    assert "8 models, 0 to train" in said.getvalue()
    assert (done / "utility.json").read_text() == before


def test_a_lost_cell_alone_is_trained_again_and_comes_out_the_same_without_privacy(
    done: Path, data: Path
) -> None:
    lost = min((done / "cells").glob("*-public.json"))
    before, said = json.loads(lost.read_text()), StringIO()
    lost.unlink()

    compare(data, done, said)

    after = json.loads(lost.read_text())
    assert "8 models, 1 to train" in said.getvalue()
    assert {k: v for k, v in after.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }


def test_no_file_of_the_result_names_a_patient(done: Path) -> None:
    text = (done / "utility.json").read_text() + (done / "utility.md").read_text()

    assert "Hospital-0" not in text  # how patients are called


def condition(name: str, epsilon: float | None, **values: list[float]) -> Any:
    return utility.Condition(
        name=name,
        epsilon=epsilon,
        noise_multiplier=None if epsilon is None else 2.0,
        values={key.replace("_", "-"): value for key, value in values.items()},
        seconds=[1.0, 1.0],
    )


def report(*conditions: utility.Condition) -> utility.Report:
    return utility.Report(
        study="small",
        study_hash="a" * 64,
        delta=1e-3,
        seeds=[1, 2],
        conditions=conditions,
        notes=[],
    )


def test_errors_stand_beside_both_references_in_per_cent_and_scores_by_difference() -> (
    None
):
    lines = utility.table(
        report(
            condition(
                "epsilon 8", 8.0, mse_panel_100=[0.54, 0.56], accuracy=[0.88, 0.90]
            ),
            condition(
                "without privacy, same start",
                None,
                mse_panel_100=[0.5, 0.5],
                accuracy=[0.9, 0.9],
            ),
            condition(
                "without privacy, all of it",
                None,
                mse_panel_100=[0.44, 0.44],
                accuracy=[0.95, 0.95],
            ),
        )
    )

    # Means 0.55 and 0.89; SD of two values is their distance over the root of two.
    assert lines[2].split(" | ")[1] == "0.550 ± 0.014 (+10.0 %, +25.0 %)"
    assert lines[3].split(" | ")[1] == "0.890 ± 0.014 (-0.010, -0.060)"
    assert lines[3].split(" | ")[2] == "0.900 ± 0.000"


def test_the_reference_that_keeps_nothing_back_is_a_study_that_sites_would_accept() -> (
    None
):
    study = scenario().study

    every = utility._conditions(study, (1.0,), 70)

    assert every["epsilon 1"].privacy.patient is not None
    assert every["epsilon 1"].privacy.patient.epsilon == 1.0
    free = every["without privacy, all of it"]
    assert free.linear_rank == 69  # at most one less than there are genes
    assert free.strategy.weights == "patients"
    assert not free.public.statistics
    for each in every.values():
        assert type(study).from_json(each.to_json(), "test") == each  # is valid


def test_the_c_index_counts_by_deaths_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = {
        "A": {"c_index": 0.6, "events": 30},
        "B": {"c_index": 0.8, "events": 10},
        "C": {"c_index": 0.1, "events": 9},
        "D": {"c_index": None, "events": 50},
    }
    monkeypatch.setattr(measures.evaluation, "evaluate_survival", lambda *_: judged)

    found = measures._c_index(scenario().study, {}, cast(Patients, None))

    assert found == pytest.approx((30 * 0.6 + 10 * 0.8) / 40)


def test_a_model_of_another_scale_is_judged_in_the_scale_at_hand() -> None:
    class Zero:
        """Fills with the mean of the scale it was trained on."""

        def impute(self, values: Any) -> Any:
            return np.nan_to_num(values)

    trained = Standardisation(mean=np.array([5.0, 1.0]), sd=np.array([2.0, 4.0]))
    judged = Standardisation(mean=np.array([3.0, 1.0]), sd=np.array([0.5, 2.0]))
    values = np.array([[np.nan, 0.25], [0.5, np.nan]], dtype=np.float32)

    filled = measures._Rescaled(Zero(), trained, judged).impute(values)

    # The trained mean of the first gene, 5, is (5 - 3) / 0.5 = 4 where it is judged.
    assert filled == pytest.approx(np.array([[4.0, 0.25], [0.5, 0.0]]))


def test_a_study_without_patient_level_privacy_is_refused(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.patient"):
        utility.utility(
            scenario(privacy={}), data, tmp_path / "out", Console(file=StringIO())
        )


def test_a_delta_too_large_for_a_hospital_is_refused(
    data: Path, tmp_path: Path
) -> None:
    patient = {"epsilon": 4, "delta": 0.1, "clip": 1, "sample_rate": 0.5}
    large = scenario(privacy={"patient": patient})

    with pytest.raises(DataError, match="FX-PRIV-001"):
        utility.utility(large, data, tmp_path / "out", Console(file=StringIO()))


def test_epsilons_that_are_no_numbers_are_a_usage_error(tmp_path: Path) -> None:
    arguments = ["utility", "private", "--data", ".", "--out", str(tmp_path / "out")]

    result = CliRunner().invoke(app, [*arguments, "--epsilons", "1,two"])

    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
