"""A folder of files of one sample each, as one matrix of genes by samples.

G genes, N samples.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedgex.common.codes import Code
from fedgex.common.data.scales import Scale
from fedgex.common.ingestion.findings import Findings
from fedgex.common.ingestion.labels import SUMMARIES
from fedgex.common.ingestion.samples.formats import (
    FEATURE_COUNTS,
    HTSEQ,
    NAMES,
    STAR,
    Format,
    SampleFile,
    recognise,
)
from fedgex.common.ingestion.samples.sheet import Sheet, read_sheet
from fedgex.common.ingestion.tables import by_position, read_table, to_numbers

_ENDINGS = re.compile(
    r"(\.rna_seq)?[._]augmented_star_gene_counts|[._]htseq([._]counts)?|\.genes"
    r"|[._]?ReadsPerGene\.out|[._]featureCounts|[._]counts|[._]abundance|[._]quant"
    r"|\.(tsv|txt|tab|sf|results|counts|gz|bz2|zst)",
    re.IGNORECASE,
)
"""What tools add to the name of a sample, taken off from the end."""

_OF_ALL = re.compile(r"(quant|abundance|counts|ReadsPerGene)\b.*", re.IGNORECASE)
"""Names that all samples' files have, in a folder for each."""

_COPY_ON_Y = "_PAR_Y"
"""What GENCODE adds to genes of X whose copy on Y is a row of its own."""


@dataclass(frozen=True)
class Matrix:
    """The values of all files, unchecked."""

    genes: tuple[str, ...]
    samples: tuple[str, ...]
    cells: pa.Table
    """(G, N); columns named by position; text stays text."""


def read_folder(
    folder: Path,
    sheet: Path | None,
    scale: Scale,
    value_column: str | None,
    seen: list[str],
) -> Matrix:
    """Read files of one sample each.

    Parameters
    ----------
    folder
        Searched with the folders in it; other files than those of a known format,
        hidden ones and those of folders called `logs` do not count.
    sheet
        Table of files and labels; without it, files and folders name the samples.
    scale, value_column
        Declared scale; of several columns of values on it, the one to take.
    seen
        Gets one line of what was recognised.

    Raises
    ------
    DataError
        If files are missing, differ in format or genes, or have no such column.
    """
    findings = Findings()
    inside = [path for path in sorted(folder.rglob("*")) if _counts(path, folder)]
    table = None if sheet is None else read_sheet(sheet)
    if table is None:
        chosen = _without_sheet(inside)
    else:
        chosen = _by_sheet(table, folder, inside, findings)
    if not chosen:
        if not findings.found:
            findings.add(Code.NO_SAMPLE_FILES, folder.name, names=NAMES)
        findings.refuse()
    formats = {file.format.name for file, _ in chosen}
    if len(formats) > 1:
        named = " and ".join(sorted(formats))
        findings.add(Code.SAMPLE_FILES_DIFFER, folder.name, how=f"formats: {named}")
    if any(file.of_transcripts for file, _ in chosen):
        name = next(file.format.name for file, _ in chosen if file.of_transcripts)
        findings.add(Code.SAMPLE_FILES_OF_TRANSCRIPTS, folder.name, name=name)
    known = chosen[0][0].format
    column = _value_column(known, scale, value_column, folder, findings)
    findings.refuse_errors()
    matrix = _together(chosen, column, scale, folder, findings)
    seen.append(
        f"files of one sample each, {known.name}"
        + (f', column "{column}"' if column else "")
        + (", rounded to integers" if _rounded(known, scale) else "")
        + (", labels from the sample sheet" if table else ", labels from their names")
    )
    return matrix


