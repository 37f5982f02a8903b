"""The long-lived process that answers messages, from the installed package alone.

It takes client tasks, one at a time, keeps torch, data and model warm between them, and
never looks into the bundle that came with a run: its hash goes to the audit log, its
content nowhere.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from pathlib import Path

import httpx
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supernode.runtime.run_clientapp import (
    pull_task_input,
    push_message,
    push_task_output,
)

from fedgex.client.app import app
from fedgex.client.gate import Gate, code
from fedgex.client.settings import SiteSettings
from fedgex.client.supernode import SECRET_VARIABLE
from fedgex.common import runtime
from fedgex.common.processes import begin
from fedgex.common.records import let_go

logger = logging.getLogger(__name__)

POLL_S = 0.1


def work(site_toml: Path, port: int, secret: str) -> None:
    """Answer messages until the daemon ends us."""
    settings = SiteSettings.load(site_toml)
    if settings.policy.memory_mb:
        limit = settings.policy.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(settings.policy.threads)
    gate = Gate(site_toml, app)
    client = runtime.executor(port, secret)
    bundles: set[str] = set()
    while True:
        try:
            task = runtime.acquire(client, runtime.CLIENT_APP)
        except httpx.TransportError:  # the SuperNode is being started again
            task = None
        if task is None:
            time.sleep(POLL_S)
            continue
        token, _ = task
        _answer(gate, port, token, bundles)


def _answer(gate: Gate, port: int, token: str, bundles: set[str]) -> None:
    """Take one message from the SuperNode, and hand it the reply."""
    client = runtime.holder(port, token, "flwr-clientapp")
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
        try:
            message, context, _, fab = pull_task_input(client)
        except Exception as lost:  # such as a run that ended meanwhile
            logger.warning("a message could not be fetched: %s", lost)
            return
        if fab.hash_str not in bundles:
            bundles.add(fab.hash_str)
            gate.audit.append("bundle", digest=fab.hash_str, bytes=len(fab.content))
        try:
            reply = gate(message, context)
        except Exception as error:  # such as a full disk; its text must not travel
            logger.exception("failed")
            failed = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code(error))
            reply = Message(failed, reply_to=message)
        let_go(message.content)
        push_message(client, reply, context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    except httpx.HTTPError as error:
        logger.warning("the SuperNode went away: %s", error)
    finally:
        heartbeat.stop()
        client.close()


if __name__ == "__main__":
    begin()
    work(Path(sys.argv[1]), int(sys.argv[2]), os.environ.pop(SECRET_VARIABLE))
