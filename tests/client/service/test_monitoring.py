"""What Prometheus gets from a hospital's daemon, scraped over HTTP."""

import json
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedgex.client.policy import Policy
from fedgex.client.service import monitoring
from fedgex.client.settings import SiteSettings
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Chain

Numbers = dict[tuple[str, ...], float]
TODAY = datetime.now(UTC).date()


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    return SiteSettings.model_validate(
        {
            "name": "north",
            "policy": Policy.proposed(),
            "state_dir": tmp_path,
            "metrics_port": port,
            "data": {"expression": "expression.csv", "scale": "log2p1"},
        }
    )


@pytest.fixture
def audit(settings: SiteSettings) -> Chain:
    return Chain(settings.state_dir / "audit.jsonl")


@pytest.fixture
def scrape(settings: SiteSettings) -> Callable[[], Numbers]:
    """Return what scrapes: (metric, *label values in order of label) -> number."""
    monitoring.serve(settings)

    def scraped() -> Numbers:
        text = httpx.get(
            f"http://127.0.0.1:{settings.metrics_port}/metrics", trust_env=False
        ).text
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return scraped


def test_a_hospital_without_a_state_is_neither_paused_nor_approved(
    scrape: Callable[[], Numbers],
) -> None:
    assert scrape() == {
        ("fedgex_site_paused",): 0,
        ("fedgex_site_approved_studies",): 0,
    }


def test_messages_are_counted_by_type_and_outcome(
    audit: Chain, scrape: Callable[[], Numbers]
) -> None:
    audit.append("answered", type="train", code=None, bytes=57)
    audit.append("refused", type="train", code="FX-SITE-004", why="paused")
    scrape()
    audit.append("answered", type="train", code=None, bytes=57)
    audit.append("replayed", type="train")
    audit.append("refused", type="query.of-our-own-making", code="FX-RUN-001", why="")

    messages = {k[1:]: v for k, v in scrape().items() if "messages" in k[0]}

    assert messages == {  # outcome, type
        ("answered", "train"): 2,
        ("replayed", "train"): 1,
        ("FX-SITE-004", "train"): 1,
        ("FX-RUN-001", "other"): 1,
    }


@pytest.mark.parametrize(
    ("supernode", "worker", "running"), [(True, True, 1), (True, False, 0)]
)
def test_a_site_runs_if_both_of_its_processes_do(
    settings: SiteSettings,
    scrape: Callable[[], Numbers],
    supernode: bool,
    worker: bool,
    running: int,
) -> None:
    told = {"supernode": supernode, "worker": worker, "restarts": 3}
    (settings.state_dir / "status.json").write_text(json.dumps(told))

    numbers = scrape()

    assert numbers["fedgex_site_running",] == running
    assert numbers["fedgex_site_restarts_total",] == 3


def test_a_pause_is_seen(settings: SiteSettings, scrape: Callable[[], Numbers]) -> None:
    (settings.state_dir / "paused").write_text("{}")

    assert scrape()["fedgex_site_paused",] == 1


def test_only_approvals_that_hold_today_are_counted(
    audit: Chain, scrape: Callable[[], Numbers]
) -> None:
    def decide(contract: str, decision: str, days: int | None) -> None:
        last = None if days is None else str(TODAY + timedelta(days))
        audit.append("decision", contract=contract, decision=decision, expires=last)

    decide("a", "approved", 0)  # its last day
    decide("b", "approved", -1)
    decide("c", "approved", 9)
    decide("c", "withdrawn", None)
    decide("d", "rejected", None)
    decide("d", "approved", 1)

    assert scrape()["fedgex_site_approved_studies",] == 2


def test_the_certificate_says_how_long_it_lasts(
    settings: SiteSettings, scrape: Callable[[], Numbers]
) -> None:
    key, authority = pki.new_authority("oncology")
    asked = pki.request(pki.new_key(), "north", "site")
    issued = pki.issue(key, authority, asked, name="north", role="site", days=2)
    (settings.state_dir / "identity").mkdir()
    (settings.state_dir / "identity" / "site.crt").write_text(pki.to_pem(issued))

    left = scrape()["fedgex_site_certificate_expiry_seconds",]

    assert 86400 < left <= 2 * 86400


def test_without_a_port_nothing_is_served(settings: SiteSettings) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", settings.metrics_port))

        monitoring.serve(settings.model_copy(update={"metrics_port": 0}))
