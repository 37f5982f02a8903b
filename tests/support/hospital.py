"""The hospital north: it has joined a consortium, and may have approved a contract."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedgex.client import identity
from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.admission.gate import Gate
from fedgex.client.policy import TEMPLATE
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.study import Study
from fedgex.common.system import failpoints
from fedgex.common.transport.records import to_record
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.signed import Signed

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
"""
"""A contract whose study may go on below."""

Authority = tuple[pki.Key, x509.Certificate]


class Died(BaseException):
    """Ends a process as a signal would: nothing of it catches this."""


def of_study(study: Study, model: int) -> dict[str, Any]:
    """Return the records of a request to train a model."""
    genes = Vocabulary(tuple(sorted(study.vocabulary.genes)))
    scale = {"mean": np.zeros(len(genes)), "sd": np.ones(len(genes))}
    return {
        keys.STUDY: ConfigRecord({keys.JSON: study.to_json(), "hash": study.hash}),
        keys.VOCABULARY: ConfigRecord({"genes": list(genes.genes), "hash": genes.hash}),
        keys.STANDARDISATION: to_record(scale),
        keys.MODEL: to_record({"version": np.array([model])}),
    }


@dataclass
class Hospital:
    """A hospital that approved a contract, and an app that does little."""

    site_toml: Path
    contract: Signed
    computed: Counter[int] = field(default_factory=Counter)
    """How often each round was computed."""

    @property
    def state_dir(self) -> Path:
        return self.site_toml.with_name("state")

    def app(self, message: Message, context: Context) -> Message:
        number = round_of(message)
        self.computed[number] += 1
        told: dict[str, Any] = {keys.NUM_EXAMPLES: 40, "times": self.computed[number]}
        return Message(RecordDict({keys.METRICS: MetricRecord(told)}), reply_to=message)

    def ask(self, number: int = 1, model: int = 0) -> RecordDict:
        """Ask a process that was just started to train a round."""
        study = Contract.read_signed(self.contract).study
        content = RecordDict(
            {
                keys.RUN: ConfigRecord(
                    {"contract": self.contract.hash, "run": "run-1"}
                ),
                **of_study(study, model),
                keys.ROUND: ConfigRecord({"phase": "pretraining", "number": number}),
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
        audit_log.verify(self.state_dir / "audit.jsonl")
        return [x["event"] for x in audit_log.read(self.state_dir / "audit.jsonl")]


def join(folder: Path, server: str = "fed.example.org:9092") -> tuple[Path, Authority]:
    """Have north join; return its site.toml, and the consortium's authority."""
    (folder / "policy.toml").write_text(TEMPLATE)
    site_toml = folder / "site.toml"
    site_toml.write_text(
        'name = "north"\ndata.expression = "absent.csv"\ndata.scale = "log2p1"\n'
    )
    settings = SiteSettings.load(site_toml)
    authority = pki.new_authority("alliance")
    asked = SiteRequest.load(identity.create(settings))
    issued = pki.issue(
        *authority, asked.certificate_request, name="north", role="site", days=30
    )
    kit = {
        "consortium": "alliance",
        "site": "north",
        "server": server,
        "authority": pki.to_pem(authority[1]),
        "certificate": pki.to_pem(issued),
    }
    (folder / "kit.json").write_text(json.dumps(kit))
    identity.join(settings, folder / "kit.json")
    return site_toml, authority


def join_and_approve(folder: Path, contract: str) -> tuple[Path, Signed]:
    """Have north join, and approve a contract that ada signed."""
    site_toml, authority = join(folder)
    ada = pki.new_key()
    csr = pki.request(ada, "ada", "administrator")
    certificate = pki.issue(*authority, csr, name="ada", role="administrator", days=30)
    signed = Signed(contract).signed_by(ada, certificate)
    approvals = ApprovalStore.of(SiteSettings.load(site_toml))
    approvals.receive(signed)
    approvals.decide(signed.hash, "approved", by="Dr. N.", expires=TOMORROW)
    return site_toml, signed


@contextmanager
def death_at(point: str, nth: int = 1) -> Iterator[None]:
    """Have the process die where it reaches a failpoint for the n-th time."""
    reached: Counter[str] = Counter()

    def reach(name: str) -> None:
        assert name in failpoints.POINTS
        reached[name] += 1
        if name == point and reached[name] == nth:
            raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failpoints, "reach", reach)
        with pytest.raises(Died):
            yield


def round_of(message: Message) -> int:
    return int(str(message.content.config_records[keys.ROUND]["number"]))


def code(reply: RecordDict) -> str | None:
    """Return the code with which a request was refused."""
    record = reply.config_records.get(keys.REFUSAL)
    return None if record is None else str(record["code"])


def as_bytes(reply: RecordDict) -> bytes:
    sent: bytes = recorddict_to_proto(reply).SerializeToString(deterministic=True)
    return sent
