"""Site-level noise of the server, and the epsilon spent so far.

Patient-level noise is added by the sites; here it is only accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedgex.common.privacy import accounting
from fedgex.common.privacy.secure_random import SecretRandom
from fedgex.common.study import SitePrivacy, Study
from fedgex.server.federation.aggregation import Array

ROUNDING = 1e-3
"""Tolerance on the clipping norm, for rounding to float16."""


def longest(rule: SitePrivacy) -> float:
    """Return the largest accepted norm of a site's change."""
    return rule.clip * (1 + ROUNDING)


def noised(
    mean: Mapping[str, Array], rule: SitePrivacy, n_contributors: int
) -> dict[str, Array]:
    """Add the noise of site-level privacy to the mean of the sites' changes.

    Call it once per round, on the equal-weight mean of changes no longer than
    `longest`, with or without the global parameters added. A restarted server draws new
    noise for a repeated round, but only one draw is ever visible: a round's parameters
    leave the process with the checkpoint that commits them.

    Parameters
    ----------
    mean
        Mean of the sites' changes, by parameter.
    n_contributors
        Number of sites in the mean; it is not secret.

    References
    ----------
    McMahan et al. (2018), Learning differentially private recurrent language models.
    """
    secret = SecretRandom()
    std = rule.noise_multiplier * longest(rule) / n_contributors
    return {
        name: (array + secret.normal(array.shape, std).numpy()).astype(array.dtype)
        for name, array in mean.items()
    }


def spent(study: Study, phase: str, number: int) -> dict[str, float] | None:
    """Return the epsilon after a round, for each guarantee of the study.

    Parameters
    ----------
    number
        Number of the round in its phase, from 1.

    Returns
    -------
    dict or None
        "patient": epsilon of a patient whose site missed no round. "site": epsilon of a
        site. None without either guarantee.
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
