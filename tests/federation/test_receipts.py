"""Every round leaves a receipt; between hospitals it is signed by everybody in it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedgex.client.app
from fedgex.common import keys
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import CheckpointError, FederationError, TrustError
from fedgex.common.models import checkpoint
from fedgex.common.transport.records import to_arrays, to_record
from fedgex.common.trust import pki
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.receipt import (
    Part,
    Receipt,
    parameters_digest,
    reply_digest,
    request_digest,
    verify_chain,
)
from fedgex.common.trust.signed import Signed, sign
from fedgex.server.consortium import annotated_toml, members
from fedgex.server.consortium.participants import Deployment
from fedgex.server.consortium.store import Consortium as Alliance
from fedgex.server.consortium.store import ConsortiumSettings
from fedgex.server.federation.run import conduct
from fedgex.server.journal import read
from fedgex.server.settings import ServerSettings

from .conftest import InProcessGrid

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

SHORT: dict[str, Any] = {
    "pretraining": {"rounds": 2},
    "classification": {"rounds": 0},
    "survival": {"rounds": 0},
    "cross_products": False,
}


def signed(run_dir: Path) -> list[Signed]:
    paths = sorted(run_dir.glob("checkpoints/*/receipt.json"))
    return [Signed.from_json(path.read_text(), str(path)) for path in paths]


def receipts(run_dir: Path) -> list[Receipt]:
    return [Receipt.read_signed(each) for each in signed(run_dir)]


# ---- in the simulator ----


def test_each_round_has_a_receipt_that_names_the_one_before(
    consortium: Consortium, finished: Finished
) -> None:
    found, texts = receipts(finished.run_dir), signed(finished.run_dir)

    assert [(r.index, r.phase, r.round) for r in found] == [
        (i, *each) for i, each in enumerate(finished.rounds, start=1)
    ]
    assert [r.previous for r in found] == ["0" * 64, *(t.hash for t in texts[:-1])]
    assert [r.incoming for r in found[1:]] == [r.outgoing for r in found[:-1]]
    assert found[-1].outgoing == parameters_digest(finished.final.parameters)
    for receipt, event in zip(found, finished.events("round"), strict=True):
        assert tuple(receipt.sites) == consortium.names
        for name, site in receipt.sites.items():
            assert site.state == "contributed"
            assert site.patients == event["sites"][name]["num_examples"]


def test_a_run_does_not_go_on_from_receipts_that_were_changed(
    consortium: Consortium, tmp_path: Path
) -> None:
    study = consortium.study(**SHORT)
    consortium.conduct(study, tmp_path, kill_after=len(consortium.names))
    (first,) = tmp_path.glob("checkpoints/*/receipt.json")
    content = Signed.from_json(first.read_text(), "test").content
    other = content.replace('"state":"contributed"', '"state":"late"')
    assert other != content
    manifest = first.with_name("manifest.json")
    first.write_text(Signed(other).to_json())
    told = json.loads(manifest.read_text())
    told["files"]["receipt.json"] = checkpoint.digest(first)
    manifest.write_text(json.dumps(told))

    with pytest.raises(TrustError, match="a reason stands with"):
        consortium.conduct(study, tmp_path)


def test_a_run_does_not_go_on_without_its_receipts(
    consortium: Consortium, tmp_path: Path
) -> None:
    study = consortium.study(**SHORT)
    consortium.conduct(study, tmp_path, kill_after=len(consortium.names))
    (first,) = tmp_path.glob("checkpoints/*/receipt.json")
    first.unlink()
    manifest = first.with_name("manifest.json")
    told = json.loads(manifest.read_text())
    del told["files"]["receipt.json"]
    manifest.write_text(json.dumps(told))

    with pytest.raises(CheckpointError, match="the receipt is missing"):
        consortium.conduct(study, tmp_path)


def test_a_site_with_an_update_far_beyond_the_others_is_quarantined_by_name(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fedgex.client.app.app

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        bad = consortium.names[1] in str(context.node_config["site-toml"])
        if bad and keys.UPDATE in reply.content.array_records:
            arrays = to_arrays(reply.content.array_records[keys.UPDATE])
            far = {name: (1e4 * array).astype("f4") for name, array in arrays.items()}
            reply.content[keys.UPDATE] = to_record(far)
        return reply

    monkeypatch.setattr(fedgex.client.app, "app", app)
    run = consortium.conduct(consortium.study(**SHORT), tmp_path)

    for receipt in receipts(tmp_path):
        site = receipt.sites[consortium.names[1]]
        assert site.state == "quarantined"
        assert "times the others' median" in str(site.reason)
        assert site.patients is None
    assert run.rounds == [("pretraining", 1), ("pretraining", 2)]


def test_genes_that_the_study_fixes_are_its_vocabulary(
    consortium: Consortium, finished: Finished, tmp_path: Path
) -> None:
    some = finished.final.vocabulary.genes[3:20]
    study = consortium.study(**SHORT, vocabulary={"genes": some[::-1]})

    run = consortium.conduct(study, tmp_path)

    assert run.final.vocabulary.genes == some
    assert len(run.final.standardisation.mean) == len(some)


# ---- between hospitals ----


Answer = Callable[[str, Message, RecordDict], RecordDict]


@dataclasses.dataclass
class Deployed:
    """An alliance of the consortium's sites, and a contract that it published."""

    consortium: Consortium
    alliance: Alliance
    keys: dict[str, pki.Key]
    contract: Signed

    @property
    def run_dir(self) -> Path:
        return self.alliance.folder / "runs" / "small-1"

    def conduct(self, monkeypatch: pytest.MonkeyPatch, change: Answer) -> None:
        """Run the contract's study; `change` gets every signed reply on its way."""
        honest = fedgex.client.app.app
        grid = InProcessGrid(self.consortium.sites)

        def app(message: Message, context: Context) -> Message:
            site = grid.names[context.node_id]
            if message.metadata.message_type == keys.CONTRACT:
                content = self._approval(site)
            else:
                content = self._sign(site, message, honest(message, context).content)
            return Message(change(site, message, content), reply_to=message)

        nodes = {name: node for node, name in grid.names.items()}
        (self.alliance.folder / "nodes.json").write_text(json.dumps(nodes))
        with monkeypatch.context() as patch:
            patch.setattr(fedgex.client.app, "app", app)
            conduct(grid, self.settings, Deployment.load(self.settings))

    @property
    def settings(self) -> ServerSettings:
        return ServerSettings.model_validate(
            {
                "state_dir": self.alliance.folder,
                "contract": self.contract.hash,
                "run": "small-1",
                "poll_s": 0.001,
                "start_deadline_s": 0.05,
            }
        )

    def _approval(self, site: str) -> RecordDict:
        decision = {
            "contract": self.contract.hash,
            "decision": "approved",
            "by": "Dr. N.",
            "at": datetime.now(UTC).isoformat(),
        }
        certificate = pki.from_pem(self.alliance.site(site).certificate)
        said = Signed(json.dumps(decision)).signed_by(self.keys[site], certificate)
        told = {"name": site, "decision": said.to_json()}
        return RecordDict({keys.SITE: ConfigRecord(told)})

    def _sign(
        self, site: str, message: Message, reply: RecordDict, **changed: Any
    ) -> RecordDict:
        about = message.content.config_records
        order = about.get(keys.ROUND, ConfigRecord())
        numbers = reply.metric_records.get(keys.METRICS)
        part = Part.read(
            {
                "contract": about[keys.RUN]["contract"],
                "run": about[keys.RUN]["run"],
                "site": site,
                "type": message.metadata.message_type,
                "phase": order.get("phase", ""),
                "round": order.get("number", 0),
                "request": request_digest(
                    message.metadata.message_type, message.content
                ),
                "reply": reply_digest(reply),
                "head": {"index": 1, "hash": "a" * 64},
                "patients": (numbers or {}).get(keys.NUM_EXAMPLES, "suppressed"),
            }
            | changed,
            "test",
        ).to_json()
        signature = sign(self.keys[site], part.encode())
        reply[keys.PART] = ConfigRecord(
            {
                keys.JSON: part,
                keys.SIGNATURE: signature,
                keys.CERTIFICATE: self.alliance.site(site).certificate,
            }
        )
        return reply


