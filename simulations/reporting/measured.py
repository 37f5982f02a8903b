"""What the journal of a run measured, as a report states it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from fedgex.common.study import PRETRAINING
from fedgex.server.evaluation import mse_only

Event = Mapping[str, Any]
PROGRESS = ("phase-started", "round", "phase-finished", "run-finished")
"""Events up to which the work of a run that stopped is not lost."""


def rounds(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the rounds of every phase, in order."""
    return [_round(event) for event in _rounds(events)]


def site_losses(events: Sequence[Event]) -> dict[str, float | None]:
    """Return each site's loss in the last pretraining round that it contributed to.

    Every site pretrains, so that these losses compare; None where it is withheld.
    """
    return {
        name: site["train_loss"]
        for event in _rounds(events)
        if event["phase"] == PRETRAINING
        for name, site in event["sites"].items()
        if site["state"] == "contributed"
    }


def seconds(events: Sequence[Event]) -> float:
    """Return the time of training, in s, without pauses and without lost work.

    Each start of the run counts up to the last event that the next start goes on from.
    """
    total, begun, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "run-started":
            begun, last = datetime.fromisoformat(event["time"]), 0.0
        elif begun is not None and event["event"] in PROGRESS:
            now = (datetime.fromisoformat(event["time"]) - begun).total_seconds()
            total, last = total + now - last, now
    return total


def _rounds(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event["event"] == "round"]


def _round(event: Event) -> dict[str, Any]:
    states = [site["state"] for site in event["sites"].values()]
    pretraining = event["phase"] == PRETRAINING and event["holdout"]
    return {
        "phase": event["phase"],
        "round": event["round"],
        "train_loss": event["train_loss"],
        "judged_loss": event["judged_loss"],
        "holdout_mse": mse_only(event["holdout"]) if pretraining else None,
        "seconds": event["seconds"],
        "epsilon": event["epsilon"],
        "sites_contributed": states.count("contributed"),
        "sites_total": len(states),
    }


def cost(events: Sequence[Event], workers: int) -> dict[str, Any]:
    """Return what pretraining cost, over its rounds after the first.

    The overhead of a round is its time less that of training, were the sites' own
    seconds spread evenly over the workers. Rounds in which a site withholds its seconds
    or patients do not count.
    """
    every = _rounds(events)
    sizes = {key: sum(e[key] for e in every) for key in ("bytes_up", "bytes_down")}
    peaks = [e["peak_rss_mb"] for e in events if e["event"] == "run-finished"]
    found: dict[str, Any] = {**sizes, "peak_rss_mb": peaks[-1]}
    timed = []
    for event in [e for e in every if e["phase"] == PRETRAINING and e["seconds"]][1:]:
        there = [s for s in event["sites"].values() if s["state"] == "contributed"]
        own = [(s["seconds"], s["num_examples"]) for s in there]
        if not any(None in numbers for numbers in own):
            timed.append((*map(sum, zip(*own, strict=True)), event["seconds_sites"]))
    if timed:
        own_s, examples, walls = np.array(timed).T
        found["samples_per_s"] = float(examples.sum() / walls.sum())
        found["round_overhead_s"] = float((walls - own_s / workers).mean())
    return found
