"""`fedgex-admin` as its reader sees it: what it prints, refuses, and exits with."""

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models import checkpoint, tasks
from fedgex.common.study import Study
from fedgex.common.trust import pki
from fedgex.common.trust.audit_log import Head
from fedgex.common.trust.receipt import NO_RECEIPT, Part, Receipt, SitePart
from fedgex.common.trust.signed import Signed, sign
from fedgex.server.cli import app
from fedgex.server.consortium import commands
from fedgex.server.consortium.store import Consortium
from fedgex.server.journal import Journal


@dataclasses.dataclass
class Shell:
    """Runs `fedgex-admin` against one state directory."""

    state: Path

    def __call__(self, *arguments: object, exit_code: int = 0) -> Result:
        result = CliRunner().invoke(
            app, [str(a) for a in arguments], env={"FEDGEX_STATE": str(self.state)}
        )
        assert result.exit_code == exit_code, result.output
        return result

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--format", "json").stdout)


@pytest.fixture
def admin(admitted: Any) -> Shell:
    """Return the command line of the consortium of north and south."""
    return Shell(admitted.folder)


@pytest.fixture
def published(admin: Shell, admitted: Any, drafted: dict[str, Path]) -> str:
    """Return the hash of a contract drafted, signed and published by commands."""
    made = admin.json("study", "new", *_terms(drafted))
    admin("study", "sign", drafted["contract"], "--key", admitted.keys["ada"])
    sent = admin.json(
        "study", "publish", drafted["contract"], "--key", admitted.keys["ada"]
    )
    assert sent["contract"] == made["hash"]
    return str(made["hash"])


def _terms(drafted: dict[str, Path], *more: str) -> list[object]:
    return [
        *("--study", drafted["study"], "--genes", drafted["genes"]),
        *("--purpose", "restoration of three genes", "--expires", "2999-12-31"),
        *("--sites", "north, south", "--out", drafted["contract"]),
        *("--no-secure-aggregation", "a test", *more),
    ]


@pytest.fixture
def run(admitted: Any, published: str) -> Path:
    """Return the folder of a finished run of two rounds, south late in the second."""
    folder: Path = admitted.folder / "runs" / "small"
    folder.mkdir()
    _set(folder, "finished", published)
    journal = Journal(folder / "journal.jsonl")
    plan = [{"phase": "pretraining", "rounds": 2}]
    journal.write("run-started", study="small", sites=["north", "south"], plan=plan)
    late = {"state": "late", "reason": "no answer in 5 s"}
    came = {"state": "contributed", "reason": None}
    for number, south in ((1, came), (2, late)):
        journal.write(
            "round",
            phase="pretraining",
            round=number,
            rounds=2,
            seconds=10.0,
            train_loss=0.5,
            sites={"north": came, "south": south},
            holdout={"mcar": {"0.5": {"mse": 0.25 / number}}},
        )
    study = Study.read({"name": "small", "pretraining": {"rounds": 2}}, "test")
    previous, receipts = NO_RECEIPT, []
    for number in (1, 2):
        signed = _receipt(admitted, published, number, previous)
        previous = signed.hash
        receipts.append(signed)
        checkpoint.save(
            checkpoint.Checkpoint(
                study=study,
                vocabulary=Vocabulary(("ESR1", "MKI67", "TP53")),
                standardisation=Standardisation(mean=np.zeros(3), sd=np.ones(3)),
                phase="pretraining",
                round=number,
                parameters=tasks.initial(study, 3),
            ),
            folder / "checkpoints" / f"{number:05d}-pretraining-{number:05d}",
            receipt=signed.to_json(),
        )
    journal.write("run-finished", checkpoint="00002-pretraining-00002")
    return folder


def _set(folder: Path, state: str, contract: str, reason: str | None = None) -> None:
    facts = {"state": state, "reason": reason, "contract": contract}
    partial = folder / "state.partial"
    partial.write_text(json.dumps(facts))
    partial.replace(folder / "state.json")


