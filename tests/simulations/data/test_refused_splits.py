"""A scenario that does not fit the data is refused, with everything that does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fedgex.common.errors import ConfigError
from fedgex.simulations.data.split import split

from .conftest import scenario


def test_folders_that_no_split_wrote_are_refused_and_left_alone(
    data: Path, tmp_path: Path
):
    (tmp_path / "out" / "sites" / "mine").mkdir(parents=True)

    with pytest.raises(ConfigError, match="no split wrote"):
        split(scenario(), data, tmp_path / "out")

    assert (tmp_path / "out" / "sites" / "mine").is_dir()


def test_unknown_names_are_refused_at_once_with_the_nearest(data: Path, tmp_path: Path):
    study = {"survival": {"rounds": 1, "cancer_types": ["LAUD"]}}
    holdout = {"institutions": ["held out", "Sout", "Elsewhere"]}

    with pytest.raises(ConfigError) as refused:
        split(scenario(study=study, holdout=holdout), data, tmp_path / "out")

    message = str(refused.value)
    assert '"held out"; did you mean "Held Out"?' in message
    assert '"Sout"; did you mean "South"' in message
    assert '"Elsewhere"' in message
    assert 'study.survival.cancer_types: no patient with expression has "LAUD"; ' in (
        message
    )
    assert not (tmp_path / "out").exists()


def test_a_mandatory_site_that_does_not_exist_is_refused(data: Path, tmp_path: Path):
    study = {"rounds": {"mandatory_sites": ["North"]}}

    with pytest.raises(ConfigError, match=r'no site "North"; did you mean "north"\?'):
        split(scenario(study=study), data, tmp_path / "out")


def test_columns_that_are_named_or_needed_must_be_there(data: Path, tmp_path: Path):
    types = {"rounds": 1, "cancer_types": ["LUAD"]}
    columns = {"duration": "days", "age": "years"}

    with pytest.raises(ConfigError) as refused:
        split(
            scenario(study={"survival": types}, data={"columns": columns}),
            data,
            tmp_path / "out",
        )

    message = str(refused.value)
    assert "no column 'days'" in message  # named
    assert "no column 'years'" in message  # named
    assert "no column 'event'" in message  # needed by survival
    assert "os_event" in message  # what there is


def test_absent_files_are_all_named(data: Path, tmp_path: Path):
    source = {"expression": "dna/*.parquet", "clinical": "clinic.csv"}

    with pytest.raises(ConfigError, match=r"(?s)dna/\*\.parquet.*clinic\.csv"):
        split(scenario(data=source), data, tmp_path / "out")


def test_repeated_samples_are_refused_without_naming_them(data: Path, tmp_path: Path):
    shutil.copy(data / "rna" / "BRCA.parquet", data / "rna" / "LIHC.parquet")

    with pytest.raises(ConfigError, match="6 samples occur more than once") as refused:
        split(scenario(), data, tmp_path / "out")

    assert "BRCA-" not in str(refused.value)


def test_repeated_patients_are_refused_without_naming_them(data: Path, tmp_path: Path):
    table = pd.read_csv(data / "clinical.csv")
    pd.concat([table, table.head(2)]).to_csv(data / "clinical.csv", index=False)

    with pytest.raises(ConfigError, match="2 rows repeat a patient") as refused:
        split(scenario(), data, tmp_path / "out")

    assert "LUAD-" not in str(refused.value)


def test_text_among_the_genes_is_refused(data: Path, tmp_path: Path):
    path = data / "rna" / "LUAD.parquet"
    pd.read_parquet(path).assign(stage="I").to_parquet(path)

    with pytest.raises(ConfigError, match=r"LUAD\.parquet: 1 columns .* 'stage'"):
        split(scenario(), data, tmp_path / "out")


def test_identifiers_that_meet_nowhere_are_refused(data: Path, tmp_path: Path):
    source = {"patient_from_sample": 2}

    with pytest.raises(ConfigError, match=r"data\.patient_from_sample"):
        split(scenario(data=source), data, tmp_path / "out")


@pytest.mark.parametrize("small", ["region", "leave-out"])
def test_a_split_without_sites_is_refused(data: Path, tmp_path: Path, small: str):
    everybody = ["North", "South", "East", "West", "Held Out"]
    holdout = {"institutions": everybody[:2] + everybody[4:]}
    if small == "region":
        holdout = {"institutions": everybody}

    with pytest.raises(ConfigError, match="no site is left"):
        split(scenario(sites={"small": small}, holdout=holdout), data, tmp_path / "out")
