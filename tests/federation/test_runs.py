"""Whole runs: every strategy ends, the same seed ends in the same bits, heads stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from fedgex.common import keys
from fedgex.common.transport.records import to_arrays

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

EVERY_ROUND = [
    (phase, number)
    for phase in ("pretraining", "classification", "survival")
    for number in (1, 2)
]
STRATEGIES = [
    {"name": "fedavg"},
    {"name": "fedprox", "proximal_mu": 0.1},
    {"name": "fedadam"},
    {"name": "trimmed-mean", "weights": "equal", "trim_share": 0.25},
    {"name": "median", "weights": "equal"},
]


@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda rule: rule["name"])
def test_every_strategy_brings_a_study_to_its_end(
    consortium: Consortium, tmp_path: Path, rule: dict[str, object]
) -> None:
    run = consortium.conduct(consortium.study(strategy=rule), tmp_path)

    assert run.rounds == EVERY_ROUND
    assert len(run.events("run-finished")) == 1
    first = load_file(min((tmp_path / "checkpoints").iterdir()) / "model.safetensors")
    for name, array in run.final.parameters.items():
        assert np.isfinite(array).all(), name
        assert array.dtype == np.float32, name
        if name.startswith("backbone.") and array.ndim > 1:
            assert not np.array_equal(array, first[name]), f"{name} never moved"


def test_the_strategies_end_in_different_models(
    consortium: Consortium, tmp_path: Path
) -> None:
    # From the second step on, FedProx pulls; the first starts where it pulls to.
    ends = {
        rule["name"]: consortium.conduct(
            consortium.study(
                strategy=rule,
                pretraining={"rounds": 1, "local_epochs": 2},
                classification={"rounds": 0},
                survival={"rounds": 0},
            ),
            tmp_path / str(rule["name"]),
        ).digest
        for rule in STRATEGIES
    }

    # Of four sites, the mean without the two ends is the median.
    assert ends.pop("trimmed-mean") == ends["median"]
    assert len(set(ends.values())) == len(STRATEGIES) - 1


def test_the_model_is_judged_centrally_after_every_round(finished: Finished) -> None:
    by_phase: dict[str, list[dict[str, object]]] = {}
    for event in finished.events("round"):
        by_phase.setdefault(event["phase"], []).append(event["holdout"])

    for judged in by_phase["pretraining"]:
        assert {pattern: set(scores) for pattern, scores in judged.items()} == {
            "mcar": {"0.1", "0.5", "0.9"},
            "panel": {"10", "20"},
        }
        for scores in judged.values():
            assert all(0 < score["mse"] < np.inf for score in scores.values())
    assert all(0 <= judged["accuracy"] <= 1 for judged in by_phase["classification"])
    assert all(set(judged) == {"type-1", "type-2"} for judged in by_phase["survival"])
    assert all(len(judged) == 2 for judged in by_phase.values())


def test_every_site_contributes_to_every_round(
    consortium: Consortium, finished: Finished
) -> None:
    patients = {
        name: len(pd.read_csv(consortium.sites / name / "clinical.csv"))
        for name in consortium.names
    }

    for event in finished.events("round"):
        assert {n: s["state"] for n, s in event["sites"].items()} == dict.fromkeys(
            consortium.names, "contributed"
        )
        if event["phase"] == "pretraining":
            counted = {n: s["num_examples"] for n, s in event["sites"].items()}
            assert counted == patients


def test_a_run_leaves_a_checkpoint_for_every_round_and_one_before_the_first(
    finished: Finished,
) -> None:
    names = sorted(path.name for path in (finished.run_dir / "checkpoints").iterdir())

    assert names == [
        "00000-pretraining-00000",
        "00001-pretraining-00001",
        "00002-pretraining-00002",
        "00003-classification-00001",
        "00004-classification-00002",
        "00005-survival-00001",
        "00006-survival-00002",
    ]
    assert not (finished.run_dir / "spool").exists()


def test_the_same_seed_ends_in_the_same_bits(
    consortium: Consortium, finished: Finished, tmp_path: Path
) -> None:
    again = consortium.conduct(consortium.study(), tmp_path)

    assert again.digest == finished.digest


def test_another_seed_ends_in_another_model(
    consortium: Consortium, finished: Finished, tmp_path: Path
) -> None:
    other = consortium.conduct(consortium.study(seed=2), tmp_path)

    assert other.digest != finished.digest


def test_a_shared_head_travels_both_ways(finished: Finished) -> None:
    for phase in ("classification", "survival"):
        assert _heads(finished, phase, "message") > 0
        assert _heads(finished, phase, "reply") > 0


def test_the_backbone_alone_travels_in_pretraining_and_the_head_alone_if_frozen(
    finished: Finished,
) -> None:
    roots: dict[str, set[str]] = {}
    for exchange in finished.exchanges:
        if exchange.message_type == keys.TRAIN:
            phase = exchange.message.config_records[keys.ROUND]["phase"]
            for name in to_arrays(exchange.reply.array_records[keys.UPDATE]):
                roots.setdefault(str(phase), set()).add(
                    ".".join(name.split(".")[: 1 if phase == "pretraining" else 2])
                )

    assert roots == {
        "pretraining": {"backbone"},
        "classification": {"classification.encoder", "classification.head"},
        "survival": {"survival.head"},  # its backbone is frozen by default
    }


def _heads(run: Finished, phase: str, way: str) -> int:
    """Count the head's parameters in the messages of one direction."""
    record = {"message": keys.MODEL, "reply": keys.UPDATE}[way]
    contents = [getattr(e, way) for e in run.exchanges if e.message_type == keys.TRAIN]
    return sum(
        name.startswith(f"{phase}.head.")
        for content in contents
        for name in to_arrays(content.array_records[record])
    )
