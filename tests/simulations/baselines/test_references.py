from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fedgex.common.errors import ConfigError
from fedgex.common.evaluation.survival import c_index, stratified_c_index
from fedgex.common.models.survival import cox_loss
from fedgex.simulations.baselines import references
from fedgex.simulations.baselines.references import (
    clinical_cox,
    cox_ridge,
    logistic,
    panels,
    pca_cox,
)

Floats = NDArray[np.float64]
GENES = [f"G{i}" for i in range(20)]


def patients(n: int, n_genes: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Expression, days and events, with a hazard that five genes decide together."""
    rng = np.random.default_rng(seed)
    program = rng.normal(size=(n, 1))
    x = rng.normal(size=(n, n_genes))
    x[:, :5] = program + 0.3 * x[:, :5]
    death = np.ceil(300 * rng.exponential(np.exp(-1.5 * program[:, 0])))
    censoring = np.ceil(rng.exponential(600, n))
    return x, np.minimum(death, censoring), (death <= censoring).astype(float)


def as_lifelines(
    x: Floats, duration: Floats, event: Floats, penalty: float
) -> CoxPHFitter:
    """Fit lifelines with a ridge; its loss is averaged over patients, not events."""
    frame = pd.DataFrame(x).assign(days=duration, died=event)
    penalizer = penalty * event.sum() / len(event)
    return CoxPHFitter(penalizer=penalizer).fit(frame, "days", "died")


def standardised(x: Floats) -> Floats:
    z: Floats = (x - x.mean(0)) / x.std(0, ddof=1)  # lifelines divides by n - 1
    return z


# ---- Cox models ----


def test_more_genes_than_patients_do_not_keep_cox_from_the_signal() -> None:
    x, duration, event = patients(200, 300, seed=1)
    train = x[:150], duration[:150], event[:150]

    ridge = cox_ridge(*train, x[150:], seed=0)
    components = pca_cox(*train, x[150:])

    assert c_index(duration[150:], event[150:], ridge) > 0.7
    assert c_index(duration[150:], event[150:], components) > 0.7


def test_ridge_cox_of_a_given_strength_is_that_of_lifelines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(references, "PENALTIES", (0.5,))
    x, duration, event = patients(100, 6, seed=2)
    x = standardised(x) / np.sqrt(99 / 100)  # both standardise alike

    risk = cox_ridge(x, duration, event, x, seed=0)

    expected = x @ as_lifelines(standardised(x), duration, event, 0.5).params_
    correlation = np.corrcoef(risk, expected)[0, 1]
    assert correlation > 0.9999
    assert risk.std() == pytest.approx(expected.std(), rel=0.01)


def test_cox_on_all_components_is_cox_on_the_genes_when_the_ridge_is_weak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(references, "PCA_PENALTY", 1e-9)
    x, duration, event = patients(150, 4, seed=3)

    risk = pca_cox(x, duration, event, x, n_components=4)

    expected = x @ as_lifelines(x, duration, event, 0).params_.to_numpy()
    np.testing.assert_allclose(risk, expected - expected.mean(), atol=1e-3)


def test_pca_cox_minimises_the_penalised_loss_over_components() -> None:
    x, duration, event = patients(120, 40, seed=4)
    scores = PCA(8, whiten=True).fit_transform(StandardScaler().fit_transform(x))

    risk = pca_cox(x, duration, event, x, n_components=8)

    weight, *_ = np.linalg.lstsq(scores, risk - risk.mean())
    t = torch.tensor(weight, requires_grad=True)
    loss = cox_loss(
        torch.tensor(scores) @ t, torch.tensor(duration), torch.tensor(event)
    )
    (loss + references.PCA_PENALTY / 2 * t.square().sum()).backward()
    assert t.grad is not None
    assert t.grad.abs().max() < 1e-4
    assert np.abs(weight).max() > 0.1


def hidden_by_noise(seed: int) -> tuple[Floats, Floats, Floats]:
    """The hazard is what one gene has beyond another: a weak ridge finds it."""
    x, duration, event = patients(400, 2, seed)
    noise = np.random.default_rng(seed + 1).normal(size=400)
    return np.stack([x[:, 0] + 4 * noise, noise], axis=1), duration, event


def shared_by_many(seed: int) -> tuple[Floats, Floats, Floats]:
    """A hundred genes share the hazard faintly: a weak ridge learns by heart."""
    x, duration, event = patients(400, 1, seed)
    faint = x + 2 * np.random.default_rng(seed + 1).normal(size=(400, 100))
    return faint, duration, event


@pytest.mark.parametrize(
    ("cohort", "n_train", "better", "worse"),
    [(hidden_by_noise, 150, 0.01, 100.0), (shared_by_many, 60, 100.0, 0.01)],
)
def test_the_ridge_is_tuned_to_what_serves_new_patients(
    monkeypatch: pytest.MonkeyPatch,
    cohort: Callable[[int], tuple[Floats, Floats, Floats]],
    n_train: int,
    better: float,
    worse: float,
) -> None:
    x, duration, event = cohort(5)
    train, test = slice(None, n_train), slice(n_train, None)

    scores = {}
    for penalties in [(100.0, 0.01), (better,), (worse,)]:
        monkeypatch.setattr(references, "PENALTIES", penalties)
        risk = cox_ridge(x[train], duration[train], event[train], x[test], seed=0)
        scores[penalties] = c_index(duration[test], event[test], risk)

    assert scores[(better,)] > scores[(worse,)] + 0.05
    assert scores[(100.0, 0.01)] == pytest.approx(scores[(better,)], abs=1e-3)


@pytest.mark.parametrize("column", [0, 1])
def test_units_of_a_gene_do_not_matter(column: int) -> None:
    x, duration, event = patients(100, 10, seed=6)
    other = x.copy()
    other[:, column] = 1000 * x[:, column] + 7

    ridge = [cox_ridge(v, duration, event, v, seed=0) for v in (x, other)]
    components = [pca_cox(v, duration, event, v) for v in (x, other)]

    np.testing.assert_allclose(ridge[0], ridge[1], atol=1e-4)
    np.testing.assert_allclose(components[0], components[1], atol=1e-4)


def test_clinical_cox_is_that_of_lifelines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "CLINICAL_PENALTY", 1e-9)
    x, duration, event = patients(150, 2, seed=3)

    risk = clinical_cox(x, duration, event, x)

    expected = x @ as_lifelines(x, duration, event, 0).params_.to_numpy()
    np.testing.assert_allclose(risk, expected - expected.mean(), atol=1e-3)


def test_a_strong_ridge_on_genes_leaves_clinical_covariates_their_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(references, "PENALTIES", (1e6,))
    x, duration, event = patients(150, 8, seed=3)
    age = x[:, :1]
    both = np.concatenate([x[:, 5:], age], axis=1)

    risk = cox_ridge(both, duration, event, both, seed=0, n_clinical=1)

    alone = clinical_cox(age, duration, event, age)
    np.testing.assert_allclose(risk, alone, atol=1e-3)
    assert alone.std() > 0.5


def test_a_missing_value_counts_as_the_training_mean() -> None:
    x, duration, event = patients(80, 10, seed=7)
    test = x[:3].copy()
    test[0, 2] = np.nan
    filled = test.copy()
    filled[0, 2] = x[:, 2].mean()

    for risk in (
        cox_ridge(x, duration, event, np.stack([test[0], filled[0]]), seed=0),
        pca_cox(x, duration, event, np.stack([test[0], filled[0]])),
    ):
        assert risk[0] == pytest.approx(risk[1])


def test_a_gene_that_is_constant_or_absent_in_training_has_no_influence() -> None:
    x, duration, event = patients(80, 10, seed=8)
    x[:, 3], x[:, 4] = 6.1, np.nan
    test = np.repeat(x[:1], 2, axis=0)
    test[0, 3:5], test[1, 3:5] = (-50, -50), (50, 50)

    ridge = cox_ridge(x, duration, event, test, seed=0)
    components = pca_cox(x, duration, event, test)

    assert ridge[0] == pytest.approx(ridge[1])
    assert components[0] == pytest.approx(components[1])


def test_without_deaths_every_patient_has_the_same_risk() -> None:
    x, duration, event = patients(40, 10, seed=9)

    assert not cox_ridge(x, duration, 0 * event, x, seed=0).any()
    assert not pca_cox(x, duration, 0 * event, x).any()


def test_genes_that_never_vary_in_training_give_every_patient_the_same_risk() -> None:
    x, duration, event = patients(40, 10, seed=9)

    assert not pca_cox(np.ones_like(x), duration, event, x).any()


def test_components_beyond_the_rank_of_the_training_rows_are_left_out() -> None:
    x, duration, event = patients(20, 40, seed=14)
    twins = np.concatenate([x, x], axis=1)

    np.testing.assert_allclose(
        pca_cox(twins, duration, event, twins), pca_cox(x, duration, event, x)
    )


def test_fewer_deaths_than_folds_still_give_a_risk() -> None:
    x, duration, event = patients(40, 10, seed=10)
    event[np.flatnonzero(event)[2:]] = 0

    for risk in (
        cox_ridge(x, duration, event, x, seed=0),
        pca_cox(x, duration, event, x),
    ):
        assert np.isfinite(risk).all()
        assert risk.any()


def test_the_models_do_not_touch_what_they_are_given() -> None:
    x, duration, event = patients(40, 6, seed=11)
    x[0, 0] = np.nan
    before = x.copy()

    cox_ridge(x, duration, event, x, seed=0)
    pca_cox(x, duration, event, x)
    logistic(x, event, x)

    np.testing.assert_array_equal(x, before)


def test_pca_cox_reaches_the_known_figure_on_kidney_cancer(shared_data: Path) -> None:
    x = pd.read_parquet(shared_data / "tcga/rsem_log2/KIRC.parquet")
    clinical = pd.read_csv(shared_data / "tcga/clinical.csv", index_col="patient")
    clinical = clinical.reindex(x.index)[["os_days", "os_event"]]
    known = ((clinical["os_days"] > 0) & clinical["os_event"].notna()).to_numpy()
    expression = x.to_numpy(dtype=float)[known]
    duration, event = clinical.to_numpy(dtype=float)[known].T
    fold = np.random.default_rng(0).permutation(len(expression)) % 5

    risk = np.zeros(len(expression))
    for k in range(5):
        train, test = fold != k, fold == k
        risk[test] = pca_cox(
            expression[train], duration[train], event[train], expression[test]
        )

    assert stratified_c_index(duration, event, risk, fold) == pytest.approx(
        0.67, abs=0.05
    )


# ---- logistic regression ----


def test_logistic_is_scikit_learn_on_standardised_genes() -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(5, 2, size=(90, 6))
    labels = np.array(["KIRC", "LIHC", "BRCA"])[np.argmax(x[:, :3], axis=1)]

    predicted = logistic(x[:60], labels[:60], x[60:])

    scaler = StandardScaler().fit(x[:60])
    model = LogisticRegression(C=references.LOGISTIC_C)
    model.fit(scaler.transform(x[:60]), labels[:60])
    assert predicted.tolist() == model.predict(scaler.transform(x[60:])).tolist()
    assert np.mean(predicted == labels[60:]) > 0.8


def test_a_test_row_without_a_single_value_gets_a_label_all_the_same() -> None:
    x, _, _ = patients(40, 6, seed=13)
    labels = np.where(x[:, 0] > 0, "a", "b")

    predicted = logistic(x, labels, np.full((1, 6), np.nan))

    assert predicted[0] in {"a", "b"}


# ---- panels ----


def test_each_panel_contains_every_smaller_one() -> None:
    drawn = panels(GENES, (4, 8, 16), seed=1)

    assert set(drawn[4]) < set(drawn[8]) < set(drawn[16]) < set(GENES)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, unique=True), st.permutations(GENES))
def test_a_panel_depends_on_seed_and_gene_set_alone(
    sizes: list[int], genes: list[str]
) -> None:
    drawn = panels(genes, sizes, seed=1)
    alone = {size: panels(GENES, [size], seed=1)[size] for size in sizes}

    assert drawn == alone
    assert all(len(set(g)) == size for size, g in drawn.items())
    assert all(list(g) == sorted(g) for g in drawn.values())


def test_another_seed_draws_another_panel() -> None:
    assert panels(GENES, [8], seed=1) != panels(GENES, [8], seed=2)


def test_panels_larger_than_the_gene_list_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError, match="0, 21, 30 with 20 genes"):
        panels(GENES, [0, 8, 21, 30], seed=1)
