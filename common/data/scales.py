"""Expression scales: what the numbers in a hospital's file mean.

N samples, G genes. Abundance x is TPM, FPKM, RSEM normalised or alike.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator

from fedgex.common.errors import ConfigError


class Scale(StrEnum):
    """How a value relates to a normalised abundance x (TPM, FPKM, RSEM normalised).

    Next to the members there is `Scale("log2(x+0.001)")`, and alike with ln and log10,
    for whatever was added before the logarithm; see `scale_of`.
    """

    COUNTS = "counts"
    """Raw read counts; not convertible without library sizes."""
    LINEAR = "linear"
    """x itself."""
    LOG2P1 = "log2p1"
    """log2(x + 1)."""
    LOG2P025 = "log2p025"
    """log2(x + 0.25); a zero count is -2."""
    LN1P = "ln1p"
    """ln(x + 1)."""
    LOG10P1 = "log10p1"
    """log10(x + 1)."""
    RELATIVE = "relative"
    """z-scores or log-ratios: convertible to nothing else."""

    @classmethod
    def _missing_(cls, value: object) -> Scale | None:
        """Return the scale of a formula such as log2(x+0.001)."""
        form = _FORMULA.fullmatch(value.lower()) if isinstance(value, str) else None
        if form is None or form["what"] not in _ABUNDANCES:
            return None
        added = float(form["added"] or 0)
        if added > MOST_ADDED:
            return None
        for scale, logarithm in _NAMED.items():
            if logarithm == (form["base"], added):
                return scale
        text = f"{form['base']}(x+{added:g})" if added else f"{form['base']}(x)"
        scale = str.__new__(cls, text)  # as enum.Flag makes its unnamed members
        scale._name_ = scale._value_ = text
        return scale

    @property
    def logarithm(self) -> tuple[str, float] | None:
        """What is taken of x, and what is added to it before; None without."""
        if self in _NAMED:
            return _NAMED[self]
        form = _FORMULA.fullmatch(self)
        return None if form is None else (form["base"], float(form["added"] or 0))

    @property
    def is_convertible(self) -> bool:
        """Whether it is a function of x, and so leads to every other that is one."""
        return self == Scale.LINEAR or self.logarithm is not None


_NAMED = {
    Scale.LOG2P1: ("log2", 1.0),
    Scale.LOG2P025: ("log2", 0.25),
    Scale.LN1P: ("ln", 1.0),
    Scale.LOG10P1: ("log10", 1.0),
}
"""Logarithm, and what is added to x, of each member that is a logarithm."""

_FORMULA = re.compile(
    r"(?P<base>log2|ln|log10)\(\s*(?P<what>[a-z][a-z_-]*)"
    r"\s*(?:\+\s*(?P<added>\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+)\s*)?\)"
)

_ABUNDANCES = frozenset(
    ("x", "tpm", "fpkm", "fpkm-uq", "rpkm", "cpm", "rsem", "norm_count", "norm_counts")
)
"""What portals call x. Counts are not among them: they want library sizes."""

MOST_ADDED = 100.0
"""Nobody adds more before a logarithm."""

CONVERTIBLE = frozenset(scale for scale in Scale if scale.is_convertible)
"""Members that are functions of x, each convertible to each other."""


def scale_of(value: object) -> Scale:
    """Return the scale that a name or a formula stands for.

    Raises
    ------
    ValueError
        If it stands for none; says what is accepted.
    """
    text = str(value).strip()
    try:
        return Scale(text)
    except ValueError:
        counts = "count" in text.lower() and "(" in text
        raise ValueError(
            "the logarithm of raw counts leads nowhere: export the counts themselves "
            'with library sizes ("counts"), or TPM'
            if counts
            else f"expected one of {', '.join(Scale)}; or the formula with what was "
            "added before the logarithm, log2(x+0.001), ln(x+1), log10(x+0.1) or "
            f"log2(x), at most {MOST_ADDED:g}"
        ) from None


DeclaredScale = Annotated[Scale, BeforeValidator(scale_of)]
"""A scale in a file of settings: a name, or a formula."""

LARGEST_ABUNDANCE = 2.0**30
"""No x is above this: TPM end at 1e6, and RSEM and read counts far below 1e9."""

LOW_ABUNDANCE = 30.0
"""Hardly any large panel keeps every x below this; logarithms always do."""

MODEST_ABUNDANCE = 100.0
"""Few large panels keep every x below this; log10 declared as log2 does."""

LARGE_PANEL = 100
"""Genes from which on a panel without one abundant gene is not credible."""

_TELLING_PANEL = 20
"""Fewest genes for which the spread of values distinguishes logarithms from faint
genes."""

_LN_BASE = {"log2": math.log(2), "ln": 1.0, "log10": math.log(10)}
"""Natural logarithm of each base."""

_ROUNDING = 1e-4
"""Exported decimals may fall this far below the floor of a scale."""

_ONE_DECIMAL = 0.05
"""The same where the floor itself has many decimals, such as -9.96578."""


def is_convertible(source: Scale, target: Scale) -> bool:
    """Return whether a formula leads from one scale to the other."""
    return source == target or (source.is_convertible and target.is_convertible)


def convert(values: ArrayLike, source: Scale, target: Scale) -> NDArray[np.float32]:
    """Move values from one scale to another.

    Parameters
    ----------
    values
        Any shape, on scale `source`; NaN stays NaN.
    source, target
        Scales; the arithmetic is float64.

    Returns
    -------
    NDArray
        Same shape, on scale `target`.

    Raises
    ------
    ConfigError
        If no formula leads from `source` to `target`: counts want library sizes (see
        `counts_per_million`), relative values have lost their level.
    """
    x = np.asarray(values, dtype=np.float64)
    if not is_convertible(source, target):
        raise ConfigError(
            f"expression on the {source} scale cannot become {target}; convertible "
            f"are {', '.join(sorted(CONVERTIBLE))} and formulas such as "
            "log2(x+0.001). Export the data on one of these."
        )
    if source != target:
        x = _from_linear(_to_linear(x, source), target)
    return x.astype(np.float32)


def counts_per_million(
    counts: ArrayLike, library_size: ArrayLike
) -> NDArray[np.float64]:
    """Divide counts (N, G) by the total reads of each sample (N,), times a million.

    The totals are given, never summed from `counts`: those may be a panel. The result
    is linear, but no TPM, because gene length stays in it.
    """
    total = np.asarray(library_size, dtype=np.float64)[:, None]
    return np.asarray(counts, dtype=np.float64) / total * 1e6


def floor(scale: Scale) -> float:
    """Return the value of x = 0, below which nothing on this scale can be."""
    if scale == Scale.RELATIVE:
        return -math.inf
    return float(_from_linear(np.array(0.0), scale))


def below_floor(values: NDArray[np.floating], scale: Scale) -> NDArray[np.bool_]:
    """Return which values are below the floor by more than rounding."""
    return values < floor(scale) - _slack(scale)


def _slack(scale: Scale) -> float:
    return _ROUNDING if round(floor(scale), 1) == floor(scale) else _ONE_DECIMAL


def misfit(values: NDArray[np.floating], scale: Scale) -> str | None:
    """Say why the numbers cannot be on a scale, or None if they can.

    Only what is impossible or beyond belief counts, because a panel may hold a handful
    of genes of any level.

    Parameters
    ----------
    values
        Shape (N, G); NaN and infinities are left out.
    scale
        The scale in question.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    if scale == Scale.RELATIVE and finite.size >= 100 and finite.min() >= 0:
        return "no value is below zero"
    if below_floor(finite, scale).any():
        return f"some values are below {floor(scale):g}"
    if scale == Scale.COUNTS and (finite != np.rint(finite)).any():
        return "some values are not integers"
    ceiling = float(_from_linear(np.array(LARGEST_ABUNDANCE), scale))
    if np.abs(finite).max() > ceiling:
        return f"some values are beyond {ceiling:.4g}"
    if scale == Scale.LINEAR and _look_logarithmic(finite, values.shape[1]):
        return f"no value is above {LOW_ABUNDANCE:g}, as on a logarithmic scale"
    return None


