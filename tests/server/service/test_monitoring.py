"""What Prometheus gets from the server, scraped over HTTP."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedgex.common.trust.audit_log import Chain
from fedgex.server.consortium.store import Consortium
from fedgex.server.journal import Journal
from fedgex.server.service import monitoring

Numbers = dict[tuple[str, ...], float]
DAY_S = 86400


@pytest.fixture
def scrape(founded: Consortium) -> Callable[[], Numbers]:
    """Return what scrapes: (metric, *label values in order of label) -> number."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    path = founded.folder / "consortium.toml"
    path.write_text(path.read_text().replace("9095", str(port)))
    monitoring.serve(Consortium(founded.folder))

    def scraped() -> Numbers:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return scraped


def run(folder: Path, name: str, state: str) -> Journal:
    there = folder / "runs" / name
    there.mkdir(parents=True, exist_ok=True)
    (there / "state.json").write_text(json.dumps({"state": state}))
    return Journal(there / "journal.jsonl")


def finished_round(journal: Journal, phase: str, number: int, **sites: str) -> None:
    told: dict[str, Any] = {
        name: {"state": state, "reason": None, "num_examples": 57}
        for name, state in sites.items()
    }
    journal.write("round", phase=phase, round=number, rounds=9, sites=told)


def test_a_run_is_followed_round_by_round(
    founded: Consortium, scrape: Callable[[], Numbers]
) -> None:
    journal = run(founded.folder, "bc-12", "running")
    assert ("fedgex_run_round", "pretraining", "bc-12") not in scrape()

    finished_round(journal, "pretraining", 1, north="contributed", south="contributed")
    first = scrape()
    finished_round(journal, "pretraining", 2, north="contributed", south="late")
    finished_round(journal, "survival", 1, north="late", south="late")
    second = scrape()

    assert first["fedgex_run_round", "pretraining", "bc-12"] == 1
    assert first["fedgex_sites_contributed", "bc-12"] == 2
    assert second["fedgex_run_round", "pretraining", "bc-12"] == 2
    assert second["fedgex_run_round", "survival", "bc-12"] == 1
    assert second["fedgex_sites_contributed", "bc-12"] == 0


def test_exactly_one_state_of_a_run_is_1(
    founded: Consortium, scrape: Callable[[], Numbers]
) -> None:
    run(founded.folder, "bc-12", "failed")

    states = {
        key[2]: value for key, value in scrape().items() if key[0] == "fedgex_run_state"
    }

    assert states == {"running": 0, "stopped": 0, "failed": 1, "finished": 0}


def test_deaths_and_restarts_are_counted_from_the_audit_log_once(
    founded: Consortium, scrape: Callable[[], Numbers]
) -> None:
    audit = Chain(founded.folder / "audit.jsonl")
    audit.append("superlink-restarted")
    for _ in range(2):
        audit.append("server-app-died", job="bc-12", exit_code=-9)
    scrape()
    audit.append(
        "denied", path="/v1/control/start-run", peer="192.0.2.9"
    )  # as of 0.1.0
    audit.append("denied", count=40, peers={"192.0.2.9": 40})

    numbers = scrape()

    assert numbers["fedgex_superlink_restarts_total",] == 1
    assert numbers["fedgex_server_app_deaths_total",] == 2
    assert numbers["fedgex_denied_requests_total",] == 41


def test_every_certificate_says_how_long_it_lasts(
    scrape: Callable[[], Numbers], founded: Consortium
) -> None:
    numbers = scrape()

    left = {
        k[2]: v for k, v in numbers.items() if k[0].startswith("fedgex_certificate")
    }
    assert left.keys() == {"authority", "coordinator", "server"}
    assert 364 * DAY_S < left["server"] <= 365 * DAY_S
    assert left["authority"] > 3600 * DAY_S
    assert {k[1] for k in numbers if k[0].startswith("fedgex_certificate")} == {
        founded.settings.name
    }
