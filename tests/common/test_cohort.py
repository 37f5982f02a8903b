"""The neutral format of a checked cohort."""

import numpy as np
import pandas as pd
import pytest

from fedgex.common.cohort import Cohort, load_cohort, save_cohort


def cohort(clinical: pd.DataFrame) -> Cohort:
    return Cohort(
        patients=("p1", "p2", "p1"),
        genes=("ALK", "EGFR"),
        expression=np.array([[1, np.nan], [2.5, 3], [0, 1]], dtype=np.float32),
        clinical=clinical,
    )


def full() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "duration": [10.0, 0.0, np.nan],
            "event": [1.0, 0.0, 1.0],
            "age": [61.0, np.nan, 40.0],
            "sex": ["male", None, "female"],
            "cancer_type": ["BRCA", "KIRC", None],
        },
        index=["s1", "s2", "s3"],
    )


def test_a_cohort_comes_back_as_it_was_saved(tmp_path):
    saved = cohort(full())

    save_cohort(saved, tmp_path / "new" / "folder")
    found = load_cohort(tmp_path / "new" / "folder")

    assert (found.patients, found.genes) == (saved.patients, saved.genes)
    assert found.expression.dtype == np.float32
    assert np.array_equal(found.expression, saved.expression, equal_nan=True)
    pd.testing.assert_frame_equal(found.clinical, full().reset_index(drop=True))


def test_a_cohort_without_clinical_columns_comes_back_too(tmp_path):
    save_cohort(cohort(pd.DataFrame(index=range(3))), tmp_path)

    found = load_cohort(tmp_path)

    assert found.patients == ("p1", "p2", "p1")
    assert found.clinical.shape == (3, 0)


def test_saving_does_not_change_the_cohort(tmp_path):
    saved = cohort(full())

    save_cohort(saved, tmp_path)

    pd.testing.assert_frame_equal(saved.clinical, full())


def test_a_patient_with_two_samples_counts_once():
    assert cohort(full()).n_patients == 2


def test_survival_needs_a_known_event_and_a_duration_above_zero():
    clinical = pd.DataFrame({"duration": [10.0, 0.0, 5.0], "event": [0.0, 1.0, np.nan]})

    assert cohort(clinical).with_survival().tolist() == [True, False, False]


@pytest.mark.parametrize("missing", ["duration", "event"])
def test_without_duration_or_event_nobody_has_survival(missing):
    clinical = full().drop(columns=missing)

    assert cohort(clinical).with_survival().tolist() == [False, False, False]
