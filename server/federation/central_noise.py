"""What the server does for privacy: noise on the sum of sites, and epsilon so far.

Patient-level noise is the sites' own; here it is only counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedgex.common.privacy import accounting
from fedgex.common.privacy.secure_random import SecretRandom
from fedgex.common.study import SitePrivacy, Study
from fedgex.server.federation.aggregation import Array

ROUNDING = 1e-3
"""Share by which a change may be longer than the clip: what float16 can add."""


def longest(rule: SitePrivacy) -> float:
    """Return the greatest norm of a site's change that is accepted."""
    return rule.clip * (1 + ROUNDING)


def noised(
    mean: Mapping[str, Array], rule: SitePrivacy, n_contributors: int
) -> dict[str, Array]:
    """Return the mean of the sites' changes with the noise of site-level privacy.

    To be called once for a round, on the equal-weight mean of changes no longer than
    `longest`; whether the incoming parameters were added to it does not matter. The
    noise cannot be repeated. A server that is killed and begins the round again draws
    other noise, and only one of the two is ever seen: a round's parameters leave the
    process with the checkpoint that commits them, and no earlier.

    Parameters
    ----------
    mean
        Every number that the sites' changes were averaged to.
    n_contributors
        Sites that the mean is over; who contributed is no secret.

    References
    ----------
    McMahan et al. (2018), Learning differentially private recurrent language models.
    """
    secret = SecretRandom()
    std = rule.noise_multiplier * longest(rule) / n_contributors
    return {
        name: (
            array + secret.normal(array.shape, std).numpy().astype(np.float64)
        ).astype(array.dtype)
        for name, array in mean.items()
    }


def spent(study: Study, phase: str, number: int) -> dict[str, float] | None:
    """Return epsilon once a round is done, of each guarantee that the study makes.

    Parameters
    ----------
    number
        Of the round in its phase, from 1; all rounds before it count.

    Returns
    -------
    dict or None
        "patient": what the study's rounds so far cost a patient, wherever; a site that
        missed some has spent less. "site": what they cost a site. None without either.
    """
    done = _rounds(study, phase, number)
    found = {}
    if (rule := study.privacy.patient) is not None:
        history = [
            each for at in done for each in accounting.invocations(study, at[0], at[1])
        ]
        found["patient"] = accounting.epsilon(history, rule.delta, rule.accountant)
    if study.privacy.site is not None:
        found["site"] = accounting.site_epsilon(study, len(done))
    return found or None


def _rounds(study: Study, phase: str, number: int) -> list[tuple[str, int]]:
    """Return phase and number of every round up to this one."""
    done = []
    for name, training in study.phases.items():
        last = number if name == phase else training.rounds
        done += [(name, i) for i in range(1, last + 1)]
        if name == phase:
            break
    return done
