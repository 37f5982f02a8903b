"""What a session's disturbances leave behind, once the run that had them is finished.

Collected last: its name sorts after those of the files that disturb.
"""

from __future__ import annotations

from collections import Counter

import pytest

from fedgex.common.trust import audit_log
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


def test_no_site_trained_a_round_twice_after_a_reply_was_stored(served):
    """Whatever was answered once is replayed; only what left no reply is computed."""
    replayed = 0
    for name in served.consortium.sites:
        lines = audit_log.read(served.consortium.site_state(name) / "audit.jsonl")
        stored: set[tuple[str, str, int]] = set()
        for line in lines:
            if line.get("type") != "train" or line["event"] == "refused":
                continue
            about = (line["run"], line["phase"], line["round"])
            if line["event"] == "asked":
                assert about not in stored
            if line["event"] == "replayed":
                stored.add(about)
                replayed += 1
    assert replayed
