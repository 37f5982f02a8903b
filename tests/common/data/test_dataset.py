"""From samples to patients on the vocabulary."""

import numpy as np
import pandas as pd
import pytest
import torch

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary

VOCABULARY = Vocabulary(("ALK", "EGFR", "KRAS"))
STANDARD = Standardisation(mean=np.array([1.0, 2.0, 3.0]), sd=np.array([1.0, 0.5, 2.0]))


def harmonised(**columns: list[object]) -> Patients:
    """Return patients z, a, m: z owns two samples, KRAS and MYC are measured."""
    cohort = Cohort(
        patients=("z", "a", "z", "m"),
        genes=("KRAS", "MYC"),
        expression=np.array([[5, 9], [3, 9], [99, 9], [np.nan, 9]], dtype=np.float32),
        clinical=pd.DataFrame(columns, index=range(4)),
    )
    return to_patients(cohort, VOCABULARY, STANDARD)


def test_the_first_sample_of_a_patient_stands_for_it_in_the_order_of_the_file():
    patients = harmonised(cancer_type=["BRCA", "KIRC", "LUAD", None])

    assert len(patients) == 3
    assert patients.cancer_type == ("BRCA", "KIRC", None)


def test_values_are_standardised_on_the_vocabulary_and_gaps_are_nan():
    patients = harmonised()

    expected = torch.tensor([1.0, 0.0, torch.nan])  # (5 - 3) / 2, (3 - 3) / 2
    torch.testing.assert_close(patients.values[:, 2], expected, equal_nan=True)
    assert patients.values[:, :2].isnan().all()
    assert patients.values.dtype == torch.float32
    assert patients.measured.tolist() == [
        [False, False, x] for x in (True, True, False)
    ]


def test_follow_up_is_taken_over_with_unknowns_as_nan():
    patients = harmonised(
        duration=[10.0, np.nan, 7.0, 30.0], event=[1.0, 0.0, 1.0, np.nan]
    )

    nan = torch.nan
    for found, expected in (
        (patients.duration, [10.0, nan, 30.0]),
        (patients.event, [1.0, 0.0, nan]),
    ):
        torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


def test_clinical_covariates_are_decades_from_sixty_and_male_with_zero_for_unknown():
    patients = harmonised(
        age=[75.0, np.nan, 1.0, 40.0], sex=["male", "female", "female", None]
    )

    assert patients.clinical.tolist() == [[1.5, 1.0], [0.0, 0.0], [-2.0, 0.0]]


def test_a_cohort_without_clinical_columns_knows_nothing():
    patients = harmonised()

    assert patients.cancer_type == (None, None, None)
    assert patients.duration.isnan().all()
    assert patients.event.isnan().all()
    assert not patients.clinical.any()


@pytest.mark.parametrize("missing", [None, np.nan])
def test_an_unknown_cancer_type_is_none(missing):
    patients = harmonised(cancer_type=["BRCA", missing, "BRCA", "KIRC"])

    assert patients.cancer_type == ("BRCA", None, "KIRC")
    assert patients.type_index(("KIRC", "BRCA")).tolist() == [1, -1, 0]


def test_rows_are_taken_with_all_that_belongs_to_them():
    patients = harmonised(
        cancer_type=["A", "B", "A", "C"],
        duration=[1.0, 2.0, 9.0, 3.0],
        event=[1.0, 0.0, 1.0, 1.0],
        age=[60.0, 70.0, 60.0, 80.0],
    )

    taken = patients.take(torch.tensor([2, 0]))

    assert taken.cancer_type == ("C", "A")
    assert taken.duration.tolist() == [3.0, 1.0]
    assert taken.event.tolist() == [1.0, 1.0]
    assert taken.clinical[:, 0].tolist() == [2.0, 0.0]
    assert taken.values[1, 2] == 1.0
