"""Wheels hold the modules of their part; commands start without the heavy ones."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedgex.client import cli as client
from fedgex.common.system.lazy_commands import LazyCommand
from fedgex.server import cli as server

ROOT = Path(__file__).parents[1]
SIDES = ("client", "common", "server", "simulations")
PARTS = {
    "site": (("client", "common"), "fedgex-site"),
    "server": (("server", "common"), "fedgex-admin"),
}
CACHES = shutil.ignore_patterns("__pycache__")


def test_every_folder_of_modules_is_a_package_and_each_side_is_typed() -> None:
    holding = {path.parent for side in SIDES for path in (ROOT / side).rglob("*.py")}

    assert [f for f in holding if not (f / "__init__.py").is_file()] == []
    assert all((ROOT / side / "py.typed").is_file() for side in SIDES)


@pytest.mark.parametrize("part", PARTS)
def test_a_wheel_holds_the_sides_of_its_part_and_no_others(part, tmp_path) -> None:
    sides, command = PARTS[part]
    for side in sides:
        shutil.copytree(ROOT / side, tmp_path / side, ignore=CACHES)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, *build, "--wheel-dir", tmp_path / "dist", tmp_path],
        capture_output=True,
        check=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "fedgex/" + path.relative_to(ROOT).as_posix()
        for side in sides
        for path in (ROOT / side).rglob("*")
        if path.suffix in {".py", ".toml", ".html", ".xz", ".typed"}
    }

    assert {name for name in held if name.startswith("fedgex/")} == expected
    (scripts,) = (name for name in held if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(scripts).decode()
    assert text.split("\n")[1:2] == [f"{command} = fedgex.{sides[0]}.cli:app"]
    assert text.count("fedgex-") == 1


LIGHT = {
    "fedgex.client.cli": ("torch", "pandas", "scipy", "flwr", "cryptography"),
    "fedgex.server.cli": ("torch", "pandas", "scipy", "flwr", "cryptography"),
    "fedgex.simulations.cli": ("torch", "pandas", "scipy", "flwr", "matplotlib"),
    "fedgex.server.service.supervisor": ("torch", "pandas", "scipy", "pyarrow"),
    "fedgex.server.app": ("torch", "pandas", "scipy", "pyarrow"),
    "fedgex.client.cli.ledger": ("torch", "opacus", "lifelines"),
    "fedgex.client.cli.predict": ("torch", "opacus", "lifelines"),
    "fedgex.client.cli.site": ("torch", "opacus", "lifelines"),
    "fedgex.server.cli.run": ("torch", "opacus", "lifelines"),
    "fedgex.server.cli.study": ("torch", "opacus", "lifelines"),
}
"""What each module starts without: the help of a command, the server's supervisor, and
its app, which publishes contracts and delivers models."""


@pytest.mark.parametrize(("module", "heavy"), LIGHT.items(), ids=LIGHT)
def test_what_takes_seconds_to_import_is_imported_where_it_is_used(module, heavy):
    asked = f"import sys, {module}; print(sorted({set(heavy)} & set(sys.modules)))"
    told = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, check=True
    )

    assert told.stdout.decode().strip() == "[]"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (name, place)
        for side in (client, server)
        for name, place in side.COMMANDS.items()
    ],
    ids=str,
)
def test_the_help_of_a_lazy_command_is_that_of_the_command(name, place):
    where, line = place

    command = LazyCommand(name, where, line).load()

    assert (command.name or name) == name
    assert command.get_short_help_str(limit=200) == line
