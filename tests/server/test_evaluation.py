import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lifelines.utils import concordance_index
from numpy.typing import NDArray

from fedgex.common.data.dataset import Patients
from fedgex.common.models import tasks
from fedgex.common.models.uncertainty import unlikeness
from fedgex.common.study import Evaluation, Study
from fedgex.server import evaluation
from fedgex.server.evaluation import class_scores, evaluate_risk, hidden_cells

N_GENES = 12
RULE = Evaluation(rates=(0.3, 0.7), panels=(4, 8), patients_per_round=5)


def patients(
    n: int = 20,
    *,
    types: tuple[str | None, ...] | None = None,
    duration: list[float] | None = None,
    event: list[float] | None = None,
    lacking: tuple[int, ...] = (),
) -> Patients:
    values = torch.randn(n, N_GENES, generator=torch.Generator().manual_seed(3))
    values[:, list(lacking)] = torch.nan
    return Patients(
        values=values,
        cancer_type=types or ("BRCA",) * n,
        duration=torch.tensor(duration or [float(30 * (i + 1)) for i in range(n)]),
        event=torch.tensor(event or [1.0] * n),
        clinical=torch.zeros(n, 2),
    )


def study(**settings: Any) -> Study:
    return Study.model_validate(
        {
            "name": "judged",
            "evaluation": RULE.model_dump(),
            "pretraining": {"rounds": 1},
            **settings,
        }
    )


