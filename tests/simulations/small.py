"""Scenarios and data small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedgex.simulations.data import synthetic
from fedgex.simulations.scenario import Scenario


def scenario(study: dict[str, Any], **sections: Any) -> Scenario:
    """Return the scenario of such data and, but for what is given, of a small study."""
    values = {
        "study": {
            "name": "small",
            "minimum_cohort": 5,
            "pretraining": {"rounds": 1, "batch_size": 32},
            "strategy": {"name": "fedavg", "weights": "equal"},
        }
        | study,
        "data": {
            "expression": "expression.parquet",
            "scale": "log2p1",
            "clinical": "clinical.csv",
        },
        "sites": {"column": "institution", "minimum_patients": 10},
        "holdout": {"institutions": ["Hold-out 01", "Hold-out 02"]},
        "run": {"workers": 1},
    }
    return Scenario.read(values | sections, "test")


def new_data(factory: pytest.TempPathFactory, **sizes: int) -> Path:
    """Write data of two cancer types and return their folder."""
    folder = factory.mktemp("data") / "data"
    synthetic.new_data(folder, n_cancer_types=2, **sizes)
    return folder
