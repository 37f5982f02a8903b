"""What a session's disturbances leave behind, once the run that had them is finished.

Collected last: its name sorts after those of the files that disturb.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedgex.common.system import failpoints
from fedgex.simulations import rehearsal

pytestmark = pytest.mark.deployment


def test_the_disturbed_run_ends_in_the_simulators_model(served):
    consortium = served.consortium
    run = served.running()
    assert consortium.wait(run) == "finished"
    served.compare(run)
    assert consortium.digest(run) == rehearsal.digest(consortium.folder / "simulated")
    rounds = [e for e in consortium.events(run) if e["event"] == "round"]
    counted = Counter((e["phase"], e["round"]) for e in rounds)
    assert len(counted) == served.n_rounds
    assert set(counted.values()) == {1}


def test_a_site_that_is_asked_again_replays_what_it_stored(served, tmp_path: Path):
    """That none trained a round twice is looked at when the session ends."""
    point = f"server.combined:1:{tmp_path}"  # every site's reply is stored by then
    served.restart({"server": {failpoints.VARIABLE: point}})
    with served.apart("asked-again"):
        served.until_round(2)
        assert (tmp_path / "killed").exists(), "the point was not reached"
        served.compare("asked-again")
    assert all(served.replays().values())
