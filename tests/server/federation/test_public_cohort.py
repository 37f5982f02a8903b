"""What the public cohort gives, against plain NumPy."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedgex.common import federation
from fedgex.common.data.cohort import Cohort, save_cohort
from fedgex.common.data.cross_products import OTHERS, CrossProducts
from fedgex.common.data.dataset import to_patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.scales import Scale
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError
from fedgex.common.models import tasks, training
from fedgex.common.models.gexbert import GexBert
from fedgex.common.study import Study
from fedgex.server.federation import public_cohort

GENES = ("A", "B", "C", "D", "E", "F", "G", "H")
VOCABULARY = Vocabulary(GENES)
N = 40


def study(linear_types: Sequence[str] = (), linear_rank: int = 2, **rule: Any) -> Study:
    values = {
        "name": "test",
        "linear_rank": linear_rank,
        "linear_types": linear_types,
        "pretraining": {"rounds": 1, "batch_size": 8},
        "classification": {"rounds": 1, "classes": ["x", "y"]},
        "public": {"statistics": True} | rule,
    }
    return Study.read(values, "test")


def cohort(n: int = N, lacking: tuple[str, ...] = (), seed: int = 0) -> Cohort:
    """Return patients whose genes follow two factors; the last has two samples."""
    rng = np.random.default_rng(seed)
    expression = rng.normal(size=(n, 2)) @ rng.normal(size=(2, len(GENES))) + 5
    expression += 0.1 * rng.normal(size=expression.shape)
    expression = np.vstack([expression, np.full(len(GENES), 99)])
    kept = [i for i, gene in enumerate(GENES) if gene not in lacking]
    return Cohort(
        patients=(*(f"p{i}" for i in range(n)), f"p{n - 1}"),
        genes=tuple(GENES[i] for i in kept),
        expression=expression[:, kept].astype(np.float32),
        clinical=pd.DataFrame({"cancer_type": ["xy"[i % 2] for i in range(n + 1)]}),
    )


def cross_products(
    study: Study, known: Cohort, scale: Standardisation
) -> dict[str, CrossProducts]:
    patients = to_patients(known, VOCABULARY, scale)
    return federation.cross_products(study, patients, federation.MIN_PUBLIC_PATIENTS)


def observed(known: Cohort, share: float) -> set[str]:
    least = federation.MIN_PUBLIC_PATIENTS
    return {*federation.observed_genes(known, min_count=least, min_share=share)}


def test_the_scale_is_mean_and_sd_with_one_sample_a_patient():
    known = cohort()
    known.expression[3, 2] = np.nan

    scale = federation.public_standardisation(known, VOCABULARY)

    firsts = known.expression[:N].astype(np.float64)
    np.testing.assert_allclose(scale.mean, np.nanmean(firsts, axis=0), rtol=1e-9)
    np.testing.assert_allclose(scale.sd, np.nanstd(firsts, axis=0), rtol=1e-6)


def test_the_covariance_is_that_of_the_standardised_patients():
    known = cohort()
    scale = federation.public_standardisation(known, VOCABULARY)

    groups = cross_products(study(), known, scale)

    expected = np.corrcoef(known.expression[:N].astype(np.float64), rowvar=False)
    assert set(groups) == {OTHERS}
    np.testing.assert_allclose(groups[OTHERS].covariance(), expected, atol=1e-5)


def test_types_of_thirty_patients_are_told_apart():
    known, told = cohort(80), study(linear_types=["x", "y", "z"])
    known.clinical.loc[60:, "cancer_type"] = "z"  # 20 of them, and 30 x and y each
    known.clinical.loc[[0, 1], "cancer_type"] = None  # 29 x and y each
    known.clinical.loc[60, "cancer_type"] = "x"  # 30 x
    scale = federation.public_standardisation(known, VOCABULARY)

    groups = cross_products(told, known, scale)

    expected = known.expression[:80][(known.clinical["cancer_type"] == "x")[:80]]
    assert set(groups) == {"x", OTHERS}
    assert groups["x"].counts.tolist() == [30] * len(GENES)
    np.testing.assert_allclose(
        groups["x"].mean, (expected.mean(0) - scale.mean) / scale.sd, atol=1e-5
    )
    assert groups[OTHERS].counts.tolist() == [50] * len(GENES)


def test_a_gene_is_well_known_in_thirty_samples_that_are_the_share_asked_for():
    known = cohort()  # of 41 samples
    known.expression[:1, 0] = np.nan
    known.expression[:11, 1] = np.nan
    known.expression[:12, 2] = np.nan

    assert set(GENES) - observed(known, 0.1) == {"C"}
    assert set(GENES) - observed(known, 1.0) == {"A", "B", "C"}


def test_genes_that_the_cohort_lacks_or_has_of_few_are_counted_and_named():
    known = cohort(lacking=("B", "C", "D", "E", "F", "G"))
    known.expression[: N - 29, 0] = np.nan  # 29 patients are left

    with pytest.raises(ConfigError) as refused:
        federation.public_standardisation(known, VOCABULARY)

    message = str(refused.value)
    assert "7 of the study's 8 genes (A, B, C, D, E and 2 others)" in message


def test_a_study_that_wants_a_cohort_is_refused_without_one(tmp_path: Path):
    for folder in (None, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="public cohort"):
            public_cohort.load(study(), folder)


def test_a_cohort_of_few_patients_is_refused(tmp_path: Path):
    few = cohort(29)
    few.expression[:] = few.expression.clip(0, 20)
    save_cohort(few, tmp_path, Scale.LOG2P1)

    with pytest.raises(ConfigError, match="29 patients; expected 30 or more"):
        public_cohort.load(study(), tmp_path)


def test_a_study_that_wants_nothing_reads_no_cohort(tmp_path: Path):
    plain = Study.read({"name": "test"}, "test")

    assert public_cohort.load(plain, tmp_path / "absent") is None


def pretrained(seed: int = 1, epochs: int = 2, linear_rank: int = 2) -> dict[str, Any]:
    told = study(linear_rank=linear_rank, epochs=epochs)
    told = told.model_copy(update={"seed": seed})
    known = cohort()
    scale = federation.public_standardisation(known, VOCABULARY)
    start = tasks.initial(study(linear_rank=linear_rank), len(GENES))
    groups = cross_products(told, known, scale)
    start |= tasks.mixture(told, groups)
    return {"start": start} | {
        "end": federation.fit_public(
            told, "pretraining", to_patients(known, VOCABULARY, scale), start
        )
    }


def test_pretraining_gives_equal_bits_for_equal_seeds_and_others_for_others():
    first, again, other = pretrained(), pretrained(), pretrained(seed=2)

    for name, array in first["end"].items():
        assert np.array_equal(array, again["end"][name])
    name = "backbone.encoder.tokens.identity.weight"
    assert not np.array_equal(first["end"][name], other["end"][name])


def test_pretraining_leaves_heads_and_the_factor_model_alone():
    done = pretrained()

    assert done["end"].keys() == done["start"].keys()
    still = {n for n, a in done["end"].items() if np.array_equal(a, done["start"][n])}
    assert {n for n in done["end"] if n.startswith("classification.head")} <= still
    fixed = {n for n in done["end"] if n.startswith("backbone.encoder.linear.")}
    assert len(fixed) == 5
    assert fixed <= still
    assert {n for n in done["end"] if n.startswith("backbone.")} - still


def test_pretraining_lowers_the_loss_of_restoration():
    # Without a factor model, which knows all that there is to know of two factors.
    known, told = cohort(), study(linear_rank=0, epochs=20)
    done = pretrained(epochs=20, linear_rank=0)
    scale = federation.public_standardisation(known, VOCABULARY)
    patients = to_patients(known, VOCABULARY, scale)

    def loss(whole: dict[str, Any]) -> float:
        backbone = tasks.load_backbone(told, len(GENES), whole)
        assert isinstance(backbone, GexBert)
        judged = training.pretraining_loss(backbone, patients, told.pretraining)
        return training.evaluate(judged, N, 8, seed=3)

    with torch.no_grad():
        assert loss(done["end"]) < 0.95 * loss(done["start"])


def fine_tuned(told: Study, known: Cohort) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model before and after classification began."""
    scale = federation.public_standardisation(known, VOCABULARY)
    patients = to_patients(known, VOCABULARY, scale)
    start = tasks.initial(told, len(GENES))
    return start, federation.begin_phase(told, "classification", start, patients)


