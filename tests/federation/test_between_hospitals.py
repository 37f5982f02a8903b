"""A whole run between hospitals, and what may happen to it on its way.

Everything is real but Flower's transport (see `alliance`). The oracle: the model is the
undisturbed run's, bit for bit, or every hospital that is not in it stands in the
receipts with its reason.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedgex.client.admission import approvals
from fedgex.client.identity import Identity
from fedgex.client.training import local_round
from fedgex.common import keys
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError, FederationError, TrustError
from fedgex.common.study import Study
from fedgex.common.transport.records import floats, to_arrays, to_record
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import members
from fedgex.server.federation import dispatch

from ..support import alliance as alliances
from ..support.alliance import (
    GENES,
    MESSAGES,
    RUN,
    STUDY,
    TODAY,
    Alliance,
    code,
    round_of,
    trainings,
)
from .conftest import Consortium, Exchange, Finished, _bytes, _parse

FIRST, SECOND, THIRD = NAMES = ("hospital-01", "hospital-02", "hospital-03")
DAY_S = 86_400
SECRET = "patient-0042"
CONTRIBUTED = ("contributed", None)

Change = Callable[[RecordDict], None]
Tamper = Callable[..., list[tuple[str, str | None]]]


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """The run to which all others are compared."""

    alliance: Alliance
    contract: str
    run: Finished
    trained: dict[tuple[str, str, int], int]

    def exchange(self, site: str, kind: str, number: int = 0) -> Exchange:
        """Return a message as it went to a hospital, and its reply."""
        (found,) = [
            e
            for e in self.run.exchanges
            if (e.site, e.message_type, round_of(e.message)) == (site, kind, number)
        ][:1]  # round 1 is one of pretraining
        return found


@pytest.fixture(scope="module")
def founded(
    consortium: Consortium, tmp_path_factory: pytest.TempPathFactory
) -> Alliance:
    """Found the alliance and have its contract approved, once for all tests."""
    assert consortium.names[:3] == NAMES
    folder = tmp_path_factory.mktemp("alliance") / "founded"
    return alliances.found(folder, consortium.sites, NAMES)


@pytest.fixture(scope="module")
def undisturbed(
    founded: Alliance, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed") / "alliance"
    shutil.copytree(founded.folder, folder)
    alliance = Alliance(folder, NAMES)
    contract = alliance.agree(small())
    with trainings() as trained:
        run = alliance.conduct(contract)
    return Undisturbed(alliance, contract, run, dict(trained))


@pytest.fixture
def alliance(founded: Alliance, tmp_path: Path) -> Iterator[Alliance]:
    """Return a copy of the alliance; whatever a test does, its logs must hold."""
    shutil.copytree(founded.folder, tmp_path / "alliance")
    copy = Alliance(tmp_path / "alliance", NAMES)
    yield copy
    for name in NAMES:
        audit_log.verify(copy.state(name) / "audit.jsonl")


@pytest.fixture
def ran(undisturbed: Undisturbed, tmp_path: Path) -> Alliance:
    """Return a copy of the alliance after its run."""
    shutil.copytree(undisturbed.alliance.folder, tmp_path / "ran")
    return Alliance(tmp_path / "ran", NAMES)


def small(**changes: Any) -> Study:
    """Return the study of three rounds, with sections replaced."""
    return Study.read(STUDY | changes, "a test's study")


def short(n_rounds: int = 2, quorum: int = 2, **changes: Any) -> Study:
    """Return a study of pretraining alone."""
    only: dict[str, Any] = {
        "pretraining": {"rounds": n_rounds},
        "classification": {"rounds": 0},
        "cross_products": False,
        "rounds": {"quorum": quorum},
    }
    return small(**(only | changes))


def at(site: str, number: int, do: Callable[[], object]) -> Any:
    """Return a hook that does something as a round's message reaches a hospital."""

    def hook(name: str, message: Message) -> None:
        if (name, round_of(message.content)) == (site, number):
            do()

    return hook


# ---- the run, and what it leaves ----


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


# ---- who may run what ----


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


