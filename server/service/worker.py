"""Run the installed server app for one Flower task.

Flower's `flwr-serverapp` runs the code of a bundle; this module runs the installed
package. The supervisor sends the heartbeat.
"""

from __future__ import annotations

import logging
import os
import sys

from fedgex.common.errors import FedgexError
from fedgex.common.system.processes import begin
from fedgex.server.service.flower import RunTask

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "FEDGEX_TASK_TOKEN"
DONE, CRASHED, REFUSED = 0, 1, 3
"""Exit codes: finished; crashed; stopped with a reason in the journal."""


def work(port: int, token: str) -> int:
    """Run the server app for the task of a token; return an exit code."""
    from fedgex.server.app import (
        app,
    )  # imports torch, which the supervisor does not need

    task = RunTask.pull(port, token)
    code = CRASHED
    try:
        app(grid=task.grid, context=task.context)
        code = DONE
    except FedgexError as error:
        logger.error("the run stopped: %s", error)
        code = REFUSED
    except Exception:
        logger.exception("the run stopped")
    task.end(None if code == DONE else "see the run's journal")
    return code


if __name__ == "__main__":
    begin()
    sys.exit(work(int(sys.argv[1]), os.environ.pop(TOKEN_VARIABLE)))
