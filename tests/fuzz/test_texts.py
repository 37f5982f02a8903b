"""Every text of another party is read, or refused with the documented error."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from fedgex.client import policy
from fedgex.client.admission import approvals
from fedgex.client.admission.receipt_check import Exported
from fedgex.client.identity import Kit
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.errors import ConfigError, FedgexError, TrustError
from fedgex.common.messages.codec import boundary
from fedgex.common.messages.fields import Participant
from fedgex.common.secure_aggregation.protocol import Shares
from fedgex.common.study import Study
from fedgex.common.system.files import read_json
from fedgex.common.trust import (
    audit_log,
    bundle,
    pinning,
    pki,
    receipt,
    revocation,
)
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.receipt import Part, Receipt
from fedgex.common.trust.signed import Signed
from fedgex.server import journal
from fedgex.server.consortium.contracts import Answer
from fedgex.server.consortium.members import _node_key_fingerprint
from fedgex.server.journal import Journal
from fedgex.simulations.scenario import Scenario

from .mutations import attack

STUDY = Study.read(
    {"name": "small", "vocabulary": {"genes": ["A", "B"]}}, "a test's study"
)
SITE = """\
name = "north"
server = "fed.example.org:443"
proxy = "http://proxy:3128"
[data]
expression = 'C:\\data\\e.csv'
scale = "log2p1"
columns.patient = "id"
"""
SCENARIO = b"""\
[study]
name = "small"
[study.pretraining]
rounds = 2
[data]
expression = "expression.parquet"
scale = "log2p1"
clinical = "clinical.csv"
[sites]
column = "institution"
[holdout]
institutions = ["Hold-out 01"]
"""


def text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], object]:
    """Return a parser of a file's content."""

    def through(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return through


# ---- settings ----


def test_policy_toml(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"

    attack("policy", file(path, Policy.load), ConfigError, [policy.TEMPLATE.encode()])


def test_site_toml(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(policy.TEMPLATE)
    path = tmp_path / "site.toml"

    attack("site.toml", file(path, SiteSettings.load), ConfigError, [SITE.encode()])


def test_scenario_toml(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"

    attack("scenario", file(path, Scenario.load), ConfigError, [SCENARIO])


def test_study_json() -> None:
    def read(content: bytes) -> object:
        return Study.from_json(text(content), "it").hash

    attack("study", read, ConfigError, [STUDY.to_json().encode()])


# ---- what is signed ----


def test_contract_toml(release: Callable[..., Any]) -> None:
    signed = release().evidence.contract

    def read(content: bytes) -> object:
        return Contract.from_toml(text(content), "it").study.to_json()

    attack("contract", read, ConfigError, [signed.content.encode()])


def test_signed_contract(release: Callable[..., Any]) -> None:
    made = release()
    seed = made.evidence.contract.to_json().encode()

    def read(content: bytes) -> object:
        signed = Signed.from_json(content, "it")
        signed.signers(made.authority, "administrator")
        return Contract.read_signed(signed)

    attack("signed contract", read, (TrustError, ConfigError), [seed])


def test_receipts(release: Callable[..., Any]) -> None:
    made = release()
    seeds = [each.to_json().encode() for each in made.evidence.receipts]

    def read(content: bytes) -> object:
        signed = Signed.from_json(content, "it")
        if signed.content != made.evidence.receipts[1].content:
            receipt.verify_chain([signed], made.authority)
        return Receipt.read_signed(signed).to_json()

    attack("signed receipt", read, TrustError, seeds)
    contents = [each.content.encode() for each in made.evidence.receipts]
    attack("receipt", lambda c: Receipt.from_json(text(c), "it"), TrustError, contents)
    parts = [
        str(site.part).encode()
        for each in made.evidence.receipts
        for site in Receipt.read_signed(each).sites.values()
    ]
    attack("part", lambda c: Part.from_json(text(c), "it"), TrustError, parts)


def test_bundle(release: Callable[..., Any], tmp_path: Path) -> None:
    made = release()
    path = made.write()
    seed = path.read_bytes()

    def read(path: Path) -> object:
        bundle.administrators(path)
        return bundle.verify(path, made.authority)

    target = file(tmp_path / "changed.fedgex", read)
    attack("bundle", target, TrustError, [seed], examples=100)


def test_decision() -> None:
    values = {
        "contract": "c" * 64,
        "decision": "approved",
        "by": "Dr. N.",
        "at": "2026-01-01T00:00:00Z",
        "expires": "2999-01-01",
        "reason": "",
    }
    seed = json.dumps(values).encode()

    def read(content: bytes) -> object:
        answer = Answer.from_json(text(content), "it")
        assert answer.at.tzinfo
        return approvals.Decision.from_json(text(content), "it").to_json()

    attack("decision", read, ConfigError, [seed])


# ---- admission ----


def pem(der: bytes, what: str) -> str:
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {what}-----\n{body}-----END {what}-----\n"


def test_certificate() -> None:
    key, authority = pki.new_authority("alliance")
    own = pki.new_key()
    request = pki.request(own, "north", "site")
    made = pki.issue(key, authority, request, name="north", role="site", days=3)
    ders = [each.public_bytes(serialization.Encoding.DER) for each in (authority, made)]

    def read(content: bytes) -> object:
        found = pki.from_pem(pem(content, "CERTIFICATE"))
        if found not in (authority, made):
            pki.verify(found, authority, "site")
        return pki.to_pem(found), pki.fingerprint(found), pki.short(found)

    attack("certificate, DER", read, TrustError, ders)
    attack(
        "certificate, PEM",
        lambda content: pki.from_pem(text(content)),
        TrustError,
        [pki.to_pem(made).encode()],
    )


def test_certificate_request() -> None:
    key, authority = pki.new_authority("alliance")
    request = pki.request(pki.new_key(), "north", "site")
    lines = "".join(request.strip().splitlines()[1:-1])

    def read(content: bytes) -> object:
        csr = pem(content, "CERTIFICATE REQUEST")
        return pki.issue(key, authority, csr, name="north", role="site", days=3)

    attack("certificate request", read, TrustError, [base64.b64decode(lines)])


def test_keys(tmp_path: Path) -> None:
    key, path = pki.new_key(), tmp_path / "site.key"
    pki.save_key(key, path)
    seed = path.read_bytes()

    attack("private key", file(path, pki.load_key), TrustError, [seed])
    ssh = pki.public_ssh(pki.new_node_key()).encode()
    attack("node key", lambda c: _node_key_fingerprint(text(c)), TrustError, [ssh])
    kind, blob, *_ = ssh.split()

    def read(content: bytes) -> object:
        encoded = base64.b64encode(content).decode()
        return _node_key_fingerprint(f"{kind.decode()} {encoded}")

    attack("node key, inside", read, TrustError, [base64.b64decode(blob)])


def test_enrolment() -> None:
    request = SiteRequest(
        name="north",
        certificate_request=pki.request(pki.new_key(), "north", "site"),
        node_public_key=pki.public_ssh(pki.new_node_key()),
        version="0.1.0",
    )

    def read(content: bytes) -> object:
        return SiteRequest.from_json(text(content), "it").fingerprint

    attack("enrolment", read, ConfigError, [request.to_json().encode()])


def test_kit() -> None:
    authority = pki.to_pem(pki.new_authority("alliance")[1])
    kit = Kit(
        consortium="alliance",
        site="north",
        server="fed.example.org:443",
        authority=authority,
        certificate=authority,
    )

    def read(content: bytes) -> object:
        found = Kit.from_json(text(content), "it")
        return pki.from_pem(found.authority), pki.from_pem(found.certificate)

    attack("kit", read, (ConfigError, TrustError), [kit.to_json().encode()])


def test_replaced_key_and_revocations() -> None:
    key, authority = pki.new_authority("alliance")
    old, new = pki.new_key(), pki.new_key()
    asked = pki.request(old, "north", "site")
    before = pki.issue(key, authority, asked, name="north", role="site", days=3)
    steps = pinning.replacement(old, before, new)

    def read(content: bytes) -> object:
        csr = pki.request(new, "north", "site", replaces=content)
        return pinning.replaced(pki.read_request(csr))

    attack("replacement of a key", read, TrustError, [steps], 100)
    listed = revocation.new_list(key, authority, [(7, pki.now())])
    lines = "".join(listed.strip().splitlines()[1:-1])
    attack(
        "list of revoked certificates",
        lambda c: revocation.read_list(pem(c, "X509 CRL"), authority),
        TrustError,
        [base64.b64decode(lines)],
    )


def test_exported_receipts(release: Callable[..., Any], tmp_path: Path) -> None:
    receipts = release().evidence.receipts
    exported = Exported(site="north", receipts=tuple(receipts))

    def read(path: Path) -> object:
        return Exported.read(read_json(path, "it"), "it").to_json()

    target, seed = file(tmp_path / "e.json", read), exported.to_json().encode()
    attack("exported receipts", target, ConfigError, [seed], 100)


# ---- secure aggregation ----


def test_secure_aggregation() -> None:
    keys = {"channel": "ab" * 32, "mask": "cd" * 32, "measured": "e0"}

    def read(content: bytes) -> object:
        with boundary():
            return Participant.from_text(text(content)).to_text()

    attack("keys of a participant", read, FedgexError, [json.dumps(keys).encode()])
    attack("shares", Shares.from_bytes, TrustError, [bytes(66)])


# ---- logs ----


def test_audit_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in range(4):
        Chain(path).append("answered", type="train", number=number)

    def read(path: Path) -> object:
        return Chain(path).head, audit_log.read(path), audit_log.verify(path)

    attack("audit log", file(path, read), TrustError, [path.read_bytes()])


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for number in range(4):
        Journal(path).write("round", round=number, sites={"north": {"loss": 0.5}})

    attack("journal", file(path, journal.read), FedgexError, [path.read_bytes()])