def honestly(site: str, message: Message, reply: RecordDict) -> RecordDict:
    return reply


@pytest.fixture
def deployed(consortium: Consortium, finished: Finished, tmp_path: Path) -> Deployed:
    shutil.copytree(
        consortium.sites, tmp_path / "sites"
    )  # each test's run is the first
    consortium = dataclasses.replace(consortium, sites=tmp_path / "sites")
    settings = ConsortiumSettings(
        name="alliance", host="fed.example.org", health_port=1
    )
    alliance = Alliance.init(tmp_path / "state", settings)
    path, asked = members.new_administrator("ada", tmp_path / "ada")
    members.add_administrator(alliance, path, asked.fingerprint)
    site_keys = {}
    for name in consortium.names:
        site_keys[name] = pki.new_key()
        request = SiteRequest(
            name=name,
            certificate_request=pki.request(site_keys[name], name, "site"),
            node_public_key=pki.public_ssh(pki.new_node_key()),
            version="0.1.0",
        )
        path = tmp_path / f"{name}.json"
        path.write_text(request.to_json())
        members.add_site(alliance, path, request.fingerprint)
    genes = finished.final.vocabulary.genes
    study = consortium.study(
        **SHORT,
        vocabulary={"genes": genes},
        rounds={"quorum": 3, "mandatory_sites": [consortium.names[0]]},
    )
    contract = Signed(
        annotated_toml.render(
            _contract(study.model_dump(mode="json"), genes, consortium.names)
        )
    )
    path = alliance.folder / "contracts" / f"{contract.hash}.json"
    path.write_text(contract.to_json())
    return Deployed(consortium, alliance, site_keys, contract)


