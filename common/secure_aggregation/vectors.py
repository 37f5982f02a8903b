"""Updates as vectors of fixed-point numbers that are summed modulo 2^32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgex.common.arrays import PER_GENE
from fedgex.common.errors import UpdateError
from fedgex.common.study import FEWEST_SUMMED, StrategyRule

Words = NDArray[np.uint32]
"""Numbers modulo 2^32, shape (P,)."""
CHUNK = 1 << 18
"""Numbers that are masked or converted at a time."""


@dataclass(frozen=True)
class FixedPoint:
    """Numbers up to a bound as integers whose sum over n sites does not wrap."""

    bound: float
    """Greatest magnitude of a site's number."""
    n: int
    """Most sites that are summed."""

    @property
    def limit(self) -> int:
        """Return the integer that the bound becomes."""
        return (2**31 - 1) // self.n

    @property
    def step(self) -> float:
        """Return the difference between neighbouring numbers."""
        return self.bound / self.limit

    def encode(self, values: NDArray[np.floating]) -> Words:
        """Round to the nearest step; what is beyond the bound is put on it."""
        encoded = np.empty(values.shape, dtype=np.uint32)
        for i in range(0, values.size, CHUNK):
            part = np.rint(values[i : i + CHUNK].astype(np.float64) / self.step)
            rounded = np.clip(part, -self.limit, self.limit).astype(np.int64)
            encoded[i : i + CHUNK] = rounded.astype(np.uint32)  # modulo 2^32
        return encoded

    def decode(self, total: Words) -> NDArray[np.float64]:
        """Return the sum of what was encoded."""
        return total.view(np.int32).astype(np.float64) * self.step


def weight(rule: StrategyRule, site: str) -> float:
    """Return what a site's change is multiplied by before it is summed, at most 1.

    Raises
    ------
    UpdateError
        If the weights are fixed and the site has none.
    """
    if rule.weights != "fixed":
        return 1.0
    if site not in rule.site_weights:
        raise UpdateError(
            f'site "{site}" has no fixed weight; name it in strategy.site_weights of '
            "the study."
        )
    return rule.site_weights[site] / max(rule.site_weights.values())


def to_vector(
    change: Mapping[str, NDArray[np.floating]],
    clip: float,
    kept: NDArray[np.bool_] | None,
) -> NDArray[np.float32]:
    """Return a site's change as one vector, no longer than the clip.

    Parameters
    ----------
    change
        Named arrays; the vector holds them in order of name.
    clip
        Euclidean norm to which the vector is scaled down.
    kept
        Genes whose rows are not set to zero, shape (V,); None keeps all.

    Raises
    ------
    UpdateError
        If a number is not finite.
    """
    rows = [
        _kept(name, np.asarray(change[name], dtype=np.float32), kept)
        for name in sorted(change)
    ]
    vector = np.concatenate([array.reshape(-1) for array in rows])
    norm = float(np.sqrt(sum(float(p @ p) for p in _parts(vector))))
    if not np.isfinite(norm):
        raise UpdateError("the change of the model holds NaN or infinity.")
    return vector if norm <= clip else vector * np.float32(clip / norm)


def to_mean(
    total: NDArray[np.float64],
    incoming: Mapping[str, NDArray[np.floating]],
    weights: Sequence[float],
    rows: Sequence[NDArray[np.bool_]] | None,
) -> dict[str, NDArray[np.floating]]:
    """Return the mean of parameters that follows from the sum of weighted changes.

    A gene measured by fewer than three of the sites keeps its incoming values.

    Parameters
    ----------
    total
        Sum over the sites, in order of name of the arrays.
    incoming
        Parameters that the round began with.
    weights
        Of each site in the sum.
    rows
        Genes that each of them measures, each of shape (V,); None where a gene's rows
        are like all others.
    """
    mean: dict[str, NDArray[np.floating]] = {}
    start = 0
    for name in sorted(incoming):
        array = incoming[name]
        part = total[start : start + array.size].reshape(array.shape)
        start += array.size
        by: NDArray[np.float64] = np.asarray(sum(weights))
        if rows is not None and name.endswith(PER_GENE):
            counted = np.sum(rows, axis=0) >= FEWEST_SUMMED
            by = np.sum([w * r for w, r in zip(weights, rows, strict=True)], axis=0)
            by = np.where(counted, by, np.inf)
            by = by.reshape(by.shape + (1,) * (array.ndim - 1))
        mean[name] = (array + part / by).astype(array.dtype)
    return mean


def _kept(
    name: str, array: NDArray[np.float32], kept: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    if kept is None or not name.endswith(PER_GENE):
        return array
    return np.where(kept.reshape(kept.shape + (1,) * (array.ndim - 1)), array, 0)


def _parts(vector: NDArray[np.float32]) -> Iterator[NDArray[np.float64]]:
    for i in range(0, vector.size, CHUNK):
        yield vector[i : i + CHUNK].astype(np.float64)
