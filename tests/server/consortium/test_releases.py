"""A model is released once, whole, by as many administrators as the contract wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedgex.common.errors import FedgexError, TrustError
from fedgex.common.trust import audit_log, bundle
from fedgex.server.cli import app
from fedgex.server.consortium import commands, members, releases, runs
from fedgex.server.consortium.commands import Order
from fedgex.server.consortium.releases import Released

from ..conftest import digest_of

Do = Callable[[str], Released]


@pytest.fixture
def finished(finish: Callable[[], runs.Run]) -> runs.Run:
    """Return a run at its end."""
    return finish()


def ordered(admitted: Any, run: runs.Run, name: str, **changes: Any) -> Order:
    arguments = {"model": digest_of(run)} | changes
    return commands.submit(
        admitted.consortium, "release", run.name, admitted.key(name), **arguments
    )


def released(admitted: Any, run: runs.Run) -> Path:
    """Release the model by both administrators and return its bundle."""
    for name in ("ada", "bo"):
        releases.approve(admitted.consortium, ordered(admitted, run, name))
    return admitted.folder / "releases" / "small.fedgex"


def test_a_model_is_released_by_the_last_administrator_whom_the_contract_wants(
    admitted: Any, finished: runs.Run
) -> None:
    path = admitted.folder / "releases" / "small.fedgex"

    first = releases.approve(admitted.consortium, ordered(admitted, finished, "ada"))
    there = path.exists()
    second = releases.approve(admitted.consortium, ordered(admitted, finished, "bo"))

    assert (first, there) == (Released("candidate", ("ada",), 2), False)
    assert not first.complete
    assert second == Released("released", ("ada", "bo"), 2)
    assert second.complete
    found = bundle.verify(path, admitted.consortium.authority)
    assert found.administrators == ("ada", "bo")
    assert (found.release.run, found.release.model) == ("small", digest_of(finished))


def test_one_administrator_twice_is_one(admitted: Any, finished: runs.Run) -> None:
    for token in ("t1", "t2"):
        order = ordered(admitted, finished, "ada", token=token)
        found = releases.approve(admitted.consortium, order)

    assert found == Released("candidate", ("ada",), 2)


def test_an_order_carried_out_again_leaves_the_bundle_as_it_is(
    admitted: Any, finished: runs.Run
) -> None:
    path = released(admitted, finished)
    before = path.read_bytes()

    again = releases.approve(
        admitted.consortium, ordered(admitted, finished, "bo", token="again")
    )

    assert again.state == "released"
    assert path.read_bytes() == before
    events = [e["event"] for e in audit_log.read(admitted.folder / "audit.jsonl")]
    assert events.count("model-released") == 1


def test_a_released_model_stays_so_when_an_administrator_leaves(
    admitted: Any, finished: runs.Run
) -> None:
    path = released(admitted, finished)
    members.revoke_administrator(admitted.consortium, "bo", "left")

    found = releases.status(admitted.consortium, "small")
    assert found == Released("released", ("ada", "bo"), 2)
    assert bundle.verify(path, admitted.consortium.authority)


def test_the_order_of_an_administrator_who_left_before_does_not_count(
    admitted: Any, finished: runs.Run
) -> None:
    order = ordered(admitted, finished, "bo")
    members.revoke_administrator(admitted.consortium, "bo", "left")
    releases.approve(admitted.consortium, ordered(admitted, finished, "ada"))

    assert releases.approve(admitted.consortium, order).approvals == ("ada",)


def test_a_run_that_is_not_finished_releases_nothing(
    admitted: Any, finished: runs.Run
) -> None:
    order = ordered(admitted, finished, "ada")
    finished.set("running", reason=None)

    with pytest.raises(FedgexError, match='"small" is running; expected a finished'):
        releases.approve(admitted.consortium, order)


def test_an_order_for_another_model_than_the_last_is_refused(
    admitted: Any, finished: runs.Run
) -> None:
    order = ordered(admitted, finished, "ada", model="0" * 64)

    with pytest.raises(FedgexError, match=r"the model 000000000000, the last one of"):
        releases.approve(admitted.consortium, order)


def test_what_cannot_be_verified_is_not_released(
    admitted: Any, finished: runs.Run
) -> None:
    first = finished.folder / "checkpoints" / "00001-pretraining-00001"
    text = (first / "receipt.json").read_text()
    (first / "receipt.json").write_text(text.replace("412", "413"))
    releases.approve(admitted.consortium, ordered(admitted, finished, "ada"))

    with pytest.raises(TrustError, match="receipt 1 does not hold"):
        releases.approve(admitted.consortium, ordered(admitted, finished, "bo"))
    assert list((admitted.folder / "releases").iterdir()) == []


def test_a_run_without_receipts_is_not_released(
    admitted: Any, finished: runs.Run
) -> None:
    releases.approve(admitted.consortium, ordered(admitted, finished, "ada"))
    for path in finished.folder.glob("checkpoints/*/receipt.json"):
        path.unlink()

    with pytest.raises(FedgexError, match="holds no receipts"):
        releases.approve(admitted.consortium, ordered(admitted, finished, "bo"))


def test_a_full_disk_releases_nothing_and_the_order_can_be_carried_out_again(
    admitted: Any, finished: runs.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases.approve(admitted.consortium, ordered(admitted, finished, "ada"))
    order = ordered(admitted, finished, "bo")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(bundle.files, "sync", full)
        with pytest.raises(FedgexError, match=r"No space left on device\. Free"):
            releases.approve(admitted.consortium, order)

    assert list((admitted.folder / "releases").iterdir()) == []
    assert releases.approve(admitted.consortium, order).state == "released"


DIES = """
import sys
from pathlib import Path
from fedgex.server.consortium import commands, releases
from fedgex.server.consortium.store import Consortium
consortium = Consortium(Path(sys.argv[1]))
(order,) = [o for o in commands.take(consortium) if o.token == "of-bo"]
releases.approve(consortium, order)
"""


@pytest.mark.parametrize("point", ["release.written", "release.renamed"])
def test_killed_while_releasing_the_bundle_is_whole_or_not_there(
    admitted: Any, finished: runs.Run, tmp_path: Path, point: str
) -> None:
    consortium, path = admitted.consortium, admitted.folder / "releases/small.fedgex"
    releases.approve(consortium, ordered(admitted, finished, "ada"))
    order = ordered(admitted, finished, "bo", token="of-bo")
    (tmp_path / "counts").mkdir()

    done = subprocess.run(
        [sys.executable, "-c", DIES, str(admitted.folder)],
        env=os.environ | {"FEDGEX_FAILPOINT": f"{point}:1:{tmp_path / 'counts'}"},
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    renamed = point == "release.renamed"
    assert path.exists() == renamed
    state = "released" if renamed else "candidate"
    assert releases.status(consortium, "small").state == state
    assert releases.approve(consortium, order).state == "released"
    assert [p.name for p in path.parent.iterdir()] == ["small.fedgex"]
    assert bundle.verify(path, consortium.authority)


# ---- export ----


def test_a_released_bundle_is_exported_as_it_stands(
    admitted: Any, finished: runs.Run, tmp_path: Path
) -> None:
    path = released(admitted, finished)

    found = releases.export(admitted.consortium, "small", tmp_path / "m.fedgex")

    assert found.release.run == "small"
    assert (tmp_path / "m.fedgex").read_bytes() == path.read_bytes()


def test_a_candidate_is_not_exported(
    admitted: Any, finished: runs.Run, tmp_path: Path
) -> None:
    releases.approve(admitted.consortium, ordered(admitted, finished, "ada"))

    with pytest.raises(FedgexError, match=r"1 of 2 administrators ordered it \(ada\)"):
        releases.export(admitted.consortium, "small", tmp_path / "m.fedgex")
    assert not (tmp_path / "m.fedgex").exists()


def test_a_bundle_that_was_changed_is_not_exported(
    admitted: Any, finished: runs.Run, tmp_path: Path
) -> None:
    path = released(admitted, finished)
    whole = bytearray(path.read_bytes())
    whole[5000] ^= 1
    path.write_bytes(whole)

    with pytest.raises(TrustError, match="is not used"):
        releases.export(admitted.consortium, "small", tmp_path / "m.fedgex")
    assert not (tmp_path / "m.fedgex").exists()


def test_export_overwrites_nothing(
    admitted: Any, finished: runs.Run, tmp_path: Path
) -> None:
    released(admitted, finished)
    (tmp_path / "m.fedgex").write_text("mine")

    with pytest.raises(FedgexError, match="exists already"):
        releases.export(admitted.consortium, "small", tmp_path / "m.fedgex")
    assert (tmp_path / "m.fedgex").read_text() == "mine"


def test_the_commands_export_and_verify_a_released_model(
    admitted: Any, finished: runs.Run, tmp_path: Path
) -> None:
    released(admitted, finished)
    out, authority = tmp_path / "m.fedgex", admitted.folder / "pki" / "authority.crt"
    state = ("--state", str(admitted.folder))

    exported = admin("model", "export", "small", "--out", str(out), *state)
    verify = ("model", "verify", str(out), "--authority", str(authority))
    good = admin(*verify, "--format", "json")
    out.write_bytes(out.read_bytes() + b" ")
    changed = admin(*verify)

    assert exported.exit_code == 0, exported.output
    assert good.exit_code == 0, good.output
    told = json.loads(good.stdout)
    assert told["released_by"] == ["ada", "bo"]
    assert (told["rounds"], told["sites"]) == (2, {"north": 2, "south": 2})
    assert changed.exit_code == 1
    assert changed.stderr.startswith(f"Error: {out} is not used: ")


def admin(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)
