"""A hospital's `policy.toml`: the studies, numbers and hours that it permits."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedgex.common import keys, parsing
from fedgex.common.errors import ConfigError
from fedgex.common.settings import Settings
from fedgex.common.study import Study

FILE = "policy.toml"
"""Name of the file, in the folder of site.toml."""

TEMPLATE = """\
# What this hospital permits. No key has a default, so that each was decided by somebody.
minimum_cohort = 10                  # with fewer patients we do not participate; smaller counts are not reported
tasks = ["pretraining", "classification", "survival"]   # phases that we train
demand_privacy = false               # true: only studies with differential privacy, at patient level
privacy_epsilon = 8.0                # most that a patient may be exposed to, over all studies, for ever (epsilon)
privacy_delta = 1e-5                 # ... but for this probability; far below 1 / patients
share_cross_products = false         # sums of products of genes (linear references); they expose small sites
metrics = ["train-loss", "judged-loss", "seconds", "num-patients"]   # numbers that go with an update
hours = "00:00-24:00"                # local time when we answer; "20:00-06:00" spans midnight
memory_mb = 0                        # most memory of the training process, MiB; 0: no limit
threads = 1                          # threads that training uses; bits repeat only with the same number
message_limit_s = 3600               # a message that takes longer is stopped, seconds
"""  # noqa: E501
"""What `fedgex-site init` writes, for the hospital to change."""

Task = Literal["pretraining", "classification", "survival"]
Metric = Literal["train-loss", "judged-loss", "seconds", "num-patients"]

_TIME = r"([01]\d|2[0-3]):[0-5]\d"


class Policy(Settings):
    """One hospital's `policy.toml`. No key has a default."""

    minimum_cohort: int = Field(ge=1)
    """Small-cell threshold: fewest patients to participate with, and smallest count
    that is reported."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """Tasks that the hospital permits."""
    demand_privacy: bool
    """Refuse studies without patient-level differential privacy."""
    privacy_epsilon: float = Field(gt=0, allow_inf_nan=False)
    """Budget of each patient, over all studies, for ever; a round that would exceed it
    is declined. Studies without patient-level privacy are not counted."""
    privacy_delta: float = Field(gt=0, lt=1)
    """Probability that the budget's epsilon does not bound what is revealed of a
    patient; far below 1 / patients."""
    share_cross_products: bool
    """Permit sums of products of genes to leave, for the linear references."""
    metrics: tuple[Metric, ...]
    """Numbers that may leave with an update; `num-patients` covers terms of the loss
    too, and without it only studies that do not weight by them are possible."""
    hours: str = Field(pattern=rf"^{_TIME}-({_TIME}|24:00)$")
    """When the site answers, local time; the end is not included."""
    memory_mb: int = Field(ge=0)
    """Most memory of the process that trains, MiB; 0 for no limit."""
    threads: int = Field(ge=1)
    """Threads that training uses."""
    message_limit_s: float = Field(gt=0, allow_inf_nan=False)
    """A message that takes longer is stopped, seconds."""

    @model_validator(mode="after")
    def _hours_are_some(self) -> Self:
        begin, end = self._minutes()
        if begin == end:
            raise ValueError('no hour is within; write "00:00-24:00" for always')
        return self

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> Self:
        """Check `values`, read from `source`, and name everything wrong at once.

        Raises
        ------
        ConfigError
            If any key is unknown, missing or unusable, with the line that `fedgex-site
            init` would write for each missing one.
        """
        missing = {k: v for k, v in _proposal().items() if k not in values}
        problems = [
            f"{source}: {key} is missing, and no key of a policy has a default. "
            f"`fedgex-site init` would write: {key} = {json.dumps(value)}"
            for key, value in missing.items()
        ]
        try:
            policy = super().read({**missing, **values}, source)
        except ConfigError as error:
            raise ConfigError("\n".join([*problems, str(error)])) from error
        if problems:
            raise ConfigError("\n".join(problems))
        return policy

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `policy.toml`.

        Raises
        ------
        ConfigError
            If the file cannot be read, or any key is unknown, missing or unusable.
        """
        if not path.exists():
            raise ConfigError(
                f"{path}: is not there; expected the hospital's policy in the "
                f"folder of site.toml. `fedgex-site init` would write:\n{TEMPLATE}"
            )
        return cls.read(read_toml(path), path.name)

    @classmethod
    def proposed(cls, **changes: Any) -> Self:
        """Return the policy that `fedgex-site init` writes, but for some keys."""
        return cls.model_validate(_proposal() | changes)

    def objections(
        self, study: Study, phases: Collection[str] | None = None
    ) -> list[str]:
        """Return what the policy refuses of a study, one sentence each.

        The minimum cohort is not among them: of policy and study, the stricter counts.

        Parameters
        ----------
        phases
            Phases that are about to be trained; None: all that the study has.
        """
        found = [
            f"The study trains {phase}; policy.toml permits {', '.join(self.tasks)}."
            for phase in (study.phases if phases is None else phases)
            if phase not in self.tasks
        ]
        if self.demand_privacy and study.privacy.patient is None:
            found.append(
                "The study trains without differential privacy; policy.toml has "
                "demand_privacy = true."
            )
        weights = study.strategy.weights
        if weights in keys.WEIGHTED_BY and keys.NUM_PATIENTS not in self.metrics:
            found.append(
                f'The study weights updates by "{weights}"; policy.toml does not let '
                "num-patients leave. Weights that tell nothing are equal or fixed in "
                "the contract."
            )
        return found

    def open_at(self, at: datetime) -> bool:
        """Return whether `at` is within the hours; without a time zone it is local."""
        local = at.astimezone() if at.tzinfo is not None else at
        now = 60 * local.hour + local.minute
        begin, end = self._minutes()
        if begin < end:
            return begin <= now < end
        return now >= begin or now < end

    def _minutes(self) -> tuple[int, int]:
        """Return begin and end of the hours, minutes after midnight."""
        begin, end = (time.split(":") for time in self.hours.split("-"))
        return 60 * int(begin[0]) + int(begin[1]), 60 * int(end[0]) + int(end[1])


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of the hospital.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    return parsing.toml_table(parsing.read_bytes(path, "a TOML file"), f"{path}:")


def _proposal() -> dict[str, Any]:
    return parsing.toml_table(TEMPLATE, "the template")
