"""Formats of files of one sample each, recognised by header and first row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedgex.common.data.genes import count_genes
from fedgex.common.data.scales import Scale
from fedgex.common.errors import DataError
from fedgex.common.ingestion.content import look
from fedgex.common.ingestion.labels import SUMMARIES

_COUNTS, _LINEAR = Scale.COUNTS, Scale.LINEAR


@dataclass(frozen=True)
class Format:
    """What one tool writes of one sample: a row a gene."""

    name: str
    columns: tuple[str, ...] = ()
    """Names that the header begins with; none where the tool writes no header."""
    measures: Mapping[str, Scale] = field(default_factory=dict)
    """Value columns and the scale of each; the first on a scale is its default."""
    estimated: bool = False
    """Counts are fractions, which the tool shared out among genes."""


STAR_GDC = Format(
    "STAR counts of the GDC",
    ("gene_id", "gene_name", "gene_type", "unstranded"),
    {
        "unstranded": _COUNTS,
        "stranded_first": _COUNTS,
        "stranded_second": _COUNTS,
        "tpm_unstranded": _LINEAR,
        "fpkm_unstranded": _LINEAR,
        "fpkm_uq_unstranded": _LINEAR,
    },
)
STAR = Format(
    "ReadsPerGene of STAR",
    measures=dict.fromkeys(
        ("unstranded", "stranded_first", "stranded_second"), _COUNTS
    ),
)
HTSEQ = Format("HTSeq's two columns")
FEATURE_COUNTS = Format(
    "featureCounts", ("Geneid", "Chr", "Start", "End", "Strand", "Length")
)
RSEM = Format(
    "RSEM",
    ("gene_id", "transcript_id(s)"),
    {"expected_count": _COUNTS, "TPM": _LINEAR, "FPKM": _LINEAR},
    estimated=True,
)
SALMON = Format(
    "Salmon",
    ("Name", "Length", "EffectiveLength"),
    {"TPM": _LINEAR, "NumReads": _COUNTS},
    estimated=True,
)
KALLISTO = Format(
    "kallisto",
    ("target_id", "length", "eff_length"),
    {"tpm": _LINEAR, "est_counts": _COUNTS},
    estimated=True,
)
RSEM_TRANSCRIPTS = Format("RSEM", ("transcript_id", "gene_id"))
_WITH_HEADER = (STAR_GDC, FEATURE_COUNTS, RSEM, SALMON, KALLISTO, RSEM_TRANSCRIPTS)

NAMES = "STAR counts of the GDC, STAR, HTSeq, featureCounts, RSEM, Salmon and kallisto"

_TRANSCRIPT = re.compile(r"(ENST\d{11}|[NX][MR]_\d+)")
_NUMBER = re.compile(r"-?\d+(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)
_START = 1 << 20


@dataclass(frozen=True)
class SampleFile:
    """A file of a known format."""

    path: Path
    format: Format
    of_transcripts: bool
    """Its rows are transcripts, not genes."""


def recognise(path: Path) -> SampleFile | None:
    """Recognise a file by its first two rows; None if it is of no known format."""
    first, second = first_rows(path)
    for known in _WITH_HEADER:
        if tuple(first[: len(known.columns)]) == known.columns:
            transcripts = known is RSEM_TRANSCRIPTS or bool(
                second and _TRANSCRIPT.match(second[0])
            )
            return SampleFile(path, known, transcripts)
    label, *cells = first or [""]
    if not cells or not all(map(_NUMBER.fullmatch, cells)):
        return None
    if len(cells) == 3 and label == "N_unmapped":
        return SampleFile(path, STAR, of_transcripts=False)
    transcripts = bool(_TRANSCRIPT.match(label))
    named = transcripts or label.lower() in SUMMARIES or count_genes([label], None)
    if len(cells) == 1 and named:
        return SampleFile(path, HTSEQ, transcripts)
    return None


def first_rows(path: Path) -> tuple[list[str], list[str]]:
    """Return the cells of the first two rows that are no comments."""
    try:
        with look(path).open() as stream:
            text = stream.read(_START).decode("utf-8", errors="replace")
    except (DataError, OSError, EOFError):
        return [], []
    lines: list[list[str]] = [
        line.split("\t")
        for line in text.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return (lines or [[]])[0], (lines[1:] or [[]])[0]
