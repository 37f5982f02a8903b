"""Another account of the same machine: what it may read, and links that it plants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from fedgex.client.prediction import files
from fedgex.common.errors import FedgexError
from fedgex.common.system.files import exclusive_lock, replacing, write_atomic
from fedgex.common.system.processes import child_environment
from fedgex.server.service.superlink import LoopbackGuard

OPEN = 0o077
"""Bits of a mode that let others in."""


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """Set the umask that forbids nothing."""
    before = os.umask(0)
    yield
    os.umask(before)


def run(side: str, *words: object) -> None:
    """Run fedgex-site or fedgex-admin as a process, under our umask."""
    subprocess.run(
        [sys.executable, "-c", f"from fedgex.{side}.cli import app; app()"]
        + [str(word) for word in words],
        check=True,
        capture_output=True,
    )


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def unlocked(folder: Path) -> dict[str, str]:
    """Return the folders, from one on downwards, that others may enter."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    return {str(p): oct(mode(p)) for p in folders if mode(p) & OPEN}


# ---- folders ----


def test_every_folder_of_a_servers_state_is_for_its_owner_only(tmp_path):
    state = tmp_path / "var" / "state"
    run("server", "consortium", "init", "alliance", "--state", state, "--host", "local")
    run("server", "administrator", "request", "ada", "--out", tmp_path / "keys")

    assert unlocked(tmp_path / "var") == {}
    assert unlocked(tmp_path / "keys") == {}


def test_every_folder_of_a_sites_state_is_for_its_owner_only(tmp_path):
    site = tmp_path / "srv" / "north"
    run("client", "init", site, "--name", "north", "--server", "local:9092")

    assert unlocked(tmp_path / "srv") == {}


def test_what_a_service_makes_is_for_its_owner_only(tmp_path):
    made = (
        "from pathlib import Path; from fedgex.common.system.processes import begin\n"
        f"begin(); Path('{tmp_path}/a/b').mkdir(parents=True)\n"
        f"Path('{tmp_path}/a/c').touch()"
    )
    environment = child_environment()
    subprocess.run([sys.executable, "-c", made], check=True, env=environment)

    assert {mode(tmp_path / "a"), mode(tmp_path / "a/b")} == {0o700}
    assert mode(tmp_path / "a" / "c") == 0o600


# ---- predictions ----


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a file of ours to which a planted link leads."""
    path = tmp_path / "victim"
    path.write_text("ours")
    return path


@pytest.mark.parametrize("ending", files.FORMATS)
def test_a_prediction_is_for_its_owner_only_and_follows_no_planted_link(
    tmp_path, victim, ending
):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    output, card = shared / f"restored{ending}", shared / "restored.json"
    for path in (
        output,
        card,
        *(shared / f".{p.name}.partial" for p in (output, card)),
    ):
        path.symlink_to(victim)
    table = pd.DataFrame({"TP53": [4.5]}, index=["patient-1"])

    files.write(table, {"command": "restore"}, output, card)

    assert victim.read_text() == "ours"
    assert {mode(output), mode(card)} == {0o600}
    assert not output.is_symlink()
    assert json.loads(card.read_text()) == {"command": "restore"}
    assert [p.name for p in shared.iterdir() if not p.is_symlink()] == [
        p.name for p in shared.iterdir() if p in (output, card)
    ]


def test_a_prediction_that_cannot_be_written_leaves_nothing_of_a_patient(tmp_path):
    output = tmp_path / "restored.csv"
    output.mkdir()  # stands where the file should
    table = pd.DataFrame({"TP53": [4.5]}, index=["patient-1"])

    with pytest.raises(FedgexError, match="could not be written"):
        files.write(table, {}, output, tmp_path / "card.json")

    assert not any(path.is_file() for path in tmp_path.rglob(".restored*"))


# ---- other files ----


def test_a_planted_link_is_not_written_through(tmp_path, victim):
    (tmp_path / ".report.json.partial").symlink_to(victim)

    with pytest.raises(FedgexError, match=r"report\.json could not be written"):
        write_atomic(tmp_path / "report.json", b"theirs")

    assert victim.read_text() == "ours"


def test_a_planted_link_is_no_lock(tmp_path, victim):
    (tmp_path / "daemon.lock").symlink_to(victim)

    with (
        pytest.raises(FedgexError, match=r"daemon\.lock could not be written"),
        exclusive_lock(tmp_path / "daemon.lock", "busy"),
    ):
        pass

    assert victim.read_text() == "ours"


def test_a_file_that_replaces_another_stands_only_once_it_is_written(tmp_path, victim):
    def half() -> None:
        with replacing(victim) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()

    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "ours"


# ---- secrets ----


def test_the_supervisors_secret_is_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "path": "/v1/control/list-runs",
        "headers": [(b"fedgex-secret", b"guess")],
    }
    call = LoopbackGuard(None, b"secret")(scope, None, send)
    with pytest.raises(StopIteration):
        call.send(None)

    assert compared == [(b"guess", b"secret")]
    assert sent[0]["status"] == 401
