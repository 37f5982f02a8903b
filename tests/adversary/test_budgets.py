"""A coordinator that burns the budgets of a hospital's patients, for nothing.

Each message is signed for by nobody but follows an approved contract; it has a model, a
vocabulary or a standardisation with which nothing can be computed, or asks for more
than the contract plans.
"""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

import fedgex.client.app
from fedgex.client.admission.approvals import ApprovalStore
from fedgex.client.admission.gate import Gate
from fedgex.client.cli import app as site_app
from fedgex.client.ledger import debit
from fedgex.client.ledger.ledger import RECOMPUTED, Ledger
from fedgex.client.settings import SiteSettings
from fedgex.client.training import local_round
from fedgex.common import keys
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.messages.fields import Round, Run, Server
from fedgex.common.messages.requests import TrainRequest
from fedgex.common.models import tasks
from fedgex.common.models.parameters import parameters
from fedgex.common.privacy import accounting
from fedgex.common.study import Study
from fedgex.common.transport.records import to_record
from fedgex.common.trust import audit_log

from ..support import hospital
from ..support.hospital import TOMORROW, code, join_and_approve

CONTRACT = f"""\
{hospital.CONTRACT}\
minimum_cohort = 10
public.statistics = true
strategy = {{ name = "fedavg", weights = "equal" }}
[study.privacy.patient]
noise_multiplier = 4.0
delta = 1e-5
clip = 1.0
sample_rate = 1.0
[study.pretraining]
rounds = 3
"""
STUDY = Study.read(tomllib.loads(CONTRACT)["study"], "a test's study")
GENES = Vocabulary(("MYC", "TP53"))
DELTA = 1e-5
PHASE = "pretraining"


def model(*odd: Any) -> dict[str, Any]:
    """Return a model that fits the study, with another array in the first place."""
    made = tasks.named(PHASE, tasks.build(STUDY, len(GENES), PHASE))
    arrays: dict[str, Any] = dict(parameters(made))
    return arrays | dict(zip(arrays, odd, strict=False))


def other_bytes(request: TrainRequest, i: int) -> TrainRequest:
    """Return the same request with a model that differs a little."""
    first = next(iter(model().values()))
    return replace(request, model=to_record(model(first + np.float32(i / 100))))


@dataclass
class Coordinator:
    """A coordinator that asks one hospital, with its app, gate, ledger and data."""

    site_toml: Path
    contract: str

    @property
    def state_dir(self) -> Path:
        return self.site_toml.with_name("state")

    @property
    def rows(self) -> int:
        """Debits in the hospital's ledger."""
        found = debit.existing(self.state_dir)
        return 0 if found is None else len(found.rows())

    @property
    def spent(self) -> float:
        return Ledger.open(self.state_dir).spent(None, DELTA)

    def asking(self, number: int = 1, run: str = "run-1") -> TrainRequest:
        return TrainRequest(
            server=Server(version=version("fedgex")),
            run=Run(contract=self.contract, run=run),
            study=STUDY,
            vocabulary=GENES,
            standardisation=Standardisation(
                mean=np.full(len(GENES), 8.0), sd=np.ones(len(GENES))
            ),
            model=to_record(model()),
            round=Round(phase=PHASE, number=number),
        )

    def ask(self, request: TrainRequest) -> str | None:
        """Return the code of the hospital's refusal, None if it answered."""
        return self.send(request.to_records())

    def send(self, content: RecordDict) -> str | None:
        message = Message(content, 1, keys.TRAIN)
        message.metadata.__dict__["_message_id"] = "message-1"
        context = Context(
            run_id=1,
            node_id=1,
            node_config={"site-toml": str(self.site_toml)},
            state=RecordDict(),
            run_config={},
        )
        gate = Gate(self.site_toml, fedgex.client.app.app)
        return code(gate(message, context).content)

    def approve(self, **more: Any) -> None:
        store = ApprovalStore.of(SiteSettings.load(self.site_toml))
        store.decide(self.contract, "approved", by="N.", expires=TOMORROW, **more)

    def site(self, *command: str) -> str:
        noun, verb, *more = command
        arguments = [noun, verb, str(self.site_toml), *more]
        result = CliRunner().invoke(site_app, arguments)
        assert result.exit_code == 0, result.output
        return result.output


