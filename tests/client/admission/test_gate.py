"""What the gate of a hospital lets in and out, one message at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.admission.gate import Gate
from fedgex.client.cli import app as command
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.transport.records import to_record
from fedgex.common.trust import audit_log, bundle, pki
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.signed import Signed

if TYPE_CHECKING:
    from ...conftest import Release

TOMORROW = datetime.now(UTC).date() + timedelta(days=1)


@pytest.fixture(autouse=True)
def _flower_knows_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Hospital:
    """North, a hospital of the consortium that made `release`; its app is not asked."""

    def __init__(self, folder: Path, release: Release) -> None:
        self.release, self.site_toml = release, folder / "site.toml"
        self.state_dir = folder / "state"
        server = "fedgex.example.org:9092"
        self._run("init", folder, "--name", "north", "--server", server)
        request = SiteRequest.load(self.state_dir / "request.json").certificate_request
        issued = pki.issue(
            release.authority_key,
            release.authority,
            request,
            name="north",
            role="site",
            days=30,
        )
        kit = {
            "format": 1,
            "consortium": "alliance",
            "site": "north",
            "server": server,
            "authority": pki.to_pem(release.authority),
            "certificate": pki.to_pem(issued),
        }
        (folder / "kit.json").write_text(json.dumps(kit))
        self._run("join", self.site_toml, folder / "kit.json")

    @property
    def contract(self) -> Signed:
        return self.release.evidence.contract

    def _run(self, *args: object) -> None:
        result = CliRunner().invoke(command, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output

    def decide(self, verdict: Any, **more: Any) -> None:
        approvals = ApprovalStore.of(SiteSettings.load(self.site_toml))
        approvals.decide(self.contract.hash, verdict, by="Dr. Curie", **more)

    def receive(self) -> RecordDict:
        """Send the contract, and return the answer."""
        record = ConfigRecord({keys.JSON: self.contract.to_json()})
        content = RecordDict({keys.SIGNED_CONTRACT: record})
        return self.ask(keys.CONTRACT, content, run="")

    def deliver(self, sent: bytes, run: str = "run-1") -> RecordDict:
        """Send a released model, and return the answer."""
        array = np.frombuffer(sent, dtype=np.uint8)
        content = RecordDict({keys.BUNDLE: to_record({keys.BUNDLE: array})})
        return self.ask(keys.RELEASE, content, run=run)

    def ask(self, kind: str, content: RecordDict, run: str) -> RecordDict:
        content[keys.RUN] = ConfigRecord({"contract": self.contract.hash, "run": run})
        message = Message(content, 1, kind)
        message.metadata.__dict__["_message_id"] = "message-1"
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}
        )
        return Gate(self.site_toml, _never)(message, context).content

    @property
    def models(self) -> list[str]:
        return sorted(path.name for path in self.state_dir.glob("models/*"))

    @property
    def log(self) -> list[dict[str, Any]]:
        return list(audit_log.read(self.state_dir / "audit.jsonl"))


def _never(message: Message, context: Context) -> Message:
    raise AssertionError("the app is not asked")


@pytest.fixture
def released(release: Callable[..., Release]) -> Release:
    return release()


@pytest.fixture
def north(tmp_path: Path, released: Release) -> Hospital:
    """Return the hospital after it approved the contract."""
    hospital = Hospital(tmp_path / "north", released)
    hospital.receive()
    hospital.decide("approved", expires=TOMORROW)
    return hospital


def code(reply: RecordDict) -> str | None:
    if keys.REFUSAL not in reply:
        return None
    assert set(reply) <= {keys.REFUSAL, keys.PART}
    assert list(reply.config_records[keys.REFUSAL]) == ["code"]
    return str(reply.config_records[keys.REFUSAL]["code"])


# ---- contracts ----


def test_an_approval_leaves_as_it_was_signed(north: Hospital) -> None:
    site = north.receive().config_records[keys.SITE]

    signed = Signed.from_json(str(site["decision"]), "the answer")
    assert site["name"] == "north"
    assert signed.signers(north.release.authority, "site") == ("north",)
    told = json.loads(signed.content)
    assert (told["decision"], told["by"]) == ("approved", "Dr. Curie")
    assert told["reason"] == ""


@pytest.mark.parametrize(
    ("approved", "verdict", "expected"),
    [(False, "rejected", "FX-STUDY-002"), (True, "withdrawn", "FX-STUDY-003")],
)
def test_why_a_contract_was_declined_does_not_leave(
    tmp_path: Path, released: Release, approved: bool, verdict: str, expected: str
) -> None:
    north = Hospital(tmp_path / "north", released)
    assert code(north.receive()) == "FX-STUDY-001"
    if approved:
        north.decide("approved", expires=TOMORROW)
    north.decide(verdict, reason="the ethics board said no")

    reply = north.receive()

    assert code(reply) == expected
    assert "ethics" not in str(reply)


# ---- released models ----


def test_a_released_model_is_kept_byte_for_byte_and_can_be_verified(
    north: Hospital, released: Release
) -> None:
    sent = released.write().read_bytes()

    reply = north.deliver(sent)

    assert reply.config_records[keys.SITE] == ConfigRecord({"name": "north"})
    kept = north.state_dir / "models" / "run-1.fedgex"
    assert kept.read_bytes() == sent
    assert bundle.verify(kept, released.authority).release.run == "run-1"
    (line,) = [line for line in north.log if line["event"] == "model-received"]
    assert (line["run"], line["bytes"]) == ("run-1", len(sent))


def test_a_model_delivered_twice_is_kept_once(
    north: Hospital, released: Release
) -> None:
    sent = released.write().read_bytes()
    north.deliver(sent)

    assert code(north.deliver(sent)) is None

    assert north.models == ["run-1.fedgex"]


def _torn(released: Release) -> bytes:
    return released.write().read_bytes()[:-1]


def _changed(released: Release) -> bytes:
    sent = bytearray(released.write().read_bytes())
    sent[len(sent) // 2] ^= 1
    return bytes(sent)


def _ordered_by_one(released: Release) -> bytes:
    return released.write(orders={"ada": released.order("ada")}).read_bytes()


@pytest.mark.parametrize(
    "sent",
    [_torn, _changed, _ordered_by_one, lambda released: b"", lambda released: b"model"],
    ids=["torn", "one bit changed", "one order too few", "nothing", "no bundle"],
)
def test_a_model_that_cannot_be_verified_is_refused_and_not_kept(
    north: Hospital, released: Release, sent: Callable[[Release], bytes]
) -> None:
    reply = north.deliver(sent(released))

    assert code(reply) == "FX-RUN-004"
    assert north.models == []
    assert [line["event"] for line in north.log][-1] == "refused"


def test_the_model_of_another_consortium_is_refused(
    tmp_path: Path, released: Release, release: Callable[..., Release]
) -> None:
    sent = released.write().read_bytes()
    (tmp_path / "run-1").rename(tmp_path / "another")
    north = Hospital(tmp_path / "north", release())  # an authority of the same name
    north.receive()
    north.decide("approved", expires=TOMORROW)

    assert code(north.deliver(sent)) == "FX-RUN-004"
    assert north.models == []


def test_a_model_under_the_name_of_another_run_is_refused(
    north: Hospital, released: Release
) -> None:
    assert code(north.deliver(released.write().read_bytes(), "run-2")) == "FX-RUN-004"
    assert north.models == []


def test_a_refused_model_leaves_the_one_that_is_there(
    north: Hospital, released: Release
) -> None:
    sent = released.write().read_bytes()
    north.deliver(sent)

    north.deliver(sent[:-1])

    assert (north.state_dir / "models" / "run-1.fedgex").read_bytes() == sent


def test_a_model_that_was_not_packed_is_refused(north: Hospital) -> None:
    record = ArrayRecord({keys.BUNDLE: Array(np.zeros(3, np.uint8))})

    reply = north.ask(keys.RELEASE, RecordDict({keys.BUNDLE: record}), run="run-1")

    assert code(reply) == "FX-RUN-004"


def test_no_model_is_taken_under_a_contract_that_was_not_approved(
    tmp_path: Path, released: Release
) -> None:
    north = Hospital(tmp_path / "north", released)
    north.receive()

    assert code(north.deliver(released.write().read_bytes())) == "FX-STUDY-001"
    assert north.models == []
