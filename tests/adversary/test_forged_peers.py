"""A coordinator that plays all other hospitals, to read the update of one.

It holds the authority's key, issues certificates under the names that a contract lists,
and passes its own keys on as theirs. Gates, keys, contracts and logs are real.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

import fedgex.client.app
from fedgex.client import identity
from fedgex.client.admission.approvals import Refusal
from fedgex.client.admission.gate import Gate
from fedgex.client.admission.reply_cache import from_bytes
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.codes import Code
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import FederationError, TrustError
from fedgex.common.messages.fields import (
    AdvertisedKeys,
    Attempt,
    LastReceipt,
    Participant,
    Revocations,
    Round,
    Run,
    Server,
    Shared,
    SignedText,
)
from fedgex.common.messages.replies import (
    KeysReply,
    SharesReply,
    StatisticsReply,
    TrainReply,
)
from fedgex.common.messages.requests import (
    ContractRequest,
    Envelope,
    KeysRequest,
    PrepareRequest,
    SharesRequest,
    StatisticsRequest,
    TrainRequest,
)
from fedgex.common.models import tasks
from fedgex.common.secure_aggregation import protocol, vectors
from fedgex.common.secure_aggregation.protocol import Context, Group, PrivateKeys
from fedgex.common.secure_aggregation.vectors import FixedPoint
from fedgex.common.study import Study
from fedgex.common.transport.records import floats, to_arrays, to_record
from fedgex.common.trust import pinning, pki
from fedgex.common.trust.audit_log import Head
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.receipt import Part, reply_digest, verify_chain
from fedgex.common.trust.signed import Signed, sign
from fedgex.server.consortium import members

from ..federation.conftest import write_hospitals
from ..support import alliance as alliances
from ..support.alliance import RUN, STUDY, Alliance, GateGrid, code, round_of

VICTIM, *OTHERS = NAMES = tuple(f"hospital-0{i}" for i in (1, 2, 3, 4))
CLIP = 10.0
SECURE: dict[str, Any] = STUDY | {
    "name": "protected",
    "cross_products": False,
    "strategy": {"name": "fedavg", "weights": "equal", "update": "delta"},
    "secure_aggregation": {"clip": CLIP},
    "rounds": {"quorum": 4, "mandatory_sites": NAMES},
}


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Alliance:
    folder = tmp_path_factory.mktemp("forged")
    consortium = write_hospitals(folder / "data")
    assert consortium.names == NAMES
    return alliances.found(folder / "alliance", consortium.sites, NAMES)


@pytest.fixture
def alliance(founded: Alliance, tmp_path: Path) -> Alliance:
    shutil.copytree(founded.folder, tmp_path / "alliance")
    return Alliance(tmp_path / "alliance", NAMES)


@dataclass
class Coordinator:
    """A dishonest coordinator, which asks one hospital and plays the others."""

    alliance: Alliance
    contract: str
    study: Study
    grid: GateGrid
    context: Context
    forged: dict[str, PrivateKeys] = field(default_factory=dict)

    @classmethod
    def of(cls, alliance: Alliance, study: Study) -> Coordinator:
        contract = alliance.agree(study)
        context = Context(
            contract=contract, run=RUN, phase="pretraining", round=1, attempt=1
        )
        return cls(alliance, contract, study, alliance.grid(), context)

    def ask(self, request: Envelope, site: str = VICTIM) -> RecordDict:
        kind = {
            ContractRequest: keys.CONTRACT,
            PrepareRequest: keys.PREPARE,
            StatisticsRequest: keys.STATISTICS,
            KeysRequest: keys.SECURE_KEYS,
            SharesRequest: keys.SECURE_SHARES,
            TrainRequest: keys.TRAIN,
        }[type(request)]
        asked = dataclasses.replace(
            request,
            server=Server(version=version("fedgex")),
            run=Run(contract=self.contract, run=RUN),
            receipt=LastReceipt(json_="", head=""),
        )
        node = self.grid.nodes[site].number
        message = Message(asked.to_records(), node, kind)
        message.metadata.__dict__["_message_id"] = kind
        return self.grid.ask(site, message).content

    def offer(self, site: str = VICTIM) -> RecordDict:
        """Send the contract, with the list of revoked certificates."""
        text = self.alliance.signed(self.contract).to_json()
        revoked = self.alliance.consortium.revocation_list
        asked = ContractRequest(
            contract=SignedText(json_=text), revocations=Revocations(crl=revoked)
        )
        return self.ask(asked, site)

    @property
    def secure(self) -> dict[str, Any]:
        """What the requests of a secure round hold."""
        return {
            "study": self.study,
            "vocabulary": Vocabulary(tuple(sorted(self.study.vocabulary.genes))),
            "round": Round(phase="pretraining", number=1),
        }

    @cached_property
    def standardisation(self) -> Standardisation:
        """The victim's own, which it has no reason to refuse."""
        asked = {name: self.secure[name] for name in ("study", "vocabulary")}
        sums = StatisticsReply.from_records(self.ask(StatisticsRequest(**asked))).sums
        return Standardisation(mean=sums.mean, sd=sums.sd)

    def genuine(self, site: str) -> Participant:
        """Ask a hospital for its keys, and pass them on as they are."""
        self.ask(PrepareRequest(study=self.study), site)
        request = KeysRequest(
            **self.secure,
            standardisation=self.standardisation,
            attempt=Attempt(attempt=1, run=RUN),
        )
        found = KeysReply.from_records(self.ask(request, site))
        public, part = found.advertised.public, found.part
        assert part is not None
        return Participant(
            channel=public.channel.hex(),
            mask=public.mask.hex(),
            measured=public.measured.hex(),
            **part.model_dump(),
        )

    def share(self, participants: dict[str, Participant]) -> RecordDict:
        """Ask the victim for shares for these hospitals."""
        return self.ask(
            SharesRequest(
                **self.secure,
                attempt=Attempt(attempt=1, run=RUN),
                participants=participants,
            )
        )

    def certificate(self, key: pki.Key, name: str) -> x509.Certificate:
        """Issue a certificate under another hospital's name."""
        asked = pki.request(key, name, "site")
        return self.alliance.consortium.issue(asked, name, "site")

    def participant(self, name: str, measured: NDArray[np.bool_]) -> Participant:
        """Make keys under another hospital's name, and sign them in its place."""
        own = self.forged[name] = PrivateKeys.new()
        advertised = AdvertisedKeys.of(own.public(measured), 1)
        signing = pki.new_key()
        part = Part(
            contract=self.contract,
            run=RUN,
            site=name,
            type=keys.SECURE_KEYS,
            phase="pretraining",
            round=1,
            request="d" * 64,
            reply=reply_digest(KeysReply(advertised=advertised).to_records()),
            head=Head(1, "e" * 64),
            patients="suppressed",
        ).to_json()
        return Participant(
            channel=advertised.channel,
            mask=advertised.mask,
            measured=advertised.measured,
            json_=part,
            signature=sign(signing, part.encode()),
            certificate=pki.to_pem(self.certificate(signing, name)),
        )

    def unmasked(self) -> RecordDict | NDArray[np.float32]:
        """Return the update of one hospital, or its refusal of the forged keys."""
        reply = self.offer()
        if code(reply) is not None:
            return reply
        own, genes = self.genuine(VICTIM), self.secure["vocabulary"]
        measured = protocol.measured(own.public, len(genes))
        participants = {n: self.participant(n, measured) for n in OTHERS}
        participants[VICTIM] = own
        group = Group(self.context, {n: p.public for n, p in participants.items()})
        reply = self.share(participants)
        if code(reply) is not None:
            return reply
        boxes = SharesReply.from_records(reply).boxes
        held = {
            name: protocol.unseal(group, own, VICTIM, name, boxes[name])
            for name, own in self.forged.items()
        }
        seed = protocol._joined(
            group, VICTIM, {VICTIM: {name: each.seed for name, each in held.items()}}
        )

        # ---- the masked update, and what is under the masks ----
        sent = {
            name: protocol.seal(
                group, own, name, VICTIM, protocol.share_out(group, own)[VICTIM]
            )
            for name, own in self.forged.items()
        }
        model = tasks.initial(self.study, len(genes))
        reply = self.ask(
            TrainRequest(
                **self.secure,
                standardisation=self.standardisation,
                model=to_record(model),
                attempt=Shared(attempt=1, run=RUN, sharers=NAMES),
                boxes=sent,
            )
        )
        masked = TrainReply.from_records(reply).masked
        assert masked is not None
        words = np.asarray(to_arrays(masked)[keys.MASKED]).copy()
        protocol._add(words, protocol._own_seed(group, VICTIM, seed), -1)
        for name, forged in self.forged.items():
            pair = protocol._pair_seed(group, forged.mask, name, VICTIM)
            protocol._add(words, pair, -protocol._sign(VICTIM, name))
        return FixedPoint(CLIP, len(NAMES)).decode(words)

    def truth(self) -> NDArray[np.float32]:
        """Return the plain update, which stays at the hospital."""
        (path,) = self.alliance.state(VICTIM).glob("secagg/*/update/*.reply")
        _, _, content = path.read_bytes().partition(b"\n")
        update = TrainReply.from_records(from_bytes(content)).update
        assert update is not None
        return vectors.to_vector(floats(to_arrays(update)), CLIP, None)


