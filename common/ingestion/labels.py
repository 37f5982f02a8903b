"""Labels of genes as portals and spreadsheets write them.

L labels on the axis of the genes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from fedgex.common.data.genes import GeneTable, count_genes

# fmt: off
ANNOTATION = frozenset((
    "basemean", "biotype", "chr", "chrom", "chromosome", "cytoband", "description",
    "effective_length", "end", "ensembl_gene_id", "ensembl_id", "entrez", "entrezid",
    "entrez_gene_id", "gene", "gene_biotype", "gene_id", "gene_name", "gene_symbol",
    "gene_type", "geneid", "hgnc_id", "hugo_symbol", "length", "lfcse",
    "log2foldchange", "name", "padj", "pvalue", "start", "stat", "strand", "symbol",
    "target_id", "transcript_id", "transcript_id(s)",
))
"""Columns that annotate genes or test them, in any case."""

MEASURES = frozenset((
    "count", "counts", "eff_length", "est_counts", "expected_count", "fpkm",
    "fpkm_unstranded", "fpkm_uq_unstranded", "isopct", "numreads",
    "posterior_mean_count", "rpkm", "stranded_first", "stranded_second", "tpm",
    "tpm_unstranded", "unstranded",
))
"""Columns of one sample's quantification (RSEM, kallisto, Salmon, GDC), in any case."""

SUMMARIES = frozenset((
    "__alignment_not_unique", "__ambiguous", "__no_feature", "__not_aligned",
    "__too_low_aqual", "n_ambiguous", "n_multimapping", "n_nofeature", "n_unmapped",
))
"""Rows in which HTSeq and STAR sum up reads of no gene, in lower case."""

SYMBOLS = frozenset((
    "description", "gene_name", "gene_symbol", "genesymbol", "hgnc_symbol",
    "hugo_symbol", "symbol",
))
"""Columns that hold symbols, in any case."""
# fmt: on

_PLATFORM = "Name the platform's table (GEO's GPL...) as data.platform_table."
_OTHER_ASSAY = "This is another assay: give the file with the expression of genes."
_TO_GENES = "Sum transcripts up to genes (in R: tximport), and export those."
_HUMAN = "Only human genes have a place here; map them to human orthologues yourself."

KINDS = {
    "Ensembl transcripts": (r"ENST\d{11}(\.\d+)?", _TO_GENES),
    "Ensembl proteins": (r"ENSP\d{11}(\.\d+)?", _TO_GENES),
    "Ensembl ids of another species": (r"ENS[A-Z]{3,4}[GT]\d{11}(\.\d+)?", _HUMAN),
    "RefSeq transcripts": (r"[NX][MR]_\d+(\.\d+)?", _TO_GENES),
    "Illumina probes": (r"ILMN_\d+", _PLATFORM),
    "Affymetrix probes": (r"(AFFX-)?\S+_at", _PLATFORM),
    "Agilent probes": (r"A_\d+_P\d+", _PLATFORM),
    "methylation probes": (r"c[gh]\d{8}(_\w+)?|ch\.\d+\.\d+[FR]", _OTHER_ASSAY),
    "microRNAs": (r"hsa-(mir|miR|let)-\S+|MIMAT\d{7}", _OTHER_ASSAY),
    "UniProt names": (r"[A-Z0-9]+_HUMAN", _OTHER_ASSAY),
    "Entrez ids": (r"\d+", "Add the symbols as the first column."),
    "mouse symbols": (r"[A-Z][a-z]+[a-z0-9]*|Gm\d+|\d+[A-Z]\d{2}Rik", _HUMAN),
    "symbols in lower case": (r"[a-z][a-z0-9]+", "Write human symbols in capitals."),
}
"""Kinds of labels that are no human genes' names: pattern, and what to do; the first
that fits."""

SURE = frozenset(KINDS) - {"Entrez ids", "mouse symbols", "symbols in lower case"}
"""Kinds whose patterns no patients' identifiers have."""

_JOINED = re.compile(
    r"(?P<symbol>[^|?]+)\|\d+|(?P<id>ENSG\d{11}(?:\.\d+)?)[|_].+|\?\|\d+"
)

