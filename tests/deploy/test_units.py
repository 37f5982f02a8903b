"""The systemd units run fedgex as nobody in particular, and bring it back."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))
HARDENING = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "SystemCallFilter": "@system-service",
    "UMask": "0077",
}


def settings(unit: Path) -> dict[str, dict[str, list[str]]]:
    """Return section -> key -> values; a key may be given several times."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, f"{unit.name}: {line}"
            section.setdefault(key, []).append(value)
    return sections


@pytest.fixture(params=UNITS, ids=lambda unit: unit.name)
def unit(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_is_one_unit_for_the_server_and_one_for_a_hospital() -> None:
    assert [unit.stem for unit in UNITS] == ["fedgex-server", "fedgex-site"]


def test_a_unit_starts_what_the_guides_say(unit: Path) -> None:
    command = {
        "fedgex-server": "/opt/fedgex/bin/fedgex-admin server start",
        "fedgex-site": "/opt/fedgex/bin/fedgex-site start /etc/fedgex/site/site.toml",
    }

    assert settings(unit)["Service"]["ExecStart"] == [command[unit.stem]]


def test_a_unit_is_not_run_as_root(unit: Path) -> None:
    service = settings(unit)["Service"]

    assert service["User"] == service["Group"] == [unit.stem]


def test_a_unit_comes_back_after_a_death_and_a_reboot(unit: Path) -> None:
    found = settings(unit)

    assert found["Service"]["Restart"] == ["on-failure"]
    # Slower than systemd's limit of five starts in ten seconds, so it never gives up.
    assert int(found["Service"]["RestartSec"][0]) > 2
    assert found["Install"]["WantedBy"] == ["multi-user.target"]


def test_children_are_ended_by_their_parent_and_killed_only_if_that_fails(
    unit: Path,
) -> None:
    service = settings(unit)["Service"]

    assert service["KillMode"] == ["mixed"]
    assert int(service["TimeoutStopSec"][0]) > 3 * 10  # a Child's grace, three times


def test_a_unit_writes_in_its_state_directory_only(unit: Path) -> None:
    service = settings(unit)["Service"]

    assert "ReadWritePaths" not in service
    assert service["StateDirectoryMode"] == ["0700"]
    state = f"/var/lib/{service['StateDirectory'][0]}"
    assert service["WorkingDirectory"] == [state]
    if unit.stem == "fedgex-server":
        assert f"FEDGEX_STATE={state}" in service["Environment"]


@pytest.mark.parametrize(("key", "value"), HARDENING.items())
def test_a_unit_is_hardened(unit: Path, key: str, value: str) -> None:
    assert settings(unit)["Service"][key] == [value]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path, tmp_path: Path) -> None:
    commands = Path(sys.executable).parent
    there = tmp_path / unit.name
    there.write_text(unit.read_text().replace("/opt/fedgex/bin", str(commands)))

    found = subprocess.run(
        ["systemd-analyze", "verify", there], capture_output=True, text=True
    )

    assert (found.returncode, found.stderr) == (0, "")