@pytest.mark.parametrize("backbone", ["frozen", "tuned"])
def test_a_head_and_a_tuned_encoder_begin_on_the_public_cohort(backbone):
    classes = {"classification": {"rounds": 1, "classes": ["x", "y"]}}
    classes["classification"]["backbone"] = backbone
    told = Study.read({"name": "test", "public": {"epochs": 2}} | classes, "test")
    start, begun = fine_tuned(told, cohort())

    plain = tasks.begin(told, "classification", start)
    changed = {n for n, a in begun.items() if not np.array_equal(a, plain[n])}
    assert begun.keys() == plain.keys()
    assert {n.partition(".")[2].partition(".")[0] for n in changed} == (
        {"head"} if backbone == "frozen" else {"head", "encoder"}
    )
    assert all(n.startswith("classification.") for n in changed)


def test_a_phase_begins_plainly_with_few_public_patients():
    classes = {"rounds": 1, "classes": ["x", "y"]}
    values = {"name": "test", "public": {"epochs": 2}, "classification": classes}
    told = Study.read(values, "test")
    known = cohort()
    known.clinical.loc[federation.MIN_PUBLIC_PATIENTS - 2 :, "cancer_type"] = None
    start, begun = fine_tuned(told, known)

    plain = tasks.begin(told, "classification", start)
    assert all(np.array_equal(begun[n], plain[n]) for n in plain)


