"""Findings of a check: their texts, and counts that do not reveal a few patients."""
# ruff: noqa: E501 (one line a code)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from fedgex.common.codes import Code
from fedgex.common.errors import DataError, Finding, Severity


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
TEXTS: Mapping[Code, tuple[str, str, str]] = {
    Code.FILE_MISSING: ("no such file", "a file", "{missing_file}"),
    Code.FILE_UNREADABLE: ("damaged text, or text that is not UTF-8", "text as .csv or .tsv in UTF-8, packed or not; .parquet, .feather or .xlsx; or, for expression, .h5ad", "Export the file again in one of these formats."),
    Code.FILE_EMPTY: ("nothing to read", "a header and one or more rows", "Export the file again."),
    Code.WRONG_DELIMITER: ("a header divided by {name}", "{delimiter} in a file of this ending", "Export with that delimiter and decimal points, or use the ending .tsv for tabs and .csv for commas."),
    Code.RAGGED_ROWS: ("rows with more or fewer cells than the header", "{n_columns} cells in every row, as in the header", "Give the column of labels a name (in R: col.names = NA), and quote cells that hold the delimiter."),
    Code.DECIMAL_COMMA: ("numbers with a decimal comma", "decimal points", "Export with decimal points (1.5, not 1,5)."),
    Code.THOUSANDS_SEPARATORS: ("numbers with thousands separators", "digits and a decimal point", "Export without separators (1234, not 1,234)."),
    Code.FORMAT_RECOGNISED: ("recognised: {kinds}", "any format that is read", "Nothing, unless this is wrong."),
    Code.HEADER_IS_VALUES: ("a first line that is a gene and numbers, no header", "a header with a label for each sample", "Name the folder of all samples' files as data.expression; or put the samples together, one column each, under a header that does not begin with #."),
    Code.PROBES_MAPPED: ("{probes} probes, of {genes} genes by the platform's table; {several} genes have several, of which the one with the greatest mean is used", "probes of one gene each", "Nothing; probes of no gene, or of several, are left out."),
    Code.PLATFORM_UNUSABLE: ("no column of probes (ID), or none of symbols", "GEO's table of a platform, with columns such as ID and Gene Symbol", "Download the platform's annotation (GPL..., .annot.gz or full table), and name it as data.platform_table."),
    Code.SAMPLE_FILES_MISSING: ("files that are not in the folder (first that of line {line})", "each file of the sheet in data.expression, or in a folder of it", "Correct the sheet, or complete the folder."),
    Code.SAMPLE_FILES_DIFFER: ("files of several {how}", "one format, and one list of genes", "Leave in the folder, or in a sample sheet, the files of one tool with one annotation. Files count in the order of the sheet, else of their paths."),
    Code.VALUE_COLUMN_UNFIT: ("{column} the {scale} scale in files of {name}", "{listed}", "Set data.value_column and data.scale together."),
    Code.SAMPLE_FILES_OF_TRANSCRIPTS: ("transcripts, in files of {name}", "genes", "Sum transcripts up to genes: tximport in R, --geneMap of Salmon (quant.genes.sf), or RSEM's .genes.results."),
    Code.SAMPLE_SHEET_UNUSABLE: ("no column of files, or none of samples", "columns such as file and sample, or File Name and Sample ID, filled in each row, each fitting one file", "Correct the sheet; write paths from the folder where names repeat."),
    Code.NO_SAMPLE_FILES: ("no file of a known format", "files of {names}", "Name the folder with the files that the tool wrote, as it wrote them."),
    Code.LAYER_MISSING: ('no layer "{layer}"', "one of the layers in the file: {layers}", "Correct data.layer."),
    Code.GENE_TABLE_UNUSABLE: ("not a readable gene table", "HGNC's complete set, tab-separated, with its header", "Download it again, or remove {hgnc_table}."),

    Code.ORIENTATION_RECOGNISED: ("{axis} are samples and {other} are genes, {reason}", "either orientation", "Set {orientation} if this is wrong."),
    Code.ORIENTATION_UNKNOWN: ("neither rows nor columns are recognised as samples or genes", "labels that occur in the clinical table, or names of genes", "Check the labels on both sides, or set {orientation}."),
    Code.ORIENTATION_CONTRADICTED: ("{other} look like samples {reason}", "samples as {axis}, as declared", 'Correct {orientation} (or set it to "auto"), or transpose the data.'),

    Code.COLUMN_MISSING: ('no column "{name}"; the file has {columns}', "the columns that site.toml names, and one for the patient", "{missing}"),
    Code.COLUMN_REPEATED: ('column "{name}" occurs {occurrences} times', "each name once", "Rename or remove the others."),
    Code.ID_MISSING: ("{n:row} without an identifier", "one in every row", "Complete the column, or remove the rows."),
    Code.SAMPLE_REPEATED: ("{n:sample} repeat a label", "each sample once", "Keep one of each; for several samples of a patient, label them apart and name a {sample_column}."),
    Code.CLINICAL_ROW_REPEATED: ("{n:row} repeat an identifier", "one row a {key}", "Keep one row each; for several samples of a patient, add a column with the label of the sample and name it as {sample_column}."),
    Code.NOTHING_LINKED: ("no sample has a clinical row", "labels of samples in {column}", "Name the column with these labels as {sample_column} or, if they are the patients' own, as data.columns.patient."),
    Code.SAMPLE_WITHOUT_CLINICAL: ("{n:sample} without a clinical row, left out", "a clinical row for every sample", "Add the rows (all but the identifier may be empty), if they belong."),
    Code.CLINICAL_WITHOUT_SAMPLE: ("{n:clinical row} without a sample, left out", "rows without a sample are fine", "Nothing, unless their samples should be there."),
    Code.SEVERAL_SAMPLES: ("{n:patient} with several samples; of each one is used, and {unused:sample} not: a tumour before normal tissue, then most genes, then the first", "one sample a patient, or the right one first", "Leave in the file the sample that should be used."),
    Code.NORMAL_TISSUE: ("{n:sample} whose barcode says normal tissue (sample type 10 to 19)", "tumours", "Remove these samples, unless the study is about normal tissue."),
    Code.ONE_PERSON: ("{n:label} of a person who has another one ({how})", "one label a person, or a clinical table that names the patient of each sample", "Add a clinical table with columns patient and sample; else each counts as one patient."),
    Code.ANNOTATION: ("labels that are no {axis}, left out: {names}", "{axis} only", "Nothing."),
    Code.RESULT_OF_ONE_SAMPLE: ("only columns of one sample's quantification, or of a test's result: {names}", "one column, or one row, a sample", "Name the folder of all samples' files as data.expression; or put the samples into one file, with one measure each (TPM or the like)."),
    Code.PATIENT_CONTRADICTORY: ("{n:patient} whose rows differ in {columns}", "the same follow-up and sex in all rows of a patient", "Correct the rows."),
    Code.ID_AMBIGUOUS: ("{n:identifier} that are the same as another but for case, quotes, spaces, leading zeros, decimals or invisible characters", "one spelling for each patient and each sample", "If they are one, write them alike; if they are several, let their letters or digits differ."),

    Code.NOT_A_NUMBER: ("{n:cell} that are no numbers", "numbers, or empty cells or NA where nothing is known", "Correct the cells."),
    Code.INFINITE: ("{n:infinite value}", "finite numbers", "Correct the cells, or leave them empty."),
    Code.NEGATIVE_EXPRESSION: ("{n:value} below {floor:g} in {genes}", "{floor:g} or more on the {declared} scale", "Correct {scale} or the export; the numbers could be: {fitting}."),
    Code.SCALE_IMPOSSIBLE: ("{reason}", "values on the {declared} scale, as declared", "Correct {scale} or the export; the numbers could be: {fitting}."),
    Code.SCALE_FAINT: ("no gene of {n_genes} is abundant on the {declared} scale", "some abundant genes in most panels", "Check {scale}: logarithms declared linear, or the wrong base."),
    Code.SCALE_NOT_CONVERTIBLE: ("expression on the {declared} scale", "the study's scale, {target}, or one that leads there", "Export the expression as {target}."),
    Code.LIBRARY_SIZE_UNUSABLE: ("{n:sample} whose library size is missing, not above zero, or less than its counts add up to", "all reads of the sample", "Correct the library sizes in the clinical table."),
    Code.COUNTS_PER_MILLION: ("counts, taken as counts per million of the library size", "TPM, FPKM or RSEM normalised, which account for gene length or the like", "Export normalised values if other sites do; else make sure that all use CPM."),

    Code.NO_GENES: ("no gene is left", "HGNC symbols or Ensembl gene ids", "Check the labels of the genes."),
    Code.GENES_UNMAPPED: ("{genes} that have no known symbol, left out", "HGNC symbols or Ensembl gene ids", "Name a newer {hgnc_table}, or correct the names (spreadsheets turn SEPT2 into a date)."),
    Code.LABELS_NOT_GENES: ("{known} of {total} labels of genes that name a known human gene; the others look like {kind}", "HGNC symbols or Ensembl gene ids for half of them or more", "Correct the orientation if the labels are patients; else rename the genes. data.unknown_genes = \"keep\" takes other names, and lets them leave."),
    Code.GENES_AS_DATES: ("{count} labels of genes that a spreadsheet made into dates, left out; likely genes: {likely}", "symbols", "Write the symbols again where the table is made, and import them as text."),
    Code.GENES_AMBIGUOUS: ("{genes} that several genes were called, left out", "names of one gene each", "Use current symbols or Ensembl gene ids for these."),
    Code.GENES_UPDATED: ("{genes} renamed to current symbols", "retired symbols are fine", "Nothing."),
    Code.GENES_REPEATED: ("{genes} with several columns, of which one is kept: the one under the current symbol, or one of equal ones", "one column a gene", "Nothing, unless another column is the right one."),
    Code.GENES_CONTRADICTORY: ("{genes} with several columns that differ, left out", "one column a gene", "Keep the right column, or combine them as fits your pipeline."),
    Code.GENES_EMPTY: ("{genes} without a single value, left out", "values, but not every gene need be measured", "Nothing."),
    Code.GENES_CONSTANT: ("{genes} with the same value in every sample", "values that vary", "Leave cells empty where a gene was not measured; a zero says that it was."),
    Code.GENES_OFTEN_MISSING: ("{genes} missing in more than {share:.0%} of the samples", "values in most samples", "Nothing if that is known; data.max_missing_per_gene moves the limit."),
    Code.SAMPLES_EMPTY: ("{n:sample} without a single value, left out", "values", "Remove these samples, or export their values."),
    Code.SAMPLES_OFTEN_MISSING: ("{n:sample} without more than {share:.0%} of the genes", "values of most genes", "Nothing if that is known; data.max_missing_per_patient moves the limit."),

    Code.EVENT_NOT_BINARY: ("{n:value} other than 0 and 1", "1 where the event was observed, 0 where follow-up ended before", "Recode the column."),
    Code.TIME_NEGATIVE: ("{n:negative time}", "{unit} ≥ 0", "Correct the export, or leave unknown times empty."),
    Code.TIME_IMPOSSIBLE: ("{n:time} above {longest} years", "time in {unit}, as declared", "Correct data.time_unit or the export."),
    Code.TIME_ZERO: ("{n:sample} with time zero, left out of survival", "times above zero", "Nothing, unless zero stands for unknown or for less than a day."),
    Code.FOLLOW_UP_MISSING: ("{n:sample} without time or event, left out of survival", "both, where they are known", "Nothing, unless they are known."),
    Code.EVENTS_IN_WORDS: ("events in words, taken as 1 observed, 0 ended before", "0 and 1", "Nothing, if they are deaths."),
    Code.EVENT_NAME_DOUBTFUL: ("a name after censoring, and values in which 1 counts as the event", "1 where the event was observed, 0 where follow-up ended before", "Recode the column if its 1 means censored."),
    Code.COVARIATES_UNKNOWN: ("{n:patient} without {name}, taken as {taken} where a study uses it", "a clinical column {name}", "Name it in data.columns.{name}, if the table has it."),
    Code.DATES_UNREADABLE: ("{n:date} that cannot be read, or before the diagnosis", "dates such as 2019-03-31, not before the diagnosis", "Export dates as year-month-day; others can be read in two ways."),
    Code.NOBODY_CENSORED: ("the event in every patient with follow-up", "some whose follow-up ended before", "Check the coding: 1 observed, 0 ended before. R codes them 2 and 1."),
    Code.TIME_UNIT_DOUBTFUL: ("{reason}", "time in {unit}, as declared", "Check data.time_unit."),
    Code.TIMES_ARE_DATES: ("no follow-up below {years} years: dates, as spreadsheets number them, or calendar years", "time in {unit} from diagnosis to death or last contact", "Export the difference of the two dates."),
    Code.AGES_CAPPED: ("{n:age} such as 90+, taken as 90", "years", "Nothing."),
    Code.AGE_IMPOSSIBLE: ("{n:age} outside 0 to {longest}", "years", "Correct the export; an age in days, or a year of birth, must be converted."),
    Code.SEX_UNKNOWN: ("{n:value} that are not recognised, taken as unknown", "female, male, f or m in any case, or empty", "Recode the column if it uses a code."),

    Code.TOO_FEW_PATIENTS: ("{n:patient}", "{least} or more (minimum_cohort)", "Add patients; a site below its minimum takes no part."),
    Code.FEW_EVENTS: ("{n:patient} with an observed event", "{least} or more for survival", "Follow up longer; without any event a site contributes nothing to survival."),
    Code.TASK_WITHOUT_COLUMNS: ("no {lacking} for {task}, to which nothing is contributed", "clinical columns {needed}", "Add them, or name them in data.columns; else remove the task."),
    Code.OPTED_OUT: ("patients who opted out are left out: {count}", "the patients of data.opt_outs, who may be unknown here", "Nothing."),
    Code.OPT_OUTS_UNKNOWN: ("{count} identifiers of the opt-out list match nobody", "identifiers of the patient column, or of the samples without a clinical table", "Compare the list with the files; remove lines of people who are not in them. data.unknown_opt_outs says whether the data are refused."),

    Code.NO_VOCABULARY_GENE: ("none of the vocabulary's {n_vocabulary} genes is measured", "HGNC symbols as in the study, or Ensembl ids and an HGNC table", "Check the names of the genes, and which axis they are on."),
    Code.FEW_VOCABULARY_GENES: ("{n_genes} of the vocabulary's {n_vocabulary} genes are measured", "{share:.0%} or more", "Trust the predictions little; they rest on few genes."),
    Code.SAMPLES_WITHOUT_GENES: ("{count} of {total} without any gene of the vocabulary, for which nothing is predicted", "one measured gene or more in every sample", "Nothing, or export their values."),
    Code.GENES_NOT_LEARNT: ("{n_unknown} of the study's genes ({genes}), of which no hospital had a value", "genes that some hospital measures", "Nothing; they stay empty where they are not measured, and are not used where they are."),
    Code.GENE_COLUMNS_DIFFER: ("{count} columns repeat the label of another and differ from it", "one column a gene", "Keep the right one, or label them apart."),
    Code.FOREIGN_SCALE: ("the means of the genes are {ratio:.2f} times those that the model was trained on", "about 1, whatever the cancer, on the {study} scale", "Check the scale that is named; natural logarithms called log2p1 give 0.69. Do not use the predictions before."),
    Code.UNLIKE_TRAINING: ("{count} of {total} samples unlike the patients that the model was trained on", "tumours of the model's cancers, measured like them", "Use no prediction for them; check tissue, platform and scale."),
    Code.LIKENESS_UNKNOWN: ("unknown how like the training {total} samples are", "a model with a threshold of unlikeness, from its hold-out", "Make sure that they are tumours of the model's cancers: a prediction is made for any."),
    Code.CANCER_TYPES_MISSING: ("{count} of {total} samples without a cancer type of the study, for which no risk is predicted", "one of {types}", "Add a clinical column cancer_type, spelt like this, or name the type of all samples with --cancer-type."),
    Code.SOME_CANCER_TYPES_MISSING: ("{count} of {total} samples without a cancer type of the study, for which no risk is predicted", "one of {types}", "Add a clinical column cancer_type, spelt like this, or name the type of all samples with --cancer-type."),
    Code.COVARIATES_MISSING: ("{count} of {total} samples without age or sex, taken as 60 years and female", "both, because the study uses them", "Add clinical columns age (years) and sex."),
}
# fmt: on
"""What was found and expected, and what to do. {n:sample} is a count of samples; the
other fields are those of `Advice`, and what a check passes to `Findings.add`."""


