"""`fedgex-site` from init to withdrawal: exit codes, and what the operator reads."""

import fcntl
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner, Result

from fedgex.client.cli import app
from fedgex.client.decisions import Desk
from fedgex.client.identity import Request
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common import chain, pki
from fedgex.common.chain import Chain
from fedgex.common.pki import Signed
from fedgex.common.receipt import Part, Receipt
from fedgex.common.vocabulary import Vocabulary

Authority = tuple[pki.Key, x509.Certificate]
SERVER = "fedgex.example.org:9092"
TODAY = datetime.now(UTC).date()
NEXT_WEEK, NEXT_MONTH = TODAY + timedelta(days=7), TODAY + timedelta(days=30)
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
    request = Request.load(folder / "state/request.json")
    csr = request.certificate_request
    made = pki.issue(*authority, csr, name="north", role="site", days=days)
    kit = {
        "format": 1,
        "consortium": "oncology",
        "site": "north",
        "server": SERVER,
        "authority": pki.to_pem(authority[1]),
        "certificate": pki.to_pem(made),
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
    key = pki.new_key()
    csr = pki.request(key, "ada", "administrator")
    ada = pki.issue(*authority, csr, name="ada", role="administrator", days=365)
    signed = Signed(TEXT, ()).signed_by(key, ada)
    Desk.of(SiteSettings.load(site_toml)).receive(signed)
    return signed


def approve(site_toml: Path, hash: str, expires: object = NEXT_WEEK) -> Result:
    options = ("--by", "Dr. Curie", "--expires", expires)
    return site("study", "approve", site_toml, hash, *options)


def audit(site_toml: Path) -> list[tuple[str, str | None]]:
    lines = chain.read(site_toml.parent / "state/audit.jsonl")
    return [(line["event"], line.get("by")) for line in lines]


# ---- init and join ----


def test_init_writes_settings_policy_keys_and_a_request(tmp_path: Path) -> None:
    result = init(tmp_path / "north")

    assert result.exit_code == 0
    settings = SiteSettings.load(tmp_path / "north/site.toml")
    assert (settings.name, settings.server) == ("north", SERVER)
    assert settings.policy == Policy.proposed()
    assert settings.policy.minimum_cohort == 10
    request = tmp_path / "north/state/request.json"
    assert result.stdout == Request.load(request).fingerprint + "\n"
    assert f"Send {request} to the administrator" in result.stderr


def test_init_again_changes_nothing_and_tells_the_same(folder: Path) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    result = init(folder)

    assert result.exit_code == 0
    request = Request.load(folder / "state/request.json")
    assert result.stdout == request.fingerprint + "\n"
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_init_keeps_a_policy_that_was_changed(folder: Path) -> None:
    path = folder / "policy.toml"
    path.write_text(path.read_text().replace("cohort = 10", "cohort = 25"))

    init(folder)

    assert SiteSettings.load(folder / "site.toml").policy.minimum_cohort == 25


def test_init_refuses_the_folder_of_another_hospital(folder: Path) -> None:
    result = init(folder, name="south")

    assert result.exit_code == 1
    assert result.stderr == (
        f'Error: {folder / "site.toml"} exists, for "north" at {SERVER}, and is kept; '
        f'expected "south" at {SERVER}. Change it by hand, or take another folder.\n'
    )


@pytest.mark.parametrize(
    ("name", "server"), [("North", SERVER), ('a"b', SERVER), ("north", "no-port")]
)
def test_init_with_an_unusable_name_or_server_is_wrong_usage(
    tmp_path: Path, name: str, server: str
) -> None:
    assert init(tmp_path / "north", name, server).exit_code == 2
    assert not (tmp_path / "north").exists()


def test_join_tells_what_to_compare(folder: Path, authority: Authority) -> None:
    result = site("join", folder / "site.toml", write_kit(folder, authority))

    assert result.exit_code == 0
    assert result.stdout.startswith(
        f"joined oncology as north, server {SERVER}, certificate until "
    )
    assert pki.fingerprint(authority[1]) in result.stderr


def test_join_refuses_with_one_line(folder: Path) -> None:
    result = site("join", folder / "site.toml", folder / "kit.json")

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {folder / 'kit.json'}: cannot be read (No such file or directory); "
        "expected the administrator's kit.\n"
    )


