"""What an audit found, as the document that `audit` writes and a release may demand.

The format stands in docs/audit.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedgex.common import parsing
from fedgex.common.settings import Digest, Settings

CONFIDENCE = 0.95
"""Of every interval and bound."""

Share = Annotated[float, Field(ge=0, le=1)]
Way = Literal["loss", "likelihood-ratio"]
Task = Literal["restoration", "classification"]
Training = Literal["plain", "private", "released"]
"""How the attacked model was made: without privacy or with it, both simulated; or it is
a model at hand."""


@dataclass(frozen=True)
class Estimate:
    """A number that was measured, and its interval at CONFIDENCE."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Roc:
    """How well scores tell members from non-members."""

    members: int
    non_members: int
    auc: Estimate
    """0.5 is guessing, 1 is certainty."""
    tpr: dict[float, Estimate | None]
    """Share of the members found, by the share of non-members taken for members; None
    where there are too few non-members, see `attacks.NEEDED`."""


class Interval(Settings):
    """A share between 0 and 1 and its interval at the report's confidence."""

    value: Share
    low: Share
    high: Share

    @classmethod
    def of(cls, found: Estimate) -> Interval:
        """Return what an attack found."""
        return cls(value=found.value, low=found.low, high=found.high)


class Found(Settings):
    """Share of the members that an attack finds at one false positive rate."""

    false_positive_rate: Share
    true_positive_rate: Interval | None
    """None: not estimable."""
    note: str = ""
    """Why it is not."""


class Membership(Settings):
    """A membership attack on one model."""

    training: Training
    attack: Way
    task: Task
    """Task whose loss the attack reads."""
    members: int
    non_members: int
    auc: Interval
    found: tuple[Found, ...]

    @classmethod
    def of(cls, roc: Roc, training: Training, attack: Way, task: Task) -> Membership:
        """Return how an attack did."""
        return cls(
            training=training,
            attack=attack,
            task=task,
            members=roc.members,
            non_members=roc.non_members,
            auc=Interval.of(roc.auc),
            found=tuple(
                Found(
                    false_positive_rate=rate,
                    true_positive_rate=None if at is None else Interval.of(at),
                    note=""
                    if at is not None
                    else f"not estimable, {roc.non_members} non-members",
                )
                for rate, at in roc.tpr.items()
            ),
        )


class CanaryTest(Settings):
    """Lower bound of epsilon from canaries, and the epsilon that the study claims."""

    training: Training
    canaries: int
    guesses: int
    correct: int
    delta: float
    least_epsilon: float
    """At the report's confidence epsilon is no lower."""
    claimed_epsilon: float | None
    """None: nothing is claimed."""


class Inversion(Settings):
    """How well patients are recovered from one gradient."""

    training: Training
    batch: int
    """Patients that the gradient was computed from."""
    correlation: float
    best_correlation: float
    mse: float
    mse_of_mean: float


class AuditReport(Settings):
    """All that an audit found."""

    format: Literal[1] = 1
    kind: Literal["simulation", "hospital"]
    """A simulated federation, or a hospital's own patients and a model at hand."""
    study: str
    study_hash: Digest
    model: Digest | None = None
    """SHA-256 of the manifest of the model at hand; None in a simulation."""
    confidence: Share = CONFIDENCE
    membership: tuple[Membership, ...]
    canaries: tuple[CanaryTest, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    notes: tuple[str, ...] = ()
    """Limits of the numbers, in sentences."""

    def to_json(self) -> str:
        """Return the report as it is written, for people and scripts."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> AuditReport:
        """Read a report.

        Raises
        ------
        ConfigError
            If the file cannot be read, or is no report.
        """
        expected = "the audit.json that an audit wrote (docs/audit.md)"
        content = parsing.read_bytes(path, expected)
        values = parsing.json_object(content, f"{path}:", expected)
        return cls.read(values, str(path))

    def objection(self, study_hash: str, model: str, max_auc: float) -> str | None:
        """Return why this report does not permit a model's release, None if it does.

        Parameters
        ----------
        study_hash
            Of the model's study. A simulation counts if it is of this study.
        model
            SHA-256 of the model's manifest. A hospital's report counts if it is of
            this model.
        max_auc
            Most that the upper end of the AUC's interval may be, in every membership
            attack on what is released; attacks on a simulation without the study's
            privacy do not count.
        """
        of_this = (
            self.study_hash == study_hash
            if self.kind == "simulation"
            else self.model == model
        )
        if not of_this:
            found, expected = (
                (self.study_hash, f"a simulation of the study {study_hash[:12]}")
                if self.kind == "simulation"
                else (self.model or "none", f"an audit of the model {model[:12]}")
            )
            return (
                f"the audit report is of another one ({found[:12]}); expected "
                f"{expected}"
            )
        private = any(each.training == "private" for each in self.membership)
        counted = [
            each
            for each in self.membership
            if not (private and each.training == "plain")
        ]
        if not counted:
            return "the audit report holds no membership attack; expected one or more"
        worst = max(counted, key=lambda each: each.auc.high)
        if worst.auc.high <= max_auc:
            return None
        return (
            f"the upper end of the AUC's interval is {worst.auc.high:.3f} "
            f"({worst.attack} attack, {worst.task}); the contract permits "
            f"{max_auc:.3f} at most"
        )
