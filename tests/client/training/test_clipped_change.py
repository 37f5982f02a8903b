"""A hospital's change of the model under site-level privacy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedgex.client.training.local_round import train_round
from fedgex.common.arrays import clipped
from fedgex.common.data.dataset import Patients
from fedgex.common.models import tasks
from fedgex.common.study import Study


def test_a_longer_change_is_scaled_down_as_a_whole_and_keeps_its_direction():
    change = {
        "a": np.array([3.0, 0.0], np.float32),
        "b": np.array([[4.0]], np.float32),
    }

    short = clipped(change, 2.5)

    assert short["a"].tolist() == pytest.approx([1.5, 0])
    assert short["b"].tolist() == [pytest.approx([2.0])]
    assert short["a"].dtype == np.float32


@pytest.mark.parametrize("numbers", [[0.3, 0.4], [0.0, 0.0]])
def test_a_change_within_the_norm_keeps_its_bits(numbers: list[float]):
    change = {"a": np.array(numbers, np.float32)}

    assert np.array_equal(clipped(change, 0.6)["a"], change["a"])


def test_what_a_round_sends_is_no_longer_than_the_clip(tmp_path: Path):
    study = Study.read(
        {
            "name": "test",
            "pretraining": {"rounds": 1},
            "strategy": {
                "name": "fedavg",
                "weights": "equal",
                "update": "delta",
                "per_gene": False,
            },
            "public": {"statistics": True},
            "privacy": {"site": {"noise_multiplier": 1, "clip": 0.01, "delta": 1e-3}},
        },
        "test",
    )
    patients = Patients(
        values=torch.randn(12, 6, generator=torch.Generator().manual_seed(0)),
        cancer_type=(None,) * 12,
        duration=torch.zeros(12),
        event=torch.zeros(12),
        clinical=torch.zeros(12, 2),
    )

    update = train_round(
        study,
        "pretraining",
        1,
        patients,
        tasks.initial(study, 6),
        site="north",
        min_cell_count=5,
        state_dir=tmp_path,
    ).update

    squares = sum(np.square(a.astype(np.float64)).sum() for a in update.values())
    assert np.sqrt(squares) == pytest.approx(0.01, rel=1e-3)
