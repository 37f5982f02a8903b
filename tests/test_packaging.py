"""The wheel holds every module, and commands start without the heavy ones."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedgex.client import cli as client
from fedgex.common.lazy_commands import LazyCommand
from fedgex.server import cli as server

ROOT = Path(__file__).parents[1]
FOLDERS = ("client", "common", "server", "simulations")


def test_every_package_folder_is_listed_in_pyproject() -> None:
    on_disk = {
        "fedgex." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert set(pyproject["tool"]["setuptools"]["packages"]) == on_disk


def test_every_listed_package_has_its_folder_and_says_that_it_is_typed() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = pyproject["tool"]["setuptools"]["package-dir"]

    assert set(folders) == set(pyproject["tool"]["setuptools"]["packages"])
    assert all((ROOT / folder / "py.typed").is_file() for folder in folders.values())


LIGHT = {
    "fedgex.client.cli": ("torch", "pandas", "scipy", "flwr", "cryptography"),
    "fedgex.server.cli": ("torch", "pandas", "scipy", "flwr", "cryptography"),
    "fedgex.simulations.cli": ("torch", "pandas", "scipy", "flwr", "matplotlib"),
    "fedgex.server.supervisor": ("torch", "pandas", "scipy", "pyarrow"),
    "fedgex.server.app": ("torch", "pandas", "scipy", "pyarrow"),
    "fedgex.client.ledger_cli": ("torch", "opacus", "lifelines"),
    "fedgex.client.predict_cli": ("torch", "opacus", "lifelines"),
    "fedgex.client.site_cli": ("torch", "opacus", "lifelines"),
    "fedgex.server.run_cli": ("torch", "opacus", "lifelines"),
    "fedgex.server.study_cli": ("torch", "opacus", "lifelines"),
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

    assert command.name in (name, "")  # a group of its own has none
    assert command.get_short_help_str(limit=200) == line
