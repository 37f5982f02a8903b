"""Named points at which a test kills this process, to see what survives.

A point stands before and after each step that writes durable state. With the
environment variable

    FEDGEX_FAILPOINT=NAME:NTH:FOLDER

the NTH time that the point NAME is reached, counted over all processes that share
FOLDER, the process kills itself with SIGKILL: no handler runs, nothing is flushed. It
happens once; FOLDER/killed then says where. Without the variable nothing happens.
"""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

from fedgex.common.errors import ConfigError

VARIABLE = "FEDGEX_FAILPOINT"

POINTS = frozenset(
    {
        # a line of an audit log
        "audit.before",  # nothing of it is written
        "audit.appended",  # it is on the disk; nothing was sent
        # a checkpoint's folder
        "checkpoint.written",  # all files are on the disk, under the partial name
        "checkpoint.renamed",  # under the final name; the rename may yet be lost
        "checkpoint.synced",  # on the disk; the journal does not know
        # a debit of the privacy ledger
        "ledger.before",  # written in a transaction that is not committed
        "ledger.debited",  # on the disk; the audit log does not know
        # a line of a run's journal
        "journal.before",  # nothing of it is written
        "journal.written",  # it is on the disk
        # a file that is replaced atomically: `written` under its partial name,
        # `renamed` under its final name, where the rename may yet be lost
        "reply.written",  # a site's signed reply, before it is sent
        "reply.renamed",
        "decision.written",  # a site's decision on a contract
        "decision.renamed",
        "contract.written",  # a signed contract, at the server or a site
        "contract.renamed",
        "order.written",  # an administrator's order
        "order.renamed",
        "release.written",  # a released model's record
        "release.renamed",
        # a site's answer to a message
        "site.before_train",  # admitted; nothing is computed
        "site.after_train",  # computed; nothing of it is stored
        "site.before_send",  # stored and logged; nothing is sent
        # a round at the server
        "server.before_round",  # nothing is sent
        "server.asked",  # every site was sent its request
        "server.collected",  # all answers are here
        "server.combined",  # the new parameters exist in memory only
    }
)
"""Every point that there is."""


def reach(name: str) -> None:
    """Die here, if the environment says so; else do nothing.

    Raises
    ------
    ConfigError
        If the environment variable cannot be read or names no point.
    """
    assert name in POINTS, f'"{name}" is not among POINTS; list it there'
    setting = os.environ.get(VARIABLE)
    if not setting:
        return
    chosen, nth, folder = _read(setting)
    if chosen == name and _count(folder) == nth:
        (folder / "killed").write_text(f"{name}:{nth}\n")
        os.kill(os.getpid(), signal.SIGKILL)


def _read(setting: str) -> tuple[str, int, Path]:
    name, _, rest = setting.partition(":")
    nth, _, folder = rest.partition(":")
    is_number = nth.isdecimal() and int(nth) > 0
    if name not in POINTS or not is_number or not folder or not Path(folder).is_dir():
        raise ConfigError(
            f'{VARIABLE}="{setting}" is not NAME:NTH:FOLDER with a known point, a '
            "number from 1 and a folder that exists. It is for tests only: unset it."
        )
    return name, int(nth), Path(folder)


def _count(folder: Path) -> int:
    """Count one more visit and return how many there were, over all processes."""
    with (folder / "count").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_size
