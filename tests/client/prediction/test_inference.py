"""What a finished model says of own samples, from Python."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from fedgex.client.prediction import inference
from fedgex.client.prediction.review import review
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.scales import Scale
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import CheckpointError, ConfigError, DataError
from fedgex.common.models import tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.models.restoration import ModelImputer, embed
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Study

GENES = tuple(f"G{i:02d}" for i in range(12))
MEAN, SD = np.linspace(4, 9, 12), np.linspace(0.5, 2, 12)
TYPES = ("BRCA", "KIRC")
ENDS = (365.0, 730.0)
N = 5


def study(**phases: Any) -> Study:
    """Return a study with one round of each phase, or of those given."""
    phases = phases or {
        "pretraining": {"rounds": 1},
        "classification": {"rounds": 1, "classes": TYPES},
        "survival": {"rounds": 1, "cancer_types": TYPES, "interval_ends": ENDS},
    }
    silent = {"pretraining": {"rounds": 0}}
    return Study.read({"name": "test"} | silent | phases, "test")


def model(agreed: Study | None = None, **changes: Any) -> Checkpoint:
    """Return the last checkpoint of a study; chance stands in for training."""
    agreed = agreed or study()
    whole = tasks.initial(agreed, len(GENES))
    for phase in agreed.phases:
        whole = tasks.begin(agreed, phase, whole)
    rng = np.random.default_rng(0)
    whole = {
        name: array + rng.normal(0, 0.1, array.shape).astype(np.float32)
        for name, array in sorted(whole.items())
    }
    made = Checkpoint(
        study=agreed,
        vocabulary=Vocabulary(GENES),
        standardisation=Standardisation(mean=MEAN, sd=SD),
        phase=list(agreed.phases)[-1],
        round=1,
        parameters=whole,
    )
    return replace(made, **changes)


def samples(lacking: tuple[str, ...] = ("G03", "G07")) -> pd.DataFrame:
    """Return N samples on log2(x + 1), some cells and genes missing, one gene alien."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        rng.normal(MEAN, SD, (N, 12)).clip(0.01),
        index=[f"S{i}" for i in range(N)],
        columns=list(GENES),
    )
    frame.iloc[0, 0] = frame.iloc[2, 5] = frame.iloc[4, 11] = np.nan
    frame.insert(3, "ALIEN", rng.normal(5, 1, N))
    return frame.drop(columns=list(lacking))


def clinical() -> pd.DataFrame:
    types = ["BRCA", "KIRC", "BRCA", "KIRC", "BRCA"]
    return pd.DataFrame({"cancer_type": types}, index=samples().index)


def standardised(frame: pd.DataFrame) -> NDArray[np.float32]:
    """Put log2(x + 1) onto the vocabulary by hand."""
    placed = frame.reindex(columns=list(GENES)).to_numpy(np.float32)
    return ((placed - MEAN) / SD).astype(np.float32)


def imputed(trained: Checkpoint, frame: pd.DataFrame) -> NDArray[np.float64]:
    """Restore with the backbone by hand, on log2(x + 1)."""
    backbone = tasks.load_backbone(trained.study, 12, trained.parameters)
    filled = ModelImputer(backbone).impute(standardised(frame))
    return np.maximum(filled * SD + MEAN, 0)


def embedded(trained: Checkpoint, phase: str, frame: pd.DataFrame) -> torch.Tensor:
    """Embed each sample by itself."""
    encoder = tasks.load(trained.study, 12, phase, trained.parameters).encoder
    rows = torch.from_numpy(standardised(frame)).split(1)
    with torch.no_grad():
        return torch.cat([embed(encoder, row, ~row.isnan()) for row in rows])


# ---- impute ----


def test_measured_cells_stay_the_same_bit_for_bit() -> None:
    frame = samples()

    table = inference.impute(model(), frame)

    known = frame.notna().to_numpy()
    before, after = frame.to_numpy(), table[frame.columns].to_numpy()
    assert (before[known].view(np.int64) == after[known].view(np.int64)).all()


def test_missing_cells_and_genes_are_what_the_backbone_restores() -> None:
    trained, frame = model(), samples()

    table = inference.impute(trained, frame)

    truth = pd.DataFrame(imputed(trained, frame), frame.index, list(GENES))
    assert list(table.columns) == [*frame.columns, "G03", "G07"]
    assert not table.isna().any().any()
    for gene in ("G03", "G07"):
        assert table[gene].to_numpy() == pytest.approx(truth[gene].to_numpy(), rel=1e-4)
    for sample, gene in (("S0", "G00"), ("S2", "G05"), ("S4", "G11")):
        assert table.loc[sample, gene] == pytest.approx(
            truth.loc[sample, gene], rel=1e-4
        )


