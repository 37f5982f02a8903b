"""Who may run what: approvals, and contracts that were changed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from flwr.app import Message

from fedgex.client.admission import approvals
from fedgex.common import keys
from fedgex.common.errors import ConfigError, FederationError, TrustError

from ...support.alliance import (
    TODAY,
    Alliance,
    code,
)
from .conftest import (
    CONTRIBUTED,
    FIRST,
    SECOND,
    THIRD,
    Undisturbed,
    asked,
    at,
    short,
    small,
)


def test_an_unapproved_contract_waits_until_a_person_approves_it(
    alliance: Alliance,
) -> None:
    contract = alliance.publish(short(n_rounds=1, quorum=3))
    alliance.approve(contract, FIRST, SECOND)
    asked = 0

    def approve_late(site: str, message: Message) -> None:
        nonlocal asked
        if (site, message.metadata.message_type) == (THIRD, keys.CONTRACT):
            asked += 1
            if asked == 3:
                alliance.approve(contract, THIRD)

    run = alliance.conduct(contract, before=approve_late)

    answers = [code(e.reply) for e in run.exchanges if e.site == THIRD]
    assert answers == ["FX-STUDY-001"] * 2 + [None] * 4
    waited = [(e["site"], e["reason"]) for e in run.events("asked-again")]
    assert waited == [(THIRD, "FX-STUDY-001")]
    assert alliance.states(THIRD) == [CONTRIBUTED]


def _nobody_approves(alliance: Alliance, contract: str) -> None:
    """Approve nothing."""


def _reject(alliance: Alliance, contract: str) -> None:
    alliance.approvals(THIRD).receive(alliance.signed(contract))
    alliance.approvals(THIRD).decide(contract, "rejected", by="Dr. N.", reason="no")


def _withdraw(alliance: Alliance, contract: str) -> None:
    alliance.approve(contract, THIRD)
    alliance.approvals(THIRD).decide(
        contract, "withdrawn", by="Dr. N.", reason="no more"
    )


def _demand_privacy(alliance: Alliance, contract: str) -> None:
    alliance.approve(contract, THIRD)
    alliance.permit(THIRD, demand_privacy=True)


def _forbid_a_task(alliance: Alliance, contract: str) -> None:
    alliance.approve(contract, THIRD)
    alliance.permit(THIRD, tasks=["survival"])


@pytest.mark.parametrize(
    ("decide", "expected"),
    [
        (_nobody_approves, "FX-STUDY-001"),
        (_reject, "FX-STUDY-002"),
        (_withdraw, "FX-STUDY-003"),
        (_demand_privacy, "FX-STUDY-008"),
        (_forbid_a_task, "FX-STUDY-008"),
    ],
)
def test_what_a_hospital_does_not_permit_is_refused_by_it_and_fails_with_its_reason(
    alliance: Alliance, decide: Callable[[Alliance, str], None], expected: str
) -> None:
    contract = alliance.publish(small())
    alliance.approve(contract, FIRST, SECOND)
    decide(alliance, contract)

    with pytest.raises(FederationError, match=rf"{THIRD}: refused \({expected}\)"):
        alliance.conduct(contract, start_deadline_s=0.05)

    assert not list(alliance.run_dir.glob("checkpoints/*"))
    assert f"{THIRD}: refused ({expected})" in alliance.failure


def test_an_approval_that_ends_during_the_run_ends_the_hospitals_part(
    alliance: Alliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = alliance.publish(short())
    alliance.approve(contract, FIRST, SECOND, expires=TODAY + timedelta(days=60))
    alliance.approve(contract, THIRD, expires=TODAY + timedelta(days=1))

    class InAMonth(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=30)

    def pass_a_month() -> None:
        monkeypatch.setattr(approvals, "datetime", InAMonth)

    alliance.conduct(contract, before=at(FIRST, 2, pass_a_month))

    assert alliance.states(THIRD) == [CONTRIBUTED, ("refused", "FX-STUDY-004")]
    assert alliance.states(FIRST) == [CONTRIBUTED, CONTRIBUTED]


def test_a_contract_changed_by_one_byte_on_its_way_is_refused(
    alliance: Alliance,
) -> None:
    contract = alliance.agree(small())

    def change(site: str, message: Message) -> None:
        record = message.content.config_records.get(keys.SIGNED_CONTRACT)
        if site == THIRD and record is not None:
            text = str(record[keys.JSON])
            assert "thirty" in text
            record[keys.JSON] = text.replace("thirty", "thirtY")

    with pytest.raises(FederationError, match=rf"{THIRD}: refused \(FX-STUDY-005\)"):
        alliance.conduct(contract, before=change, start_deadline_s=0.05)


def test_a_contract_changed_by_one_byte_and_signed_again_awaits_a_new_approval(
    alliance: Alliance,
) -> None:
    before = alliance.agree(small())
    path = alliance.folder / "contract.toml"
    path.write_text(path.read_text().replace("thirty", "thirtY"))
    contract = alliance.sign(path)
    assert contract != before

    with pytest.raises(FederationError, match=r"hospital-01: refused \(FX-STUDY-001\)"):
        alliance.conduct(contract, start_deadline_s=0.05)


def test_a_contract_changed_by_one_byte_on_the_servers_disk_runs_nowhere(
    alliance: Alliance,
) -> None:
    contract = alliance.agree(small())
    path = alliance.folder / "state" / "contracts" / f"{contract}.json"
    path.write_text(path.read_text().replace("thirty", "thirtY"))

    with pytest.raises(TrustError, match="the contract was changed"):
        alliance.conduct(contract)


def test_a_contract_changed_by_one_byte_on_the_hospitals_disk_admits_nothing(
    ran: Alliance, undisturbed: Undisturbed
) -> None:
    path = ran.state(FIRST) / "contracts" / f"{undisturbed.contract}.json"
    path.write_text(path.read_text().replace("thirty", "thirtY"))

    reply = asked(ran, undisturbed.exchange(FIRST, keys.TRAIN, 2))

    assert code(reply) == "FX-STUDY-005"


@pytest.mark.parametrize("quorum", [0, 4])
def test_no_quorum_and_more_than_all_are_no_contracts(
    alliance: Alliance, quorum: int
) -> None:
    with pytest.raises(ConfigError, match="quorum"):
        alliance.publish(small(rounds={"quorum": quorum}))
