"""What the benchmark of interpretation finds, from files to page."""

from __future__ import annotations

import dataclasses
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.common.study import Study
from fedgex.simulations.analysis import gene_programmes, marker_genes
from fedgex.simulations.evaluation import attributions, interpretation, test_sets
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import Split

from .. import small

TYPES = ("BRCA", "LIHC")
GENES = tuple(sorted(["GATA3", "AGT", *(f"GENE{g:02d}" for g in range(28))]))
MARKS = {"BRCA": "GATA3", "LIHC": "AGT"}


def study(**changes: Any) -> Study:
    training = {"rounds": 1, "batch_size": 16}
    return Study.read(
        {
            "name": "small",
            "minimum_cohort": 5,
            "cross_products": True,
            "linear_rank": 6,
            "linear_types": TYPES,
            "pretraining": training,
            "classification": training | {"classes": TYPES, "backbone": "frozen"},
            "survival": training | {"cancer_types": TYPES},
            "strategy": {"name": "fedavg"},
        }
        | changes,
        "test",
    )


def cohort(name: str, seed: int, n: int = 40) -> Cohort:
    """Return patients of two cancers, marked by a gene each; GENE05 to 08 kill."""
    rng = np.random.default_rng(seed)
    types = rng.permutation([TYPES[i % 2] for i in range(n)])
    z = rng.normal(size=(n, 6))
    x = 5 + z @ np.random.default_rng(0).normal(0, 0.5, (6, len(GENES)))
    x += rng.normal(0, 0.5, x.shape)
    for cancer, gene in MARKS.items():
        x[types == cancer, GENES.index(gene)] += 6
    fate = rng.normal(size=n)
    for k in range(5, 9):
        x[:, GENES.index(f"GENE{k:02d}")] += 3 * fate
    return Cohort(
        patients=tuple(f"{name}-{i}" for i in range(n)),
        genes=GENES,
        expression=x.astype(np.float32),
        clinical=pd.DataFrame(
            {
                "duration": 1000 * rng.exponential(size=n) * np.exp(-2 * fate) + 1,
                "event": 1.0,
                "cancer_type": types,
            }
        ),
    )


def ground(folder: Path, **changes: Any) -> Split:
    of = study(**changes)
    return Split(
        scenario=small.scenario({}),
        study=of,
        seeds=(1, 2),
        sites={"north": cohort("n", 1), "south": cohort("s", 2)},
        unseen=cohort("u", 3, 60),
        institution=np.array([f"institution {i % 6}" for i in range(60)]),
        genes=Vocabulary(GENES),
        data_dir=folder,
        folder=folder,
        workers=1,
        quick=True,
    )


def look(folder: Path, said: StringIO | None = None) -> Results:
    on = ground(folder)
    console = Console(file=said or StringIO(), width=200)
    return interpretation.run(on, console)


