"""Sentences that describe how a study protects patients and hospitals."""

from __future__ import annotations

from collections.abc import Iterator

from fedgex.common.privacy import accounting
from fedgex.common.study import PatientPrivacy, SitePrivacy, Study

NOTHING = (
    "None: updates leave as they are, and the server sees each; patients' rows stay "
    "where they are."
)


def protections(study: Study) -> list[str]:
    """Return a sentence for each protection; one that says so if there is none."""
    return list(_sentences(study)) or [NOTHING]


def _sentences(study: Study) -> Iterator[str]:
    if study.privacy.patient is not None:
        yield _patient(study, study.privacy.patient)
    if study.privacy.site is not None:
        yield _site(study, study.privacy.site)
    if study.secure_aggregation is not None:
        yield "Secure aggregation: the server sees only the sum of the updates."
    if study.public.statistics:
        yield (
            "Public statistics: means, standard deviations and the factor model come "
            "from the server's public cohort; no hospital sends its own."
        )


def _patient(study: Study, rule: PatientPrivacy) -> str:
    if rule.epsilon is not None:
        spent = f"at most {rule.epsilon:g}"
    else:
        history = accounting.planned(study)
        spent = f"{accounting.epsilon(history, rule.delta, rule.accountant):.3g}"
    return (
        f"Patient-level differential privacy: epsilon {spent} at delta {rule.delta:g} "
        "for each patient over all planned rounds; each hospital makes its own noise."
    )


def _site(study: Study, rule: SitePrivacy) -> str:
    rounds = sum(training.rounds for training in study.phases.values())
    return (
        "Site-level differential privacy: epsilon "
        f"{accounting.site_epsilon(study, rounds):.3g} at delta {rule.delta:g} for "
        "each hospital over all planned rounds; the server makes the noise, and is "
        "trusted."
    )
