"""Raw data of five institutions in two cohorts, and the scenario that splits them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedgex.simulations.scenario import Scenario

# Patients by cohort and institution, in that order. North spans both cohorts; East and
# West have fewer than three patients.
PATIENTS = {
    "LUAD": {"North": 3, "South": 4, "East": 2, "Held Out": 2},
    "BRCA": {"North": 2, "West": 1, "Held Out": 3},
}
GENES = {"LUAD": ["A", "B", "C"], "BRCA": ["A", "B", "D"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write two expression files and one clinical table, and return their folder."""
    folder = tmp_path / "data"
    (folder / "rna").mkdir(parents=True)
    rows = []
    for cohort, institutions in PATIENTS.items():
        ids = []
        for institution, n in institutions.items():
            for i in range(n):
                ids.append(f"{cohort}-{institution[:4]}-{i}".replace(" ", "_"))
                rows.append((ids[-1], institution, 100.0 + i, i % 2, 60, "FEMALE"))
        values = np.arange(3 * len(ids), dtype=np.float32).reshape(-1, 3)
        table = pd.DataFrame(values, pd.Index(ids, name="patient"), GENES[cohort])
        table.to_parquet(folder / "rna" / f"{cohort}.parquet")
    columns = ["patient", "hospital", "os_days", "os_event", "age", "sex"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "clinical.csv", index=False)
    return folder


def scenario(**changes: dict[str, Any]) -> Scenario:
    """Return the scenario of the data above, with `changes` to its sections."""
    values: dict[str, dict[str, Any]] = {
        "study": {"name": "test", "minimum_cohort": 2},
        "data": {
            "expression": "rna/*.parquet",
            "scale": "log2p1",
            "clinical": "clinical.csv",
            "cancer_type_from": "file",
            "columns": {"duration": "os_days", "event": "os_event"},
        },
        "sites": {"column": "hospital", "minimum_patients": 3},
        "holdout": {"institutions": ["Held Out"]},
    }
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change
    return Scenario.read(values, "test")
