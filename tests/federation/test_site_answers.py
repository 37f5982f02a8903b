"""What leaves a hospital: numbers, or a code; never a text and never a patient."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from numpy.typing import NDArray
from safetensors.numpy import load_file

import fedgex.client.app
from fedgex.client.training import local_round
from fedgex.common import keys
from fedgex.common.data.cross_products import CrossProducts, unpack
from fedgex.common.data.moments import SUPPRESSED
from fedgex.common.models import factor_model
from fedgex.common.transport.records import to_arrays

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

FLOOR = 10
TYPES = ("type-1", "type-2")
TRAIN_NUMBERS = {
    "num-examples",
    "num-loss-terms",
    "train-loss",
    "judged-loss",
    "seconds",
}
SHORT: dict[str, Any] = {
    "pretraining": {"rounds": 1},
    "classification": {"rounds": 0},
    "survival": {"rounds": 0},
    "cross_products": False,
}
"""Changes that leave one round of the study."""
ALLOWED: dict[str, dict[str, set[str] | None]] = {
    "query.prepare": {
        "site": {"name", "version", "genes", "num-patients", "shares-cross-products"}
    },
    "query.statistics": {
        "moments": {"count", "total", "square-total"},
        "metrics": {"num-patients"},
    },
    "query.cross_products": {
        "cross-products": {"others/products", "others/pair-counts", "others/totals"}
    },
    "train": {"update": None, "metrics": TRAIN_NUMBERS},
}
"""Records and keys of each reply; an update's keys are those of the model sent."""


# ---- what leaves when all is well ----


def test_a_reply_holds_the_records_and_keys_of_the_list_and_no_others(
    finished: Finished,
) -> None:
    assert {e.message_type for e in finished.exchanges} == set(ALLOWED)
    for exchange in finished.exchanges:
        allowed = dict(ALLOWED[exchange.message_type])
        if "update" in allowed:
            allowed["update"] = {
                name
                for name in to_arrays(exchange.message.array_records[keys.MODEL])
                if not name.startswith("survival.encoder.")  # frozen, so only sent
            }
        found = {name: set(record) for name, record in exchange.reply.items()}
        for name, record in exchange.reply.array_records.items():
            found[name] = set(to_arrays(record))
        assert found == allowed


def test_no_patients_identifier_is_in_any_message_or_reply(
    consortium: Consortium, finished: Finished
) -> None:
    ids = consortium.patient_ids()
    assert len(set(ids)) > 60
    assert all(patient.startswith("Hospital-0") for patient in ids)

    for exchange in finished.exchanges:
        for content in (exchange.message_bytes, exchange.reply_bytes):
            assert b"Hospital-0" not in content
            assert not any(patient.encode() in content for patient in ids)


def test_no_row_of_expression_is_in_any_reply(
    consortium: Consortium, finished: Finished
) -> None:
    for name in consortium.names:
        rows = pd.read_parquet(consortium.sites / name / "expression.parquet")
        wanted = {
            np.asarray(row[:4], dtype=dtype).tobytes()
            for row in rows.to_numpy()
            for dtype in (np.float32, np.float64)
        }
        for exchange in finished.exchanges:
            if exchange.site == name:
                assert not any(row in exchange.reply_bytes for row in wanted)


# ---- refusals: a code leaves, the others go on, the journal names site and reason ----