@pytest.fixture(scope="module")
def approved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a hospital with forty patients that approved one run."""
    site_toml, contract = join_and_approve(tmp_path_factory.mktemp("north"), CONTRACT)
    drawn = np.random.default_rng(0).normal(8, 1, (40, 2)).round(2)
    lines = [f"patient-{i},{a},{b}" for i, (a, b) in enumerate(drawn.tolist())]
    site_toml.with_name("absent.csv").write_text("\n".join(["id,MYC,TP53", *lines]))
    return site_toml.parent, contract.hash


@pytest.fixture
def coordinator(
    approved: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Coordinator:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    folder, contract = approved
    shutil.copytree(folder, tmp_path / "north")
    return Coordinator(tmp_path / "north" / "site.toml", contract)


def test_a_round_that_can_be_computed_is_debited_and_answered(
    coordinator: Coordinator,
) -> None:
    assert coordinator.ask(coordinator.asking()) is None
    assert coordinator.rows == 1


# ---- messages with which nothing can be computed ----

NONSENSE = {
    "no parameters": {"model": to_record({})},
    "another shape": {"model": to_record(model(np.zeros((3, 3))))},
    "text for numbers": {"model": to_record(model(np.zeros(2, dtype=np.uint8)))},
    "infinite": {"model": to_record(model(np.full((2, 2), np.inf)))},
    "not a number": {"model": to_record(model(np.full((64,), np.nan)))},
    "a model of other genes": {
        "vocabulary": Vocabulary(("MYC", "TP53", "VIM")),
        "standardisation": Standardisation(mean=np.zeros(3), sd=np.ones(3)),
    },
    "other genes than the contract's": {"vocabulary": Vocabulary(("ACTB", "VIM"))},
}


@pytest.mark.parametrize("changes", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_message_with_which_nothing_can_be_computed_costs_nothing(
    coordinator: Coordinator, changes: dict[str, Any]
) -> None:
    for number in (1, 2, 3):
        assert coordinator.ask(replace(coordinator.asking(number), **changes))

    assert coordinator.rows == 0


def test_a_standardisation_that_cannot_be_costs_nothing(
    coordinator: Coordinator,
) -> None:
    for value in (0.0, -1.0, np.nan, np.inf):
        content = coordinator.asking().to_records()
        scale = {"mean": np.zeros(2), "sd": np.full(2, value)}
        content[keys.STANDARDISATION] = to_record(scale)

        assert coordinator.send(content)

    assert coordinator.rows == 0


def test_too_few_patients_for_a_phase_cost_the_others_nothing(
    coordinator: Coordinator,
) -> None:
    policy = coordinator.site_toml.with_name("policy.toml")
    text = policy.read_text()
    coordinator.ask(coordinator.asking())  # the data were read: forty patients
    policy.write_text(text.replace("minimum_cohort = 10 ", "minimum_cohort = 41 "))

    assert coordinator.ask(coordinator.asking(2))

    assert coordinator.rows == 1


# ---- more than the contract plans ----


def test_one_round_under_many_bytes_is_debited_no_more_than_the_plan_allows(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt fails once it was debited, as on a machine without memory."""

    def fail(*args: Any, **more: Any) -> None:
        raise MemoryError

    codes = []
    with monkeypatch.context() as patch:
        patch.setattr(local_round, "_train_privately", fail)
        for i in range(20):
            codes.append(coordinator.ask(other_bytes(coordinator.asking(), i)))

    assert codes[0] == "FX-SITE-006"
    assert codes[-1] == "FX-PRIV-004"
    assert coordinator.rows == 1 + RECOMPUTED
    assert coordinator.spent < accounting.epsilon(
        accounting.planned(STUDY) + accounting.planned(STUDY), DELTA
    )


def test_a_run_that_needed_a_recomputation_goes_on_to_its_last_round(
    coordinator: Coordinator,
) -> None:
    for number in (1, 2):
        assert coordinator.ask(coordinator.asking(number)) is None
    shutil.rmtree(coordinator.state_dir / "replies")
    assert coordinator.ask(other_bytes(coordinator.asking(2), 1)) is None

    assert coordinator.ask(coordinator.asking(3)) is None

    assert coordinator.rows == 4


# ---- more runs than a person approved ----


def test_a_second_run_needs_a_persons_word(coordinator: Coordinator) -> None:
    for number in (1, 2, 3):
        assert coordinator.ask(coordinator.asking(number)) is None

    assert coordinator.ask(coordinator.asking(1, run="run-2")) == "FX-STUDY-011"
    assert coordinator.rows == 3
    coordinator.approve(runs=2)
    assert coordinator.ask(coordinator.asking(1, run="run-2")) is None
    assert coordinator.ask(coordinator.asking(1, run="run-3")) == "FX-STUDY-011"
    assert coordinator.rows == 4


def test_a_run_that_goes_on_counts_once(coordinator: Coordinator) -> None:
    coordinator.ask(coordinator.asking(1))
    coordinator.ask(coordinator.asking(1, run="run-2"))

    assert coordinator.ask(coordinator.asking(2)) is None
    coordinator.approve()  # prolonged, and no further run
    assert coordinator.ask(coordinator.asking(3)) is None
    assert coordinator.ask(coordinator.asking(1, run="run-2")) == "FX-STUDY-011"


def test_a_number_of_runs_that_was_changed_on_the_disk_admits_nothing(
    coordinator: Coordinator,
) -> None:
    path = coordinator.state_dir / "decisions" / f"{coordinator.contract}.json"
    changed = path.read_text().replace(r"\"runs\":1", r"\"runs\":9")
    assert changed != path.read_text()
    path.write_text(changed)

    assert coordinator.ask(coordinator.asking(1)) == "FX-STUDY-001"


def test_an_approval_of_an_earlier_release_has_no_number_and_goes_on(
    coordinator: Coordinator,
) -> None:
    coordinator.approve(runs=None)
    lines = audit_log.read(coordinator.state_dir / "audit.jsonl")
    assert "runs" not in lines[-1]

    for run in ("run-1", "run-2", "run-3"):
        assert coordinator.ask(coordinator.asking(1, run=run)) is None
    listed = coordinator.site("study", "list")
    assert f"approved until {TOMORROW}, any number of runs" in listed


def test_what_is_approved_is_said(coordinator: Coordinator) -> None:
    said = coordinator.site(
        *("study", "approve", coordinator.contract, "--by", "N."),
        *("--expires", f"{TOMORROW - timedelta(days=1)}", "--runs", "2"),
    )
    coordinator.ask(coordinator.asking(1))

    assert f"until {TOMORROW - timedelta(days=1)} for 2 runs by N." in said
    shown = coordinator.site("study", "show", coordinator.contract)
    assert "runs         2 approved, 1 begun: run-1" in shown
    assert "2 runs" in coordinator.site("study", "list")
