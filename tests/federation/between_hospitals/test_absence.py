"""Hospitals that leave, are late or cannot; a run that waits for them."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from flwr.app import Message

from fedgex.client.training import local_round
from fedgex.common import keys
from fedgex.common.errors import FederationError
from fedgex.common.study import Study
from fedgex.server.consortium import members
from fedgex.server.federation import dispatch

from ...support.alliance import (
    RUN,
    Alliance,
    code,
    round_of,
    trainings,
)
from .conftest import (
    CONTRIBUTED,
    DAY_S,
    FIRST,
    NAMES,
    SECOND,
    SECRET,
    THIRD,
    Undisturbed,
    asked,
    at,
    last,
    short,
    small,
)


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
