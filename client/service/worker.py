"""The long-lived process that answers messages with the installed package.

It runs one client task at a time and keeps torch, data and model loaded between them.
The bundle of a run is never unpacked; its hash goes to the audit log.
"""

from __future__ import annotations

import logging
import os
import resource
import select
import sys
from pathlib import Path

import httpx
import torch

from fedgex.client.admission.gate import Gate, code
from fedgex.client.app import app
from fedgex.client.service.flower import SiteTask
from fedgex.client.service.supernode import SECRET_VARIABLE
from fedgex.client.settings import SiteSettings
from fedgex.common.system.processes import begin
from fedgex.common.transport.flower import CLIENT_APP, acquire, executor
from fedgex.common.transport.records import let_go

logger = logging.getLogger(__name__)

ASK_S = 10.0
"""Interval between requests to the SuperNode without an arrival, seconds."""


def work(site_toml: Path, port: int, arrivals: int, secret: str) -> None:
    """Answer messages until the daemon stops this process.

    Parameters
    ----------
    port
        Loopback port of the SuperNode.
    arrivals
        Pipe into which the SuperNode writes when a message arrives.
    secret
        Secret of the SuperNode, for acquiring tasks.
    """
    settings = SiteSettings.load(site_toml)
    if settings.policy.memory_mb:
        limit = settings.policy.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(settings.policy.threads)
    gate = Gate(site_toml, app)
    client = executor(port, secret)
    bundles: set[str] = set()
    while True:
        try:
            task = acquire(client, CLIENT_APP)
        except httpx.TransportError:  # the SuperNode is being started again
            task = None
        except httpx.HTTPError as error:
            logger.warning("the SuperNode does not answer: %s", error)
            task = None
        if task is None:
            _wait(arrivals)
            continue
        token, _ = task
        _answer(gate, port, token, bundles)


def _wait(arrivals: int) -> None:
    """Wait for the next arrival, `ASK_S` at most."""
    if select.select([arrivals], [], [], ASK_S)[0]:
        os.read(arrivals, select.PIPE_BUF)


def _answer(gate: Gate, port: int, token: str, bundles: set[str]) -> None:
    """Fetch one message from the SuperNode, and return the reply to it."""
    try:
        with SiteTask.held(port, token) as fetch:
            try:
                task = fetch()
            except Exception as lost:  # such as a run that ended meanwhile
                logger.warning("a message could not be fetched: %s", lost)
                return
            if task.bundle_digest not in bundles:
                bundles.add(task.bundle_digest)
                gate.audit.append(
                    "bundle", digest=task.bundle_digest, bytes=task.bundle_bytes
                )
            try:
                reply = gate(task.message, task.context)
            except Exception as error:  # such as a full disk; its text must not travel
                logger.exception("failed")
                reply = task.failure(code(error))
            let_go(task.message.content)
            task.answer(reply)
    except httpx.HTTPError as error:
        logger.warning("the SuperNode went away: %s", error)


if __name__ == "__main__":
    begin()
    work(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        os.environ.pop(SECRET_VARIABLE),
    )