def test_the_frame_given_is_not_changed() -> None:
    frame = samples()

    inference.impute(model(), frame)

    pd.testing.assert_frame_equal(frame, samples())


def test_only_the_genes_asked_for_are_restored() -> None:
    trained, frame = model(), samples()

    table = inference.impute(trained, frame, genes=["G07", "G05"])

    everything = inference.impute(trained, frame)
    assert list(table.columns) == [*frame.columns, "G07"]
    assert table.isna().sum().sum() == 2  # G00 of S0 and G11 of S4
    assert table.loc["S2", "G05"] == everything.loc["S2", "G05"]
    assert (table["G07"] == everything["G07"]).all()


def test_genes_that_no_model_knows_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 genes .* \(ALIEN\)"):
        inference.impute(model(), samples(), genes=["ALIEN", "G07"])


def test_natural_logarithms_come_back_as_natural_logarithms() -> None:
    trained, frame = model(), samples()
    natural = frame * np.log(2)  # ln(x + 1) = log2(x + 1) ln 2

    table = inference.impute(trained, natural, scale=Scale.LN1P)

    truth = inference.impute(trained, frame) * np.log(2)
    known = natural.notna().to_numpy()
    given = table[natural.columns].to_numpy()
    assert (given[known] == natural.to_numpy()[known]).all()
    np.testing.assert_allclose(table, truth, rtol=1e-4)


def test_linear_values_come_back_linear() -> None:
    trained, frame = model(), samples()

    table = inference.impute(trained, 2**frame - 1, scale=Scale.LINEAR)

    truth = 2 ** inference.impute(trained, frame) - 1
    np.testing.assert_allclose(table, truth, rtol=1e-3)


def test_no_restored_value_is_below_zero_expression() -> None:
    low = replace(model(), standardisation=Standardisation(mean=MEAN - 9, sd=SD))

    table = inference.impute(low, samples())

    assert table["G03"].min() == 0


@pytest.mark.parametrize("scale", [Scale.COUNTS, Scale.RELATIVE])
def test_scales_that_lead_nowhere_are_refused(scale: Scale) -> None:
    with pytest.raises(ConfigError, match=f"{scale} scale cannot become log2p1"):
        inference.impute(model(), samples(), scale=scale)


def test_float32_stays_float32() -> None:
    table = inference.impute(model(), samples().astype(np.float32))

    assert (table.dtypes == np.float32).all()


def test_a_sample_of_which_nothing_is_known_stays_empty_and_changes_no_other() -> None:
    frame = samples()
    empty = frame.copy()
    empty.loc["S1", [g for g in frame.columns if g != "ALIEN"]] = np.nan

    table = inference.impute(model(), empty)

    truth = inference.impute(model(), frame)
    assert table.loc["S1"].dropna().index.to_list() == ["ALIEN"]
    others = ["S0", "S2", "S3", "S4"]
    np.testing.assert_allclose(table.loc[others], truth.loc[others], rtol=1e-4)


# ---- embed, risk, classify ----


def test_an_embedding_is_that_of_the_encoder() -> None:
    trained, frame = model(), samples()

    table = inference.embed(trained, frame)

    truth = embedded(trained, PRETRAINING, frame)
    assert list(table.index) == list(frame.index)
    assert list(table.columns) == [f"embedding_{i}" for i in range(64)]
    np.testing.assert_allclose(table, truth.numpy(), rtol=1e-3, atol=1e-5)


def test_risk_and_survival_are_those_of_the_head() -> None:
    trained, frame = model(), samples()

    table = inference.risk(trained, frame, clinical())

    head = tasks.load_survival(trained.study, 12, trained.parameters).head
    assert list(table.columns) == [
        "log_hazard",
        "survival_365_days",
        "survival_730_days",
    ]
    for row, x in enumerate(embedded(trained, SURVIVAL, frame)):
        kind = TYPES.index(clinical()["cancer_type"].iloc[row])
        weight = head.shared.weight[0] + 0.6 * head.own.weight[kind]
        baseline = 3 * head.baseline.weight[kind] - 2
        # No covariates in this study.
        log_hazard = float((head.norm(x) / 8 @ weight).detach())  # 64 latents
        hazard = 1 / (1 + np.exp(-(baseline.detach().numpy() + log_hazard)))
        assert table.iloc[row].to_numpy() == pytest.approx(
            [log_hazard, 1 - hazard[0], (1 - hazard[0]) * (1 - hazard[1])], abs=1e-4
        )


