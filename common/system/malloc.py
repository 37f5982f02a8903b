"""Resident memory of a process, and an allocator that reuses what was freed."""

import ctypes
import math
from pathlib import Path
from typing import Literal


def resident_mb(
    line: Literal["VmRSS", "VmHWM"], process: int | Literal["self"] = "self"
) -> float:
    """Return a process's memory now, or its peak, MB; NaN where there is no /proc.

    Not from getrusage, whose peak begins with that of the parent process.
    """
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        return math.nan
    for text in status.read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) / 1024
    raise AssertionError(f"/proc has no {line}")


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from malloc.h."""
MOST = 2**31 - 1


def keep_freed() -> None:
    """Make this process's allocator reuse freed memory instead of returning it.

    A training step allocates and frees the same large arrays (of a factor model, K R^2
    numbers a patient), and by default glibc has the kernel map and clear each of them
    anew. Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MOST)
