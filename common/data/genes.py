"""Names of genes: labels of a file onto current HGNC symbols, one column each.

N samples, L labels in the file, G genes kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.errors import ConfigError

TABLE_COLUMNS = ("symbol", "status", "alias_symbol", "prev_symbol", "ensembl_gene_id")
"""Columns of HGNC's complete set that are read."""

_ENSEMBL = re.compile(r"(ENSG\d{11})(\.\d+)?")
_SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9._@-]*")
_DATE = re.compile(r"(Mar|Sep|Dec|Oct)-\d+")  # MARCH1 and SEPT2 after a spreadsheet

PACKAGED = "hgnc.tsv.xz"
"""HGNC's names as of October 2026, made by deploy/gene_table.py."""

KNOWN_SHARE = 0.5
"""Labels of a gene axis of which a smaller share is known are no names of genes."""


@dataclass(frozen=True, kw_only=True)
class GeneTable:
    """What HGNC says of names: as packaged, or from a file that the user downloaded."""

    symbols: frozenset[str]
    """Approved symbols."""
    by_ensembl: Mapping[str, str]
    """Approved symbol of each Ensembl gene id without version."""
    by_previous: Mapping[str, frozenset[str]]
    """Approved symbols that once had this symbol."""
    by_alias: Mapping[str, frozenset[str]]
    """Approved symbols that are also called so."""

    @classmethod
    @lru_cache(maxsize=1)
    def packaged(cls) -> Self:
        """Return the table that the package ships."""
        with as_file(files("fedgex.common.data") / PACKAGED) as path:
            return cls.read(path)

    def knows(self, label: str) -> bool:
        """Return whether a label is a symbol, an earlier one, or of Ensembl's form.

        Aliases do not count: P16 and P53 are genes' and patients'.
        """
        named = label in self.symbols or label in self.by_previous
        return named or _ENSEMBL.fullmatch(label) is not None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table in the format of HGNC's complete set (tab-separated).

        Raises
        ------
        ConfigError
            If the file cannot be read or lacks one of `TABLE_COLUMNS`.
        """
        try:
            table = pd.read_csv(
                path,
                sep="\t",
                dtype=str,
                keep_default_na=False,
                usecols=list(TABLE_COLUMNS),
            )
        except Exception as error:  # torn gzip has its own, and others
            raise ConfigError(
                f"{path.name}: cannot be read as a gene table; expected HGNC's "
                f"complete set, tab-separated, with columns {', '.join(TABLE_COLUMNS)}."
            ) from error
        table = table[table["status"] == "Approved"]
        return cls(
            symbols=frozenset(table["symbol"]),
            by_ensembl={
                i: next(iter(owners))
                for i, owners in _owners(
                    table["ensembl_gene_id"], table["symbol"]
                ).items()
                if len(owners) == 1
            },
            by_previous=_owners(table["prev_symbol"], table["symbol"]),
            by_alias=_owners(table["alias_symbol"], table["symbol"]),
        )


@dataclass(frozen=True, kw_only=True)
class GeneNames:
    """Current symbols of the labels of a file."""

    symbols: tuple[str | None, ...]
    """Symbol of each label, length L; None where the label names no single gene."""
    updated: tuple[str, ...]
    """Labels that are retired symbols or aliases and were replaced."""
    ambiguous: tuple[str, ...]
    """Labels that several genes had or have."""
    unmapped: tuple[str, ...]
    """Labels that name no gene, or one that the table does not list."""


def current_symbols(labels: Sequence[str], table: GeneTable | None) -> GeneNames:
    """Find the current symbol of each label.

    An approved symbol stays; then come Ensembl id, previous symbol and alias, the last
    two only where one gene had it. Without a table, symbols stay as they are and
    Ensembl ids are looked up in the packaged one.
    """
    symbols: list[str | None] = []
    updated, ambiguous, unmapped = [], [], []
    for label in labels:
        owners = _candidates(label, table)
        symbol = next(iter(owners)) if len(owners) == 1 else None
        symbols.append(symbol)
        if len(owners) > 1:
            ambiguous.append(label)
        elif symbol is None:
            unmapped.append(label)
        elif symbol != label and not _ENSEMBL.fullmatch(label):
            updated.append(label)
    return GeneNames(
        symbols=tuple(symbols),
        updated=tuple(updated),
        ambiguous=tuple(ambiguous),
        unmapped=tuple(unmapped),
    )


@dataclass(frozen=True, kw_only=True)
class GeneColumns:
    """One column for each gene."""

    genes: tuple[str, ...]
    """Symbols, sorted, length G."""
    columns: tuple[int, ...]
    """Position of each gene's column in the file, length G."""
    repeated: tuple[str, ...]
    """Genes that had several columns, of which one was kept."""
    contradictory: tuple[str, ...]
    """Genes that had several columns, none of which could be preferred: left out."""