def _receipt(admitted: Any, contract: str, number: int, previous: str) -> Signed:
    """Return the coordinator's receipt of a round to which north contributed."""
    consortium: Consortium = admitted.consortium
    update = f"{number}" * 64
    part = Part(
        contract=contract,
        run="small",
        site="north",
        type="train",
        phase="pretraining",
        round=number,
        request="a" * 64,
        reply=update,
        head=Head(1, "b" * 64),
        patients="suppressed",
    ).to_json()
    north = SitePart(
        state="contributed",
        patients="suppressed",
        update=update,
        part=part,
        signature=sign(admitted.sites["north"], part.encode()),
        certificate=consortium.sites()["north"].certificate,
    )
    receipt = Receipt(
        contract=contract,
        run="small",
        index=number,
        phase="pretraining",
        round=number,
        incoming=f"{number}" * 64,
        outgoing=f"{number + 1}" * 64,
        sites={"north": north, "south": SitePart(state="late", reason="no answer")},
        previous=previous,
        time=datetime.now(UTC),
    )
    return Signed(receipt.to_json()).signed_by(
        consortium.coordinator_key, consortium.coordinator
    )


def _pending(state: Path) -> list[str]:
    paths = (state / "orders" / "pending").glob("*.json")
    contents = [Signed.from_json(p.read_text(), str(p)).content for p in paths]
    return sorted(json.loads(content)["kind"] for content in contents)


# ---- consortium, administrators, hospitals ----


def test_a_consortium_is_founded_and_peopled_by_commands_alone(
    tmp_path: Path, ask: Callable[..., Any]
) -> None:
    admin = Shell(tmp_path / "state")
    admin("consortium", "init", "alliance", "--host", "fed.example.org", "--port", 443)
    asked = admin.json("administrator", "request", "ada", "--out", tmp_path / "ada")
    admin(
        *("administrator", "add", asked["request"]),
        *("--fingerprint", asked["fingerprint"], "--out", tmp_path / "ada" / "ada.crt"),
    )
    request, kit = ask("north"), tmp_path / "kit.json"
    admin(
        *("site", "add", "north", "--request", request.path),
        *("--fingerprint", request.fingerprint, "--out", kit),
    )

    status = admin.json("consortium", "status")

    assert status["server"] == "fed.example.org:443"
    assert (status["administrators"], status["sites"]) == (["ada"], ["north"])
    assert status["warnings"] == []
    assert status["running"] is False
    assert json.loads(kit.read_text())["site"] == "north"
    assert (tmp_path / "ada" / "ada.crt").read_text().startswith("-----BEGIN CERT")


def test_without_a_state_directory_the_usage_is_wrong() -> None:
    result = CliRunner().invoke(app, ["site", "list"])

    assert result.exit_code == 2


def test_a_folder_that_is_no_consortium_is_not_found(tmp_path: Path) -> None:
    result = Shell(tmp_path)("site", "list", exit_code=3)

    assert "fedgex-admin consortium init" in result.stderr


def test_an_authority_is_not_founded_twice(admin: Shell) -> None:
    result = admin("consortium", "init", "other", "--host", "h", exit_code=1)

    assert "an authority is never overwritten" in result.stderr


def test_a_refused_hospital_gets_no_kit(
    admin: Shell, ask: Callable[..., Any], tmp_path: Path
) -> None:
    request, kit = ask("east"), tmp_path / "kit.json"

    result = admin(
        *("site", "add", "west", "--request", request.path),
        *("--fingerprint", "00", "--out", kit),
        exit_code=1,
    )

    assert result.stderr.startswith("Error: the request's fingerprint is")
    assert 'the request is of "east"; expected "west"' in result.stderr
    assert not kit.exists()


def test_hospitals_are_listed_with_state_and_expiry(admin: Shell) -> None:
    admin("site", "revoke", "south", "--reason", "left")

    rows = {row["name"]: row for row in admin.json("site", "list")}
    text = admin("site", "list").stdout.splitlines()

    assert rows["north"]["state"] == "active"
    assert rows["south"]["reason"] == "left"
    assert datetime.fromisoformat(rows["north"]["expires"]) > datetime.now()
    assert text[0].split()[:3] == ["name", "state", "expires"]
    assert len(text) == 3


def test_rotation_and_renewal_write_new_kits(
    admin: Shell, ask: Callable[..., Any], tmp_path: Path
) -> None:
    first, second, new = tmp_path / "1.json", tmp_path / "2.json", ask("north")
    admin("site", "renew", "north", "--out", first)
    admin(
        *("site", "rotate", "north", "--request", new.path),
        *("--fingerprint", new.fingerprint, "--out", second),
    )

    kits = [json.loads(path.read_text()) for path in (first, second)]
    keys = [pki.fingerprint(pki.from_pem(kit["certificate"])) for kit in kits]
    assert keys[0] != keys[1] == pki.fingerprint(new.key.public_key())


