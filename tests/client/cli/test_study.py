"""`fedgex-site study`, from list to withdrawal: exit codes, and what is read."""

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest

from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.settings import SiteSettings
from fedgex.common.trust import pki
from fedgex.common.trust.signed import Signed

from .conftest import (
    NEXT_MONTH,
    NEXT_WEEK,
    PURPOSE,
    TEXT,
    TODAY,
    Authority,
    approve,
    audit,
    site,
)


def test_an_approval_from_list_to_withdrawal(site_toml: Path, contract: Signed) -> None:
    short = contract.hash[:16]

    def listed() -> str:
        return site("study", "list", site_toml).stdout

    assert listed().split(maxsplit=2) == [short, "undecided", f"{PURPOSE}\n"]

    result = approve(site_toml, contract.hash[:8])
    assert result.exit_code == 0
    assert result.stdout == (
        f"approved {contract.hash} until {NEXT_WEEK} for 1 run by Dr. Curie\n"
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
    kit = json.loads((site_toml.parent / "state/identity/kit.json").read_text())

    assert result.exit_code == 0
    assert (
        result.stdout
        == f"""\
contract     {contract.hash}
purpose      Learn to restore missing genes
hospitals    north, south
signed by    ada; we want 1 of ada {kit["administrators"]["ada"][:16]}
expires      {NEXT_MONTH}
trains       pretraining
privacy      no differential privacy; updates leave as they are
remains      The server sees this hospital's update of each round (no reason is \
given).
remains      The contract pins no keys: who holds the authority's key can act under \
the name of any hospital or administrator.
remains      Nothing bounds what the model reveals of a patient.
remains      Sums over this hospital's patients go to the server before round 1.
remains      The server holds the model after each round. Who runs it can use it, or \
give it away, without the administrators; what has left cannot be taken back.
release      by 2 administrator(s)
code         fedgex 0.1
patients     10 or more here, or we take no part (the stricter of contract and policy)
state        undecided
runs         one if approved, more with approve --runs, 0 begun
our data     they cannot be used now; fedgex-site check-data says why
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
    kit = site_toml.parent / "state/identity/kit.json"
    pins = {"administrators": {"eve": pki.fingerprint(eve)}}
    kit.write_text(json.dumps(json.loads(kit.read_text()) | pins))
    text = TEXT.replace("Learn to", "Learn \\u001b[2J\\u202Eto")
    signed = Signed(text + "# \u202e\n", ()).signed_by(key, eve)
    ApprovalStore.of(SiteSettings.load(site_toml)).receive(signed)

    result = site("study", "show", site_toml, signed.hash)

    assert "Learn  [2J to restore" in result.stdout
    assert not re.search("[\u001b\u202e]", result.stdout)


def test_json_of_show_is_for_scripts(site_toml: Path, contract: Signed) -> None:
    approve(site_toml, contract.hash)

    result = site("study", "show", site_toml, contract.hash, "--format", "json")

    facts = json.loads(result.stdout)
    assert facts["text"] == TEXT
    assert facts["decision"]["by"] == "Dr. Curie"
    assert facts["state"] == f"approved until {NEXT_WEEK}, 1 run"


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


def test_show_and_check_data_compare_the_contract_with_the_hospitals_data(
    site_toml: Path, contract: Signed
) -> None:
    absent = site("study", "show", site_toml, contract.hash).stdout
    assert "our data     they cannot be used now" in absent

    rows = "".join(f"P{i},{5 + i % 7},{4 + i % 5}\n" for i in range(12))
    expression = SiteSettings.load(site_toml).data.expression
    expression.write_text("patient,TP53,EGFR\n" + rows)

    shown = site("study", "show", site_toml, contract.hash)
    checked = site("check-data", site_toml)
    approved = approve(site_toml, contract.hash)

    assert "our data     of its 2 genes you measure 1\n" in shown.stdout
    assert f"contract {contract.hash[:16]}: of its 2 genes you measure 1\n" in (
        checked.stdout
    )
    assert "our data: of its 2 genes you measure 1\n" in approved.stderr