def _contract(study: Any, genes: tuple[str, ...], sites: tuple[str, ...]) -> Any:
    return Contract.read(
        {
            "purpose": "restoration in a test",
            "expires": "2999-12-31",
            "code_version": "0.1",
            "vocabulary_hash": Vocabulary(genes).hash,
            "sites": sites,
            "study": study,
        },
        "test",
    )


def test_a_run_between_hospitals_ends_in_the_simulators_bits_with_signed_receipts(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Contract.read_signed(deployed.contract).study
    simulated = deployed.consortium.conduct(study, tmp_path / "simulated")

    deployed.conduct(monkeypatch, honestly)

    verify_chain(signed(deployed.run_dir), deployed.alliance.authority)
    last = checkpoint.load(checkpoint.find(deployed.run_dir))
    assert {n: a.tobytes() for n, a in last.parameters.items()} == {
        n: a.tobytes() for n, a in simulated.final.parameters.items()
    }
    for receipt in receipts(deployed.run_dir):
        assert {s.patients for s in receipt.sites.values()} != {None}
        assert all(site.signature for site in receipt.sites.values())
    heads = sorted(path.stem for path in (deployed.alliance.folder / "heads").iterdir())
    assert heads == sorted(deployed.consortium.names)


def test_the_last_receipt_travels_with_the_next_round(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[int, set[str]] = {}

    def look(site: str, message: Message, reply: RecordDict) -> RecordDict:
        records = message.content.config_records
        if message.metadata.message_type == keys.TRAIN:
            number = int(str(records[keys.ROUND]["number"]))
            sent.setdefault(number, set()).add(str(records[keys.RECEIPT][keys.JSON]))
        return reply

    deployed.conduct(monkeypatch, look)

    assert sent == {1: {""}, 2: {signed(deployed.run_dir)[0].to_json()}}


def test_last_rounds_reply_sent_again_is_quarantined_and_the_others_go_on(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayer, kept = deployed.consortium.names[2], {}

    def replay(site: str, message: Message, reply: RecordDict) -> RecordDict:
        if site == replayer and message.metadata.message_type == keys.TRAIN:
            return kept.setdefault("reply", reply)
        return reply

    deployed.conduct(monkeypatch, replay)

    first, second = receipts(deployed.run_dir)
    assert first.sites[replayer].state == "contributed"
    assert second.sites[replayer].state == "quarantined"
    assert "signed for round 1, this is 2; signed for request " in str(
        second.sites[replayer].reason
    )
    assert second.sites[replayer].part is None
    verify_chain(signed(deployed.run_dir), deployed.alliance.authority)


def test_an_update_that_counts_by_more_patients_than_its_site_signed_is_quarantined(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = deployed.consortium.names[2]

    def lie(site: str, message: Message, reply: RecordDict) -> RecordDict:
        if site == liar and message.metadata.message_type == keys.TRAIN:
            true = reply.metric_records[keys.METRICS][keys.NUM_EXAMPLES]
            reply.metric_records[keys.METRICS][keys.NUM_EXAMPLES] = 10_000
            del reply[keys.PART]
            reply = deployed._sign(site, message, reply, patients=true)
        return reply

    deployed.conduct(monkeypatch, lie)

    for receipt in receipts(deployed.run_dir):
        assert receipt.sites[liar].state == "quarantined"
        assert "not the one that it signed" in str(receipt.sites[liar].reason)
    verify_chain(signed(deployed.run_dir), deployed.alliance.authority)


def test_who_did_not_approve_is_in_every_receipt_with_the_reason(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = deployed.consortium.names[3]

    def decline(site: str, message: Message, reply: RecordDict) -> RecordDict:
        if site == absent:
            code = ConfigRecord({"code": "FX-STUDY-002"})
            return RecordDict({keys.REFUSAL: code})
        return reply

    deployed.conduct(monkeypatch, decline)

    for receipt in receipts(deployed.run_dir):
        site = receipt.sites[absent]
        assert (site.state, site.reason) == ("refused", "FX-STUDY-002")
    events = read(deployed.run_dir / "journal.jsonl")
    (left_out,) = [e for e in events if e["event"] == "not-answered"]
    assert left_out["site"] == absent


def test_without_a_mandatory_site_nothing_begins_and_everybodys_reason_is_told(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    mandatory = deployed.consortium.names[0]

    def unapproved(site: str, message: Message, reply: RecordDict) -> RecordDict:
        if site == mandatory:
            code = ConfigRecord({"code": "FX-STUDY-001"})
            return RecordDict({keys.REFUSAL: code})
        return reply

    with pytest.raises(FederationError) as caught:
        deployed.conduct(monkeypatch, unapproved)

    assert f"and mandatory ['{mandatory}'] did not" in str(caught.value)
    assert f"{mandatory}: refused (FX-STUDY-001)" in str(caught.value)
    assert not list(deployed.run_dir.glob("checkpoints/*"))
    assert read(deployed.run_dir / "journal.jsonl")[-1]["event"] == "run-failed"


def test_a_site_that_takes_anothers_name_is_left_out(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, liar = deployed.consortium.names[0], deployed.consortium.names[1]

    def lie(site: str, message: Message, reply: RecordDict) -> RecordDict:
        if site == liar and message.metadata.message_type == keys.PREPARE:
            reply.config_records[keys.SITE]["name"] = first
            del reply[keys.PART]
            return deployed._sign(site, message, reply)
        return reply

    deployed.conduct(monkeypatch, lie)

    for receipt in receipts(deployed.run_dir):
        assert receipt.sites[liar].state == "quarantined"
        assert receipt.sites[first].state == "contributed"


def test_a_resumed_run_between_hospitals_verifies_its_chain(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed.conduct(monkeypatch, honestly)
    path = max(deployed.run_dir.glob("checkpoints/*/receipt.json"))
    shutil.rmtree(path.parent)
    (path,) = deployed.run_dir.glob("checkpoints/*/receipt.json")
    text = Signed.from_json(path.read_text(), "test")
    forged = dataclasses.replace(text.signatures[0], signature="AAAA")
    path.write_text(Signed(text.content, (forged,)).to_json())
    manifest = path.with_name("manifest.json")
    told = json.loads(manifest.read_text())
    told["files"]["receipt.json"] = checkpoint.digest(path)
    manifest.write_text(json.dumps(told))

    with pytest.raises(TrustError, match="receipt 1 does not hold"):
        deployed.conduct(monkeypatch, honestly)


def test_a_run_between_hospitals_goes_on_from_its_last_receipt(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed.conduct(monkeypatch, honestly)
    whole = checkpoint.load(checkpoint.find(deployed.run_dir))
    shutil.rmtree(max(deployed.run_dir.glob("checkpoints/*")))

    deployed.conduct(monkeypatch, honestly)

    again = checkpoint.load(checkpoint.find(deployed.run_dir))
    verify_chain(signed(deployed.run_dir), deployed.alliance.authority)
    for name, array in whole.parameters.items():
        assert np.array_equal(array, again.parameters[name])
