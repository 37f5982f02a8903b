"""Metrics of a hospital's daemon for Prometheus, on its own machine.

They cover running, paused, certificate, requests and replies; no number of patients,
and of studies only how many are approved.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fedgex.client.admission.approvals import DECIDED
from fedgex.client.identity import AUDIT
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.system import metrics_server
from fedgex.common.system.files import read_json
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Follower

TYPES = frozenset(
    {
        keys.PREPARE,
        keys.STATISTICS,
        keys.CROSS_PRODUCTS,
        keys.TRAIN,
        keys.CONTRACT,
        keys.RELEASE,
    }
)
OUTCOMES = frozenset({"answered", "replayed", "refused"})
"""Events of the audit log that say how a message was answered."""


def serve(settings: SiteSettings) -> None:
    """Serve the hospital's numbers on its `metrics_port`; with 0, do nothing.

    Raises
    ------
    ConfigError
        If the port cannot be listened on.
    """
    if settings.metrics_port:
        metrics_server.serve(settings.metrics_port, SiteCollector(settings))


class SiteCollector(Collector):
    """Reads the state directory at each scrape."""

    def __init__(self, settings: SiteSettings) -> None:
        self._state_dir = settings.state_dir
        self._audit = Follower(settings.state_dir / AUDIT)
        self._messages: Counter[tuple[str, str]] = Counter()
        self._approved: dict[str, date | None] = {}
        """Contract -> last day of its approval, None if it has none."""
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        """Return every metric as it is now."""
        with self._lock:
            for line in self._audit.new():
                self._note(line)
            return [*self._of_daemon(), self._of_messages(), *self._of_standing()]

    def _note(self, line: Mapping[str, Any]) -> None:
        if line["event"] in OUTCOMES:
            # What others name must not make a series of its own each time.
            kind = line["type"] if line["type"] in TYPES else "other"
            self._messages[kind, line.get("code") or line["event"]] += 1
        elif line["event"] == DECIDED:
            last = line["expires"]
            self._approved[line["contract"]] = last and date.fromisoformat(last)

    def _of_daemon(self) -> list[Metric]:
        running = GaugeMetricFamily(
            "fedgex_site_running", "1 if SuperNode and worker run."
        )
        restarts = CounterMetricFamily(
            "fedgex_site_restarts",
            "Times that SuperNode or worker was started again, since the start.",
        )
        path = self._state_dir / "status.json"
        if not path.exists():
            return [running, restarts]
        status = read_json(path, "the daemon's status")
        running.add_metric((), float(status["supernode"] and status["worker"]))
        restarts.add_metric((), status["restarts"])
        return [running, restarts]

    def _of_messages(self) -> Metric:
        messages = CounterMetricFamily(
            "fedgex_site_messages",
            "Messages by type; outcome is answered, replayed or the code of a refusal.",
            labels=("type", "outcome"),
        )
        for labels, count in self._messages.items():
            messages.add_metric(labels, count)
        return messages

    def _of_standing(self) -> list[Metric]:
        now = datetime.now(UTC)
        approved = [day for day in self._approved.values() if day and day >= now.date()]
        paused = (self._state_dir / "paused").exists()
        left = GaugeMetricFamily(
            "fedgex_site_certificate_expiry_seconds",
            "Seconds until the hospital's certificate expires; negative once it has.",
        )
        certificate = self._state_dir / "identity" / "site.crt"
        if certificate.exists():
            until = pki.from_pem(certificate.read_text()).not_valid_after_utc
            left.add_metric((), (until - now).total_seconds())
        return [
            left,
            GaugeMetricFamily(
                "fedgex_site_paused", "1 while the operator paused.", value=paused
            ),
            GaugeMetricFamily(
                "fedgex_site_approved_studies",
                "Contracts that somebody approved and whose approval has not ended.",
                value=len(approved),
            ),
        ]
