"""Kill at every named fail-point, on both sides; no run is lost, none differs.

`FEDGEX_CHAOS` says how many points to try: a number, or "all" (`make chaos`).
Points are drawn with the seed `FEDGEX_CHAOS_SEED`, so that a sweep can be repeated.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fedgex.common.system import failpoints

pytestmark = pytest.mark.chaos

BY_ADMINISTRATORS = ("order.", "release.", "contract.", "decision.")
"""Passed by commands and deliveries, not by a run, so that none is swept here."""
NOT_IN_THIS_STUDY = ("head.", "ledger.")
"""Its heads travel, and it is without differential privacy; the ledger's points are in
tests/client/ledger."""


def targets() -> list[tuple[str, str, int]]:
    """Return who is to die where, at which visit of the point."""
    found = []
    for point in sorted(failpoints.POINTS):
        if point.startswith(BY_ADMINISTRATORS + NOT_IN_THIS_STUDY):
            continue
        sides = {
            "server": ["server"],
            "site": ["site"],
            "reply": ["site"],
            "journal": ["server"],
            "checkpoint": ["server"],
            "audit": ["server", "site"],
        }[point.split(".")[0]]
        for side in sides:
            for visit in (1, 2):
                found.append((side, point, visit))
    wanted = os.environ.get("FEDGEX_CHAOS", "3")
    if wanted == "all":
        return found
    drawn = random.Random(os.environ.get("FEDGEX_CHAOS_SEED", "1"))
    return sorted(drawn.sample(found, min(int(wanted), len(found))))


@pytest.mark.parametrize(("side", "point", "visit"), targets())
def test_a_run_survives_a_kill_at(served, tmp_path: Path, side, point, visit):
    consortium, killed = served.consortium, tmp_path / "killed"
    victim = "server" if side == "server" else consortium.sites[0]
    served.restart({victim: {failpoints.VARIABLE: f"{point}:{visit}:{tmp_path}"}})
    run = f"{side}-{point.replace('.', '-').replace('_', '-')}-{visit}"
    with served.apart(run):
        served.until_round(3)
        assert killed.exists(), "the point was not reached"
        served.compare(run)