@dataclass(frozen=True)
class _Count:
    n: int
    least: int

    def __format__(self, noun: str) -> str:
        if self.n < self.least:
            return f"fewer than {self.least} {noun}s"
        return f"{self.n} {noun}" if self.n == 1 else f"{self.n} {noun}s"


@dataclass(frozen=True)
class Findings:
    """Collects the findings of one check."""

    min_cell_count: int = 1
    """Counts of patients, samples and cells below it read "fewer than"."""
    advice: Advice = field(default_factory=Advice)
    found: list[Finding] = field(default_factory=list)

    def add(
        self,
        code: Code,
        where: str,
        *,
        n: int = 0,
        found: str | None = None,
        expected: str | None = None,
        action: str | None = None,
        severity: Severity | None = None,
        **fields: object,
    ) -> None:
        """Add a finding, see `Finding`.

        Parameters
        ----------
        n
            Count of patients, samples or cells.
        found, expected, action
            Templates in place of those of `TEXTS`.
        severity
            In place of the code's own.
        fields
            Further fields of the templates.
        """
        fields |= vars(self.advice) | {"n": self.count(n)}
        own = (found, expected, action)
        texts = [
            (theirs if ours is None else ours).format_map(fields)
            for ours, theirs in zip(own, TEXTS[code], strict=True)
        ]
        finding = code.finding(where, *texts)
        self.found.append(replace(finding, severity=severity or finding.severity))

    def count(self, n: int) -> _Count:
        """Return a count for a template: "fewer than" below the minimum."""
        return _Count(n, self.min_cell_count)

    def add_if(self, n: int, code: Code, where: str, **fields: Any) -> None:
        """Add a finding about a count, see `add`, unless the count is zero."""
        if n:
            self.add(code, where, n=n, **fields)

    def refuse_errors(self) -> None:
        """Raise `DataError` with all findings if any of them refuses the data."""
        if self.has_errors:
            self.refuse()

    @property
    def has_errors(self) -> bool:
        """Whether a finding so far refuses the data."""
        return any(finding.severity == "error" for finding in self.found)

    def refuse(self) -> NoReturn:
        """Raise `DataError` with all findings, also the milder ones.

        A cause is hidden, because it may quote a row of a file.
        """
        raise DataError(self.found) from None


def refuse(code: Code, path: Path, **fields: Any) -> NoReturn:
    """Refuse a file by one finding; see `Findings.add`."""
    findings = Findings()
    findings.add(code, path.name, **fields)
    findings.refuse()