def test_an_unknown_hospital_is_not_found(admin: Shell) -> None:
    result = admin("site", "revoke", "east", "--reason", "x", exit_code=3)

    assert 'no hospital "east"; expected one of north, south' in result.stderr


def test_status_warns_of_certificates_that_end_soon(
    admin: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgex.server.consortium.store.VALID_DAYS", 20)
    admin("consortium", "renew")

    result = admin("consortium", "status")

    assert result.stderr.count("Warning: the certificate of") == 2
    assert "run fedgex-admin consortium renew" in result.stderr


def test_administrators_are_listed_and_revoked(admin: Shell) -> None:
    admin("administrator", "revoke", "ada", "--reason", "left")

    assert [row["name"] for row in admin.json("administrator", "list")] == ["bo"]
    assert (
        "no administrator"
        in admin("administrator", "revoke", "ada", "--reason", "x", exit_code=3).stderr
    )


def test_an_administrators_key_is_not_made_twice(tmp_path: Path, admin: Shell) -> None:
    admin("administrator", "request", "cy", "--out", tmp_path)

    result = admin("administrator", "request", "cy", "--out", tmp_path, exit_code=1)
    assert "never overwritten" in result.stderr


# ---- studies ----


def test_a_contract_is_listed_and_shown_with_its_answers(
    admin: Shell, published: str
) -> None:
    (row,) = admin.json("study", "list")
    shown = admin.json("study", "show", published[:8])
    text = admin("study", "show", "small").stdout

    assert (row["hash"], row["approved"]) == (published, "0 of 2")
    assert row["state"] == "usable"
    assert shown["answers"] == {"north": None, "south": None}
    assert shown["contract"]["study"]["name"] == "small"
    assert "answer of north: none yet" in text
    assert 'purpose = "restoration of three genes"' in text


def test_a_contract_is_signed_where_only_key_and_certificate_are(
    admin: Shell, admitted: Any, drafted: dict[str, Path]
) -> None:
    admin("study", "new", *_terms(drafted))
    key = admitted.keys["bo"]
    certificate = admitted.consortium.administrators()["bo"]
    key.with_suffix(".crt").write_text(pki.to_pem(certificate))

    result = CliRunner().invoke(
        app, ["study", "sign", str(drafted["contract"]), "--key", str(key)]
    )

    assert result.exit_code == 0
    assert 'signed_by: ["bo"]' in result.stdout


def test_a_key_without_its_certificate_signs_nothing(
    admin: Shell, admitted: Any, drafted: dict[str, Path]
) -> None:
    admin("study", "new", *_terms(drafted))

    arguments = ["study", "sign", str(drafted["contract"])]
    result = CliRunner().invoke(app, [*arguments, "--key", str(admitted.keys["bo"])])

    assert result.exit_code == 1
    assert "bo.crt does not exist" in result.stderr


def test_a_study_that_cannot_be_a_contract_is_refused(
    admin: Shell, drafted: dict[str, Path]
) -> None:
    drafted["study"].write_text('[study]\nname = "Small"\n')

    result = admin("study", "new", *_terms(drafted), exit_code=1)
    assert "study.name" in result.stderr
    assert not drafted["contract"].exists()


def test_a_date_that_is_none_is_wrong_usage(
    admin: Shell, drafted: dict[str, Path]
) -> None:
    admin("study", "new", *_terms(drafted, "--expires", "soon"), exit_code=2)


# ---- runs ----


def test_the_same_launch_twice_is_one_run(
    admin: Shell, admitted: Any, published: str
) -> None:
    launch = ("run", "launch", "small", "--submit-token", "t1")
    first = admin.json(*launch, "--key", admitted.keys["ada"])
    again = admin.json(*launch, "--key", admitted.keys["bo"])

    assert first == again
    assert first["run"] == "small"
    assert (first["contract"], first["state"]) == (published, "pending")
    assert _pending(admin.state) == ["launch", "publish"]
    assert [(r["run"], r["state"]) for r in admin.json("run", "list")] == [
        ("small", "ordered")
    ]


def test_a_launch_without_a_server_says_that_it_waits(
    admin: Shell, admitted: Any, published: str
) -> None:
    result = admin("run", "launch", "small", "--key", admitted.keys["ada"])

    assert "The server is not running" in result.stderr


def test_a_launch_of_an_unpublished_contract_is_not_found(
    admin: Shell, admitted: Any
) -> None:
    key = admitted.keys["ada"]
    result = admin("run", "launch", "small", "--key", key, exit_code=3)

    assert "fedgex-admin study publish" in result.stderr


def test_a_launch_with_a_strangers_key_is_refused(
    admin: Shell, published: str, tmp_path: Path
) -> None:
    pki.save_key(pki.new_key(), tmp_path / "x.key")

    result = admin("run", "launch", "small", "--key", tmp_path / "x.key", exit_code=1)
    assert "is no administrator's of alliance" in result.stderr


def test_a_launch_with_an_expired_certificate_is_refused(
    admin: Shell, admitted: Any, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC).replace(microsecond=0, day=1)
    monkeypatch.setattr(pki, "now", lambda: now.replace(year=now.year + 2))

    key = admitted.keys["ada"]
    result = admin("run", "launch", "small", "--key", key, exit_code=1)
    assert "expired on" in result.stderr


@pytest.mark.parametrize("kind", ["stop", "resume"])
def test_a_run_under_way_is_stopped_and_resumed_by_orders(
    admin: Shell, admitted: Any, run: Path, published: str, kind: str
) -> None:
    _set(run, "running", published)

    admin("run", kind, "small", "--key", admitted.keys["ada"])

    assert _pending(admin.state) == sorted(["publish", kind])


def test_there_is_nothing_to_order_about_a_run_that_is_not_there(
    admin: Shell, admitted: Any
) -> None:
    key = admitted.keys["ada"]
    result = admin("run", "stop", "other", "--key", key, exit_code=3)

    assert 'no run "other"' in result.stderr


def test_a_finished_run_is_not_stopped(admin: Shell, admitted: Any, run: Path) -> None:
    key = admitted.keys["ada"]
    result = admin("run", "stop", "small", "--key", key, exit_code=1)

    assert "is finished, so there is nothing to stop" in result.stderr
    assert _pending(admin.state) == ["publish"]


def test_runs_are_listed_with_their_last_round(admin: Shell, run: Path) -> None:
    (row,) = admin.json("run", "list")

    assert (row["run"], row["state"]) == ("small", "finished")
    assert row["last_round"] == "pretraining 2/2"


def test_status_takes_a_runs_name(admin: Shell, run: Path) -> None:
    facts = admin.json("run", "status", "small")

    assert facts["absent"] == {"south": "late: no answer in 5 s"}


def test_receipts_are_verified_and_name_who_did_not_contribute(
    admin: Shell, run: Path
) -> None:
    told = admin.json("run", "receipts", "small")
    text = admin("run", "receipts", "small")

    assert told["verified"] is True
    assert [r["index"] for r in told["receipts"]] == [1, 2]
    assert told["receipts"][0]["sites"]["north"]["patients"] == "suppressed"
    assert told["receipts"][1]["sites"]["south"]["reason"] == "no answer"
    assert "2 receipts, all signatures and the chain verified" in text.stderr


def test_a_receipt_that_was_removed_or_changed_is_found(
    admin: Shell, run: Path
) -> None:
    first, second = sorted(run.glob("checkpoints/*/receipt.json"))
    content = second.read_text()
    second.write_text(content.replace("no answer", "no excuse"))
    assert (
        "receipt 2 does not hold"
        in admin("run", "receipts", "small", exit_code=1).stderr
    )

    second.write_text(content)
    first.unlink()
    assert (
        "receipt 1 does not hold"
        in admin("run", "receipts", "small", exit_code=1).stderr
    )


def test_watch_tells_each_round_with_error_epsilon_time_and_absences(
    admin: Shell, run: Path
) -> None:
    lines = admin("run", "watch", "small").stdout.splitlines()

    assert lines == [
        "phase=pretraining round=1/2 train_loss=0.500 restoration_mse=0.250 "
        "epsilon=none left=0:00:10 absent=nobody",
        "phase=pretraining round=2/2 train_loss=0.500 restoration_mse=0.125 "
        "epsilon=none left=0:00:00 absent=south late (no answer in 5 s)",
    ]


def test_a_contract_says_what_protects_in_it(
    admin: Shell, drafted: dict[str, Path], published: str
) -> None:
    for words in (["study", "new", *_terms(drafted)], ["study", "show", "small"]):
        lines = admin(*words).stdout.splitlines()
        assert any(line.startswith("protection: None: updates") for line in lines)

        (line,) = admin.json(*words)["protections"]
        assert line.startswith("None: updates")


def test_watch_gives_one_line_of_json_an_event(admin: Shell, run: Path) -> None:
    lines = admin("run", "watch", "small", "--format", "json").stdout.splitlines()

    events = [json.loads(line)["event"] for line in lines]
    assert events == ["run-started", "round", "round", "run-finished"]


def test_watch_of_a_failed_run_says_why(
    admin: Shell, run: Path, published: str
) -> None:
    _set(run, "failed", published, "the quorum was missed")

    result = admin("run", "watch", "small", exit_code=1)
    assert 'the run "small" failed: the quorum was missed' in result.stderr


def test_watch_does_not_wait_for_a_server_that_is_not_there(
    admin: Shell, run: Path, published: str
) -> None:
    _set(run, "running", published)

    result = admin("run", "watch", "small", exit_code=4)
    assert "the server is not running" in result.stderr


# ---- models ----


def test_a_model_is_a_candidate_until_two_administrators_release_it(
    admin: Shell, admitted: Any, run: Path
) -> None:
    release = ("model", "release", "small", "--key")
    first = admin.json(*release, admitted.keys["ada"])
    again = admin.json(*release, admitted.keys["ada"])
    (listed,) = admin.json("model", "list")
    second = admin.json(*release, admitted.keys["bo"])

    assert first["missing"] == 1
    assert again == first
    assert listed["state"] == "candidate"
    assert listed["approvals"] == "1 of 2"
    assert (second["approved_by"], second["missing"]) == (["ada", "bo"], 0)
    assert _pending(admin.state) == ["publish", "release", "release"]
    models = {
        order.model for order in commands.take(admitted.consortium) if order.model
    }
    assert models == {second["manifest"]}


def test_a_run_under_way_releases_nothing(
    admin: Shell, admitted: Any, run: Path, published: str
) -> None:
    _set(run, "running", published)

    key = admitted.keys["ada"]
    result = admin("model", "release", "small", "--key", key, exit_code=1)
    assert "is running; expected a finished one" in result.stderr


def test_a_changed_model_is_not_released(
    admin: Shell, admitted: Any, run: Path
) -> None:
    (model,) = run.glob("checkpoints/00002*/model.safetensors")
    model.write_bytes(model.read_bytes()[:-1] + b"x")

    key = admitted.keys["ada"]
    result = admin("model", "release", "small", "--key", key, exit_code=1)
    assert "differs from its SHA-256" in result.stderr


def test_what_is_not_released_is_not_exported(
    admin: Shell, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small.fedgex"

    result = admin("model", "export", "small", "--out", out, exit_code=1)
    assert "is not released: 0 of 2 administrators" in result.stderr
    assert not out.exists()


def test_a_file_that_is_no_bundle_is_not_verified(admin: Shell, tmp_path: Path) -> None:
    (tmp_path / "x.fedgex").write_text("no bundle")

    admin("model", "verify", tmp_path / "x.fedgex", exit_code=1)


def test_a_bundle_is_not_verified_against_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["model", "verify", str(tmp_path / "x.fedgex")])

    assert result.exit_code == 1
    assert "there is nothing to verify the bundle with" in result.stderr


@pytest.fixture
def served(admin: Shell) -> Iterator[None]:
    """Answer on the health port, as a running server does."""
    toml = admin.state / "consortium.toml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = toml.read_text().replace("health_port = 1\n", f"health_port = {port}\n")
        toml.write_text(text)
        yield


@pytest.mark.usefixtures("served")
def test_the_server_is_said_to_run_while_it_answers(
    admin: Shell, admitted: Any, published: str
) -> None:
    result = admin("run", "launch", "small", "--key", admitted.keys["ada"])

    assert "not running" not in result.stderr


@pytest.mark.usefixtures("served")
def test_watch_follows_a_run_until_it_is_no_longer_under_way(
    admin: Shell, run: Path, published: str
) -> None:
    _set(run, "running", published)
    ending = threading.Timer(1.0, _set, (run, "finished", published))
    ending.start()

    began = time.monotonic()
    admin("run", "watch", "small")

    assert 0.9 < time.monotonic() - began < 30
