"""Wheels hold the modules of their part; commands start without the heavy ones."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
        if path.suffix in {".py", ".toml", ".html", ".typed"}
    }

    assert {name for name in held if name.startswith("fedgex/")} == expected
    (scripts,) = (name for name in held if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(scripts).decode()
    assert text.split("\n")[1:2] == [f"{command} = fedgex.{sides[0]}.cli:app"]
    assert text.count("fedgex-") == 1


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_command_starts_without_what_takes_seconds_to_import(side) -> None:
    heavy = '{"torch", "opacus", "lifelines"} & set(sys.modules)'
    asked = f"import sys, fedgex.{side}.cli; print(sorted({heavy}))"
    told = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, check=True
    )

    assert told.stdout.decode().strip() == "[]"
