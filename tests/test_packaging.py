"""The wheel must hold every module; setuptools' explicit list can silently miss one."""

import tomllib
from pathlib import Path

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