def saved(known: Cohort, folder: Path, scale: Scale = Scale.LOG2P1) -> Path:
    known.expression[:] = known.expression.clip(0, 20)
    save_cohort(known, folder, scale)
    return folder


def test_hold_out_and_public_cohort_may_share_no_patient(tmp_path: Path):
    holdout = saved(cohort(5), tmp_path / "holdout")
    public = saved(cohort(), tmp_path / "public")

    with pytest.raises(ConfigError, match="5 patients are in the hold-out"):
        public_cohort.load_both(study(), holdout, public)


def test_what_is_wrong_with_either_cohort_is_in_one_message(tmp_path: Path):
    holdout = saved(cohort(5), tmp_path / "holdout", Scale.LN1P)
    public = saved(cohort(29), tmp_path / "public")

    with pytest.raises(ConfigError) as refused:
        public_cohort.load_both(study(), holdout, public)

    assert "on the scale 'ln1p'" in str(refused.value)
    assert "29 patients; expected 30" in str(refused.value)


def test_the_public_cohort_must_have_each_fixed_gene_before_a_site_is_asked(
    tmp_path: Path,
):
    public = saved(cohort(lacking=("B",)), tmp_path)
    fixed = study().model_copy(
        update={"vocabulary": study().vocabulary.model_copy(update={"genes": GENES})}
    )

    with pytest.raises(ConfigError, match=r"1 of the study's 8 genes \(B\)"):
        public_cohort.load_both(fixed, None, public)


def test_a_hold_out_lacks_genes_and_types_with_a_sentence_each():
    asked = Study.read(
        {
            "name": "test",
            "vocabulary": {"genes": list(GENES)},
            "pretraining": {"rounds": 1},
            "classification": {"rounds": 1, "classes": ["x", "z"]},
        },
        "test",
    )

    found = public_cohort.gaps(asked, cohort(lacking=("B",)))

    assert found == [
        "1 of the study's 8 genes are not there",
        "nobody has the cancer types z",
    ]


def test_a_hold_out_without_any_gene_of_the_study_is_refused(tmp_path: Path):
    holdout = saved(cohort(5), tmp_path)
    other = Study.read({"name": "test", "vocabulary": {"genes": ["Y", "Z"]}}, "test")

    with pytest.raises(ConfigError, match="none of the study's 2 genes"):
        public_cohort.load_both(other, holdout, None)


def test_a_cohort_is_compared_under_the_studys_names_of_its_genes(tmp_path: Path):
    named = replace(cohort(), genes=(*GENES[:-1], "MARCHF1"))
    holdout = saved(named, tmp_path)
    other = Study.read({"name": "test", "vocabulary": {"genes": ["MARCH1"]}}, "test")

    found, _ = public_cohort.load_both(other, holdout, None)

    assert found is not None
    assert found.genes[-1] == "MARCH1"
    assert public_cohort.gaps(other, found) == []
