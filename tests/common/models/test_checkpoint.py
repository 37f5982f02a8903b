"""Checkpoints are whole or not there, and say when they were changed."""

import errno
import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import CheckpointError
from fedgex.common.models import checkpoint
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import Study


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

    with pytest.raises(CheckpointError, match=r"expected a checkpoint's manifest.json"):
        checkpoint.load(tmp_path / "1")


@pytest.mark.parametrize(("content", "found"), [('{"format": 2}', "2"), ("{}", "None")])
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
        patch.setattr(Path, "rename", _kill)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(made(round=5), tmp_path / "0002")
    assert len(list(tmp_path.iterdir())) == 2

    assert checkpoint.latest(tmp_path) == tmp_path / "0001"

    checkpoint.save(made(round=6), tmp_path / "0002")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0001", "0002"]
    assert checkpoint.load(tmp_path / "0002").round == 6


def _kill(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_receipt_comes_back_and_is_in_the_manifest(tmp_path):
    text = '{"round": 4, "name": "K\u00f6ln"}'

    checkpoint.save(made(), tmp_path / "1", receipt=text)

    assert checkpoint.load(tmp_path / "1").receipt == text
    content = (tmp_path / "1" / "receipt.json").read_bytes()
    files = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    assert files["receipt.json"] == hashlib.sha256(content).hexdigest()


def test_a_receipt_is_not_carried_over_to_the_next_checkpoint(tmp_path):
    checkpoint.save(made(), tmp_path / "1", receipt="{}")

    checkpoint.save(replace(checkpoint.load(tmp_path / "1"), round=5), tmp_path / "2")

    assert checkpoint.load(tmp_path / "2").receipt is None


def test_a_changed_receipt_is_refused_and_one_put_beside_it_is_not_read(tmp_path):
    checkpoint.save(made(), tmp_path / "1", receipt="{}")
    (tmp_path / "1" / "receipt.json").write_text("[]")
    checkpoint.save(made(), tmp_path / "2")
    (tmp_path / "2" / "receipt.json").write_text("{}")

    with pytest.raises(CheckpointError, match=r"receipt.json is missing or differs"):
        checkpoint.load(tmp_path / "1")
    assert checkpoint.load(tmp_path / "2").receipt is None


def test_parameters_state_and_receipt_appear_in_one_rename(tmp_path, monkeypatch):
    renames = []

    def rename(partial: Path, folder: Path) -> None:
        renames.append({path.name for path in partial.iterdir()})
        os.rename(partial, folder)

    monkeypatch.setattr(Path, "rename", rename)
    checkpoint.save(made(), tmp_path / "1", receipt="{}")

    whole = {"manifest.json", "model.safetensors", "receipt.json", "server.safetensors"}
    assert renames == [whole]


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_a_full_disk_leaves_no_checkpoint_and_the_save_can_be_tried_again(
    tmp_path, monkeypatch, nth
):
    checkpoint.save(made(), tmp_path / "0001")
    synced = itertools.count(1)

    def fsync(_: int) -> None:
        if next(synced) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match=r"No space left on device. Fre"):
            checkpoint.save(made(round=5), tmp_path / "0002", receipt="{}")

    assert [path.name for path in tmp_path.iterdir()] == ["0001"]
    checkpoint.save(made(round=5), tmp_path / "0002", receipt="{}")
    assert checkpoint.load(tmp_path / "0002").round == 5


@pytest.mark.parametrize("limit", [100, 500])
def test_a_file_that_may_not_grow_is_a_refusal_that_names_checkpoint_and_cause(
    tmp_path, limit
):
    """The first limit stops the parameters, the second the manifest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError) as refusal:
            checkpoint.save(made(), tmp_path / "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert str(refusal.value) == (
        f"{tmp_path / '1'} could not be written: File too large. Raise the limit on "
        "the size of files (ulimit -f), then do the same again; nothing half-written "
        "counts."
    )
    assert list(tmp_path.iterdir()) == []


DIES = """
import runpy, sys
from pathlib import Path
made = runpy.run_path(sys.argv[1])["made"]
from fedgex.common.models import checkpoint
checkpoint.save(made(round=5), Path(sys.argv[2]), receipt="{}")
"""


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("checkpoint.written", [".0002.partial", "0001"]),
        ("checkpoint.renamed", ["0001", "0002"]),
        ("checkpoint.synced", ["0001", "0002"]),
    ],
)
def test_killed_while_saving_the_checkpoint_is_whole_or_not_there(
    tmp_path, point, left
):
    counts, run = tmp_path / "counts", tmp_path / "run"
    counts.mkdir()
    checkpoint.save(made(), run / "0001")
    done = subprocess.run(
        [sys.executable, "-c", DIES, __file__, str(run / "0002")],
        env=os.environ | {"FEDGEX_FAILPOINT": f"{point}:1:{counts}"},
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in run.iterdir()) == left
    last = checkpoint.load(run / left[-1])
    assert (last.round, last.receipt) == ((5, "{}") if "0002" in left else (4, None))


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
        "unknown_genes": [],
    }
