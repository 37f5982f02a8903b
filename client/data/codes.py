"""Codes and severities of everything that a check of hospital data can find."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from fedgex.common.errors import Finding

Severity = Literal["error", "warning", "note"]


class Code(Enum):
    """Findings of data checks (docs/findings.md) and predictions (docs/predict.md)."""

    FILE_MISSING = "FX-DATA-001", "error"
    FILE_UNREADABLE = "FX-DATA-002", "error"
    FILE_EMPTY = "FX-DATA-003", "error"
    WRONG_DELIMITER = "FX-DATA-004", "error"
    RAGGED_ROWS = "FX-DATA-005", "error"
    DECIMAL_COMMA = "FX-DATA-006", "error"
    GENE_TABLE_UNUSABLE = "FX-DATA-007", "error"

    ORIENTATION_RECOGNISED = "FX-DATA-010", "note"
    ORIENTATION_UNKNOWN = "FX-DATA-011", "error"
    ORIENTATION_CONTRADICTED = "FX-DATA-012", "error"

    COLUMN_MISSING = "FX-DATA-020", "error"
    COLUMN_REPEATED = "FX-DATA-021", "error"
    ID_MISSING = "FX-DATA-022", "error"
    SAMPLE_REPEATED = "FX-DATA-023", "error"
    CLINICAL_ROW_REPEATED = "FX-DATA-024", "error"
    NOTHING_LINKED = "FX-DATA-025", "error"
    SAMPLE_WITHOUT_CLINICAL = "FX-DATA-026", "warning"
    CLINICAL_WITHOUT_SAMPLE = "FX-DATA-027", "note"
    SEVERAL_SAMPLES = "FX-DATA-028", "note"
    PATIENT_CONTRADICTORY = "FX-DATA-029", "warning"

    NOT_A_NUMBER = "FX-DATA-030", "error"
    INFINITE = "FX-DATA-031", "error"
    NEGATIVE_EXPRESSION = "FX-DATA-032", "error"
    SCALE_IMPOSSIBLE = "FX-DATA-033", "error"
    SCALE_FAINT = "FX-DATA-034", "warning"
    SCALE_NOT_CONVERTIBLE = "FX-DATA-035", "error"
    LIBRARY_SIZE_UNUSABLE = "FX-DATA-036", "error"
    COUNTS_PER_MILLION = "FX-DATA-037", "warning"

    NO_GENES = "FX-DATA-040", "error"
    GENES_UNMAPPED = "FX-DATA-041", "warning"
    GENES_AMBIGUOUS = "FX-DATA-042", "warning"
    GENES_UPDATED = "FX-DATA-043", "note"
    GENES_REPEATED = "FX-DATA-044", "warning"
    GENES_CONTRADICTORY = "FX-DATA-045", "warning"
    GENES_EMPTY = "FX-DATA-046", "note"
    GENES_CONSTANT = "FX-DATA-047", "warning"
    GENES_OFTEN_MISSING = "FX-DATA-048", "warning"
    SAMPLES_EMPTY = "FX-DATA-050", "warning"
    SAMPLES_OFTEN_MISSING = "FX-DATA-051", "warning"

    EVENT_NOT_BINARY = "FX-DATA-060", "error"
    TIME_NEGATIVE = "FX-DATA-061", "error"
    TIME_IMPOSSIBLE = "FX-DATA-062", "error"
    TIME_ZERO = "FX-DATA-063", "note"
    FOLLOW_UP_MISSING = "FX-DATA-064", "note"
    AGE_IMPOSSIBLE = "FX-DATA-065", "error"
    SEX_UNKNOWN = "FX-DATA-066", "warning"

    TOO_FEW_PATIENTS = "FX-DATA-070", "error"
    FEW_EVENTS = "FX-DATA-071", "warning"
    TASK_WITHOUT_COLUMNS = "FX-DATA-072", "warning"
    OPTED_OUT = "FX-DATA-073", "note"
    PANEL_CHANGED = "FX-DATA-074", "error"

    NO_VOCABULARY_GENE = "FX-PREDICT-001", "error"
    FEW_VOCABULARY_GENES = "FX-PREDICT-002", "warning"
    SAMPLES_WITHOUT_GENES = "FX-PREDICT-003", "warning"
    GENE_COLUMNS_DIFFER = "FX-PREDICT-004", "error"
    FOREIGN_SCALE = "FX-PREDICT-005", "warning"
    CANCER_TYPES_MISSING = "FX-PREDICT-010", "error"
    SOME_CANCER_TYPES_MISSING = "FX-PREDICT-011", "warning"
    COVARIATES_MISSING = "FX-PREDICT-012", "warning"

    def __init__(self, number: str, severity: Severity) -> None:
        self.number = number
        self.severity = severity

    def finding(self, where: str, found: str, expected: str, action: str) -> Finding:
        """Return a finding with this code."""
        return Finding(
            code=self.number,
            severity=self.severity,
            where=where,
            found=found,
            expected=expected,
            action=action,
        )
