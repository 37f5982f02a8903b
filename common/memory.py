"""How much memory this process holds, and held at most."""

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
    raise AssertionError(f"Linux tells {line}")