class Recorder:
    """Fills with zeros, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[NDArray[np.bool_]] = []

    def impute(self, values: NDArray[Any]) -> NDArray[Any]:
        self.shown.append(~np.isnan(values))
        filled: NDArray[Any] = np.nan_to_num(values)
        return filled


class Oracle:
    """Knows the truth."""

    def __init__(self, truth: NDArray[np.float32]) -> None:
        self.truth = truth

    def impute(self, values: NDArray[Any]) -> NDArray[Any]:
        filled = values.copy()
        filled[np.isnan(values)] = self.truth[np.isnan(values)]
        return filled


def test_every_pattern_is_judged_at_every_rate_and_panel() -> None:
    settings = [
        (pattern, key)
        for pattern, key, _ in hidden_cells(
            patients(), RULE, 1, ("mcar", "panel", "mnar")
        )
    ]

    assert settings == [
        ("mcar", "0.3"),
        ("mcar", "0.7"),
        ("panel", "4"),
        ("panel", "8"),
        ("mnar", "0.3"),
        ("mnar", "0.7"),
    ]


def test_hidden_cells_depend_on_the_seed_and_not_on_what_was_drawn_before() -> None:
    def cells(seed: int, *patterns: Any) -> dict[tuple[str, str], list[Any]]:
        torch.rand(7)  # whoever draws elsewhere changes nothing
        return {
            (pattern, key): hidden.tolist()
            for pattern, key, hidden in hidden_cells(patients(), RULE, seed, patterns)
        }

    everything = cells(1, "mcar", "panel", "mnar")

    assert cells(1, "mnar", "panel", "mcar") == everything
    assert cells(1, "panel").items() <= everything.items()
    other = cells(2, "mcar", "panel", "mnar")
    assert all(other[setting] != everything[setting] for setting in everything)


def test_every_method_is_judged_on_the_same_cells() -> None:
    one, other = Recorder(), Recorder()

    evaluation.evaluate_imputer(one, patients(lacking=(2,)), RULE, 1)
    evaluation.evaluate_imputer(other, patients(lacking=(2,)), RULE, 1)

    assert len(one.shown) == 6
    for first, second in zip(one.shown, other.shown, strict=True):
        np.testing.assert_array_equal(first, second)


def test_panels_that_leave_nothing_to_restore_are_left_out() -> None:
    holdout = patients(lacking=(0, 1, 2, 3))  # eight genes are left

    shown = {
        key: (holdout.measured & ~hidden).any(dim=0).sum()
        for _, key, hidden in hidden_cells(holdout, RULE, 1, ("panel",))
    }

    assert shown == {"4": 4}


def test_the_error_is_over_hidden_cells_alone() -> None:
    holdout = patients(lacking=(5,))
    zeros, truth = Recorder(), holdout.values.numpy()

    scores = evaluation.evaluate_imputer(zeros, holdout, RULE, 1, ("mcar",))

    for seen, score in zip(zeros.shown, scores["mcar"].values(), strict=True):
        hidden = ~seen & ~np.isnan(truth)
        assert score.mse == pytest.approx(np.mean(truth[hidden] ** 2.0))
    perfect = evaluation.evaluate_imputer(Oracle(truth), holdout, RULE, 1)
    assert {s.mse for by_key in perfect.values() for s in by_key.values()} == {0.0}


def test_the_plain_numbers_hold_the_mse_of_each_setting() -> None:
    scores = evaluation.evaluate_imputer(Recorder(), patients(), RULE, 1, ("panel",))

    errors = evaluation.mse_only(evaluation.as_numbers(scores))

    assert errors == {"panel": {k: scores["panel"][k].mse for k in ("4", "8")}}


def test_references_need_a_covariance_but_for_the_mean() -> None:
    assert list(evaluation.linear_references(None, 3)) == ["mean"]
    assert list(evaluation.linear_references(np.eye(3), 3)) == [
        "mean",
        "ppca",
        "gaussian",
    ]


labels = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[arrays(np.int64, n, elements=st.integers(0, 4))] * 2)
)


@given(labels)
def test_macro_f1_is_a_mean_over_the_classes_of_the_target(
    pair: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    target, predicted = pair

    accuracy, macro_f1 = class_scores(target, predicted)

    f1 = []
    for each in np.unique(target):
        hits = sum((target == each) & (predicted == each))
        f1.append(2 * hits / (sum(target == each) + sum(predicted == each)))
    assert accuracy == sum(target == predicted) / len(target)
    assert macro_f1 == np.mean(f1)


def test_classes_cannot_be_judged_on_patients_of_other_types() -> None:
    rules = study(classification={"rounds": 1, "classes": ["A", "B"]})
    whole = tasks.begin(rules, "classification", tasks.initial(rules, N_GENES))
    everything = torch.ones(N_GENES, dtype=torch.bool)

    accuracy, f1 = evaluation.evaluate_classes(rules, whole, patients(), everything)

    assert math.isnan(accuracy)
    assert math.isnan(f1)


def test_the_panel_is_all_that_the_classifier_sees() -> None:
    rules = study(classification={"rounds": 1, "classes": ["A", "B"]})
    whole = tasks.begin(rules, "classification", tasks.initial(rules, N_GENES))
    holdout = patients(types=("A", "B", None, "C") * 5)
    panel = torch.arange(N_GENES) < 4
    scrambled = patients(types=holdout.cancer_type)
    scrambled.values[:, 4:] = 1e3

    one = evaluation.evaluate_classes(rules, whole, holdout, panel)
    other = evaluation.evaluate_classes(rules, whole, scrambled, panel)

    assert one == other
    assert one[0] in {i / 10 for i in range(11)}  # ten patients are A or B


def test_the_c_index_within_a_type_is_that_of_lifelines() -> None:
    rng = np.random.default_rng(2)
    holdout = patients(
        40,
        types=("BRCA", "LUAD") * 20,
        duration=rng.integers(1, 30, 40).astype(float).tolist(),
        event=(rng.random(40) < 0.6).astype(float).tolist(),
    )
    risk = rng.normal(size=40).astype(np.float32)

    result = evaluate_risk(holdout, "LUAD", risk)

    rows = slice(1, None, 2)
    duration, event = holdout.duration.numpy()[rows], holdout.event.numpy()[rows]
    expected = concordance_index(duration, -risk[rows], event)
    assert result["c_index"] == pytest.approx(expected)
    assert result["sd"] > 0
    assert result["patients"] == 20
    assert result["events"] == int(event.sum())
    assert result["reason"] is None


def test_patients_without_follow_up_do_not_count() -> None:
    holdout = patients(
        10,
        duration=[0.0, -3.0, math.nan, *(10.0 * i for i in range(1, 8))],
        event=[1.0, 1.0, 1.0, math.nan, *[1.0] * 5, 0.0],
    )

    result = evaluate_risk(holdout, "BRCA", np.arange(10, 0, -1, dtype=np.float32))

    assert (result["patients"], result["events"]) == (6, 5)
    assert result["c_index"] == 1.0  # the higher the risk, the earlier the death


def test_fewer_than_five_deaths_are_too_few() -> None:
    holdout = patients(10, event=[1.0] * 4 + [0.0] * 6)

    result = evaluate_risk(holdout, "BRCA", np.zeros(10, np.float32))

    assert result == {
        "patients": 10,
        "events": 4,
        "c_index": None,
        "sd": None,
        "reason": "fewer than 5 events",
    }


def test_a_type_that_nobody_has_says_so() -> None:
    result = evaluate_risk(patients(10), "LUAD", np.zeros(10, np.float32))

    assert (result["patients"], result["c_index"]) == (0, None)
    assert result["reason"] == "fewer than 5 events"


def test_patients_without_a_predicted_risk_are_not_judged() -> None:
    risk = np.zeros(10, np.float32)
    risk[3] = np.nan

    result = evaluate_risk(patients(10), "BRCA", risk)

    assert result["c_index"] is None
    assert result["reason"] == "no risk predicted"


def test_deaths_that_are_all_on_one_day_cannot_be_put_in_order() -> None:
    result = evaluate_risk(patients(6, duration=[9.0] * 6), "BRCA", np.arange(6.0))

    assert result["events"] == 6
    assert result["c_index"] is None
    assert result["sd"] is None
    assert result["reason"] == "no two patients whose order is known"


def test_a_type_outside_the_study_gets_no_risk() -> None:
    rules = study(survival={"rounds": 1, "cancer_types": ["BRCA"]})
    whole = tasks.initial(rules, N_GENES)
    holdout = patients(4, types=("BRCA", "LUAD", None, "BRCA"))

    risk = evaluation.predict_risk(rules, whole, holdout)

    assert np.isnan(risk).tolist() == [False, True, True, False]


def test_a_round_is_judged_by_what_its_phase_is_about() -> None:
    rules = study(
        classification={"rounds": 1, "classes": ["BRCA", "LUAD"]},
        survival={"rounds": 1, "cancer_types": ["BRCA"]},
    )
    whole = tasks.initial(rules, N_GENES)
    whole = tasks.begin(rules, "classification", whole)

    pretraining = evaluation.evaluate_round(rules, "pretraining", whole, patients())
    classes = evaluation.evaluate_round(rules, "classification", whole, patients())
    survival = evaluation.evaluate_round(rules, "survival", whole, patients())

    assert {k: list(v) for k, v in pretraining.items()} == {
        "mcar": ["0.3", "0.7"],
        "panel": ["4", "8"],
    }
    assert 0 <= classes["accuracy"] <= 1
    assert list(survival) == ["BRCA"]


def test_the_threshold_of_unlikeness_is_exceeded_by_one_patient_in_a_hundred() -> None:
    rules = study(cross_products=True, linear_rank=2)
    whole = tasks.initial(rules, N_GENES)
    many, few = patients(200), patients(29)
    linear = tasks.load_backbone(rules, N_GENES, whole).encoder.linear
    assert linear is not None

    threshold = evaluation.unlike_from(rules, whole, many)

    scores = unlikeness(linear, many.values)
    assert int((scores > threshold).sum()) == 1  # place 199 of 200
    assert evaluation.unlike_from(rules, whole, few) is None
    without = study()
    start = tasks.initial(without, N_GENES)
    assert evaluation.unlike_from(without, start, many) is None