def protected(**changes: Any) -> Study:
    return Study.read(SECURE | changes, "a test's study")


def test_a_coordinator_that_plays_all_other_hospitals_unmasks_none(
    alliance: Alliance,
) -> None:
    coordinator = Coordinator.of(alliance, protected())

    found = coordinator.unmasked()

    if not isinstance(found, RecordDict):
        gap = np.abs(found - coordinator.truth()).max()
        pytest.fail(f"{found.size} numbers of {VICTIM} unmasked, to {gap:.1e}")
    assert code(found) == Code.NOT_PINNED


def test_a_contract_that_pins_the_coordinators_keys_needs_the_administrators(
    alliance: Alliance,
) -> None:
    """The pins stand in what people sign; other pins are another text."""
    coordinator = Coordinator.of(alliance, protected())
    text = alliance.signed(coordinator.contract).content
    key = pki.new_key()
    pinned = alliance.consortium.site(OTHERS[0]).certificate
    forged = text.replace(
        pki.fingerprint(pki.from_pem(pinned)), pki.fingerprint(key.public_key())
    )
    assert forged != text
    asked = pki.request(key, "ada", "administrator")
    ada = alliance.consortium.issue(asked, "ada", "administrator")

    with pytest.raises(Refusal) as refused:
        alliance.approvals(VICTIM).receive(Signed(forged).signed_by(key, ada))

    assert refused.value.code == Code.NOT_PINNED


