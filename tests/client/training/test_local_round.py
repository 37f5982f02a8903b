"""One round at one hospital: who takes part, what is trained, what travels."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgex.client.training.local_round import RoundResult, train_round
from fedgex.common.data.dataset import Patients
from fedgex.common.errors import DataError, UpdateError
from fedgex.common.models import tasks
from fedgex.common.models.losses import eligible, phase_loss, trained_parameters
from fedgex.common.models.parameters import parameters
from fedgex.common.models.training import evaluate, fit
from fedgex.common.seeds import derive
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Study

N, V = 8, 6
FINE_TUNING = (CLASSIFICATION, SURVIVAL)
PARTS = {"tuned": ("encoder", "head"), "frozen": ("head",)}
"""Parts that travel, by backbone."""


def study(backbone: str = "tuned", **strategy: Any) -> Study:
    how = {"rounds": 3, "backbone": backbone}
    types = ["BRCA", "KIRC"]
    return Study.read(
        {
            "name": "test",
            "pretraining": {"rounds": 3},
            "classification": how | {"classes": types, "min_genes": 2},
            "survival": how | {"cancer_types": types, "interval_ends": [365, 730]},
            "strategy": {"name": "fedavg"} | strategy,
        },
        "test",
    )


def patients() -> Patients:
    nan = torch.nan
    return Patients(
        values=torch.randn(N, V, generator=torch.Generator().manual_seed(0)),
        cancer_type=("BRCA", "KIRC", "LUAD", None, "BRCA", "KIRC", "BRCA", "KIRC"),
        duration=torch.tensor([100.0, 500, 300, 900, 0, nan, 50, 800]),
        event=torch.tensor([1.0, 0, 1, 1, 1, 1, nan, 1]),
        clinical=torch.zeros(N, 2),
    )


def sent(a_study: Study, phase: str) -> tasks.Parameters:
    whole = tasks.begin(a_study, phase, tasks.initial(a_study, V))
    return tasks.download_state(a_study, phase, whole)


def trained(
    a_study: Study, phase: str, folder: Path, number: int = 1, min_cell_count: int = 2
) -> RoundResult:
    return train_round(
        a_study,
        phase,
        number,
        patients(),
        sent(a_study, phase),
        site="h1",
        min_cell_count=min_cell_count,
        state_dir=folder,
    )


def same(a: tasks.Parameters, b: tasks.Parameters) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("phase", "rows"),
    [
        (PRETRAINING, [0, 1, 2, 3, 4, 5, 6, 7]),
        (CLASSIFICATION, [0, 1, 4, 5, 6, 7]),
        (SURVIVAL, [0, 1, 7]),
    ],
)
def test_patients_are_eligible_by_cancer_type_and_known_follow_up(phase, rows):
    taken = eligible(study(), phase, patients())

    assert torch.equal(taken.values, patients().values[rows])
    assert taken.cancer_type == tuple(patients().cancer_type[i] for i in rows)


@pytest.mark.parametrize(
    ("phase", "min_cell_count"), [(CLASSIFICATION, 7), (SURVIVAL, 4)]
)
def test_too_few_patients_are_a_finding_that_tells_the_floor_and_no_count(
    tmp_path, phase, min_cell_count
):
    with pytest.raises(DataError) as refusal:
        trained(study(), phase, tmp_path, min_cell_count=min_cell_count)

    (finding,) = refusal.value.findings
    assert (finding.code, finding.severity) == ("FX-SITE-003", "error")
    assert finding.where == phase
    text = str(finding).replace(finding.code, "")
    assert set(re.findall(r"\d+", text)) == {str(min_cell_count)}


def test_as_many_patients_as_the_floor_are_enough(tmp_path):
    assert (
        trained(study(), SURVIVAL, tmp_path, min_cell_count=3).report.num_examples == 3
    )


@pytest.mark.parametrize("phase", FINE_TUNING)
@pytest.mark.parametrize(("backbone", "parts"), PARTS.items())
def test_exactly_what_is_trained_travels(tmp_path, phase, backbone, parts):
    result = trained(study(backbone), phase, tmp_path)

    model = tasks.build(study(backbone), V, phase)
    up = {f"{phase}.{part}": getattr(model, part) for part in parts}
    assert set(result.update) == set(parameters(up))


def test_the_whole_backbone_travels_in_pretraining(tmp_path):
    result = trained(study(), PRETRAINING, tmp_path)

    assert set(result.update) == set(sent(study(), PRETRAINING))
    assert result.report.num_examples == N
    assert not same(result.update, sent(study(), PRETRAINING))


@pytest.mark.parametrize("phase", FINE_TUNING)
@pytest.mark.parametrize("backbone", ["frozen", "tuned"])
def test_a_frozen_encoder_stays_bit_equal_and_a_tuned_one_moves(phase, backbone):
    a_study = study(backbone)
    model = tasks.build(a_study, V, phase)
    before = copy.deepcopy(parameters(tasks.named(phase, model)))
    fitting = eligible(a_study, phase, patients())

    fit(
        trained_parameters(a_study, phase, model),
        phase_loss(a_study, model, fitting),
        len(fitting),
        a_study.phases[phase],
        learning_rate=0.01,
        seed=0,
    )

    moved = {
        k
        for k, v in parameters(tasks.named(phase, model)).items()
        if not np.array_equal(v, before[k])
    }
    encoder = {name for name in before if name.startswith(f"{phase}.encoder.")}
    assert bool(moved & encoder) == (backbone == "tuned")
    assert moved - encoder


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_a_round_repeats_itself_bit_by_bit(tmp_path, phase):
    first = trained(study(), phase, tmp_path)

    again = trained(study(), phase, tmp_path)

    assert same(first.update, again.update)
    assert first.report == again.report
    assert first.pre_training_loss == again.pre_training_loss


def test_sites_and_rounds_draw_differently(tmp_path):
    def update(site: str, number: int) -> tasks.Parameters:
        return train_round(
            Study.read({"name": "t", "pretraining": {"final_learning_rate": 1}}, "t"),
            PRETRAINING,
            number,
            patients(),
            sent(study(), PRETRAINING),
            site=site,
            min_cell_count=2,
            state_dir=tmp_path,
        ).update

    first = update("h1", 1)

    assert not same(first, update("h2", 1))
    assert not same(first, update("h1", 2))


def test_the_global_parameters_are_evaluated_before_training(tmp_path):
    result = trained(study(), SURVIVAL, tmp_path)

    whole = tasks.begin(study(), SURVIVAL, tasks.initial(study(), V))
    model = tasks.load(study(), V, SURVIVAL, whole)
    loss = phase_loss(study(), model, eligible(study(), SURVIVAL, patients()))
    expected = evaluate(loss, 3, 32, derive(study().seed, "h1", SURVIVAL, 1))
    assert result.pre_training_loss == pytest.approx(expected)


def test_what_came_in_is_not_changed(tmp_path):
    incoming = sent(study(), PRETRAINING)
    before = copy.deepcopy(incoming)

    train_round(
        study(),
        PRETRAINING,
        1,
        patients(),
        incoming,
        site="h1",
        min_cell_count=2,
        state_dir=tmp_path,
    )

    assert same(incoming, before)


def test_a_parameter_that_did_not_come_is_refused_by_name(tmp_path):
    incoming = dict(sent(study(), SURVIVAL))
    del incoming["survival.head.own.weight"]

    with pytest.raises(UpdateError, match=r"survival\.head\.own.weight is missing"):
        train_round(
            study(),
            SURVIVAL,
            1,
            patients(),
            incoming,
            site="h1",
            min_cell_count=2,
            state_dir=tmp_path,
        )


# ---- the form in which an update travels ----


def test_parameters_travel_in_single_precision(tmp_path):
    update = trained(study(), PRETRAINING, tmp_path).update

    assert {array.dtype for array in update.values()} == {np.dtype(np.float32)}


def test_a_delta_is_the_change(tmp_path):
    whole = trained(study(), PRETRAINING, tmp_path).update
    incoming = sent(study(), PRETRAINING)

    update = trained(study(update="delta"), PRETRAINING, tmp_path).update

    assert {array.dtype for array in update.values()} == {np.dtype(np.float32)}
    assert same(update, {k: v - incoming[k] for k, v in whole.items()})


@pytest.mark.parametrize("phase", [PRETRAINING, *FINE_TUNING])
def test_a_round_leaves_nothing_at_the_site(tmp_path, phase):
    trained(study(), phase, tmp_path / "state")

    assert not (tmp_path / "state").exists()
