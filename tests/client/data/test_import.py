"""Downloads of portals become a hospital's files, and check-data takes them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fedgex.client.cli import app
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import Cohort
from fedgex.common.ingestion.cohort import read_cohort

from .sample_files import IDS, SAMPLES, counts, gdc, tpm, write

CASES = [f"TCGA-AA-{i:04d}" for i in range(12)]
LABELS = dict(zip(SAMPLES, (f"{case}-01A" for case in CASES), strict=True))


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)])
    return result.exit_code, result.output


def imported(to: Path) -> Cohort:
    settings = SiteSettings.load(to / "site.toml")
    return read_cohort(settings.data, 10, settings.data.scale, ())[0]


def same(cohort: Cohort, expected: pd.DataFrame) -> None:
    frame = pd.DataFrame(cohort.expression.T, cohort.genes, cohort.patients)
    expected = expected.set_axis(CASES, axis=1).loc[frame.index, frame.columns]
    assert frame.shape == (6, 12)
    np.testing.assert_array_equal(frame, expected.astype(np.float32))


# ---- GDC ----


def gdc_download(folder: Path, new: bool = True) -> tuple[Path, Path, Path]:
    """Write a cart as gdc-client and the portal do: files, sheet, clinical.tsv."""
    rows = []
    normal = [(SAMPLES[0], CASES[0], "TCGA-AA-0000-11A", "Solid Tissue Normal")]
    tumours = [(s, LABELS[s][:12], LABELS[s], "Primary Tumor") for s in SAMPLES]
    for i, (sample, case, label, kind) in enumerate([*tumours, *normal]):
        file_id = f"{i:08d}-6f3a"
        name = f"{i:08d}-17ce.rna_seq.augmented_star_gene_counts.tsv"
        write(folder / "files", f"{file_id}/{name}", lambda _, s=sample: gdc(s), [""])
        write(folder / "files", f"{file_id}/logs/{name}.parcel", gdc, SAMPLES[:1])
        rows.append(
            (
                file_id,
                name,
                "Transcriptome Profiling",
                "Gene Expression Quantification",
                "TCGA-BRCA",
                case,
                label,
                kind,
            )
        )
    columns = ["File ID", "File Name", "Data Category", "Data Type", "Project ID"]
    columns += ["Case ID", "Sample ID", "Sample Type"]
    sheet = folder / "gdc_sample_sheet.2026-11-30.tsv"
    pd.DataFrame(rows, columns=columns).to_csv(sheet, sep="\t", index=False)
    clinical = folder / "clinical.tsv"
    gdc_clinical(new).to_csv(clinical, sep="\t", index=False)
    return folder / "files", sheet, clinical


def gdc_clinical(new: bool) -> pd.DataFrame:
    """Return two rows a case, as for two treatments; the odd ones are dead."""
    rows = []
    for i, case in enumerate(CASES):
        dead = i % 2 == 1
        for last in (300 + i, 500 + i):
            rows.append(
                {
                    "cases.submitter_id": case,
                    "project.project_id": "TCGA-BRCA",
                    "demographic.vital_status": "Dead" if dead else "Alive",
                    "demographic.days_to_death": 700 + i if dead else "'--",
                    "demographic.gender": "female",
                    "diagnoses.age_at_diagnosis": 365.25 * (50 + i),
                    "diagnoses.days_to_last_follow_up": "'--" if dead else last,
                    "diagnoses.diagnosis_is_primary_disease": "true",
                    "treatments.treatment_type": "'--",
                }
            )
    frame = pd.DataFrame(rows)
    if new:
        return frame
    old = {"cases.submitter_id": "case_submitter_id"}
    names = {name: old.get(name, name.split(".")[1]) for name in frame}
    return frame.rename(columns=names).drop(columns="diagnosis_is_primary_disease")


@pytest.mark.parametrize("new", [True, False])
def test_a_cart_of_the_gdc_becomes_a_hospital(tmp_path: Path, new: bool) -> None:
    sources = gdc_download(tmp_path, new)

    code, output = run(*sources, "--to", tmp_path / "site", "--name", "north")

    assert code == 0, output
    cohort = imported(tmp_path / "site")
    same(cohort, tpm())
    days = [700 + i if i % 2 else 500 + i for i in range(12)]
    assert list(cohort.clinical["duration"]) == days
    assert list(cohort.clinical["event"]) == [i % 2 for i in range(12)]
    assert list(cohort.clinical["age"]) == [50 + i for i in range(12)]
    assert set(cohort.clinical["sex"]) == {"female"}
    assert "BRCA: 12 patients, fewer than 10 with the event" in output
    assert "6 of 6 genes" in output
    assert "normal tissue were left out" in output
    assert re.search(r"ok: 12 patients, 6 genes; 0 errors", output)


def test_counts_of_the_gdc_are_taken_on_request(tmp_path: Path) -> None:
    sources = gdc_download(tmp_path)

    code, output = run(*sources, "--to", tmp_path / "site", "--scale", "counts")

    assert code == 1  # without library sizes, counts lead nowhere
    assert "FX-DATA-035" in output
    frame = pd.read_parquet(tmp_path / "site/expression.parquet").set_index("gene")
    expected = counts().rename(index=IDS, columns=LABELS)
    pd.testing.assert_frame_equal(
        frame, expected.astype(float), check_names=False, check_like=True
    )


def test_a_follow_up_table_prolongs_the_follow_up(tmp_path: Path) -> None:
    sources = gdc_download(tmp_path)
    seen = {"cases.submitter_id": [CASES[0], CASES[1]]}
    seen["follow_ups.days_to_follow_up"] = [900, 900]
    pd.DataFrame(seen).to_csv(tmp_path / "follow_up.tsv", sep="\t", index=False)

    run(*sources, tmp_path / "follow_up.tsv", "--to", tmp_path / "site")

    days = imported(tmp_path / "site").clinical["duration"]
    assert list(days[:3]) == [900, 701, 502]


def test_a_cart_without_clinical_table_says_so(tmp_path: Path) -> None:
    files, sheet, _ = gdc_download(tmp_path)

    code, output = run(files, sheet, "--to", tmp_path / "site")

    assert code == 0
    assert "TO DECIDE: No clinical.tsv" in output
    assert set(imported(tmp_path / "site").clinical["cancer_type"]) == {"BRCA"}


def test_two_files_of_a_sample_are_one_and_are_named(tmp_path: Path) -> None:
    files, sheet, clinical = gdc_download(tmp_path)
    rows = pd.read_csv(sheet, sep="\t")
    rows.loc[1, "Sample ID"] = rows.loc[0, "Sample ID"]
    rows.to_csv(sheet, sep="\t", index=False)

    _, output = run(files, sheet, clinical, "--to", tmp_path / "site")

    assert "TO DECIDE: Some samples have several files" in output
    assert "ok: 11 patients" in output


def test_half_a_cart_is_refused(tmp_path: Path) -> None:
    files, sheet, clinical = gdc_download(tmp_path)

    assert "Sample Sheet" in run(files, clinical, "--to", tmp_path / "site")[1]
    assert "gdc-client" in run(sheet, clinical, "--to", tmp_path / "site")[1]
    assert not (tmp_path / "site").exists()


# ---- cBioPortal ----

META = """\
cancer_study_identifier: brca_tcga_pan_can_atlas_2018
genetic_alteration_type: MRNA_EXPRESSION
datatype: {datatype}
stable_id: rna_seq_v2_mrna
profile_name: mRNA Expression, RSEM (Batch normalized from Illumina HiSeq_RNASeqV2)
profile_description: {description}
data_filename: {file}
"""


def cbioportal(folder: Path, description: str = "RSEM") -> Path:
    """Write a study as cBioPortal's datahub has it."""
    folder.mkdir()
    sheet = tpm().set_axis([f"{case}-01" for case in CASES], axis=1)
    sheet = sheet.rename_axis("Hugo_Symbol").reset_index()
    sheet.insert(1, "Entrez_Gene_Id", range(1, 7))
    for file, datatype in (
        ("data_mrna_seq_v2_rsem.txt", "CONTINUOUS"),
        ("data_mrna_seq_v2_rsem_zscores_ref_all_samples.txt", "Z-SCORE"),
    ):
        meta = META.format(datatype=datatype, file=file, description=description)
        (folder / f"meta_{file[5:]}").write_text(meta)
        sheet.to_csv(folder / file, sep="\t", index=False)
    (folder / "meta_study.txt").write_text(
        "type_of_cancer: brca\ncancer_study_identifier: brca_tcga_pan_can_atlas_2018\n"
    )
    patients = pd.DataFrame(
        {
            "PATIENT_ID": CASES,
            "CANCER_TYPE_ACRONYM": "BRCA",
            "AGE": range(50, 62),
            "SEX": "Female",
            "OS_STATUS": ["0:LIVING", "1:DECEASED"] * 6,
            "OS_MONTHS": [12.5 + i for i in range(12)],
        }
    )
    samples = pd.DataFrame(
        {
            "PATIENT_ID": CASES,
            "SAMPLE_ID": [f"{case}-01" for case in CASES],
            "ONCOTREE_CODE": "IDC",
            "CANCER_TYPE": "Breast Cancer",
        }
    )
    attributes(folder / "data_clinical_patient.txt", patients)
    attributes(folder / "data_clinical_sample.txt", samples)
    return folder


