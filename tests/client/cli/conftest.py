"""A hospital whose operator calls `fedgex-site`."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner, Result

from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.cli import app
from fedgex.client.settings import SiteSettings
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.signed import Signed

Authority = tuple[pki.Key, x509.Certificate]
SERVER = "fedgex.example.org:9092"
TODAY = datetime.now(UTC).date()
NEXT_WEEK, NEXT_MONTH = TODAY + timedelta(days=7), TODAY + timedelta(days=30)
ADA = pki.new_key()
"""The administrator's, whom every kit names."""
PURPOSE = "Learn to restore missing genes"
TEXT = f"""\
purpose = "{PURPOSE}"
expires = {NEXT_MONTH}
code_version = "0.1"
vocabulary_hash = "{Vocabulary(("MYC", "TP53")).hash}"
sites = ["north", "south"]

[study]
name = "restoration"
minimum_cohort = 5
vocabulary.genes = ["MYC", "TP53"]
pretraining.rounds = 2
strategy.name = "fedavg"
"""


def site(*args: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=answer)


def init(folder: Path, name: str = "north", server: str = SERVER) -> Result:
    return site("init", folder, "--name", name, "--server", server)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return pki.new_authority("oncology")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a hospital that was set up."""
    assert init(tmp_path / "north").exit_code == 0
    return tmp_path / "north"


def write_kit(folder: Path, authority: Authority, days: int = 365) -> Path:
    request = SiteRequest.load(folder / "state/request.json")
    csr = request.certificate_request
    made = pki.issue(*authority, csr, name="north", role="site", days=days)
    kit = {
        "format": 1,
        "consortium": "oncology",
        "site": "north",
        "server": SERVER,
        "authority": pki.to_pem(authority[1]),
        "certificate": pki.to_pem(made),
        "administrators": {"ada": pki.fingerprint(ADA.public_key())},
    }
    path = folder.parent / "kit.json"
    path.write_text(json.dumps(kit))
    return path


@pytest.fixture
def site_toml(folder: Path, authority: Authority) -> Path:
    """Return the site.toml of a hospital that has joined."""
    kit = write_kit(folder, authority)
    assert site("join", folder / "site.toml", kit).exit_code == 0
    return folder / "site.toml"


@pytest.fixture
def contract(site_toml: Path, authority: Authority) -> Signed:
    """Return a contract that reached the hospital."""
    csr = pki.request(ADA, "ada", "administrator")
    ada = pki.issue(*authority, csr, name="ada", role="administrator", days=365)
    signed = Signed(TEXT, ()).signed_by(ADA, ada)
    ApprovalStore.of(SiteSettings.load(site_toml)).receive(signed)
    return signed


def approve(site_toml: Path, hash: str, expires: object = NEXT_WEEK) -> Result:
    options = ("--by", "Dr. Curie", "--expires", expires)
    return site("study", "approve", site_toml, hash, *options)


def audit(site_toml: Path) -> list[tuple[str, str | None]]:
    lines = audit_log.read(site_toml.parent / "state/audit.jsonl")
    return [(line["event"], line.get("by")) for line in lines]