def test_age_and_sex_count_where_the_study_uses_them() -> None:
    used = study(
        pretraining={"rounds": 1},
        survival={"rounds": 1, "cancer_types": TYPES, "clinical": True},
    )
    trained = model(used)
    older = clinical().assign(age=70.0, sex="male")
    base = clinical().assign(age=60.0, sex="female")

    change = (
        inference.risk(trained, samples(), older)["log_hazard"]
        - inference.risk(trained, samples(), base)["log_hazard"]
    )

    shared, own = (
        trained.parameters[f"survival.head.clinical_{of}.weight"]
        for of in ("shared", "own")
    )
    kind = [TYPES.index(t) for t in clinical()["cancer_type"]]
    weight = (shared + 0.2 * own[kind]).sum(axis=1)
    assert change.to_numpy() == pytest.approx(weight, abs=1e-5)


def test_a_cox_model_tells_the_relative_risk_alone() -> None:
    cox = {"rounds": 1, "cancer_types": TYPES, "loss": "cox"}
    trained = model(study(pretraining={"rounds": 1}, survival=cox))

    table = inference.risk(trained, samples(), clinical())

    assert list(table.columns) == ["log_hazard"]


def test_a_cancer_type_outside_the_study_has_no_risk() -> None:
    other = clinical()
    other.loc["S2", "cancer_type"] = "GBM"

    table = inference.risk(model(), samples(), other)

    assert table.index[table["log_hazard"].isna()].to_list() == ["S2"]
    assert table.isna().all(axis=1).sum() == 1


def test_no_known_cancer_type_at_all_is_refused() -> None:
    with pytest.raises(DataError, match=r"FX-PREDICT-010 error.*one of BRCA, KIRC"):
        inference.risk(model(), samples(), clinical().drop(columns="cancer_type"))


def test_class_probabilities_are_those_of_the_head() -> None:
    trained, frame = model(), samples()

    table = inference.classify(trained, frame)

    head = tasks.load_classifier(trained.study, 12, trained.parameters).head
    logits = head(embedded(trained, CLASSIFICATION, frame)).detach().numpy()
    odds = np.exp(logits)
    numbers = table[["probability_BRCA", "probability_KIRC"]].to_numpy()
    np.testing.assert_allclose(
        numbers, odds / odds.sum(axis=1, keepdims=True), atol=1e-4
    )
    assert table["most_probable"].to_list() == [TYPES[i] for i in logits.argmax(axis=1)]


# ---- what the model is not about ----


def with_factors(**metrics: Any) -> Checkpoint:
    """Return a classifier over a factor model of independent genes of variance 1."""
    phases = {"classification": {"rounds": 1, "classes": TYPES}}
    start = {"cross_products": True, "linear_rank": 2}
    made = model(Study.read({"name": "test", **phases, **start}, "test"))
    ours = "encoder.linear."
    fixed = {
        "loadings": np.zeros((len(GENES), 2)),
        "noise": np.ones(len(GENES)),
        "means": np.zeros((1, len(GENES))),
        "precisions": np.eye(2)[None],
        "log_shares": np.zeros(1),
    }
    parameters = {
        name: fixed[name.split(ours)[1]].astype(np.float32) if ours in name else array
        for name, array in made.parameters.items()
    }
    return replace(made, parameters=parameters, metrics=metrics)


def one_foreign() -> pd.DataFrame:
    """Return a sample at the mean, one far from it, and one of which nothing is known.

    By hand: 0, and 3 SDs in each gene, whose mean square is 9.
    """
    rows = [MEAN, MEAN + 3 * SD, np.full(len(GENES), np.nan)]
    return pd.DataFrame(rows, index=["like", "foreign", "empty"], columns=GENES)


def test_none_of_these_is_the_answer_for_a_sample_unlike_the_training() -> None:
    table = inference.classify(with_factors(unlike_from=2.0), one_foreign())

    assert table["unlike_training"].to_list() == ["no", "yes", None]
    assert table["most_probable"].to_list()[1:] == ["none of these", None]
    assert table["most_probable"].iloc[0] in TYPES
    np.testing.assert_allclose(table["unlikeness"], [0, 9, np.nan], atol=1e-4)


