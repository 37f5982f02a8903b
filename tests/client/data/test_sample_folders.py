"""A folder with files of one sample each is read to the numbers in the files."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedgex.common.codes import Code
from fedgex.common.errors import DataError
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.ingestion.settings import DataSettings

from .sample_files import (
    GENES,
    SAMPLES,
    counts,
    feature_counts,
    gdc,
    htseq,
    kallisto,
    rsem,
    rsem_isoforms,
    salmon,
    salmon_genes,
    star,
    tpm,
    write,
)


def found(folder: Path, scale: str, **data: object) -> tuple[pd.DataFrame, str]:
    """Return genes by samples as read and checked, and what was recognised."""
    settings = DataSettings.model_validate(
        {"expression": folder, "scale": scale} | data
    )
    if scale == "counts":
        table = folder.parent / "sizes.csv"
        sizes = pd.DataFrame({"patient": SAMPLES, "library_size": 10**6})
        sizes.to_csv(table, index=False)
        settings = settings.model_copy(update={"clinical": table})
    cohort, findings = read_cohort(settings, 1, settings.scale, ())
    (note,) = (f.found for f in findings if f.code == Code.FORMAT_RECOGNISED)
    assert Code.GENES_UNMAPPED not in {f.code for f in findings}
    frame = pd.DataFrame(cohort.expression.T, cohort.genes, cohort.patients)
    return frame.astype(float), note


def refusals(folder: Path, scale: str = "linear", **data: object) -> dict[str, str]:
    with pytest.raises(DataError) as refused:
        found(folder, scale, **data)
    errors = [f for f in refused.value.findings if f.severity == "error"]
    return {f.code: str(f) for f in errors}


def same(frame: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(frame.index) == GENES
    assert set(frame.columns) == set(SAMPLES)
    expected = expected.loc[list(frame.index), list(frame.columns)]
    np.testing.assert_array_equal(frame, expected.astype(np.float32).astype(float))


Writer = Callable[[str], str]
GDC = "{}.rna_seq.augmented_star_gene_counts.tsv"


@pytest.mark.parametrize(
    ("name", "content", "scale", "noted"),
    [
        (GDC, gdc, "linear", 'GDC, column "tpm_unstranded"'),
        (GDC, gdc, "counts", 'GDC, column "unstranded"'),
        ("{}.htseq.counts", htseq, "counts", "HTSeq"),
        ("{}_ReadsPerGene.out.tab", star, "counts", 'STAR, column "unstranded"'),
        ("{}_featureCounts.txt", feature_counts, "counts", "featureCounts"),
        ("{}.genes.results", rsem, "linear", 'RSEM, column "TPM"'),
        ("{}.genes.results", rsem, "counts", '"expected_count", rounded'),
        ("{}/quant.genes.sf", salmon_genes, "linear", 'Salmon, column "TPM"'),
        ("{}/quant.genes.sf", salmon_genes, "counts", '"NumReads", rounded'),
    ],
)
def test_what_a_tool_writes_is_read(
    tmp_path: Path, name: str, content: Writer, scale: str, noted: str
) -> None:
    folder = write(tmp_path / "files", name, content)

    frame, note = found(folder, scale)

    same(frame, tpm() if scale == "linear" else counts())
    assert noted in note


def test_a_column_by_name_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", GDC, gdc)

    frame, note = found(folder, "linear", value_column="FPKM_unstranded")

    same(frame, (tpm() / 3).round(4))
    assert '"fpkm_unstranded"' in note


def test_packed_files_and_other_files_around_them_do_not_matter(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "files",
        "{}/quant.genes.sf",
        salmon_genes,
        SAMPLES[1:],
        {
            "P00/aux_info/meta_info.json": "{}",
            "P01/quant.sf": salmon("P01"),
            "MANIFEST.txt": "id\tfilename\n1\tx\n",
            "logs/P00.genes.results": rsem("P00"),
            ".snapshot/P00.genes.results": rsem("P00"),
        },
    )
    text = salmon_genes("P00").encode()
    (folder / "P00" / "quant.genes.sf.gz").write_bytes(gzip.compress(text))

    same(found(folder, "linear")[0], tpm())


def test_featurecounts_of_several_samples_go_by_their_bam_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text(feature_counts(*SAMPLES[:5]))
    (folder / "b.txt").write_text(feature_counts(*SAMPLES[5:]))
    (folder / "b.txt.summary").write_text("Status\tx.bam\nAssigned\t9\n")

    same(found(folder, "counts")[0], counts())


def test_genes_in_another_order_are_put_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", "{}.counts", htseq)
    lines = (folder / "P03.counts").read_text().splitlines()
    (folder / "P03.counts").write_text("\n".join(reversed(lines[:6])))

    same(found(folder, "counts")[0], counts())


# ---- sample sheets ----


def test_the_gdc_sample_sheet_names_the_samples(tmp_path: Path) -> None:
    folder, rows = tmp_path / "files", []
    for i, sample in enumerate(SAMPLES):
        file_id, name = f"{i:08d}-aaaa", f"{i:08d}-bbbb.{GDC[3:]}"
        write(folder, f"{file_id}/{name}", lambda _, s=sample: gdc(s), [""])
        rows.append((file_id, name, "Transcriptome Profiling", sample))
    write(folder, "0/unlisted." + GDC[3:], gdc, SAMPLES[:1])
    columns = ["File ID", "File Name", "Data Category", "Sample ID"]
    sheet = tmp_path / "gdc_sample_sheet.2026-11-30.tsv"
    pd.DataFrame(rows, columns=columns).to_csv(sheet, sep="\t", index=False)

    frame, note = found(folder, "linear", sample_sheet=sheet)

    same(frame, tpm())
    assert "labels from the sample sheet" in note


@pytest.mark.parametrize("how", ["{}", "{}/quant.genes.sf", "sub\\{}\\quant.genes.sf"])
def test_a_sheet_by_hand_names_files_or_folders(tmp_path: Path, how: str) -> None:
    inside = "sub/" if "sub" in how else ""
    folder = write(
        tmp_path / "files",
        f"{inside}run{{}}/quant.genes.sf",
        lambda label: salmon_genes(label),
    )
    sheet = tmp_path / "sheet.csv"
    files = [how.format(f"run{sample}") for sample in SAMPLES]
    pd.DataFrame({"sample": SAMPLES, "file": files}).to_csv(sheet, index=False)

    same(found(folder, "linear", sample_sheet=sheet)[0], tpm())


def test_all_that_is_wrong_with_a_sheet_is_reported_at_once(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "files", "{}.genes.results", rsem, also={"notes.txt": "a\tb\n"}
    )
    names = [f"{sample}.genes.results" for sample in SAMPLES]
    rows = [*zip(names, SAMPLES, strict=True), ("gone.genes.results", "PX")]
    rows += [("notes.txt", "PY"), ("P00.genes.results", "P01")]
    sheet = tmp_path / "sheet.csv"
    pd.DataFrame(rows, columns=["file", "sample"]).to_csv(sheet, index=False)

    errors = refusals(folder, sample_sheet=sheet)

    assert "line 14" in errors["FX-DATA-017"]
    assert "line 15" in errors["FX-DATA-054"]
    assert set(errors) == {"FX-DATA-017", "FX-DATA-054", "FX-DATA-023"}
    assert not any(name in str(errors) for name in (*SAMPLES, "gone", "notes"))


def test_a_sheet_without_labels_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", "{}.genes.results", rsem)
    sheet = tmp_path / "sheet.csv"

    assert set(refusals(folder, sample_sheet=sheet)) == {"FX-DATA-001"}
    sheet.write_text("file,patient\na,b\n")
    assert set(refusals(folder, sample_sheet=sheet)) == {"FX-DATA-053"}
    sheet.write_text("file,sample\nP00.genes.results,\n")
    assert "line 2" in refusals(folder, sample_sheet=sheet)["FX-DATA-053"]


# ---- what is refused ----


def test_two_formats_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", "{}.genes.results", rsem, SAMPLES[:6])
    write(folder, "{}/quant.genes.sf", salmon_genes, SAMPLES[6:])

    errors = refusals(folder)

    assert "RSEM and Salmon" in errors["FX-DATA-018"]
    assert len(errors) == 1


def test_other_lists_of_genes_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", "{}.counts", htseq)
    lines = (folder / "P03.counts").read_text().splitlines()
    (folder / "P03.counts").write_text("\n".join(lines[1:]))

    assert "file 4" in refusals(folder, "counts")["FX-DATA-018"]


def test_two_files_of_a_sample_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", "a/{}.genes.results", rsem)
    write(folder, "b/{}.genes.results", rsem, SAMPLES[:1])

    assert set(refusals(folder)) == {"FX-DATA-023"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("{}/quant.sf", salmon),
        ("{}/abundance.tsv", kallisto),
        ("{}.isoforms.results", rsem_isoforms),
    ],
)
def test_transcripts_are_refused(tmp_path: Path, name: str, content: Writer) -> None:
    errors = refusals(write(tmp_path / "files", name, content))

    assert "--geneMap" in errors["FX-DATA-052"]


@pytest.mark.parametrize(
    ("content", "scale", "column"),
    [
        (gdc, "log2p1", None),
        (gdc, "counts", "tpm_unstranded"),
        (gdc, "linear", "unstranded"),
        (gdc, "linear", "rpkm"),
        (rsem, "counts", "FPKM"),
        (feature_counts, "linear", None),
        (htseq, "linear", None),
        (htseq, "counts", "TPM"),
    ],
)
def test_columns_that_do_not_fit_the_scale_are_refused(
    tmp_path: Path, content: Writer, scale: str, column: str | None
) -> None:
    folder = write(tmp_path / "files", "{}.tsv", content)

    errors = refusals(folder, scale, value_column=column)

    assert "counts" in errors["FX-DATA-019"]


def test_a_folder_without_such_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "files/{}.txt", lambda _: "a\tb\nc\td\n") / "files"

    assert "featureCounts" in refusals(folder)["FX-DATA-054"]


def test_a_cell_that_is_no_number_is_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", "{}.genes.results", rsem)
    text = (folder / "P03.genes.results").read_text()
    value = str(tpm().loc["TP53", "P03"])
    (folder / "P03.genes.results").write_text(text.replace(value, "low"))

    assert set(refusals(folder)) == {"FX-DATA-030"}
