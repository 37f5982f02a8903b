"""Facts of a report that come from the run's journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedgex.simulations.reporting import measured
from fedgex.simulations.reporting.report import write_report

from .reports import make_report


def event(name: str, time: str, **fields: Any) -> dict[str, Any]:
    return {"time": f"2026-01-01T{time}.000+00:00", "event": name} | fields


def a_round(time: str, phase: str = "pretraining", **sites: Any) -> dict[str, Any]:
    return event(
        "round",
        time,
        phase=phase,
        round=1,
        train_loss=0.5,
        judged_loss=0.6,
        holdout={},
        seconds=None,
        epsilon=None,
        sites={
            name: {"state": "contributed", "train_loss": loss}
            for name, loss in sites.items()
        },
    )


MISSING = {"state": "not-answered", "reason": "deadline"}


def test_each_hospital_has_the_loss_of_its_last_round_of_pretraining() -> None:
    last = a_round("10:02:00", north=0.5)
    last["sites"]["south"] = MISSING
    events = [
        a_round("10:01:00", north=0.7, south=0.8, east=None),
        last,
        a_round("10:03:00", "survival", north=3.0, south=3.0),
    ]

    found = measured.site_losses(events)

    assert found == {"north": 0.5, "south": 0.8, "east": None}


def test_the_time_of_training_leaves_out_pauses_and_what_a_stop_lost() -> None:
    events = [
        event("not-answered", "09:00:00", site="west"),
        event("run-started", "10:00:00"),
        event("phase-started", "10:00:00"),
        a_round("10:01:00"),
        event("asked-again", "10:05:00", site="west"),
        # A pause of two hours, at whose end the run fails to start once.
        event("asked-again", "12:04:00", site="west"),
        event("run-failed", "12:04:30"),
        event("run-started", "12:05:00"),
        a_round("12:06:30"),
        event("phase-finished", "12:06:30"),
        event("run-finished", "12:06:40"),
    ]

    assert measured.seconds(events) == pytest.approx(60 + 100)


def test_a_round_whose_time_a_stop_lost_can_be_reported(tmp_path: Path) -> None:
    report = make_report() | {"rounds": []}
    found = measured.rounds([a_round("10:01:00", north=0.7) | {"sites": {}}])

    write_report(report | {"rounds": found}, tmp_path)

    assert found[0]["seconds"] is None
