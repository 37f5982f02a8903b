"""What another party writes is malformed on purpose: it ends that party's part only."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Context, Message, RecordDict

import fedgex.client.app
from fedgex.client.identity import Kit
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import (
    ConfigError,
    FederationError,
    FedgexError,
    MessageError,
    TrustError,
)
from fedgex.common.messages.fields import Introduction, Participant
from fedgex.common.settings import Settings
from fedgex.common.study import Study
from fedgex.common.trust import pki
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.receipt import NO_RECEIPT, Receipt, SitePart
from fedgex.common.trust.signed import Signature, Signed
from fedgex.server.consortium import contracts, members
from fedgex.server.consortium.store import Consortium as Store
from fedgex.server.consortium.store import ConsortiumSettings

from ..federation.conftest import (
    Consortium,
    Finished,
    InProcessGrid,
    consortium,  # noqa: F401
)
from ..federation.privacy.test_secure_aggregation import secure

QUICK_S = 2.0
"""Seconds in which a bomb is refused; twenty and more were seen."""

BRACKETS = "[" * 3000
DOTS = ".".join("a" * 20_000) + " = 1"
"""40 kB."""
HIDDEN = 'purpose = ["""quoted"""", {' + DOTS + "}]"
"""A bomb after a string that ends with a quotation mark of its own."""


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(BRACKETS, id="3 kB of brackets"),
        pytest.param(f"a = {BRACKETS}", id="brackets in a value"),
        pytest.param(DOTS, id="a dotted key of 40 kB"),
        pytest.param(f"[{DOTS[:-4]}]", id="a dotted header"),
        pytest.param(HIDDEN, id="after a string"),
        pytest.param("a = 0x" + "f" * 1_000_000, id="a number of a million digits"),
        pytest.param("a = 1\n" * 3_000_000, id="18 MB"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda t, _: Contract.from_toml(t, "it"), id="contract"),
        pytest.param(
            lambda t, f: Policy.load(_write(f / "policy.toml", t)), id="policy"
        ),
        pytest.param(
            lambda t, f: SiteSettings.load(_write(f / "site.toml", t)), id="site"
        ),
    ],
)
def test_a_bomb_of_toml_is_refused_at_once(
    read: Callable[[str, Path], Any], bomb: str, tmp_path: Path
) -> None:
    began = time.process_time()

    with pytest.raises(ConfigError) as refusal:
        read(bomb, tmp_path)

    assert time.process_time() - began < QUICK_S
    assert len(str(refusal.value)) < 3000


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param("[" * 100_000, id="brackets"),
        pytest.param('{"a":' * 100_000, id="braces"),
        pytest.param('{"format":1,"format":1}', id="a key twice"),
        pytest.param('"\\ud800"', id="half a character"),
        pytest.param("9" * 10_000, id="a number of ten thousand digits"),
    ],
)
@pytest.mark.parametrize(
    ("read", "error"),
    [
        pytest.param(lambda t: Study.from_json(t, "it"), ConfigError, id="study"),
        pytest.param(lambda t: Kit.from_json(t, "it"), ConfigError, id="kit"),
        pytest.param(
            lambda t: SiteRequest.from_json(t, "it"), ConfigError, id="request"
        ),
        pytest.param(lambda t: Signed.from_json(t, "it"), TrustError, id="signed"),
        pytest.param(lambda t: Receipt.from_json(t, "it"), TrustError, id="receipt"),
        pytest.param(Participant.from_text, MessageError, id="keys of a participant"),
    ],
)
def test_a_bomb_of_json_is_refused(
    read: Callable[[str], Any], error: type[FedgexError], bomb: str
) -> None:
    with pytest.raises(error):
        read(bomb)


def test_what_was_found_is_printed_short_and_without_a_password() -> None:
    class Proxy(Settings):
        proxy: int

    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for found in ("http://user:secret@proxy:3128", ["user:secret@proxy"], deep):
        with pytest.raises(ConfigError) as refusal:
            Proxy.read({"proxy": found}, "site.toml")
        assert "secret" not in str(refusal.value)
        assert len(str(refusal.value)) < 300
    with pytest.raises(ConfigError) as refusal:
        Proxy.read({f"\x1b[2J{i}": 1 for i in range(10_000)}, "site.toml")
    assert len(str(refusal.value)) < 10_000
    assert "\x1b" not in str(refusal.value)


# ---- certificates and keys ----


def certificate(version: bytes = b"\x02") -> str:
    """Return an authority's certificate; b"\x02" is the version that X.509 calls 3."""
    made = pki.new_authority("alliance")[1].public_bytes(serialization.Encoding.DER)
    assert made.count(b"\xa0\x03\x02\x01\x02") == 1
    changed = made.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01" + version)
    text = base64.encodebytes(changed).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"


