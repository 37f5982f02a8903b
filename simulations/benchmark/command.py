"""`fedgex-sim benchmark`: one question, asked of every method on the same splits."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from fedgex.simulations.benchmark import (
    classification,
    federation,
    imputation,
    interpretation,
    survival,
)
from fedgex.simulations.benchmark.ground import Ground, On, Protocol, prepare
from fedgex.simulations.benchmark.outcome import Outcome, write

Grounds = Callable[[int], Ground]
"""The ground of split 0, 1, ... of the protocol."""

QUESTIONS: dict[str, Callable[[Grounds, Console], Outcome]] = {
    "imputation": imputation.run,
    "survival": survival.run,
    "classification": classification.run,
    "interpretation": interpretation.run,
    "federation": federation.run,
}


def benchmark(
    question: str,
    data_dir: Path,
    out: Path,
    console: Console,
    *,
    protocol: Path | None,
    on: On,
    workers: int,
    quick: bool,
) -> list[str]:
    """Run a benchmark, going on from what `out` holds; return its page's lines.

    Raises
    ------
    ConfigError
        If the protocol or the data cannot be used.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    rules = Protocol.load(protocol)

    def ground(number: int = 0) -> Ground:
        return prepare(
            rules, data_dir, out, on=on, number=number, workers=workers, quick=quick
        )

    outcome = QUESTIONS[question](ground, console)
    options = [
        *(["--protocol", protocol.name] if protocol else []),
        *(["--on", on] if on != "test" else []),
        *(["--quick"] if quick else []),
    ]
    said = " ".join(
        ["fedgex-sim benchmark", question, "--data DIR --out DIR", *options]
    )
    return write(outcome, out, command=said, commit=_commit(), started=started)


def _commit() -> str:
    """Return the commit of the code that runs, if it lies in a repository."""
    git = partial(
        subprocess.run, capture_output=True, text=True, check=False, timeout=10
    )
    here = Path(__file__).parent
    try:
        found = git(["git", "-C", str(here), "rev-parse", "--short", "HEAD"])
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
