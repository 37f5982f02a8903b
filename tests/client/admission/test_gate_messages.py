"""What identifies a question to a hospital is exactly what it asks."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgex.client.admission.gate import Gate
from fedgex.common import keys
from fedgex.common.transport.records import to_arrays, to_record
from fedgex.common.trust import audit_log
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed

from ...support import hospital
from ...support.hospital import as_bytes, code, join_and_approve, of_study

ONCE = [keys.STATISTICS, keys.CROSS_PRODUCTS]
EXTRA: dict[str, Any] = {
    keys.EXCHANGE: ConfigRecord({keys.ATTEMPT: 2, "run": "run-1"}),
    keys.ROUND: ConfigRecord({"phase": "pretraining", "number": 1}),
    keys.MODEL: to_record({"weight": np.ones(1)}),
    "note": ConfigRecord({"again": True}),
}


class North:
    """A hospital that approved the contract, and counts what its app computes."""

    def __init__(self, site_toml: Path, contract: Signed) -> None:
        self.site_toml, self.contract = site_toml, contract
        self.computed: Counter[str] = Counter()

    def content(self, kind: str) -> RecordDict:
        """Return what the coordinator asks by the protocol."""
        records = of_study(Contract.read_signed(self.contract).study, 0)
        names = [keys.STUDY, keys.VOCABULARY]
        names += [keys.STANDARDISATION] * (kind == keys.CROSS_PRODUCTS)
        run = {"contract": self.contract.hash, "run": "run-1"}
        return RecordDict(
            {name: records[name] for name in names}
            | {
                keys.RUN: ConfigRecord(dict(run)),
                keys.SERVER: ConfigRecord({"version": version("fedgex")}),
            }
        )

    def app(self, message: Message, context: Context) -> Message:
        self.computed[message.metadata.message_type] += 1
        told: dict[str, Any] = {"times": self.computed.total()}
        return Message(RecordDict({keys.METRICS: MetricRecord(told)}), reply_to=message)

    def ask(self, kind: str, content: RecordDict) -> RecordDict:
        message = Message(content, 1, kind)
        message.metadata.__dict__["_message_id"] = "message-1"
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}
        )
        return Gate(self.site_toml, self.app)(message, context).content

    def why(self) -> str:
        """Return why the last request was refused, which stays in the log."""
        return str(
            audit_log.read(self.site_toml.with_name("state") / "audit.jsonl")[-1]["why"]
        )


@pytest.fixture
def north(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> North:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return North(*join_and_approve(tmp_path, hospital.CONTRACT))


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("kind", ONCE)
def test_another_record_does_not_make_another_question_of_what_is_asked_once(
    north: North, kind: str, extra: str
) -> None:
    first = north.ask(kind, north.content(kind))
    assert code(first) is None

    again = north.content(kind)
    again[extra] = EXTRA[extra]

    assert code(north.ask(kind, again)) == "FX-STUDY-006"
    assert f"'{extra}'" in north.why()
    assert as_bytes(north.ask(kind, north.content(kind))) == as_bytes(first)
    assert north.computed == {kind: 1}


@pytest.mark.parametrize("attempt", range(2, 6))
def test_no_number_of_attempts_has_the_cross_products_computed_again(
    north: North, attempt: int
) -> None:
    """Each answer under another standardisation reveals more of the patients."""
    kind = keys.CROSS_PRODUCTS
    north.ask(kind, north.content(kind))
    chosen = north.content(kind)
    chosen[keys.EXCHANGE] = ConfigRecord({keys.ATTEMPT: attempt, "run": "r"})
    arrays = dict(to_arrays(chosen.array_records[keys.STANDARDISATION]))
    chosen[keys.STANDARDISATION] = to_record(arrays | {"sd": np.full(2, attempt / 9)})

    assert code(north.ask(kind, chosen)) == "FX-STUDY-006"
    del chosen[keys.EXCHANGE]
    assert code(north.ask(kind, chosen)) == "FX-RUN-002"
    assert north.computed == {kind: 1}


@pytest.mark.parametrize("record", [keys.STUDY, keys.VOCABULARY, keys.RUN, keys.SERVER])
@pytest.mark.parametrize("kind", ONCE)
def test_another_key_does_not_make_another_question_either(
    north: North, kind: str, record: str
) -> None:
    content = north.content(kind)
    content.config_records[record]["note"] = "again"

    assert code(north.ask(kind, content)) == "FX-STUDY-006"
    assert "'note'" in north.why()
    assert not north.computed


def test_a_message_of_no_known_type_is_refused(north: North) -> None:
    content = north.content(keys.STATISTICS)

    assert code(north.ask("query.rows", content)) == "FX-STUDY-006"
    assert not north.computed
