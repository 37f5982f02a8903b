"""Private training under secure aggregation, with real processes, ledgers and kills."""

from __future__ import annotations

import re
import shutil
import signal
from typing import Any

import pytest

from fedgex.client.ledger import debit, ledger
from fedgex.client.ledger.book import Budget, Debit
from fedgex.client.settings import SiteSettings
from fedgex.common.codes import Code
from fedgex.common.privacy import accounting
from fedgex.common.trust import audit_log
from fedgex.simulations.daemons import LIMIT_S
from fedgex.simulations.rehearsal import Rehearsal

from .consortium import SCENARIO, Served, build

pytestmark = pytest.mark.deployment

N_SITES = 4
"""Of whom three are enough to unmask a sum."""
STUDY: dict[str, Any] = {
    "name": "protected",
    "minimum_cohort": 10,
    "linear_rank": 4,
    "pretraining": {"rounds": 2, "local_epochs": 1, "batch_size": 16},
    "strategy": {"name": "fedavg", "weights": "equal", "update": "delta"},
    "privacy": {
        "patient": {
            "noise_multiplier": 4.0,
            "delta": 1e-3,
            "clip": 1.0,
            "sample_rate": 0.5,
        }
    },
    "secure_aggregation": {"clip": 10.0},
    "public": {"statistics": True, "epochs": 1},
    "evaluation": {"rates": [0.5], "panels": [10]},
    "rounds": {"quorum": 3},
}
PRIVATE = SCENARIO | {"study": STUDY, "public": {"institutions": ["Hold-out 02"]}}


def permit(consortium, site: str, epsilon: float) -> None:
    """Set a hospital's budget in its policy.toml."""
    path = consortium.site_toml(site).with_name("policy.toml")
    line = f"privacy_epsilon = {epsilon}"
    text = re.sub(r"(?m)^privacy_epsilon = [^#\n]*", line, path.read_text())
    path.write_text(text)


def spent(consortium, site: str) -> float:
    settings = SiteSettings.load(consortium.site_toml(site))
    found = ledger.Ledger.open(settings.state_dir)
    return found.spent(None, settings.policy.privacy_delta)


def budget_of(consortium, runs: int, site: str) -> float:
    """Return what so many whole runs of the study cost at a hospital's delta."""
    settings = SiteSettings.load(consortium.site_toml(site))
    planned = accounting.planned(consortium.study) * runs
    return accounting.epsilon(planned, settings.policy.privacy_delta)


@pytest.fixture(scope="module")
def protected(tmp_path_factory):
    """A consortium set up by the commands that people type, each a process."""
    with build(
        tmp_path_factory.mktemp("protected"),
        kind=Rehearsal,
        values=PRIVATE,
        n_sites=N_SITES,
        n_holdouts=2,
        patients_per_site=120,
    ) as consortium:
        consortium.provision()
        once = budget_of(consortium, 1, consortium.sites[0])
        for site in consortium.sites:
            permit(consortium, site, 1.2 * once)
        consortium.start()
        contract = consortium.publish()
        consortium.approve(contract, runs=2)
        yield Served(consortium, contract)


def test_what_dies_in_a_private_run_spends_nothing_twice_and_nothing_is_forgotten(
    protected,
):
    consortium = protected.consortium
    consortium.launch(protected.contract, "first")
    protected.run = "first"
    protected.until_round(1)
    protected.kill(*consortium.processes)
    assert consortium.wait("first") == "finished"

    for site in consortium.sites:
        assert spent(consortium, site) == budget_of(consortium, 1, site)
        audit_log.verify(consortium.site_state(site) / "audit.jsonl")
    rounds = [e for e in consortium.events("first") if e["event"] == "round"]
    states = [site["state"] for e in rounds for site in e["sites"].values()]
    assert states == ["contributed"] * 2 * N_SITES


def test_a_run_beyond_the_budget_ends_with_its_reason_and_spends_nothing(protected):
    consortium = protected.consortium
    before = {site: spent(consortium, site) for site in consortium.sites}

    consortium.launch(protected.contract, "second")
    assert consortium.wait("second") == "failed"

    events = consortium.events("second")
    (failed,) = (e for e in events if e["event"] == "run-failed")
    assert failed["reason"].count(Code.BUDGET_EXCEEDED) >= 1
    assert {site: spent(consortium, site) for site in consortium.sites} == before


def test_a_daemon_does_not_start_over_a_ledger_from_a_backup(protected):
    consortium = protected.consortium
    site = consortium.sites[0]
    consortium.kill(site, signal.SIGTERM)
    state = consortium.site_state(site)
    assert debit.existing(state) is not None
    now, old = state / ledger.FILE, state / "backup.sqlite"
    shutil.copy(now, old)
    ledger.Ledger.open(state).debit(
        Debit(contract="", run="later", type="train", phase="", round=1, request="0"),
        [accounting.Invocation(noise_multiplier=100.0, sample_rate=1)],
        ["somebody"],
        budget=Budget(epsilon=1e6, delta=1e-5),
    )
    head = ledger.Ledger.open(state).head
    audit = audit_log.Chain(state / "audit.jsonl")
    audit.append(debit.DEBITED, ledger={"index": head.index, "hash": head.hash})
    old.replace(now)

    consortium.reviving = False
    consortium.start_site(site)

    assert consortium.processes[site].wait(timeout=LIMIT_S) == 1
    log = (consortium.folder / f"{site}.log").read_text()
    assert "restored from a backup, or replaced" in log