def unpinned(alliance: Alliance, study: Study) -> str:
    """Return the hash of a contract as releases before pins made them, approved."""
    alliance.publish(study)
    drafted = (alliance.folder / "contract.toml").read_text()
    tables = r"(?ms)^\[(site|administrator)_keys\]\n.*?(?=^\[)"
    text = re.sub(tables, "", re.sub(r"(?m)^administrator_keys = .*\n", "", drafted))
    assert "_keys" not in text
    key = pki.load_key(alliance.folder / "ada" / "ada.key")
    signed = Signed(text).signed_by(key, alliance.consortium.administrator(key)[1])
    stored = alliance.folder / "state" / "contracts" / f"{signed.hash}.json"
    stored.write_text(signed.to_json())
    alliance.approve(signed.hash)
    return signed.hash


def test_secure_aggregation_is_refused_under_a_contract_without_pins(
    alliance: Alliance,
) -> None:
    study = protected()
    coordinator = Coordinator.of(alliance, study)
    coordinator.contract = unpinned(alliance, study)

    assert code(coordinator.offer()) == Code.NOT_PINNED
    assert code(coordinator.ask(PrepareRequest(study=study))) == Code.NOT_PINNED


def test_in_the_open_a_contract_without_pins_goes_on(alliance: Alliance) -> None:
    study = protected(secure_aggregation=None)
    coordinator = Coordinator.of(alliance, study)
    coordinator.contract = unpinned(alliance, study)

    assert code(coordinator.offer()) is None
    assert code(coordinator.ask(PrepareRequest(study=study))) is None


