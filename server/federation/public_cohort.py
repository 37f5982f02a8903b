"""Load and check the server's cohorts: the public one, and the hold-out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedgex.common.errors import ConfigError
from fedgex.common.study import PRETRAINING, SURVIVAL, Study

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
    # torch, which most callers do not need
    from fedgex.common.federation import MIN_PUBLIC_PATIENTS

    require(study, folder)
    if not is_wanted(study) or folder is None:
        return None

    cohort = _read(study, folder)
    if cohort.n_patients < MIN_PUBLIC_PATIENTS:
        raise ConfigError(
            f"the public cohort in {folder} has {cohort.n_patients} patients; expected "
            f"{MIN_PUBLIC_PATIENTS} or more. Put a larger one there, or leave "
            "study.public out."
        )
    return cohort


def load_both(
    study: Study, holdout: Path | None, public: Path | None, *, begins: bool = True
) -> tuple[Cohort | None, Cohort | None]:
    """Read hold-out and public cohort, before any site is asked anything.

    Each is None if there is none, or the study does not use it.

    Parameters
    ----------
    begins
        Whether anything that begins on the public cohort is to come.

    Raises
    ------
    ConfigError
        With all that is wrong with either, or that both hold the same patients.
    """
    problems, judging, known = [], None, None
    try:
        if holdout is not None:
            judging = _read(study, holdout)
            problems += _strange_holdout(study, judging, holdout)
    except ConfigError as error:
        problems.append(str(error))
    try:
        known = load(study, public) if begins else None
        if known is not None and study.public.statistics:
            _require_genes(study, known)
    except ConfigError as error:
        problems.append(str(error))
    if judging is not None and known is not None:
        try:
            require_apart(judging, known)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return judging, known


def _read(study: Study, folder: Path) -> Cohort:
    # pandas, which most callers do not need
    from fedgex.common.data.cohort import load_cohort

    return under_names_of(study, load_cohort(folder, study.scale))


def under_names_of(study: Study, cohort: Cohort) -> Cohort:
    """Return a cohort whose genes have the study's names, be these retired or not."""
    from fedgex.common.data.genes import spelt_as

    return replace(cohort, genes=spelt_as(cohort.genes, study.vocabulary.genes))


def require_apart(one: Cohort, other: Cohort) -> None:
    """Raise ConfigError if the hold-out and the public cohort share patients."""
    if both := len(set(one.keys) & set(other.keys)):
        raise ConfigError(
            f"{both} patients are in the hold-out and in the public cohort: who trains "
            "cannot judge. Make one of them without these patients (data.opt_outs)."
        )


def gaps(study: Study, cohort: Cohort) -> list[str]:
    """Return what a study asks for and a cohort lacks, one sentence each."""
    found = []
    asked = study.vocabulary.genes
    if lacking := set(asked) - set(cohort.genes):
        found.append(f"{len(lacking)} of the study's {len(asked)} genes are not there")
    types = {*study.classification.classes, *study.survival.cancer_types}
    there = {*cohort.clinical.get("cancer_type", ())}
    phases = set(study.phases) - {PRETRAINING}
    if phases and (absent := sorted(types - there)):
        found.append(f"nobody has the cancer types {', '.join(absent)}")
    if SURVIVAL in phases and not cohort.with_survival().any():
        found.append("nobody has a follow-up with duration and event")
    return found


def _strange_holdout(study: Study, cohort: Cohort, folder: Path) -> list[str]:
    asked = set(study.vocabulary.genes)
    if not asked or asked & set(cohort.genes):
        return []
    return [
        f"the hold-out in {folder} has none of the study's {len(asked)} genes; "
        "expected those that it can be judged on. Make it again with "
        "fedgex-admin cohort build, or take it away to leave judging out."
    ]


def _require_genes(study: Study, cohort: Cohort) -> None:
    from fedgex.common.data.vocabulary import Vocabulary
    from fedgex.common.federation import public_standardisation

    if study.vocabulary.genes:
        genes = tuple(sorted(study.vocabulary.genes))
        public_standardisation(cohort, Vocabulary(genes))
