"""A loop over patients in memory ends in the bits of the apps over messages.

With the rules of both in force: a site on a foreign scale, one whose update cannot be
used, one whose update is far beyond the others', and one whose policy permits less.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.client.training import local_round
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import to_patients
from fedgex.common.federation import RoundResult
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import Study
from fedgex.simulations import training

from .conftest import TYPES, Consortium, write_hospitals

FOREIGN, UNUSABLE, FAR, STRICT = (f"hospital-0{i}" for i in (2, 3, 4, 5))
N_SITES = 6


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Write hospitals of a large panel: one lies about its scale, one permits less."""
    folder = tmp_path_factory.mktemp("loop")
    wide = write_hospitals(
        folder / "data", n_genes=130, patients_per_site=20, n_sites=N_SITES
    )
    path = wide.sites / FOREIGN / "expression.parquet"
    table = pd.read_parquet(path)
    values = table.select_dtypes("number").columns
    table[values] *= np.log(2)
    table.to_parquet(path)
    policy = wide.sites / STRICT / "policy.toml"
    text = policy.read_text()
    assert '"classification", ' in text
    assert "minimum_cohort = 10" in text
    text = text.replace('"classification", ', "")
    policy.write_text(text.replace("minimum_cohort = 10", "minimum_cohort = 12"))
    return wide


@pytest.fixture
def _disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two sites answer rounds with what no honest training yields."""
    honest = local_round.train_round

    def train_round(study: Study, phase: str, number: int, *args: Any, **more: Any):
        result: RoundResult = honest(study, phase, number, *args, **more)
        factor = {(UNUSABLE, 1): np.nan, (FAR, 2): 1e4}.get((more["site"], number), 1)
        wrong = {name: factor * array for name, array in result.update.items()}
        return dataclasses.replace(result, update=wrong)

    monkeypatch.setattr(local_round, "train_round", train_round)
    monkeypatch.setattr(training, "train_round", train_round)


def read(consortium: Consortium, study: Study) -> tuple[dict[str, Cohort], Any]:
    """Return each site's checked cohort, and its policy."""
    cohorts, policies = {}, {}
    for name in consortium.names:
        folder = consortium.sites / name
        settings = SiteSettings.load(folder / "site.toml")
        tasks = tuple(task for task in study.phases if task in settings.policy.tasks)
        cohorts[name] = read_cohort(
            settings.data, settings.policy.minimum_cohort, study.scale, tasks
        )[0]
        policies[name] = Policy.load(folder / "policy.toml")
    return cohorts, policies


def looped(consortium: Consortium, study: Study) -> Checkpoint:
    cohorts, policies = read(consortium, study)
    genes = training.vocabulary(study, cohorts, policies=policies)
    first = training.begin(study, genes, cohorts, policies=policies)
    patients = {
        name: to_patients(cohort, genes, first.standardisation)
        for name, cohort in cohorts.items()
    }
    return training.train(first, patients, policies=policies)


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    same = {
        name: array.tobytes() == other.parameters[name].tobytes()
        for name, array in one.parameters.items()
    }
    return (
        one.vocabulary == other.vocabulary
        and (one.standardisation.mean == other.standardisation.mean).all()
        and one.parameters.keys() == other.parameters.keys()
        and all(same.values())
    )


@pytest.mark.usefixtures("_disturbed")
@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedavg"},
        {"name": "fedadam", "weights": "equal", "update": "delta"},
    ],
    ids=lambda strategy: strategy["name"],
)
def test_the_loop_ends_in_the_bits_of_the_apps_with_every_rule_in_force(
    hospitals: Consortium, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    study = hospitals.study(
        cross_products=True,
        linear_rank=3,
        linear_types=TYPES,
        survival={"rounds": 0},
        strategy=strategy,
    )

    apps = hospitals.conduct(study, tmp_path)
    loop = looped(hospitals, study)

    assert equal(loop, apps.final)
    left_out = {
        (e["phase"], e["round"], name)
        for e in apps.events("round")
        for name, site in e["sites"].items()
        if site["state"] != "contributed"
    }
    phases = ("pretraining", "classification")
    assert left_out == {
        *((phase, 1, UNUSABLE) for phase in phases),
        *((phase, 2, FAR) for phase in phases),
        *(("classification", number, STRICT) for number in (1, 2)),
        *((phase, number, FOREIGN) for phase in phases for number in (1, 2)),
    }


@pytest.mark.parametrize("rule", ["foreign_sites", "far_beyond"])
def test_a_loop_without_one_of_the_rules_ends_in_other_bits(
    hospitals: Consortium,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    rule: str,
) -> None:
    request.getfixturevalue("_disturbed")
    study = hospitals.study(classification={"rounds": 0}, survival={"rounds": 0})
    whole = looped(hospitals, study)
    monkeypatch.setattr(training.federation, rule, lambda *_: {})

    assert not equal(looped(hospitals, study), whole)
