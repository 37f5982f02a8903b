"""A contract whose numbers void differential privacy, or hang a hospital's accountant.

What a person approves is what `study show` computes of the contract, so numbers for
which that does not hold are refused as the contract is read.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from fedgex.client.training import dp_sgd
from fedgex.common.errors import ConfigError
from fedgex.common.privacy import accounting
from fedgex.common.privacy.accounting import PRV_STEPS, Invocation
from fedgex.common.privacy.secure_random import SecretRandom
from fedgex.common.study import PatientPrivacy, Study

SMALLEST, LARGEST = 1e-6, 1e6
"""Clipping norms."""
STUDY: dict[str, Any] = {
    "name": "edges",
    "strategy": {"name": "fedavg", "weights": "equal"},
    "public": {"statistics": True},
    "privacy": {
        "patient": {
            "noise_multiplier": 1.0,
            "delta": 1e-5,
            "clip": 1.0,
            "sample_rate": 0.5,
        }
    },
}


def study(**changes: float) -> Study:
    patient = STUDY["privacy"]["patient"] | changes
    return Study.read(STUDY | {"privacy": {"patient": patient}}, "a contract")


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 3e-43},
        {"clip": 1e-46},
        {"clip": 1e7},
        {"noise_multiplier": 1e5},
        {"label_noise": 1e5},
        {"sample_rate": 1e-9},
        *({key: math.inf} for key in ("clip", "noise_multiplier", "label_noise")),
        *({key: math.nan} for key in ("clip", "noise_multiplier", "delta")),
    ],
)
def test_numbers_with_which_nothing_is_private_are_refused_as_they_are_read(
    changes: dict[str, float],
) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        study(**changes)


def test_more_steps_than_can_be_accounted_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="10,000,000 or less"):
        study(sample_rate=2e-6)


def floats(of: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of each number with a point, through all sections."""
    found = []
    for name, field in of.model_fields.items():
        kinds = {field.annotation, *getattr(field.annotation, "__args__", ())}
        if float in kinds:
            found.append((*path, name))
        sections = [
            k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)
        ]
        for section in sections:
            found += floats(section, (*path, name))
    return found


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("path", floats(Study), ids=".".join)
def test_no_number_of_a_study_is_infinite(path: tuple[str, ...], value: float) -> None:
    values: dict[str, Any] = {"name": "edges"}
    *sections, name = path
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = [value] if name in ("interval_ends", "rates") else value

    with pytest.raises(ConfigError, match=rf"{'.'.join(path)}.*finite number"):
        Study.read(values, "a contract")


def test_the_settings_looked_at_are_all_there_are() -> None:
    assert ("privacy", "patient", "clip") in floats(Study)
    assert ("privacy", "site", "noise_multiplier") in floats(Study)
    assert len(floats(Study)) > 30


@pytest.mark.parametrize("clip", [SMALLEST, 1e-3, 1.0, LARGEST])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e12, 1e30])
def test_no_patients_part_of_a_step_is_longer_than_the_clip(
    clip: float, scale: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    gradients = scale * torch.randn(2, 200_000, generator=rng)
    for row in gradients:
        part = summed(row[None], clip)
        assert part.dtype == torch.float64
        assert float(part.norm()) <= clip
        direction = row.double() / row.double().norm()
        length = min(float(row.double().norm()), clip)
        torch.testing.assert_close(part, length * direction, rtol=1e-9, atol=0)


def summed(gradients: torch.Tensor, clip: float) -> torch.Tensor:
    """Return the sum of the clipped gradients (B, n) of a step."""
    weight = nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer = dp_sgd.SecretOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        SecretRandom(),
        noise_multiplier=1.0,
        max_grad_norm=clip,
        expected_batch_size=1,
    )
    weight.grad_sample = gradients.clone()  # type: ignore[attr-defined]
    optimizer.clip_and_accumulate()
    found: torch.Tensor = weight.summed_grad  # type: ignore[attr-defined]
    return found


def test_the_sum_of_patients_does_not_round_one_away_beside_another() -> None:
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1e-9]])

    total = summed(gradients, clip=1.0)

    assert float(total[1]) == pytest.approx(1e-9, rel=1e-6)


def test_the_noise_has_more_digits_than_the_model() -> None:
    drawn = SecretRandom().normal((1000,), 1.0)

    assert drawn.dtype == torch.float64
    assert not torch.equal(drawn, drawn.float().double())


def test_many_steps_are_accounted_for_by_the_quick_bound() -> None:
    many = Invocation(noise_multiplier=0.3, sample_rate=1e-6, steps=10 * PRV_STEPS)

    spent = accounting.epsilon([many], 1e-5)

    assert spent == accounting.epsilon([many], 1e-5, "rdp")


def test_the_smallest_and_largest_clip_are_those_of_the_settings() -> None:
    for clip in (SMALLEST, LARGEST):
        rule = PatientPrivacy(
            noise_multiplier=1.0, delta=1e-5, clip=clip, sample_rate=0.5
        )
        assert rule.clip == clip
