"""Results kept in files, so that a stopped comparison resumes where it was.

A file is written under another name and then renamed: a file that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file, save_file

from fedgex.simulations.processes import each_done

Job = TypeVar("Job")
Compute = Callable[[Job], Any]


def cached(path: Path, compute: Callable[[], Any]) -> Any:
    """Return the content of a file, computed and written first if it is absent.

    Parameters
    ----------
    path
        `.json`: anything JSON can hold; `.safetensors`: arrays by name.
    """
    if not path.exists():
        save(path, compute())
    return load(path)


def compute_all(
    compute: Compute[Job],
    jobs: Mapping[Path, Job],
    workers: int,
    console: Console | None = None,
    describe: Callable[[Job], str] = str,
) -> None:
    """Compute every job whose file is absent, in processes side by side.

    Parameters
    ----------
    compute
        Returns the content of the job's file. Pickled if there are several workers.
    console
        One line for each finished job; None: none.
    describe
        Names a job on that line.
    """
    todo = [(path, job) for path, job in jobs.items() if not path.exists()]
    done = each_done(partial(_save_one, compute), todo, workers)
    for count, ((_, job), seconds) in enumerate(done, 1):
        if console is not None:
            console.print(
                f"{count} of {len(todo)}: {describe(job)}, {seconds:.0f} s",
                highlight=False,
            )


def load(path: Path) -> Any:
    """Return the content of a file that `save` wrote."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return load_file(path)


def save(path: Path, content: Any) -> None:
    """Write a file at once; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_ = path.with_suffix(".partial")
    if path.suffix == ".json":
        partial_.write_text(json.dumps(content, sort_keys=True))
    else:
        save_file(dict(content), partial_)
    partial_.replace(path)


def digest(*parts: NDArray[Any] | str) -> str:
    """Return 12 hex digits that name a file by what its content depends on."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part.tobytes())
    return found.hexdigest()[:12]


def _save_one(compute: Compute[Job], item: tuple[Path, Job]) -> float:
    """Compute and write one file; return the seconds."""
    started = time.monotonic()
    path, job = item
    save(path, compute(job))
    return time.monotonic() - started
