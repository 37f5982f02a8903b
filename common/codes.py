"""Every code that fedgex shows: its severity, its meaning, and what to do about it.

A code is stable: it stands in logs and in what a hospital answers. To add one, add its
line here, raise it, and run `python -m fedgex.common.pages docs`, which writes the
tables between `<!-- codes PREFIX... : COLUMN... -->` and `<!-- end of codes -->`.
"""
# ruff: noqa: E501 (one line a code)

from __future__ import annotations

from enum import StrEnum, unique

from fedgex.common.errors import Finding, Severity


@unique
class Code(StrEnum):
    """One line each: code, severity, meaning, and what the hospital does about it."""

    severity: Severity
    """For a refusal that is no finding in data: `error`."""
    meaning: str
    """Markdown."""
    action: str
    """Markdown; what the hospital does about it."""

    def __new__(
        cls, number: str, severity: Severity, meaning: str, action: str
    ) -> Code:
        """Make the member a string: the code."""
        self = str.__new__(cls, number)
        self._value_ = number
        self.severity, self.meaning, self.action = severity, meaning, action
        return self

    # fmt: off
    # files
    FILE_MISSING = "FX-DATA-001", "error", "A file that `site.toml` names is not there", "Correct the path; relative paths start at the folder of `site.toml`"
    FILE_UNREADABLE = "FX-DATA-002", "error", "A file is damaged, not UTF-8, or of another format", 'Export as CSV or TSV (also `.gz`) in UTF-8, Parquet, Feather, `.xlsx` or, for expression, `.h5ad`; the message names a format that was recognised'
    FILE_EMPTY = "FX-DATA-003", "error", "A file holds no row, no value column, or nothing", "Export it again"
    WRONG_DELIMITER = "FX-DATA-004", "error", "The header is divided by spaces, or no delimiter divides header and rows alike", "Commas in `.csv`, tabs in `.tsv`"
    RAGGED_ROWS = "FX-DATA-005", "error", "Rows have more or fewer cells than the header", "Name the column of labels (in R: `col.names = NA`); quote cells that hold the delimiter"
    DECIMAL_COMMA = "FX-DATA-006", "error", "Numbers have a decimal comma", "Export with decimal points"
    GENE_TABLE_UNUSABLE = "FX-DATA-007", "error", "The gene table cannot be read", "Download HGNC's complete set again, or remove `data.hgnc_table`"
    FORMAT_RECOGNISED = "FX-DATA-009", "note", "What was recognised in a file beyond the plain format of its ending: a GEO series matrix, semicolons, decimal commas, another encoding, a packing", "Nothing, unless it is wrong"
    HEADER_IS_VALUES = "FX-DATA-013", "error", "The first line is no header: a gene and numbers, as HTSeq and STAR write", "Name the folder of all samples' files as `data.expression`, or put the samples together under a header that names them"
    PROBES_MAPPED = "FX-DATA-014", "note", "Probes became genes by `data.platform_table`; of several probes of a gene the one with the greatest mean is used", "Nothing"
    PLATFORM_UNUSABLE = "FX-DATA-016", "error", "The platform table lacks a column of probes or of symbols, or lists few of the file's probes", "Name GEO's table of the series' own platform (GPL...)"
    SAMPLE_FILES_MISSING = "FX-DATA-017", "error", "Files that `data.sample_sheet` names are not in the folder", "Correct the sheet, or complete the folder"
    SAMPLE_FILES_DIFFER = "FX-DATA-018", "error", "Files of one sample each differ in format, or in the genes that they list", "Leave in the folder, or in the sample sheet, those of one format and one annotation"
    VALUE_COLUMN_UNFIT = "FX-DATA-019", "error", "Files of one sample each have no such value column, or none on the declared scale", "Set `data.value_column` and `data.scale` together; the message lists the columns with their scales"
    SAMPLE_FILES_OF_TRANSCRIPTS = "FX-DATA-052", "error", "Files of one sample each list transcripts", "Sum them up to genes (tximport; Salmon's `--geneMap`)"
    SAMPLE_SHEET_UNUSABLE = "FX-DATA-053", "error", "The sample sheet lacks a column of files or of samples, or leaves open which file is of which sample", "Name the columns `file` and `sample`; write paths"
    NO_SAMPLE_FILES = "FX-DATA-054", "error", "A folder, or a sample sheet, names no file of a known format", "Name the folder with the files that the tool wrote; the message lists the tools"
    LAYER_MISSING = "FX-DATA-086", "error", "The AnnData file lacks the layer that `data.layer` names", "Name one of those that the message lists"
    THOUSANDS_SEPARATORS = "FX-DATA-008", "error", "Numbers have thousands separators", "Export without them (1234, not 1,234)"

    # orientation
    ORIENTATION_RECOGNISED = "FX-DATA-010", "note", "Which axis holds the samples, and how that was recognised", "Set `data.orientation` if it is wrong"
    ORIENTATION_UNKNOWN = "FX-DATA-011", "error", "Samples cannot be distinguished from genes", "Check the labels on both sides, or set `data.orientation`"
    ORIENTATION_CONTRADICTED = "FX-DATA-012", "error", "The labels contradict the declared orientation", 'Correct `data.orientation`, or set it to `"auto"`'

    # patients and samples
    COLUMN_MISSING = "FX-DATA-020", "error", "The clinical table lacks a column that `site.toml` names, or one for the patient", "Set `data.columns` to the names in the header"
    COLUMN_REPEATED = "FX-DATA-021", "error", "A clinical column occurs more than once", "Rename or remove the others"
    ID_MISSING = "FX-DATA-022", "error", "A clinical row has no patient, or a sample no label", "Complete the identifiers, or remove the rows"
    SAMPLE_REPEATED = "FX-DATA-023", "error", "A label of a sample occurs more than once in the expression file", "Keep one, or label samples of one patient apart and name `data.columns.sample`"
    CLINICAL_ROW_REPEATED = "FX-DATA-024", "error", "A patient (or, if there is a sample column, a sample) has several clinical rows", "Keep one, or add a sample column"
    NOTHING_LINKED = "FX-DATA-025", "error", "No sample has a clinical row", "Name the column that holds the labels of the expression file"
    SAMPLE_WITHOUT_CLINICAL = "FX-DATA-026", "warning", "Samples have no clinical row and are left out", "Add rows for them; all but the identifier may be empty"
    CLINICAL_WITHOUT_SAMPLE = "FX-DATA-027", "note", "Clinical rows have no sample and are left out", "Nothing"
    SEVERAL_SAMPLES = "FX-DATA-028", "warning", "Patients have several samples, of which one is used: a tumour's before normal tissue, then the one with most genes, then the first", "Leave in the file the sample that should be used"
    NORMAL_TISSUE = "FX-DATA-082", "warning", "Labels are barcodes of normal tissue (TCGA sample types 10 to 19)", "Remove these samples unless the study is about normal tissue"
    ONE_PERSON = "FX-DATA-083", "warning", "Labels are of one person: barcodes with the same patient, or names that pandas numbered (`P001.1`)", "Add a clinical table that names the patient of each sample"
    ANNOTATION = "FX-DATA-084", "note", "Labels among the samples, or among the genes, are annotation (Entrez id, length, patient) or sums of reads (`N_unmapped`, `__no_feature`), and are left out", "Nothing"
    RESULT_OF_ONE_SAMPLE = "FX-DATA-085", "error", "All columns are those of one sample's quantification, or of a test's result", "Name the folder of all samples' files as `data.expression`, or put the samples together: one column each, TPM or the like"
    PATIENT_CONTRADICTORY = "FX-DATA-029", "warning", "Rows of one patient differ in time, event or sex", "Correct the rows"

    # expression
    NOT_A_NUMBER = "FX-DATA-030", "error", "Cells are no numbers (also in the clinical table)", "Correct them; leave cells empty, or NA, where nothing is known"
    INFINITE = "FX-DATA-031", "error", "Values are infinite (also in the clinical table)", "Add 1 before the logarithm, or leave cells empty"
    NEGATIVE_EXPRESSION = "FX-DATA-032", "error", "Values are below what the declared scale can hold", "Correct `data.scale`; the message lists the scales that fit"
    SCALE_IMPOSSIBLE = "FX-DATA-033", "error", "Numbers cannot be on the declared scale: fractions as counts, values beyond reason, logarithms as linear", "Correct `data.scale`; the message lists the scales that fit"
    SCALE_FAINT = "FX-DATA-034", "warning", "No gene of a large panel, or of any panel declared linear, is abundant", "Check `data.scale`: logarithms declared linear, or the wrong base"
    SCALE_NOT_CONVERTIBLE = "FX-DATA-035", "error", "The declared scale does not lead to the study's", "Export another scale, or add library sizes to counts"
    LIBRARY_SIZE_UNUSABLE = "FX-DATA-036", "error", "Library sizes are missing, not positive, or less than the counts add up to", "Correct them: they are all reads of the sample"
    COUNTS_PER_MILLION = "FX-DATA-037", "warning", "Counts were taken as counts per million, which is not TPM", "Export normalised values, or make sure that all sites use CPM"

    # genes
    NO_GENES = "FX-DATA-040", "error", "No gene is left", "Use HGNC symbols or Ensembl gene ids"
    GENES_UNMAPPED = "FX-DATA-041", "warning", "Labels name no known gene and are left out", "Name a (newer) `data.hgnc_table`; mend names that a spreadsheet made into dates"
    GENES_AS_DATES = "FX-DATA-015", "warning", "Labels of genes are dates: a spreadsheet changed SEPT2 or MARCH1; they are left out, and the likely genes named", "Write the symbols again; the current ones, SEPTIN2 and MARCHF1, survive spreadsheets"
    GENES_AMBIGUOUS = "FX-DATA-042", "warning", "Names that several genes had are left out", "Use current symbols or Ensembl ids for them"
    GENES_UPDATED = "FX-DATA-043", "note", "Retired symbols and aliases were renamed", "Nothing"
    GENES_REPEATED = "FX-DATA-044", "warning", "A gene has several columns, of which one is kept: the one under the current symbol, or one of equal ones", "Nothing, unless another column is the right one"
    GENES_CONTRADICTORY = "FX-DATA-045", "warning", "A gene has several columns that differ; it is left out", "Keep the right one, or combine them as fits your pipeline"
    GENES_EMPTY = "FX-DATA-046", "note", "Genes without a single value are left out", "Nothing"
    GENES_CONSTANT = "FX-DATA-047", "warning", "Genes have the same value in every sample", "Leave cells empty where a gene was not measured"
    GENES_OFTEN_MISSING = "FX-DATA-048", "warning", "Genes are missing in more samples than `max_missing_per_gene`", "Nothing if that is known"
    LABELS_NOT_GENES = "FX-DATA-049", "error", "Fewer than half of the labels on the gene axis name a known human gene; they could be patients", "Correct `data.orientation`, or name genes by HGNC symbols or Ensembl gene ids; `data.unknown_genes = \"keep\"` takes other names, and lets them leave"
    SAMPLES_EMPTY = "FX-DATA-050", "warning", "Samples without a single value are left out", "Remove them, or export their values"
    SAMPLES_OFTEN_MISSING = "FX-DATA-051", "warning", "Samples lack more genes than `max_missing_per_patient`", "Nothing if that is known"

    # follow-up and covariates
    EVENT_NOT_BINARY = "FX-DATA-060", "error", "An event is neither 0 nor 1", "Recode: 1 observed, 0 follow-up ended before"
    TIME_NEGATIVE = "FX-DATA-061", "error", "A time is negative", "Correct the export; leave unknown times empty"
    TIME_IMPOSSIBLE = "FX-DATA-062", "error", "A time is longer than 120 years", "Correct `data.time_unit`"
    TIME_ZERO = "FX-DATA-063", "note", "Times are zero; these samples are left out of survival", "Nothing, unless zero stands for unknown"
    FOLLOW_UP_MISSING = "FX-DATA-064", "note", "Time or event is missing; these samples are left out of survival", "Nothing"
    EVENTS_IN_WORDS = "FX-DATA-067", "note", "Events are in words (`1:DECEASED`, `Alive`, `TRUE`) and were recognised", "Nothing, if they are deaths"
    EVENT_NAME_DOUBTFUL = "FX-DATA-077", "warning", "The column of events is named after censoring, so that 1 may mean that follow-up ended", "Check the coding: 1 observed, 0 follow-up ended before"
    COVARIATES_UNKNOWN = "FX-DATA-078", "note", "Age or sex is not known of as many patients as `minimum_cohort` or more; a study that uses them takes 60 years and female", "Name the columns in `data.columns`, if the table has them"
    DATES_UNREADABLE = "FX-DATA-079", "error", "A date is none of the form 2019-03-31, or lies before the diagnosis", "Export dates as year-month-day"
    NOBODY_CENSORED = "FX-DATA-068", "warning", "Every patient with follow-up has the event", "Check the coding: 1 observed, 0 follow-up ended before; R's `Surv` has 2 and 1"
    TIME_UNIT_DOUBTFUL = "FX-DATA-069", "warning", "The column's name, or the follow-up as such, speaks for another unit of time", "Check `data.time_unit`"
    TIMES_ARE_DATES = "FX-DATA-080", "error", "No follow-up is below 40 years: the numbers are dates", "Export the days from diagnosis to death or last contact"
    AGES_CAPPED = "FX-DATA-081", "note", "Ages such as `90+` or `>89` are taken as 90", "Nothing"
    AGE_IMPOSSIBLE = "FX-DATA-065", "error", "An age is outside 0 to 120", "Give years, neither days nor a year of birth"
    SEX_UNKNOWN = "FX-DATA-066", "warning", "A sex is not recognised and taken as unknown", "Write female, male, f or m, or leave it empty"

    # the cohort
    TOO_FEW_PATIENTS = "FX-DATA-070", "error", "Fewer patients than `minimum_cohort`", "Add patients; a smaller site does not participate"
    FEW_EVENTS = "FX-DATA-071", "warning", "Fewer patients with an event than `minimum_cohort`; few and none look the same", "Follow up longer; without any event a site contributes nothing to survival"
    TASK_WITHOUT_COLUMNS = "FX-DATA-072", "warning", "A task lacks its clinical columns; the site contributes nothing to it", "Add or name the columns, or remove the task"
    OPTED_OUT = "FX-DATA-073", "note", 'Patients of `data.opt_outs` are left out; how many, or "suppressed" below `minimum_cohort`', "Nothing"
    PANEL_CHANGED = "FX-DATA-074", "error", "Other genes, or another scale, than when the run began", "Put the file back; a new export is for the next run"
    ID_AMBIGUOUS = "FX-DATA-075", "error", "Identifiers of patients or samples that differ only in case, quotes, spaces, leading zeros, decimals or invisible characters: one key, so one patient or several cannot be decided", "Write one spelling for one patient; let letters or digits of several differ"
    OPT_OUTS_UNKNOWN = "FX-DATA-076", "warning", 'Lines of `data.opt_outs` match nobody; how many. An error with `data.unknown_opt_outs = "refuse"`', "Compare the list with the files; remove the lines of people who are not in them"

    # what a site answers instead of an update
    FAILED = "FX-SITE-001", "error", "Something unforeseen failed at the site", "Read the service's log of that time; report it if the fault is in fedgex"
    STUDY_REFUSED = "FX-SITE-002", "error", "The site refuses the study: another version, a changed document, or something that `policy.toml` does not permit (a task, cross-products, no privacy, weights by withheld numbers)", "The log says which; install the same version, or permit it"
    TOO_FEW_FOR_PHASE = "FX-SITE-003", "error", "Fewer patients than the minimum are eligible for this phase; with the Cox loss, fewer deaths", "Compare the spelling of the cancer types with the study's; else nothing, the site does not participate in the phase"
    PAUSED = "FX-SITE-004", "error", "The operator paused the site", "`fedgex-site resume` when it suits; the run waits"
    OUTSIDE_HOURS = "FX-SITE-005", "error", "It is outside the `hours` of `policy.toml`", "Nothing; the run waits"
    OUT_OF_MEMORY = "FX-SITE-006", "error", "Memory was exhausted: the machine's, the GPU's, or what `memory_mb` permits", "Raise `memory_mb` in `policy.toml`, or give the site more memory"
    TIME_LIMIT = "FX-SITE-007", "error", "An answer took longer than `message_limit_s`", "Raise it in `policy.toml`, or give the site a faster machine"
    DEVICE_LOST = "FX-SITE-008", "error", "The GPU failed while it computed", "See to the GPU and its driver, then restart the service"
    DISK_FULL = "FX-SITE-009", "error", "The site's disk is full, over its quota, or read-only", "Free space, or mount it for writing; the run waits"
    FOREIGN_TO_STUDY = "FX-SITE-010", "error", "The means of the site's genes are not on the scale of the study's", "Correct `data.scale`, or the export; natural logarithms called `log2p1` are .69 of what they should be"
    NOT_APPROVED = "FX-STUDY-001", "error", "No person at the site has approved the contract", "Read it, approve or reject it; the run waits"
    REJECTED = "FX-STUDY-002", "error", "The contract was rejected", "Nothing, or approve it"
    WITHDRAWN = "FX-STUDY-003", "error", "The approval was withdrawn", "Nothing: it is final for this contract; participating again needs a new one"
    EXPIRED = "FX-STUDY-004", "error", "Contract or approval has expired", "Approve again, or ask for a new contract; check the clock"
    UNTRUSTED = "FX-STUDY-005", "error", "Signatures or text of contract or receipt are not trusted, or the contract was changed on the site's disk", "`study show` says which; do not approve; inform the administrator"
    OUTSIDE_CONTRACT = "FX-STUDY-006", "error", "A message is not what the contract says", "Inform the administrator: the coordinator runs something else"
    OUTSIDE_VERSIONS = "FX-STUDY-007", "error", "The installed fedgex is not the contract's", "Install the release that the contract names"
    AGAINST_POLICY = "FX-STUDY-008", "error", "`policy.toml` refuses what the contract asks for", "`study show` names it; change the policy, or ask for another contract"
    STANDARDISATION_CHANGED = "FX-STUDY-009", "error", "Another standardisation than the first of this run", "Inform the administrator; nothing was computed with it"
    RUNS_USED = "FX-STUDY-011", "error", "More runs of the contract than a person at the site approved", "Nothing, or approve it again with a larger `--runs`; the run waits"
    NOT_PINNED = "FX-STUDY-010", "error", "Secure aggregation under a contract that pins no keys, or a key (of a hospital or an administrator) that neither contract nor `join` pins", "Ask for a new contract; for administrators who changed, a new kit: `join --administrators-changed`. If nobody changed a key, inform the administrators"
    DELTA_TOO_LARGE = "FX-PRIV-001", "error", "The study's delta, or the hospital's `privacy_delta`, is not below 1 / patients", "Ask for a study with a smaller delta; set a smaller `privacy_delta`"
    BUDGET_EXCEEDED = "FX-PRIV-002", "error", "The round would exceed the hospital's privacy budget; nothing was computed", "Nothing: the budget is spent. `fedgex-site ledger show` lists on what; [privacy.md](privacy.md#the-budget)"
    LEDGER_UNUSABLE = "FX-PRIV-003", "error", "The privacy ledger is missing, unreadable, changed, or restored from a backup", "Put the newest ledger back, see [hospital-operation.md](hospital-operation.md#7-the-privacy-ledger)"
    PLAN_EXCEEDED = "FX-PRIV-004", "error", "A contract asks for a round again, under other bytes, more often than twice in all its runs; nothing was computed or charged", "Inform the administrator: budget would be spent on what the contract does not plan; [privacy.md](privacy.md#the-budget)"
    UNKNOWN_RUN = "FX-RUN-001", "error", "A message names no run, or one that cannot be", "Inform the administrator"
    ANSWERED_ALREADY = "FX-RUN-002", "error", "A round was answered already, for another request", "Inform the administrator; nothing was computed twice"
    LOG_RESTORED = "FX-RUN-003", "error", "The site's audit log lacks a line that the server holds its signature over", "Put the newest log back, see [hospital-operation.md](hospital-operation.md#8-keys-backup-leaving)"
    RELEASE_UNVERIFIED = "FX-RUN-004", "error", "A released model could not be verified, or is another run's; it was not kept", "Inform the administrator; use none that came another way"
    EXCHANGE_REFUSED = "FX-RUN-005", "error", "Secure aggregation: changed or unsigned keys, a second or too short list, or a round that is over", "Inform the administrator: the log says what, and no share has left; [privacy.md](privacy.md#secure-aggregation)"
    SUMS_TOO_CLOSE = "FX-RUN-006", "error", "Sums over patients would differ by fewer than the minimum from some that left before; or the record of those is damaged", "Nothing: the site trains without them; the log says which. [privacy.md](privacy.md#sums-over-patients)"
    ANOTHER_MODEL = "FX-RUN-007", "error", "A model is not the one that the run's receipts name: hospitals were sent different ones", "Keep receipts and log; compare them with another hospital's: `fedgex-site log compare`"

    # predictions
    NO_VOCABULARY_GENE = "FX-PREDICT-001", "error", "No gene of the vocabulary is measured", "Check the names of the genes and their axis; Ensembl ids need `--hgnc-table`"
    FEW_VOCABULARY_GENES = "FX-PREDICT-002", "warning", "Fewer than 10 % of the vocabulary's genes are measured", "Trust the predictions little"
    SAMPLES_WITHOUT_GENES = "FX-PREDICT-003", "warning", "Samples without any gene of the vocabulary; nothing is predicted for them", "Nothing, or export their values"
    GENE_COLUMNS_DIFFER = "FX-PREDICT-004", "error", "Columns repeat a label and differ", "Keep the right one, or label them apart"
    GENES_NOT_LEARNT = "FX-PREDICT-006", "warning", "Genes of which no hospital had a value when the model was trained; they are not restored, and measured values of them are not used", "Nothing"
    FOREIGN_SCALE = "FX-PREDICT-005", "warning", "With 100 genes or more, their means are less than .83 or more than 1.20 times those that the model was trained on", "Check the scale that is named; natural logarithms called `log2p1` give .69"
    UNLIKE_TRAINING = "FX-PREDICT-008", "warning", "Samples further from the patients of the training than 99 % of the hold-out: another tissue, cancer, platform or scale, or no sample", "Use no prediction for them; [what unlike means](predict.md#samples-unlike-the-training)"
    LIKENESS_UNKNOWN = "FX-PREDICT-009", "warning", "The model has no threshold of unlikeness: made by an earlier fedgex, without hold-out, or without factor model", "Make sure by yourself that the samples are of the model's cancers"
    CANCER_TYPES_MISSING = "FX-PREDICT-010", "error", "No sample has a cancer type of the study", "Add `cancer_type` in the study's spelling, or give `--cancer-type`"
    SOME_CANCER_TYPES_MISSING = "FX-PREDICT-011", "warning", "Some samples have none; no risk is predicted for them", "The same"
    COVARIATES_MISSING = "FX-PREDICT-012", "warning", "The study uses age and sex, and samples lack one; taken as 60 years and female", "Add the columns"
    # fmt: on

    def finding(self, where: str, found: str, expected: str, action: str) -> Finding:
        """Return a finding with this code."""
        return Finding(
            code=self,
            severity=self.severity,
            where=where,
            found=found,
            expected=expected,
            action=action,
        )


TEMPORARY = frozenset(
    {
        Code.PAUSED,
        Code.OUTSIDE_HOURS,
        Code.DISK_FULL,
        Code.NOT_APPROVED,
        Code.RUNS_USED,
    }
)
"""Refusals that pass without a new message: the server asks the site again."""
