"""A hospital whose numbers are on another scale than it says takes no part in a run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import ConfigRecord, Message

from fedgex.common import federation, keys
from fedgex.common.data.cohort import load_cohort, save_cohort
from fedgex.common.data.moments import GeneMoments, foreign_scale, foreign_scales
from fedgex.common.data.scales import Scale
from fedgex.common.errors import FederationError
from fedgex.simulations.data.split import split
from fedgex.simulations.scenario import find

from ..support import alliance as alliances
from .conftest import N_SITES, Consortium, Finished, write_hospitals

ODD = "hospital-02"
SHORT: dict[str, Any] = {
    "pretraining": {"rounds": 2},
    "classification": {"rounds": 0},
    "survival": {"rounds": 0},
    "vocabulary": {"genes": [f"GENE{i:04d}" for i in range(1, 131)]},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Write hospitals of a large panel, one in natural logarithms called log2p1."""
    folder = tmp_path_factory.mktemp("wide")
    wide = write_hospitals(folder / "data", n_genes=150, patients_per_site=20)
    path = wide.sites / ODD / "expression.parquet"
    table = pd.read_parquet(path)
    values = table.select_dtypes("number").columns
    table[values] *= np.log(2)
    table.to_parquet(path)
    return wide


@pytest.fixture(scope="module")
def ran(wide: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return wide.conduct(wide.study(**SHORT), tmp_path_factory.mktemp("ran"))


def test_it_is_left_out_of_the_run_and_the_journal_says_why(
    wide: Consortium, ran: Finished
) -> None:
    (left_out,) = ran.events("not-answered")

    assert (left_out["site"], left_out["state"]) == (ODD, "quarantined")
    assert "0.7" in left_out["reason"]
    assert "data.scale" in left_out["reason"]
    others = [name for name in wide.names if name != ODD]
    assert ran.events("run-started")[0]["sites"] == others
    assert ran.final.trained_on["sites"] == others
    for event in ran.events("round"):
        states = {name: site["state"] for name, site in event["sites"].items()}
        assert states == dict.fromkeys(others, "contributed") | {ODD: "quarantined"}
    asked = {e.message_type for e in ran.exchanges if e.site == ODD}
    assert asked == {keys.PREPARE, keys.STATISTICS}


def test_the_run_is_that_of_the_others(
    wide: Consortium, ran: Finished, tmp_path: Path
) -> None:
    shutil.copytree(wide.sites, tmp_path / "sites")
    shutil.rmtree(tmp_path / "sites" / ODD)

    without = wide.conduct(
        wide.study(**SHORT), tmp_path / "run", sites=tmp_path / "sites"
    )

    assert not without.events("not-answered")
    assert without.digest == ran.digest


@pytest.mark.parametrize("messages", [0, 1, N_SITES - 1])
def test_it_stays_out_when_the_server_is_started_again(
    wide: Consortium, ran: Finished, tmp_path: Path, messages: int
) -> None:
    wide.conduct(wide.study(**SHORT), tmp_path, kill_after=messages)
    resumed = wide.conduct(wide.study(**SHORT), tmp_path)

    assert resumed.digest == ran.digest
    assert resumed.events("round")[-1]["sites"][ODD]["state"] == "quarantined"
    assert {e.message_type for e in resumed.exchanges if e.site == ODD} == {
        keys.PREPARE
    }


def test_without_it_the_quorum_may_be_missed_and_the_run_says_who_is_out(
    wide: Consortium, tmp_path: Path
) -> None:
    study = wide.study(**SHORT, rounds={"quorum": N_SITES})

    with pytest.raises(FederationError, match=f"{ODD}: quarantined .*data.scale"):
        wide.conduct(study, tmp_path)


def test_on_a_scale_that_is_no_logarithm_nobody_is_compared(
    wide: Consortium, tmp_path: Path
) -> None:
    log = load_cohort(wide.holdout, Scale.LOG2P1)
    linear = dataclasses.replace(log, expression=np.exp2(log.expression) - 1)
    save_cohort(linear, tmp_path / "holdout", Scale.LINEAR)
    study = wide.study(**SHORT, scale="linear")

    run = dataclasses.replace(wide, holdout=tmp_path / "holdout").conduct(
        study, tmp_path / "run"
    )

    assert not run.events("not-answered")
    assert run.events("run-started")[0]["sites"] == list(wide.names)


# ---- where the server has no sums of it to compare ----


def reasons(run: Finished) -> list[str | None]:
    """Return why the odd hospital did not contribute, in each round."""
    return [event["sites"][ODD]["reason"] for event in run.events("round")]


def test_late_for_the_statistics_it_refuses_each_round_itself(
    wide: Consortium, tmp_path: Path
) -> None:
    def late(name: str, message: Message) -> None:
        if name == ODD and message.metadata.message_type == keys.STATISTICS:
            message.content["late"] = ConfigRecord({})

    run = wide.conduct(wide.study(**SHORT), tmp_path, alter=late)

    assert [e["reason"] for e in run.events("not-answered")] == [
        "FX-SITE-002",
        "FX-SITE-010",  # of the cross-products
    ]
    assert reasons(run) == ["FX-SITE-010"] * 2


def test_away_at_the_start_it_refuses_once_it_joins(
    wide: Consortium, tmp_path: Path
) -> None:
    def away(name: str, message: Message) -> None:
        if name == ODD and message.metadata.message_type != keys.TRAIN:
            message.content["away"] = ConfigRecord({})

    others = len(wide.names) - 1
    wide.conduct(wide.study(**SHORT), tmp_path, alter=away, kill_after=others)
    run = wide.conduct(wide.study(**SHORT), tmp_path)

    assert ODD in run.events("run-started")[-1]["sites"]
    assert run.events("round")[-1]["sites"][ODD]["reason"] == "FX-SITE-010"


@pytest.mark.parametrize("secure", [False, True])
def test_where_a_public_cohort_gives_the_statistics_it_refuses_before_it_trains(
    wide: Consortium,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    secure: bool,
) -> None:
    monkeypatch.setattr(federation, "MIN_PUBLIC_PATIENTS", 10)
    changes: dict[str, Any] = {
        "cross_products": False,
        "public": {"statistics": True},
        "strategy": {"name": "fedavg", "update": "delta", "weights": "equal"},
    }
    if secure:
        changes["secure_aggregation"] = {"clip": 100.0}
        changes["rounds"] = {"quorum": 3}
    study = wide.study(**SHORT | changes)

    run = wide.conduct(study, tmp_path, public=wide.holdout.with_name("public"))

    assert reasons(run) == ["FX-SITE-010"] * 2
    asked = {e.message_type for e in run.exchanges if e.site == ODD}
    assert asked == {keys.PREPARE, keys.SECURE_KEYS if secure else keys.TRAIN}
    for event in run.events("round"):
        contributed = [s["state"] == "contributed" for s in event["sites"].values()]
        assert sum(contributed) == N_SITES - 1


def test_between_hospitals_the_receipts_name_it(
    wide: Consortium, tmp_path: Path
) -> None:
    names = wide.names[:3]
    alliance = alliances.found(tmp_path / "alliance", wide.sites, names)
    study = wide.study(**SHORT, cross_products=False, rounds={"quorum": 2})

    alliance.conduct(alliance.agree(study))

    for name in names:
        state, reason = alliance.states(name)[-1]
        assert state == ("quarantined" if name == ODD else "contributed")
        assert "data.scale" in str(reason) or name != ODD


def test_real_hospitals_are_on_one_scale_and_each_is_told_once_it_is_not(
    shared_data: Path, tmp_path: Path
) -> None:
    parts = split(find("release"), shared_data, tmp_path / "split")
    sites = tmp_path / "split" / "sites"
    tables = {
        name: pd.read_parquet(sites / name / "expression.parquet").select_dtypes(
            "number"
        )
        for name in parts.sites
    }
    genes = sorted(set().union(*tables.values()))
    moments = {
        name: GeneMoments.of(table.reindex(columns=genes).to_numpy()).suppressed(10)
        for name, table in tables.items()
    }

    assert len(moments) == 25
    assert foreign_scales(moments) == {}
    published = federation.standardisation(moments).mean
    means = [np.where(m.count > 0, m.mean, np.nan) for m in moments.values()]
    assert {foreign_scale(mean, published) for mean in means} == {None}
    for name, right in moments.items():
        for factor in (np.log(2), np.log10(2)):
            wrong = dataclasses.replace(
                right,
                total=right.total * factor,
                square_total=right.square_total * factor**2,
            )
            found = foreign_scales(moments | {name: wrong})
            assert found == {name: pytest.approx(factor, rel=0.08)}
