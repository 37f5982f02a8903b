"""A loop over patients in memory does what the sites and the server do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedgex.client.training.local_round import train_round
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.models import tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import Study
from fedgex.simulations import training

GENES = ("AAA1", "BBB2", "CCC3", "DDD4", "EEE5", "FFF6")


def study(**changes: Any) -> Study:
    values = {
        "name": "small",
        "minimum_cohort": 2,
        "pretraining": {"rounds": 1, "batch_size": 8},
        "strategy": {"name": "fedavg", "weights": "equal"},
    }
    return Study.read(values | changes, "test")


def cohort(
    seed: int, n: int = 8, genes: tuple[str, ...] = GENES, types: str = ""
) -> Cohort:
    values = np.random.default_rng(seed).normal(5, 2, (n, len(genes)))
    clinical = pd.DataFrame(index=range(n))
    return Cohort(
        patients=tuple(f"{seed}-{i}" for i in range(n)),
        genes=genes,
        expression=values.astype(np.float32),
        clinical=clinical.assign(cancer_type=list(types)) if types else clinical,
    )


SITES = {"north": cohort(1), "south": cohort(2, n=12)}


def begun(of: Study) -> tuple[Checkpoint, dict[str, Patients]]:
    genes = training.vocabulary(of, SITES)
    start = training.begin(of, genes, SITES)
    patients = {
        name: to_patients(each, genes, start.standardisation)
        for name, each in SITES.items()
    }
    return start, patients


def test_the_scale_is_that_of_all_patients_together() -> None:
    start, _ = begun(study())

    rows = np.concatenate([each.expression for each in SITES.values()])
    half_a_step = 2 / len(rows)  # of the rounding, in SDs
    off = (start.standardisation.mean - rows.mean(axis=0)) / rows.std(axis=0)
    assert np.abs(off).max() < half_a_step
    assert start.standardisation.sd == pytest.approx(rows.std(axis=0), rel=half_a_step)


def test_the_factor_model_has_the_pooled_mean_of_each_type_that_two_sites_tell() -> (
    None
):
    sites = {
        "north": cohort(1, types="xxxyyyzz"),
        "south": cohort(2, types="xxyyyyyw"),  # of w one patient: x joins it
        "west": cohort(3, types="xxxxyyyy"),
    }
    of = study(cross_products=True, linear_rank=2, linear_types=["y", "z", "x"])

    start = training.begin(of, training.vocabulary(of, sites), sites)

    found = start.parameters["backbone.encoder.linear.means"]
    rows = {
        "y": [("north", [3, 4, 5]), ("south", range(2, 7)), ("west", range(4, 8))],
        "x": [("north", [0, 1, 2]), ("west", range(4))],  # the fewest at south: others
    }
    for k, name in ((0, "y"), (2, "x")):
        own = np.concatenate([sites[s].expression[list(i)] for s, i in rows[name]])
        expected = start.standardisation.apply(own).mean(axis=0)
        np.testing.assert_allclose(found[k], expected, atol=1e-5)
    assert not found[1].any()  # one site alone tells of z
    shares = np.exp(start.parameters["backbone.encoder.linear.log_shares"])
    np.testing.assert_allclose(shares, [12 / 19, 0, 7 / 19], atol=1e-6)


def test_genes_are_those_of_enough_sites() -> None:
    sites = {"north": cohort(1), "south": cohort(2, genes=GENES[:4])}
    rule = {"min_share": 1.0}

    found = training.vocabulary(study(vocabulary=rule), sites)

    assert found.genes == GENES[:4]


def test_statistics_of_the_public_cohort_leave_out_the_genes_that_it_lacks() -> None:
    public = cohort(3, n=30, genes=GENES[1:])

    found = training.vocabulary(study(public={"statistics": True}), SITES, public)

    assert found.genes == GENES[1:]


def test_a_round_is_the_mean_of_the_sites_own_rounds(tmp_path: Path) -> None:
    start, patients = begun(study())

    trained = training.train(start, patients).parameters

    each = [
        train_round(
            study(),
            "pretraining",
            1,
            rows,
            tasks.download_state(study(), "pretraining", start.parameters),
            site=name,
            min_cell_count=2,
            state_dir=tmp_path,
        ).update
        for name, rows in patients.items()
    ]
    for name, first in each[0].items():
        mean = (first.astype(float) + each[1][name]) / 2
        assert trained[name] == pytest.approx(mean, rel=1e-5, abs=1e-7), name


def test_a_private_study_trains_in_secret_and_a_plain_one_repeats_itself() -> None:
    patient = {"noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0, "sample_rate": 0.5}
    start, patients = begun(study())
    private = study().model_copy(
        update={"privacy": study().privacy.model_validate({"patient": patient})}
    )

    secretly = dataclasses.replace(start, study=private)
    plain = [training.train(start, patients).parameters for _ in range(2)]
    secret = [training.train(secretly, patients).parameters for _ in range(2)]

    bias = "backbone.decoder.bias.weight"
    assert (plain[0][bias] == plain[1][bias]).all()
    assert (secret[0][bias] != secret[1][bias]).all()
