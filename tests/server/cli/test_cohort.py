"""`fedgex-admin cohort build`: from files as hospitals have them to a cohort."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from fedgex.common.data.cohort import load_cohort
from fedgex.common.data.scales import Scale
from fedgex.server.cli import app

GENES = ["ALK", "BRAF", "EGFR", "KRAS", "MET", "TP53"]
STUDY = """
[study]
name = "small"
vocabulary.genes = ["ALK", "BRCA1", "TP53"]
[study.pretraining]
rounds = 1
[study.classification]
rounds = 1
classes = ["BRCA", "LUAD"]
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    names = [f"T{i}" for i in range(12)]
    values = rng.lognormal(3, 2, (12, len(GENES)))
    table = pd.DataFrame(values, columns=GENES, index=pd.Index(names, name="sample"))
    table.to_csv(tmp_path / "expression.csv")
    types = pd.DataFrame({"patient": names[::-1], "cancer_type": "BRCA"})
    types.to_csv(tmp_path / "clinical.csv", index=False)
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "data.toml").write_text(
        '[data]\nexpression = "expression.csv"\nclinical = "clinical.csv"\n'
        'scale = "linear"\n'
    )
    return tmp_path


def build(files: Path, to: object, *more: object) -> Result:
    arguments = ["cohort", "build", files / "data.toml", "--to", to, *more]
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_files_become_a_cohort_on_the_studys_scale(files: Path) -> None:
    result = build(files, files / "made", "--study", files / "study.toml")

    assert result.exit_code == 0, result.output
    found = load_cohort(files / "made", Scale.LOG2P1)
    source = pd.read_csv(files / "expression.csv", index_col=0)
    expected = np.log2(source.loc[list(found.patients), list(found.genes)] + 1)
    np.testing.assert_allclose(found.expression, expected, rtol=1e-5)
    assert "genes_of_the_study: 2 of 3" in result.output
    assert "nobody has the cancer types LUAD" in result.output


def test_a_patient_of_the_hold_out_gets_into_no_public_cohort(files: Path) -> None:
    study, state = ("--study", files / "study.toml"), ("--state", files)
    assert build(files, "holdout", *study, *state).exit_code == 0

    result = build(files, "public", *study, *state)

    assert result.exit_code == 1
    assert "12 patients are in the hold-out" in result.output
    assert not (files / "public").exists()


def test_a_cohort_is_replaced_only_where_asked_for(files: Path) -> None:
    scale = ("--scale", "log2p1")
    assert build(files, files / "made", *scale).exit_code == 0

    assert "--replace" in build(files, files / "made", *scale).output
    assert build(files, files / "made", *scale, "--replace").exit_code == 0


def test_without_study_or_scale_nothing_is_made(files: Path) -> None:
    result = build(files, files / "made")

    assert result.exit_code == 1
    assert "neither --study nor --scale" in result.output