def retired_symbols(genes: Iterable[str]) -> dict[str, str]:
    """Return the current symbol of each gene that has a retired one.

    By the packaged table; a symbol that several genes once had stays.
    """
    table = GeneTable.packaged()
    owners = {
        gene: table.by_previous[gene]
        for gene in genes
        if gene not in table.symbols and gene in table.by_previous
    }
    return {gene: next(iter(own)) for gene, own in owners.items() if len(own) == 1}


def spelt_as(genes: Sequence[str], wanted: Collection[str]) -> tuple[str, ...]:
    """Return genes of a file, those of a study as the study spells them.

    A study may hold symbols that were retired since, and a file those that a newer
    study no longer does. A gene that is in the file under the study's name stays.

    Parameters
    ----------
    genes
        Symbols of the file's columns, each once.
    wanted
        Symbols of the study; none: all genes stay as they are.
    """
    missing, others = sorted({*wanted} - {*genes}), {*genes} - {*wanted}
    if not missing:
        return tuple(genes)
    current = retired_symbols([*missing, *others])
    by_current = {
        current.get(gene, gene): gene
        for gene in sorted(others, key=lambda gene: (gene not in current, gene))
    }  # of several columns the one that bears the current symbol
    spelt = {
        by_current[symbol]: gene
        for gene in missing
        if (symbol := current.get(gene, gene)) in by_current
    }
    return tuple(spelt.get(gene, gene) for gene in genes)


def one_column_each(
    labels: Sequence[str],
    symbols: Sequence[str | None],
    values: NDArray[np.floating],
) -> GeneColumns:
    """Choose one column for each symbol.

    Of several, the only one labelled with the current symbol itself is kept; otherwise
    the first, if all hold the same values; otherwise none. Columns are never averaged
    or added up, which would be right on some scales and wrong on others.

    Parameters
    ----------
    labels, symbols
        Label in the file and current symbol of each column, length L; columns whose
        symbol is None are left out.
    values
        Expression, shape (N, L).
    """
    places: dict[str, list[int]] = {}
    for place, symbol in enumerate(symbols):
        if symbol is not None:
            places.setdefault(symbol, []).append(place)
    kept: dict[str, int] = {}
    repeated, contradictory = [], []
    for symbol, columns in sorted(places.items()):
        exact = [i for i in columns if labels[i] == symbol] or columns
        same = values[:, exact] if len(exact) > 1 else None
        if same is not None and not _all_equal(same):
            contradictory.append(symbol)
            continue
        kept[symbol] = exact[0]
        if len(columns) > 1:
            repeated.append(symbol)
    return GeneColumns(
        genes=tuple(kept),
        columns=tuple(kept.values()),
        repeated=tuple(repeated),
        contradictory=tuple(contradictory),
    )


def is_gene_like(label: str) -> bool:
    """Return whether a label has the shape of a symbol or an Ensembl gene id."""
    return bool(_SYMBOL.fullmatch(label)) and not _DATE.fullmatch(label)


def count_genes(labels: Iterable[str], table: GeneTable | None) -> int:
    """Return how many labels surely name genes, by the given or the packaged table."""
    tables = [GeneTable.packaged(), *([] if table is None else [table])]
    return sum(any(each.knows(label) for each in tables) for label in labels)


def _owners(
    names: pd.Series[str], symbols: pd.Series[str]
) -> dict[str, frozenset[str]]:
    owners: dict[str, set[str]] = {}
    for joined, symbol in zip(names, symbols, strict=True):
        for name in joined.split("|"):
            owners.setdefault(name, set()).add(symbol)
    owners.pop("", None)
    return {name: frozenset(those) for name, those in owners.items()}


def _candidates(label: str, table: GeneTable | None) -> frozenset[str]:
    """Return the symbols of all genes that a label may mean."""
    ensembl = _ENSEMBL.fullmatch(label)
    nothing: frozenset[str] = frozenset()
    if table is None and not ensembl:
        return frozenset({label}) if is_gene_like(label) else nothing
    table = table or GeneTable.packaged()
    if label in table.symbols:
        return frozenset({label})
    if ensembl:
        symbol = table.by_ensembl.get(ensembl[1])
        return nothing if symbol is None else frozenset({symbol})
    return table.by_previous.get(label) or table.by_alias.get(label, nothing)


def _all_equal(values: NDArray[np.floating]) -> bool:
    """Return whether all columns are the same, NaN included."""
    return all(
        np.array_equal(values[:, 0], values[:, i], equal_nan=True)
        for i in range(1, values.shape[1])
    )