_MONTHS = {
    "mar": ("MARCH", "MARC"),
    "mrz": ("MARCH", "MARC"),
    "mär": ("MARCH", "MARC"),
    "sep": ("SEPT",),
    "sept": ("SEPT",),
    "oct": ("OCT",),
    "okt": ("OCT",),
    "dec": ("DEC",),
    "dez": ("DEC",),
    "03": ("MARCH", "MARC"),
    "09": ("SEPT",),
    "10": ("OCT",),
    "12": ("DEC",),
}
"""What earlier symbols began with that spreadsheets take for months."""

_DATES = tuple(
    map(
        re.compile,
        (
            r"(?P<day>\d{1,2})[-./ ]{1,2}(?P<month>[a-zä]{3,4})\.?(?:[-./ ]\d{2,4})?",
            r"(?P<month>[a-zä]{3,4})\.?[-./ ](?P<day>\d{1,2})",
            r"\d{4}-(?P<month>\d{2})-(?P<day>\d{2})(?:[ t]00:00:00)?",
        ),
    )
)
"""1-Mar, 01.Mrz, Mar-01, 1-Mar-24, 2024-03-01."""


def kind_of(labels: Collection[str]) -> str | None:
    """Return what most labels are, by their pattern: one of `KINDS`."""
    for kind, (pattern, _) in KINDS.items():
        fits = re.compile(pattern).fullmatch
        if 2 * sum(bool(fits(label)) for label in labels) > len(labels):
            return kind
    return None


def symbols_first(table: Any, seen: list[str]) -> Any:
    """Take symbols for labels where the first column has other names of genes.

    Files of cBioPortal may begin with Entrez ids, others with row numbers or probes.
    """
    names = [name.strip().lower() for name in table.column_names]
    others = [place for place, name in enumerate(names) if place and name in SYMBOLS]
    if not others or names[0] in SYMBOLS:
        return table
    known = {p: count_genes(_texts(table.column(p)), None) for p in (0, *others)}
    best = max(known, key=lambda place: known[place])
    if best == 0:
        return table
    seen.append(f'symbols in the column "{table.column_names[best]}"')
    return table.select([best, *(p for p in range(1, len(names)) if p != best)])


def without_second_header(table: Any, seen: list[str]) -> Any:
    """Leave out the row below the header in which Firehose names the measure."""
    if table.num_rows < 2 or table.num_columns < 2:
        return table
    first, *cells = (str(column[0].as_py()).lower() for column in table.columns)
    named = first in ANNOTATION or first == "composite element ref"
    if not named or len(set(cells)) > 1 or not re.fullmatch(r"[a-z_ ]+", cells[0]):
        return table
    seen.append(f'a second header that says "{cells[0]}"')
    return table.slice(1)


def begins_with_values(header: Sequence[str]) -> bool:
    """Return whether a header is a row of values: a gene, and numbers.

    HTSeq and STAR write no header; read as one, it would lose a gene, and call samples
    after numbers.
    """
    corner, *cells = header
    named = corner.startswith("N_") or count_genes([corner], None) == 1
    return named and all(re.fullmatch(r"-?\d+(\.\d+)?", cell) for cell in cells)


def unjoined(labels: tuple[str, ...], seen: list[str]) -> tuple[str, ...]:
    """Return SYMBOL of SYMBOL|ENTREZ, and the id of ENSG...|SYMBOL, if most are such.

    `?|ENTREZ`, a gene without symbol, stays as it is.
    """
    found = [_JOINED.fullmatch(label) for label in labels]
    if 2 * sum(map(bool, found)) <= len(labels):
        return labels
    seen.append("two names of each gene in one label, as SYMBOL|ENTREZ")
    return tuple(
        (match["symbol"] or match["id"] or label) if match else label
        for label, match in zip(labels, found, strict=True)
    )


def damaged(label: str) -> str | None:
    """Return the likely gene of a label that a spreadsheet made a date; else None."""
    match = next((m for date in _DATES if (m := date.fullmatch(label.lower()))), None)
    if match is None or match["month"] not in _MONTHS:
        return None
    table, day = GeneTable.packaged(), int(match["day"])
    likely: set[str] = set()
    for prefix in _MONTHS[match["month"]]:
        earlier = f"{prefix}{day}"
        likely |= table.by_previous.get(earlier, frozenset())
        likely |= frozenset() if likely else table.by_alias.get(earlier, frozenset())
    return " or ".join(sorted(likely)) or None


def _texts(column: Any) -> list[str]:
    return [(label or "").strip() for label in column.cast(pa.string()).to_pylist()]