# ---- hospitals that leave, are late, or cannot ----


def test_a_hospital_that_withdraws_mid_run_is_left_out_and_nothing_of_it_leaves(
    alliance: Alliance,
) -> None:
    contract = alliance.agree(short())

    def withdraw() -> None:
        alliance.approvals(THIRD).decide(
            contract, "withdrawn", by="Dr. N.", reason="no"
        )

    run = alliance.conduct(contract, before=at(THIRD, 2, withdraw))

    assert alliance.states(THIRD) == [CONTRIBUTED, ("refused", "FX-STUDY-003")]
    assert alliance.states(FIRST) == [CONTRIBUTED, CONTRIBUTED]
    afterwards = asked(alliance, last(run, THIRD, keys.TRAIN))
    assert code(afterwards) == "FX-STUDY-003"  # not even what is stored
    for reply in (last(run, THIRD, keys.TRAIN).reply, afterwards):
        assert set(reply) == {keys.REFUSAL, keys.PART}


def test_a_hospital_that_withdraws_while_it_trains_sends_nothing(
    alliance: Alliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = alliance.agree(short())
    honest = local_round.train_round

    def train_round(study: Study, phase: str, number: int, *a: Any, **kw: Any) -> Any:
        result = honest(study, phase, number, *a, **kw)
        if (kw["site"], number) == (THIRD, 2):
            store = alliance.approvals(THIRD)
            store.decide(contract, "withdrawn", by="Dr. N.", reason="no")
        return result

    monkeypatch.setattr(local_round, "train_round", train_round)
    run = alliance.conduct(contract)

    assert alliance.states(THIRD)[1] == ("refused", "FX-STUDY-003")
    assert set(last(run, THIRD, keys.TRAIN).reply) == {keys.REFUSAL, keys.PART}
    assert not list(alliance.state(THIRD).glob(f"replies/{RUN}/train-*-00002.reply"))


def test_a_run_whose_mandatory_hospital_withdraws_fails_and_says_so(
    alliance: Alliance,
) -> None:
    rule = {"quorum": 2, "mandatory_sites": [THIRD]}
    contract = alliance.agree(short(rounds=rule))

    def withdraw() -> None:
        alliance.approvals(THIRD).decide(
            contract, "withdrawn", by="Dr. N.", reason="no"
        )

    with pytest.raises(FederationError, match=rf"mandatory \['{THIRD}'\] did not"):
        alliance.conduct(contract, before=at(THIRD, 2, withdraw))

    assert f"{THIRD}: refused (FX-STUDY-003)" in alliance.failure
    assert alliance.states(THIRD) == [CONTRIBUTED]  # of the round before


def test_a_mandatory_hospital_that_is_late_fails_the_run_which_names_it(
    alliance: Alliance,
) -> None:
    rule = {"quorum": 2, "mandatory_sites": [THIRD], "deadline_s": 0.2}
    contract = alliance.agree(short(rounds=rule))

    def silent(site: str, message: Message) -> bool:
        return (site, message.metadata.message_type) == (THIRD, keys.TRAIN)

    with pytest.raises(FederationError, match="mandatory"):
        alliance.conduct(contract, silent=silent)

    assert f"{THIRD}: late (no answer in 0.2 s)" in alliance.failure
    assert not alliance.receipts()


def test_a_hospital_revoked_during_a_round_counts_no_more(alliance: Alliance) -> None:
    contract = alliance.agree(short())

    def revoke() -> None:
        members.revoke_site(alliance.consortium, THIRD, "left the consortium")

    alliance.conduct(contract, before=at(FIRST, 2, revoke))

    (first, (state, reason)) = alliance.states(THIRD)
    assert first == CONTRIBUTED
    assert state != "contributed"
    assert "revoked" in str(reason)


def test_a_hospital_whose_panel_changes_between_rounds_is_left_out_of_the_next(
    alliance: Alliance,
) -> None:
    contract = alliance.agree(short())
    path = alliance.sites / THIRD / "expression.parquet"

    def lose_a_gene() -> None:
        table = pd.read_parquet(path)
        table.drop(columns=table.columns[5]).to_parquet(path)

    alliance.conduct(contract, before=at(THIRD, 2, lose_a_gene))

    assert alliance.states(THIRD) == [CONTRIBUTED, ("refused", "FX-DATA-074")]


def test_exhausted_memory_leaves_the_hospital_as_a_code(
    alliance: Alliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = alliance.agree(short(n_rounds=1))
    honest = local_round.train_round

    def train_round(*args: Any, **more: Any) -> Any:
        if more["site"] == THIRD:
            raise MemoryError(f"cannot hold {SECRET}")
        return honest(*args, **more)

    monkeypatch.setattr(local_round, "train_round", train_round)
    run = alliance.conduct(contract)

    assert alliance.states(THIRD) == [("refused", "FX-SITE-006")]
    assert SECRET.encode() not in last(run, THIRD, keys.TRAIN).reply_bytes


def test_one_sample_without_a_value_costs_one_patient_and_not_the_run(
    alliance: Alliance,
) -> None:
    path = alliance.sites / THIRD / "expression.parquet"
    table = pd.read_parquet(path)
    table.iloc[3] = float("nan")  # FX-DATA-050, a warning
    table.to_parquet(path)
    contract = alliance.agree(short(n_rounds=1, quorum=3))

    alliance.conduct(contract)

    (receipt,) = alliance.receipts()
    assert receipt.sites[THIRD].state == "contributed"
    assert receipt.sites[THIRD].patients == len(table) - 1


def test_one_unreadable_value_stops_its_hospital_with_a_code_and_not_the_run(
    alliance: Alliance,
) -> None:
    folder = alliance.sites / THIRD
    table = pd.read_parquet(folder / "expression.parquet").astype(object)
    table.iloc[3, 4] = "unreadable"  # FX-DATA-030, an error
    table.to_csv(folder / "expression.csv")
    site_toml = alliance.site_toml(THIRD)
    site_toml.write_text(site_toml.read_text().replace(".parquet", ".csv"))
    contract = alliance.agree(short(n_rounds=1))

    alliance.conduct(contract)

    assert alliance.states(THIRD) == [("refused", "FX-DATA-030")]
    assert alliance.states(FIRST) == [CONTRIBUTED]


@pytest.mark.parametrize(
    ("call", "error"), [("fsync", errno.ENOSPC), ("replace", errno.EROFS)]
)
def test_the_run_waits_for_a_hospital_whose_disk_has_no_room(
    alliance: Alliance, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    contract = alliance.agree(short())
    replies = alliance.state(THIRD) / "replies" / RUN
    honest = getattr(os, call)
    failed: list[str] = []

    def fail_once(what: Any, *args: Any, **more: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{what}") if call == "fsync" else str(what)
        if path.startswith(str(replies)) and "train-" in path and not failed:
            failed.append(path)
            raise OSError(error, os.strerror(error))
        return honest(what, *args, **more)

    monkeypatch.setattr(os, call, fail_once)
    run = alliance.conduct(contract)

    assert len(failed) == 1
    assert alliance.states(THIRD) == [CONTRIBUTED, CONTRIBUTED]
    waited = {(e["site"], e["reason"]) for e in run.events("asked-again")}
    assert waited == {(THIRD, "FX-SITE-009")}
    kept = sorted(path.name for path in replies.glob(".*")) + sorted(
        path.name for path in replies.glob("train-*")
    )
    assert kept == [f"train-pretraining-0000{n}.reply" for n in (1, 2)]
    assert run.rounds == [("pretraining", 1), ("pretraining", 2)]


# ---- waiting ----


def _pause(alliance: Alliance) -> Callable[[], None]:
    path = alliance.state(THIRD) / "paused"
    path.write_text("{}")
    return path.unlink


def _close(alliance: Alliance) -> Callable[[], None]:
    hour = (datetime.now().hour + 12) % 24
    alliance.permit(THIRD, hours=f"{hour:02d}:00-{hour:02d}:30")
    return lambda: alliance.permit(THIRD, hours="00:00-24:00")


@pytest.mark.parametrize(
    ("shut", "expected"), [(_pause, "FX-SITE-004"), (_close, "FX-SITE-005")]
)
def test_the_run_waits_for_a_hospital_that_is_paused_or_closed_and_then_goes_on(
    alliance: Alliance,
    undisturbed: Undisturbed,
    shut: Callable[[Alliance], Callable[[], None]],
    expected: str,
) -> None:
    contract = alliance.agree(small())
    opened: list[Callable[[], None]] = []
    refused = 0

    def before(site: str, message: Message) -> None:
        if (site, round_of(message.content)) == (THIRD, 2) and not opened:
            opened.append(shut(alliance))

    def after(site: str, reply: Message) -> None:
        nonlocal refused
        refused += code(reply.content) == expected
        if refused == 3 and len(opened) == 1:
            opened.append(opened[0])
            opened[0]()

    with trainings() as trained:
        run = alliance.conduct(contract, before=before, after=after)

    assert refused == 3
    waited = {(e["site"], e["reason"]) for e in run.events("asked-again")}
    assert waited == {(THIRD, expected)}
    assert run.digest == undisturbed.run.digest
    assert trained == undisturbed.trained


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_clock_that_jumps_by_a_day_during_a_round_makes_nobody_late(
    alliance: Alliance,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    jump_s: int,
) -> None:
    contract = alliance.agree(small())
    jumped = 0
    clock = SimpleNamespace(
        monotonic=time.monotonic, sleep=time.sleep, time=lambda: time.time() + jumped
    )
    monkeypatch.setattr(dispatch, "time", clock)

    def jump() -> None:
        """Jump, and have the guard see what every node does by the new time."""
        nonlocal jumped
        jumped = jump_s
        moved = {"moved": clock.time(), "idle": clock.time()}
        nodes = json.loads((alliance.folder / "state" / "nodes.json").read_text())
        seen = {str(number): moved for number in nodes.values()}
        (alliance.folder / "state" / "activity.json").write_text(json.dumps(seen))

    with trainings() as trained:
        run = alliance.conduct(
            contract, before=at(SECOND, 1, jump), held=dict.fromkeys(NAMES, 20)
        )

    assert jumped
    assert alliance.states(THIRD) == [CONTRIBUTED] * 3
    assert run.digest == undisturbed.run.digest
    assert trained == undisturbed.trained


# ---- a server that dies ----


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


# ---- messages and replies that are not what they should be ----


def asked(alliance: Alliance, exchange: Exchange, change: Change | None = None) -> Any:
    """Send a hospital again what went to it; return its reply's content."""
    return answered(alliance, exchange, change).reply


def answered(
    alliance: Alliance, exchange: Exchange, change: Change | None = None
) -> Exchange:
    grid = alliance.grid()
    node = grid.nodes[exchange.site]
    content = _parse(exchange.message_bytes)
    if change is not None:
        change(content)
    message = Message(content, node.number, exchange.message_type)
    message.metadata.__dict__["_message_id"] = "again"
    grid.ask(exchange.site, message)
    return grid.exchanges[0]


def last(run: Finished, site: str, kind: str) -> Exchange:
    return [e for e in run.exchanges if (e.site, e.message_type) == (site, kind)][-1]


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (keys.STATISTICS, 0),
        (keys.CROSS_PRODUCTS, 0),
        (keys.TRAIN, 1),
        (keys.TRAIN, 2),
    ],
)
def test_a_repeated_request_is_answered_with_the_stored_bytes_and_trains_nothing(
    ran: Alliance, undisturbed: Undisturbed, kind: str, number: int
) -> None:
    before = undisturbed.exchange(FIRST, kind, number)

    with trainings() as trained:
        again = answered(ran, before)

    assert again.reply_bytes == before.reply_bytes
    assert not trained
    assert len(ran.log(FIRST, "replayed")) == 1
    audit_log.verify(ran.state(FIRST) / "audit.jsonl")


def test_a_request_repeated_with_a_newer_receipt_is_still_the_same_request(
    ran: Alliance, undisturbed: Undisturbed
) -> None:
    before = undisturbed.exchange(FIRST, keys.TRAIN, 1)
    newer = undisturbed.exchange(FIRST, keys.TRAIN, 2).message

    def renew(content: RecordDict) -> None:
        content[keys.RECEIPT] = newer.config_records[keys.RECEIPT]

    assert answered(ran, before, renew).reply_bytes == before.reply_bytes


def _another_model(content: RecordDict) -> None:
    arrays = floats(to_arrays(content.array_records[keys.MODEL]))
    content[keys.MODEL] = to_record({n: a + np.float32(1) for n, a in arrays.items()})


def _another_study(content: RecordDict) -> None:
    study = small(seed=2)
    record = content.config_records[keys.STUDY]
    record[keys.JSON], record["hash"] = study.to_json(), study.hash


def _another_vocabulary(content: RecordDict) -> None:
    vocabulary = Vocabulary(GENES[:-1])
    record = content.config_records[keys.VOCABULARY]
    record["genes"], record["hash"] = list(vocabulary.genes), vocabulary.hash


def _round_beyond_the_last(content: RecordDict) -> None:
    content.config_records[keys.ROUND]["number"] = 3


def _unplanned_phase(content: RecordDict) -> None:
    content.config_records[keys.ROUND]["phase"] = "survival"


def _no_run(content: RecordDict) -> None:
    del content[keys.RUN]


def _nameless_run(content: RecordDict) -> None:
    content.config_records[keys.RUN]["run"] = ""


def _escaping_run(content: RecordDict) -> None:
    content.config_records[keys.RUN]["run"] = "../../elsewhere"


def _unknown_contract(content: RecordDict) -> None:
    content.config_records[keys.RUN]["contract"] = "0" * 64


def _another_runs_receipt(content: RecordDict) -> None:
    content.config_records[keys.RUN]["run"] = "small-2"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_another_model, "FX-RUN-007"),
        (_another_study, "FX-STUDY-006"),
        (_another_vocabulary, "FX-STUDY-006"),
        (_round_beyond_the_last, "FX-STUDY-006"),
        (_unplanned_phase, "FX-STUDY-006"),
        (_another_runs_receipt, "FX-STUDY-006"),
        (_no_run, "FX-RUN-001"),
        (_nameless_run, "FX-RUN-001"),
        (_escaping_run, "FX-RUN-001"),
        (_unknown_contract, "FX-STUDY-001"),
    ],
)
def test_a_message_that_the_contract_and_the_run_do_not_cover_is_refused(
    ran: Alliance, undisturbed: Undisturbed, change: Change, expected: str
) -> None:
    with trainings() as trained:
        reply = asked(ran, undisturbed.exchange(FIRST, keys.TRAIN, 2), change)

    assert code(reply) == expected
    assert set(reply) <= {keys.REFUSAL, keys.PART}
    assert not trained
    assert ran.log(FIRST, "refused")[-1]["code"] == expected


