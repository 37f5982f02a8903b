"""Check of a hospital's data: its processor time and memory against plain reading."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w

from fedgex.client.policy import Policy
from fedgex.common.data.genes import GeneTable

from .rows import SEED, Row, Sizes, below

CSV = "expression.csv"

_MEASURE = """
import os, sys
process = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, used = os.wait4(process, 0)
code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
print(code, seconds, used.ru_maxrss, file=sys.stderr)
"""
"""A small process between: a new one's peak begins at that of its parent."""


def check_data(sizes: Sizes) -> list[Row]:
    """Compare `fedgex-site check-data` on a CSV with `pandas.read_csv` of it.

    Both are processes of their own; their start is in both sides.
    """
    genes, samples = sizes.matrix
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, genes, samples)
        site = Path(sys.executable).with_name("fedgex-site")
        check = [str(site), "check-data", str(folder / "site.toml")]
        read = f"import pandas; pandas.read_csv({str(folder / CSV)!r}, index_col=0)"
        plain_seconds, plain_peak = _spent([sys.executable, "-c", read])
        seconds, peak = _spent(check)
    size = f"CSV of {genes} genes x {samples} samples"
    return [
        below(
            "check-data / pandas.read_csv, processor time",
            seconds / plain_seconds,
            3.5,
            f"{seconds:.2f} / {plain_seconds:.2f} CPU seconds, {size}",
        ),
        below(
            "check-data / pandas.read_csv, peak memory",
            peak / plain_peak,
            3.3,
            f"{peak:.0f} / {plain_peak:.0f} MB, {size}",
        ),
    ]


def _spent(command: list[str]) -> tuple[float, float]:
    """Return a process' seconds of the processor, and its peak of memory, MB."""
    measured = [sys.executable, "-c", _MEASURE, *command]
    ended = subprocess.run(
        measured, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    code, seconds, peak = ended.stderr.split()[-3:]
    if int(code):
        raise RuntimeError(f"{command[0]} ended with {int(code)}")
    return float(seconds), int(peak) * 1024 / 1e6


def _write(folder: Path, genes: int, samples: int) -> None:
    """Write a site's files: log2(x + 1), four decimals, genes as rows."""
    names = sorted(GeneTable.packaged().symbols)[:genes]
    values = np.random.default_rng(SEED).normal(8, 2, (genes, samples)).clip(0)
    labels = [f"P{i:05d}" for i in range(samples)]
    frame = pd.DataFrame(values, pd.Index(names, name="gene"), labels)
    frame.to_csv(folder / CSV, float_format="%.4f")
    lines = ['name = "north"', "[data]", f'expression = "{CSV}"', 'scale = "log2p1"']
    (folder / "site.toml").write_text("\n".join(lines))
    policy = tomli_w.dumps(Policy.proposed().model_dump(mode="json"))
    (folder / "policy.toml").write_text(policy)