# ---- study ----


def test_an_approval_from_list_to_withdrawal(site_toml: Path, contract: Signed) -> None:
    short = contract.hash[:16]

    def listed() -> str:
        return site("study", "list", site_toml).stdout

    assert listed() == f"{short}  undecided                 {PURPOSE}\n"

    result = approve(site_toml, contract.hash[:8])
    assert result.exit_code == 0
    assert result.stdout == (
        f"approved {contract.hash} until {NEXT_WEEK} by Dr. Curie\n"
    )
    assert f"approved until {NEXT_WEEK}" in listed()

    options = ("--by", "Dr. Meitner", "--reason", "we leave", "--yes")
    result = site("study", "withdraw", site_toml, short, *options)
    assert result.stdout == f"withdrew {contract.hash} by Dr. Meitner\n"
    assert f"{short}  withdrawn " in listed()

    result = approve(site_toml, short)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: FX-STUDY-003: Dr. Meitner withdrew contract {short} on {TODAY}, and "
        "that is final: we leave\n"
    )
    assert audit(site_toml) == [
        ("joined", None),
        ("contract-received", None),
        ("decision", "Dr. Curie"),
        ("decision", "Dr. Meitner"),
    ]


def test_a_withdrawal_asks_and_a_no_leaves_the_approval(
    site_toml: Path, contract: Signed
) -> None:
    approve(site_toml, contract.hash)
    options = ("--by", "Dr. Meitner", "--reason", "we leave")

    result = site("study", "withdraw", site_toml, contract.hash, *options, answer="n\n")

    assert result.exit_code == 1
    assert "will never run here again" in result.stderr
    assert "approved until" in site("study", "list", site_toml).stdout


def test_show_tells_everything_that_a_person_needs(
    site_toml: Path, contract: Signed
) -> None:
    result = site("study", "show", site_toml, contract.hash[:12])

    assert result.exit_code == 0
    assert (
        result.stdout
        == f"""\
contract     {contract.hash}
purpose      Learn to restore missing genes
hospitals    north, south
signed by    ada
expires      {NEXT_MONTH}
trains       pretraining
privacy      no differential privacy; updates leave as they are
release      by 2 administrator(s)
code         fedgex 0.1
patients     10 or more here, or we take no part (the stricter of contract and policy)
state        undecided
our policy   refuses nothing of it

--- text that was signed
{TEXT}"""
    )


def test_show_tells_what_the_policy_refuses_and_why(
    site_toml: Path, contract: Signed
) -> None:
    policy = site_toml.with_name("policy.toml")
    text = policy.read_text().replace("privacy = false", "privacy = true")
    policy.write_text(text.replace('"pretraining", ', ""))

    shown = site("study", "show", site_toml, contract.hash)
    approved = approve(site_toml, contract.hash)

    assert (
        "our policy   refuses it:\n"
        "  - The study trains pretraining; policy.toml permits classification, "
        "survival.\n"
        "  - The study trains without differential privacy; policy.toml has "
        "demand_privacy = true.\n"
    ) in shown.stdout
    assert approved.stderr.count("Warning: it will be refused all the same: ") == 2


def test_a_contract_cannot_steer_the_operators_terminal(
    site_toml: Path, authority: Authority
) -> None:
    key = pki.new_key()
    csr = pki.request(key, "eve", "administrator")
    eve = pki.issue(*authority, csr, name="eve", role="administrator", days=9)
    text = TEXT.replace("Learn to", "Learn \\u001b[2J\\u202Eto")
    signed = Signed(text + "# \u202e\n", ()).signed_by(key, eve)
    Desk.of(SiteSettings.load(site_toml)).receive(signed)

    result = site("study", "show", site_toml, signed.hash)

    assert "Learn  [2J to restore" in result.stdout
    assert not re.search("[\u001b\u202e]", result.stdout)


def test_json_of_show_is_for_scripts(site_toml: Path, contract: Signed) -> None:
    approve(site_toml, contract.hash)

    result = site("study", "show", site_toml, contract.hash, "--format", "json")

    facts = json.loads(result.stdout)
    assert facts["text"] == TEXT
    assert facts["decision"]["by"] == "Dr. Curie"
    assert facts["state"] == f"approved until {NEXT_WEEK}"