def test_statistics_are_not_told_again_under_another_number(
    ran: Alliance, undisturbed: Undisturbed
) -> None:
    def number(content: RecordDict) -> None:
        content[keys.ROUND] = ConfigRecord({"phase": "", "number": 1})

    reply = asked(ran, undisturbed.exchange(FIRST, keys.STATISTICS), number)

    assert code(reply) == "FX-STUDY-006"


def _changed(ran: Alliance, signed: Signed) -> Signed:
    other = json.loads(signed.content) | {"outgoing": "0" * 64}
    text = json.dumps(other, sort_keys=True, separators=(",", ":"))
    return Signed(text, signed.signatures)


def _unsigned(ran: Alliance, signed: Signed) -> Signed:
    return Signed(signed.content)


def _signed_by_a_hospital(ran: Alliance, signed: Signed) -> Signed:
    site = Identity.load(ran.state(SECOND))
    return Signed(signed.content).signed_by(site.key, site.certificate)


@pytest.mark.parametrize("forge", [_changed, _unsigned, _signed_by_a_hospital])
def test_a_forged_receipt_is_refused_and_not_kept(
    ran: Alliance,
    undisturbed: Undisturbed,
    forge: Callable[[Alliance, Signed], Signed],
) -> None:
    def change(content: RecordDict) -> None:
        record = content.config_records[keys.RECEIPT]
        signed = Signed.from_json(str(record[keys.JSON]), "test")
        record[keys.JSON] = forge(ran, signed).to_json()

    shutil.rmtree(ran.state(FIRST) / "receipts")

    reply = asked(ran, undisturbed.exchange(FIRST, keys.TRAIN, 2), change)

    assert code(reply) == "FX-STUDY-005"
    assert not (ran.state(FIRST) / "receipts").exists()


