"""Under patient-level privacy nothing leaves a hospital but what has noise in it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import RecordDict

from fedgex.common import federation, keys
from fedgex.common.codes import Code
from fedgex.common.errors import FederationError
from fedgex.common.study import Study
from fedgex.common.transport.records import to_arrays
from fedgex.server.federation.participants import Simulated
from fedgex.server.federation.run import conduct
from fedgex.server.settings import ServerSettings

from ..conftest import TYPES, Exchange, Finished, InProcessGrid

if TYPE_CHECKING:
    from ..conftest import Consortium

NUMBERS = ["judged-loss", "num-examples", "num-loss-terms", "seconds", "train-loss"]
UP: dict[str, dict[str, set[str] | None]] = {
    "query.prepare": {
        "site": {"name", "version", "genes", "shares-cross-products"},
        "withheld": {"metrics"},
    },
    "train": {"update": None, "metrics": set(), "withheld": {"metrics"}},
}
"""Everything that leaves, as in docs/privacy.md; an update's keys are those trained."""


def study(**changes: Any) -> Study:
    values = {
        "name": "private",
        "minimum_cohort": 10,
        "pretraining": {"rounds": 1, "batch_size": 16},
        "classification": {"rounds": 1, "classes": TYPES},
        "survival": {"rounds": 1, "cancer_types": TYPES},
        "strategy": {"name": "fedavg", "weights": "equal"},
        "privacy": {
            "patient": {
                "noise_multiplier": 5.0,
                "delta": 1e-3,
                "clip": 1.0,
                "sample_rate": 0.5,
            }
        },
        "public": {"statistics": True},
        "evaluation": {"rates": [0.5], "panels": [10]},
    }
    return Study.read(values | changes, "a test's study")


def run(consortium: Consortium, folder: Path, of: Study, sites: Path) -> Finished:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(of.to_json())
    grid = InProcessGrid(sites)
    settings = ServerSettings(
        study=folder / "study.json",
        run_dir=folder,
        holdout=consortium.holdout,
        public=consortium.holdout.with_name("public"),
        n_sites=len(grid.names),
        poll_s=0.001,
    )
    try:
        conduct(grid, settings, Simulated(study=of, n_sites=len(grid.names)))
    finally:
        finished = Finished(run_dir=folder, exchanges=grid.exchanges)
    return finished


@pytest.fixture(autouse=True)
def _a_small_public_cohort_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "MIN_PUBLIC_PATIENTS", 10)


@pytest.fixture
def sites(consortium: Consortium, tmp_path: Path) -> Path:
    """Return a copy of the hospitals, so that no ledger is another test's."""
    for site in consortium.sites.iterdir():
        shutil.copytree(site, tmp_path / "sites" / site.name)
        policy = tmp_path / "sites" / site.name / "policy.toml"
        text = policy.read_text(encoding="utf-8")
        lines = [
            "privacy_epsilon = 1000.0"
            if line.startswith("privacy_epsilon")
            else "privacy_delta = 1e-3"
            if line.startswith("privacy_delta")
            else line
            for line in text.splitlines()
        ]
        policy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "sites"


def test_exactly_the_listed_records_and_keys_leave(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    finished = run(consortium, tmp_path / "run", study(), sites)

    assert {e.message_type for e in finished.exchanges} == set(UP)
    for exchange in finished.exchanges:
        expected = dict(UP[exchange.message_type])
        if "update" in expected:
            expected["update"] = _trained(exchange)
        assert _keys(exchange.reply) == expected
        unsaid = exchange.reply.config_records[keys.WITHHELD][keys.METRICS]
        numbers = NUMBERS if "update" in expected else ["num-patients"]
        assert unsaid == numbers
    states = [s["state"] for e in finished.events("round") for s in e["sites"].values()]
    assert states == ["contributed"] * 3 * len(consortium.names)


def test_what_a_site_says_of_its_genes_depends_on_no_patient(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    """A gene without a single value is told like any other."""
    name = consortium.names[0]
    file = sites / name / "expression.parquet"
    rows = pd.read_parquet(file)
    before = _genes(run(consortium, tmp_path / "a", _short(), sites), name)
    rows[rows.columns[1]] = np.nan
    rows.to_parquet(file)

    after = _genes(run(consortium, tmp_path / "b", _short(), sites), name)

    assert after == before
    assert rows.columns[1] in after


def test_the_model_differs_between_runs_of_one_study(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    """A seed that the server knows would let it take the noise away again."""
    first = run(consortium, tmp_path / "a", _short(), sites)
    second = run(consortium, tmp_path / "b", _short(), sites)
    assert first.digest != second.digest


def test_a_delta_of_one_in_the_patients_is_refused(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    of = _short(privacy={"patient": _rule() | {"delta": 0.2}})

    with pytest.raises(FederationError, match=Code.DELTA_TOO_LARGE):
        run(consortium, tmp_path / "run", of, sites)


def test_sums_over_patients_are_refused(
    consortium: Consortium, sites: Path, tmp_path: Path
) -> None:
    """Even if a server asks for them, against its own study."""
    from importlib.metadata import version

    from flwr.app import ConfigRecord, Message

    grid, of = InProcessGrid(sites), study()
    for kind in (keys.STATISTICS, keys.CROSS_PRODUCTS):
        content = RecordDict(
            {
                keys.STUDY: ConfigRecord({keys.JSON: of.to_json(), "hash": of.hash}),
                keys.SERVER: ConfigRecord({"version": version("fedgex")}),
            }
        )
        grid.pull_messages(grid.push_messages([Message(content, 100, kind)]))
        reply = grid.exchanges[-1].reply
        assert _keys(reply) == {"refusal": {"code"}}
        assert reply.config_records[keys.REFUSAL]["code"] == "FX-SITE-002"


def _rule() -> dict[str, Any]:
    rule = study().privacy.patient
    assert rule is not None
    return rule.model_dump(exclude_none=True)


def _short(**changes: Any) -> Study:
    return study(
        **{
            "pretraining": {"rounds": 1, "batch_size": 16},
            "classification": {"rounds": 0},
            "survival": {"rounds": 0},
        }
        | changes
    )


def _trained(exchange: Exchange) -> set[str]:
    sent = to_arrays(exchange.message.array_records[keys.MODEL])
    return {name for name in sent if not name.startswith("survival.encoder.")}


def _keys(content: RecordDict) -> dict[str, set[str]]:
    found = {name: set(record) for name, record in content.items()}
    for name, record in content.array_records.items():
        found[name] = set(to_arrays(record))
    return found


def _genes(finished: Finished, name: str) -> list[str]:
    (reply,) = (
        e.reply
        for e in finished.exchanges
        if e.site == name and e.message_type == keys.PREPARE
    )
    genes = reply.config_records[keys.SITE]["genes"]
    assert isinstance(genes, list)
    assert not any(isinstance(gene, float) and math.isnan(gene) for gene in genes)
    return [str(gene) for gene in genes]
