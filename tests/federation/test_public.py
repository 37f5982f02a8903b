"""Runs whose server has a public cohort, and runs with noise on the mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fedgex.common import federation, keys
from fedgex.common.data.cohort import load_cohort
from fedgex.common.data.dataset import to_patients
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.models import checkpoint
from fedgex.common.study import Study

from ..conftest import OF_DELTAS

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

SITES = 4
ONE_PHASE: dict[str, Any] = {
    "cross_products": False,
    "classification": {"rounds": 0},
    "survival": {"rounds": 0},
}
NOISY: dict[str, Any] = (
    ONE_PHASE
    | OF_DELTAS
    | {"privacy": {"site": {"noise_multiplier": 2.0, "clip": 0.5, "delta": 1e-3}}}
)


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "MIN_PUBLIC_PATIENTS", 10)


def with_public(consortium: Consortium, **rule: Any) -> Study:
    told = {"statistics": True} | rule
    return consortium.study(**ONE_PHASE, linear_rank=4, public=told)


def conduct(consortium: Consortium, study: Study, folder: Path, **how: Any) -> Finished:
    """Conduct with the hold-out's patients as the public cohort."""
    return consortium.conduct(
        study, folder, public=consortium.holdout.with_name("public"), **how
    )


def start(run: Finished) -> checkpoint.Checkpoint:
    (first,) = (run.run_dir / "checkpoints").glob("00000-*")
    return checkpoint.load(first)


def test_no_site_is_asked_for_statistics_where_the_public_cohort_gives_them(
    consortium: Consortium, tmp_path: Path
) -> None:
    run = conduct(consortium, with_public(consortium), tmp_path)

    assert {e.message_type for e in run.exchanges} == {keys.PREPARE, keys.TRAIN}
    begun = start(run)
    cohort = load_cohort(consortium.holdout, Scale.LOG2P1)
    values = to_patients(cohort, begun.vocabulary, begun.standardisation).values.numpy()
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(axis=0), 1, atol=1e-5)
    assert begun.parameters["backbone.encoder.linear.loadings"].any()


def test_pretraining_alone_leaves_statistics_to_the_sites(
    consortium: Consortium, tmp_path: Path
) -> None:
    plain = consortium.conduct(consortium.study(**ONE_PHASE), tmp_path / "plain")
    told = consortium.study(**ONE_PHASE, public={"epochs": 1})

    warm = conduct(consortium, told, tmp_path / "warm")

    assert keys.STATISTICS in {e.message_type for e in warm.exchanges}
    assert np.array_equal(
        start(warm).standardisation.mean, start(plain).standardisation.mean
    )
    name = "backbone.encoder.tokens.identity.weight"
    assert not np.array_equal(
        start(warm).parameters[name], start(plain).parameters[name]
    )


def test_a_warm_start_survives_a_kill_with_the_same_bits(
    consortium: Consortium, tmp_path: Path
) -> None:
    study = with_public(consortium, epochs=1)
    whole = conduct(consortium, study, tmp_path / "whole")

    conduct(consortium, study, tmp_path / "cut", kill_after=0)
    shutil.rmtree(tmp_path / "cut" / "checkpoints")  # as if killed in the pretraining
    conduct(consortium, study, tmp_path / "cut", kill_after=SITES + 1)
    resumed = conduct(consortium, study, tmp_path / "cut")

    assert resumed.digest == whole.digest
    assert len(resumed.events("run-finished")) == 1


def test_a_run_goes_on_without_the_public_cohort_once_it_has_begun(
    consortium: Consortium, tmp_path: Path
) -> None:
    study = with_public(consortium)
    conduct(consortium, study, tmp_path, kill_after=SITES)

    resumed = consortium.conduct(study, tmp_path)

    assert len(resumed.events("run-finished")) == 1


def test_without_a_public_cohort_nobody_is_asked_anything(
    consortium: Consortium, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="public cohort, and no folder is named"):
        consortium.conduct(with_public(consortium), tmp_path)

    run = tmp_path / "journal.jsonl"
    assert "run-failed" in run.read_text()
    assert "run-started" not in run.read_text()


def test_noise_makes_each_run_another_and_epsilon_stands_in_the_journal(
    consortium: Consortium, tmp_path: Path
) -> None:
    study = consortium.study(**NOISY)

    first = conduct(consortium, study, tmp_path / "first")
    again = conduct(consortium, study, tmp_path / "again")

    assert first.digest != again.digest
    (begun,) = first.events("run-started")
    spent = [e["epsilon"]["site"] for e in (begun, *first.events("round"))]
    assert spent[0] == 0 < spent[1] < spent[2]
    assert first.final.metrics["epsilon"] == {"site": spent[2]}
    apart = [
        (first.final.parameters[name] - again.final.parameters[name]).ravel()
        for name in sorted(first.final.parameters)
    ]
    # Two rounds of noise in either run, each of 2 * .5 / 4 sites.
    assert np.concatenate(apart).std() == pytest.approx(2 * 2 * 0.5 / SITES, rel=0.2)


def test_a_noisy_round_that_was_killed_is_committed_once(
    consortium: Consortium, tmp_path: Path
) -> None:
    study = consortium.study(**NOISY)
    conduct(consortium, study, tmp_path, kill_after=SITES + 2)
    kept = checkpoint.digest(
        next((tmp_path / "checkpoints").glob("00001-*")) / "model.safetensors"
    )

    resumed = conduct(consortium, study, tmp_path)

    first = next((tmp_path / "checkpoints").glob("00001-*"))
    assert checkpoint.digest(first / "model.safetensors") == kept
    assert resumed.rounds == [("pretraining", 1), ("pretraining", 2)]
    sent = [e for e in resumed.exchanges if e.message_type == keys.TRAIN]
    assert len({e.message_bytes for e in sent}) == 1  # all begin with the one kept
