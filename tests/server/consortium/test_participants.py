"""A run between hospitals: who may take part, and whose word counts for what."""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedgex.common import keys
from fedgex.common.errors import ConfigError, FederationError, TrustError
from fedgex.common.messages.requests import Envelope
from fedgex.common.transport.records import to_arrays
from fedgex.common.trust import contract as contract_module
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Head
from fedgex.common.trust.receipt import Part, Receipt, reply_digest, request_digest
from fedgex.common.trust.signed import Signed
from fedgex.common.trust.signed import sign as signature_of
from fedgex.server.consortium import contracts, drafts, members
from fedgex.server.consortium import participants as deployment_module
from fedgex.server.consortium.participants import Deployment, deliver, publish
from fedgex.server.federation.participants import Activity, Request, SignedReply
from fedgex.server.settings import ServerSettings

SITES = ("north", "south")
NODES = {"north": 11, "south": 12}
ROUND_3 = Request(
    type=keys.TRAIN,
    message=Envelope,
    group="pretraining-3",
    phase="pretraining",
    round=3,
)
ASKED = request_digest(keys.TRAIN, RecordDict())


@pytest.fixture(autouse=True)
def _flower_knows_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def contract(admitted: Any, drafted: dict[str, Path]) -> str:
    """Return the hash of a published contract between north and south."""
    text = drafts.draft(
        admitted.consortium,
        drafted["study"],
        drafted["genes"],
        purpose="restoration of three genes",
        expires=date(2999, 12, 31),
        sites=SITES,
        administrators=2,
        no_secure_aggregation="a test",
    )
    drafted["contract"].write_text(text)
    key = admitted.key("ada")
    contracts.sign(drafted["contract"], key, admitted.consortium.administrator(key)[1])
    contracts.publish(admitted.consortium, drafted["contract"], key)
    return Signed(text).hash


@pytest.fixture
def settings(admitted: Any, contract: str) -> ServerSettings:
    return ServerSettings.model_validate(
        {
            "state_dir": admitted.folder,
            "contract": contract,
            "run": "small-1",
            "poll_s": 0.001,
            "start_deadline_s": 0.05,
        }
    )


@pytest.fixture
def deployed(settings: ServerSettings) -> Deployment:
    return Deployment.load(settings)


# ---- opening ----


def test_a_contract_that_was_changed_is_refused(
    admitted: Any, contract: str, settings: ServerSettings
) -> None:
    path = admitted.folder / "contracts" / f"{contract}.json"
    path.write_text(path.read_text().replace("three genes", "all genes!!"))

    with pytest.raises(TrustError, match=f"expected {contract[:16]}"):
        Deployment.load(settings)