@pytest.mark.parametrize("command", ["show", "approve", "reject", "withdraw"])
def test_an_unknown_hash_exits_with_three(
    site_toml: Path, contract: Signed, command: str
) -> None:
    options = {
        "show": (),
        "approve": ("--by", "x", "--expires", NEXT_WEEK),
        "reject": ("--by", "x", "--reason", "y"),
        "withdraw": ("--by", "x", "--reason", "y", "--yes"),
    }[command]

    result = site("study", command, site_toml, "xyz", *options)

    assert result.exit_code == 3
    assert result.stderr == (
        'Error: no contract here has a hash that begins with "xyz"; fedgex-site study '
        "list shows those that do.\n"
    )


def test_an_ambiguous_hash_approves_nothing(site_toml: Path, contract: Signed) -> None:
    folder = site_toml.parent / "state/contracts"
    (folder / f"{contract.hash[:4]}{'0' * 60}.json").write_text("another")

    result = approve(site_toml, contract.hash[:4])

    assert result.exit_code == 1
    assert "2 contracts begin with" in result.stderr


def test_a_contract_changed_by_one_byte_cannot_be_approved(
    site_toml: Path, contract: Signed
) -> None:
    path = site_toml.parent / f"state/contracts/{contract.hash}.json"
    path.write_text(path.read_text().replace("rounds = 2", "rounds = 9"))

    result = approve(site_toml, contract.hash)

    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"Error: FX-STUDY-005: the text of contract {contract.hash[:16]} was changed"
    )


def test_an_approval_beyond_the_contract_is_refused(
    site_toml: Path, contract: Signed
) -> None:
    late = NEXT_MONTH + timedelta(days=1)

    result = approve(site_toml, contract.hash, late)

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: the approval would expire on {late}; expected a day from {TODAY} to "
        f"{NEXT_MONTH}, when the contract expires.\n"
    )


@pytest.mark.parametrize(
    "options", [(), ("--by", "Dr. Curie"), ("--by", "x", "--expires", "soon")]
)
def test_an_approval_without_name_or_day_is_wrong_usage(
    site_toml: Path, contract: Signed, options: tuple[str, ...]
) -> None:
    result = site("study", "approve", site_toml, contract.hash, *options)

    assert result.exit_code == 2


def test_before_joining_there_is_nothing_to_decide(folder: Path) -> None:
    result = site("study", "list", folder / "site.toml")

    assert result.exit_code == 1
    assert "this hospital has not joined a consortium" in result.stderr


# ---- status, pause, log ----


@pytest.fixture
def daemon(site_toml: Path) -> Iterator[None]:
    """Hold the daemon's lock."""
    with (site_toml.parent / "state/daemon.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_status_of_a_running_site(
    site_toml: Path, contract: Signed, daemon: None
) -> None:
    approve(site_toml, contract.hash)
    (site_toml.parent / "state/status.json").write_text('{"connected": true}')

    result = site("status", site_toml)

    assert result.exit_code == 0
    assert "running      yes\n" in result.stdout
    assert "paused       no\n" in result.stdout
    assert f"consortium   oncology, server {SERVER}\n" in result.stdout
    assert "audit log    3 lines, head " in result.stdout
    assert "daemon       connected: true\n" in result.stdout
    assert (
        f"contract     {contract.hash[:16]} restoration: approved until {NEXT_WEEK}\n"
    ) in result.stdout
    assert "Warning" not in result.stdout


def test_status_of_a_stopped_site_exits_with_four(site_toml: Path) -> None:
    (site_toml.parent / "state/daemon.lock").write_text("4711\n")  # left behind

    result = site("status", site_toml, "--format", "json")

    assert result.exit_code == 4
    assert json.loads(result.stdout)["running"] is False


@pytest.mark.parametrize(
    ("days", "told"), [(29, "expires in 28 days"), (31, None), (-1, "expired")]
)
def test_status_warns_thirty_days_before_the_certificate_ends(
    site_toml: Path, authority: Authority, days: int, told: str | None
) -> None:
    kit = write_kit(site_toml.parent, authority, days)
    values = json.loads(kit.read_text())
    (site_toml.parent / "state/identity/kit.json").write_text(json.dumps(values))

    warnings = json.loads(site("status", site_toml, "--format", "json").stdout)[
        "warnings"
    ]

    assert len(warnings) == (told is not None)
    if told is not None:
        assert warnings[0].startswith(f"this hospital's certificate {told} (")