def test_a_certificate_of_version_10_is_refused() -> None:
    assert pki.from_pem(certificate())

    with pytest.raises(TrustError, match="certificate cannot be read"):
        pki.from_pem(certificate(b"\x09"))


def test_a_certificate_with_a_key_of_an_unknown_curve_is_refused() -> None:
    made = pki.new_authority("alliance")[1].public_bytes(serialization.Encoding.DER)
    p256 = bytes.fromhex("2a8648ce3d030107")
    changed = made.replace(p256, p256[:-1] + b"\x7f")
    text = base64.encodebytes(changed).decode()

    with pytest.raises(TrustError, match="certificate cannot be read"):
        pki.from_pem(f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n")


def founded(tmp_path: Path) -> Store:
    settings = ConsortiumSettings(
        name="alliance", host="fed.example.org", health_port=1
    )
    store = Store.init(tmp_path / "state", settings)
    path, asked = members.new_administrator("ada", tmp_path / "ada")
    members.add_administrator(store, path, asked.fingerprint)
    return store


def admitted(store: Store, folder: Path, name: str, **changed: str) -> pki.Key:
    """Have a hospital admitted; return its key."""
    key = pki.new_key()
    request = SiteRequest.read(
        {
            "name": name,
            "node_public_key": pki.public_ssh(pki.new_node_key()),
            "certificate_request": pki.request(key, name, "site"),
            "version": "0.1.0",
        }
        | changed,
        "a request",
    )
    path = folder / f"{name}.json"
    path.write_text(request.to_json())
    members.add_site(store, path, request.fingerprint)
    return key


def test_a_request_with_a_compressed_node_key_is_refused(tmp_path: Path) -> None:
    kind, blob, *_ = pki.public_ssh(pki.new_node_key()).split()
    point = bytearray(base64.b64decode(blob))
    at = point.index(b"\x00\x00\x00\x61\x04")
    point[at:] = b"\x00\x00\x00\x31\x02" + point[at + 5 : at + 53]
    text = f"{kind} {base64.b64encode(point).decode()}"

    with pytest.raises(TrustError, match="node key cannot be read"):
        admitted(founded(tmp_path), tmp_path, "north", node_public_key=text)


# ---- decisions ----


@pytest.fixture
def published(tmp_path: Path) -> tuple[Store, str, pki.Key]:
    """Return a consortium, the hash of its contract, and the key of `north`."""
    store = founded(tmp_path)
    ada = pki.load_key(tmp_path / "ada" / "ada.key")
    key = admitted(store, tmp_path, "north")
    admitted(store, tmp_path, "south")
    path = tmp_path / "contract.toml"
    path.write_text(
        'purpose = "restoration of two genes"\nexpires = 2999-01-01\n'
        f'code_version = "0.1"\nvocabulary_hash = "{Vocabulary(("A", "B")).hash}"\n'
        'sites = ["north", "south"]\n[release]\nadministrators = 1\n'
        '[study]\nname = "small"\nrounds.quorum = 2\n'
        'vocabulary.genes = ["A", "B"]\n'
    )
    signed = contracts.sign(path, ada, store.administrator(ada)[1])
    contracts.publish(store, path, ada)
    return store, signed.hash, key


def decision(store: Store, hash: str, key: pki.Key, at: str) -> Signed:
    values = {
        "contract": hash,
        "decision": "approved",
        "by": "Dr. N.",
        "at": at,
        "expires": "2999-01-01",
        "reason": "",
    }
    entry = store.sites()["north"]
    signed = Signed(json.dumps(values))
    return signed.signed_by(key, pki.from_pem(entry.certificate))


def test_a_decision_without_a_time_zone_is_refused_and_the_next_one_counts(
    published: tuple[Store, str, pki.Key],
) -> None:
    store, hash, key = published

    with pytest.raises(TrustError, match="cannot be read"):
        contracts.record_answer(
            store, hash, decision(store, hash, key, "2026-01-01T00:00:00")
        )
    contracts.record_answer(
        store, hash, decision(store, hash, key, "2026-01-01T00:00:00Z")
    )
    assert contracts.answers(store, hash)["north"].by == "Dr. N."


# ---- what is great, and well-formed ----


def test_a_contract_of_sixty_thousand_genes_is_read() -> None:
    genes = tuple(f"ENSG{i:011d}" for i in range(60_000))
    text = (
        'purpose = "restoration of all genes"\nexpires = 2999-01-01\n'
        f'code_version = "0.1"\nvocabulary_hash = "{Vocabulary(genes).hash}"\n'
        'sites = ["north", "south"]\n[study]\nname = "small"\nrounds.quorum = 2\n'
        f"vocabulary.genes = {json.dumps(genes)}\n"
    )

    found = Contract.read_signed(Signed.from_json(Signed(text).to_json(), "it"))

    assert found.study.vocabulary.genes == genes
    assert Study.from_json(found.study.to_json(), "it") == found.study


def test_a_receipt_of_a_thousand_hospitals_is_read() -> None:
    pem = certificate()
    part = SitePart(
        state="contributed",
        patients=100,
        update="a" * 64,
        part=json.dumps({"contract": "c" * 64, "reply": "a" * 64, "more": "d" * 300}),
        signature="s" * 96,
        certificate=pem,
    )
    receipt = Receipt(
        contract="c" * 64,
        run="run-1",
        index=1,
        phase="pretraining",
        round=1,
        incoming="a" * 64,
        outgoing="b" * 64,
        sites={f"hospital-{i:04d}": part for i in range(1000)},
        previous=NO_RECEIPT,
        time=datetime.now(UTC),
    )
    signed = Signed(receipt.to_json(), (Signature("coordinator", pem, "s" * 96),))

    assert Receipt.read_signed(Signed.from_json(signed.to_json(), "it")) == receipt


def test_a_hospital_with_twenty_thousand_genes_introduces_itself() -> None:
    genes = tuple(f"GENE{i:05d}" for i in range(20_000))
    values = {"name": "north", "version": "0.1.0", "genes": list(genes)}

    found = Introduction.decode(values | {"shares-cross-products": False})

    assert found.genes == genes


# ---- keys of secure aggregation ----


@pytest.mark.parametrize(
    ("channel", "mask"),
    [
        pytest.param("00" * 32, "cd" * 32, id="a point of small order"),
        pytest.param("cd" * 32, "01" + "00" * 31, id="another"),
        pytest.param("cd" * 32, "cd" * 32, id="one key for both"),
        pytest.param("cd" * 31, "cd" * 32, id="short"),
    ],
)
def test_a_key_with_which_no_peer_can_agree_on_a_secret_is_refused(
    channel: str, mask: str
) -> None:
    text = json.dumps({"channel": channel, "mask": mask, "measured": "e0"})

    with pytest.raises((MessageError, ValueError)):
        Participant.from_text(text)


# ---- a run ----


def introduces_itself_with(*genes: str) -> Callable[[RecordDict], None]:
    def tamper(reply: RecordDict) -> None:
        reply.config_records[keys.SITE]["genes"] = sorted(genes)

    return tamper


def weighs(number: Any) -> Callable[[RecordDict], None]:
    def tamper(reply: RecordDict) -> None:
        reply.metric_records[keys.METRICS][keys.NUM_EXAMPLES] = number

    return tamper


@pytest.mark.parametrize(
    ("message_type", "tamper"),
    [
        pytest.param(
            keys.PREPARE, introduces_itself_with("G" * 4_000_000), id="4 MB gene name"
        ),
        pytest.param(
            keys.PREPARE, introduces_itself_with("A\nB"), id="a gene of two lines"
        ),
        pytest.param(keys.TRAIN, weighs(1e308), id="1e308 patients"),
        pytest.param(keys.TRAIN, weighs(10**12), id="1e12 patients"),
    ],
)
def test_a_hospital_with_a_malformed_reply_is_left_out_and_the_run_goes_on(
    consortium: Consortium,  # noqa: F811
    message_type: str,
    tamper: Callable[[RecordDict], None],
    tampered: Callable[..., None],
    tmp_path: Path,
) -> None:
    tampered(consortium.names[1], message_type, tamper)
    study = consortium.study(
        cross_products=False,
        pretraining={"rounds": 1},
        classification={"rounds": 0},
        survival={"rounds": 0},
    )

    run = consortium.conduct(study, tmp_path / "run")

    assert run.events("run-finished")
    assert list(left_out(run).values()) == ["quarantined"]


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what has one hospital's replies of a type changed before they leave."""
    honest = fedgex.client.app.app

    def of(site: str, message_type: str, tamper: Callable[[RecordDict], None]) -> None:
        def app(message: Message, context: Context) -> Message:
            reply = honest(message, context)
            asked = message.metadata.message_type == message_type
            if asked and site in str(context.node_config["site-toml"]):
                tamper(reply.content)
            return reply

        monkeypatch.setattr(fedgex.client.app, "app", app)

    return of


def one_key_for_both(reply: RecordDict) -> None:
    record = reply.config_records[keys.PUBLIC_KEYS]
    record["mask"] = record["channel"]


def of_small_order(reply: RecordDict) -> None:
    reply.config_records[keys.PUBLIC_KEYS]["channel"] = "00" * 32


@pytest.mark.parametrize("tamper", [one_key_for_both, of_small_order])
def test_a_hospital_with_useless_keys_is_left_out_of_the_secure_sum(
    consortium: Consortium,  # noqa: F811
    tampered: Callable[..., None],
    tamper: Callable[[RecordDict], None],
    tmp_path: Path,
) -> None:
    bad = consortium.names[1]
    tampered(bad, keys.SECURE_KEYS, tamper)
    shutil.copytree(consortium.sites, tmp_path / "sites")

    run = consortium.conduct(
        secure(consortium), tmp_path / "run", sites=tmp_path / "sites"
    )

    assert run.events("run-finished")
    assert left_out(run) == {bad: "quarantined"}


def test_hospitals_with_one_key_are_left_out_of_the_secure_sum(
    consortium: Consortium,  # noqa: F811
    tampered: Callable[..., None],
    tmp_path: Path,
) -> None:
    key = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()

    def tamper(reply: RecordDict) -> None:
        reply.config_records[keys.PUBLIC_KEYS]["channel"] = key

    tampered("hospital-0", keys.SECURE_KEYS, tamper)  # all of them
    shutil.copytree(consortium.sites, tmp_path / "sites")

    with pytest.raises(FederationError, match="a key that another site does too"):
        consortium.conduct(
            secure(consortium), tmp_path / "run", sites=tmp_path / "sites"
        )


def test_a_reply_that_flower_cannot_read_ends_its_sender_only(
    consortium: Consortium,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest, bad = InProcessGrid.pull_messages, consortium.names[1]

    def pull(self: InProcessGrid, message_ids: Iterable[str]) -> Any:
        pulled = list(honest(self, message_ids))
        for message in pulled:
            trained = self.exchanges[-1].message_type == keys.TRAIN
            if trained and self.names[message.metadata.src_node_id] == bad:
                raise ValueError("Unsupported record type: None")
        return pulled

    monkeypatch.setattr(InProcessGrid, "pull_messages", pull)

    run = consortium.conduct(
        consortium.study(
            cross_products=False,
            pretraining={"rounds": 1},
            classification={"rounds": 0},
            survival={"rounds": 0},
        ),
        tmp_path / "run",
    )

    assert run.events("run-finished")
    assert left_out(run) == {bad: "quarantined"}


def left_out(run: Finished) -> dict[str, str]:
    """Return the state of each hospital that took no part in something."""
    rounds: Iterable[dict[str, Any]] = run.events("round")
    return {
        name: site["state"]
        for each in rounds
        for name, site in each["sites"].items()
        if site["state"] != "contributed"
    } | {each["site"]: each["state"] for each in run.events("not-answered")}


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