def test_an_expired_contract_is_refused(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(3000, 1, 1, tzinfo=tz)

    monkeypatch.setattr(contract_module, "datetime", Later)

    with pytest.raises(FederationError, match="expired on 2999-12-31"):
        Deployment.load(settings)


@pytest.mark.parametrize("patch", ["0", "7", "7rc1"])
def test_an_upgrade_within_the_contracts_window_goes_on(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, patch: str
) -> None:
    window = ".".join(version("fedgex").split(".")[:2])
    monkeypatch.setattr(deployment_module, "version", lambda name: f"{window}.{patch}")

    assert Deployment.load(settings).run == "small-1"


def test_another_minor_version_is_refused_and_says_what_to_install(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = ".".join(version("fedgex").split(".")[:2])
    monkeypatch.setattr(deployment_module, "version", lambda name: "7.3.1")

    with pytest.raises(ConfigError, match=rf"runs fedgex 7\.3\.1.* {window}\.x here"):
        Deployment.load(settings)


# ---- what others write ----


def test_nodes_and_activity_are_read_anew_each_time(
    admitted: Any, deployed: Deployment
) -> None:
    assert deployed.nodes() == {}
    assert deployed.activity() == {}

    (admitted.folder / "nodes.json").write_text(json.dumps(NODES))
    told = {"11": {"moved": 5.0, "idle": None}}
    (admitted.folder / "activity.json").write_text(json.dumps(told))

    assert deployed.nodes() == NODES
    assert deployed.activity() == {11: Activity(moved=5.0, idle=None)}


def test_a_site_is_barred_as_soon_as_it_is_revoked(
    admitted: Any, deployed: Deployment
) -> None:
    assert deployed.barred() == {}

    members.revoke_site(admitted.consortium, "south", "left")

    assert deployed.barred() == {"south": "revoked"}


# ---- parts ----


@pytest.fixture
def sign(admitted: Any, contract: str) -> Callable[..., RecordDict]:
    """Return a reply with its part, as north signs it but for what is given."""

    def sign(signer: str = "north", **changed: Any) -> RecordDict:
        reply = RecordDict({keys.SITE: ConfigRecord({"name": "north"})})
        values = {
            "contract": contract,
            "run": "small-1",
            "site": "north",
            "type": keys.TRAIN,
            "phase": "pretraining",
            "round": 3,
            "request": ASKED,
            "reply": reply_digest(reply),
            "head": {"index": 7, "hash": "a" * 64},
            "patients": 40,
        }
        text = Part.read(values | changed, "test").to_json()
        signature = signature_of(admitted.sites[signer], text.encode())
        certificate = admitted.consortium.sites()[signer].certificate
        reply[keys.PART] = ConfigRecord(
            {
                keys.JSON: text,
                keys.SIGNATURE: signature,
                keys.CERTIFICATE: certificate,
            }
        )
        return reply

    return sign


def test_a_reply_that_its_site_signed_is_taken(
    deployed: Deployment, sign: Callable[..., RecordDict]
) -> None:
    signed = deployed.verify("north", ROUND_3, ASKED, sign())

    assert signed is not None
    assert signed.part.head == Head(7, "a" * 64)
    assert signed.part.patients == 40


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"round": 2}, "signed for round 2, this is 3"),
        ({"phase": "survival"}, "signed for phase survival, this is pretraining"),
        ({"type": keys.PREPARE}, "signed for type query.prepare, this is train"),
        ({"run": "small-0"}, "signed for run small-0, this is small-1"),
        ({"contract": "0" * 64}, "signed for contract 000000000000, this is"),
        ({"request": "1" * 64}, f"request 111111111111, this is {ASKED[:12]}"),
        ({"reply": "2" * 64}, "signed for reply 222222222222, this is"),
        ({"site": "south", "signer": "south"}, "the signature does not fit"),
        ({"signer": "south"}, "the signature does not fit"),
        ({"site": "south"}, 'the part signed by "north" is about "south"'),
    ],
)
def test_a_part_of_something_else_is_refused_and_says_of_what(
    deployed: Deployment,
    sign: Callable[..., RecordDict],
    changed: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(TrustError, match=reason):
        deployed.verify("north", ROUND_3, ASKED, sign(**changed))


def test_a_reply_without_a_part_is_refused_unless_it_is_a_temporary_refusal(
    deployed: Deployment,
) -> None:
    unsigned = RecordDict({keys.SITE: ConfigRecord({"name": "north"})})
    final = RecordDict({keys.REFUSAL: ConfigRecord({"code": "FX-RUN-002"})})
    paused = RecordDict({keys.REFUSAL: ConfigRecord({"code": "FX-SITE-004"})})

    with pytest.raises(TrustError, match="the reply is not signed"):
        deployed.verify("north", ROUND_3, ASKED, unsigned)
    with pytest.raises(TrustError, match="the refusal FX-RUN-002 is not signed"):
        deployed.verify("north", ROUND_3, ASKED, final)
    assert deployed.verify("north", ROUND_3, ASKED, paused) is None


def test_a_revoked_sites_signature_counts_no_more(
    admitted: Any, deployed: Deployment, sign: Callable[..., RecordDict]
) -> None:
    members.revoke_site(admitted.consortium, "north", "left")

    with pytest.raises(TrustError, match="was revoked"):
        deployed.verify("north", ROUND_3, ASKED, sign())


def test_a_committed_receipt_and_its_heads_travel_with_the_next_message(
    deployed: Deployment, sign: Callable[..., RecordDict]
) -> None:
    before = deployed.envelope("north").to_records()
    assert before[keys.RECEIPT] == {keys.JSON: "", "head": ""}
    signed = cast(SignedReply, deployed.verify("north", ROUND_3, ASKED, sign()))
    receipt = deployed.sign(
        Receipt.read(
            {
                "contract": deployed.signed.hash,
                "run": "small-1",
                "index": 1,
                "phase": "pretraining",
                "round": 1,
                "incoming": "b" * 64,
                "outgoing": "c" * 64,
                "sites": {},
                "previous": "0" * 64,
                "time": datetime.now(UTC),
            },
            "test",
        )
    )

    deployed.committed(receipt, {"north": signed})

    authority = deployed.consortium.authority
    assert receipt.signers(authority, "coordinator") == ("alliance",)
    records = deployed.envelope("north").to_records().config_records
    assert records[keys.RECEIPT]["head"] == f"7:{'a' * 64}"
    assert records[keys.RECEIPT][keys.JSON] == receipt.to_json()
    south = deployed.envelope("south").receipt
    assert south is not None
    assert south.head == ""
    assert records[keys.RUN] == {
        "contract": deployed.signed.hash,
        "run": "small-1",
    }


# ---- publishing and delivering ----


class Sites:
    """A grid whose sites answer at once."""

    def __init__(self, answers: Mapping[int, RecordDict]) -> None:
        self.answers = answers
        self.sent: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        (message,) = messages
        self.sent[f"message-{len(self.sent)}"] = message
        return [list(self.sent)[-1]]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (name,) = message_ids
        message = self.sent[name]
        return [Message(self.answers[message.metadata.dst_node_id], reply_to=message)]


def refusal(code: str) -> RecordDict:
    return RecordDict({keys.REFUSAL: ConfigRecord({"code": code})})


@pytest.fixture
def approval(admitted: Any, contract: str) -> Callable[[str], RecordDict]:
    """Return what a site answers to a contract that it approved."""

    def approval(site: str) -> RecordDict:
        decision = {
            "contract": contract,
            "decision": "approved",
            "by": "Dr. N.",
            "at": datetime.now(UTC).isoformat(),
            "expires": "2999-01-01",
            "reason": "",
        }
        certificate = pki.from_pem(admitted.consortium.sites()[site].certificate)
        signed = Signed(json.dumps(decision)).signed_by(
            admitted.sites[site], certificate
        )
        told = ConfigRecord({"name": site, "decision": signed.to_json()})
        return RecordDict({keys.SITE: told})

    return approval


@pytest.fixture
def nodes(admitted: Any) -> None:
    (admitted.folder / "nodes.json").write_text(json.dumps(NODES))


@pytest.mark.usefixtures("nodes")
def test_publishing_takes_the_contract_to_each_site_once(
    admitted: Any,
    contract: str,
    settings: ServerSettings,
    approval: Callable[[str], RecordDict],
) -> None:
    grid = Sites({11: approval("north"), 12: refusal("FX-STUDY-001")})

    publish(cast(Grid, grid), settings.model_copy(update={"job": "publish"}))

    assert len(grid.sent) == 2
    for message in grid.sent.values():
        sent = message.content.config_records
        signed = Signed.from_json(str(sent[keys.SIGNED_CONTRACT][keys.JSON]), "sent")
        assert signed.hash == contract
    path = admitted.folder / "contracts" / contract / "delivered.json"
    assert json.loads(path.read_text())["sites"] == {
        "north": {"state": "contributed", "reason": None},
        "south": {"state": "refused", "reason": "FX-STUDY-001"},
    }
    answers = contracts.answers(admitted.consortium, contract)
    assert {name: a.decision for name, a in answers.items()} == {"north": "approved"}


@pytest.mark.usefixtures("nodes")
def test_an_approval_that_another_site_signed_is_quarantined(
    admitted: Any,
    contract: str,
    settings: ServerSettings,
    approval: Callable[[str], RecordDict],
) -> None:
    grid = Sites({11: approval("south"), 12: RecordDict()})

    publish(cast(Grid, grid), settings)

    path = admitted.folder / "contracts" / contract / "delivered.json"
    told = json.loads(path.read_text())["sites"]
    assert told["north"]["state"] == told["south"]["state"] == "quarantined"
    assert "signed by south, expected north" in told["north"]["reason"]


@pytest.mark.usefixtures("nodes")
def test_a_released_model_is_delivered_byte_for_byte_and_noted(
    admitted: Any, settings: ServerSettings
) -> None:
    bundle = admitted.folder / "releases" / "small-1.fedgex"
    bundle.write_bytes(bytes(range(256)))
    got = RecordDict({keys.SITE: ConfigRecord({"name": "north"})})
    grid = Sites({11: got})

    deliver(cast(Grid, grid), settings)

    (message,) = grid.sent.values()
    record = message.content.array_records[keys.BUNDLE]
    array = to_arrays(record)[keys.BUNDLE]
    assert array.dtype == np.uint8
    assert array.tobytes() == bundle.read_bytes()
    path = admitted.folder / "releases" / "small-1.delivered.json"
    assert json.loads(path.read_text())["sites"] == {
        "north": {"state": "contributed", "reason": None},
        "south": {"state": "failed", "reason": "its node is not connected"},
    }


def test_a_verified_part_keeps_the_text_that_was_signed(
    deployed: Deployment, sign: Callable[..., RecordDict]
) -> None:
    reply = sign()

    signed = cast(SignedReply, deployed.verify("north", ROUND_3, ASKED, reply))

    record = reply.config_records[keys.PART]
    assert (signed.text, signed.signature) == (
        record[keys.JSON],
        record[keys.SIGNATURE],
    )
