"""`fedgex-site log verify` finds what was changed or cut."""

from datetime import UTC, datetime
from pathlib import Path

from fedgex.client.identity import Identity
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.receipt import Part, Receipt
from fedgex.common.trust.signed import Signed

from .conftest import (
    Authority,
    approve,
    site,
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
    about = {
        "contract": contract,
        "run": "run-1",
        "type": "train",
        "phase": "pretraining",
        "round": 1,
        "request": "1" * 64,
        "reply": "2" * 64,
        "patients": "suppressed",
    }
    head = Chain(state / "audit.jsonl").append("answered", **about)
    last = {"index": head.index, "hash": head.hash}
    part = Part.read({**about, "site": "north", "head": last}, "part").to_json()
    north = Identity.load(state)
    entry = {
        "state": "contributed",
        "update": "2" * 64,
        "part": part,
        "signature": north.sign(part.encode()),
        "certificate": pki.to_pem(north.certificate),
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
    key = pki.new_key()
    request = pki.request(key, "alliance", "coordinator")
    coordinator = pki.issue(
        *authority, request, name="alliance", role="coordinator", days=30
    )
    text = Receipt.read(values, "receipt").to_json()
    signed = Signed(text).signed_by(key, coordinator)
    (folder / "00001.json").write_text(signed.to_json())


def test_a_log_that_is_not_there_exits_with_three(folder: Path) -> None:
    assert site("log", "verify", folder / "site.toml").exit_code == 3
