"""`deploy/wheelhouse.sh` makes a folder from which pip installs without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "wheelhouse.sh"


def collect(
    folder: Path, *options: str, part: str = "server"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, part, folder, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheelhouse of fedgex alone, made without the network."""
    folder = tmp_path_factory.mktemp("made") / "wheelhouse"
    made = collect(folder, "--no-deps", "--no-build-isolation", "--no-index")
    assert made.returncode == 0, made.stderr
    return folder


def test_every_file_is_under_a_sum(wheelhouse: Path) -> None:
    lines = (wheelhouse / "SHA256SUMS").read_text().splitlines()

    named = {line.split()[1] for line in lines}
    assert named | {"SHA256SUMS"} == {path.name for path in wheelhouse.iterdir()}
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=wheelhouse).returncode == 0


def install(wheelhouse: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--find-links",
        ".",
    ]
    command += ["--require-hashes", "--requirement", "requirements.txt"]
    command += ["--no-deps", "--target", str(target)]
    return subprocess.run(command, cwd=wheelhouse, capture_output=True, text=True)


def test_what_was_collected_installs_by_its_hashes(
    wheelhouse: Path, tmp_path: Path
) -> None:
    installed = install(wheelhouse, tmp_path / "there")

    assert installed.returncode == 0, installed.stderr
    assert (
        tmp_path / "there" / "fedgex" / "server" / "service" / "supervisor.py"
    ).is_file()


def test_a_wheel_that_was_changed_on_its_way_is_not_installed(
    wheelhouse: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(wheelhouse, tmp_path / "changed")
    (wheel,) = changed.glob("fedgex-*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"\0")

    installed = install(changed, tmp_path / "there")

    assert installed.returncode != 0
    assert "DO NOT MATCH THE HASHES" in installed.stderr
    assert not (tmp_path / "there").exists()


def test_a_hospital_installs_what_it_reviews(tmp_path: Path) -> None:
    folder = tmp_path / "wheelhouse"
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    assert collect(folder, *options, part="site").returncode == 0
    install(folder, tmp_path / "there")

    installed = {path.name for path in (tmp_path / "there" / "fedgex").iterdir()}
    assert installed == {"client", "common"}
    assert [unit.name for unit in folder.glob("*.service")] == ["fedgex-site.service"]


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.whl").touch()

    made = collect(tmp_path)

    assert made.returncode == 1
    assert made.stderr == f"Error: {tmp_path} is not empty; choose a new folder.\n"