def recognise(values: NDArray[np.floating]) -> frozenset[Scale]:
    """Return every scale that the numbers (N, G) could be on; see `misfit`."""
    return frozenset(scale for scale in Scale if misfit(values, scale) is None)


def formula_of(values: NDArray[np.floating]) -> tuple[Scale, ...]:
    """Return log2(x + c), if many zeros lie on a floor that one digit of c explains.

    Portals add .001 or .01; the zeros of all genes then share the least value.
    """
    finite = values[np.isfinite(values)]
    if not finite.size or finite.min() >= 0:
        return ()
    least = finite.min()
    scale = Scale(f"log2(x+{np.exp2(least):.0e})")
    on_it = finite == least
    return (scale,) if on_it.sum() > 1 and misfit(values, scale) is None else ()


def is_faint(values: NDArray[np.floating], scale: Scale) -> bool:
    """Return whether a panel (N, G) is so faint that its scale deserves a look.

    Possible, but more often a sign of another scale: logarithms declared linear keep
    every x below `LOW_ABUNDANCE`, and log10 declared as log2 turns 1 000 000 into 63,
    so that a large panel stays below `MODEST_ABUNDANCE`.
    """
    finite = values[np.isfinite(values)]
    if not scale.is_convertible or not finite.size:
        return False
    large = values.shape[1] >= LARGE_PANEL
    if not large and scale != Scale.LINEAR:
        return False
    x = np.array(MODEST_ABUNDANCE if large else LOW_ABUNDANCE)
    return bool(finite.max() <= _from_linear(x, scale))


def _to_linear(values: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    if scale.logarithm is None:
        return values
    base, added = scale.logarithm
    if base == "log2" and added != 1:
        x = np.exp2(values) - added
    else:
        exponent = values * _LN_BASE[base]
        x = np.expm1(exponent) if added == 1 else np.exp(exponent) - added
    return np.maximum(x, 0.0)  # rounding of exported decimals can undercut zero


def _from_linear(x: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    if scale.logarithm is None:
        return x
    base, added = scale.logarithm
    with np.errstate(divide="ignore"):  # log(0), where nothing was added
        if base == "log2" and added != 1:
            y = np.log2(x + added)
        else:
            y = (np.log1p(x) if added == 1 else np.log(x + added)) / _LN_BASE[base]
    return np.asarray(y, dtype=np.float64)


def _look_logarithmic(finite: NDArray[np.floating], n_genes: int) -> bool:
    """Return whether values declared linear are surely logarithms.

    A panel of faint genes may be all small too, but then a few values tower over the
    rest. Panels of 20 genes drawn at random from 11 TCGA cohorts (RSEM rescaled to TPM
    roughly): the largest value is 5 times the median and more among faint genes, and
    mostly less than 5 times on log2(x + 1). Smaller panels overlap, and are let pass.
    """
    if finite.max() > LOW_ABUNDANCE or n_genes < _TELLING_PANEL:
        return False
    even = finite.size >= 200 and finite.max() < 5 * np.median(finite)
    return n_genes >= LARGE_PANEL or bool(even)
