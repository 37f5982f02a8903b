"""What no hospital measured stays unknown, a model names who it was trained on, and a
hold-out that cannot judge ends no run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import ConfigRecord, Message

from fedgex.client.prediction import inference
from fedgex.client.prediction.review import review
from fedgex.common import federation, keys
from fedgex.common.codes import Code
from fedgex.common.data.cohort import load_cohort, save_cohort
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.models import checkpoint
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.server.cli.run import status

from .conftest import Killed

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

KNOWN = [f"GENE{i:04d}" for i in range(1, 31)]
UNKNOWN = ["MARCHF1", "TP53"]
STUDY: dict[str, Any] = {
    "vocabulary": {"genes": [*KNOWN, *UNKNOWN]},
    "linear_rank": 4,
    "pretraining": {"rounds": 2},
    "classification": {"rounds": 0},
    "survival": {"rounds": 0},
}
AWAY = "hospital-02"


@pytest.fixture(scope="module")
def run(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return consortium.conduct(
        consortium.study(**STUDY), tmp_path_factory.mktemp("unknown")
    )


@pytest.fixture(scope="module")
def model(run: Finished) -> Checkpoint:
    return run.final


def samples() -> pd.DataFrame:
    values = np.random.default_rng(0).normal(7, 2, (5, len(KNOWN))).clip(0)
    return pd.DataFrame(values, columns=KNOWN).drop(columns=KNOWN[:3])


def test_the_run_names_them_at_its_start_and_in_its_state(run: Finished) -> None:
    (started,) = run.events("run-started")

    assert started["unknown_genes"] == UNKNOWN
    assert started["genes_of_one_site"] == []
    assert status(run.run_dir)["unknown_genes"] == UNKNOWN
    assert run.final.card["unknown_genes"] == UNKNOWN


def test_they_are_restored_by_no_number(model: Checkpoint) -> None:
    frame = samples()

    restored = inference.impute(model, frame)
    sd = inference.uncertainty(model, frame)

    assert restored[UNKNOWN].isna().all(axis=None)
    assert sd[UNKNOWN].isna().all(axis=None)
    assert restored[KNOWN].notna().all(axis=None)
    (finding,) = (f for f in review(model, frame) if f.code == Code.GENES_NOT_LEARNT)
    assert "MARCHF1, TP53" in finding.found


def test_a_measured_value_of_them_moves_no_prediction_and_stays(
    model: Checkpoint,
) -> None:
    frame = samples()
    with_more = frame.assign(TP53=8.0)

    pd.testing.assert_frame_equal(
        inference.embed(model, with_more), inference.embed(model, frame)
    )
    imputed = inference.impute(model, with_more)
    assert (imputed["TP53"] == 8.0).all()
    pd.testing.assert_frame_equal(imputed[KNOWN], inference.impute(model, frame)[KNOWN])


def test_only_such_genes_are_no_genes_of_the_vocabulary(model: Checkpoint) -> None:
    frame = pd.DataFrame({"TP53": [8.0, 7.0]})

    (finding,) = review(model, frame)

    assert finding.code == Code.NO_VOCABULARY_GENE


def test_a_study_of_too_many_is_refused_before_a_hospital_trains(
    consortium: Consortium, tmp_path: Path
) -> None:
    genes = [*KNOWN[:7], "ALK", *UNKNOWN]
    study = consortium.study(**STUDY | {"vocabulary": {"genes": genes}})
    asked: list[str] = []

    def note(name: str, message: Message) -> None:
        asked.append(message.metadata.message_type)

    with pytest.raises(ConfigError, match=r"3 of the study's 10 genes \(ALK, MARCHF1"):
        consortium.conduct(study, tmp_path, alter=note)

    assert set(asked) == {keys.PREPARE, keys.STATISTICS}


def test_a_share_may_be_permitted(consortium: Consortium, tmp_path: Path) -> None:
    genes = [*KNOWN[:7], "ALK", *UNKNOWN]
    rule = {"genes": genes, "max_unknown_share": 0.3}

    run = consortium.conduct(consortium.study(**STUDY | {"vocabulary": rule}), tmp_path)

    assert run.final.unknown_genes == ("ALK", *UNKNOWN)


def test_a_model_names_the_sites_that_contributed_and_no_other(
    consortium: Consortium, tmp_path: Path
) -> None:
    """One is away once it has said how many patients it has, one until it trains."""

    def absent(name: str, message: Message) -> None:
        kind = message.metadata.message_type
        if (name == AWAY and kind != keys.PREPARE) or (
            name == "hospital-03" and kind == keys.STATISTICS
        ):
            message.content["away"] = ConfigRecord({})

    rounds = {"quorum": 2, "deadline_s": 60.0}
    run = consortium.conduct(
        consortium.study(**STUDY | {"rounds": rounds}), tmp_path, alter=absent
    )

    first = checkpoint.load(min((run.run_dir / "checkpoints").glob("00000-*")))
    others = [name for name in consortium.names if name not in (AWAY, "hospital-03")]
    assert first.trained_on == expected(consortium, others)
    assert run.final.trained_on == expected(consortium, [*others, "hospital-03"])


def expected(consortium: Consortium, names: list[str]) -> dict[str, Any]:
    tables = [pd.read_csv(consortium.sites / n / "clinical.csv") for n in names]
    return {"sites": sorted(names), "patients": sum(map(len, tables))}


def test_a_run_that_begins_again_keeps_its_genes_whoever_is_there(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean and SD that were pooled before the first checkpoint are of those genes."""
    study = consortium.study(**STUDY | {"vocabulary": {"min_share": 1.0}})
    undisturbed = consortium.conduct(study, tmp_path / "undisturbed")

    def cut(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(federation, "initial_model", cut)
        consortium.conduct(study, tmp_path / "cut")

    def other_panel(name: str, message: Message) -> None:
        if name == AWAY and message.metadata.message_type == keys.PREPARE:
            message.content["away"] = ConfigRecord({})

    patch_genes = federation.agree_vocabulary

    def fewer(*args: Any, **kwargs: Any) -> Any:
        agreed = patch_genes(*args, **kwargs)
        return type(agreed)(agreed.genes[1:])

    monkeypatch.setattr(federation, "agree_vocabulary", fewer)
    again = consortium.conduct(study, tmp_path / "cut", alter=other_panel)

    assert again.final.vocabulary == undisturbed.final.vocabulary
    np.testing.assert_array_equal(
        again.final.standardisation.mean, undisturbed.final.standardisation.mean
    )


def test_a_hold_out_that_cannot_judge_leaves_the_run_its_end(
    consortium: Consortium, tmp_path: Path
) -> None:
    """It has one gene of the study, of which none can be hidden and restored."""
    cohort = load_cohort(consortium.holdout, Scale.LOG2P1)
    one = dataclasses.replace(
        cohort, genes=cohort.genes[:1], expression=cohort.expression[:, :1]
    )
    save_cohort(one, tmp_path / "holdout", Scale.LOG2P1)
    few = dataclasses.replace(consortium, holdout=tmp_path / "holdout")

    run = few.conduct(consortium.study(**STUDY), tmp_path / "run")

    assert [e["holdout"] for e in run.events("round")] == [{}, {}]
    assert all("hidden" in e["holdout_reason"] for e in run.events("round"))
    assert len(run.events("run-finished")) == 1