def attributes(path: Path, frame: pd.DataFrame) -> None:
    """Write names, descriptions, types and priorities before the header."""
    above: Sequence[str] = ("Name", "What it means", "STRING", "1")
    lines = ["#" + "\t".join([each] * frame.shape[1]) for each in above]
    text = frame.to_csv(sep="\t", index=False)
    path.write_text("\n".join([*lines, text]))


def test_a_study_of_cbioportal_becomes_a_hospital(tmp_path: Path) -> None:
    study = cbioportal(tmp_path / "brca_tcga")

    code, output = run(study, "--to", tmp_path / "site", "--server", "fedgex.eu:9092")

    assert code == 0, output
    cohort = imported(tmp_path / "site")
    same(cohort, tpm())
    months = np.array([12.5 + i for i in range(12)])
    np.testing.assert_allclose(cohort.clinical["duration"], months * 30.4375)
    assert list(cohort.clinical["event"]) == [0, 1] * 6
    assert set(cohort.clinical["cancer_type"]) == {"BRCA"}
    assert "cancer_type is CANCER_TYPE_ACRONYM" in output
    assert "TO DECIDE" not in output  # z-scores are no other choice
    settings = SiteSettings.load(tmp_path / "site/site.toml")
    assert (settings.server, settings.data.time_unit) == ("fedgex.eu:9092", "months")


