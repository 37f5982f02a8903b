"""What a site answers when something fails, and when its data change during a run."""

import errno
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import fedgex.client.app
import fedgex.client.training.answers
from fedgex.client.policy import FILE, TEMPLATE
from fedgex.common import keys
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models import tasks
from fedgex.common.study import Study
from fedgex.common.transport.records import to_arrays, to_record

GENES = ("ACTB", "EGFR", "KRAS", "MYC", "TP53", "VIM")
PATIENTS = tuple(f"PAT-{i:03d}" for i in range(1, 17))
STUDY = Study.read(
    {
        "name": "test",
        "minimum_cohort": 10,
        "pretraining": {"rounds": 2},
        "strategy": {"name": "fedavg"},
    },
    "test",
)


def panel() -> pd.DataFrame:
    """Return 16 patients x 6 genes on log2(x + 1)."""
    values = np.random.default_rng(0).normal(8, 1, (len(PATIENTS), len(GENES)))
    index = pd.Index(PATIENTS, name="patient")
    return pd.DataFrame(values, index=index, columns=list(GENES))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return the folder of a hospital that nobody has opted out of."""
    panel().to_csv(tmp_path / "expression.csv")
    (tmp_path / "opt-outs.txt").write_text("")
    (tmp_path / "site.toml").write_text(
        'name = "north"\n[data]\nexpression = "expression.csv"\n'
        'scale = "log2p1"\nopt_outs = "opt-outs.txt"\n'
    )
    (tmp_path / FILE).write_text(TEMPLATE)
    return tmp_path


@pytest.fixture(autouse=True)
def _flower_knows_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def ask(site: Path, kind: str, **records: Any) -> RecordDict:
    """Return what the hospital's app answers."""
    study = ConfigRecord({keys.JSON: STUDY.to_json(), "hash": STUDY.hash})
    server = ConfigRecord({"version": version("fedgex")})
    content = RecordDict({keys.STUDY: study, keys.SERVER: server, **records})
    message = Message(content, 1, kind)
    message.metadata.__dict__["_message_id"] = "message-1"
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"site-toml": str(site / "site.toml")},
        state=RecordDict(),
        run_config={},
    )
    return fedgex.client.app.app(message, context).content


def ask_to_train(site: Path) -> RecordDict:
    vocabulary = Vocabulary(GENES)
    first = tasks.initial(STUDY, len(GENES))
    model = tasks.download_state(
        STUDY, "pretraining", tasks.begin(STUDY, "pretraining", first)
    )
    return ask(
        site,
        keys.TRAIN,
        **{
            keys.VOCABULARY: ConfigRecord(
                {"genes": list(GENES), "hash": vocabulary.hash}
            ),
            keys.STANDARDISATION: to_record(
                {"mean": np.full(len(GENES), 8.0), "sd": np.ones(len(GENES))}
            ),
            keys.MODEL: to_record(model),
            keys.ROUND: ConfigRecord({"phase": "pretraining", "number": 1}),
        },
    )


def code(reply: RecordDict) -> str | None:
    """Return the code of a refusal, which must then be all that there is."""
    if keys.REFUSAL not in reply:
        return None
    assert list(reply) == [keys.REFUSAL]
    assert list(reply.config_records[keys.REFUSAL]) == ["code"]
    return str(reply.config_records[keys.REFUSAL]["code"])


# ---- failures ----


def out_of_numpys_memory() -> None:
    np.empty(2**50)


def out_of_torchs_memory() -> None:
    torch.empty(2**50)


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        pytest.param(raising(MemoryError()), "FX-SITE-006", id="Python's memory"),
        pytest.param(out_of_numpys_memory, "FX-SITE-006", id="NumPy's memory"),
        pytest.param(out_of_torchs_memory, "FX-SITE-006", id="torch's memory, CPU"),
        pytest.param(
            raising(torch.OutOfMemoryError("CUDA out of memory")),
            "FX-SITE-006",
            id="torch's memory, GPU",
        ),
        pytest.param(
            raising(torch.AcceleratorError("CUDA error: unspecified launch failure")),
            "FX-SITE-008",
            id="the GPU",
        ),
        pytest.param(
            raising(OSError(errno.ENOSPC, "No space left on device")),
            "FX-SITE-009",
            id="the disk",
        ),
        pytest.param(raising(RuntimeError("else")), "FX-SITE-001", id="anything else"),
    ],
)
def test_a_failure_leaves_as_the_code_of_its_kind(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], None],
    expected: str,
) -> None:
    def read_cohort(*args: Any) -> None:
        fail()

    monkeypatch.setattr(fedgex.client.training.answers, "read_cohort", read_cohort)

    assert code(ask(site, keys.PREPARE)) == expected


# ---- data that change during a run ----


def without_a_gene(site: Path) -> None:
    panel().drop(columns="KRAS").to_csv(site / "expression.csv")


def with_another_gene(site: Path) -> None:
    panel().assign(BRCA1=7.5).to_csv(site / "expression.csv")


def with_one_gene_for_another(site: Path) -> None:
    panel().rename(columns={"KRAS": "NRAS"}).to_csv(site / "expression.csv")


