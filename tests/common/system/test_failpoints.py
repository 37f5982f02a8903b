"""A process kills itself where the environment says, once, and nowhere else."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedgex.common.errors import ConfigError
from fedgex.common.system import failpoints

VISITS = """
import sys
from fedgex.common.system import failpoints
for name in sys.argv[1:]:
    failpoints.reach(name)
    print(name, flush=True)
"""


def visit(*names: str, setting: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", VISITS, *names],
        env=os.environ | {failpoints.VARIABLE: setting},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_process_dies_at_the_named_visit_without_another_word(tmp_path):
    done = visit(
        "audit.before",
        "audit.appended",
        "audit.before",
        "audit.appended",
        setting=f"audit.before:2:{tmp_path}",
    )

    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "audit.before\naudit.appended\n"
    assert (tmp_path / "killed").read_text() == "audit.before:2\n"


def test_visits_are_counted_over_processes_and_it_dies_once(tmp_path):
    setting = f"reply.renamed:2:{tmp_path}"

    codes = [visit("reply.renamed", setting=setting).returncode for _ in range(4)]

    assert codes == [0, -signal.SIGKILL, 0, 0]


def test_the_folder_may_have_a_colon_in_its_name(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()

    done = visit("reply.written", setting=f"reply.written:1:{folder}")

    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("setting", [None, ""])
def test_without_the_variable_nothing_happens(setting, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    if setting is not None:
        monkeypatch.setenv(failpoints.VARIABLE, setting)

    for name in failpoints.POINTS:
        failpoints.reach(name)

    assert list(tmp_path.iterdir()) == []


def test_a_point_that_is_not_listed_is_a_mistake_even_when_nothing_is_set():
    with pytest.raises(AssertionError, match=r'"audit.after" is not among POINTS'):
        failpoints.reach("audit.after")


@pytest.mark.parametrize(
    "setting",
    [
        "audit.before",
        "audit.before:1",
        "audit.before:1:",
        "audit.before:0:{folder}",
        "audit.before:x:{folder}",
        "audit.after:1:{folder}",
        "audit.before:1:{folder}/absent",
    ],
)
def test_a_setting_that_cannot_be_read_is_refused_and_not_ignored(
    setting, monkeypatch, tmp_path
):
    monkeypatch.setenv(failpoints.VARIABLE, setting.format(folder=tmp_path))

    with pytest.raises(ConfigError, match="is not NAME:NTH:FOLDER"):
        failpoints.reach("reply.written")


def test_every_point_that_the_code_reaches_is_listed():
    """Also those that `write_atomic` makes of its `point`."""
    root = Path(failpoints.__file__).parents[2]
    named = set()
    for folder in ("common", "client", "server"):
        for path in (root / folder).rglob("*.py"):
            source = path.read_text()
            named |= set(re.findall(r'failpoints\.reach\("([^"]+)"\)', source))
            for point in re.findall(r'point="([^"]+)"', source):
                named |= {f"{point}.written", f"{point}.renamed"}

    assert named
    assert named - failpoints.POINTS == set()
