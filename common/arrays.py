"""Named arrays, and what is refused in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgex.common.errors import UpdateError

Arrays = Mapping[str, NDArray[np.generic]]
"""Named arrays."""
CHUNK = 1 << 20
"""Numbers that are converted to float64 at a time."""
PER_GENE = (
    "tokens.identity.weight",
    "tokens.direction.weight",
    "decoder.question.weight",
    "decoder.weight.weight",
    "decoder.bias.weight",
)
"""Ends of the names of parameters with a row for each gene, first dimension V."""


def check(
    expected: Mapping[str, tuple[int, ...]], arrays: Arrays, *, exact: bool = False
) -> None:
    """Refuse arrays that are missing, misshapen, not numbers, or not finite.

    Parameters
    ----------
    expected
        Shape of each array that must be there.
    exact
        Whether other names are refused too.

    Raises
    ------
    UpdateError
        With everything wrong at once, by parameter.
    """
    wrong = [f"{name} is missing" for name in expected if name not in arrays]
    if exact:
        wrong += [f"{name} is not asked for" for name in arrays if name not in expected]
    for name, shape in expected.items():
        if name not in arrays:
            continue
        try:
            array = arrays[name]
        except UpdateError as error:  # of a mapping that reads it only now
            wrong.append(str(error))
            continue
        if array.shape != shape:
            wrong.append(f"{name} has shape {array.shape}, expected {shape}")
        elif array.dtype.kind != "f":
            wrong.append(f"{name} is of type {array.dtype}, expected floating point")
        elif not (np.abs(array) <= np.finfo(np.float32).max).all():
            wrong.append(f"{name} holds NaN or infinity")
    if wrong:
        raise UpdateError("; ".join(wrong))


def clipped(
    change: Mapping[str, NDArray[np.float32]], norm: float
) -> dict[str, NDArray[np.float32]]:
    """Return a change of the model, scaled down to a Euclidean norm if it is longer."""
    squares = (np.square(array, dtype=np.float64).sum() for array in change.values())
    length = float(np.sqrt(sum(squares)))
    factor = np.float32(norm / length if length > norm else 1.0)
    return {name: factor * array for name, array in change.items()}


def square_norm(array: NDArray[Any], start: NDArray[Any] | None) -> float:
    """Return the squared norm of an array, or of its difference from another."""
    flat = array.reshape(-1)
    total = 0.0
    for i in range(0, flat.size, CHUNK):
        part = flat[i : i + CHUNK].astype(np.float64)
        if start is not None:
            part -= start.reshape(-1)[i : i + CHUNK]
        total += float(part @ part)
    return total
