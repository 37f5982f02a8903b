"""What a checked cohort holds, what is put right, and who is left out."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from fedgex.common.data.scales import Scale
from fedgex.common.ingestion.settings import DataColumns

from .cases import (
    FLOOR,
    GENES,
    PATIENTS,
    clinical,
    expression,
    load,
    opt_outs,
    reported,
)

# ---- a clean hospital ----


def test_clean_data_arrive_unchanged_with_genes_sorted(tmp_path: Path) -> None:
    cohort, findings = load(tmp_path, expression(), clinical(), tasks=("survival",))

    assert [finding.code for finding in findings] == ["FX-DATA-010"]
    assert cohort.genes == tuple(sorted(GENES))
    assert cohort.patients == tuple(PATIENTS)
    assert cohort.expression.dtype == np.float32
    np.testing.assert_allclose(
        cohort.expression, expression()[sorted(GENES)].to_numpy(float), rtol=1e-6
    )
    assert cohort.clinical["duration"].tolist() == [100.0 * i for i in range(1, 21)]
    assert cohort.clinical["sex"].tolist() == ["male", "female"] * 10
    assert cohort.with_survival().all()


def test_identifiers_stay_as_written(tmp_path: Path) -> None:
    ids = [f"{i:03d}" for i in range(20)]

    cohort, _ = load(
        tmp_path, expression().set_axis(ids), clinical().assign(patient=ids)
    )

    assert cohort.patients == tuple(ids)


def test_clinical_rows_follow_the_samples_in_any_order(tmp_path: Path) -> None:
    cohort, _ = load(tmp_path, expression(), clinical().iloc[::-1])

    assert cohort.clinical["age"].tolist() == [40.0 + i for i in range(20)]


def test_without_a_clinical_table_samples_are_patients(tmp_path: Path) -> None:
    cohort, _ = load(tmp_path, expression())

    assert cohort.patients == tuple(PATIENTS)
    assert list(cohort.clinical.columns) == []
    assert len(cohort.clinical) == 20


@pytest.mark.parametrize("mark", ["", "NA", "NaN", "null", " n/a "])
def test_a_mark_for_missing_is_missing(tmp_path: Path, mark: str) -> None:
    sheet, table = expression(), clinical()
    sheet.iloc[0, 0] = mark
    table.loc[0, "age"] = mark

    cohort, _ = load(tmp_path, sheet, table)

    column = cohort.genes.index("TP53")
    assert np.isnan(cohort.expression[:, column]).sum() == 1
    assert np.isnan(cohort.clinical["age"]).sum() == 1


def test_columns_are_found_by_the_names_in_the_settings(tmp_path: Path) -> None:
    table = clinical().rename(columns={"patient": "barcode", "duration": "os_months"})
    columns = DataColumns(patient="barcode", duration="os_months")

    table["os_months"] //= 10
    cohort, _ = load(tmp_path, expression(), table, columns=columns, time_unit="months")

    assert cohort.clinical["duration"].iloc[0] == 10 * 30.4375


def test_years_become_days(tmp_path: Path) -> None:
    table = clinical().assign(duration=2)

    cohort, _ = load(tmp_path, expression(), table, time_unit="years")

    assert cohort.clinical["duration"].iloc[0] == 730.5


def test_anndata_with_obs_needs_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "e.h5ad"
    obs = clinical().set_index("patient").astype({"duration": float, "event": int})
    anndata.AnnData(
        X=expression().to_numpy(np.float32),
        obs=obs[["duration", "event"]],
        var=pd.DataFrame(index=list(GENES)),
    ).write_h5ad(path)

    cohort, _ = load(tmp_path, expression(), expression=path)

    assert cohort.patients == tuple(PATIENTS)
    assert cohort.clinical["event"].tolist() == [1.0] * 19 + [0.0]


# ---- samples and patients ----


def test_samples_of_one_patient_share_a_clinical_row_each(tmp_path: Path) -> None:
    samples = [f"S{i}" for i in range(20)]
    table = clinical().assign(sample=samples)
    table.loc[1] = [*table.loc[0, :"cancer_type"], "S1"]

    cohort, findings = load(tmp_path, expression().set_axis(samples), table)

    assert cohort.patients[:3] == ("PAT-001", "PAT-001", "PAT-003")
    assert cohort.n_patients == 19
    assert "FX-DATA-028" in {finding.code for finding in findings}


def test_rows_of_a_patient_that_differ_are_reported(tmp_path: Path) -> None:
    samples = [f"S{i}" for i in range(20)]
    table = clinical().assign(sample=samples)
    table.loc[1, "patient"] = "PAT-001"

    assert "FX-DATA-029" in reported(tmp_path, expression().set_axis(samples), table)


def test_samples_and_clinical_rows_without_each_other_are_left_out(
    tmp_path: Path,
) -> None:
    cohort, findings = load(tmp_path, expression().iloc[2:], clinical().iloc[:18])

    assert cohort.patients == tuple(PATIENTS[2:18])
    by_code = {finding.code: finding for finding in findings}
    assert "fewer than 10 samples" in by_code["FX-DATA-026"].found
    assert "fewer than 10 clinical rows" in by_code["FX-DATA-027"].found


def test_errors_in_clinical_rows_that_nobody_uses_do_not_matter(
    tmp_path: Path,
) -> None:
    table = clinical()
    table.loc[19, "duration"] = -5

    cohort, _ = load(tmp_path, expression().iloc[:19], table)

    assert cohort.n_patients == 19


def test_blank_rows_at_the_end_do_not_matter(tmp_path: Path) -> None:
    table = pd.concat([clinical(), pd.DataFrame([{"patient": ""}] * 3)])

    _, findings = load(tmp_path, expression(), table)

    assert [finding.code for finding in findings] == ["FX-DATA-010"]


# ---- opting out ----


def test_patients_who_opted_out_are_left_out_with_all_their_samples(
    tmp_path: Path,
) -> None:
    sheet = expression().set_axis([f"S{i}" for i in range(20)])
    table = clinical().assign(sample=sheet.index)
    table.loc[1, "patient"] = PATIENTS[0]
    path = opt_outs(tmp_path, PATIENTS[0], PATIENTS[5], "somebody of another hospital")

    cohort, _ = load(tmp_path, sheet, table, opt_outs=path)

    assert cohort.patients == (*PATIENTS[2:5], *PATIENTS[6:])
    whole, _ = load(tmp_path, sheet, table)
    stay = [2, 3, 4, *range(6, 20)]
    np.testing.assert_array_equal(cohort.expression, whole.expression[stay])
    assert cohort.clinical["age"].tolist() == [40 + i for i in stay]


def test_without_a_clinical_table_samples_opt_out(tmp_path: Path) -> None:
    path = opt_outs(tmp_path, PATIENTS[19])

    cohort, _ = load(tmp_path, expression(), opt_outs=path)

    assert cohort.patients == tuple(PATIENTS[:19])


def test_few_opt_outs_and_none_look_the_same(tmp_path: Path) -> None:
    few, none = (
        reported(
            tmp_path, expression(), clinical(), opt_outs=opt_outs(tmp_path, *those)
        )
        for those in (PATIENTS[:3], ["a stranger"])
    )

    assert few["FX-DATA-073"] == none["FX-DATA-073"]
    assert few["FX-DATA-073"].found.endswith("left out: suppressed")


def test_as_many_opt_outs_as_the_minimum_cohort_are_counted(tmp_path: Path) -> None:
    path = opt_outs(tmp_path, *PATIENTS[:FLOOR])

    findings = reported(tmp_path, expression(), clinical(), opt_outs=path)

    assert findings["FX-DATA-073"].found.endswith("left out: 10")


def test_a_site_whose_patients_all_opted_out_has_too_few(tmp_path: Path) -> None:
    path = opt_outs(tmp_path, *PATIENTS)

    findings = reported(tmp_path, expression(), clinical(), opt_outs=path)

    assert "FX-DATA-070" in findings


# ---- real data ----


def test_real_tumours_pass(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "tcga" / "rsem_log2" / "COADREAD.parquet"
    table = pd.read_csv(shared_data / "tcga" / "clinical.csv", dtype=str)
    columns = DataColumns(duration="os_days", event="os_event", cancer_type="cohort")

    cohort, findings = load(
        tmp_path,
        expression(),
        table,
        expression=path,
        columns=columns,
        tasks=("pretraining", "survival"),
    )

    assert cohort.n_patients == 292
    assert len(cohort.genes) == 738
    assert {finding.severity for finding in findings} <= {"note", "warning"}
    original = pd.read_parquet(path)[list(cohort.genes)]
    np.testing.assert_allclose(cohort.expression, original, atol=1e-5)


@pytest.mark.parametrize("layer", ["zscore", "paired"])
@pytest.mark.parametrize("declared", [Scale.LOG2P1, Scale.LINEAR, Scale.COUNTS])
def test_real_data_on_another_scale_are_refused(
    shared_data: Path, tmp_path: Path, layer: str, declared: Scale
) -> None:
    path = shared_data / "tcga" / layer / "STAD.parquet"

    codes = reported(tmp_path, expression(), expression=path, scale=declared)

    assert "FX-DATA-032" in codes


# ---- what real tables hold ----


def test_what_one_row_of_a_patient_says_holds_for_all_samples(tmp_path: Path) -> None:
    sheet = expression().set_axis([f"S{i}" for i in range(20)])
    table = clinical().assign(sample=sheet.index)
    table["patient"] = [PATIENTS[i // 2] for i in range(20)]
    follow_up = ["duration", "event", "age", "sex", "cancer_type"]
    table.loc[::2, follow_up] = ""

    cohort, _ = load(tmp_path, sheet, table, tasks=("survival",))

    used = cohort.take(cohort.first_samples())
    assert used.with_survival().all()
    assert used.clinical["duration"].tolist() == [200.0 * i for i in range(1, 11)]


def test_of_a_patients_samples_a_tumour_and_then_most_genes_are_used(
    tmp_path: Path,
) -> None:
    kinds = ["11A", "01A", "01B"]
    names = [f"TCGA-AA-{i:04d}" for i in range(20)]
    sheet = pd.concat([expression()] * 3, keys=kinds)
    sheet.index = [f"{names[PATIENTS.index(p)]}-{kind}" for kind, p in sheet.index]
    sheet.loc[f"{names[0]}-01A", "TP53"] = np.nan  # so 01B has more
    table = pd.concat([clinical()] * 3).assign(sample=sheet.index, patient=names * 3)
    sheet.loc[[f"{name}-11A" for name in names]] += 12.0

    cohort, findings = load(tmp_path, sheet, table)

    used = cohort.take(cohort.first_samples())
    assert used.patients == tuple(names)
    assert np.isfinite(used.expression).all()
    assert used.expression.max() < 12
    (several,) = [f for f in findings if f.code == "FX-DATA-028"]
    assert "20 patients" in several.found
    assert "40 samples" in several.found


@pytest.mark.parametrize(
    ("words", "event"),
    [
        (("1:DECEASED", "0:LIVING"), (1, 0)),
        (("1:Recurred/Progressed", "0:DiseaseFree"), (1, 0)),
        (("Dead", "Alive"), (1, 0)),
        (("TRUE", "FALSE"), (1, 0)),
        (("1", "0"), (1, 0)),
    ],
)
def test_events_in_words_are_read(
    tmp_path: Path, words: tuple[str, str], event: tuple[int, int]
) -> None:
    cohort, _ = load(tmp_path, expression(), clinical().assign(event=[*words] * 10))

    assert cohort.clinical["event"].tolist() == [*event] * 10


@pytest.mark.parametrize("cell", ["'--", "[Not Available]", "not reported", "<NA>"])
def test_marks_of_public_portals_for_missing_are_missing(
    tmp_path: Path, cell: str
) -> None:
    table = clinical()
    table.loc[3, ["duration", "age", "cancer_type"]] = cell

    cohort, _ = load(tmp_path, expression(), table)

    assert cohort.clinical.loc[3, ["duration", "age", "cancer_type"]].isna().all()


@pytest.mark.parametrize(
    ("column", "times", "code"),
    [
        ("OS_MONTHS", [100 * i for i in range(1, 21)], "FX-DATA-069"),
        ("duration", [20_000 * i / 20 for i in range(1, 21)], "FX-DATA-069"),
        ("duration", [1990 + i for i in range(20)], "FX-DATA-080"),
    ],
)
def test_times_that_speak_for_another_unit_are_reported(
    tmp_path: Path, column: str, times: list[float], code: str
) -> None:
    table = clinical().assign(duration=times).rename(columns={"duration": column})
    columns = DataColumns(duration=column)

    assert code in reported(tmp_path, expression(), table, columns=columns)


def test_follow_up_in_days_is_not_doubted(tmp_path: Path) -> None:
    table = clinical().rename(columns={"duration": "days_to_death"})
    columns = DataColumns(duration="days_to_death")

    codes = reported(tmp_path, expression(), table, columns=columns)

    assert not {"FX-DATA-069", "FX-DATA-080"} & set(codes)


def test_annotation_is_no_sample_whatever_it_holds(tmp_path: Path) -> None:
    sheet = expression().T.assign(Chr="chr17", Length=2591)
    sheet.index = sheet.index.rename("Geneid")

    cohort, findings = load(tmp_path, sheet)

    assert cohort.patients == tuple(PATIENTS)
    (left_out,) = [f for f in findings if f.code == "FX-DATA-084"]
    assert "Chr, Length" in left_out.found


def test_a_column_of_patients_is_no_gene(tmp_path: Path) -> None:
    sheet = expression().assign(patient=range(500, 520))

    cohort, _ = load(tmp_path, sheet)

    assert cohort.genes == tuple(sorted(GENES))


# ---- follow-up from dates, and columns that are not there ----


def dated(**dates: Any) -> pd.DataFrame:
    table = clinical().drop(columns=["duration", "event"])
    return table.assign(
        diagnosed="2015-03-01", seen="2017-02-28", died=[""] * 5 + ["2016-03-01"] * 15
    ).assign(**dates)


DATED = DataColumns(
    diagnosis_date="diagnosed", last_contact_date="seen", death_date="died"
)


def test_follow_up_is_counted_from_dates_to_death_or_last_contact(
    tmp_path: Path,
) -> None:
    cohort, _ = load(tmp_path, expression(), dated(), columns=DATED, time_unit="months")

    assert cohort.clinical["duration"].tolist() == [730.0] * 5 + [366.0] * 15
    assert cohort.clinical["event"].tolist() == [0.0] * 5 + [1.0] * 15


@pytest.mark.parametrize("wrong", ["03/04/2016", "1.2.2016", "2014-12-31", "42430"])
def test_a_date_that_can_be_read_in_two_ways_or_is_too_early_is_refused(
    tmp_path: Path, wrong: str
) -> None:
    died = ["2016-03-01"] * 19 + [wrong]

    codes = reported(tmp_path, expression(), dated(died=died), columns=DATED)

    assert codes["FX-DATA-079"].severity == "error"
    assert wrong not in str(codes["FX-DATA-079"])


def test_a_missing_column_is_answered_with_those_that_are_there(
    tmp_path: Path,
) -> None:
    table = clinical().rename(columns={"duration": "OS_DAYS"})

    codes = reported(
        tmp_path,
        expression(),
        table,
        tasks=("survival",),
        columns=DataColumns(duration="OS_DAY"),
    )

    assert "patient, OS_DAYS, event, age" in codes["FX-DATA-020"].found
    assert '"OS_DAYS" is meant' in codes["FX-DATA-020"].action


def test_what_a_task_lacks_is_reported_of_the_clinical_file(tmp_path: Path) -> None:
    table = clinical().drop(columns="event")

    codes = reported(tmp_path, expression(), table, tasks=("survival",))

    assert codes["FX-DATA-072"].where == "c.csv"


def test_rs_coding_of_events_is_named(tmp_path: Path) -> None:
    table = clinical().assign(event=[2] * 19 + [1])

    finding = reported(tmp_path, expression(), table)["FX-DATA-060"]

    assert "R codes 1 ended before" in finding.action


def test_events_named_after_censoring_are_doubted(tmp_path: Path) -> None:
    table = clinical().rename(columns={"event": "Censored"})
    columns = DataColumns(event="Censored")

    codes = reported(tmp_path, expression(), table, columns=columns)

    assert codes["FX-DATA-077"].severity == "warning"


def test_yes_and_no_are_events(tmp_path: Path) -> None:
    table = clinical().assign(event=["Yes"] * 12 + ["no"] * 8)

    cohort, _ = load(tmp_path, expression(), table)

    assert cohort.clinical["event"].tolist() == [1.0] * 12 + [0.0] * 8


def test_what_survival_takes_for_unknown_age_and_sex_is_reported(
    tmp_path: Path,
) -> None:
    few = clinical().astype({"age": object})
    few.loc[:8, "age"] = ""
    none = clinical().drop(columns=["age", "sex"])

    _, of_few = load(tmp_path, expression(), few, tasks=("survival",))
    _, of_none = load(tmp_path, expression(), none, tasks=("survival",))

    assert not [f for f in of_few if f.code == "FX-DATA-078"]
    found = [f.found for f in of_none if f.code == "FX-DATA-078"]
    assert len(found) == 2
    assert "20 patients without age, taken as 60 years" in found[0]
