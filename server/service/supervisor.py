"""`fedgex-admin server start`: supervise SuperLink, nodes, orders and runs.

A run's folder holds its settings, state, journal and checkpoints. After a crash of
SuperLink or server app, an unfinished run is restarted as a new Flower run, and resumes
from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from fedgex.common.errors import FedgexError
from fedgex.common.models import checkpoint
from fedgex.common.system.files import exclusive_lock, warn_of_others, write_atomic
from fedgex.common.system.processes import Child, IdlePause
from fedgex.common.transport import flower as runtime
from fedgex.common.transport.flower import RuntimeHttpClient
from fedgex.common.trust import audit_log
from fedgex.server.consortium import commands, releases, runs
from fedgex.server.consortium.commands import Order
from fedgex.server.consortium.runs import Run
from fedgex.server.consortium.store import Consortium
from fedgex.server.service import monitoring, superlink, worker
from fedgex.server.service.flower import Control

logger = logging.getLogger(__name__)

LOOK_S, IDLE_LOOK_S = 0.2, 1.0
"""Polling intervals, seconds: while anything runs, and otherwise."""
MAX_CRASHES = 5
"""Crashes without a new checkpoint after which a run has failed."""
START_S = 60.0
HEARTBEAT_S = 10.0
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
"""Makes glibc return large arrays to the system when freed; else fragmentation holds
about two models' memory."""


@dataclass
class _Job:
    """A Flower run to be kept running to its end."""

    settings: Path
    run: Run | None = None
    """None for a stateless job, such as publishing."""
    flower_run: int | None = None
    worker: Child | None = None
    crashes: int = 0
    progress: str = ""
    """Last checkpoint at its start."""
    not_before: float = 0.0
    task: RuntimeHttpClient | None = None
    last_heartbeat: float = 0.0
    """When the last heartbeat went to the SuperLink, monotonic seconds."""

    @property
    def waits(self) -> bool:
        """Whether it was started and its task has not arrived."""
        return self.flower_run is not None and self.worker is None

    def forget(self) -> None:
        """Stop the worker and reset the job to not started."""
        if self.worker is not None:
            self.worker.stop(grace_s=0)
        if self.task is not None:
            self.task.close()
        self.worker = self.flower_run = self.task = None


def serve(folder: Path) -> None:
    """Serve a consortium until SIGTERM or SIGINT.

    Raises
    ------
    ConfigError
        If there is no consortium in `folder`.
    TrustError
        If its audit log was changed.
    FedgexError
        If another server serves it.
    """
    consortium = Consortium(folder.resolve())
    warn_of_others(consortium.folder)
    busy = f"another server serves {folder}; stop it, or use it."
    with exclusive_lock(consortium.folder / "lock", busy):
        audit_log.verify(consortium.folder / "audit.jsonl")
        consortium.audit.append("server-started", pid=os.getpid())
        monitoring.serve(consortium)
        _Supervisor(consortium).serve()
        consortium.audit.append("server-stopped", pid=os.getpid())


