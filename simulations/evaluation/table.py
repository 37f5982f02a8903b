"""Tidy results: one number a row, from which tables, figures and tests are made.

A results table is a long DataFrame with a column for each key (method, setting, seed,
group of patients, metric) and the column `value`. Rows keep the order in which they
were added; so do the rows and columns of the tables made from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import wilcoxon

Cells = Mapping[str, Mapping[str, str]]
"""Text by row and column."""


def tidy(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return results from rows that hold keys and `value`."""
    return pd.DataFrame(list(rows))


def where(results: pd.DataFrame, **keys: Any) -> pd.DataFrame:
    """Return the rows with these values of these columns."""
    for column, wanted in keys.items():
        results = results[results[column] == wanted]
    return results


def nested(results: pd.DataFrame, *keys: str) -> dict[Any, Any]:
    """Return the values by one key, then the next: a list of those that share all."""
    if not keys:
        raise ValueError("no keys; expected one or more")
    first, *rest = keys
    return {
        name: nested(some, *rest) if rest else some["value"].tolist()
        for name, some in results.groupby(first, sort=False)
    }


def mean_over(results: pd.DataFrame, over: str, *keys: str) -> dict[Any, Any]:
    """Return, by the keys, the mean over another key (seeds) of lists of values."""
    first, *rest = keys
    return {
        name: mean_over(some, over, *rest)
        if rest
        else np.mean([*nested(some, over).values()], axis=0)
        for name, some in results.groupby(first, sort=False)
    }


def summary(
    results: pd.DataFrame, row: str, column: str, digits: int = 3
) -> dict[str, dict[str, str]]:
    """Return mean and SD over all keys but two, as text by row and column."""
    return {
        name: {column: mean_sd(some, digits) for column, some in cells.items()}
        for name, cells in nested(results, row, column).items()
    }


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and SD, as `.429 ± .003`; of one value its mean, - of none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.{digits}f}"


def markdown(corner: str, rows: Cells) -> str:
    """Return a Markdown table with a line a row, - where a row lacks a column."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return "\n".join(
        [
            f"| {corner} | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
            *(
                f"| {name} | {' | '.join(row.get(c, '-') for c in columns)} |"
                for name, row in rows.items()
            ),
        ]
    )


def mean_known(values: Iterable[float]) -> float:
    """Return the mean of the values that are known; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def sd(values: Sequence[float]) -> float:
    """Return the SD over seeds or splits; 0 of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_p(one: ArrayLike, other: ArrayLike) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test over paired numbers.

    NaN where all pairs are equal, or fewer than five are there to compare.
    """
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    difference = difference[~np.isnan(difference)]
    if len(difference) < 5 or not difference.any():
        return math.nan
    return float(wilcoxon(difference).pvalue)
