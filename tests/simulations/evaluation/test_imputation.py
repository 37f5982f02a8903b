"""The imputation benchmark, from files to page, on data small enough for a test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.dataset import Patients
from fedgex.common.evaluation.imputers import Float
from fedgex.common.models import gexbert
from fedgex.common.models.restoration import ModelImputer
from fedgex.common.study import Evaluation
from fedgex.simulations import scenario
from fedgex.simulations.evaluation import page, test_sets
from fedgex.simulations.evaluation.imputation import comparison, methods
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import (
    Protocol,
    Quick,
    Split,
    prepare,
)

from .. import small

TYPES = ["type-1", "type-2"]


def ground(data: Path, out: Path, *, quick: bool = False) -> Split:
    protocol = Protocol(
        scenario="small",
        seeds=(1, 2),
        validation=(),
        quick=Quick(rounds=1, patients=20),
    )
    return prepare(protocol, data, out, workers=1, quick=quick)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of data, with two tables of other data beside them."""
    folder = small.new_data(
        tmp_path_factory, n_sites=2, patients_per_site=30, n_genes=70
    )
    expression = pd.read_parquet(folder / "expression.parquet")
    rng = np.random.default_rng(0)
    some = expression.sample(12, random_state=0)
    paired = pd.DataFrame(
        np.log2(np.exp2(some.to_numpy()) - 1 + 0.25),
        index=[f"TCGA-ZZ-{i:04d}-01A-11R" for i in range(12)],
        columns=some.columns,
    )
    (folder / "tcga/paired").mkdir(parents=True)
    paired.to_parquet(folder / "tcga/paired/type-1.parquet")
    array = pd.DataFrame(
        5 * rng.standard_normal((12, expression.shape[1])), columns=expression.columns
    )
    (folder / "other").mkdir()
    array.to_parquet(folder / test_sets.MICROARRAY)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_settings() -> Iterator[None]:
    """Judge few settings of a small scenario, in which type-1 is a breast tumour."""
    with pytest.MonkeyPatch.context() as patch:
        study = {"linear_rank": 4, "linear_types": TYPES, "cross_products": True}
        chosen = small.scenario(study)
        patch.setattr(scenario, "find", lambda _: chosen)
        patch.setattr(test_sets, "RATES", (0.5, 0.9))
        patch.setattr(test_sets, "PANELS", (5, 20))
        patch.setattr(test_sets, "DROPOUT_RATES", (0.5,))
        patch.setattr(test_sets, "BREAST", "type-1")
        yield


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished benchmark."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    out.mkdir()
    found = judge(data, out, StringIO())
    page.write(found, out, command="test", commit="none", started=0.0)
    return out


def judge(data: Path, out: Path, said: StringIO) -> Results:
    console = Console(file=said, width=200)
    return comparison.run(ground(data, out), console)


def test_every_method_is_judged_at_every_setting_and_seed(done: Path) -> None:
    found = json.loads((done / "imputation.json").read_text())["found"]

    mse = found["mse"]["unseen institutions"]
    assert set(mse) == set(methods.LABELS)
    for method, by_setting in mse.items():
        assert list(by_setting) == [
            "mcar 0.5",
            "mcar 0.9",
            "panel 5",
            "panel 20",
            "mnar 0.5",
        ]
        seeds = 1 if method == "local" else 2
        assert {len(of_seed) for of_seed in by_setting.values()} == {seeds}, method
    ratio = found["comparison"]["mcar 0.5"]["ratio"]["gaussian"]
    assert ratio == pytest.approx(
        np.divide(mse["federated"]["mcar 0.5"], mse["gaussian"]["mcar 0.5"])
    )


def test_the_page_says_whether_each_goal_is_met(done: Path) -> None:
    text = (done / "imputation.md").read_text()
    goals = json.loads((done / "imputation.json").read_text())["found"]["goals"]

    assert all(f"| {goal['goal']} |" in text for goal in goals)
    found = {goal["goal"]: goal["met"] for goal in goals}
    assert found["16 % below the Gaussian at .95"] is None  # no such rate here
    assert found["7 % below the Gaussian at .5"] in (True, False)
    for picture in ("error", "gene", "reliability"):
        assert f"imputation-{picture}.png" in text
        assert (done / f"imputation-{picture}.png").stat().st_size > 10_000


def test_other_data_are_judged_by_the_same_methods(done: Path) -> None:
    mse = json.loads((done / "imputation.json").read_text())["found"]["mse"]

    assert set(mse["paired, tumours"]) == set(methods.LABELS)
    assert set(mse["GSE1992"]["federated"]) == {"mcar 0.5", "mcar 0.9"}


def test_what_is_there_is_not_judged_again(done: Path, data: Path) -> None:
    before, said = json.loads((done / "imputation.json").read_text()), StringIO()

    after = judge(data, done, said)

    assert said.getvalue() == ""  # nothing trained, nothing judged
    assert json.loads(json.dumps(after.numbers)) == before["found"]