@pytest.mark.parametrize(
    ("description", "scale"),
    [("log2(x + 1) of FPKM", "log2p1"), ("log2 values", None), ("arrays", "linear")],
)
def test_the_study_says_its_scale_or_a_person_must(
    tmp_path: Path, description: str, scale: str | None
) -> None:
    study = cbioportal(tmp_path / "brca_tcga", description)

    code, output = run(study, "--to", tmp_path / "site")

    text = (tmp_path / "site/site.toml").read_text()
    assert f'scale = "{scale or "CHANGE"}"' in text
    if scale is None:
        assert code == 1
        assert "TO DECIDE: data.scale" in output
        assert "linear" in output


def test_several_studies_are_refused(tmp_path: Path) -> None:
    a, b = cbioportal(tmp_path / "a"), cbioportal(tmp_path / "b")

    assert "2 studies" in run(a, b, "--to", tmp_path / "site")[1]


# ---- Xena ----


def xena(folder: Path, name: str = "HiSeqV2", unit: str | None = None) -> Path:
    """Write the legacy hub's matrix, survival table and phenotype; one normal."""
    folder.mkdir()
    labels = [f"{case}-01" for case in CASES]
    sheet = np.log2(tpm() + 1).set_axis(labels, axis=1)
    sheet[f"{CASES[0]}-11"] = 0.0
    sheet.rename_axis("sample").to_csv(folder / name, sep="\t")
    if unit is not None:
        (folder / f"{name}.json").write_text(json.dumps({"unit": unit, "cohort": "x"}))
    survival = pd.DataFrame(
        {
            "sample": labels,
            "OS": [0, 1] * 6,
            "_PATIENT": CASES,
            "OS.time": range(900, 912),
        }
    )
    survival.to_csv(folder / "BRCA_survival.txt", sep="\t", index=False)
    phenotype = pd.DataFrame(
        {
            "sampleID": [*labels, f"{CASES[0]}-11"],
            "_primary_disease": "breast invasive carcinoma",
            "age_at_initial_pathologic_diagnosis": range(50, 63),
            "gender": "FEMALE",
        }
    )
    phenotype.to_csv(folder / "BRCA_clinicalMatrix", sep="\t", index=False)
    return folder


