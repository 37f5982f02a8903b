"""How much memory this process holds, and held at most."""

import math
from pathlib import Path
from typing import Literal

STATUS = Path("/proc/self/status")


def resident_mb(line: Literal["VmRSS", "VmHWM"]) -> float:
    """Return this process's memory now, or its peak, MB; NaN where there is no /proc.

    Not from getrusage, whose peak begins with that of the parent process.
    """
    if not STATUS.exists():
        return math.nan
    for text in STATUS.read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) / 1024
    raise AssertionError(f"Linux tells {line}")
