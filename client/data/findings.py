"""The findings of a check: their texts, and counts that do not reveal a few patients."""
# ruff: noqa: E501 (one line a code)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from fedgex.client.data.codes import Code
from fedgex.common.errors import DataError, Finding


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Names of settings, and advice on them, in the words of one user interface.

    The defaults are those of `site.toml`.
    """

    scale: str = "data.scale"
    orientation: str = "data.orientation"
    hgnc_table: str = "data.hgnc_table"
    sample_column: str = "data.columns.sample"
    missing_file: str = (
        "Correct the path in site.toml; relative paths start at its folder."
    )
    missing_column: str = "Set data.columns.{} to the name in the file's header."
    library_size: str = (
        "Add all reads of each sample to the clinical table as library_size"
    )


# fmt: off
TEXTS: Mapping[Code, tuple[str, str]] = {
    Code.FILE_MISSING: ("a file", "{missing_file}"),
    Code.FILE_UNREADABLE: ("UTF-8 text as .csv, .tsv, .csv.gz or .tsv.gz; .parquet; or, for expression, .h5ad", "Export the file again in one of these formats."),
    Code.FILE_EMPTY: ("", "Export the file again."),
    Code.WRONG_DELIMITER: ("", "Export with that delimiter and decimal points, or use the ending .tsv for tabs and .csv for commas."),
    Code.RAGGED_ROWS: ("", "Give the column of labels a name (in R: col.names = NA), and quote cells that hold the delimiter."),
    Code.DECIMAL_COMMA: ("decimal points", "Export with decimal points (1.5, not 1,5)."),
    Code.GENE_TABLE_UNUSABLE: ("HGNC's complete set, tab-separated, with its header", "Download it again, or remove {hgnc_table}."),
    Code.ORIENTATION_RECOGNISED: ("either orientation", "Set {orientation} if this is wrong."),
    Code.ORIENTATION_UNKNOWN: ("labels that occur in the clinical table, or names of genes", "Check the labels on both sides, or set {orientation}."),
    Code.ORIENTATION_CONTRADICTED: ("", 'Correct {orientation} (or set it to "auto"), or transpose the data.'),
    Code.COLUMN_MISSING: ("the columns that site.toml names, and one for the patient", ""),
    Code.COLUMN_REPEATED: ("each name once", "Rename or remove the others."),
    Code.ID_MISSING: ("one in every row", "Complete the column, or remove the rows."),
    Code.SAMPLE_REPEATED: ("each sample once", "Keep one of each; for several samples of a patient, label them apart and name a {sample_column}."),
    Code.CLINICAL_ROW_REPEATED: ("", "Keep one row each; for several samples of a patient, add a column with the label of the sample and name it as {sample_column}."),
    Code.NOTHING_LINKED: ("", "Name the column with these labels as {sample_column} or, if they are the patients' own, as data.columns.patient."),
    Code.SAMPLE_WITHOUT_CLINICAL: ("a clinical row for every sample", "Add the rows (all but the identifier may be empty), if they belong."),
    Code.CLINICAL_WITHOUT_SAMPLE: ("rows without a sample are fine", "Nothing, unless their samples should be there."),
    Code.SEVERAL_SAMPLES: ("one sample or more a patient", "Nothing: a patient's samples count, and are split, as one patient."),
    Code.PATIENT_CONTRADICTORY: ("the same follow-up and sex in all rows of a patient", "Correct the rows."),
    Code.NOT_A_NUMBER: ("numbers, or empty cells or NA where nothing is known", "Correct the cells."),
    Code.INFINITE: ("finite numbers", "Correct the cells, or leave them empty."),
    Code.SCALE_FAINT: ("some abundant genes in most panels", "Check {scale}: logarithms declared linear, or the wrong base."),
    Code.LIBRARY_SIZE_UNUSABLE: ("all reads of the sample", "Correct the library sizes in the clinical table."),
    Code.COUNTS_PER_MILLION: ("TPM, FPKM or RSEM normalised, which account for gene length or the like", "Export normalised values if other sites do; else make sure that all use CPM."),
    Code.NO_GENES: ("HGNC symbols, or Ensembl gene ids and a {hgnc_table}", "Check the labels of the genes; Ensembl ids need HGNC's complete set."),
    Code.GENES_UNMAPPED: ("HGNC symbols or Ensembl gene ids", ""),
    Code.GENES_AMBIGUOUS: ("names of one gene each", "Use current symbols or Ensembl gene ids for these."),
    Code.GENES_UPDATED: ("retired symbols are fine", "Nothing."),
    Code.GENES_REPEATED: ("one column a gene", "Nothing, unless another column is the right one."),
    Code.GENES_CONTRADICTORY: ("one column a gene", "Keep the right column, or combine them as fits your pipeline."),
    Code.GENES_EMPTY: ("values, but not every gene need be measured", "Nothing."),
    Code.GENES_CONSTANT: ("values that vary", "Leave cells empty where a gene was not measured; a zero says that it was."),
    Code.GENES_OFTEN_MISSING: ("values in most samples", "Nothing if that is known; data.max_missing_per_gene moves the limit."),
    Code.SAMPLES_EMPTY: ("values", "Remove these samples, or export their values."),
    Code.SAMPLES_OFTEN_MISSING: ("values of most genes", "Nothing if that is known; data.max_missing_per_patient moves the limit."),
    Code.EVENT_NOT_BINARY: ("1 where the event was observed, 0 where follow-up ended before", "Recode the column."),
    Code.TIME_NEGATIVE: ("", "Correct the export, or leave unknown times empty."),
    Code.TIME_IMPOSSIBLE: ("", "Correct data.time_unit or the export."),
    Code.TIME_ZERO: ("times above zero", "Nothing, unless zero stands for unknown or for less than a day."),
    Code.FOLLOW_UP_MISSING: ("both, where they are known", "Nothing, unless they are known."),
    Code.AGE_IMPOSSIBLE: ("years", "Correct the export; an age in days, or a year of birth, must be converted."),
    Code.SEX_UNKNOWN: ("female, male, f or m in any case, or empty", "Recode the column if it uses a code."),
    Code.TOO_FEW_PATIENTS: ("", "Add patients; a site below its minimum takes no part."),
    Code.FEW_EVENTS: ("", "Follow up longer; without any event a site contributes nothing to survival."),
    Code.TASK_WITHOUT_COLUMNS: ("", "Add them, or name them in data.columns; else remove the task."),
    Code.OPTED_OUT: ("the patients of data.opt_outs, who may be unknown here", "Nothing."),
    Code.NO_VOCABULARY_GENE: ("HGNC symbols as in the study, or Ensembl ids and an HGNC table", "Check the names of the genes, and which axis they are on."),
    Code.FEW_VOCABULARY_GENES: ("", "Trust the predictions little; they rest on few genes."),
    Code.SAMPLES_WITHOUT_GENES: ("one measured gene or more in every sample", "Nothing, or export their values."),
    Code.GENE_COLUMNS_DIFFER: ("one column a gene", "Keep the right one, or label them apart."),
    Code.FOREIGN_SCALE: ("", "Check the scale that is named; natural logarithms called log2p1 give 0.69. Do not use the predictions before."),
    Code.COVARIATES_MISSING: ("both, because the study uses them", "Add clinical columns age (years) and sex."),
}
# fmt: on
"""What is expected and what to do, unless a check adds them; {names} are of `Advice`."""


@dataclass(frozen=True)
class Findings:
    """What one check has found so far."""

    min_cell_count: int = 1
    """Counts of patients, samples and cells below it read "fewer than"."""
    advice: Advice = field(default_factory=Advice)
    found: list[Finding] = field(default_factory=list)

    def add(
        self,
        code: Code,
        where: str,
        found: str,
        *,
        expected: str | None = None,
        action: str | None = None,
    ) -> None:
        """Add a finding, see `Finding`; texts not given are those of `TEXTS`."""
        texts = [text.format_map(vars(self.advice)) for text in TEXTS.get(code, ())]
        finding = code.finding(
            where,
            found,
            texts[0] if expected is None else expected,
            texts[1] if action is None else action,
        )
        self.found.append(finding)

    def count(self, n: int, noun: str) -> str:
        """Return `n nouns`, or `fewer than ... nouns` below the minimum."""
        if n < self.min_cell_count:
            return f"fewer than {self.min_cell_count} {noun}s"
        return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

    def refuse_errors(self) -> None:
        """Raise `DataError` with all findings if any of them refuses the data."""
        if any(finding.severity == "error" for finding in self.found):
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raise `DataError` with all findings, also the milder ones.

        A cause is hidden, because it may quote a row of a file.
        """
        raise DataError(self.found) from None