@pytest.fixture
def tamper(alliance: Alliance) -> Tamper:
    """Return what runs rounds in which the third hospital's updates are changed."""

    def run(change: Change, n_rounds: int = 1) -> list[tuple[str, str | None]]:
        contract = alliance.agree(short(n_rounds))

        def after(site: str, reply: Message) -> None:
            if site == THIRD and keys.UPDATE in reply.content.array_records:
                change(reply.content)

        alliance.conduct(contract, after=after)
        assert alliance.states(FIRST) == [CONTRIBUTED] * n_rounds
        return alliance.states(THIRD)

    return run


def test_a_reply_of_the_first_round_replayed_in_the_second_is_quarantined(
    tamper: Tamper,
) -> None:
    kept: list[bytes] = []

    def replay(content: RecordDict) -> None:
        kept.append(_bytes(content))
        for name, record in _parse(kept[0]).items():
            content[name] = record

    first, (state, reason) = tamper(replay, 2)

    assert first == CONTRIBUTED
    assert state == "quarantined"
    assert "signed for round 1, this is 2" in str(reason)


def test_a_reply_signed_by_another_hospital_is_quarantined(
    alliance: Alliance, tamper: Tamper
) -> None:
    other = alliance.grid().nodes[SECOND].gate.identity

    def sign(content: RecordDict) -> None:
        record = content.config_records[keys.PART]
        part = str(record[keys.JSON]).encode()
        record[keys.SIGNATURE] = other.sign(part)

    ((state, reason),) = tamper(sign)

    assert state == "quarantined"
    assert "the signature does not fit" in str(reason)


