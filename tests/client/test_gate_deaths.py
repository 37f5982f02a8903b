"""What the gate knows of a computation after the death of the process that did it."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from fedgex.client import identity
from fedgex.client.decisions import Desk
from fedgex.client.gate import MAX_DEATHS, Gate, read_working, stop_working
from fedgex.client.policy import TEMPLATE
from fedgex.client.settings import SiteSettings
from fedgex.common import chain, failpoints, keys, pki
from fedgex.common.contract import Contract
from fedgex.common.errors import FedgexError
from fedgex.common.pki import Signed
from fedgex.common.vocabulary import Vocabulary

SECRET = "patient-0042"
TOMORROW = datetime.now(UTC).date() + timedelta(days=1)
CONTRACT = f"""\
purpose = "Restoration, for tests"
expires = {TOMORROW}
code_version = "0.1"
vocabulary_hash = "{Vocabulary(("MYC", "TP53")).hash}"
sites = ["north", "south"]
[study]
name = "small"
vocabulary.genes = ["MYC", "TP53"]
pretraining.rounds = 9
"""


class Died(BaseException):
    """Ends a process as a signal would: nothing of it catches this."""


@dataclass
class Hospital:
    """A hospital that approved a contract, and an app that does little."""

    site_toml: Path
    contract: Signed
    computed: Counter[int] = field(default_factory=Counter)
    """How often each round was computed."""
    fails_with: BaseException | None = None

    @property
    def state_dir(self) -> Path:
        return self.site_toml.with_name("state")

    def app(self, message: Message, context: Context) -> Message:
        number = int(str(message.content.config_records[keys.ROUND][keys.NUMBER]))
        self.computed[number] += 1
        if self.fails_with is not None:
            raise self.fails_with
        told: dict[str, Any] = {keys.NUM_EXAMPLES: 40, "times": self.computed[number]}
        return Message(RecordDict({keys.METRICS: MetricRecord(told)}), reply_to=message)

    def ask(self, number: int = 1) -> RecordDict:
        """Ask a process that was just started to train a round."""
        study = Contract.read_signed(self.contract).study
        content = RecordDict(
            {
                keys.RUN: ConfigRecord(
                    {keys.CONTRACT_HASH: self.contract.hash, keys.RUN_NAME: "run-1"}
                ),
                keys.STUDY: ConfigRecord({keys.JSON: study.to_json()}),
                keys.ROUND: ConfigRecord(
                    {keys.PHASE: "pretraining", keys.NUMBER: number}
                ),
            }
        )
        message = Message(content, 1, keys.TRAIN)
        message.metadata.__dict__["_message_id"] = "message-1"
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}
        )
        reply: RecordDict = Gate(self.site_toml, self.app)(message, context).content
        return reply

    def events(self) -> list[str]:
        """Return what the audit log says, once its chain was followed."""
        chain.verify(self.state_dir / "audit.jsonl")
        return [x["event"] for x in chain.read(self.state_dir / "audit.jsonl")]


@pytest.fixture
def north(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    (tmp_path / "policy.toml").write_text(TEMPLATE)
    site_toml = tmp_path / "site.toml"
    site_toml.write_text(
        'name = "north"\ndata.expression = "absent.csv"\ndata.scale = "log2p1"\n'
    )
    settings = SiteSettings.load(site_toml)
    key, authority = pki.new_authority("alliance")

    def issue(csr: str, name: str, role: pki.Role) -> Any:
        return pki.issue(key, authority, csr, name=name, role=role, days=30)

    asked = identity.Request.load(identity.create(settings))
    issued = issue(asked.certificate_request, "north", "site")
    kit = {
        "consortium": "alliance",
        "site": "north",
        "server": "fed.example.org:9092",
        "authority": pki.to_pem(authority),
        "certificate": pki.to_pem(issued),
    }
    (tmp_path / "kit.json").write_text(json.dumps(kit))
    identity.join(settings, tmp_path / "kit.json")
    ada = pki.new_key()
    certificate = issue(
        pki.request(ada, "ada", "administrator"), "ada", "administrator"
    )
    contract = Signed(CONTRACT).signed_by(ada, certificate)
    desk = Desk.of(settings)
    desk.receive(contract)
    desk.decide(contract.hash, "approved", by="Dr. N.", expires=TOMORROW)
    return Hospital(site_toml, contract)


def code(reply: RecordDict) -> str | None:
    record = reply.config_records.get(keys.REFUSAL)
    return None if record is None else str(record[keys.CODE])


def as_bytes(reply: RecordDict) -> bytes:
    sent: bytes = recorddict_to_proto(reply).SerializeToString(deterministic=True)
    return sent


def die(hospital: Hospital, number: int = 1) -> None:
    """Have the process die while it computes a round."""
    hospital.fails_with = Died()
    with pytest.raises(Died):
        hospital.ask(number)
    hospital.fails_with = None


def test_a_request_that_killed_the_process_three_times_is_refused(
    north: Hospital,
) -> None:
    for _ in range(MAX_DEATHS):
        die(north)

    assert MAX_DEATHS == 3
    assert code(north.ask()) == "FX-SITE-001"
    assert north.computed[1] == 3  # and not a fourth time
    assert code(north.ask()) is None  # whoever asks yet again begins anew


def test_two_deaths_are_no_reason_to_refuse(north: Hospital) -> None:
    die(north)
    die(north)

    assert code(north.ask()) is None
    assert read_working(north.state_dir) is None


def test_deaths_over_one_request_do_not_count_for_the_next(north: Hospital) -> None:
    die(north, 1)
    die(north, 1)
    die(north, 2)

    assert code(north.ask(2)) is None


def test_a_refusal_says_that_nothing_is_computed_any_more(north: Hospital) -> None:
    north.fails_with = ValueError(f"of {SECRET}")

    reply = north.ask()

    assert code(reply) == "FX-SITE-001"
    assert SECRET.encode() not in as_bytes(reply)
    assert SECRET not in (north.state_dir / "audit.jsonl").read_text()
    assert read_working(north.state_dir) is None


def test_a_request_that_took_too_long_is_refused_once_with_that_code(
    north: Hospital,
) -> None:
    die(north)
    stop_working(north.state_dir, "FX-SITE-007")

    assert code(north.ask()) == "FX-SITE-007"
    assert north.computed[1] == 1
    assert code(north.ask()) is None


def test_stopping_while_nothing_is_computed_does_nothing(north: Hospital) -> None:
    stop_working(north.state_dir, "FX-SITE-007")

    assert code(north.ask()) is None


@pytest.mark.parametrize(
    ("point", "nth", "computed"),
    [
        ("audit.before", 1, 1),  # before it says "asked"
        ("audit.appended", 1, 1),
        ("site.before_train", 1, 1),
        ("site.after_train", 1, 2),
        ("audit.before", 2, 2),  # before it says "answered"
        ("audit.appended", 2, 2),
        ("reply.written", 1, 2),
        ("reply.renamed", 1, 1),  # stored: sent again, and not computed again
        ("site.before_send", 1, 1),
    ],
)
def test_after_a_death_at_any_step_one_answer_stands(
    north: Hospital,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    nth: int,
    computed: int,
) -> None:
    reached: Counter[str] = Counter()

    def reach(name: str) -> None:
        assert name in failpoints.POINTS
        reached[name] += 1
        if name == point and reached[name] == nth:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "reach", reach)
        with pytest.raises(Died):
            north.ask()

    again, once_more = north.ask(), north.ask()

    assert as_bytes(again) == as_bytes(once_more)
    assert north.computed[1] == computed
    assert again.metric_records[keys.METRICS]["times"] == computed
    assert "replayed" in north.events()
    assert read_working(north.state_dir) is None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_log_that_cannot_be_written_lets_nothing_out_until_it_can(
    north: Hospital, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    honest = os.fsync

    def fsync(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("audit.jsonl"):
            raise OSError(error, os.strerror(error))
        honest(handle)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        for _ in range(MAX_DEATHS + 1):
            with pytest.raises(FedgexError, match="could not be written"):
                north.ask()

    assert not north.computed
    assert code(north.ask()) is None  # a full disk is no death
    assert north.events()[-2:] == ["asked", "answered"]


def test_a_policy_that_cannot_be_read_lets_nothing_out(north: Hospital) -> None:
    gate = Gate(north.site_toml, north.app)
    north.site_toml.with_name("policy.toml").write_text("minimum_cohort = ")
    message = Message(RecordDict(), 1, keys.TRAIN)
    message.metadata.__dict__["_message_id"] = "message-1"
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}
    )

    assert code(gate(message, context).content) == "FX-SITE-001"
    assert not north.computed