def _counts(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return path.is_file() and not any(p.startswith(".") or p == "logs" for p in parts)


def _without_sheet(inside: list[Path]) -> list[tuple[SampleFile, str]]:
    """Return files and labels; of a sample's genes and transcripts, the genes."""
    found = [(f, _label(f.path)) for p in inside if (f := recognise(p)) is not None]
    genes = {label for file, label in found if not file.of_transcripts}
    return [
        (f, label) for f, label in found if not f.of_transcripts or label not in genes
    ]


def _label(path: Path) -> str:
    name = path.name
    if _OF_ALL.fullmatch(name):
        name = path.parent.name
    while (end := re.search(rf"({_ENDINGS.pattern})$", name, re.IGNORECASE)) and end[0]:
        if end.start() == 0:
            return path.parent.name
        name = name[: end.start()]
    return name


def _by_sheet(
    sheet: Sheet, folder: Path, inside: list[Path], findings: Findings
) -> list[tuple[SampleFile, str]]:
    """Return the files that the sheet names, in its order."""
    places: dict[str, list[Path]] = {}
    for path in inside:
        relative = path.relative_to(folder).as_posix()
        plain = {re.sub(r"\.(gz|bz2|zst)$", "", name) for name in (relative, path.name)}
        for name in {relative, path.name, *plain}:
            places.setdefault(name, []).append(path)
    for path in inside:  # a folder for each sample
        parent = path.parent.relative_to(folder).as_posix()
        for name in {parent, path.parent.name}:
            places.setdefault(name, []).append(path)
    chosen: list[tuple[SampleFile, str]] = []
    missing: list[int] = []
    unknown: list[int] = []
    unclear: list[int] = []
    for line, names, sample in sheet.rows:
        those = next(
            (places[n] for name in names for n in _spelt(name) if n in places), []
        )
        files = [f for p in those if (f := recognise(p)) is not None]
        genes = [f for f in files if not f.of_transcripts] or files
        if len(genes) == 1:
            chosen.append((genes[0], sample))
        else:
            (missing if not those else unclear if genes else unknown).append(line)
    where = sheet.file
    if missing:
        findings.add(Code.SAMPLE_FILES_MISSING, where, line=missing[0])
    if unclear:
        findings.add(
            Code.SAMPLE_SHEET_UNUSABLE,
            where,
            found=f"names that fit several files (first in line {unclear[0]})",
        )
    if unknown:
        found = f"files of no known format (first that of line {unknown[0]})"
        findings.add(Code.NO_SAMPLE_FILES, where, names=NAMES, found=found)
    labels = Counter(sample for _, _, sample in sheet.rows)
    repeated = sum(n > 1 for n in labels.values())
    if repeated:
        found = "samples with several files"
        findings.add(Code.SAMPLE_REPEATED, where, found=found)
    return chosen


def _spelt(name: str) -> tuple[str, ...]:
    """Return the spellings of a file's name, packed and not."""
    name = name.replace("\\", "/").removeprefix("./").rstrip("/")
    return name, re.sub(r"\.(gz|bz2|zst)$", "", name)


def _value_column(
    known: Format,
    scale: Scale,
    wanted: str | None,
    folder: Path,
    findings: Findings,
) -> str | None:
    """Return the column of values; None where there is but one without a name."""
    names = {name.lower(): name for name in known.measures}
    on_scale = [name for name, unit in known.measures.items() if unit == scale]
    if not names:
        counts = known is FEATURE_COUNTS and scale != Scale.COUNTS
        if wanted is None and not counts:
            return None
        column, listed = wanted, "one column a sample, of counts"
    elif wanted is None and on_scale:
        return on_scale[0]
    elif wanted is not None and names.get(wanted.lower()) in on_scale:
        return names[wanted.lower()]
    else:
        column = wanted
        units = (f"{name} ({unit})" for name, unit in known.measures.items())
        listed = ", ".join(units)
    findings.add(
        Code.VALUE_COLUMN_UNFIT,
        folder.name,
        name=known.name,
        column=f'column "{column}" on' if column else "no column on",
        scale=scale,
        listed=listed,
    )
    return None


def _together(
    chosen: list[tuple[SampleFile, str]],
    column: str | None,
    scale: Scale,
    folder: Path,
    findings: Findings,
) -> Matrix:
    """Put the values of all files next to each other, genes in the first's order."""
    genes: tuple[str, ...] = ()
    order: dict[str, int] = {}
    samples: list[str] = []
    columns: list[Any] = []
    others: list[int] = []
    for number, (file, sample) in enumerate(chosen, 1):
        labels, values = _read(file, column)
        if not genes:
            genes = labels
            order = {label: place for place, label in enumerate(labels)}
        if labels != genes:
            if sorted(labels) != sorted(genes) or len(order) < len(genes):
                others.append(number)
                continue
            places = pa.array(np.argsort([order[label] for label in labels]))
            values = {name: cells.take(places) for name, cells in values.items()}
        alone = len(values) == 1
        samples += [sample if alone else _bam(name) for name in values]
        columns += [_rounding(cells, file.format, scale) for cells in values.values()]
    if others:
        how = f"lists of genes: that of file {others[0]} is not that of file 1"
        findings.add(Code.SAMPLE_FILES_DIFFER, folder.name, how=how)
    fractions = chosen[0][0].format is HTSEQ and scale != Scale.COUNTS
    if fractions and all(map(_are_integers, columns)):
        findings.add(
            Code.VALUE_COLUMN_UNFIT,
            folder.name,
            name=HTSEQ.name,
            column="no column on",
            scale=scale,
            listed="integers, which are counts",
        )
    findings.refuse_errors()
    return Matrix(genes, tuple(samples), by_position(columns))


def _read(
    file: SampleFile, column: str | None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return genes and values, without sums of reads and copies on Y."""
    table = read_table(file.path)
    if not file.format.columns:  # the tool writes no header
        first = pa.Table.from_arrays(
            [pa.array([cell]) for cell in table.column_names],
            names=(names := [str(i) for i in range(table.num_columns)]),
        )
        table = pa.concat_tables([first, table.rename_columns(names)])
    if file.format is STAR and column is not None:
        place = list(STAR.measures).index(column) + 1
        values = {column: table.column(place)}
    elif file.format is HTSEQ:
        values = {"": table.column(1)}
    elif column is None:
        values = {name: table[name] for name in table.column_names[6:]}
    else:
        values = {column: table[column]}
    labels = [(label or "").strip() for label in table.column(0).to_pylist()]
    kept = [
        place
        for place, label in enumerate(labels)
        if label.lower() not in SUMMARIES and not label.endswith(_COPY_ON_Y)
    ]
    places = pa.array(kept)
    return (
        tuple(labels[place] for place in kept),
        {name: cells.take(places) for name, cells in values.items()},
    )


def _rounded(known: Format, scale: Scale) -> bool:
    return known.estimated and scale == Scale.COUNTS


def _rounding(cells: Any, known: Format, scale: Scale) -> Any:
    """Return numbers, estimated counts rounded; text where a cell is no number."""
    values, is_text, _ = to_numbers(by_position([cells]))
    if is_text.any():
        return cells
    numbers = values[:, 0]
    return pa.array(np.rint(numbers) if _rounded(known, scale) else numbers)


def _are_integers(cells: Any) -> bool:
    values, _, _ = to_numbers(by_position([cells]))
    return bool((values == np.rint(values)).all())


def _bam(column: str) -> str:
    """Return the sample of featureCounts' column, which is the path of its reads."""
    name = re.split(r"[/\\]", column)[-1]
    return re.sub(
        r"(\.Aligned\.\w+\.out|[._]?Aligned\.\w+\.out)?\.(bam|sam|cram)$", "", name
    )
