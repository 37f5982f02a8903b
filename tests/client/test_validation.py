"""What is checked at the door, what is put right, and what is told."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from fedgex.client.policy import Policy
from fedgex.client.settings import DataColumns, DataSettings, SiteSettings
from fedgex.client.validation import load_cohort
from fedgex.common.codes import Code
from fedgex.common.cohort import Cohort
from fedgex.common.errors import DataError, Finding
from fedgex.common.scale import Scale

GENES = ("TP53", "MYC", "EGFR", "ACTB", "KRAS", "VIM")
PATIENTS = [f"PAT-{i:03d}" for i in range(1, 21)]
FLOOR = 10


def expression() -> pd.DataFrame:
    """Return 20 patients x 6 genes on log2(x + 1), one decimal."""
    values = np.random.default_rng(0).normal(8, 1, (20, 6)).round(1)
    index = pd.Index(PATIENTS, name="patient")
    return pd.DataFrame(values, index=index, columns=list(GENES)).astype(object)


def clinical() -> pd.DataFrame:
    """Return 20 patients, all with an event."""
    return pd.DataFrame(
        {
            "patient": PATIENTS,
            "duration": [100 * i for i in range(1, 21)],
            "event": [1] * 20,
            "age": [40 + i for i in range(20)],
            "sex": ["male", "F"] * 10,
            "cancer_type": ["BRCA"] * 20,
        }
    ).astype(object)


def load(
    folder: Path,
    sheet: pd.DataFrame,
    table: pd.DataFrame | None = None,
    *,
    target: Scale = Scale.LOG2P1,
    tasks: tuple[str, ...] = ("pretraining",),
    **data: Any,
) -> tuple[Cohort, tuple[Finding, ...]]:
    """Write the files as CSV and read them through the door."""
    data = {"scale": Scale.LOG2P1, "expression": folder / "e.csv", **data}
    if data["expression"].suffix == ".csv":
        sheet.to_csv(data["expression"])
    if table is not None:
        data["clinical"] = folder / "c.csv"
        table.to_csv(data["clinical"], index=False)
    settings = SiteSettings(
        name="north",
        policy=Policy.proposed(minimum_cohort=FLOOR),
        data=DataSettings(**data),
    )
    return load_cohort(settings, target, tasks)


def told(*args: Any, **kwargs: Any) -> dict[str, Finding]:
    """Return all findings by code, whether the data are refused or not."""
    try:
        _, findings = load(*args, **kwargs)
    except DataError as error:
        findings = error.findings
    by_code = {finding.code: finding for finding in findings}
    assert len(by_code) == len(findings), "a code was told twice"
    return by_code


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
    assert cohort.clinical["event"].tolist() == [1.0] * 20


# ---- orientation ----


def test_orientation_is_recognised_by_identifiers(tmp_path: Path) -> None:
    unknown = [f"XGENE{i}" for i in range(6)]
    sheet = expression().set_axis(unknown, axis=1)

    straight, _ = load(tmp_path, sheet, clinical())
    turned, findings = load(tmp_path, sheet.T, clinical())

    assert turned.genes == straight.genes == tuple(unknown)
    np.testing.assert_array_equal(turned.expression, straight.expression)
    assert "columns are samples" in findings[0].found
    assert "identifiers" in findings[0].found


def test_orientation_is_recognised_by_genes_without_a_clinical_table(
    tmp_path: Path,
) -> None:
    turned, findings = load(tmp_path, expression().T)

    assert turned.patients == tuple(PATIENTS)
    assert "names of genes" in findings[0].found


def test_orientation_that_nothing_tells_is_refused_unless_declared(
    tmp_path: Path,
) -> None:
    sheet = expression().set_axis([f"X{i}" for i in range(6)], axis=1)

    assert "FX-DATA-011" in told(tmp_path, sheet)
    cohort, _ = load(tmp_path, sheet.T, orientation="genes-by-samples")
    assert cohort.patients == tuple(PATIENTS)


@pytest.mark.parametrize("with_clinical", [True, False])
def test_a_declared_orientation_that_the_labels_contradict_is_refused(
    tmp_path: Path, with_clinical: bool
) -> None:
    table = clinical() if with_clinical else None

    assert "FX-DATA-012" in told(
        tmp_path, expression(), table, orientation="genes-by-samples"
    )


# ---- samples and patients ----


def test_samples_of_one_patient_share_a_clinical_row_each(tmp_path: Path) -> None:
    samples = [f"S{i}" for i in range(20)]
    table = clinical().assign(sample=samples)
    table.loc[1] = [*table.loc[0, :"cancer_type"], "S1"]

    cohort, findings = load(tmp_path, expression().set_axis(samples), table)

    assert cohort.patients[:3] == ("PAT-001", "PAT-001", "PAT-003")
    assert cohort.n_patients == 19
    assert "FX-DATA-028" in {finding.code for finding in findings}


def test_rows_of_a_patient_that_differ_are_told(tmp_path: Path) -> None:
    samples = [f"S{i}" for i in range(20)]
    table = clinical().assign(sample=samples)
    table.loc[1, "patient"] = "PAT-001"

    assert "FX-DATA-029" in told(tmp_path, expression().set_axis(samples), table)


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


# ---- scale ----


def test_values_are_converted_to_the_scale_of_the_study(tmp_path: Path) -> None:
    linear = (2 ** expression().astype(float) - 1).round(6)

    cohort, _ = load(tmp_path, linear, scale=Scale.LINEAR)

    np.testing.assert_allclose(
        cohort.expression, expression()[sorted(GENES)].to_numpy(float), atol=1e-4
    )


def test_counts_with_library_sizes_are_counts_per_million(tmp_path: Path) -> None:
    counts = expression().astype(float).mul(10).round().astype(int)
    table = clinical().assign(library_size=2_000_000)

    cohort, findings = load(
        tmp_path, counts, table, scale=Scale.COUNTS, target=Scale.LINEAR
    )

    expected = counts[sorted(GENES)].to_numpy() / 2
    np.testing.assert_allclose(cohort.expression, expected)
    assert "FX-DATA-037" in {finding.code for finding in findings}


@pytest.mark.parametrize("library_size", ["", 0, 100, "inf"])
def test_a_library_size_that_cannot_be_is_refused(
    tmp_path: Path, library_size: Any
) -> None:
    counts = expression().astype(float).mul(10).round().astype(int)
    table = clinical().assign(library_size=2_000_000).astype(object)
    table.loc[3, "library_size"] = library_size

    assert "FX-DATA-036" in told(tmp_path, counts, table, scale=Scale.COUNTS)


def test_relative_values_pass_where_the_study_is_relative(tmp_path: Path) -> None:
    relative = expression().astype(float) - 8

    cohort, _ = load(tmp_path, relative, scale=Scale.RELATIVE, target=Scale.RELATIVE)

    assert (cohort.expression < 0).any()


# ---- genes ----

HGNC = """\
hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
1\tTP53\t.\tApproved\tp53\t\tENSG00000141510
2\tMYC\t.\tApproved\tbHLHe39\t\tENSG00000136997
3\tEGFR\t.\tApproved\tTWIN\tERBB\tENSG00000146648
4\tACTB\t.\tApproved\tTWIN\t\tENSG00000075624
5\tKRAS\t.\tApproved\t\tKRAS2\tENSG00000133703
"""


def test_ensembl_ids_and_retired_symbols_become_current(tmp_path: Path) -> None:
    (tmp_path / "hgnc.txt").write_text(HGNC)
    names = ["ENSG00000141510.18", "bHLHe39", "ERBB", "ACTB", "KRAS2", "NOSUCH"]
    sheet = expression().set_axis(names, axis=1)

    cohort, findings = load(tmp_path, sheet, hgnc_table=tmp_path / "hgnc.txt")

    assert cohort.genes == ("ACTB", "EGFR", "KRAS", "MYC", "TP53")
    by_code = {finding.code: finding.found for finding in findings}
    assert by_code["FX-DATA-041"].startswith("1 gene (NOSUCH)")
    assert by_code["FX-DATA-043"].startswith("3 genes (bHLHe39, ERBB, KRAS2)")


def test_ensembl_ids_without_a_table_leave_no_genes(tmp_path: Path) -> None:
    ids = [f"ENSG0000000000{i}.1" for i in range(6)]

    codes = told(tmp_path, expression().set_axis(ids, axis=1), clinical())

    assert {"FX-DATA-040", "FX-DATA-041"} <= set(codes)


def test_only_the_first_ten_genes_are_named(tmp_path: Path) -> None:
    sheet = expression()
    for i in range(25):
        sheet[f"FLAT{i:02d}"] = 1.0

    found = told(tmp_path, sheet, clinical())["FX-DATA-047"].found

    assert found.startswith("25 genes (FLAT00, ")
    assert "FLAT09 and 15 more)" in found


# ---- every code ----

Case = tuple[pd.DataFrame, pd.DataFrame | None, dict[str, Any]]


def cell(row: int, column: int | str, value: Any, table: bool = False) -> Case:
    sheet, follow_up = expression(), clinical()
    if table:
        follow_up.loc[row, column] = value
    else:
        sheet.iloc[row, int(column)] = value
    return sheet, follow_up, {}


def filled(value: Any, **data: Any) -> Case:
    return pd.DataFrame(value, expression().index, expression().columns), None, data


def spread(factor: float, **data: Any) -> Case:
    sheet = expression().astype(float).mul(factor)
    return sheet, None, data


def wide(mean: float, **data: Any) -> Case:
    rng = np.random.default_rng(0)
    names = [*GENES, *(f"G{i}X" for i in range(150))]
    values = rng.normal(mean, 0.1, (20, 156))
    return pd.DataFrame(values, PATIENTS, names), None, data


def with_hgnc(folder: Path) -> Case:
    (folder / "hgnc.txt").write_text(HGNC)
    sheet = expression().rename(columns={"EGFR": "TWIN", "KRAS": "KRAS2"})
    return sheet, clinical(), {"hgnc_table": folder / "hgnc.txt"}


def twice(label: str, shift: float, table: Path | None = None) -> Case:
    sheet = expression()
    extra = (sheet["TP53"].astype(float) + shift).rename(label)
    data = {} if table is None else {"hgnc_table": table}
    return pd.concat([sheet, extra], axis=1), clinical(), data


S = Scale
CASES: dict[str, Case | Any] = {
    "FX-DATA-006": cell(2, 1, "1,5"),
    "FX-DATA-010": (expression(), clinical(), {}),
    "FX-DATA-011": (expression().set_axis(list("abcdef"), axis=1), None, {}),
    "FX-DATA-012": (expression(), None, {"orientation": "genes-by-samples"}),
    "FX-DATA-020": (expression(), clinical().drop(columns="patient"), {}),
    "FX-DATA-021": (
        expression(),
        pd.concat([clinical(), clinical()["age"]], axis=1),
        {},
    ),
    "FX-DATA-022": cell(4, "patient", "", table=True),
    "FX-DATA-023": (pd.concat([expression(), expression()[:1]]), clinical(), {}),
    "FX-DATA-024": (expression(), pd.concat([clinical(), clinical()[:1]]), {}),
    "FX-DATA-025": (expression(), clinical().assign(patient=range(20)), {}),
    "FX-DATA-026": (expression(), clinical()[1:], {}),
    "FX-DATA-027": (expression()[1:], clinical(), {}),
    "FX-DATA-030": cell(2, 1, "low"),
    "FX-DATA-031": cell(2, 1, "inf"),
    "FX-DATA-032": cell(2, 1, -0.5),
    "FX-DATA-033": spread(10.0),
    "FX-DATA-034": wide(3.0),
    "FX-DATA-035": spread(1.0, scale=S.LOG2P1, target=S.RELATIVE),
    "FX-DATA-041": (expression().rename(columns={"VIM": "2-Sep"}), None, {}),
    "FX-DATA-042": with_hgnc,
    "FX-DATA-043": with_hgnc,
    "FX-DATA-044": twice("TP53", 0.0),
    "FX-DATA-045": twice("TP53", 0.5),
    "FX-DATA-046": (expression().assign(VIM=""), clinical(), {}),
    "FX-DATA-047": (expression().assign(VIM=0), clinical(), {}),
    "FX-DATA-048": (
        expression().assign(VIM=[""] * 11 + [*range(9)]),
        clinical(),
        {},
    ),
    "FX-DATA-060": cell(2, "event", 2, table=True),
    "FX-DATA-061": cell(2, "duration", -3, table=True),
    "FX-DATA-062": (expression(), clinical(), {"time_unit": "years"}),
    "FX-DATA-063": cell(2, "duration", 0, table=True),
    "FX-DATA-064": cell(2, "event", "", table=True),
    "FX-DATA-065": cell(2, "age", 1961, table=True),
    "FX-DATA-066": cell(2, "sex", "woman", table=True),
    "FX-DATA-070": (expression()[:9], clinical()[:9], {}),
    "FX-DATA-071": (
        expression(),
        clinical().assign(event=[1] * 9 + [0] * 11),
        {"tasks": ("survival",)},
    ),
    "FX-DATA-072": (
        expression(),
        clinical().drop(columns="event"),
        {"tasks": ("survival",)},
    ),
    "FX-DATA-073": lambda folder: (
        expression(),
        clinical(),
        {"opt_outs": opt_outs(folder, "PAT-003")},
    ),
}
ELSEWHERE = {f"FX-DATA-0{i}" for i in (28, 29, 36, 37, 40, 50, 51, 74)}
IN_SOURCES = {f"FX-DATA-00{i}" for i in (1, 2, 3, 4, 5, 7)}


@pytest.mark.parametrize("code", CASES)
def test_a_code_is_told_for_its_case(tmp_path: Path, code: str) -> None:
    case = CASES[code]
    sheet, table, data = case(tmp_path) if callable(case) else case

    assert code in told(tmp_path, sheet, table, **data)


@pytest.mark.parametrize("code", sorted(set(CASES) - {"FX-DATA-010"}))
def test_no_other_error_is_told_for_the_same_cause(tmp_path: Path, code: str) -> None:
    case = CASES[code]
    sheet, table, data = case(tmp_path) if callable(case) else case
    findings = told(tmp_path, sheet, table, **data)

    errors = {f.code for f in findings.values() if f.severity == "error"}

    follows = {"FX-DATA-006": {"FX-DATA-030"}}  # a comma makes text of the number
    assert errors - {code} <= follows.get(code, set())


@pytest.mark.parametrize(
    ("row", "code"), [("samples", "FX-DATA-050"), ("often", "FX-DATA-051")]
)
def test_samples_without_values_are_told(tmp_path: Path, row: str, code: str) -> None:
    sheet = expression()
    sheet.iloc[3, : 6 if row == "samples" else 4] = ""

    cohort, findings = load(tmp_path, sheet, clinical())

    assert code in {finding.code for finding in findings}
    assert len(cohort.patients) == len(cohort.clinical) == 20 - (row == "samples")


def test_every_code_of_data_has_a_case() -> None:
    assert {*CASES, *ELSEWHERE, *IN_SOURCES} == {
        code for code in Code if code.startswith("FX-DATA")
    }


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    sheet, table = expression(), clinical()
    sheet.iloc[0, 0], sheet.iloc[1, 1], sheet.iloc[2, 2] = "high", "inf", -3
    table.loc[0, "event"], table.loc[1, "duration"], table.loc[2, "age"] = 7, -1, 999

    codes = told(tmp_path, sheet, table)

    assert {f"FX-DATA-0{i}" for i in (30, 31, 32, 60, 61, 65)} <= set(codes)


def test_a_lost_orientation_does_not_hide_the_clinical_table(tmp_path: Path) -> None:
    sheet = expression().set_axis(list("abcdef"), axis=1).set_axis(range(20))
    table = clinical()
    table.loc[0, "event"] = 7

    assert {"FX-DATA-011", "FX-DATA-060"} <= set(told(tmp_path, sheet, table))


def test_lost_links_do_not_hide_anything(tmp_path: Path) -> None:
    sheet, table = expression(), clinical().assign(patient=range(20))
    sheet.iloc[0, 0] = -3
    table.loc[0, "event"] = 7

    codes = set(told(tmp_path, sheet, table))

    assert {"FX-DATA-025", "FX-DATA-032", "FX-DATA-060"} <= codes


# ---- opting out ----


def opt_outs(folder: Path, *identifiers: str) -> Path:
    path = folder / "opt-outs.txt"
    path.write_text("\n".join(identifiers), encoding="utf-8")
    return path


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
        told(tmp_path, expression(), clinical(), opt_outs=opt_outs(tmp_path, *those))
        for those in (PATIENTS[:3], ["a stranger"])
    )

    assert few == none
    assert few["FX-DATA-073"].found.endswith("left out: suppressed")


def test_as_many_opt_outs_as_the_minimum_cohort_are_counted(tmp_path: Path) -> None:
    path = opt_outs(tmp_path, *PATIENTS[:FLOOR])

    findings = told(tmp_path, expression(), clinical(), opt_outs=path)

    assert findings["FX-DATA-073"].found.endswith("left out: 10")


def test_a_site_whose_patients_all_opted_out_has_too_few(tmp_path: Path) -> None:
    path = opt_outs(tmp_path, *PATIENTS)

    findings = told(tmp_path, expression(), clinical(), opt_outs=path)

    assert "FX-DATA-070" in findings


# ---- nobody is told on ----


@pytest.mark.parametrize("code", CASES)
def test_no_identifier_and_no_value_is_ever_told(tmp_path: Path, code: str) -> None:
    case = CASES[code]
    sheet, table, data = case(tmp_path) if callable(case) else case
    # An identifier in the shape of a gene, and a value that is wrong everywhere.
    identifier, value = "MRN4711X", ["-31415", "31415.5x", "31415,5"][len(sheet) % 3]
    sheet = sheet.astype(object).set_axis([identifier, *sheet.index[1:]])
    sheet.iloc[1, 1] = value
    if table is not None:
        table = table.astype(object)
        table.iloc[0, 0] = identifier
        table.iloc[1, 1:] = value

    for turned in (sheet, sheet.T):
        for declared in ("auto", "samples-by-genes", "genes-by-samples"):
            settings = {**data, "orientation": declared}
            text = "\n".join(map(str, told_at_all(tmp_path, turned, table, **settings)))

            assert "FX-DATA" in text
            for hidden in (identifier, "31415", "PAT-"):
                assert hidden not in text


def told_at_all(*args: Any, **kwargs: Any) -> tuple[Finding, ...]:
    try:
        return load(*args, **kwargs)[1]
    except DataError as error:
        return error.findings


def test_small_counts_read_fewer_than_and_few_events_look_like_none(
    tmp_path: Path,
) -> None:
    few = clinical().assign(event=[1] * 3 + [0] * 17)
    none = clinical().assign(event=0)

    told_few = told(tmp_path, expression(), few, tasks=("survival",))
    told_none = told(tmp_path, expression(), none, tasks=("survival",))

    assert told_few == told_none
    assert "fewer than 10 patients" in told_few["FX-DATA-071"].found


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

    codes = told(tmp_path, expression(), expression=path, scale=declared)

    assert "FX-DATA-032" in codes
