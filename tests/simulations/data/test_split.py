import re
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgex.client.settings import SiteSettings
from fedgex.common.errors import ConfigError
from fedgex.simulations.data.split import Split, slugs, split
from fedgex.simulations.scenario import find

from .conftest import scenario


def patients_of(folder: Path) -> list[str]:
    return list(pd.read_csv(folder / "clinical.csv")["patient"])


def expression_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "expression.parquet")


def bytes_of(out: Path) -> dict[str, bytes]:
    files = sorted(p for p in out.rglob("*") if p.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def assert_partition(out: Path, done: Split, everyone: set[str]) -> None:
    groups = [set(patients_of(out / "sites" / site)) for site in done.sites]
    groups.append(set(patients_of(out / "holdout")))
    assert sum(map(len, groups)) == len(everyone)  # no patient twice
    assert set().union(*groups) == everyone  # and all of them


def test_sites_and_hold_out_have_the_patients_of_their_institutions(
    data: Path, tmp_path: Path
):
    done = split(scenario(), data, tmp_path / "out")

    assert done.sites == ("north", "region", "south")
    assert done.sizes == {"north": 5, "region": 3, "south": 4}
    assert done.holdout_size == 5
    assert patients_of(tmp_path / "out" / "sites" / "region") == [
        "BRCA-West-0",
        "LUAD-East-0",
        "LUAD-East-1",
    ]


def test_no_patient_is_in_two_places_and_none_is_lost(data: Path, tmp_path: Path):
    done = split(scenario(), data, tmp_path / "out")

    everyone = set(pd.read_csv(data / "clinical.csv")["patient"])
    assert_partition(tmp_path / "out", done, everyone)


def test_a_site_has_the_genes_that_any_of_its_patients_has(data: Path, tmp_path: Path):
    split(scenario(), data, tmp_path / "out")

    south = expression_of(tmp_path / "out" / "sites" / "south")
    north = expression_of(tmp_path / "out" / "sites" / "north")
    assert list(south.columns) == ["A", "B", "C"]
    assert list(north.columns) == ["A", "B", "C", "D"]
    assert list(north.index[north["C"].isna()]) == ["BRCA-Nort-0", "BRCA-Nort-1"]
    assert list(north.index[north["D"].isna()]) == [f"LUAD-Nort-{i}" for i in range(3)]


def test_values_are_those_of_the_raw_files(data: Path, tmp_path: Path):
    split(scenario(), data, tmp_path / "out")

    raw = pd.read_parquet(data / "rna" / "LUAD.parquet")
    south = expression_of(tmp_path / "out" / "sites" / "south")
    assert (south.dtypes == np.float32).all()
    np.testing.assert_array_equal(south, raw.loc[south.index, south.columns])


def test_the_clinical_table_uses_our_names_and_takes_the_type_from_the_file(
    data: Path, tmp_path: Path
):
    split(scenario(), data, tmp_path / "out")

    table = pd.read_csv(tmp_path / "out" / "sites" / "north" / "clinical.csv")
    assert table.iloc[0].to_dict() == {
        "patient": "BRCA-Nort-0",
        "duration": 100.0,
        "event": 0,
        "age": 60,
        "sex": "FEMALE",
        "cancer_type": "BRCA",
    }
    assert list(table["cancer_type"]) == ["BRCA"] * 2 + ["LUAD"] * 3


def test_the_type_may_come_from_a_column(data: Path, tmp_path: Path):
    clinical = pd.read_csv(data / "clinical.csv")
    clinical.assign(kind="LUSC").to_csv(data / "clinical.csv", index=False)
    change = {"cancer_type_from": "column", "columns": {"cancer_type": "kind"}}

    split(scenario(data=change), data, tmp_path / "out")

    table = pd.read_csv(tmp_path / "out" / "holdout" / "clinical.csv")
    assert list(table["cancer_type"]) == ["LUSC"] * 5


def test_the_site_file_says_what_a_hospital_would(data: Path, tmp_path: Path):
    sites, source = {"share_cross_products": False}, {"time_unit": "months"}
    split(scenario(sites=sites, data=source), data, tmp_path / "out")

    folder = tmp_path / "out" / "sites" / "region"
    settings = SiteSettings.load(folder / "site.toml")
    assert settings.name == "region"
    assert settings.policy.minimum_cohort == 2
    assert settings.policy.tasks == ("pretraining", "classification", "survival")
    assert not settings.policy.share_cross_products
    assert settings.policy.threads == 1
    assert settings.data.expression == folder / "expression.parquet"
    assert settings.data.clinical == folder / "clinical.csv"
    assert settings.data.scale == "log2p1"
    assert settings.data.time_unit == "months"
    assert settings.data.orientation == "samples-by-genes"


def test_public_institutions_are_at_no_site_and_do_not_judge(
    data: Path, tmp_path: Path
):
    public = {"institutions": ["West", "South"]}
    done = split(scenario(public=public), data, tmp_path / "out")

    assert done.sites == ("north", "region")
    assert (done.public_size, done.holdout_size) == (5, 5)
    assert done.sizes == {"north": 5, "region": 2}
    assert sorted(patients_of(tmp_path / "out" / "public")) == [
        "BRCA-West-0",
        *(f"LUAD-Sout-{i}" for i in range(4)),
    ]
    assert "public: 5 patients of 2 institutions (West; South)" in done.notes


def test_a_finished_split_with_public_patients_is_used_again_and_guarded(
    data: Path, tmp_path: Path
):
    told = scenario(public={"institutions": ["South"]})
    first = split(told, data, tmp_path)

    assert split(told, data, tmp_path) == first
    (tmp_path / "public" / "clinical.csv").write_text("patient\n")
    with pytest.raises(ConfigError, match="not as they were written"):
        split(told, data, tmp_path)


def test_public_patients_keep_all_their_genes(data: Path, tmp_path: Path):
    told = scenario(
        sites={"panel_share": 0.4}, public={"institutions": ["South", "North"]}
    )
    split(told, data, tmp_path)

    assert list(expression_of(tmp_path / "public")) == ["A", "B", "C", "D"]


def test_a_public_institution_that_no_patient_has_is_refused(
    data: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=r'public.institutions: no patient .*"Nort"'):
        split(scenario(public={"institutions": ["Nort"]}), data, tmp_path)


def test_small_institutions_can_be_left_out_and_it_is_said(data: Path, tmp_path: Path):
    done = split(scenario(sites={"small": "leave-out"}), data, tmp_path / "out")

    assert done.sites == ("north", "south")
    assert "left out: 2 institutions (East; West), each below 3 patients" in done.notes


def test_pooling_is_said(data: Path, tmp_path: Path):
    done = split(scenario(), data, tmp_path / "out")

    assert (
        "region: 3 patients of 2 institutions (East; West), each below 3 patients"
        in done.notes
    )


def test_an_institution_called_region_or_holdout_keeps_a_site_of_its_own(
    data: Path, tmp_path: Path
):
    table = pd.read_csv(data / "clinical.csv")
    table["hospital"] = table["hospital"].replace(
        {"North": "Region", "South": "Holdout"}
    )
    table.to_csv(data / "clinical.csv", index=False)

    done = split(scenario(), data, tmp_path / "out")

    assert done.sizes == {"holdout-2": 4, "region": 3, "region-2": 5}
    assert done.holdout_size == 5


def test_a_limit_keeps_the_sites_with_the_most_patients(data: Path, tmp_path: Path):
    done = split(scenario(sites={"max_sites": 2}), data, tmp_path / "out")

    assert done.sites == ("north", "south")
    assert any(note.startswith("left out: region") for note in done.notes)


def test_a_site_below_the_studys_minimum_cohort_is_announced(
    data: Path, tmp_path: Path
):
    study = {"minimum_cohort": 4}
    done = split(scenario(study=study), data, tmp_path / "out")

    assert any(note.startswith("will take no part: region,") for note in done.notes)


def test_patients_without_institution_are_left_out_and_counted(
    data: Path, tmp_path: Path
):
    clinical = pd.read_csv(data / "clinical.csv")
    clinical.loc[0, "hospital"] = np.nan
    clinical.drop(index=1).to_csv(data / "clinical.csv", index=False)

    done = split(scenario(), data, tmp_path / "out")

    assert done.sizes["north"] == 3
    assert any(note.startswith("left out: 2 patients") for note in done.notes)


def test_a_column_that_nobody_named_may_be_absent_and_it_is_said(
    data: Path, tmp_path: Path
):
    pd.read_csv(data / "clinical.csv").drop(columns="age").to_csv(
        data / "clinical.csv", index=False
    )

    done = split(scenario(), data, tmp_path / "out")

    assert "no site holds age: the table has none" in done.notes
    assert "age" not in pd.read_csv(tmp_path / "out" / "holdout" / "clinical.csv")


def test_samples_of_one_patient_stay_together(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    samples = ["PAT1-01A", "PAT2-01A", "PAT2-11A", "PAT3-01A", "PAT3-11A"]
    pd.DataFrame({"A": np.arange(5.0)}, index=pd.Index(samples, name="barcode")).to_csv(
        data / "expression.csv"
    )
    (data / "clinical.csv").write_text("patient,hospital\nPAT1,X\nPAT2,X\nPAT3,Y\n")
    source = {"expression": "expression.csv", "patient_from_sample": 4}
    changes = {
        "data": source | {"cancer_type_from": "column", "columns": {}},
        "sites": {"minimum_patients": 1},
        "holdout": {"institutions": ["Y"]},
    }

    done = split(scenario(**changes), data, tmp_path / "out")

    table = pd.read_csv(tmp_path / "out" / "sites" / "x" / "clinical.csv")
    assert table.to_dict("list") == {
        "sample": ["PAT1-01A", "PAT2-01A", "PAT2-11A"],
        "patient": ["PAT1", "PAT2", "PAT2"],
    }
    assert list(expression_of(tmp_path / "out/sites/x").index) == samples[:3]
    assert (done.sizes, done.holdout_size) == ({"x": 2}, 1)


def test_each_site_keeps_its_own_share_of_the_genes_and_the_hold_out_all(
    tmp_path: Path,
):
    data = tmp_path / "data"
    data.mkdir()
    ids = [f"P{i}" for i in range(6)]
    genes = [f"G{i:02d}" for i in range(40)]
    pd.DataFrame(1.0, pd.Index(ids, name="patient"), genes).to_csv(data / "x.csv")
    rows = [f"{p},{h}" for p, h in zip(ids, "AABBCC", strict=True)]
    (data / "clinical.csv").write_text("patient,hospital\n" + "\n".join(rows))
    changes = {
        "data": {"expression": "x.csv", "cancer_type_from": "column", "columns": {}},
        "sites": {"minimum_patients": 1, "panel_share": 0.25},
        "holdout": {"institutions": ["C"]},
    }

    split(scenario(**changes), data, tmp_path / "out")
    split(scenario(**changes, study={"seed": 2}), data, tmp_path / "other")

    a = list(expression_of(tmp_path / "out" / "sites" / "a").columns)
    b = list(expression_of(tmp_path / "out" / "sites" / "b").columns)
    other = list(expression_of(tmp_path / "other" / "sites" / "a").columns)
    assert len(a) == len(b) == len(other) == 10
    assert a != b
    assert a != other
    assert list(expression_of(tmp_path / "out" / "holdout").columns) == genes


@pytest.mark.parametrize("ending", ["csv", "tsv", "h5ad"])
def test_every_format_gives_the_same_split(data: Path, tmp_path: Path, ending: str):
    expected = split(scenario(), data, tmp_path / "parquet")
    for path in (data / "rna").glob("*.parquet"):
        table = pd.read_parquet(path)
        target = path.with_suffix(f".{ending}")
        if ending == "h5ad":
            anndata.AnnData(table).write_h5ad(target)
        else:
            table.to_csv(target, sep="," if ending == "csv" else "\t")

    source = {"expression": f"rna/*.{ending}"}
    done = split(scenario(data=source), data, tmp_path / "out")

    assert done == expected


def test_identifiers_that_look_like_numbers_keep_their_zeros(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "x.csv").write_text("patient,G\n001,1.5\n002,2.5\n")
    (data / "clinical.csv").write_text("patient,hospital\n001,07\n002,08\n")
    changes = {
        "data": {"expression": "x.csv", "cancer_type_from": "column", "columns": {}},
        "sites": {"minimum_patients": 1},
        "holdout": {"institutions": ["08"]},
    }

    done = split(scenario(**changes), data, tmp_path / "out")

    assert done.sites == ("07",)
    assert list(expression_of(tmp_path / "out" / "sites" / "07").index) == ["001"]


def test_the_same_scenario_and_data_give_the_same_bytes(data: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)

    one = split(scenario(), data, tmp_path / "one")
    two = split(scenario(), moved, tmp_path / "two")

    assert one == two
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_finished_split_is_used_again(data: Path, tmp_path: Path):
    first = split(scenario(), data, tmp_path / "out")
    written = (tmp_path / "out" / "sites" / "north" / "site.toml").stat().st_mtime_ns

    again = split(scenario(), data, tmp_path / "out")

    assert again == first
    after = (tmp_path / "out" / "sites" / "north" / "site.toml").stat().st_mtime_ns
    assert after == written


def test_the_number_of_workers_does_not_spoil_a_finished_split(
    data: Path, tmp_path: Path
):
    first = split(scenario(), data, tmp_path / "out")
    other = scenario().model_copy(
        update={"run": scenario().run.model_copy(update={"workers": 7})}
    )

    assert split(other, data, tmp_path / "out") == first


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_split_that_was_killed_starts_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
):
    expected = split(scenario(), data, tmp_path / "expected")
    rename, left = Path.rename, [moves]

    def killed(path: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        split(scenario(), data, tmp_path / "out")
    monkeypatch.undo()
    done = split(scenario(), data, tmp_path / "out")

    assert done == expected
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "expected")


def test_the_split_of_another_scenario_is_refused(data: Path, tmp_path: Path):
    split(scenario(), data, tmp_path / "out")

    with pytest.raises(ConfigError, match="another scenario or of other data"):
        split(scenario(sites={"max_sites": 2}), data, tmp_path / "out")


def test_the_split_of_other_data_is_refused(data: Path, tmp_path: Path):
    split(scenario(), data, tmp_path / "out")
    with (data / "clinical.csv").open("a") as table:
        table.write("NEW,North,1,1,1,MALE\n")

    with pytest.raises(ConfigError, match="another scenario or of other data"):
        split(scenario(), data, tmp_path / "out")


def test_a_split_whose_files_were_changed_is_refused(data: Path, tmp_path: Path):
    split(scenario(), data, tmp_path / "out")
    (tmp_path / "out" / "sites" / "north" / "site.toml").write_text("")

    with pytest.raises(ConfigError, match="not as they were written"):
        split(scenario(), data, tmp_path / "out")


def test_slugs_are_readable():
    names = [
        "Washington University - NYU",
        "St. Joseph's Hospital AZ",
        "Universität Köln",
    ]

    assert slugs(names) == {
        "Washington University - NYU": "washington-university-nyu",
        "St. Joseph's Hospital AZ": "st-joseph-s-hospital-az",
        "Universität Köln": "universitat-koln",
    }


def test_slugs_that_collide_are_numbered():
    assert slugs(["A B", "a-b", "Region"], reserved=["region"]) == {
        "A B": "a-b",
        "a-b": "a-b-2",
        "Region": "region-2",
    }


@given(st.lists(st.text(max_size=80), unique=True, max_size=8))
def test_slugs_are_distinct_and_fit_any_file_system(names: list[str]):
    given_names = slugs(names, reserved=["holdout"])

    assert len(set(given_names.values())) == len(names)
    assert all(
        re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) and len(slug) <= 60
        for slug in given_names.values()
    )
    assert slugs(reversed(names), reserved=["holdout"]) == given_names


def test_tcga_becomes_24_hospitals_a_region_and_505_held_out_patients(
    shared_data: Path, tmp_path: Path
):
    done = split(find("release"), shared_data, tmp_path / "out")

    assert len(done.sites) == 25
    assert done.sizes["region"] == 309
    assert min(done.sizes.values()) == 20
    assert done.holdout_size == 505
    assert sum(done.sizes.values()) + done.holdout_size == 3176
    everyone = {
        patient
        for path in (shared_data / "tcga" / "rsem_log2").glob("*.parquet")
        for patient in pd.read_parquet(path, columns=[]).index
    }
    assert_partition(tmp_path / "out", done, everyone)
