"""The neutral format of a checked cohort."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from fedgex.common.data.cohort import Cohort, load_cohort, save_cohort
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError


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

    save_cohort(saved, tmp_path / "new" / "folder", Scale.LOG2P1)
    found = load_cohort(tmp_path / "new" / "folder", Scale.LOG2P1)

    assert (found.patients, found.genes) == (saved.patients, saved.genes)
    assert found.expression.dtype == np.float32
    assert np.array_equal(found.expression, saved.expression, equal_nan=True)
    pd.testing.assert_frame_equal(found.clinical, full().reset_index(drop=True))


def test_a_cohort_without_clinical_columns_comes_back_too(tmp_path):
    save_cohort(cohort(pd.DataFrame(index=range(3))), tmp_path, Scale.LOG2P1)

    found = load_cohort(tmp_path, Scale.LOG2P1)

    assert found.patients == ("p1", "p2", "p1")
    assert found.clinical.shape == (3, 0)


def test_saving_does_not_change_the_cohort(tmp_path):
    saved = cohort(full())

    save_cohort(saved, tmp_path, Scale.LOG2P1)

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


def test_a_wide_table_is_read_in_little_memory(tmp_path):
    # pandas.read_parquet takes 1.8 GB for this file, if Arrow has one thread.
    names = [f"G{i}" for i in range(20_000)]
    table = pd.DataFrame(np.ones((3, 20_000), dtype=np.float32), columns=names)
    table.to_parquet(tmp_path / "wide.parquet")
    code = (
        "import sys; from pathlib import Path; "
        "from fedgex.common.data.cohort import read_parquet; "
        "from fedgex.common.system.malloc import resident_mb; "
        'read_parquet(Path(sys.argv[1])); print(resident_mb("VmHWM"))'
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "wide.parquet")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )

    assert float(done.stdout) < 900


def rewrite(folder, name, change):
    table = change(pd.read_parquet(folder / name))
    table.to_parquet(folder / name)


def test_shuffled_clinical_rows_are_refused_with_their_number(tmp_path):
    save_cohort(cohort(full()), tmp_path, Scale.LOG2P1)
    rewrite(tmp_path, "clinical.parquet", lambda t: t.iloc[[1, 0, 2]])

    with pytest.raises(ConfigError, match="2 of 3 rows are another patient's"):
        load_cohort(tmp_path, Scale.LOG2P1)


def test_fewer_clinical_rows_than_samples_are_refused(tmp_path):
    save_cohort(cohort(full()), tmp_path, Scale.LOG2P1)
    rewrite(tmp_path, "clinical.parquet", lambda t: t.iloc[:1])

    with pytest.raises(ConfigError, match="3 rows of expression, 1 clinical ones"):
        load_cohort(tmp_path, Scale.LOG2P1)


def test_a_folder_of_the_earlier_format_is_refused_with_how_to_remake_it(tmp_path):
    save_cohort(cohort(full()), tmp_path, Scale.LOG2P1)
    (tmp_path / "cohort.json").unlink()

    with pytest.raises(ConfigError, match="fedgex-admin cohort build"):
        load_cohort(tmp_path, Scale.LOG2P1)


def test_all_that_is_wrong_is_in_one_message_without_an_identifier(tmp_path):
    wrong = cohort(full())
    wrong.expression[0, 0], wrong.expression[1, 1] = -1, np.inf
    save_cohort(wrong, tmp_path, Scale.LN1P)
    rewrite(tmp_path, "clinical.parquet", lambda t: t.iloc[[1, 0, 2]])

    with pytest.raises(ConfigError) as refused:
        load_cohort(tmp_path, Scale.LOG2P1)

    message = str(refused.value)
    for part in (
        "clinical.parquet is not the file that was written",
        "on the scale 'ln1p', and the study on log2p1",
        "2 of 3 rows",
        "1 values are infinite",
        "some values are below 0",
    ):
        assert part in message
    assert "p1" not in message.replace("log2p1", "").replace("ln1p", "")
    assert "p2" not in message


def test_a_manifest_that_a_person_damaged_is_refused(tmp_path):
    save_cohort(cohort(full()), tmp_path, Scale.LOG2P1)
    for text, match in (
        ('{"format": 2}', "format 2"),
        ('{"format": 1}', "missing"),
        ("{", "json"),
    ):
        (tmp_path / "cohort.json").write_text(text)
        with pytest.raises(ConfigError, match=match):
            load_cohort(tmp_path, Scale.LOG2P1)
