"""The survival benchmark judges every method on the same patients, and resumes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fedgex.common.data.dataset import Patients
from fedgex.common.errors import ConfigError
from fedgex.common.study import SURVIVAL, Study
from fedgex.simulations import scenario, training
from fedgex.simulations.analysis.cox_screen import CoxScore
from fedgex.simulations.baselines import references
from fedgex.simulations.evaluation import arms
from fedgex.simulations.evaluation.arms import LOCAL
from fedgex.simulations.evaluation.page import Results, write
from fedgex.simulations.evaluation.protocol import Protocol, Split, prepare
from fedgex.simulations.evaluation.survival import comparison, predictions
from fedgex.simulations.evaluation.survival.predictions import (
    COX_RIDGE,
    GAUSSIAN,
    MEAN_FILLED,
    OURS,
    RESTORED,
    TYPE_ONLY,
    WITH_CLINICAL,
)
from fedgex.simulations.evaluation.survival.tables import (
    NOT_ESTIMABLE,
    OVERALL,
    Scores,
    difference,
    recoveries,
    results,
)

from .. import small

TYPES = ("type-1", "type-2")
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def ground(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Split]:
    """The scenario's hold-out, of data with 104 genes."""
    data = small.new_data(
        tmp_path_factory, n_sites=3, n_holdouts=2, patients_per_site=50, n_genes=104
    )
    chosen = small.scenario(
        {
            "cross_products": True,
            "linear_rank": 4,
            "survival": {"rounds": 1, "cancer_types": list(TYPES)},
        }
    )
    protocol = Protocol.read(
        {
            "scenario": "small",
            "seeds": [1, 2],  # sites train alone with the first one only
            "validation": [],
            "quick": {"rounds": 1, "patients": 40},
        },
        "test",
    )
    out = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenario, "find", lambda name: chosen)
        patch.setattr(predictions, "DRAWS", 1)
        patch.setattr(references, "PENALTIES", (3.0,))
        yield prepare(protocol, data, out, workers=1)


@pytest.fixture(scope="module")
def found(ground: Split) -> Results:
    return comparison.run(ground, QUIET)


def unseen(n: int, n_dead: int, name: str = "type-1") -> Patients:
    """Patients who die or leave one a day, the first `n_dead` of them dead."""
    return Patients(
        values=torch.zeros(n, 1),
        cancer_type=(name,) * n,
        duration=torch.arange(1.0, n + 1),
        event=(torch.arange(n) < n_dead).float(),
        clinical=torch.zeros(n, 2),
    )


def study() -> Study:
    values = {
        "name": "small",
        "strategy": {"name": "fedavg"},
        "survival": {
            "rounds": 1,
            "cancer_types": list(TYPES),
            "interval_ends": [5.0, 10.0, 1095.75],
        },
    }
    return Study.read(values, "test")


def said(patients: Patients, risk: torch.Tensor) -> np.ndarray:
    """A forecast of which only the risk matters."""
    alive = torch.full((len(patients), 3), 0.5)
    return torch.cat([risk[:, None], alive], dim=1).double().numpy()


def judged(**c_index: dict[str, float]) -> Scores:
    """What came out on a split, of which only some C-indices matter."""
    return Scores(
        deaths={"type-1": 20, "type-2": 3},
        c_index={k.replace("__", "/"): v for k, v in c_index.items()},
        error={"type-1": 0.04},
        resampled={},
        overall={},
        thirds={},
        anchors={},
    )


# ---- the whole of it ----


def test_every_method_is_evaluated_with_every_seed(found: Results) -> None:
    assert len(found.numbers["seeds"]) == 2
    for number, each in enumerate(found.numbers["seeds"]):
        alone = () if number else (LOCAL,)  # with the first only
        estimable = {n for n, deaths in each["deaths"].items() if deaths >= 10}
        assert estimable
        for method in (*OVERALL, *alone, "panel/" + OURS, "mcar/" + GAUSSIAN):
            values = each["c_index"][method]
            assert set(values) == estimable
            if method != LOCAL:
                assert all(0 <= value <= 1 for value in values.values())
        assert each["c_index"][TYPE_ONLY] == dict.fromkeys(estimable, 0.5)
        absent = each["c_index"][f"anchors/{MEAN_FILLED}"]
        assert absent == dict.fromkeys(estimable, 0.5)
        assert 0 < each["overall"][OURS]["brier"] < 0.5
        assert len(each["resampled"][OURS]) == comparison.RESAMPLES


def test_the_page_and_its_pictures_can_be_written(
    found: Results, tmp_path: Path
) -> None:
    text = write(found, tmp_path, command="test", commit="x", started=0)

    assert all(f"| {name} |" in text for name in OVERALL)
    assert "GPL-3" in text
    assert json.loads((tmp_path / "survival.json").read_text())
    assert (tmp_path / "survival-calibration.png").exists()


