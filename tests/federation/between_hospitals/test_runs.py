"""An undisturbed run, and one whose server dies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fedgex.common import keys
from fedgex.common.trust import audit_log

from ...support.alliance import (
    MESSAGES,
    RUN,
    Alliance,
    trainings,
)
from ..conftest import Consortium
from .conftest import (
    CONTRIBUTED,
    FIRST,
    NAMES,
    SECOND,
    Undisturbed,
    short,
    small,
)


def test_an_approved_contract_ends_in_the_simulators_bits(
    undisturbed: Undisturbed, founded: Alliance, consortium: Consortium, tmp_path: Path
) -> None:
    shutil.copytree(
        founded.sites, tmp_path / "sites", ignore=shutil.ignore_patterns("state")
    )

    simulated = consortium.conduct(small(), tmp_path / "run", sites=tmp_path / "sites")

    assert undisturbed.run.digest == simulated.digest
    assert undisturbed.run.rounds == simulated.rounds
    assert len(undisturbed.run.exchanges) == MESSAGES


def test_the_receipts_name_every_hospitals_state_and_number_of_patients(
    undisturbed: Undisturbed,
) -> None:
    receipts = undisturbed.alliance.receipts()

    assert [(r.phase, r.round) for r in receipts] == undisturbed.run.rounds
    for receipt in receipts:
        assert tuple(receipt.sites) == NAMES
        for name, part in receipt.sites.items():
            clinical = undisturbed.alliance.sites / name / "clinical.csv"
            assert part.state == "contributed"
            assert part.patients == len(pd.read_csv(clinical))


def test_every_hospital_holds_the_receipts_and_a_log_that_says_what_left(
    undisturbed: Undisturbed,
) -> None:
    alliance = undisturbed.alliance
    server = sorted(alliance.run_dir.glob("checkpoints/*/receipt.json"))
    for name in NAMES:
        audit_log.verify(alliance.state(name) / "audit.jsonl")
        held = sorted((alliance.state(name) / "receipts" / RUN).iterdir())
        # The last one travels with the released model.
        assert [h.read_bytes() for h in held] == [s.read_bytes() for s in server[:-1]]
        replies = [e.reply for e in undisturbed.run.exchanges if e.site == name]
        assert len(alliance.log(name, "answered")) == len(replies)
        assert not alliance.log(name, "refused")


def test_a_hospital_that_withholds_its_number_of_patients_is_told_as_suppressed(
    alliance: Alliance,
) -> None:
    alliance.permit(SECOND, metrics=["train-loss"])
    weights = {"name": "fedavg", "weights": "fixed"}
    by_site = dict(zip(NAMES, (1.0, 2.0, 3.0), strict=True))
    contract = alliance.agree(
        short(n_rounds=1, quorum=3, strategy=weights | {"site_weights": by_site})
    )

    run = alliance.conduct(contract)

    (receipt,) = alliance.receipts()
    assert receipt.sites[SECOND].state == "contributed"
    assert receipt.sites[SECOND].patients == "suppressed"
    assert isinstance(receipt.sites[FIRST].patients, int)
    assert run.events("round")[0]["sites"][SECOND]["num_examples"] is None
    for exchange in run.exchanges:
        if exchange.site == SECOND:
            told = exchange.reply.metric_records.get(keys.METRICS)
            assert not {keys.NUM_EXAMPLES, keys.NUM_PATIENTS} & set(told or ())


@pytest.mark.parametrize(
    "answered",
    [
        pytest.param(2, id="while it offers the contract"),
        pytest.param(7, id="while it asks for statistics"),
        pytest.param(11, id="while it asks for cross-products"),
        pytest.param(15, id="as it collects the first round"),
        pytest.param(MESSAGES, id="as it collects the last round"),
    ],
)
def test_a_server_killed_and_started_again_ends_in_the_same_bits(
    alliance: Alliance, undisturbed: Undisturbed, answered: int
) -> None:
    contract = alliance.agree(small())

    with trainings() as trained:
        killed = alliance.conduct(contract, kill_after=answered)
        assert len(killed.exchanges) == answered
        resumed = alliance.conduct(contract)

    assert resumed.digest == undisturbed.run.digest
    assert trained == undisturbed.trained  # each round once at each hospital
    assert set(trained.values()) == {1}
    for name in NAMES:
        assert alliance.states(name) == [CONTRIBUTED] * 3


def test_a_server_killed_in_every_round_ends_in_the_same_bits(
    alliance: Alliance, undisturbed: Undisturbed
) -> None:
    contract = alliance.agree(small())
    opening = 12  # messages until the first round; 6 once there is a checkpoint
    with trainings() as trained:
        for kill_after in (opening + 2, 6 + 2, 6 + 3 + 1, 6 + 3 + 3):
            alliance.conduct(contract, kill_after=kill_after)
        run = alliance.conduct(contract)

    assert run.digest == undisturbed.run.digest
    assert trained == undisturbed.trained
    assert len(alliance.receipts()) == 3
