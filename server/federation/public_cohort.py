"""Load the server's public cohort, if a study uses one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedgex.common.errors import ConfigError
from fedgex.common.study import Study

if TYPE_CHECKING:
    from fedgex.common.data.cohort import Cohort

FOLDER = "public"
"""Folder of the public cohort in the consortium's state directory."""


def is_wanted(study: Study) -> bool:
    """Return whether the study uses a public cohort."""
    return study.public.statistics or study.public.epochs > 0


def require(study: Study, folder: Path | None) -> None:
    """Raise ConfigError if the study uses a public cohort and there is none."""
    if not is_wanted(study) or (folder is not None and folder.is_dir()):
        return
    where = "no folder is named" if folder is None else f"{folder} does not exist"
    raise ConfigError(
        f'the study "{study.name}" takes statistics or pretraining from a public '
        f"cohort, and {where}. Put a public cohort there (docs/server-operation.md; "
        "in a scenario, [public] institutions), or leave study.public out."
    )


def load(study: Study, folder: Path | None) -> Cohort | None:
    """Read the public cohort; None if the study does not use one.

    Raises
    ------
    ConfigError
        If it is missing, or has too few patients.
    """
    # pandas and torch, which most callers do not need
    from fedgex.common.data.cohort import load_cohort
    from fedgex.common.federation import MIN_PUBLIC_PATIENTS

    require(study, folder)
    if not is_wanted(study) or folder is None:
        return None

    cohort = load_cohort(folder)
    if cohort.n_patients < MIN_PUBLIC_PATIENTS:
        raise ConfigError(
            f"the public cohort in {folder} has {cohort.n_patients} patients; expected "
            f"{MIN_PUBLIC_PATIENTS} or more. Put a larger one there, or leave "
            "study.public out."
        )
    return cohort