def test_an_update_with_one_flipped_byte_is_quarantined(
    tamper: Tamper,
) -> None:
    def flip(content: RecordDict) -> None:
        (array,) = content.array_records[keys.UPDATE].values()
        flipped = bytearray(array.data)
        flipped[-1] ^= 1
        array.data = bytes(flipped)

    ((state, reason),) = tamper(flip)

    assert state == "quarantined"
    assert "signed for reply" in str(reason)


# ---- a log that was cut or restored ----


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))


def _restored_and_grown(path: Path, keep: int) -> None:
    lines = len(path.read_bytes().splitlines())
    _cut(path, keep)
    for _ in range(lines - keep + 5):
        Chain(path).append("daemon-started", pid=1)


@pytest.mark.parametrize("spoil", [_cut, _restored_and_grown])
def test_a_hospital_whose_log_lacks_what_it_signed_answers_nothing(
    ran: Alliance, undisturbed: Undisturbed, spoil: Callable[[Path, int], None]
) -> None:
    before = undisturbed.exchange(FIRST, keys.TRAIN, 2)
    head = str(before.message.config_records[keys.RECEIPT]["head"])
    spoil(ran.state(FIRST) / "audit.jsonl", int(head.partition(":")[0]) - 1)

    with trainings() as trained:
        reply = asked(ran, before)
        with pytest.raises(FederationError, match=rf"{FIRST}: refused \(FX-RUN-003\)"):
            ran.conduct(undisturbed.contract)

    assert code(reply) == "FX-RUN-003"
    assert set(reply) == {keys.REFUSAL, keys.PART}
    assert not trained


def test_a_log_that_was_changed_keeps_the_gate_shut(ran: Alliance) -> None:
    path = ran.state(FIRST) / "audit.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"event":"', '"event":"not-')
    path.write_text("".join(lines))

    with pytest.raises(TrustError, match="line 3"):
        ran.grid()
