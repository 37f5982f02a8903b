"""A matrix of genes by samples, written and read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedgex.common.codes import Code
from fedgex.common.errors import DataError
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.ingestion.settings import DataSettings

GENES = ["TP53", "MYC", "EGFR", "ACTB", "KRAS", "VIM"]
SAMPLES = [f"S{i:02d}" for i in range(12)]


def matrix() -> pd.DataFrame:
    """Return genes by samples on log2(x + 1), all 17 digits of each number."""
    values = np.random.default_rng(3).normal(8, 1, (6, 12))
    return pd.DataFrame(values, pd.Index(GENES, name="gene"), SAMPLES)


def found(path: Path, **data: Any) -> tuple[pd.DataFrame, str]:
    """Return genes by samples as read and checked, and what the notes recognised."""
    settings = DataSettings.model_validate(
        {"expression": path, "scale": "log2p1"} | data
    )
    cohort, findings = read_cohort(settings, 1, settings.scale, ())
    notes = [f.found for f in findings if f.code == Code.FORMAT_RECOGNISED]
    assert len(notes) <= 1 + ("platform_table" in data)
    frame = pd.DataFrame(cohort.expression.T, cohort.genes, cohort.patients)
    return frame.astype(float), " ".join(notes)


def refusal(path: Path, **data: Any) -> str:
    """Return the one finding that refuses a file."""
    with pytest.raises(DataError) as refused:
        found(path, **data)
    (error,) = [f for f in refused.value.findings if f.severity == "error"]
    return str(error)


def same(frame: pd.DataFrame, expected: pd.DataFrame | None = None) -> None:
    expected = matrix() if expected is None else expected
    expected = expected.loc[list(frame.index), list(frame.columns)]
    assert len(frame) == len(expected)
    np.testing.assert_array_equal(frame, expected.astype(np.float32).astype(float))
