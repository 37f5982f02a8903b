"""The daemon of a hospital: alone in its folder, strict with time, and hard to end."""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedgex.client.service import daemon
from fedgex.client.service.daemon import daemon_pid
from fedgex.client.settings import SiteSettings
from fedgex.common.errors import FedgexError, TrustError
from fedgex.common.trust.audit_log import Chain

from ...support.hospital import join

WORKER = 4711


@pytest.fixture
def site_toml(tmp_path: Path) -> Path:
    """Return the settings of a hospital that has joined."""
    return join(tmp_path)[0]


@contextmanager
def held(state_dir: Path, pid: int) -> Iterator[None]:
    """Hold the daemon's lock as another process does."""
    with (state_dir / "daemon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(pid))
        lock.flush()
        yield


# ---- one daemon for one folder ----


def test_without_a_lock_file_no_daemon_runs(tmp_path: Path) -> None:
    assert daemon_pid(tmp_path) is None


def test_a_lock_file_that_a_dead_daemon_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "daemon.lock").write_text(str(os.getpid()))  # a process that lives

    assert daemon_pid(tmp_path) is None


def test_a_running_daemon_is_told_by_its_number(tmp_path: Path) -> None:
    with held(tmp_path, WORKER):
        assert daemon_pid(tmp_path) == WORKER
    assert daemon_pid(tmp_path) is None


def test_a_second_daemon_is_refused_and_told_whom_to_stop(site_toml: Path) -> None:
    state_dir = site_toml.with_name("state")
    log = (state_dir / "audit.jsonl").read_bytes()

    with (
        held(state_dir, WORKER),
        pytest.raises(FedgexError, match=rf"process {WORKER}: .*fedgex-site stop"),
    ):
        daemon.run(site_toml)

    assert (state_dir / "audit.jsonl").read_bytes() == log
    assert (state_dir / "daemon.lock").read_text() == str(WORKER)


def test_a_daemon_does_not_start_over_a_log_that_was_changed(site_toml: Path) -> None:
    log = site_toml.with_name("state") / "audit.jsonl"
    Chain(log).append("daemon-started", pid=1)
    log.write_text(
        log.read_text().replace('"consortium":"alliance"', '"consortium":"x"')
    )

    with pytest.raises(TrustError, match="line 1"):
        daemon.run(site_toml)

    assert daemon_pid(log.parent) is None


# ---- the policy's limit ----


class Worker:
    """Stands for the process that computes."""

    def __init__(self) -> None:
        self.pid: int | None = WORKER
        self.stopped = False
        self.alive, self.starts = True, 1

    def stop(self, grace_s: float = 10.0) -> None:
        assert grace_s == 0
        self.stopped, self.pid = True, None


@pytest.fixture
def served(site_toml: Path, monkeypatch: pytest.MonkeyPatch) -> daemon._Daemon:
    """Return a daemon that was not started, with a worker that is no process."""
    limit = "message_limit_s = 60"
    policy = site_toml.with_name("policy.toml")
    policy.write_text(policy.read_text().replace("message_limit_s = 3600", limit))
    made = daemon._Daemon(site_toml, SiteSettings.load(site_toml))
    monkeypatch.setattr(made, "worker", Worker())
    return made


def working(served: daemon._Daemon, seconds: float, pid: int = WORKER) -> Path:
    path = served.settings.state_dir / "working.json"
    since = time.monotonic() - seconds
    told = {"request": "a" * 64, "deaths": 0, "pid": pid, "since": since}
    path.write_text(json.dumps(told))
    return path


def test_a_computation_beyond_the_limit_is_stopped_with_a_code(
    served: daemon._Daemon,
) -> None:
    path = working(served, 61)

    served._enforce_limit()

    assert served.worker.stopped  # type: ignore[attr-defined]
    assert json.loads(path.read_text())["code"] == "FX-SITE-007"


@pytest.mark.parametrize("computes", [True, False])
def test_a_worker_loses_its_life_with_the_supernodes_only_if_it_computes(
    served: daemon._Daemon, monkeypatch: pytest.MonkeyPatch, computes: bool
) -> None:
    node = Worker()
    node.alive = False
    monkeypatch.setattr(served, "node", node)
    if computes:
        working(served, 1)

    served._end_bereaved()

    assert served.worker.stopped is computes  # type: ignore[attr-defined]


def test_a_computation_within_the_limit_goes_on(served: daemon._Daemon) -> None:
    path = working(served, 59)
    before = path.read_text()

    served._enforce_limit()

    assert not served.worker.stopped  # type: ignore[attr-defined]
    assert path.read_text() == before


def test_the_time_since_a_process_died_does_not_count(served: daemon._Daemon) -> None:
    path = working(served, 3600, pid=WORKER - 1)

    served._enforce_limit()

    assert not served.worker.stopped  # type: ignore[attr-defined]
    assert "code" not in json.loads(path.read_text())


def test_a_policy_that_cannot_be_read_keeps_the_limit_and_the_daemon(
    served: daemon._Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    served.site_toml.with_name("policy.toml").write_text("minimum_cohort = ")
    working(served, 61)

    with caplog.at_level(logging.ERROR):
        served._enforce_limit()

    assert served.worker.stopped  # type: ignore[attr-defined]
    assert "policy.toml" in caplog.text


def test_a_full_disk_stops_the_computation_and_not_the_daemon(
    served: daemon._Daemon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    working(served, 61)
    monkeypatch.setattr(os, "fsync", fail)

    served._enforce_limit()
    served._write_status()

    assert served.worker.stopped  # type: ignore[attr-defined]
    assert "Free space" in caplog.text
