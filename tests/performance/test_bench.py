import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedgex.common.models.training import fit, pretraining_loss
from fedgex.common.study import Pretraining

from . import rows, training

ROOT = Path(__file__).parents[2]

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="reads peak memory from /proc"
)


def test_the_bare_loop_takes_the_very_steps_of_fit():
    patients, phase = rows.synthetic(20, 30), Pretraining(rounds=1, batch_size=8)
    start = rows.new_backbone("tiny", 30)
    ours, bare = copy.deepcopy(start), copy.deepcopy(start)

    fit(
        ours.parameters(),
        pretraining_loss(ours, patients, phase),
        len(patients),
        phase,
        learning_rate=rows.LEARNING_RATE,
        seed=5,
    )
    training.bare_loop(bare, training.bare_batches(patients, phase, 5), phase)

    for name, before in start.state_dict().items():
        a, b = ours.state_dict()[name], bare.state_dict()[name]
        assert torch.allclose(a, b, atol=1e-4), name
        assert name.endswith("key.bias") or not torch.equal(a, before), name


@linux
@pytest.mark.slow
@pytest.mark.federation
def test_a_quick_benchmark_prints_positive_finite_ratios_as_json():
    command = [sys.executable, "-m", "tests.performance", "--quick", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 17
    for row in found:
        assert set(row) == {"name", "value", "goal", "met", "detail"}
        assert math.isfinite(row["value"]), row
        assert row["value"] > 0, row
        assert (row["met"] is None) == (row["goal"] == ""), row


def test_a_goal_is_met_or_not_by_the_value_alone():
    assert rows.at_least("x", 0.95, 0.95, "").met
    assert not rows.at_least("x", 0.94, 0.95, "").met
    assert rows.below("x", 1.19, 1.2, "").met
    assert not rows.below("x", 1.2, 1.2, "").met


PEAK = """
from fedgex.common.system.malloc import resident_mb
from tests.performance import rows

before = rows.begin_peak()
block = bytearray(64 * 2**20)
del block
print(resident_mb("VmHWM") - before)
"""


@linux
def test_the_peak_holds_memory_that_was_freed_again():
    command = [sys.executable, "-c", PEAK]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, check=True, text=True
    )

    assert float(found.stdout) > 60
