"""Checkpoints are whole or not there, and say when they were changed."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedgex.common import checkpoint
from fedgex.common.checkpoint import Checkpoint
from fedgex.common.errors import CheckpointError
from fedgex.common.statistics import Standardisation
from fedgex.common.study import Study
from fedgex.common.vocabulary import Vocabulary


def made(**changes: object) -> Checkpoint:
    small = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    whole = Checkpoint(
        study=Study.read({"name": "test", "minimum_cohort": 7}, "test"),
        vocabulary=Vocabulary(("ALK", "EGFR")),
        standardisation=Standardisation(
            mean=np.array([1 / 3, 2.0]), sd=np.array([0.1, 5.0])
        ),
        phase="pretraining",
        round=4,
        parameters={"backbone.b": small, "backbone.a": small.T},
        server={"m": np.array([1e-300, 2.0])},
        metrics={"loss": 0.25, "rates": {"0.5": 1.0}},
        trained_on={"sites": ["h1", "h2"], "patients": 40},
    )
    return replace(whole, **changes)


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    saved = made()

    checkpoint.save(saved, tmp_path / "run" / "0004")
    found = checkpoint.load(tmp_path / "run" / "0004")

    for name in ("study", "vocabulary", "phase", "round", "metrics", "trained_on"):
        assert getattr(found, name) == getattr(saved, name)
    pairs = [
        (found.parameters, saved.parameters),
        (found.server, saved.server),
        (vars(found.standardisation), vars(saved.standardisation)),
    ]
    for there, here in pairs:
        assert set(there) == set(here)
        for name in here:
            assert there[name].dtype == here[name].dtype
            assert np.array_equal(there[name], here[name])


def test_without_optimiser_state_there_is_no_server_file(tmp_path):
    checkpoint.save(made(server={}), tmp_path / "1")

    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == [
        "manifest.json",
        "model.safetensors",
    ]
    assert checkpoint.load(tmp_path / "1").server == {}


def test_the_manifest_holds_the_hash_of_every_other_file(tmp_path):
    checkpoint.save(made(), tmp_path / "1")

    files = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]

    assert files == {
        name: hashlib.sha256((tmp_path / "1" / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "server.safetensors")
    }


def test_equal_checkpoints_are_equal_files(tmp_path):
    checkpoint.save(made(), tmp_path / "1")
    turned = dict(reversed(made().parameters.items()))
    checkpoint.save(made(parameters=turned), tmp_path / "2")

    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "server.safetensors"])
@pytest.mark.parametrize("damage", ["torn", "changed", "absent"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    checkpoint.save(made(), tmp_path / "1")
    path = tmp_path / "1" / name
    content = path.read_bytes()
    if damage == "torn":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()

    with pytest.raises(CheckpointError) as refusal:
        checkpoint.load(tmp_path / "1")

    assert str(refusal.value) == (
        f"{path} is missing or differs from its SHA-256 in manifest.json; "
        "fetch the checkpoint again."
    )


@pytest.mark.parametrize("content", ["", '{"format": 1,', None])
def test_a_torn_or_absent_manifest_is_refused(tmp_path, content):
    checkpoint.save(made(), tmp_path / "1")
    manifest = tmp_path / "1" / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)

    with pytest.raises(CheckpointError, match=r"holds no readable manifest.json"):
        checkpoint.load(tmp_path / "1")


@pytest.mark.parametrize(
    ("content", "found"), [('{"format": 2}', "2"), ("{}", "None"), ("[]", "None")]
)
def test_another_format_is_refused(tmp_path, content, found):
    (tmp_path / "manifest.json").write_text(content)

    with pytest.raises(CheckpointError, match=f"is of format {found}; this fedgex rea"):
        checkpoint.load(tmp_path)


def test_a_checkpoint_is_written_once(tmp_path):
    checkpoint.save(made(), tmp_path / "1")

    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save(made(round=5), tmp_path / "1")

    assert checkpoint.load(tmp_path / "1").round == 4


def test_a_partial_folder_of_a_crash_is_not_found_and_gives_way(tmp_path, monkeypatch):
    checkpoint.save(made(), tmp_path / "0001")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _power_cut)
        with pytest.raises(OSError, match="power cut"):
            checkpoint.save(made(round=5), tmp_path / "0002")
    assert len(list(tmp_path.iterdir())) == 2

    assert checkpoint.latest(tmp_path) == tmp_path / "0001"

    checkpoint.save(made(round=6), tmp_path / "0002")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0001", "0002"]
    assert checkpoint.load(tmp_path / "0002").round == 6


def _power_cut(*_: object) -> None:
    raise OSError("power cut")


def test_the_latest_is_the_one_with_the_highest_number(tmp_path):
    for name in ("0010-survival", "0009-pretraining", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "0011-survival").mkdir()

    assert checkpoint.latest(tmp_path) == tmp_path / "0010-survival"


def test_nothing_is_the_latest_of_an_empty_or_absent_folder(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


@pytest.mark.parametrize("given", ["out", "out/run", "out/run/checkpoints/0002"])
def test_a_checkpoint_is_found_from_itself_its_run_or_what_holds_the_run(
    tmp_path, given
):
    checkpoints = tmp_path / "out" / "run" / "checkpoints"
    for name in ("0001", "0002"):
        checkpoint.save(made(), checkpoints / name)

    assert checkpoint.find(tmp_path / given) == checkpoints / "0002"


def test_an_older_checkpoint_can_be_named_itself(tmp_path):
    for name in ("0001", "0002"):
        checkpoint.save(made(), tmp_path / "checkpoints" / name)

    older = tmp_path / "checkpoints" / "0001"
    assert checkpoint.find(older) == older


def test_a_folder_that_is_neither_is_refused_with_what_to_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a checkpoint.*nor a run"):
        checkpoint.find(tmp_path)


def test_the_card_says_use_origin_and_hashes():
    card = made().card

    assert "not a medical device" in card.pop("use")
    assert card == {
        "study": "test",
        "study_hash": made().study.hash,
        "vocabulary_hash": hashlib.sha256(b"ALK\nEGFR").hexdigest(),
        "phase": "pretraining",
        "round": 4,
        "scale": "log2p1",
        "trained_on": {"sites": ["h1", "h2"], "patients": 40},
    }
