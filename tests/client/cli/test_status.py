"""`fedgex-site status`: exit codes, and what the operator reads."""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedgex.common.trust.signed import Signed

from .conftest import (
    NEXT_WEEK,
    SERVER,
    Authority,
    approve,
    site,
    write_kit,
)


@pytest.fixture
def daemon(site_toml: Path) -> Iterator[None]:
    """Hold the daemon's lock."""
    with (site_toml.parent / "state/daemon.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_status_of_a_running_site(
    site_toml: Path, contract: Signed, daemon: None
) -> None:
    approve(site_toml, contract.hash)
    (site_toml.parent / "state/status.json").write_text('{"connected": true}')

    result = site("status", site_toml)

    assert result.exit_code == 0
    assert "running      yes\n" in result.stdout
    assert "paused       no\n" in result.stdout
    assert f"consortium   oncology, server {SERVER}\n" in result.stdout
    assert "audit log    3 lines, head " in result.stdout
    assert "daemon       connected: true\n" in result.stdout
    assert (
        f"contract     {contract.hash[:16]} restoration: approved until {NEXT_WEEK}, "
        "1 run\n"
    ) in result.stdout
    assert "Warning" not in result.stdout


def test_status_of_a_stopped_site_exits_with_four(site_toml: Path) -> None:
    (site_toml.parent / "state/daemon.lock").write_text("4711\n")  # left behind

    result = site("status", site_toml, "--format", "json")

    assert result.exit_code == 4
    assert json.loads(result.stdout)["running"] is False


@pytest.mark.parametrize(
    ("days", "told"), [(29, "expires in 28 days"), (31, None), (-1, "expired")]
)
def test_status_warns_thirty_days_before_the_certificate_ends(
    site_toml: Path, authority: Authority, days: int, told: str | None
) -> None:
    kit = write_kit(site_toml.parent, authority, days)
    values = json.loads(kit.read_text())
    (site_toml.parent / "state/identity/kit.json").write_text(json.dumps(values))

    warnings = json.loads(site("status", site_toml, "--format", "json").stdout)[
        "warnings"
    ]

    assert len(warnings) == (told is not None)
    if told is not None:
        assert warnings[0].startswith(f"this hospital's certificate {told} (")