def test_an_exceptions_text_stays_and_a_code_leaves(
    consortium: Consortium,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train_round = local_round.train_round

    def fail_at_one_site(*args: Any, site: str, **settings: Any) -> Any:
        if site == consortium.names[1]:
            raise RuntimeError("row of patient Jane-Doe-4711 cannot be trained on")
        return train_round(*args, site=site, **settings)

    monkeypatch.setattr(local_round, "train_round", fail_at_one_site)
    with caplog.at_level(logging.ERROR, logger=fedgex.client.app.__name__):
        run = consortium.conduct(consortium.study(**SHORT), tmp_path)

    failed = [
        e
        for e in run.exchanges
        if e.message_type == keys.TRAIN and e.site == consortium.names[1]
    ]
    assert len(failed) == 1
    for exchange in failed:
        assert _plain(exchange.reply) == {"refusal": {"code": "FX-SITE-001"}}
        assert b"Jane" not in exchange.reply_bytes
    assert "Jane-Doe-4711" in caplog.text  # the hospital's own log says what happened
    assert b"Jane" not in (tmp_path / "journal.jsonl").read_bytes()
    _assert_refused_and_the_others_went_on(run, consortium.names[1], "FX-SITE-001")


def _wrong_hash(message: Message) -> None:
    message.content.config_records[keys.STUDY]["hash"] = "0" * 64


def _wrong_version(message: Message) -> None:
    message.content.config_records[keys.SERVER]["version"] = "0.0.0"


def test_another_patch_release_on_the_server_is_served(
    consortium: Consortium, tmp_path: Path
) -> None:
    window = ".".join(version("fedgex").split(".")[:2])

    def alter(site: str, message: Message) -> None:
        message.content.config_records[keys.SERVER]["version"] = f"{window}.99"

    run = consortium.conduct(consortium.study(**SHORT), tmp_path, alter=alter)

    (event,) = run.events("round")
    assert {s["state"] for s in event["sites"].values()} == {"contributed"}


def _changed_study(message: Message) -> None:
    record = message.content.config_records[keys.STUDY]
    record[keys.JSON] = str(record[keys.JSON]).replace(
        '"minimum_cohort":10', '"minimum_cohort":1'
    )


def _wrong_vocabulary_hash(message: Message) -> None:
    message.content.config_records[keys.VOCABULARY]["hash"] = "0" * 64


def _another_gene(message: Message) -> None:
    genes = message.content.config_records[keys.VOCABULARY]["genes"]
    assert isinstance(genes, list)
    genes[-1] = "ZZZ3"


@pytest.mark.parametrize(
    "tamper",
    [
        _wrong_hash,
        _wrong_version,
        _changed_study,
        _wrong_vocabulary_hash,
        _another_gene,
    ],
)
def test_a_site_refuses_to_train_for_what_it_did_not_agree_to(
    consortium: Consortium, tmp_path: Path, tamper: Callable[[Message], None]
) -> None:
    refusing = consortium.names[2]

    def alter(site: str, message: Message) -> None:
        if site == refusing and message.metadata.message_type == keys.TRAIN:
            tamper(message)

    run = consortium.conduct(consortium.study(**SHORT), tmp_path, alter=alter)

    _assert_refused_and_the_others_went_on(run, refusing, "FX-SITE-002")


@pytest.mark.parametrize("tamper", [_wrong_hash, _wrong_version, _changed_study])
def test_a_site_that_refuses_the_study_is_left_out_by_name_of_its_node(
    consortium: Consortium, tmp_path: Path, tamper: Callable[[Message], None]
) -> None:
    def alter(site: str, message: Message) -> None:
        if site == consortium.names[0]:
            tamper(message)

    run = consortium.conduct(consortium.study(**SHORT), tmp_path, alter=alter)

    (left_out,) = run.events("not-answered")
    assert (left_out["state"], left_out["reason"]) == ("refused", "FX-SITE-002")
    assert run.events("run-started")[0]["sites"] == list(consortium.names[1:])
    assert set(run.events("round")[0]["sites"]) == set(consortium.names[1:])
    asked = [e.message_type for e in run.exchanges if e.site == consortium.names[0]]
    assert asked == [keys.PREPARE]


def test_a_task_that_a_hospital_does_not_permit_is_refused_and_the_others_go_on(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = _copy_with(consortium, tmp_path, 3, ', "survival"]', "]")

    run = consortium.conduct(consortium.study(), tmp_path / "run", sites=sites)

    for event in run.events("round"):
        site = event["sites"][consortium.names[3]]
        if event["phase"] == "survival":
            assert (site["state"], site["reason"]) == ("refused", "FX-SITE-002")
        else:
            assert site["state"] == "contributed"
    assert len(run.rounds) == 6


def test_cross_products_without_permission_are_refused_and_the_others_are_pooled(
    consortium: Consortium, finished: Finished, tmp_path: Path
) -> None:
    sites = _copy_with(
        consortium,
        tmp_path,
        0,
        "share_cross_products = true",
        "share_cross_products = false",
    )

    run = consortium.conduct(consortium.study(), tmp_path / "run", sites=sites)

    (refused,) = run.events("not-answered")
    assert refused["site"] == consortium.names[0]
    assert refused["reason"] == "FX-SITE-002"
    (reply,) = [
        e.reply
        for e in run.exchanges
        if e.message_type == keys.CROSS_PRODUCTS and e.site == consortium.names[0]
    ]
    assert _plain(reply) == {"refusal": {"code": "FX-SITE-002"}}
    others = _covariance(consortium, consortium.names[1:], run)
    found = load_file(run.run_dir / "covariance.safetensors")["covariance"]
    np.testing.assert_allclose(found, others, atol=1e-6)
    assert run.digest == finished.digest  # the model does not depend on them


def test_a_site_with_unusable_files_is_left_out_with_the_code_of_the_finding(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = tmp_path / "sites"
    shutil.copytree(consortium.sites, sites)
    path = sites / consortium.names[0] / "clinical.csv"
    table = pd.read_csv(path)
    table.loc[1, "patient"] = table.loc[0, "patient"]
    table.to_csv(path, index=False)

    run = consortium.conduct(consortium.study(**SHORT), tmp_path / "run", sites=sites)

    (left_out,) = run.events("not-answered")
    assert left_out["reason"].startswith("FX-DATA-")
    (only,) = [e for e in run.exchanges if e.site == consortium.names[0]]
    assert _plain(only.reply) == {"refusal": {"code": left_out["reason"]}}
    assert len(run.rounds) == 1


# ---- what a policy withholds ----


LOSSES_ONLY = 'metrics = ["train-loss", "judged-loss"]'
ALL_METRICS = 'metrics = ["train-loss", "judged-loss", "seconds", "num-patients"]'


def test_metrics_that_a_policy_does_not_permit_do_not_leave_and_are_null(
    consortium: Consortium, tmp_path: Path
) -> None:
    withheld = 'metrics = ["judged-loss", "num-patients"]'
    sites = _copy_with(consortium, tmp_path, 0, ALL_METRICS, withheld)

    run = consortium.conduct(consortium.study(**SHORT), tmp_path / "run", sites=sites)

    (reply,) = [
        _plain(e.reply)
        for e in run.exchanges
        if e.site == consortium.names[0] and e.message_type == keys.TRAIN
    ]
    assert set(reply["metrics"]) == {"num-examples", "num-loss-terms", "judged-loss"}
    assert reply["withheld"] == {"metrics": ["seconds", "train-loss"]}
    (event,) = run.events("round")
    told = event["sites"][consortium.names[0]]
    assert told["state"] == "contributed"
    assert told["train_loss"] is None
    assert told["seconds"] is None
    others = [event["sites"][name] for name in consortium.names[1:]]
    assert event["train_loss"] == pytest.approx(
        np.average(
            [site["train_loss"] for site in others],
            weights=[site["num_examples"] for site in others],
        )
    )


def test_a_loss_that_every_site_withholds_is_null(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = tmp_path / "sites"
    shutil.copytree(consortium.sites, sites)
    for path in sites.glob("*/policy.toml"):
        path.write_text(path.read_text().replace('"train-loss", ', ""))

    run = consortium.conduct(consortium.study(**SHORT), tmp_path / "run", sites=sites)

    (event,) = run.events("round")
    assert event["train_loss"] is None
    assert event["judged_loss"] > 0


def test_a_number_of_patients_may_be_withheld_where_all_weigh_the_same(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = _copy_with(consortium, tmp_path, 0, ALL_METRICS, LOSSES_ONLY)
    study = consortium.study(
        **SHORT | {"strategy": {"name": "fedavg", "weights": "equal"}}
    )

    run = consortium.conduct(study, tmp_path / "run", sites=sites)

    for exchange in run.exchanges:
        if exchange.site == consortium.names[0]:
            for name, record in _plain(exchange.reply).items():
                assert name == "withheld" or not {
                    "num-patients",
                    "num-examples",
                    "num-loss-terms",
                } & set(record)
    (event,) = run.events("round")
    told = event["sites"].values()
    assert {site["state"] for site in told} == {"contributed"}
    assert event["sites"][consortium.names[0]]["num_examples"] is None
    assert event["train_loss"] == pytest.approx(
        np.mean([site["train_loss"] for site in told])
    )
    assert run.final.trained_on["patients"] is None


def test_a_site_that_withholds_its_patients_refuses_to_be_weighted_by_them(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = _copy_with(consortium, tmp_path, 0, ALL_METRICS, LOSSES_ONLY)

    run = consortium.conduct(consortium.study(**SHORT), tmp_path / "run", sites=sites)

    (left_out,) = run.events("not-answered")
    assert (left_out["state"], left_out["reason"]) == ("refused", "FX-SITE-002")
    assert run.events("run-started")[0]["sites"] == list(consortium.names[1:])


def test_a_site_that_demands_privacy_refuses_a_study_without(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = _copy_with(
        consortium, tmp_path, 0, "demand_privacy = false", "demand_privacy = true"
    )

    run = consortium.conduct(consortium.study(**SHORT), tmp_path / "run", sites=sites)

    (left_out,) = run.events("not-answered")
    assert left_out["reason"] == "FX-SITE-002"


def test_patients_who_opt_out_during_a_run_are_missing_from_its_next_round(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = tmp_path / "sites"
    shutil.copytree(consortium.sites, sites)
    site = sites / consortium.names[0]
    path = site / "site.toml"
    path.write_text(
        path.read_text().replace("[data]\n", '[data]\nopt_outs = "opt-outs.txt"\n')
    )
    (site / "opt-outs.txt").write_text("# nobody yet\n")
    patient = pd.read_csv(site / "clinical.csv")["patient"][0]

    def alter(name: str, message: Message) -> None:
        number = message.content.config_records.get(keys.ROUND, {}).get("number")
        if name == consortium.names[0] and number == 2:
            (site / "opt-outs.txt").write_text(f"{patient}\n")

    study = consortium.study(**SHORT | {"pretraining": {"rounds": 2}})
    run = consortium.conduct(study, tmp_path / "run", sites=sites, alter=alter)

    first, second = (
        e["sites"][consortium.names[0]]["num_examples"] for e in run.events("round")
    )
    assert second == first - 1


# ---- statistics ----


def test_counts_below_the_floor_are_suppressed_and_never_nought(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = tmp_path / "sites"
    shutil.copytree(consortium.sites, sites)
    site = consortium.names[0]
    path = sites / site / "expression.parquet"
    table = pd.read_parquet(path)
    below, at = table.columns[:2]
    table.loc[table.index[FLOOR - 1 :], below] = np.nan
    table.loc[table.index[FLOOR:], at] = np.nan
    table.to_parquet(path)

    study = consortium.study(**SHORT | {"cross_products": True})
    run = consortium.conduct(study, tmp_path / "run", sites=sites)

    replies = {e.message_type: e.reply for e in run.exchanges if e.site == site}
    genes = list(run.final.vocabulary.genes)
    moments = to_arrays(replies[keys.STATISTICS].array_records[keys.MOMENTS])
    assert moments["count"][genes.index(below)] == SUPPRESSED
    assert moments["total"][genes.index(below)] == 0
    assert moments["square-total"][genes.index(below)] == 0
    assert moments["count"][genes.index(at)] == FLOOR
    assert moments["total"][genes.index(at)] > 0
    sent = to_arrays(replies[keys.CROSS_PRODUCTS].array_records[keys.PRODUCTS])
    counts = sent["others/pair-counts"]
    assert not set(range(FLOOR)) & set(counts.tolist())
    assert (counts == SUPPRESSED).any()
    assert (sent["others/products"][counts == SUPPRESSED] == 0).all()
    assert sent["others/totals"][genes.index(below)] == 0
    assert sent["others/totals"][genes.index(at)] != 0


def test_a_site_stricter_than_the_study_is_obeyed(
    consortium: Consortium, tmp_path: Path
) -> None:
    sites = _copy_with(
        consortium, tmp_path, 0, "minimum_cohort = 10", "minimum_cohort = 1000"
    )

    study = consortium.study(**SHORT | {"cross_products": True})
    run = consortium.conduct(study, tmp_path / "run", sites=sites)

    told = [e.reply for e in run.exchanges if e.site == consortium.names[0]]
    for reply in told:
        for record in reply.array_records.values():
            for key, array in to_arrays(record).items():
                assert (array == (SUPPRESSED if "count" in key else 0)).all()
    assert consortium.names[0] not in {
        name
        for event in run.events("round")
        for name, site in event["sites"].items()
        if site["state"] == "contributed"
    }


def test_federated_mean_sd_and_covariance_are_the_pooled_ones(
    consortium: Consortium, finished: Finished
) -> None:
    genes = list(finished.final.vocabulary.genes)
    pooled = _pooled(consortium, consortium.names, genes)
    found = load_file(finished.run_dir / "covariance.safetensors")["covariance"]

    scale = finished.final.standardisation
    sd, patients = np.nanstd(pooled, axis=0), (~np.isnan(pooled)).sum(axis=0)
    half_a_step = np.maximum(2 / patients, 2**-10) * sd  # of the rounding
    assert (np.abs(scale.mean - np.nanmean(pooled, axis=0)) <= half_a_step).all()
    assert (np.abs(scale.sd - sd) <= half_a_step).all()
    expected = _covariance(consortium, consortium.names, finished)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isnan(pooled).any()  # panels differ, so the test means something


def test_sums_by_cancer_type_leave_for_groups_of_the_floor_and_make_the_types_means(
    consortium: Consortium, tmp_path: Path
) -> None:
    linear = {"cross_products": True, "linear_rank": 3, "linear_types": TYPES}
    run = consortium.conduct(consortium.study(**SHORT | linear), tmp_path / "run")

    genes = list(run.final.vocabulary.genes)
    told = {
        e.site: to_arrays(e.reply.array_records[keys.PRODUCTS])
        for e in run.exchanges
        if e.message_type == keys.CROSS_PRODUCTS
    }
    patients: dict[str, list[pd.DataFrame]] = {name: [] for name in TYPES}
    for name in consortium.names:
        groups = _by_type(consortium, name, genes)
        few = [name for name, rows in groups.items() if len(rows) < FLOOR]
        if few:  # of two types: so the other is the smallest that is left
            groups = {"others": pd.concat(groups.values())}
        assert {key.split("/")[0] for key in told[name]} == set(groups)
        for group, rows in groups.items():
            counts = told[name][f"{group}/pair-counts"]
            assert counts.max() == len(rows)
            assert not set(range(FLOOR)) & set(counts.tolist())
            if group in patients:
                patients[group].append(rows)
    assert {len(sites) for sites in patients.values()} == {2}  # of four hospitals
    assert sum("others/totals" in groups for groups in told.values()) == 2
    scale = run.final.standardisation
    sent = [_cross_products(told[name]) for name in sorted(told)]
    for name in TYPES:
        z = (pd.concat(patients[name]).to_numpy() - scale.mean) / scale.sd
        totals = sum(groups[name].totals for groups in sent if name in groups)
        np.testing.assert_allclose(totals, np.nansum(z, axis=0), atol=1e-4)
    # The hospitals' genes differ, so that the model's means are of completed sums.
    assert any((s.counts <= 0).any() for groups in sent for s in groups.values())
    groups = factor_model.pool_completed(lambda: sent, TYPES, 3)
    found = run.final.parameters["backbone.encoder.linear.means"]
    for k, name in enumerate(TYPES):
        np.testing.assert_allclose(found[k], groups[name].mean, atol=1e-4)
        assert groups[name].counts.max() == sum(map(len, patients[name]))


# ---- helpers ----


def _cross_products(told: Mapping[str, NDArray[Any]]) -> dict[str, CrossProducts]:
    """Return the sums that a site sent, by group."""
    return {
        name: CrossProducts(
            products=unpack(told[f"{name}/products"]),
            pair_counts=unpack(told[f"{name}/pair-counts"]),
            totals=told[f"{name}/totals"],
        )
        for name in sorted({key.split("/")[0] for key in told})
    }


def _by_type(
    consortium: Consortium, name: str, genes: list[str]
) -> dict[str, pd.DataFrame]:
    """Return the expression of a hospital's patients of each cancer type."""
    folder = consortium.sites / name
    table = pd.read_parquet(folder / "expression.parquet")
    rows = table.reindex(columns=genes).astype(np.float64)
    clinical = pd.read_csv(folder / "clinical.csv").set_index("patient")
    types = clinical["cancer_type"].reindex(rows.index)
    return {kind: rows[(types == kind).to_numpy()] for kind in TYPES}


def _pooled(
    consortium: Consortium, names: tuple[str, ...], genes: list[str]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    tables = [
        pd.read_parquet(consortium.sites / name / "expression.parquet")
        for name in names
    ]
    return pd.concat(tables).reindex(columns=genes).to_numpy(dtype=np.float64)


def _covariance(
    consortium: Consortium, names: tuple[str, ...], run: Finished
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the mean product of every two genes over the patients who have both."""
    genes = list(run.final.vocabulary.genes)
    scale = run.final.standardisation
    z = (_pooled(consortium, names, genes) - scale.mean) / scale.sd
    covariance = np.zeros((len(genes), len(genes)))  # 0 where no patient has both
    for i, j in np.ndindex(covariance.shape):
        products = z[:, i] * z[:, j]
        if not np.isnan(products).all():
            covariance[i, j] = np.nanmean(products)
    return covariance


def _copy_with(
    consortium: Consortium, folder: Path, at: int, old: str, new: str
) -> Path:
    """Copy the hospitals' folders and change one line of one policy.toml."""
    sites = folder / "sites"
    shutil.copytree(consortium.sites, sites)
    path = sites / consortium.names[at] / "policy.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return sites


def _plain(content: Any) -> dict[str, dict[str, Any]]:
    return {name: dict(record) for name, record in content.items()}


def _assert_refused_and_the_others_went_on(run: Finished, name: str, code: str) -> None:
    (event,) = run.events("round")
    site = event["sites"].pop(name)
    assert (site["state"], site["reason"]) == ("refused", code)
    assert [s["state"] for s in event["sites"].values()] == 3 * ["contributed"]
    assert len(run.events("run-finished")) == 1
