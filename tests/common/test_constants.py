"""What decides a prediction stands in the model, or has a reason not to."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from fedgex.common import constants
from fedgex.common.errors import CheckpointError
from fedgex.common.models import checkpoint

from .models.test_checkpoint import made

MODELS = Path(checkpoint.__file__).parent

OTHERS = {
    "checkpoint.FORMAT": "names the format",
    "factor_model.OWN_FROM": "of the fit, whose result the model holds",
    "factor_model.NOISE_FACTOR": "of the fit",
    "factor_model.COMPLETIONS": "of the fit",
    "factor_model.COMPLETING_STEPS": "of the fit",
    "factor_model.COMPLETED_NOISE": "of the fit",
    "factor_model.LEAST_VARIANCE": "of the fit",
    "heads.BASELINE_START": "before training",
    "masking.SLOPE": "of training: what is hidden",
    "masking.BISECTIONS": "of training: what is hidden",
    "restoration.REMEMBERED": "how many are kept, for speed",
    "restoration.BATCH_CELLS": "size of a batch, for memory",
    "uncertainty.BATCH_CELLS": "size of a batch, for memory",
}
"""Numbers that no prediction of a trained model depends on, and why."""


def numbers_of(path: Path) -> set[str]:
    """Return the constants of a module that are numbers, by module and name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign):
            continue
        values = [v for v in ast.walk(node.value) if isinstance(v, ast.Constant)]
        targets = [n for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        if any(type(v.value) in (int, float) for v in values):
            found |= {f"{path.stem}.{n.id}" for n in targets if n.id.isupper()}
    return found


def test_every_number_of_the_models_is_held_or_has_a_reason() -> None:
    modules = [*MODELS.glob("*.py"), Path(constants.__file__)]
    numbers = set().union(*map(numbers_of, modules))

    held = {f"constants.{name}" for name in constants.deciding()}

    assert held <= numbers
    assert numbers - held <= set(OTHERS)


def test_a_model_that_was_made_with_other_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(made(), tmp_path / "one")
    monkeypatch.setattr(constants, "OWN_SHARE", 0.9)

    with pytest.raises(CheckpointError, match=r"numbers .*\(OWN_SHARE\).*fedgex 0\.1"):
        checkpoint.load(tmp_path / "one")


def test_a_model_of_before_has_the_numbers_of_now(tmp_path: Path) -> None:
    checkpoint.save(made(), tmp_path / "one")
    path = tmp_path / "one" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("constants") == constants.deciding()
    path.write_text(json.dumps(manifest))

    assert checkpoint.load(tmp_path / "one").vocabulary == made().vocabulary
