"""What an audit report permits, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import ConfigError
from fedgex.common.privacy.audit_report import AuditReport

from ...conftest import attack

STUDY, MODEL = "a" * 64, "b" * 64


def report(kind: str = "hospital", **highs: float) -> AuditReport:
    """Return a report with one attack for each kind of training and its upper end."""
    attacks = [attack(training, high) for training, high in highs.items()]
    values: dict[str, Any] = {
        "kind": kind,
        "study": "small",
        "study_hash": STUDY,
        "model": MODEL if kind == "hospital" else None,
        "membership": attacks,
    }
    return AuditReport.read(values, "test")


def test_the_upper_end_of_the_interval_decides() -> None:
    assert report(released=0.6).objection(STUDY, MODEL, 0.6) is None
    objection = report(released=0.61).objection(STUDY, MODEL, 0.6)
    assert objection is not None
    assert "0.610" in objection
    assert "0.600" in objection


def test_a_hospitals_report_counts_for_its_model_alone() -> None:
    assert "another one" in str(report(released=0.5).objection(STUDY, "c" * 64, 0.9))


def test_a_simulation_counts_for_its_study_alone() -> None:
    made = report("simulation", plain=0.5)

    assert made.objection(STUDY, "c" * 64, 0.9) is None
    assert "another one" in str(made.objection("d" * 64, MODEL, 0.9))


def test_the_model_without_the_studys_privacy_does_not_count() -> None:
    made = report("simulation", plain=0.99, private=0.55)

    assert made.objection(STUDY, MODEL, 0.6) is None


def test_a_report_without_an_attack_permits_nothing() -> None:
    assert "no membership attack" in str(report().objection(STUDY, MODEL, 0.9))


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(report(released=0.6).to_json())

    assert AuditReport.load(path) == report(released=0.6)


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 1}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "audit.json"
    path.write_text(text)

    with pytest.raises(ConfigError, match=r"audit\.json"):
        AuditReport.load(path)
