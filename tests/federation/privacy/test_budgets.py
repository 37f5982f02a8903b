"""A hospital whose privacy budget ends, or whose ledger is not whole, declines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedgex.client.ledger import debit
from fedgex.client.ledger.ledger import FILE, Ledger, LedgerError
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import Cohort, load_cohort, save_cohort
from fedgex.common.data.scales import Scale
from fedgex.common.errors import FederationError
from fedgex.common.privacy import accounting
from fedgex.common.study import Study
from fedgex.common.trust import audit_log

from ...support import alliance as alliances
from ...support.alliance import STUDY, Alliance, round_of, trainings
from ..conftest import Consortium

FIRST, SECOND, THIRD = NAMES = ("hospital-01", "hospital-02", "hospital-03")
DELTA = 1e-3
CONTRIBUTED = ("contributed", None)
PRIVATE: dict[str, Any] = {
    "pretraining": {"rounds": 2, "batch_size": 16},
    "classification": {"rounds": 0},
    "cross_products": False,
    "strategy": {"name": "fedavg", "weights": "equal"},
    "public": {"statistics": True},
    "privacy": {
        "patient": {
            "noise_multiplier": 5.0,
            "delta": DELTA,
            "clip": 1.0,
            "sample_rate": 1.0,  # its epsilon is a formula
        }
    },
}


def private(quorum: int = 2) -> Study:
    return Study.read(STUDY | PRIVATE | {"rounds": {"quorum": quorum}}, "a test's")


def after(rounds: int) -> float:
    """Return what so many rounds cost a patient."""
    history = [accounting.invocations(private(), "pretraining", 1)[0]] * rounds
    return accounting.epsilon(history, DELTA)


@pytest.fixture(scope="module")
def founded(
    consortium: Consortium, tmp_path_factory: pytest.TempPathFactory
) -> Alliance:
    folder = tmp_path_factory.mktemp("budgets") / "founded"
    return alliances.found(folder, consortium.sites, NAMES)


@pytest.fixture(scope="module")
def public(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a public cohort: everybody of the hold-out, and again."""
    cohort = load_cohort(consortium.holdout, Scale.LOG2P1)
    twice = np.concatenate([cohort.expression, cohort.expression])
    names = tuple(f"public-{i}" for i in range(len(twice)))
    clinical = pd.concat([cohort.clinical, cohort.clinical], ignore_index=True)
    folder = tmp_path_factory.mktemp("public")
    made = Cohort(
        patients=names, genes=cohort.genes, expression=twice, clinical=clinical
    )
    save_cohort(made, folder, Scale.LOG2P1)
    return folder


@pytest.fixture
def alliance(founded: Alliance, tmp_path: Path) -> Iterator[Alliance]:
    """Return a copy of the alliance; whatever a test does, its logs must hold."""
    shutil.copytree(founded.folder, tmp_path / "alliance")
    copy = Alliance(tmp_path / "alliance", NAMES)
    for name in NAMES:
        copy.permit(name, privacy_epsilon=100.0, privacy_delta=DELTA)
    yield copy
    for name in NAMES:
        audit_log.verify(copy.state(name) / "audit.jsonl")


def spent(alliance: Alliance, name: str) -> float:
    return Ledger.open(alliance.state(name)).spent(None, DELTA)


def test_a_spent_budget_declines_before_computing_and_the_others_go_on(
    alliance: Alliance, public: Path
) -> None:
    alliance.permit(THIRD, privacy_epsilon=after(1))

    with trainings() as trained:
        alliance.conduct(alliance.agree(private()), public=public)

    assert alliance.states(FIRST) == [CONTRIBUTED] * 2
    assert alliance.states(THIRD) == [CONTRIBUTED, ("refused", "FX-PRIV-002")]
    assert trained[THIRD, "pretraining", 1] == 1
    assert trained[THIRD, "pretraining", 2] == 0
    assert [spent(alliance, name) for name in NAMES] == [after(2), after(2), after(1)]


def test_a_run_stops_with_the_reason_if_the_quorum_needs_the_one_that_declines(
    alliance: Alliance, public: Path
) -> None:
    alliance.permit(THIRD, privacy_epsilon=after(1))

    with pytest.raises(FederationError):
        alliance.conduct(alliance.agree(private(quorum=3)), public=public)

    assert "FX-PRIV-002" in alliance.failure
    assert spent(alliance, THIRD) == after(1)


def test_a_kill_and_a_resumed_run_spend_what_an_undisturbed_one_does(
    alliance: Alliance, public: Path
) -> None:
    contract = alliance.agree(private())

    alliance.conduct(contract, public=public, kill_after=10)
    assert {spent(alliance, name) for name in NAMES} == {after(1), after(2)}
    alliance.conduct(contract, public=public)

    assert alliance.states(FIRST) == [CONTRIBUTED] * 2
    assert {spent(alliance, name) for name in NAMES} == {after(2)}


def test_a_second_run_goes_on_from_what_the_first_one_spent(
    alliance: Alliance, public: Path
) -> None:
    contract = alliance.agree(private())
    alliance.conduct(contract, public=public)
    shutil.rmtree(alliance.run_dir)
    for name in NAMES:  # as under another name of the run
        shutil.rmtree(alliance.state(name) / "replies")
        shutil.rmtree(alliance.state(name) / "receipts")
    other = alliance.agree(private(quorum=1))
    alliance.conduct(other, public=public)

    assert {spent(alliance, name) for name in NAMES} == {after(4)}


def test_a_ledger_from_a_backup_is_refused_during_a_run(
    alliance: Alliance, public: Path, tmp_path: Path
) -> None:
    ledger = alliance.state(THIRD) / FILE

    def restore(site: str, message: Any) -> None:
        number = round_of(message.content)
        if (site, number) == (THIRD, 1):
            shutil.copy(ledger, tmp_path / FILE)
        if (site, number) == (THIRD, 2):
            shutil.copy(tmp_path / FILE, ledger)

    alliance.conduct(alliance.agree(private()), public=public, before=restore)

    assert alliance.states(THIRD) == [CONTRIBUTED, ("refused", "FX-PRIV-003")]


def test_simulated_hospitals_keep_a_ledger_too_and_a_resumed_run_spends_once(
    consortium: Consortium, public: Path, tmp_path: Path
) -> None:
    shutil.copytree(consortium.sites, tmp_path / "sites")
    folder, sites = tmp_path / "run", tmp_path / "sites"

    for kill_after in (5, None):
        consortium.conduct(
            private(),
            folder,
            sites=sites,
            public=public,
            kill_after=kill_after,
        )

    for name in consortium.names:
        state_dir = SiteSettings.load(sites / name / "site.toml").state_dir
        assert Ledger.open(state_dir).spent(None, DELTA) == after(2)
        (state_dir / FILE).unlink()
        with pytest.raises(LedgerError):
            debit.ready(state_dir)
