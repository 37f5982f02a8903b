"""The wheel holds every module, and commands start without the heavy ones."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_command_starts_without_what_takes_seconds_to_import(side) -> None:
    heavy = '{"torch", "opacus", "lifelines"} & set(sys.modules)'
    asked = f"import sys, fedgex.{side}.cli; print(sorted({heavy}))"
    told = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, check=True
    )

    assert told.stdout.decode().strip() == "[]"
