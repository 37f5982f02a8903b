"""Probes of an array onto symbols, by the table of its platform.

P probes, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.data.genes import count_genes, is_gene_like
from fedgex.common.ingestion.findings import Findings, refuse
from fedgex.common.ingestion.tables import read_table, to_numbers

if TYPE_CHECKING:
    from fedgex.common.ingestion.readers import RawExpression

PROBES = ("id", "probe set id", "probe_set_id", "probesetid", "probe_id", "probeid")
"""Columns that hold probes, in any case; the first that is there."""

COLUMNS = (
    *("gene symbol", "gene_symbol", "genesymbol", "symbol", "hgnc_symbol", "ilmn_gene"),
    *("gene_name", "gene name", "gene", "orf", "gene_assignment"),
)
"""Columns that hold symbols, in any case; the one that names most genes counts."""

LEAST_PROBES = 0.5
"""Share of a file's probes that its platform's table must list."""


def read_platform(path: Path, seen: list[str]) -> dict[str, str]:
    """Read the symbol of each probe that belongs to one gene.

    GEO's annotation (.annot), its platform files (GPL...txt), and what Affymetrix and
    Illumina publish as CSV have such columns.

    Raises
    ------
    DataError
        If the file cannot be read, or lacks a column of probes or one of symbols.
    """
    table = read_table(path, seen)
    names = [name.strip().lower() for name in table.column_names]
    probes = next((name for name in PROBES if name in names), None)
    found = {
        name: list(map(_symbol, _texts(table, names.index(name))))
        for name in COLUMNS
        if name in names
    }
    known = {
        name: count_genes(filter(None, each), None) for name, each in found.items()
    }
    if probes is None or not any(known.values()):
        refuse(Code.PLATFORM_UNUSABLE, path)
    symbols = found[max(known, key=lambda name: known[name])]
    labels = _texts(table, names.index(probes))
    return {p: s for p, s in zip(labels, symbols, strict=True) if s is not None}


def to_symbols(
    table: RawExpression, platform: dict[str, str], path: Path, findings: Findings
) -> RawExpression:
    """Rename probes to symbols; of several probes of a gene the brightest stays.

    That is the one with the greatest mean over all samples, which is chosen without a
    look at any outcome (Miller and others, BMC Bioinformatics 12:322, 2011: MaxMean).
    Probes of no gene, or of several, are left out.

    Raises
    ------
    DataError
        If the platform's table lists few of the probes.
    """
    by_rows = _listed(table.rows, platform) >= _listed(table.columns, platform)
    labels = table.rows if by_rows else table.columns
    if not labels or _listed(labels, platform) < LEAST_PROBES * len(labels):
        refuse(
            Code.PLATFORM_UNUSABLE,
            path,
            found=f"few of the probes in {table.file}",
            expected=f"{LEAST_PROBES:.0%} of them or more",
            action="Name the table of the platform (GPL...) that the series names.",
        )
    values, _, _ = to_numbers(table.cells)
    means = _means(values if by_rows else values.T)
    best: dict[str, int] = {}
    several: set[str] = set()
    for place, label in enumerate(labels):
        symbol = platform.get(label)
        if symbol is None:
            continue
        if symbol in best:
            several.add(symbol)
        if symbol not in best or means[place] > means[best[symbol]]:
            best[symbol] = place
    findings.add(
        Code.PROBES_MAPPED,
        table.file,
        probes=len(labels),
        genes=len(best),
        several=len(several),
    )
    places, symbols = list(best.values()), tuple(best)
    if by_rows:
        return replace(table, rows=symbols, cells=table.cells.take(pa.array(places)))
    cells = table.cells.select(places).rename_columns(
        list(map(str, range(len(places))))
    )
    return replace(table, columns=symbols, cells=cells)


def _symbol(text: str) -> str | None:
    """Return the one gene of a cell; None where there is none, or several.

    Several are divided by ///; Affymetrix's gene_assignment has accession // symbol //
    description of each.
    """
    genes = {
        (parts[1] if len(parts) > 2 else parts[0]).strip()
        for each in text.split("///")
        if (parts := each.split("//"))
    }
    symbol = next(iter(genes)) if len(genes) == 1 else ""
    return symbol if is_gene_like(symbol) else None


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each probe (P, N) over its finite values; -inf without."""
    finite = np.isfinite(values)
    counts = finite.sum(axis=1)
    sums = np.where(finite, values, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)


def _listed(labels: Sequence[str], platform: dict[str, str]) -> int:
    return sum(label in platform for label in labels)


def _texts(table: Any, place: int) -> list[str]:
    texts = table.column(place).cast(pa.string()).to_pylist()
    return [(text or "").strip() for text in texts]
