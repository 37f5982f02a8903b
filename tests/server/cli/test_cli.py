import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models import checkpoint, tasks
from fedgex.common.study import Study
from fedgex.server.cli import app
from fedgex.server.journal import Journal

GENES = Vocabulary(("A", "B", "C"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of one round to which one of two sites contributed."""
    study = Study.read({"name": "small", "pretraining": {"rounds": 2}}, "test")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("run-started", study="small", sites=["a", "b"])
    sites = {
        "a": {"state": "contributed", "reason": None},
        "b": {"state": "refused", "reason": "FX-SITE-002"},
    }
    journal.write(
        "round", phase="pretraining", round=1, rounds=2, train_loss=0.5, sites=sites
    )
    checkpoint.save(
        checkpoint.Checkpoint(
            study=study,
            vocabulary=GENES,
            standardisation=Standardisation(mean=np.zeros(3), sd=np.ones(3)),
            phase="pretraining",
            round=1,
            parameters=tasks.initial(study, 3),
        ),
        tmp_path / "checkpoints" / "00001-pretraining-00001",
    )
    return tmp_path


def test_status_names_the_last_round_and_who_was_absent_and_why(run: Path) -> None:
    result = CliRunner().invoke(app, ["run", "status", str(run), "--format", "json"])

    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["last_round"] == "pretraining 1/2"
    assert facts["absent"] == {"b": "refused: FX-SITE-002"}
    assert facts["state"] == "started"


def test_status_says_why_a_run_failed(run: Path) -> None:
    Journal(run / "journal.jsonl").write("run-failed", reason="no quorum")

    result = CliRunner().invoke(app, ["run", "status", str(run)])

    assert "state: failed" in result.stdout
    assert "reason: no quorum" in result.stdout


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", "status", str(tmp_path)])

    assert result.exit_code == 1
    assert "holds no journal.jsonl" in result.stderr


def test_a_model_is_verified_and_its_card_shown(run: Path) -> None:
    result = CliRunner().invoke(app, ["model", "show", str(run), "--format", "json"])

    assert result.exit_code == 0
    assert json.loads(result.stdout)["vocabulary_hash"] == GENES.hash


def test_a_changed_model_is_refused(run: Path) -> None:
    file = run / "checkpoints" / "00001-pretraining-00001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    result = CliRunner().invoke(app, ["model", "show", str(run)])

    assert result.exit_code == 1
    assert "differs from its SHA-256" in result.stderr
