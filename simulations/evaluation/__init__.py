"""Comparison of methods on unseen institutions: `fedgex-sim benchmark`.

One module and one page template (pages/) a question, all on the same splits, arms and
test sets. docs/results/ holds the results.
"""

from __future__ import annotations

import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from fedgex.simulations.evaluation.protocol import On


def evaluate(
    question: str,
    data_dir: Path,
    out: Path,
    console: Console,
    *,
    protocol: Path | None,
    on: On,
    workers: int,
    quick: bool,
) -> str:
    """Answer a question, resuming from the files in `out`; return the page.

    Parameters
    ----------
    question
        Name of the module whose `run` answers it, and of its page template.

    Raises
    ------
    ConfigError
        If the protocol or the data cannot be used.
    """
    from fedgex.simulations.evaluation import page
    from fedgex.simulations.evaluation.protocol import Protocol, prepare

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    rules = Protocol.load(protocol)
    split = prepare(rules, data_dir, out, on=on, workers=workers, quick=quick)
    module = import_module(f"{__name__}.{question}")
    results = module.run(split, console)
    options = [
        *(["--protocol", protocol.name] if protocol else []),
        *(["--on", on] if on != "test" else []),
        *(["--quick"] if quick else []),
    ]
    command = f"fedgex-sim benchmark {question} --data DIR --out DIR"
    return page.write(
        results,
        out,
        command=" ".join([command, *options]),
        commit=_commit(),
        started=started,
    )


def _commit() -> str:
    """Return the commit of the running code, "unknown" outside a repository."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