class _Supervisor:
    def __init__(self, consortium: Consortium) -> None:
        self.consortium, self.folder = consortium, consortium.folder
        self.settings = consortium.settings
        self.secret = secrets.token_hex(32)
        settings = superlink.SuperLinkSettings(
            host=self.settings.interface,
            port=self.settings.port,
            control_port=self.settings.control_port,
            health_port=self.settings.health_port,
            certificate=consortium.server_certificate_path,
            key=consortium.server_key_path,
            state_dir=self.folder,
        )
        self.superlink = Child(
            "fedgex.server.service.superlink",
            [settings.model_dump_json()],
            {superlink.SECRET_VARIABLE: self.secret},
        )
        self.control = Control(self.settings.control_port, self.secret)
        self.executor = runtime.executor(self.settings.control_port, self.secret)
        self.nodes: dict[str, tuple[str, int]] = {}
        """Site -> its registered public key, and Flower's number of it."""
        self.jobs: dict[str, _Job] = {}
        self.looks = IdlePause(LOOK_S, IDLE_LOOK_S)
        self.stopping = False
        self.certificate = ""

    def serve(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for run in runs.unfinished(self.folder):
            self.jobs[run.name] = _Job(run.settings_path, run)
        try:
            while not self.stopping:
                try:
                    self._look()
                except httpx.HTTPError as error:
                    # The SuperLink died under us: the next look starts it again.
                    logger.warning("the SuperLink does not answer: %s", error)
                time.sleep(self.looks.seconds)
        finally:
            for job in self.jobs.values():
                if job.worker is not None:
                    job.worker.stop()
            self.superlink.stop()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _look(self) -> None:
        """Run one supervision cycle."""
        self._keep_superlink()
        self._keep_nodes()
        for order in commands.take(self.consortium):
            self._carry_out(order)
        for name, job in list(self.jobs.items()):
            self._keep_job(name, job)
            self._keep_task(job)
        if self.jobs:
            self.looks.worked()
        while any(job.waits for job in self.jobs.values()):
            task = runtime.acquire(self.executor, runtime.SERVER_APP)
            if task is None:
                break
            self._start_worker(*task)

    # ---- SuperLink and nodes ----

    def _keep_superlink(self) -> None:
        """Start the SuperLink if it is not running, and reset its jobs and nodes."""
        certificate = self.consortium.server_certificate_path.read_text()
        if self.superlink.alive and certificate != self.certificate:
            logger.info("the server's certificate changed: SuperLink starts again")
            self.superlink.stop()
        if self.superlink.alive:
            return
        for job in self.jobs.values():
            job.forget()
        self.nodes = {}
        self.certificate = certificate
        if not self.superlink.keep():
            return
        if self.superlink.starts > 1:
            self.consortium.audit.append("superlink-restarted")
        end = time.monotonic() + START_S
        while not self.control.healthy():
            if not self.superlink.alive or time.monotonic() > end or self.stopping:
                raise httpx.ConnectError("the SuperLink did not start")
            time.sleep(0.1)

    def _keep_nodes(self) -> None:
        """Register new hospitals, and unregister revoked ones."""
        wanted = {
            site.name: site.node_public_key
            for site in self.consortium.sites().values()
            if site.state == "active"
        }
        known = {name: key for name, (key, _) in self.nodes.items()}
        if wanted == known:
            return
        for name, (key, node) in list(self.nodes.items()):
            if wanted.get(name) != key:
                self.control.unregister(node)
                del self.nodes[name]
        for name, key in wanted.items():
            if name not in self.nodes:
                self.nodes[name] = (key, self.control.register(name, key))
        numbers = {name: node for name, (_, node) in sorted(self.nodes.items())}
        write_atomic(self.folder / "nodes.json", json.dumps(numbers).encode())

    # ---- orders ----

    def _carry_out(self, order: Order) -> None:
        """Execute an administrator's order, and record its outcome."""
        try:
            answer = self._do(order)
        except (FedgexError, OSError) as error:
            commands.finish(self.consortium, order, refused=str(error))
            return
        commands.finish(self.consortium, order)
        logger.info("order=%s carried out: %s", order.token, answer)

    def _do(self, order: Order) -> Mapping[str, Any]:
        if order.kind == "publish":
            settings = runs.publishing(self.consortium, order)
            self.jobs[f"publish {order.token}"] = _Job(settings)
            return {"contract": order.subject}
        if order.kind == "launch":
            run = runs.launch(self.consortium, order)
            self._go_on(run)
            return {"run": run.name}
        if order.kind == "release":
            released = releases.approve(self.consortium, order)
            if released.complete:
                bundle = self.folder / "releases" / f"{order.subject}.fedgex"
                settings = runs.delivering(self.consortium, order.subject, bundle)
                self.jobs[f"deliver {order.subject}"] = _Job(settings)
            return {"run": order.subject, "state": released.state}
        run = runs.load(self.folder, order.subject)
        if order.kind == "resume":
            if run.state == "finished":
                raise FedgexError(f"run {run.name} is finished; launch another.")
            run.set("running", reason=None)
            self._go_on(run)
        elif order.kind == "stop":
            if run.state == "finished":
                raise FedgexError(f"run {run.name} is finished already.")
            run.set("stopped", reason=f"stopped by {order.administrator}")
            job = self.jobs.pop(run.name, None)
            if job is not None:
                self._end(job)
        return {"run": run.name, "state": run.state}

    def _go_on(self, run: Run) -> None:
        if run.state == "running" and run.name not in self.jobs:
            self.jobs[run.name] = _Job(run.settings_path, run)

    def _end(self, job: _Job) -> None:
        if job.worker is not None:
            job.worker.stop(grace_s=2)
        if job.flower_run is not None:
            self.control.stop_run(job.flower_run)

    # ---- jobs ----

    def _keep_job(self, name: str, job: _Job) -> None:
        """Start a job, or handle its end."""
        if job.flower_run is None:
            if time.monotonic() >= job.not_before:
                job.progress = _progress(job)
                job.flower_run = self.control.start_run(str(job.settings))
            return
        if job.worker is None or job.worker.alive:
            return
        code = job.worker.exit_code
        if code == worker.DONE:
            self._ended(name, job, "finished", None)
        elif code == worker.REFUSED:
            self._ended(name, job, "failed", runs.reason(job.settings.parent))
        else:
            job.crashes = 1 if _progress(job) != job.progress else job.crashes + 1
            logger.warning("%s: the server app ended with %s", name, code)
            self.consortium.audit.append("server-app-died", job=name, exit_code=code)
            if job.crashes >= MAX_CRASHES:
                why = f"the server app ended {job.crashes} times without a new round"
                self._ended(name, job, "failed", f"{why}; see the server's log")
                return
            self.control.stop_run(job.flower_run)
            job.forget()
            job.not_before = time.monotonic() + job.crashes - 1

    def _keep_task(self, job: _Job) -> None:
        """Send the server app's heartbeat to the SuperLink."""
        if job.worker is None or not job.worker.alive or job.task is None:
            return
        if time.monotonic() - job.last_heartbeat > HEARTBEAT_S:
            job.last_heartbeat = time.monotonic()
            runtime.send_heartbeat(job.task)

    def _ended(
        self, name: str, job: _Job, state: runs.State, reason: str | None
    ) -> None:
        self.jobs.pop(name).forget()
        if job.run is not None:
            job.run.set(state, reason=reason)
        self.consortium.audit.append("job-ended", job=name, state=state, reason=reason)

    def _start_worker(self, token: str, flower_run: int) -> None:
        """Start the server app for a task, if it is one of ours."""
        for job in self.jobs.values():
            if job.flower_run == flower_run:
                job.worker = Child(
                    "fedgex.server.service.worker",
                    [str(self.settings.control_port)],
                    {worker.TOKEN_VARIABLE: token} | RETURNING,
                )
                job.worker.start()
                port = self.settings.control_port
                job.task = runtime.holder(port, token, "SuperExec")
                return
        logger.warning("ignored a task of run %d, which nobody ordered", flower_run)


def _progress(job: _Job) -> str:
    last = checkpoint.latest(job.settings.parent / "checkpoints")
    return last.name if last is not None else ""