def cut_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attributions, "DELETED", (8, 16))
    patch.setattr(attributions, "QUICK_PATIENTS", 14)
    patch.setattr(interpretation, "CONTEXTS", 3)
    patch.setattr(marker_genes, "PERMUTATIONS", 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interpretation")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Results:
    with pytest.MonkeyPatch.context() as patch:
        cut_down(patch)
        return look(folder)


def test_every_question_has_a_section_with_a_picture(outcome: Results) -> None:
    pictures = re.findall(r"\(interpretation-(.*)\.png\)", outcome.page)
    assert pictures == list(outcome.figures)
    assert list(outcome.figures) == [
        "attribution",
        "context",
        "programmes",
        "deletion",
        "markers",
    ]
    json.dumps(outcome.numbers, allow_nan=False)


def test_the_gene_that_marks_a_cancer_is_the_first_of_it(outcome: Results) -> None:
    for cancer, gene in MARKS.items():
        found = outcome.numbers["attribution"][cancer]["integrated gradients"]
        assert gene in sorted(found, key=found.get, reverse=True)[:2]


def test_known_markers_come_up(outcome: Results) -> None:
    numbers = outcome.numbers["markers"]

    assert set(numbers["markers"]) == {"GATA3, BRCA", "AGT, LIHC"}
    assert min(numbers["markers"]["AGT, LIHC"]["integrated gradients"]) > 90
    assert numbers["test"]["integrated gradients"]["p"] < 0.05
    assert "ESR1" in numbers["not_measured"]


def test_deleting_the_genes_that_mark_the_cancers_hurts_most(outcome: Results) -> None:
    accuracy = outcome.numbers["deletion"]["accuracy"]

    hurt = np.mean(accuracy["integrated gradients"]["8"]["seeds"])
    assert hurt < np.mean(accuracy["random"]["8"]["seeds"])
    assert np.mean(accuracy["nothing"]) > 0.9


def test_deletions_stand_in_order_of_size(outcome: Results) -> None:
    assert "| accuracy, genes deleted | 0 | 8 | 16 |\n" in outcome.page


def test_the_programme_that_kills_is_found_and_confirmed_on_unseen_patients(
    outcome: Results,
) -> None:
    numbers = outcome.numbers["programmes"]
    first = str(int(np.argmax(np.abs(numbers["z"]))) + 1)

    strongest = sorted(
        numbers["genes"][first], key=lambda g: -abs(numbers["genes"][first][g])
    )
    assert {f"GENE{k:02d}" for k in range(5, 9)} <= set(strongest[:6])
    assert numbers["q"][int(first) - 1] < 0.01
    assert numbers["c_index"][first]["unseen"][0] > 0.65


def test_a_restored_gene_has_a_context_of_other_genes(outcome: Results) -> None:
    for gene, found in outcome.numbers["context"].items():
        assert gene not in found["drivers"]
        assert len(found["drivers"]) == interpretation.DRIVERS
        assert len(found["r"]) == 2


def test_what_was_computed_is_not_computed_again(
    outcome: Results, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_down(monkeypatch)
    said = StringIO()

    again = look(folder, said)

    assert said.getvalue() == ""
    assert again.numbers == outcome.numbers


def test_nothing_found_names_a_patient(outcome: Results, folder: Path) -> None:
    files = (folder / "interpretation").glob("*.json")
    text = json.dumps(outcome.numbers) + "".join(file.read_text() for file in files)

    assert not any(patient in text for patient in cohort("n", 1).patients)


def test_a_study_that_tells_no_types_apart_is_refused(tmp_path: Path) -> None:
    on = ground(tmp_path, classification={"rounds": 0})

    with pytest.raises(ConfigError, match="no classification"):
        interpretation.run(on, Console(file=StringIO()))


def test_varimax_finds_the_simple_structure_that_was_turned_away() -> None:
    rng = np.random.default_rng(0)
    simple = np.kron(np.eye(3), np.ones((8, 1))) * rng.uniform(0.5, 1, (24, 1))
    away = np.linalg.qr(rng.normal(size=(3, 3)))[0]

    turn = gene_programmes.varimax(simple @ away)

    found = np.abs(simple @ away @ turn)
    assert turn.T @ turn == pytest.approx(np.eye(3), abs=1e-9)
    order = np.argmax(found.T @ (simple > 0), axis=1)
    assert found == pytest.approx(simple[:, order], abs=1e-4)


def test_programmes_share_out_the_same_variance_and_scores_are_the_turned_factors() -> (
    None
):
    rng = np.random.default_rng(0)
    linear = MixtureOfFactorAnalyzers(10, 4, 1)
    linear.loadings.copy_(torch.tensor(rng.normal(size=(10, 4))))

    found = gene_programmes.Programmes.of(linear)

    whole = linear.loadings.double().numpy()
    assert found.loadings @ found.loadings.T == pytest.approx(whole @ whole.T)
    assert whole @ found.from_factors == pytest.approx(found.loadings)
    assert ((found.loadings**3).sum(axis=0) > 0).all()


def test_percentiles_run_from_0_to_100_and_leave_out_what_is_unknown() -> None:
    found = marker_genes.percentiles(np.array([[3.0, 1.0, np.nan, 2.0]]))

    assert found[0, [1, 3, 0]].tolist() == [0, 50, 100]
    assert np.isnan(found[0, 2])


def test_markers_at_the_top_are_unlikely_and_those_in_the_middle_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(marker_genes, "PERMUTATIONS", 500)
    ranked = np.tile(np.linspace(0, 100, 101), (2, 1))

    top, p_top = marker_genes.permuted(ranked, [(0, 100), (0, 99), (1, 100)])
    middle, p_middle = marker_genes.permuted(ranked, [(0, 50), (0, 49), (1, 52)])

    assert top == pytest.approx(299 / 3)
    assert p_top < 0.01
    assert middle == pytest.approx(151 / 3)
    assert 0.3 < p_middle < 0.7


def test_every_marker_has_one_source_and_stands_once() -> None:
    listed, absent = marker_genes.listed(
        [],
        ["BRCA", "COADREAD", "HNSC", "KIRC", "KIRP", "LIHC", "LUAD", "LUSC", "STAD"],
    )
    assert listed == []
    measured, nothing = marker_genes.listed(absent, ["BRCA", "LUSC", "HNSC"])

    assert nothing == []
    assert all(source.count(";") == 0 and source for _, _, source in measured)
    assert len({(cancer, gene) for cancer, gene, _ in measured}) == len(measured)


@pytest.fixture
def layered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Return a ground beside whose data another layer lies, with ESR1 and ALB."""
    monkeypatch.setattr(marker_genes, "PERMUTATIONS", 300)
    rng = np.random.default_rng(0)
    genes = [*GENES[:12], "ALB", "ESR1"]
    (tmp_path / test_sets.PAIRED).mkdir(parents=True)
    where = {}
    for cancer, gene in (("BRCA", "ESR1"), ("LIHC", "ALB"), ("STAD", "GENE00")):
        tissues = ["01"] * (15 if cancer != "STAD" else 4) + ["11"] * 3
        patients = [f"TCGA-{cancer[:2]}-{i:04d}" for i in range(len(tissues))]
        table = pd.DataFrame(
            rng.normal(5, 1, (len(tissues), len(genes))),
            index=[f"{p}-{t}A-11R" for p, t in zip(patients, tissues, strict=True)],
            columns=genes,
        )
        table.loc[:, gene] += 5
        table[f"{cancer} ALONE"] = 1.0
        table.iloc[1, :3] = np.nan
        table.to_parquet(tmp_path / test_sets.PAIRED / f"{cancer}.parquet")
        where |= dict.fromkeys(patients, "a hospital")
        where[patients[0]] = "institution 0"  # which judges
    pd.Series(where, name="institution").rename_axis("patient").to_csv(
        tmp_path / "clinical.csv"
    )
    return dataclasses.replace(ground(tmp_path), quick=False)


def test_another_layers_tumours_train_together_without_those_who_judge(
    layered: Split,
) -> None:
    other = test_sets.other_layer(layered)

    assert not isinstance(other, str)
    [cohort] = other.sites.values()
    kinds = cohort.clinical["cancer_type"]
    assert kinds.value_counts().to_dict() == {"BRCA": 14, "LIHC": 14}
    assert "TCGA-BR-0000" not in cohort.patients
    assert set(cohort.genes) == {*GENES[:12], "ALB", "ESR1"}
    assert np.isfinite(cohort.expression).all()
    assert cohort.expression.min() == 0  # what is missing there was not counted
    assert list(other.study.phases) == ["pretraining", "classification"]


def test_known_markers_come_up_in_another_layer(
    layered: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attributions, "DELETED", (8,))
    monkeypatch.setattr(interpretation, "CONTEXTS", 2)
    console = Console(file=StringIO(), width=200)

    outcome = interpretation.run(layered, console)

    found = outcome.numbers["markers-paired"]["markers"]
    assert {"ESR1, BRCA", "ALB, LIHC"} <= set(found)
    assert found["ESR1, BRCA"]["integrated gradients"][0] > 90
    assert found["ALB, LIHC"]["expression"] > 0.5
    assert outcome.page.strip().endswith("(interpretation-markers-paired.png)")


def test_the_page_says_why_there_is_no_other_layer(
    outcome: Results, tmp_path: Path
) -> None:
    absent = dataclasses.replace(ground(tmp_path), quick=False)

    assert "left out with --quick" in outcome.page.split("## Known markers")[1]
    assert test_sets.other_layer(absent) == f"{test_sets.PAIRED} is absent"


def test_a_gene_of_unknown_error_is_never_among_the_best_restored() -> None:
    site = {"error": [0.3, float("nan"), 0.1]}

    assert interpretation._best_restored([site]) == [2, 0]
