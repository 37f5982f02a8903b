"""Numbers of several seeds as a table for people, and their paired comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import wilcoxon


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and SD, as `.429 ± .003`; the mean alone of one value, - of none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.{digits}f}"


def markdown(corner: str, rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a table with a line a row, - where a row lacks a column."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return [
        f"| {corner} | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        *(
            f"| {name} | {' | '.join(row.get(c, '-') for c in columns)} |"
            for name, row in rows.items()
        ),
    ]


def paired_p(one: ArrayLike, other: ArrayLike) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test over paired numbers.

    NaN where all pairs are equal, or fewer than five are there to compare.
    """
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    difference = difference[~np.isnan(difference)]
    if len(difference) < 5 or not difference.any():
        return math.nan
    return float(wilcoxon(difference).pvalue)
