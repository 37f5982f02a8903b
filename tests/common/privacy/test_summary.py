"""What people are told about a study's protections."""

from typing import Any

from fedgex.common.privacy.summary import protections
from fedgex.common.study import Study

from ...conftest import OF_DELTAS

PATIENT = {"delta": 1e-4, "clip": 1, "sample_rate": 0.1}


def lines(**changes: Any) -> list[str]:
    return protections(Study.read({"name": "test"} | changes, "test"))


def test_a_plain_study_says_that_nothing_protects_the_updates():
    (line,) = lines()

    assert line.startswith("None: updates leave as they are")


def test_each_protection_has_a_line_of_its_own():
    site = {"noise_multiplier": 1, "clip": 1, "delta": 1e-3}

    told = lines(
        **OF_DELTAS,
        privacy={"patient": PATIENT | {"epsilon": 8}, "site": site},
        secure_aggregation={},
        rounds={"quorum": 3},
    )

    patient, hospital, sums, statistics = told
    assert "epsilon at most 8 at delta 0.0001 for each patient" in patient
    assert "at delta 0.001 for each hospital" in hospital
    assert "only the sum of the updates" in sums
    assert "no hospital sends its own" in statistics


def test_epsilon_follows_from_the_noise_where_that_is_given():
    noise = PATIENT | {"noise_multiplier": 5, "sample_rate": 1}

    strong, weak = (
        lines(**OF_DELTAS, pretraining={"rounds": n}, privacy={"patient": noise})[0]
        for n in (1, 30)
    )

    def epsilon(line: str) -> float:
        return float(line.partition("epsilon ")[2].split()[0])

    assert 0 < epsilon(strong) < epsilon(weak)