def test_a_matrix_of_xena_becomes_a_hospital(tmp_path: Path) -> None:
    code, output = run(xena(tmp_path / "xena"), "--to", tmp_path / "site")

    assert code == 0, output
    cohort = imported(tmp_path / "site")
    same(cohort, np.log2(tpm() + 1))
    assert list(cohort.clinical["duration"]) == list(range(900, 912))
    assert list(cohort.clinical["event"]) == [0, 1] * 6
    assert list(cohort.clinical["age"]) == list(range(50, 62))
    assert set(cohort.clinical["cancer_type"]) == {"breast invasive carcinoma"}
    assert "normal were left out" in output
    assert "ok: 12 patients" in output


@pytest.mark.parametrize(
    ("name", "unit", "scale"),
    [
        ("own.tsv", "log2(tpm+0.001)", "log2(x+0.001)"),
        ("HiSeqV2", "log2(norm_count + 1)", "log2p1"),
        ("TCGA-BRCA.star_tpm.tsv", None, "log2p1"),
        ("tcga_RSEM_gene_tpm", None, "CHANGE"),
        ("TcgaTargetGtex_rsem_gene_tpm", None, "log2(x+0.001)"),
        ("own.tsv", "log2(count+1)", "CHANGE"),
        ("own.tsv", None, "CHANGE"),
    ],
)
def test_xena_says_its_unit_or_a_person_must(
    tmp_path: Path, name: str, unit: str | None, scale: str
) -> None:
    run(xena(tmp_path / "xena", name, unit), "--to", tmp_path / "site")

    assert f'scale = "{scale}"' in (tmp_path / "site/site.toml").read_text()


# ---- GEO ----

PLATFORM = """\
#ID = Affymetrix Probe Set ID
ID\tGB_ACC\tGene Symbol
"""