def test_a_revoked_peer_is_refused_even_if_the_server_sends_it(
    alliance: Alliance,
) -> None:
    coordinator = Coordinator.of(alliance, protected())
    participants = {name: coordinator.genuine(name) for name in NAMES}
    assert code(coordinator.offer()) is None
    members.revoke_site(alliance.consortium, OTHERS[-1], "its key was stolen")

    assert code(coordinator.offer()) is None
    refused = coordinator.share(participants)

    assert code(refused) == Code.EXCHANGE_REFUSED
    assert alliance.log(VICTIM, "revocations")[-1]["certificates"] == 1


def test_genuine_peers_are_accepted(alliance: Alliance) -> None:
    coordinator = Coordinator.of(alliance, protected())
    participants = {name: coordinator.genuine(name) for name in NAMES}

    assert code(coordinator.share(participants)) is None


# ---- a key is replaced in the middle of a run ----

Replace = Callable[[Alliance, str], Path]


def rotated(alliance: Alliance, name: str) -> Path:
    """Return the request of a hospital whose old key names the new one."""
    return identity.rotate(SiteSettings.load(alliance.site_toml(name)))


def begun_again(alliance: Alliance, name: str) -> Path:
    """Return the request of a hospital that lost its keys, or of who plays it."""
    shutil.move(alliance.state(name) / "identity", alliance.state(name) / "lost")
    return identity.create(SiteSettings.load(alliance.site_toml(name)))


def conduct_while(
    alliance: Alliance, replace: Replace, kind: str = keys.SECURE_KEYS
) -> str:
    """Run a study in which a hospital's keys are replaced before a message."""
    study = protected(classification={"rounds": 0})
    contract, name, replaced = alliance.agree(study), OTHERS[0], []

    def before(site: str, message: Message) -> None:
        now = (site, message.metadata.message_type, round_of(message.content))
        if now != (name, kind, 2) or replaced:
            return
        settings = SiteSettings.load(alliance.site_toml(name))
        request = replace(alliance, name)
        spoken = SiteRequest.load(request).fingerprint
        kit = alliance.folder / "new.kit.json"
        made = members.rotate_site(alliance.consortium, name, request, spoken)
        kit.write_text(json.dumps(made))
        replaced.append(identity.join(settings, kit))
        gate = Gate(alliance.site_toml(name), fedgex.client.app.app)  # restarted
        grid.nodes[name] = dataclasses.replace(grid.nodes[name], gate=gate)

    grid = alliance.grid(before=before)
    alliance.conduct(contract, grid=grid)
    assert replaced
    return contract


@pytest.mark.parametrize("kind", [keys.SECURE_KEYS, keys.SECURE_SHARES, keys.TRAIN])
def test_secure_aggregation_goes_on_under_a_key_that_the_old_one_names(
    alliance: Alliance, kind: str
) -> None:
    contract = conduct_while(alliance, rotated, kind)

    assert alliance.outcome.events("run-finished")
    for name in NAMES:
        assert alliance.states(name) == [("contributed", None)] * 2
    signed = alliance.signed(contract)
    paths = sorted(alliance.run_dir.glob("checkpoints/*/receipt.json"))
    receipts = [Signed.from_json(path.read_text(), str(path)) for path in paths]
    pins = Contract.read_signed(signed).site_keys
    verify_chain(receipts, alliance.consortium.authority, pins, secure=True)


def test_a_key_that_the_old_one_does_not_name_ends_the_run(alliance: Alliance) -> None:
    with pytest.raises(FederationError, match="pins the key"):
        conduct_while(alliance, begun_again)


def test_a_statement_cannot_be_taken_over_by_another_key(alliance: Alliance) -> None:
    name = OTHERS[0]
    request = json.loads(rotated(alliance, name).read_text())
    taken = pki.replacements(pki.read_request(request["certificate_request"]))
    key = pki.new_key()
    asked = pki.request(key, name, "site", taken)
    certificate = alliance.consortium.issue(asked, name, "site")
    held = pki.from_pem(alliance.consortium.site(name).certificate)

    with pytest.raises(TrustError, match="not signed by the key before"):
        pinning.require(certificate, {name: pki.fingerprint(held)}, "the contract")
