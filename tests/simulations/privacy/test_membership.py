"""The audit of a scenario, from files to report."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedgex.common.errors import ConfigError
from fedgex.common.privacy.audit_report import AuditReport
from fedgex.simulations.cli import app
from fedgex.simulations.privacy import membership
from fedgex.simulations.privacy.shadow_models import Effort
from fedgex.simulations.scenario import Scenario, shortened

from ...conftest import attack
from .. import small

SMALL = Effort(shadows=4, canaries=10, inverted=1, inversion_steps=3)


def scenario(**study: Any) -> Scenario:
    return small.scenario(study)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.new_data(tmp_path_factory, n_sites=2, patients_per_site=20, n_genes=12)


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished audit."""
    out = tmp_path_factory.mktemp("audit") / "out"
    membership.audit(scenario(), data, out, Console(file=StringIO()), SMALL)
    return out


def test_an_audit_writes_numbers_table_and_curves(done: Path) -> None:
    report = AuditReport.load(done / "audit.json")

    assert [(a.training, a.attack, a.task) for a in report.membership] == [
        ("plain", "loss", "restoration"),
        ("plain", "likelihood-ratio", "restoration"),
    ]
    assert report.canaries[0].canaries == 10
    assert report.canaries[0].claimed_epsilon is None
    assert [each.batch for each in report.inversions] == [1]
    assert "loss attack, restoration: AUC" in (done / "audit.md").read_text()
    assert (done / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_a_shortened_audit_is_of_another_study() -> None:
    study = scenario(pretraining={"rounds": 3}).study

    assert shortened(study, membership.QUICK.rounds).pretraining.rounds == 2
    assert shortened(study, membership.QUICK.rounds).hash != study.hash
    assert shortened(study, SMALL.rounds) == study


def test_half_of_each_sites_patients_are_members(done: Path) -> None:
    report = AuditReport.load(done / "audit.json")
    sizes = json.loads((done / "split.json").read_text())["sizes"].values()

    members = sum(n // 2 for n in sizes)
    assert {each.members for each in report.membership} == {members}
    assert {each.non_members for each in report.membership} == {sum(sizes) - members}


def test_no_report_names_a_patient(done: Path) -> None:
    text = (done / "audit.json").read_text() + (done / "audit.md").read_text()

    assert "Hospital-0" not in text  # how patients are called


def test_an_audit_that_goes_on_trains_nothing_again_and_says_the_same(
    done: Path, data: Path
) -> None:
    before, said = (done / "audit.json").read_text(), StringIO()

    membership.audit(scenario(), data, done, Console(file=said), SMALL)

    assert "6 models, 0 to train" in said.getvalue()
    assert (done / "audit.json").read_text() == before


def test_shadow_models_come_in_pairs_that_share_nobody(done: Path) -> None:
    losses = [
        load_file(path)["restoration"]
        for path in sorted((done / "models").glob("*-shadow-*"))
    ]

    assert len(losses) == 4
    assert all(np.isfinite(each).all() for each in losses)


def test_the_table_has_a_column_for_each_model() -> None:
    found = {
        "false_positive_rate": 0.01,
        "true_positive_rate": None,
        "note": "not estimable, 50 non-members",
    }
    measured = {
        "auc": {"value": 0.6, "low": 0.5, "high": 0.7},
        "found": [found],
    }
    values = {
        "kind": "simulation",
        "study": "small",
        "study_hash": "a" * 64,
        "membership": [
            attack(training, 0.7) | measured for training in ("plain", "private")
        ],
    }
    lines = membership.table(AuditReport.read(values, "test"))

    assert lines[0] == "| measure | without privacy | with privacy |"
    assert lines[2].endswith("| 0.600 [0.500, 0.700] | 0.600 [0.500, 0.700] |")
    assert "not estimable, 50 non-members" in lines[3]


def test_a_study_without_pretraining_is_refused(tmp_path: Path, data: Path) -> None:
    classes = {"rounds": 1, "classes": ["type-1", "type-2"]}
    other = scenario(pretraining={"rounds": 0}, classification=classes)

    with pytest.raises(ConfigError, match=r"pretraining\.rounds"):
        membership.audit(other, data, tmp_path / "out", Console(file=StringIO()), SMALL)


def test_an_odd_number_of_shadow_models_is_refused_by_the_command(
    tmp_path: Path,
) -> None:
    arguments = ["audit", "demo", "--data", ".", "--out", str(tmp_path / "out")]

    result = CliRunner().invoke(app, [*arguments, "--shadows", "5"])

    assert result.exit_code == 1
    assert "even number" in result.stderr
