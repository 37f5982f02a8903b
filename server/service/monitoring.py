"""Metrics of the server for Prometheus: runs, restarts, life of certificates.

They cover rounds, hospitals and durations; nothing that a hospital sent.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fedgex.common.system import metrics_server
from fedgex.common.system.metrics_server import Tail
from fedgex.common.trust.audit_log import Follower
from fedgex.server.consortium import runs
from fedgex.server.consortium.certificates import expiries
from fedgex.server.consortium.store import Consortium

FOREVER_DAYS = 100 * 365
"""All certificates expire sooner."""


def serve(consortium: Consortium) -> None:
    """Serve the consortium's numbers on its `metrics_port`.

    Raises
    ------
    ConfigError
        If the port cannot be listened on.
    """
    metrics_server.serve(consortium.settings.metrics_port, ServerCollector(consortium))


class ServerCollector(Collector):
    """Reads the state directory at each scrape."""

    def __init__(self, consortium: Consortium) -> None:
        self._consortium = consortium
        self._audit = Follower(consortium.folder / "audit.jsonl")
        self._events: Counter[str] = Counter()
        self._rounds: dict[str, _Rounds] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        """Return every metric as it is now."""
        with self._lock:
            for line in self._audit.new():
                self._events[line["event"]] += line.get("count", 1)
            return [*self._of_runs(), *self._of_service(), self._of_certificates()]

    def _of_runs(self) -> list[Metric]:
        number = GaugeMetricFamily(
            "fedgex_run_round", "Last finished round.", labels=("run", "phase")
        )
        state = GaugeMetricFamily(
            "fedgex_run_state", "1 for the state of the run.", labels=("run", "state")
        )
        contributed = GaugeMetricFamily(
            "fedgex_sites_contributed",
            "Hospitals that contributed to the last finished round.",
            labels=("run",),
        )
        for run in runs.every(self._consortium.folder):
            present = run.state
            for each in get_args(runs.State):
                state.add_metric((run.name, each), float(each == present))
            rounds = self._rounds.setdefault(run.name, _Rounds(run.folder))
            rounds.follow()
            for phase, last in rounds.last.items():
                number.add_metric((run.name, phase), last)
            if rounds.contributed is not None:
                contributed.add_metric((run.name,), rounds.contributed)
        return [number, state, contributed]

    def _of_service(self) -> list[Metric]:
        return [
            CounterMetricFamily(name, about, value=self._events[event])
            for name, event, about in (
                (
                    "fedgex_superlink_restarts",
                    "superlink-restarted",
                    "Times that the SuperLink was started again, since the foundation.",
                ),
                (
                    "fedgex_server_app_deaths",
                    "server-app-died",
                    "Times that a server app died, since the foundation.",
                ),
                (
                    "fedgex_denied_requests",
                    "denied",
                    "Requests at the public port for what is not public.",
                ),
            )
        ]

    def _of_certificates(self) -> Metric:
        left = GaugeMetricFamily(
            "fedgex_certificate_expiry_seconds",
            "Seconds until a certificate in force expires; negative once it has.",
            labels=("role", "name"),
        )
        now = datetime.now(UTC)
        for each in expiries(self._consortium, FOREVER_DAYS):
            seconds = (each.expires - now).total_seconds()
            left.add_metric((each.role, each.name), seconds)
        return left


@dataclass
class _Rounds:
    """Metrics of one run, followed in its journal."""

    folder: Path
    last: dict[str, int] = field(default_factory=dict)
    """Last finished round of each phase."""
    contributed: int | None = None
    journal: Tail = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Tail(self.folder / "journal.jsonl")

    def follow(self) -> None:
        for event in self.journal.new():
            if event["event"] == "round":
                self.last[event["phase"]] = event["round"]
                states = Counter(site["state"] for site in event["sites"].values())
                self.contributed = states["contributed"]
