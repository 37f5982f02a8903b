import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, WeibullAFTFitter

from fedgex.common.errors import ConfigError
from fedgex.simulations.data import synthetic
from fedgex.simulations.data.split import split
from fedgex.simulations.data.synthetic import new_data
from fedgex.simulations.scenario import find


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("consortium")
    new_data(out, seed=3, n_sites=10, n_holdouts=2, patients_per_site=100, n_genes=50)
    return out


def expression_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "expression.parquet")


def clinical_of(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "clinical.csv", index_col="patient")


def test_expression_is_never_negative(consortium: Path):
    values = expression_of(consortium).to_numpy()

    assert values.dtype == np.float32
    assert np.nanmin(values) >= 0


def test_no_value_passes_what_an_assay_can_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SATURATION", 6.0)
    new_data(tmp_path / "out", n_sites=2, patients_per_site=20, n_genes=50)

    assert np.nanmax(expression_of(tmp_path / "out").to_numpy()) == 6.0


def test_each_hospital_lacks_a_tenth_of_the_genes_and_not_the_same(consortium: Path):
    institution = clinical_of(consortium)["institution"]
    absent = expression_of(consortium).isna().groupby(institution).all()

    hospitals = absent[absent.index.str.startswith("Hospital")]
    assert (hospitals.sum(axis=1) == 5).all()
    assert len(hospitals.drop_duplicates()) == 10


def test_hold_outs_measure_every_gene(consortium: Path):
    institution = clinical_of(consortium)["institution"]
    held_out = expression_of(consortium)[institution.str.startswith("Hold-out")]

    assert len(held_out) > 0
    assert not held_out.isna().to_numpy().any()


def test_hospitals_differ_in_size(consortium: Path):
    sizes = clinical_of(consortium)["institution"].value_counts()

    assert len(sizes) == 12
    assert sizes.max() > 1.5 * sizes.min()
    assert 70 < sizes.mean() < 130


def test_the_true_log_hazard_has_a_cox_coefficient_of_one(consortium: Path):
    truth = pd.read_parquet(consortium / "truth" / "patients.parquet")
    columns = ["duration", "event", "cancer_type"]
    table = clinical_of(consortium)[columns].join(truth["log_hazard"])

    cox = CoxPHFitter().fit(table, "duration", "event", strata="cancer_type")

    assert cox.params_["log_hazard"] == pytest.approx(1, abs=0.12)


def test_survival_is_weibull_with_the_true_shape_and_scales(consortium: Path):
    patients = pd.read_parquet(consortium / "truth" / "patients.parquet")
    truth = json.loads((consortium / "truth.json").read_text())
    table = clinical_of(consortium).join(patients["log_hazard"])
    types = pd.get_dummies(table["cancer_type"], dtype=float)
    table = table[["duration", "event", "log_hazard"]].join(types)

    fitter = WeibullAFTFitter(fit_intercept=False)
    weibull = fitter.fit(table, "duration", "event", ancillary=False)

    shape = np.exp(weibull.params_["rho_"].iloc[0])
    scales = np.exp(weibull.params_["lambda_"][types.columns])
    assert shape == pytest.approx(truth["weibull_shape"], rel=0.1)
    assert list(scales) == pytest.approx(truth["weibull_scale_days"], rel=0.2)


def test_expression_minus_the_true_programmes_is_batch_effect_and_noise(
    consortium: Path,
):
    loadings = pd.read_parquet(consortium / "truth" / "loadings.parquet")
    truth = pd.read_parquet(consortium / "truth" / "patients.parquet")
    signal = loadings["mean"].to_numpy()[None, :].repeat(len(truth), axis=0)
    for k in range(1, 11):
        after = k % 10 + 1
        score, next_score = truth[f"programme-{k}"], truth[f"programme-{after}"]
        signal += np.outer(score, loadings[f"programme-{k}"])
        signal += np.outer(
            score * next_score, loadings[f"programme-{k}-x-programme-{after}"]
        )

    before_the_floor = np.log(np.expm1(expression_of(consortium).astype(float)))
    rest = before_the_floor - signal
    by_institution = rest.groupby(clinical_of(consortium)["institution"])

    assert by_institution.std().mean().mean() == pytest.approx(
        synthetic.NOISE, rel=0.05
    )
    # The mean of n patients carries noise of variance NOISE^2 / n besides the shift.
    shift = by_institution.mean().stack().std()
    assert shift == pytest.approx(synthetic.SITE_SHIFT, rel=0.15)


def test_every_cancer_type_has_its_own_true_shift_and_scale(consortium: Path):
    truth = json.loads((consortium / "truth.json").read_text())

    assert np.shape(truth["type_shifts"]) == (4, 10)
    assert np.shape(truth["programme_effects"]) == (10,)
    assert len(set(truth["weibull_scale_days"])) == 4


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path: Path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        new_data(tmp_path / name, seed=seed, n_sites=2, n_genes=20)

    names = ("expression.parquet", "clinical.csv", "truth/loadings.parquet")
    for name in (*names, "truth/patients.parquet"):
        written = (tmp_path / "one" / name).read_bytes()
        assert written == (tmp_path / "again" / name).read_bytes()
        assert written != (tmp_path / "other" / name).read_bytes()


def test_another_hospital_leaves_the_patients_of_the_first_as_they_are(tmp_path: Path):
    new_data(tmp_path / "two", n_sites=2, n_holdouts=0, n_genes=20)
    new_data(tmp_path / "three", n_sites=3, n_holdouts=0, n_genes=20)

    two, three = expression_of(tmp_path / "two"), expression_of(tmp_path / "three")
    assert len(three) > len(two)
    pd.testing.assert_frame_equal(two, three.loc[two.index])


def test_a_folder_with_the_same_consortium_is_left_as_it_is(tmp_path: Path):
    new_data(tmp_path / "out", n_sites=2, n_genes=20)
    before = (tmp_path / "out" / "clinical.csv").stat().st_mtime_ns

    new_data(tmp_path / "out", n_sites=2, n_genes=20)

    assert (tmp_path / "out" / "clinical.csv").stat().st_mtime_ns == before


def test_a_folder_with_another_consortium_is_refused(tmp_path: Path):
    new_data(tmp_path / "out", n_sites=2, n_genes=20)

    with pytest.raises(ConfigError, match="holds something else"):
        new_data(tmp_path / "out", n_sites=3, n_genes=20)


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "clinical.csv").write_text("patient\n")

    with pytest.raises(ConfigError, match="holds something else"):
        new_data(tmp_path)

    assert (tmp_path / "clinical.csv").read_text() == "patient\n"


def test_all_unusable_arguments_are_named_at_once(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"(?s)n_sites is 0.*n_genes is 3"):
        new_data(tmp_path / "out", n_sites=0, n_genes=3)

    assert not (tmp_path / "out").exists()


def test_the_demo_fits_the_data_that_are_drawn_by_default(tmp_path: Path):
    new_data(tmp_path / "data")

    done = split(find("demo"), tmp_path / "data", tmp_path / "out")

    assert done.sites == tuple(f"hospital-0{s}" for s in range(1, 9))
    assert done.holdout_size > 60
    assert len(done.notes) == 1  # the hold-out; nobody is pooled or left out