def test_pause_and_resume_are_told_and_logged(site_toml: Path) -> None:
    options = ("--by", "Dr. Curie", "--reason", "backup tonight")

    assert site("pause", site_toml, *options).stdout == "paused by Dr. Curie\n"
    paused = site("status", site_toml).stdout
    resumed = site("resume", site_toml, "--by", "Dr. Meitner")

    assert re.search("paused       by Dr. Curie since .*: backup tonight\n", paused)
    assert resumed.stdout == "resumed by Dr. Meitner\n"
    assert "paused       no\n" in site("status", site_toml).stdout
    assert audit(site_toml)[1:] == [("paused", "Dr. Curie"), ("resumed", "Dr. Meitner")]


def test_resuming_what_runs_is_refused(site_toml: Path) -> None:
    result = site("resume", site_toml, "--by", "Dr. Curie")

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: this hospital is not paused; there is nothing to do.\n"
    )


def test_a_whole_log_verifies(site_toml: Path, contract: Signed) -> None:
    result = site("log", "verify", site_toml)

    assert result.exit_code == 0
    assert result.stdout.startswith("ok: 2 lines, none changed, removed or reordered")


def test_a_changed_line_is_found(site_toml: Path, contract: Signed) -> None:
    approve(site_toml, contract.hash)
    path = site_toml.parent / "state/audit.jsonl"
    path.write_text(path.read_text().replace("Curie", "Evil!"))

    result = site("log", "verify", site_toml)

    assert result.exit_code == 1
    assert "line 3: its content does not have the hash" in result.stderr


def test_a_cut_tail_is_found_by_what_a_receipt_holds(
    site_toml: Path, contract: Signed, authority: Authority
) -> None:
    state = site_toml.parent / "state"
    write_receipt(state, contract.hash, authority)
    assert "holds what 1 receipts say" in site("log", "verify", site_toml).stdout
    lines = (state / "audit.jsonl").read_bytes().splitlines(keepends=True)

    (state / "audit.jsonl").write_bytes(b"".join(lines[:-1]))

    result = site("log", "verify", site_toml)
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "Error: receipts/run-1/00001.json holds our signature over line 3 of the audit "
        "log, and the log of 2 lines does not have that line: its end was cut"
    )


def write_receipt(state: Path, contract: str, authority: Authority) -> None:
    """Keep a receipt with our part, over the log with one line more than now."""
    head = Chain(state / "audit.jsonl").append("answered")
    ours = {
        "contract": contract,
        "run": "run-1",
        "site": "north",
        "type": "train",
        "phase": "pretraining",
        "round": 1,
        "request": "1" * 64,
        "reply": "2" * 64,
        "head": {"index": head.index, "hash": head.hash},
        "patients": "suppressed",
    }
    part = Part.read(ours, "part").to_json()
    entry = {
        "state": "contributed",
        "update": "2" * 64,
        "part": part,
        "signature": "ours",
        "certificate": "ours",
    }
    values = {
        "contract": contract,
        "run": "run-1",
        "index": 1,
        "phase": "pretraining",
        "round": 1,
        "incoming": "3" * 64,
        "outgoing": "4" * 64,
        "sites": {"north": entry},
        "previous": "0" * 64,
        "time": datetime.now(UTC).isoformat(),
    }
    folder = state / "receipts/run-1"
    folder.mkdir(parents=True)
    text = Receipt.read(values, "receipt").to_json()
    (folder / "00001.json").write_text(Signed(text, ()).to_json())


def test_a_log_that_is_not_there_exits_with_three(folder: Path) -> None:
    assert site("log", "verify", folder / "site.toml").exit_code == 3


# ---- check-connection ----


def test_check_connection_to_nobody_exits_with_four(tmp_path: Path) -> None:
    init(tmp_path / "north", server="server.invalid:9092")

    result = site("check-connection", tmp_path / "north/site.toml", "--format", "json")

    steps = json.loads(result.stdout)
    assert result.exit_code == 4
    assert [step["state"] for step in steps] == ["failed"] + ["skipped"] * 6
    assert steps[0]["name"] == "name"
