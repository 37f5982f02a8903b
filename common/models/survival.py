"""Survival losses, baseline hazard and predicted survival, all on tensors.

B patients, E of whom died, K follow-up intervals, M distinct days of death. Durations
are in days and above zero; an event is 1 for an observed death and 0 for a censored
patient; a higher log-hazard means an earlier death.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every PyTorch reader knows
from torch import Tensor


def cox_loss(
    log_hazard: Tensor, duration: Tensor, event: Tensor, strata: Tensor | None = None
) -> Tensor:
    """Return the negative log partial likelihood, averaged over the observed events.

    Each death asks: of all patients then under observation, how likely was it this
    one? The answer is a softmax over the risk set. So row i of an (E, B) table of
    weights holds 1 for each patient at risk at death i and 0 for the others, and the
    loss of death i is the log of the weighted sum of hazards less its own log-hazard.
    Efron's correction lets d deaths of one day leave the risk set one by one, but as
    their order is unknown, each is there in part: for the l-th of them (l = 0 to
    d - 1) all d weigh 1 - l/d. Strata change only who is in whose risk set.

    The loss divides into neither patients nor sites, unless the sites are strata
    (Andreux et al. 2020); then its average over sites is weighted by events. Time and
    memory grow with E times B.

    Parameters
    ----------
    log_hazard
        Shape (B,), finite.
    duration
        Days, shape (B,). A patient censored on a day of death was at risk on that day.
    event
        0 or 1, or bool, shape (B,).
    strata
        Integers, shape (B,); risk sets do not reach across strata. None: one stratum.

    Returns
    -------
    Tensor
        A scalar, 0 or more; 0 with zero gradient where no event was observed.

    References
    ----------
    Efron (1977), JASA 72:557-565. Andreux et al. (2020), arXiv 2006.08997.
    """
    died = event.bool()
    at_risk = duration >= duration[died, None]  # (E, B)
    tied = died & (duration == duration[died, None])
    if strata is not None:
        same = strata == strata[died, None]
        at_risk, tied = at_risk & same, tied & same
    place = torch.arange(len(duration), device=duration.device)
    gone = (tied & (place < place[died, None])).sum(1, keepdim=True)  # (E, 1), l
    share = gone.to(log_hazard.dtype) / tied.sum(1, keepdim=True)  # l / d
    weight = at_risk.to(share.dtype) - share * tied  # (E, B)
    log_risk = torch.logsumexp(log_hazard + weight.log(), dim=1)  # (E,)
    return (log_risk - log_hazard[died]).sum() / died.sum().clamp(min=1)


def intervals(
    duration: Tensor, event: Tensor, ends: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Cut follow-up into intervals, and mark who was at risk and who died in each.

    The first interval starts on day 0 and each includes its end, so that surviving
    interval k means living longer than `ends[k]` days. A death counts in the interval
    it falls into. A censored patient has survived the intervals that were followed for
    at least half, and is not at risk in the others (Gensheimer and Narasimhan 2019).
    A patient who lives past the last end has survived all intervals, dead later or not.

    Parameters
    ----------
    duration
        Days, shape (B,).
    event
        0 or 1, or bool, shape (B,).
    ends
        Days on which the K intervals end, rising, above 0.

    Returns
    -------
    at_risk, died
        Bool, each of shape (B, K). Who died in an interval was at risk in it. A patient
        censored in the first half of the first interval is at risk in none.

    References
    ----------
    Gensheimer and Narasimhan (2019), PeerJ 7:e6257 (nnet-survival).
    """
    end = torch.as_tensor(ends, dtype=duration.dtype, device=duration.device)  # (K,)
    start = F.pad(end[:-1], (1, 0))
    time, observed = duration[:, None], event.bool()[:, None]
    at_risk = torch.where(observed, time > start, time >= (start + end) / 2)
    return at_risk, observed & (time > start) & (time <= end)


def discrete_time_loss(logits: Tensor, at_risk: Tensor, died: Tensor) -> Tensor:
    """Return the negative log-likelihood of discrete-time hazards per patient.

    It is summed over intervals and averaged over patients; so is the pooled loss the
    average of the sites' losses weighted by patients.

    Parameters
    ----------
    logits
        Log-odds of dying in an interval for who enters it, shape (B, K).
    at_risk, died
        From `intervals`, each of shape (B, K).

    Returns
    -------
    Tensor
        A scalar, 0 or more; 0 with zero gradient where nobody was at risk.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits, died.to(logits.dtype), weight=at_risk.to(logits.dtype), reduction="sum"
    )
    return loss / max(len(logits), 1)


def survival_probability(logits: Tensor) -> Tensor:
    """Return the probability of surviving past each interval's end, shape (B, K).

    The product of 1 - hazard over the intervals so far, with hazards given as log-odds
    `logits` of shape (B, K); it starts below 1 and never rises.
    """
    return F.logsigmoid(-logits).cumsum(dim=1).exp()


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineHazard:
    """Cumulative hazard of a patient whose log-hazard is 0: a step on each death.

    Its times are days on which patients died, so it stays where the patients are.
    """

    times: Tensor
    """Days on which a death was observed, rising, shape (M,)."""
    cumulative: Tensor
    """Cumulative hazard from each of these days on, shape (M,)."""


def breslow(log_hazard: Tensor, duration: Tensor, event: Tensor) -> BaselineHazard:
    """Estimate the baseline hazard that goes with log-hazards of a Cox model.

    On each day of death it rises by the deaths over the summed hazards at risk.

    Parameters
    ----------
    log_hazard
        Shape (B,).
    duration
        Days, shape (B,).
    event
        0 or 1, or bool, shape (B,). Without any event the estimate has no steps.

    References
    ----------
    Breslow (1972), discussion of Cox, J. R. Stat. Soc. B 34:216-217.
    """
    died = event.bool()
    times, deaths = duration[died].unique(return_counts=True)  # each (M,)
    at_risk = duration >= times[:, None]  # (M, B)
    log_risk = log_hazard.masked_fill(~at_risk, -torch.inf).logsumexp(dim=1)
    step = (deaths.to(log_hazard.dtype).log() - log_risk).exp()
    return BaselineHazard(times=times, cumulative=step.cumsum(0))


def predict_survival(
    baseline: BaselineHazard, log_hazard: Tensor, times: Tensor
) -> Tensor:
    """Return the probability of living longer than each time.

    Parameters
    ----------
    baseline
        From `breslow`, with log-hazards of the same model.
    log_hazard
        Shape (B,).
    times
        Days, shape (K,). After the last observed death survival stays as it was then.

    Returns
    -------
    Tensor
        Shape (B, K).
    """
    steps = torch.searchsorted(baseline.times, times, right=True)  # (K,)
    cumulative = F.pad(baseline.cumulative, (1, 0))[steps]
    return torch.exp(-cumulative * log_hazard.exp()[:, None])