def test_a_second_run_trains_and_fits_nothing(
    ground: Split, found: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("it was there already")

    monkeypatch.setattr(training, "train", refuse)
    monkeypatch.setattr(predictions, "of_models", refuse)
    monkeypatch.setattr(predictions, "of_references", refuse)

    again = comparison.run(ground, QUIET)

    assert again.numbers == found.numbers


def test_a_variant_is_what_training_it_from_the_start_gives(
    ground: Split, found: Results
) -> None:
    _, trained = predictions.survival_models(ground, 1, QUIET)
    changed = ground.study.survival.model_copy(update={"clinical": True})
    whole = ground.study.model_copy(update={"survival": changed})

    (arm,) = arms.arms(dataclasses.replace(ground, study=whole), 1, (arms.FEDERATED,))
    ((_, model),) = arms.models(ground, [arm], QUIET)

    variant = trained[WITH_CLINICAL]
    assert variant.study == arm.study
    assert variant.parameters.keys() == model.parameters.keys()
    for name, array in model.parameters.items():
        np.testing.assert_array_equal(array, variant.parameters[name])
    head = [name for name in model.parameters if name.startswith(f"{SURVIVAL}.head")]
    assert any((model.parameters[n] != trained[OURS].parameters[n]).any() for n in head)


def test_a_study_without_survival_is_refused(ground: Split) -> None:
    none = ground.study.survival.model_copy(update={"rounds": 0})
    other = ground.study.model_copy(update={"survival": none})

    with pytest.raises(ConfigError, match="no survival phase"):
        comparison.run(dataclasses.replace(ground, study=other), QUIET)


# ---- what is hidden, and what is found at the sites ----


def test_a_panel_is_the_same_for_all_patients_and_missing_values_are_half(
    ground: Split,
) -> None:
    hidden = predictions.hidden_sets(ground, seed=1)

    measured = hidden["panel-0"].measured
    assert int(measured[0].sum()) == predictions.PANEL
    assert (measured == measured[0]).all()
    assert hidden["mcar-0"].measured.float().mean().item() == pytest.approx(
        0.5, abs=0.02
    )


def test_the_screen_is_the_sum_over_sites_with_the_minimum_cohort(
    ground: Split,
) -> None:
    study = ground.study.model_copy(update={"minimum_cohort": 30})
    strict = dataclasses.replace(ground, study=study)
    scores, sizes = [], []
    for cohort in ground.sites.values():
        rows = cohort.with_survival()
        rows &= (cohort.clinical["cancer_type"] == "type-1").to_numpy()
        patients = ground.patients(cohort.take(rows))
        sizes.append(len(patients))
        if len(patients) >= 30:
            scores.append(
                CoxScore.of(
                    patients.values.numpy(), patients.duration, patients.event, 30
                )
            )
    assert min(sizes) < 30 <= max(sizes)

    found = predictions.screen(strict)["type-1"]

    np.testing.assert_allclose(found.score, np.sum([s.score for s in scores], axis=0))


# ---- judging ----


def test_a_cancer_of_nine_deaths_is_not_estimable() -> None:
    for n_dead, names in ((9, set()), (10, {"type-1"})):
        patients = unseen(30, n_dead)
        right = {OURS: said(patients, -patients.duration)}

        c_index = comparison.evaluate(study(), patients, right, {}, {}).c_index

        assert set(c_index[OURS]) == names
        assert all(value == 1 for value in c_index[OURS].values())


def test_alone_is_the_mean_over_sites_that_have_the_cancer() -> None:
    patients = unseen(30, 20)
    forecast = {
        f"{LOCAL}/right": said(patients, -patients.duration),
        f"{LOCAL}/indifferent": said(patients, 0 * patients.duration),
        f"{LOCAL}/wrong": said(patients, patients.duration),
    }
    able = {
        "right": frozenset({"type-1"}),
        "indifferent": frozenset({"type-1"}),
        "wrong": frozenset({"type-2"}),
    }

    c_index = comparison.evaluate(study(), patients, forecast, able, {}).c_index

    assert c_index[LOCAL] == {"type-1": 0.75}


def test_draws_of_a_scheme_are_averaged_and_sets_are_not_mixed() -> None:
    patients = unseen(30, 20)
    forecast = {
        f"mcar-0/{OURS}": said(patients, -patients.duration),
        f"mcar-1/{OURS}": said(patients, 0 * patients.duration),
        f"panel-0/{OURS}": said(patients, patients.duration),
        f"all/{OURS}": said(patients, patients.duration),
    }

    c_index = comparison.evaluate(study(), patients, forecast, {}, {}).c_index

    assert c_index[f"mcar/{OURS}"] == {"type-1": 0.75}
    assert c_index[f"panel/{OURS}"] == {"type-1": 0.0}
    assert c_index[f"all/{OURS}"] == {"type-1": 0.0}


def test_the_number_over_all_cancers_rewards_the_type_and_that_within_does_not() -> (
    None
):
    early, late = unseen(20, 20), unseen(20, 20, "type-2")
    late = dataclasses.replace(late, duration=late.duration + 100)
    patients = Patients.joined([early, late])
    forecast = said(patients, torch.zeros(40))
    forecast[:20, 1:] = 0.2

    overall = comparison.evaluate(
        study(), patients, {TYPE_ONLY: forecast}, {}, {}
    ).overall

    within = 2 * 20 * 19 / 2
    across = 20 * 20
    expected = (across + within / 2) / (across + within)
    assert overall[TYPE_ONLY]["pooled"] == pytest.approx(expected)
    assert overall[TYPE_ONLY]["stratified"] == 0.5


def test_thirds_hold_what_was_said_beside_what_was_seen() -> None:
    patients = unseen(30, 30)
    patients = dataclasses.replace(patients, duration=patients.duration * 100)
    forecast = said(patients, -patients.duration)
    forecast[:, 3] = np.linspace(0.1, 0.68, 30)  # at 1095.75 days 20 of 30 live

    one = comparison.evaluate(study(), patients, {OURS: forecast}, {}, {})

    assert np.array(one.thirds[OURS]) == pytest.approx(
        np.array([[0.19, 0.0], [0.39, 1.0], [0.59, 1.0]])
    )
    assert one.overall[OURS]["calibration"] == pytest.approx(
        np.mean([0.19, 0.61, 0.41])
    )


# ---- tables ----


def test_a_difference_takes_the_cancers_that_both_methods_have() -> None:
    seeds = [
        judged(
            one={"a": 0.7, "b": 0.6, "c": 0.5},
            other={"a": 0.6, "b": math.nan, "c": 0.4},
        ),
        judged(one={"a": 0.5, "c": 0.5}, other={"a": 0.7, "c": 0.4}),
    ]

    found = difference(seeds, "one", "other")

    assert found.n_cancers == 2
    assert found.mean == pytest.approx(np.mean([-0.05, 0.1]))  # of means over seeds
    assert found.interval is None


def test_the_interval_of_a_difference_is_over_the_same_patients_of_all_seeds() -> None:
    one, other = [0.5, 0.6, 0.7], [0.45, 0.5, 0.65]
    seeds = [
        dataclasses.replace(
            judged(one={"a": 0.6}, other={"a": 0.5}),
            resampled={"one": np.add(one, up), "other": np.add(other, up)},
        )
        for up in (0.0, 0.1)
    ]

    found = difference(seeds, "one", "other")

    assert found.interval == pytest.approx((0.05, 0.0975), abs=0.003)
    assert str(found).startswith("+0.100 (+0.050 to +0.0")


def test_resampled_patients_are_the_same_for_every_method() -> None:
    patients = unseen(30, 20)
    right = said(patients, -patients.duration)

    scores = comparison.evaluate(
        study(), patients, {OURS: right, COX_RIDGE: 2 * right}, {}, {}
    )

    assert scores.resampled[OURS] == scores.resampled[COX_RIDGE]
    assert set(scores.resampled[OURS]) == {1.0}


def test_the_recovered_share_counts_only_where_the_gap_is_sure() -> None:
    def seed(true: float, restored: float) -> Scores:
        return judged(
            anchors__true={"type-1": true},
            **{
                f"anchors__{MEAN_FILLED}": {"type-1": 0.5},
                f"anchors__{RESTORED}": {"type-1": restored},
                f"anchors__{GAUSSIAN}": {"type-1": 0.5},
            },
        )

    sure = recoveries([seed(0.70, 0.64), seed(0.72, 0.68)], TYPES)
    unsure = recoveries([seed(0.50, 0.5), seed(0.62, 0.6)], TYPES)

    assert set(sure) == {"type-1"}
    assert sure["type-1"].is_sure
    assert sure["type-1"].share(sure["type-1"].ours) == pytest.approx(0.16 / 0.21)
    assert sure["type-1"].error == pytest.approx(0.04)
    assert not unsure["type-1"].is_sure


@pytest.mark.parametrize(("ours", "verdict"), [(0.63, "met"), (0.62, "not met")])
def test_goals_say_whether_they_are_met(ours: float, verdict: str) -> None:
    values = {f"mcar__{OURS}": {"type-1": ours}, f"mcar__{GAUSSIAN}": {"type-1": 0.595}}
    seeds = [judged(**values)]

    page = results(seeds, TYPES, quick=False).page

    section = page.split("## Unseen patients with 50% of values")[1].split("##")[0]
    assert f"imputed values: {verdict} (" in section


def test_a_cancer_without_enough_deaths_says_so_in_the_table() -> None:
    seeds = [judged(**{COX_RIDGE: {"type-1": 0.6}})]

    lines = results(seeds, TYPES, quick=False).page.splitlines()

    assert f"| {COX_RIDGE} | 0.600 | {NOT_ESTIMABLE} | 0.600 |" in lines