def test_the_number_of_unlike_samples_is_a_warning() -> None:
    found = inference.review_likeness(with_factors(unlike_from=2.0), one_foreign())

    assert [f.code for f in found] == ["FX-PREDICT-008"]
    assert "1 of 2 samples" in str(found[0])
    some = one_foreign().loc[["like"]]
    assert inference.review_likeness(with_factors(unlike_from=2.0), some) == ()


@pytest.mark.parametrize("metrics", [{}, {"unlike_from": None}])
def test_a_model_without_threshold_says_that_likeness_is_unknown(
    metrics: dict[str, None],
) -> None:
    trained = with_factors(**metrics)

    table = inference.classify(trained, one_foreign())

    assert table["unlike_training"].to_list() == ["unknown", "unknown", None]
    found = inference.review_likeness(trained, one_foreign())
    assert [f.code for f in found] == ["FX-PREDICT-009"]


def test_a_model_without_factor_model_says_that_likeness_is_unknown() -> None:
    table = inference.classify(model(), samples())

    assert set(table["unlike_training"]) == {"unknown"}
    assert table["unlikeness"].isna().all()


# ---- what a model must have ----


def test_a_phase_that_has_not_begun_is_missing_though_its_head_exists() -> None:
    early = model(phase="classification", round=1)

    with pytest.raises(CheckpointError, match="for: pretraining, classification") as e:
        inference.risk(early, samples(), clinical())

    assert "survival.head.own.weight" in early.parameters
    assert "has not been trained for survival" in str(e.value)


def test_a_model_before_its_first_round_can_do_nothing() -> None:
    with pytest.raises(CheckpointError, match="trained for: nothing yet"):
        inference.embed(model(phase="pretraining", round=0), samples())


# ---- what the genes must be ----


def test_a_frame_without_any_gene_of_the_model_is_refused() -> None:
    with pytest.raises(DataError, match="FX-PREDICT-001 error"):
        inference.embed(model(), samples()[["ALIEN"]])


def test_columns_that_share_a_name_are_refused() -> None:
    frame = samples()

    with pytest.raises(DataError, match="FX-PREDICT-004 error"):
        inference.impute(model(), pd.concat([frame, frame[["G01"]]], axis=1))


def test_few_genes_are_a_warning() -> None:
    one = samples()[["G01", "ALIEN"]]

    few, two = (
        review(model(), frame) for frame in (one, samples()[["G01", "G02", "ALIEN"]])
    )

    assert [f.code for f in few] == ["FX-PREDICT-002"]  # 1 of 12 is 8 %
    assert two == ()


def wide(n_genes: int = 120) -> tuple[Checkpoint, pd.DataFrame]:
    """Return a model of many genes, and samples on its scale."""
    genes = tuple(f"G{i:03d}" for i in range(n_genes))
    mean, sd = np.linspace(1, 12, n_genes), np.ones(n_genes)
    trained = model(
        vocabulary=Vocabulary(genes),
        standardisation=Standardisation(mean=mean, sd=sd),
    )
    values = np.random.default_rng(0).normal(mean, sd, (2, n_genes)).clip(0)
    return trained, pd.DataFrame(values, columns=list(genes)).assign(ALIEN=3.0)


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("base", [np.e, 10])
def test_numbers_on_another_scale_than_they_are_said_to_be_on_are_a_warning(
    n_samples: int, base: float
) -> None:
    trained, frame = wide()

    right = review(trained, frame[:n_samples])
    (wrong,) = review(trained, frame[:n_samples] * np.log(2) / np.log(base))

    assert right == ()
    assert (wrong.code, wrong.severity) == ("FX-PREDICT-005", "warning")
    assert wrong.found.endswith("the model was trained on")


def test_numbers_on_the_scale_that_is_named_are_no_warning() -> None:
    trained, frame = wide()

    assert review(trained, frame * np.log(2), scale=Scale.LN1P) == ()
    assert review(trained, frame, scale=Scale.LN1P) != ()


def test_few_genes_or_a_scale_that_is_no_logarithm_tell_nothing() -> None:
    few, frame = wide(90)
    linear, many = wide()
    linear = replace(
        linear, study=linear.study.model_copy(update={"scale": Scale.LINEAR})
    )

    assert review(few, frame * np.log10(2)) == ()
    assert review(linear, many * np.log10(2)) == ()
