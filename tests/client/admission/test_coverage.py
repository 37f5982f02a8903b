"""A contract and the hospital's data meet before a person decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fedgex.client.admission.coverage import coverage
from fedgex.common.data.cohort import Cohort
from fedgex.common.study import Study

FLOOR = 10
TYPES = ["BRCA"] * 20 + ["Breast"] * 12 + ["KIRC"] * 8


def cohort(**changes: Any) -> Cohort:
    clinical = pd.DataFrame(
        {"duration": 100.0, "event": 1.0, "cancer_type": TYPES}, index=range(40)
    )
    return Cohort(
        patients=tuple(f"P{i}" for i in range(40)),
        genes=("MARCHF1", "MYC", "TP53"),
        expression=np.ones((40, 3), dtype=np.float32),
        clinical=clinical.assign(**changes),
    )


def study(*types: str) -> Study:
    return Study.read(
        {
            "name": "s",
            "vocabulary": {"genes": ["ALK", "MARCH1", "MYC", "TP53"]},
            "classification": {"rounds": 1, "classes": list(types)},
            "survival": {"rounds": 1, "cancer_types": list(types)},
        },
        "test",
    )


def test_genes_and_patients_are_counted_under_the_studys_names() -> None:
    sentences = list(coverage(cohort(), study("BRCA", "KIRC"), FLOOR))

    assert sentences == [
        "of its 4 genes you measure 3",  # MARCH1 is the earlier name of MARCHF1
        "28 patients can take part in classification",
        "28 patients can take part in survival",
        "12 patients have a cancer type that the contract does not know (Breast); it "
        "knows BRCA, KIRC",
    ]


def test_counts_below_the_floor_are_not_named_nor_their_types() -> None:
    sentences = list(coverage(cohort(), study("Breast", "BRCA"), FLOOR))

    assert sentences[-1] == (
        "fewer than 10 patients have a cancer type that the contract does not know; it "
        "knows BRCA, Breast"
    )


def test_without_follow_up_nobody_takes_part_in_survival() -> None:
    sentences = list(coverage(cohort(event=np.nan), study("BRCA", "KIRC"), FLOOR))

    assert "fewer than 10 patients can take part in survival" in sentences
