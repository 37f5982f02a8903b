"""Run the installed server app for one Flower task.

Flower's `flwr-serverapp` does the same with the code of a bundle; we take ours from the
installed package, whatever the bundle says. That we are alive is for the supervisor
to say.
"""

from __future__ import annotations

import logging
import os
import sys

from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedgex.common.errors import FedgexError
from fedgex.common.processes import begin
from fedgex.server.app import app

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "FEDGEX_TASK_TOKEN"
DONE, CRASHED, REFUSED = 0, 1, 3
"""Exit codes: at its end; something broke; stopped for a reason that it wrote down."""


def work(port: int, token: str) -> int:
    """Run the server app for the task of a token; return an exit code."""
    grid = HttpGrid(f"127.0.0.1:{port}", insecure=True, token=token)
    client = grid._runtime_client
    task = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id = task.task_id
    TaskIdentity.run_id = task.run.run_id
    TaskIdentity.node_id = task.context.node_id
    run = run_from_proto(task.run)
    grid.set_run(run)
    context = context_from_proto(task.context)
    context.run_config = dict(run.override_config)
    code = CRASHED
    try:
        app(grid=grid, context=context)
        code = DONE
    except FedgexError as error:
        logger.error("the run stopped: %s", error)
        code = REFUSED
    except Exception:
        logger.exception("the run stopped")
    client.PushTaskOutput(
        PushTaskOutputRequest(
            context=None,
            sub_status=SubStatus.COMPLETED if code == DONE else SubStatus.FAILED,
            details="" if code == DONE else "see the run's journal",
        )
    )
    grid.close()
    return code


if __name__ == "__main__":
    begin()
    sys.exit(work(int(sys.argv[1]), os.environ.pop(TOKEN_VARIABLE)))
