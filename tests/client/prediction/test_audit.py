"""`fedgex-site audit`: own patients against a model; only numbers come out."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from fedgex.client.cli import app
from fedgex.client.policy import TEMPLATE
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import to_patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models import checkpoint, tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.models.gexbert import GexBert
from fedgex.common.privacy import attacks
from fedgex.common.seeds import derive
from fedgex.common.study import Study

GENES = ("AAA1", "BBB2", "CCC3", "DDD4", "EEE5", "FFF6")


def table(n: int, seed: int, name: str, mean: float = 4.0) -> pd.DataFrame:
    values = np.random.default_rng(seed).normal(mean, 1.5, (n, len(GENES))).clip(0)
    index = pd.Index([f"{name}{i:03d}" for i in range(n)], name="sample")
    return pd.DataFrame(values.round(3), index=index, columns=list(GENES))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return the site.toml of a hospital with 30 patients, of whom 12 opted out."""
    own = table(30, 1, "P")
    own.to_csv(tmp_path / "expression.csv")
    (tmp_path / "opt-outs.txt").write_text("\n".join(own.index[:12]))
    (tmp_path / "policy.toml").write_text(TEMPLATE)
    path = tmp_path / "site.toml"
    path.write_text(
        'name = "north"\n[data]\nexpression = "expression.csv"\nscale = "log2p1"\n'
        'opt_outs = "opt-outs.txt"\norientation = "samples-by-genes"\n'
        'unknown_genes = "keep"\n'
    )
    model(tmp_path / "model")
    return path


def model(folder: Path) -> Checkpoint:
    study = Study.read({"name": "test", "pretraining": {"rounds": 1}}, "test")
    made = Checkpoint(
        study=study,
        vocabulary=Vocabulary(GENES),
        standardisation=Standardisation(mean=np.full(6, 4.0), sd=np.full(6, 1.5)),
        phase="pretraining",
        round=1,
        parameters=tasks.initial(study, len(GENES)),
        trained_on={"patients": 99, "sites": ["north", "south"]},
    )
    checkpoint.save(made, folder)
    return made


def audit(site: Path, *more: object, model: Path | None = None) -> Result:
    folder = model or site.parent / "model"
    arguments = ["--site", site, "--model", folder, *more]
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


def auc(members: pd.DataFrame, others: pd.DataFrame) -> float:
    """Return the AUC of the untrained model's losses, counted pair by pair."""
    study = Study.read({"name": "test", "pretraining": {"rounds": 1}}, "test")
    backbone = tasks.new_backbone(study, len(GENES))
    assert isinstance(backbone, GexBert)
    scale = Standardisation(mean=np.full(6, 4.0), sd=np.full(6, 1.5))
    losses = []
    for each in (members, others):
        cohort = Cohort(
            patients=tuple(each.index),
            genes=GENES,
            expression=each.to_numpy(dtype=np.float32),
            clinical=pd.DataFrame(index=range(len(each))),
        )
        patients = to_patients(cohort, Vocabulary(GENES), scale)
        seed = derive(study.seed, "audit", "masks")
        losses.append(attacks.restoration_losses(backbone, patients, seed))
    return float((losses[0][:, None] < losses[1][None]).mean())


def test_who_opted_out_is_told_from_who_trained(site: Path) -> None:
    result = audit(site)

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (attack,) = report["membership"]
    assert (attack["members"], attack["non_members"]) == (18, 12)
    own = table(30, 1, "P")
    assert attack["auc"]["value"] == pytest.approx(auc(own[12:], own[:12]))
    assert attack["found"][1]["note"] == "not estimable, 12 non-members"
    manifest = site.parent / "model" / "manifest.json"
    assert report["model"] == checkpoint.digest(manifest)


def test_others_from_a_file_stand_for_those_who_opted_out(site: Path) -> None:
    others = table(25, 2, "Q", mean=9.0)
    others.to_csv(site.parent / "others.csv")

    result = audit(site, "--non-members", site.parent / "others.csv")

    assert result.exit_code == 0, result.output
    (attack,) = json.loads(result.stdout)["membership"]
    assert (attack["members"], attack["non_members"]) == (18, 25)
    truth = auc(table(30, 1, "P")[12:], others)
    assert attack["auc"]["value"] == pytest.approx(truth)


def test_only_numbers_leave(site: Path) -> None:
    result = audit(site, "--output", site.parent / "audit.json")

    assert (result.exit_code, result.stdout) == (0, "")
    text = (site.parent / "audit.json").read_text()
    assert not any(who in text for who in table(30, 1, "P").index)


@pytest.mark.parametrize("n", [0, 9])
def test_too_few_non_members_are_one_error_without_their_number(
    site: Path, n: int
) -> None:
    own = table(30, 1, "P")
    (site.parent / "opt-outs.txt").write_text("\n".join(own.index[:n]))

    result = audit(site)

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there are fewer than 10 non-members")
    assert "--non-members" in result.stderr
    assert result.stdout == ""


def test_too_few_in_the_file_are_the_same_error(site: Path) -> None:
    table(9, 2, "Q").to_csv(site.parent / "others.csv")

    result = audit(site, "--non-members", site.parent / "others.csv")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there are fewer than 10 non-members")


def test_nobody_is_member_and_non_member(site: Path) -> None:
    table(30, 1, "P")[10:].to_csv(site.parent / "others.csv")

    result = audit(site, "--non-members", site.parent / "others.csv")

    assert result.exit_code == 1
    assert "who may have trained" in result.stderr
    assert "P0" not in result.stderr


def test_a_released_model_is_verified_first(
    site: Path, release: Callable[..., Any], tmp_path: Path
) -> None:
    made = release()
    bundle = made.write()
    (tmp_path / "authority.crt").write_bytes(
        zipfile.ZipFile(bundle).read("authority.crt")
    )

    fine = audit(site, "--authority", tmp_path / "authority.crt", model=bundle)
    bundle.write_bytes(bundle.read_bytes()[:-1] + b"?")
    torn = audit(site, "--authority", tmp_path / "authority.crt", model=bundle)

    assert fine.exit_code == 0, fine.output
    assert torn.exit_code == 1
    assert "is not used" in torn.stderr
