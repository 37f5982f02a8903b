"""CPU that three hospitals and a server use when there is nothing to do.

`python tests/performance/idle.py [SETTLE_S]`, three minutes; Linux only. A consortium
is founded and started as in a rehearsal, has `SETTLE_S` to become quiet (its workers
import torch: give it longer on a busy machine), and is measured for `MEASURED_S`. Ends
with 1 if it uses more than `GOAL` per cent of a core.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from fedgex.simulations import rehearsal
from fedgex.simulations.data.synthetic import new_data
from fedgex.simulations.rehearsal import Rehearsal
from fedgex.simulations.scenario import Scenario

N_SITES = 3
SETTLE_S, MEASURED_S = 60.0, 60.0
GOAL = 3.0
"""Per cent of a core, all processes together."""
PROCESSES = 2 + 3 * N_SITES
"""Server and SuperLink; each hospital's daemon, SuperNode and worker."""
TICKS = os.sysconf("SC_CLK_TCK")
SCENARIO = {
    "study": {"name": "idle", "pretraining": {"rounds": 1}},
    "data": {
        "expression": "expression.parquet",
        "scale": "log2p1",
        "clinical": "clinical.csv",
    },
    "sites": {"column": "institution", "minimum_patients": 10},
    "holdout": {"institutions": ["Hold-out 01"]},
    "reference": {"alone": False, "pooled": False},
}


def main(settle_s: float) -> int:
    """Found, start, wait and measure."""
    with tempfile.TemporaryDirectory() as folder:
        new_data(
            Path(folder) / "data",
            n_sites=N_SITES,
            n_holdouts=1,
            patients_per_site=30,
            n_genes=30,
            n_cancer_types=2,
        )
        study, sites = rehearsal.prepare(
            Scenario.read(SCENARIO, "idle"),
            Path(folder) / "data",
            Path(folder),
            N_SITES,
            {},
        )
        with Rehearsal(folder=Path(folder), study=study, sites=sites) as consortium:
            consortium.provision()
            consortium.start()
            time.sleep(settle_s)
            before, started = cpu_seconds(), time.monotonic()
            time.sleep(MEASURED_S)
            after, seconds = cpu_seconds(), time.monotonic() - started
    if before.keys() != after.keys() or len(after) < PROCESSES:
        print(
            f"processes died: {len(before)} before, {len(after)} after", file=sys.stderr
        )
        return 1
    total = 0.0
    for pid, (used, command) in sorted(after.items()):
        share = 100 * (used - before[pid][0]) / seconds
        total += share
        print(f"{share:6.2f} %  {command}")
    print(f"{total:6.2f} %  all, goal below {GOAL:g} % of a core")
    return int(total >= GOAL)


def cpu_seconds() -> dict[int, tuple[float, str]]:
    """Return CPU seconds and command of every descendant, by process number."""
    found, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(stat[1])
        used = (int(stat[11]) + int(stat[12])) / TICKS
        found[int(folder.name)] = used, command[:120]

    def ours(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return {pid: each for pid, each in found.items() if ours(pid)}


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if sys.argv[1:] else SETTLE_S))