def test_patients_who_train_are_not_in_the_other_layer(
    data: Path, tmp_path: Path
) -> None:
    here = ground(data, tmp_path, quick=True)
    name, cohort = next(iter(here.sites.items()))
    trains = dataclasses.replace(
        cohort, patients=("TCGA-ZZ-0000", *cohort.patients[1:])
    )
    here = dataclasses.replace(here, sites={**here.sites, name: trains})

    found = {e.name: e for e in test_sets._paired(here) if not isinstance(e, str)}

    assert len(found["paired, tumours"].patients) == 11  # of 12


def test_absent_files_are_a_reason_and_no_error(data: Path, tmp_path: Path) -> None:
    here = dataclasses.replace(
        ground(data, tmp_path, quick=True), data_dir=tmp_path / "nowhere"
    )

    found, notes = test_sets.other_data(here)

    assert found == []
    assert len(notes) == 2
    assert all("absent" in note for note in notes)


def test_microarray_genes_get_the_mean_and_spread_of_the_sites_own_type(
    data: Path, tmp_path: Path
) -> None:
    here = ground(data, tmp_path, quick=True)

    made = test_sets._microarray(here)

    assert not isinstance(made, str)
    own = here.pooled.values.numpy()[[t == "type-1" for t in here.pooled.cancer_type]]
    values = made.patients.values.numpy()
    assert values.mean(axis=0) == pytest.approx(np.nanmean(own, axis=0), abs=1e-3)
    assert values.std(axis=0) == pytest.approx(np.nanstd(own, axis=0), rel=1e-2)


def test_the_network_switched_off_leaves_the_factor_model() -> None:
    torch.manual_seed(0)
    backbone = gexbert.GexBert(gexbert.preset("tiny", 10, 3, 2))
    linear = backbone.encoder.linear
    assert linear is not None
    linear.loadings.copy_(torch.randn(10, 3))
    linear.means.copy_(torch.randn(2, 10))
    torch.nn.init.zeros_(backbone.decoder.weight.weight)  # the network says zero
    values = np.random.default_rng(0).standard_normal((5, 10)).astype(np.float32)
    values[:, :4] = np.nan
    values[0, 5] = np.nan

    off = methods.LinearImputer(linear, batch_size=2).impute(values)

    assert off == pytest.approx(ModelImputer(backbone).impute(values), abs=1e-5)


def test_an_error_is_that_of_each_institution_by_itself() -> None:
    class Zero:
        def impute(self, values: NDArray[Float]) -> NDArray[Float]:
            return np.where(np.isnan(values), values.dtype.type(0), values)

    values = torch.tensor([[1.0, 1.0], [3.0, 3.0], [3.0, 3.0]])
    nothing = torch.full((3,), torch.nan)
    patients = Patients(
        values=values,
        cancer_type=(None,) * 3,
        duration=nothing,
        event=nothing,
        clinical=torch.zeros(3, 2),
    )
    made = test_sets.TestSet(
        name="two",
        patients=patients,
        group=np.array(["a", "b", "b"]),
        rules=[(Evaluation(rates=(0.5,), panels=()), ("mcar",))],
    )

    found = methods.evaluate(Zero(), made, 1)["mcar 0.5"]

    # One of two genes of each patient is hidden: errors 1, 9, 9.
    assert found["by_group"] == [1.0, 9.0]
    assert found["mse"] == pytest.approx(19 / 3)
    assert len(found["gene_mse"]) == 2


def test_coverage_counts_the_values_within_the_interval() -> None:
    z = torch.tensor([0.0, 0.5, -1.0, 3.0])  # the half of a Gaussian lies within .674

    found = methods.coverage(2 * z, torch.zeros(4), torch.full((4,), 2.0))

    held = dict(zip(methods.LEVELS, found["held"], strict=True))
    assert (held[0.5], held[0.8], held[0.95]) == (0.5, 0.75, 0.75)
    assert found["width"] == pytest.approx(2 * 1.96 * 2, rel=1e-3)
    assert found["square"] == pytest.approx((0.25 + 1 + 9) / 4)


def test_a_goal_is_judged_at_its_worst_setting_and_the_mixture_has_to_be_beaten() -> (
    None
):
    def setting(gaussian: float, mixture: float) -> dict[str, object]:
        return {"ratio": {"gaussian": [gaussian], "mixture": [mixture]}}

    goals = comparison._goals(
        {
            "mcar 0.5": setting(0.9, 1.0),
            "mcar 0.9": setting(0.85, 0.9),
            "panel 100": setting(1.01, 0.99),
        }
    )

    met = {goal["goal"]: (goal["worst"], goal["met"]) for goal in goals}
    assert met["never above the Gaussian"] == ("panel 100", False)
    assert met["7 % below the Gaussian at .5"] == ("mcar 0.5", True)
    assert met["16 % below the Gaussian at .9"] == ("mcar 0.9", False)
    assert met["below the mixture at every rate at random"] == ("mcar 0.5", False)
    assert met["below the mixture on panels and under dropout"] == ("panel 100", True)
