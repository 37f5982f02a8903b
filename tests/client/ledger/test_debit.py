"""Under differential privacy a hospital debits before it computes, or it declines."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner, Result

import fedgex.client.app
from fedgex.client.cli import app as site_app
from fedgex.client.ledger import debit
from fedgex.client.ledger.budget import Account
from fedgex.client.ledger.ledger import FILE, KEY, BudgetError, Ledger, LedgerError
from fedgex.client.policy import TEMPLATE, Policy
from fedgex.client.service import daemon
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.messages.fields import Round, Server
from fedgex.common.messages.replies import Reply
from fedgex.common.messages.requests import TrainRequest, read_request
from fedgex.common.privacy import accounting
from fedgex.common.study import Study
from fedgex.common.transport.records import to_record
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed

from ...support import hospital
from ...support.hospital import Died, as_bytes, code, death_at, join_and_approve

CONTRACT = f"""\
{hospital.CONTRACT}\
public.statistics = true
strategy = {{ name = "fedavg", weights = "equal" }}
[study.privacy.patient]
noise_multiplier = 4.0
delta = 1e-5
clip = 1.0
sample_rate = 1.0
[study.pretraining]
rounds = 5
"""
STUDY = Study.read(tomllib.loads(CONTRACT)["study"], "a test's study")
DELTA = 1e-5
PATIENTS = tuple(f"patient-{i:04d}" for i in range(40))


def after(rounds: int) -> float:
    """Return what so many rounds cost a patient."""
    history = [
        done
        for number in range(1, rounds + 1)
        for done in accounting.invocations(STUDY, "pretraining", number)
    ]
    return accounting.epsilon(history, DELTA)


def asked_to_train(study: Study) -> TrainRequest:
    genes = Vocabulary(("MYC", "TP53"))
    unit = Standardisation.identity(len(genes))
    return TrainRequest(
        server=Server(version=version("fedgex")),
        study=study,
        vocabulary=genes,
        standardisation=unit,
        model=to_record({}),
        round=Round(phase="pretraining", number=1),
    )


@dataclass
class Hospital(hospital.Hospital):
    """A hospital whose app debits its patients before it does little."""

    patients: tuple[str, ...] = PATIENTS

    @property
    def settings(self) -> SiteSettings:
        return SiteSettings.load(self.site_toml)

    @property
    def spent(self) -> float:
        return Ledger.open(self.state_dir).spent(None, DELTA)

    def permit(self, epsilon: float) -> None:
        policy = self.site_toml.with_name("policy.toml")
        new = f"privacy_epsilon = {epsilon!r} "
        policy.write_text(TEMPLATE.replace("privacy_epsilon = 8.0 ", new))

    def app(self, message: Message, context: Context) -> Message:
        request = read_request(message.metadata.message_type, message.content)
        assert isinstance(request, TrainRequest)
        debit.charge(request, self.settings, self.patients)
        return super().app(message, context)

    def why(self) -> str:
        """Return why the last request was refused, which stays in the log."""
        return str(audit_log.read(self.state_dir / "audit.jsonl")[-1]["why"])


@pytest.fixture(scope="module")
def approved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Signed]:
    """Return the folder of a hospital that approved the contract, to be copied."""
    site_toml, contract = join_and_approve(tmp_path_factory.mktemp("north"), CONTRACT)
    assert Contract.read_signed(contract).study == STUDY
    return site_toml.parent, contract


@pytest.fixture
def north(
    approved: tuple[Path, Signed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Hospital:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    folder, contract = approved
    shutil.copytree(folder, tmp_path / "north")
    return Hospital(tmp_path / "north" / "site.toml", contract)


def site(command: str, north: Hospital, *more: str) -> Result:
    noun, verb = command.split()
    arguments = [noun, verb, str(north.site_toml), *more]
    return CliRunner().invoke(site_app, arguments)


# ---- the order of a round ----


def test_a_round_is_debited_and_logged_before_it_is_computed(north: Hospital) -> None:
    assert code(north.ask()) is None

    assert north.events()[-6:] == [
        "decision",
        "ledger-created",
        "asked",
        "debited",
        "answered",
        "kept",
    ]
    (row,) = Ledger.open(north.state_dir).rows()
    line = audit_log.read(north.state_dir / "audit.jsonl")[-3]
    assert line["ledger"] == {"index": 1, "hash": row.hash}
    assert line["request"] == row.about.request
    assert north.spent == after(1)


def test_the_same_again_is_sent_again_and_not_charged(north: Hospital) -> None:
    first, again = north.ask(), north.ask()

    assert as_bytes(first) == as_bytes(again)
    assert (north.spent, north.computed[1]) == (after(1), 1)


def test_the_same_round_for_another_model_is_charged_if_it_is_computed(
    north: Hospital,
) -> None:
    north.ask(1, model=0)
    assert code(north.ask(1, model=1)) == "FX-RUN-002"
    assert north.spent == after(1)

    shutil.rmtree(north.state_dir / "replies")  # nothing tells that it was answered
    assert code(north.ask(1, model=1)) is None
    assert north.spent == after(2)


def test_an_answer_that_may_have_left_is_not_computed_again_under_its_debit(
    north: Hospital,
) -> None:
    north.ask()
    shutil.rmtree(north.state_dir / "replies")

    assert code(north.ask()) == "FX-RUN-002"
    assert "it may have left" in north.why()
    assert (north.spent, north.computed[1]) == (after(1), 1)


@pytest.mark.parametrize(
    ("point", "nth", "computed"),
    [
        ("ledger.before", 1, 1),
        ("ledger.debited", 1, 1),
        ("audit.before", 1, 1),  # the ledger is there, the log does not know
        ("audit.before", 3, 1),  # debited, not logged
        ("audit.appended", 3, 1),
        ("site.after_train", 1, 2),
        ("audit.before", 4, 2),  # before it says "answered"
        ("reply.written", 1, 2),
        ("reply.renamed", 1, 1),  # stored: sent again, and not computed again
        ("audit.before", 5, 1),  # before it says "kept"
        ("site.before_send", 1, 1),
    ],
)
def test_after_a_death_at_any_step_a_round_is_charged_once(
    north: Hospital, point: str, nth: int, computed: int
) -> None:
    with death_at(point, nth):
        north.ask()

    again, once_more = north.ask(), north.ask()

    assert code(again) is None
    assert as_bytes(again) == as_bytes(once_more)
    assert north.computed[1] == computed
    assert north.spent == after(1)
    assert len(debit.heads(north.state_dir)) == 2  # its beginning, and one debit


def test_a_patient_who_opted_out_stays_in_the_ledger(north: Hospital) -> None:
    north.ask(1)
    north.patients = PATIENTS[:-1]
    north.ask(2)

    ledger = Ledger.open(north.state_dir)
    assert ledger.spent(PATIENTS[-1:], DELTA) == after(1)
    assert ledger.spent(PATIENTS[:1], DELTA) == after(2)


# ---- the budget ----


def test_a_round_beyond_the_budget_is_declined_before_it_is_computed(
    north: Hospital,
) -> None:
    north.permit(after(2))

    assert [code(north.ask(i)) for i in (1, 2, 3, 3)] == [
        None,
        None,
        "FX-PRIV-002",
        "FX-PRIV-002",
    ]
    assert north.computed == {1: 1, 2: 1}
    assert north.spent == after(2)
    assert f"policy.toml permits {after(2):g}" in north.why()
    assert not any(patient in north.why() for patient in PATIENTS)
    north.permit(after(3))
    assert code(north.ask(3)) is None


def test_a_debited_round_may_be_computed_whatever_the_budget_became(
    north: Hospital,
) -> None:
    with death_at("site.after_train"):
        north.ask()
    north.permit(1e-3)

    assert code(north.ask(1)) is None
    assert code(north.ask(2)) == "FX-PRIV-002"


def test_a_hospital_that_demands_privacy_takes_part_where_patients_have_it() -> None:
    demanding = Policy.proposed(demand_privacy=True)
    text = CONTRACT.replace("study.privacy.patient", "study.privacy.site")
    text = text.replace("sample_rate = 1.0\n", "").replace(
        'weights = "equal"', 'weights = "equal", update = "delta", per_gene = false'
    )

    private, of_sites = (Contract.from_toml(each, "-") for each in (CONTRACT, text))

    assert demanding.objections(private.study) == []
    assert len(demanding.objections(of_sites.study)) == 1


def test_a_study_without_patient_privacy_needs_no_ledger(north: Hospital) -> None:
    study = Study.read({"name": "plain"}, "a test's study")

    debit.charge(asked_to_train(study), north.settings, PATIENTS)

    assert debit.existing(north.state_dir) is None
    assert not (north.state_dir / FILE).exists()


def test_the_app_tells_codes_and_nothing_else(
    north: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = asked_to_train(STUDY).to_records()
    message = Message(content, 1, keys.TRAIN)
    message.metadata.__dict__["_message_id"] = "message-1"
    config = {"site-toml": str(north.site_toml)}
    context = Context(
        run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={}
    )
    told = {}
    for error in (LedgerError("of patient-0042"), BudgetError("of patient-0042")):

        def fail(*_: object, error: LedgerError = error) -> Reply:
            raise error

        reply = fedgex.client.app.answer(fail)(message, context).content
        assert b"0042" not in as_bytes(reply)
        told[type(error).__name__] = code(reply)

    assert told == {"LedgerError": "FX-PRIV-003", "BudgetError": "FX-PRIV-002"}


# ---- restored, replaced, removed ----


def test_a_ledger_from_an_old_backup_refuses_everything(
    north: Hospital, tmp_path: Path
) -> None:
    north.ask(1)
    shutil.copy(north.state_dir / FILE, tmp_path / FILE)
    north.ask(2)
    shutil.copy(tmp_path / FILE, north.state_dir / FILE)

    assert code(north.ask(3)) == "FX-PRIV-003"
    assert code(north.ask(2)) == "FX-PRIV-003"  # a stored answer neither
    assert "restored from a backup, or replaced" in north.why()
    with pytest.raises(LedgerError, match="restored from a backup"):
        daemon.run(north.site_toml)
    assert site("ledger verify", north).exit_code == 1
    assert site("ledger statement", north).exit_code == 1


@pytest.mark.parametrize("names", [(FILE,), (KEY,), (FILE, KEY)])
def test_a_ledger_that_was_removed_is_not_made_anew(
    north: Hospital, names: tuple[str, ...]
) -> None:
    north.ask(1)
    for name in names:
        (north.state_dir / name).unlink()

    assert code(north.ask(2)) == "FX-PRIV-003"
    assert not any((north.state_dir / name).exists() for name in names)
    assert north.computed[2] == 0


def test_another_ledger_in_its_place_is_refused(
    north: Hospital, tmp_path: Path
) -> None:
    north.ask(1)
    Ledger.create(tmp_path)
    for name in (FILE, KEY):
        shutil.copy(tmp_path / name, north.state_dir / name)

    assert code(north.ask(2)) == "FX-PRIV-003"


def test_a_ledger_beside_a_log_that_does_not_know_it_is_refused(
    north: Hospital, tmp_path: Path
) -> None:
    shutil.copy(north.state_dir / "audit.jsonl", tmp_path / "audit.jsonl")
    north.ask(1)
    shutil.copy(tmp_path / "audit.jsonl", north.state_dir / "audit.jsonl")

    assert code(north.ask(2)) == "FX-PRIV-003"
    assert "records none" in north.why()


def test_a_ledger_ahead_of_the_log_goes_on(
    north: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(log: Chain, event: str, **fields: Any) -> Any:
        if event == debit.DEBITED:
            raise Died
        return honest(log, event, **fields)

    honest = Chain.append
    with monkeypatch.context() as patch:
        patch.setattr(Chain, "append", append)
        with pytest.raises(Died):
            north.ask(1)

    assert code(north.ask(2)) is None
    assert north.spent == after(2)


# ---- what people see ----


def test_show_says_what_was_done_what_is_spent_and_left(north: Hospital) -> None:
    empty = site("ledger show", north)
    north.ask(1)
    north.patients = PATIENTS[1:]
    north.ask(2)
    shown = site("ledger show", north)
    told = json.loads(site("ledger show", north, "--format", "json").stdout)

    assert empty.stdout.startswith("no patient was used under differential privacy yet")
    header, line, last = shown.stdout.splitlines()
    assert header.split()[-2:] == ["patients", "epsilon"]
    assert line.split() == [
        north.contract.hash[:16],
        "run-1",
        "pretraining",
        *("2", "Gaussian", "4", "1", "2", "40"),
        f"{after(2):.3f}",
    ]
    assert last == (
        f"spent {after(2):.3f} of epsilon 8 at delta 1e-05, of the patient used most; "
        f"left {8 - after(2):.3f}"
    )
    assert told["spent"] == after(2)
    assert told["uses"][0]["patients"] == 40


def test_verify_compares_with_the_audit_log(north: Hospital) -> None:
    assert site("ledger verify", north).exit_code == 3
    north.ask(1)
    result = site("ledger verify", north)

    head = Ledger.open(north.state_dir).head
    assert result.exit_code == 0
    assert result.stdout == (
        "ok: 1 rows, none changed, removed or reordered; it holds all 2 heads that the "
        f"audit log names; head {head.hash}\n"
    )


def test_export_has_every_row_and_no_patient(north: Hospital) -> None:
    north.ask(1)
    north.ask(2)
    as_csv = site("ledger export", north).stdout
    rows = json.loads(site("ledger export", north, "--format", "json").stdout)

    ledger = Ledger.open(north.state_dir)
    assert [row["hash"] for row in rows] == [row.hash for row in ledger.rows()]
    assert {row["patients"] for row in rows} == {40}
    assert as_csv.splitlines()[0] == ",".join(rows[0])
    assert len(as_csv.splitlines()) == 3
    for pseudonym in ledger.read().cohorts[rows[0]["cohort"]]:
        assert pseudonym.hex() not in as_csv + json.dumps(rows)


def test_the_statement_names_everything_that_a_guarantee_needs(
    north: Hospital,
) -> None:
    north.ask(1)
    text = site("ledger statement", north).stdout

    for said in (
        "| Unit of privacy | one patient",
        "added or removed",
        f"**{after(1):.3f}** at delta 1e-05",
        "epsilon 8 at delta 1e-05, for each patient",
        "Poisson, and secret",
        "PRV accountant",
        "adaptive and sequential",
        "## What is not covered",
        "None was approved here",
        "## Tuning",
        Ledger.open(north.state_dir).head.hash,
    ):
        assert said in text
    assert "{" not in text


def test_status_tells_the_rounds_that_the_budget_permits(north: Hospital) -> None:
    north.permit(after(3))
    north.ask(1)
    result = CliRunner().invoke(site_app, ["status", str(north.site_toml)])

    assert f"privacy      spent {after(1):.3g} of epsilon {after(3):g} " in (
        result.stdout
    )
    assert "budget for 2 of 4 rounds to come" in result.stdout

    (north.state_dir / FILE).unlink()
    result = CliRunner().invoke(site_app, ["status", str(north.site_toml)])
    assert "Warning: FX-PRIV-003: " in result.stdout


def test_study_show_says_what_the_study_would_cost(north: Hospital) -> None:
    before = site("study show", north, north.contract.hash).stdout
    north.permit(after(3))
    tight = site("study show", north, north.contract.hash).stdout

    assert (
        "privacy      for each patient, made here: the study costs epsilon "
        f"{after(5):.3g} at delta 1e-05\n"
        f"privacy      budget of a patient: epsilon 0 spent, {after(5):.3g} after this "
        "study, 8 permitted\n"
    ) in before
    assert "ends this study early" not in before
    assert "ends this study early: FX-PRIV-002" in tight


def test_what_is_left_counts_who_was_used_most(north: Hospital) -> None:
    north.ask(1)
    north.patients = ("new",)
    north.ask(2)
    account = Account.of(north.settings)

    assert account.spent == after(1)
    # Whoever was in the first round has three to come, as has the new one.
    assert account.after(north.contract.hash, STUDY) == after(4)
    assert account.study_epsilon(STUDY) == after(5)
