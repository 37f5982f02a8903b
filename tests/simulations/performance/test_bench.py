import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fedgex.common.models.training import fit, pretraining_loss
from fedgex.common.study import Pretraining
from fedgex.simulations.cli import app
from fedgex.simulations.performance import bench

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="reads peak memory from /proc"
)


def test_the_bare_loop_takes_the_very_steps_of_fit():
    patients, phase = bench.synthetic(20, 30), Pretraining(rounds=1, batch_size=8)
    start = bench.new_backbone("tiny", 30)
    ours, bare = copy.deepcopy(start), copy.deepcopy(start)

    fit(
        ours.parameters(),
        pretraining_loss(ours, patients, phase),
        len(patients),
        phase,
        learning_rate=bench.LEARNING_RATE,
        seed=5,
    )
    bench.bare_loop(bare, bench.bare_batches(patients, phase, 5), phase)

    for name, before in start.state_dict().items():
        a, b = ours.state_dict()[name], bare.state_dict()[name]
        assert torch.allclose(a, b, atol=1e-4), name
        assert name.endswith("key.bias") or not torch.equal(a, before), name


@linux
@pytest.mark.slow
@pytest.mark.federation
def test_a_quick_benchmark_prints_positive_finite_ratios_as_json():
    result = CliRunner().invoke(app, ["bench", "--quick", "--format", "json"])

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert len(rows) == 15
    for row in rows:
        assert set(row) == {"name", "value", "goal", "met", "detail"}
        assert math.isfinite(row["value"]), row
        assert row["value"] > 0, row
        assert (row["met"] is None) == (row["goal"] == ""), row


def test_a_goal_is_met_or_not_by_the_value_alone():
    assert bench._at_least("x", 0.95, 0.95, "").met
    assert not bench._at_least("x", 0.94, 0.95, "").met
    assert bench._below("x", 1.19, 1.2, "").met
    assert not bench._below("x", 1.2, 1.2, "").met


PEAK = """
from fedgex.common.system.malloc import resident_mb
from fedgex.simulations.performance import bench

before = bench._begin_peak()
block = bytearray(64 * 2**20)
del block
print(resident_mb("VmHWM") - before)
"""


@linux
def test_the_peak_holds_memory_that_was_freed_again():
    command = [sys.executable, "-c", PEAK]
    found = subprocess.run(command, capture_output=True, check=True, text=True)

    assert float(found.stdout) > 60