def on_another_scale(site: Path) -> None:
    path = site / "site.toml"
    path.write_text(path.read_text().replace('"log2p1"', '"ln1p"'))


@pytest.mark.parametrize(
    "change",
    [
        without_a_gene,
        with_another_gene,
        with_one_gene_for_another,
        on_another_scale,
    ],
)
def test_other_genes_or_another_scale_than_at_the_start_are_refused(
    site: Path, change: Callable[[Path], None]
) -> None:
    assert code(ask(site, keys.PREPARE)) is None

    change(site)

    assert code(ask_to_train(site)) == "FX-DATA-074"


def test_a_run_that_asks_again_still_finds_the_panel_that_it_began_with(
    site: Path,
) -> None:
    first, second = (
        {keys.RUN: ConfigRecord({"contract": "", "run": name})}
        for name in ("one", "two")
    )
    assert code(ask(site, keys.PREPARE, **first)) is None

    with_another_gene(site)

    assert code(ask(site, keys.PREPARE, **first)) == "FX-DATA-074"
    assert code(ask(site, keys.PREPARE, **second)) is None


def test_data_put_back_are_served_again(site: Path) -> None:
    ask(site, keys.PREPARE)
    without_a_gene(site)
    assert code(ask_to_train(site)) == "FX-DATA-074"

    panel().to_csv(site / "expression.csv")

    assert code(ask_to_train(site)) is None


def test_a_new_export_is_for_the_next_start_of_a_run(site: Path) -> None:
    ask(site, keys.PREPARE)
    without_a_gene(site)

    told = ask(site, keys.PREPARE).config_records[keys.SITE]["genes"]

    assert told == [gene for gene in GENES if gene != "KRAS"]
    assert code(ask_to_train(site)) is None


def trained_on(reply: RecordDict) -> object:
    assert code(reply) is None
    assert to_arrays(reply.array_records[keys.UPDATE])
    return reply.metric_records[keys.METRICS][keys.NUM_EXAMPLES]


def test_who_opts_out_after_the_start_is_no_change_of_the_data(site: Path) -> None:
    ask(site, keys.PREPARE)

    (site / "opt-outs.txt").write_text(f"{PATIENTS[3]}\n")

    assert trained_on(ask_to_train(site)) == len(PATIENTS) - 1


def test_the_only_patient_with_a_gene_may_opt_out_too(site: Path) -> None:
    sheet = panel()
    sheet.loc[sheet.index != PATIENTS[3], "KRAS"] = np.nan
    sheet.to_csv(site / "expression.csv")
    told = ask(site, keys.PREPARE).config_records[keys.SITE]["genes"]
    assert told == [gene for gene in GENES if gene != "KRAS"]  # known of too few

    (site / "opt-outs.txt").write_text(f"{PATIENTS[3]}\n")

    assert trained_on(ask_to_train(site)) == len(PATIENTS) - 1


def test_patients_added_after_the_start_are_no_change_of_the_data(site: Path) -> None:
    ask(site, keys.PREPARE)

    more = panel().set_index(pd.Index([f"NEW-{i}" for i in range(len(PATIENTS))]))
    pd.concat([panel(), more]).to_csv(site / "expression.csv")

    assert trained_on(ask_to_train(site)) == 2 * len(PATIENTS)


# ---- names of genes ----


@pytest.mark.parametrize(
    ("in_file", "in_study"), [("MARCH1", "MARCHF1"), ("MARCHF1", "MARCH1")]
)
def test_a_gene_is_reported_under_the_study_s_name_for_it(
    site: Path, monkeypatch: pytest.MonkeyPatch, in_file: str, in_study: str
) -> None:
    panel().rename(columns={"KRAS": in_file}).to_csv(site / "expression.csv")

    rule = {"genes": ["ACTB", in_study, "TP53"]}
    study = Study.read({**STUDY.model_dump(), "vocabulary": rule}, "test")
    monkeypatch.setitem(globals(), "STUDY", study)

    genes = ask(site, keys.PREPARE).config_records[keys.SITE]["genes"]

    assert isinstance(genes, list)
    assert {"ACTB", in_study, "TP53"} <= set(genes)
    assert in_file not in genes


def test_another_gene_table_is_read_without_a_restart(site: Path) -> None:
    head = "symbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\n"
    rows = "".join(f"{gene}\tApproved\t\t\t\n" for gene in GENES)
    table = site / "hgnc.txt"
    table.write_text(head + rows)
    settings = site / "site.toml"
    settings.write_text(settings.read_text() + 'hgnc_table = "hgnc.txt"\n')
    before = ask(site, keys.PREPARE).config_records[keys.SITE]["genes"]
    assert isinstance(before, list)

    table.write_text(
        head + rows.replace("KRAS\tApproved\t\t", "NRAS\tApproved\t\tKRAS")
    )
    after = ask(site, keys.PREPARE).config_records[keys.SITE]["genes"]
    assert isinstance(after, list)

    assert "KRAS" in before
    assert "KRAS" not in after
    assert "NRAS" in after