def geo(folder: Path) -> list[Path]:
    """Write a series matrix and its platform, as GEO does; two probes of one gene."""
    folder.mkdir()
    labels = [f"GSM{i:06d}" for i in range(12)]

    def line(key: str, cells: Sequence[object]) -> str:
        return "\t".join([key, *(f'"{cell}"' for cell in cells)])

    sheet = np.log2(tpm() + 1).set_axis(labels, axis=1).rename_axis("ID_REF")
    sheet.loc["TP53b"] = 0.5
    probes = {gene: f"{i}_at" for i, gene in enumerate(sheet.index)}
    head = [
        line("!Series_title", ["Breast tumours"]),
        line("!Series_platform_id", ["GPL570"]),
        "",
        line("!Sample_title", [f"tumour {i}" for i in range(12)]),
        line("!Sample_geo_accession", labels),
        line("!Sample_characteristics_ch1", [f"age: {50 + i}" for i in range(12)]),
        line("!Sample_characteristics_ch1", ["gender: F"] * 11 + ["os months: 11"]),
        line(
            "!Sample_characteristics_ch1",
            [*(f"os months: {20 + i}" for i in range(11)), ""],
        ),
        line("!Sample_characteristics_ch1", [f"os event: {i % 2}" for i in range(12)]),
        "!series_matrix_table_begin",
    ]
    table = sheet.rename(probes).to_csv(sep="\t").strip()
    text = "\n".join([*head, table, "!series_matrix_table_end", ""])
    (folder / "GSE1_series_matrix.txt").write_text(text)
    rows = [f"{probe}\tX\t{gene[:4]}" for gene, probe in probes.items()]
    (folder / "GPL570.annot").write_text(PLATFORM + "\n".join(rows) + "\n")
    return [folder / "GSE1_series_matrix.txt", folder / "GPL570.annot"]


def test_a_series_of_geo_becomes_a_hospital_once_a_person_decides(
    tmp_path: Path,
) -> None:
    sources, to = geo(tmp_path / "geo"), tmp_path / "site"

    code, output = run(*sources, "--to", to)

    assert code == 1
    assert re.search("TO DECIDE: data.scale.*log2p1", output)
    assert re.search(
        "TO DECIDE: data.columns.duration.*follow-up are os months, os event", output
    )
    text = (to / "site.toml").read_text().replace("CHANGE", "log2p1")
    text = text.replace('"days"', '"months"')
    columns = '[data.columns]\nduration = "os months"\nevent = "os event"\n'
    (to / "site.toml").write_text(text + columns)
    result = CliRunner().invoke(app, ["check-data", str(to / "site.toml")])
    assert result.exit_code == 0, result.output
    cohort = imported(to)
    frame = pd.DataFrame(cohort.expression.T, cohort.genes)
    expected = np.log2(tpm() + 1).loc[list(cohort.genes)].astype(np.float32)
    np.testing.assert_array_equal(frame, expected)
    assert list(cohort.clinical["age"]) == list(range(50, 62))
    months = np.array([*range(20, 31), 11])
    np.testing.assert_allclose(cohort.clinical["duration"], months * 30.4375)


def test_a_series_whose_scale_is_given_is_checked_at_once(tmp_path: Path) -> None:
    code, output = run(
        *geo(tmp_path / "geo"), "--to", tmp_path / "site", "--scale", "log2p1"
    )

    assert code == 0, output
    assert "ok: 12 patients, 6 genes" in output


# ---- all ----


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    study, to = cbioportal(tmp_path / "study"), tmp_path / "site"
    run(study, "--to", to)
    before = {path: path.read_bytes() for path in to.iterdir()}

    code, output = run(study, "--to", to)

    assert code == 1
    assert "site.toml, expression.parquet, clinical.csv exist" in output
    assert before == {path: path.read_bytes() for path in to.iterdir()}


def test_what_is_no_download_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("patient,TP53\nP1,3\n")

    assert "none of which" in run(tmp_path / "a.csv", "--to", tmp_path / "site")[1]
    assert "no such file" in run(tmp_path / "b.csv", "--to", tmp_path / "site")[1]


def test_a_hospital_is_set_up_in_the_folder_afterwards(tmp_path: Path) -> None:
    server = ("--name", "north", "--server", "fedgex.eu:9092")
    study, to = cbioportal(tmp_path / "study"), tmp_path / "site"
    run(study, "--to", to, *server)

    result = CliRunner().invoke(app, ["init", str(to), *server])

    assert result.exit_code == 0, result.output
    assert (to / "state" / "request.json").exists()
