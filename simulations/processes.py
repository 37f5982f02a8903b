"""Processes of one thread, in which a simulation trains side by side."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

from fedgex.common.system import malloc
from fedgex.common.system.processes import end_with_parent, log_to_stderr

Job = TypeVar("Job")
Result = TypeVar("Result")


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of spawned processes, which end with this one."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, _begin, (os.getpid(),))


def each_done(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with its result as soon as it is done.

    Parameters
    ----------
    work
        Pickled and run in processes of its own; in this one if there is one worker.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job)
        return
    with process_pool(workers) as pool:
        running = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(running):
            yield running[future], future.result()


def _begin(parent: int) -> None:
    end_with_parent(parent)
    log_to_stderr()
    # Its FedAdam and FedYogi report every round.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    malloc.keep_freed()
