"""Attacks on a model, and the privacy bounds that follow; reads and writes no files.

    losses of each patient -> scores -> ROC: AUC, TPR at a low FPR
    losses under shadow models -> likelihood ratios -> scores
    scores of canaries -> guesses -> least epsilon that they allow
    one gradient -> the patients that it was computed from

A score is higher for those whom the attack takes for members. N patients, M models, V
genes, B patients in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import beta, binom, norm, rankdata
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedgex.common.data.dataset import Patients
from fedgex.common.models import masking, predict
from fedgex.common.models.gexbert import GexBert, differentiable_factors
from fedgex.common.models.restoration import restoration_loss, restore
from fedgex.common.models.tasks import Classifier
from fedgex.common.privacy.audit_report import CONFIDENCE, Estimate, Roc
from fedgex.common.seeds import generator
from fedgex.common.study import CLASSIFICATION

NEEDED = {0.1: 10, 0.01: 100, 0.001: 10_000}
"""Non-members that each false positive rate needs: at 1 % one of them is a false
positive, at 0.1 % ten."""
MASK_RATES = (0.3, 0.5, 0.7) * 4
"""Shares of hidden genes in the masks of a patient's loss, equal for all patients and
models."""
MANY_SHADOWS = 64
"""From so many shadow models on a patient has a variance of its own; with fewer all
patients share one (Carlini et al. 2022, section IV-C)."""
GUESSED = (1.0, 0.3, 0.1)
"""Shares of the canaries that are guessed, half as inserted, half as omitted."""
LARGEST_EPSILON = 100.0
"""Upper end of the search for a bound."""
RATE, STEPS = 0.1, 300
"""Learning rate and steps of Adam in gradient inversion."""

Numbers = NDArray[np.floating[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CanaryBound:
    """Lower bound of epsilon from guesses about canaries."""

    canaries: int
    guesses: int
    """Canaries without abstention."""
    correct: int
    epsilon: float
    """Lower bound at CONFIDENCE."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Agreement of recovered with true patients over their measured genes."""

    correlation: float
    """Mean over the patients of Pearson's r over their genes."""
    best_correlation: float
    """Largest of these correlations."""
    mse: float
    """Mean squared error, SD^2."""
    mse_of_mean: float
    """Mean squared error of guessing each gene's mean, SD^2."""


# ---- membership ----


@torch.no_grad()
def restoration_losses(backbone: GexBert, patients: Patients, seed: int) -> Floats:
    """Return each patient's mean squared error over hidden genes, shape (N,).

    Parameters
    ----------
    seed
        Of the masks: equal seeds hide the same genes in all patients.
    """
    device = next(backbone.parameters()).device
    losses = np.zeros(len(patients))
    for start in range(0, len(patients), 64):
        values = patients.values[start : start + 64].to(device)
        measured = ~values.isnan()
        for number, rate in enumerate(MASK_RATES):
            rng = generator(seed, "attack", number)
            hidden = masking.random_panel(measured, rate, rng)
            restored = restore(backbone, values, measured & ~hidden, hidden)
            error = torch.where(hidden, restored - values, 0.0).square().sum(dim=1)
            mean = (error / hidden.sum(dim=1).clamp(min=1)).cpu().numpy()
            losses[start : start + 64] += mean / len(MASK_RATES)
    return losses


def classification_losses(
    model: Classifier, patients: Patients, classes: tuple[str, ...]
) -> Floats:
    """Return each patient's cross-entropy, shape (N,); NaN for a type of no class."""
    types = patients.type_index(classes)
    probability = predict.class_probabilities(model, patients).double()  # (N, C)
    own = probability.gather(1, types.clamp(min=0)[:, None]).squeeze(1)
    losses = -own.clamp(min=1e-12).log()
    return torch.where(types >= 0, losses, torch.nan).numpy()


def fit_of(losses: Numbers, task: str) -> Floats:
    """Return fits that are about normal, as `likelihood_ratios` wants them.

    Parameters
    ----------
    losses
        Squared errors (restoration) or cross-entropies (classification), any shape.
    """
    bounded = np.maximum(np.asarray(losses, dtype=np.float64), 1e-9)
    if task == CLASSIFICATION:
        return -np.log(np.expm1(bounded))  # log-odds of the right class
    return -np.log(bounded)


def roc(members: Numbers, non_members: Numbers) -> Roc:
    """Judge the scores of members (n,) and non-members (m,), each one or more.

    The interval of the AUC is DeLong's. Where its variance is zero, because the scores
    separate the two wholly or not at all, it is that of Clopper and Pearson over min(n,
    m) pairs of a member and a non-member, no patient in two. At a false positive rate,
    the threshold is the lowest that no more than that share of these non-members
    exceeds; the interval is Clopper and Pearson's, given that threshold.

    References
    ----------
    DeLong, DeLong and Clarke-Pearson (1988), Biometrics 44:837-845.
    """
    return Roc(
        members=len(members),
        non_members=len(non_members),
        auc=_auc(members, non_members),
        tpr={
            rate: _found(members, non_members, rate) if len(non_members) >= n else None
            for rate, n in NEEDED.items()
        },
    )


def curve(members: Numbers, non_members: Numbers) -> tuple[Floats, Floats]:
    """Return false and true positive rates over all thresholds, rising from 0 to 1."""
    thresholds = np.unique(np.concatenate([members, non_members]))[::-1]
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores)
        for scores in (non_members, members)
    ]
    false, true = (np.concatenate([[0.0], each]) for each in rates)
    return false, true


def clopper_pearson(found: float, n: int) -> tuple[float, float]:
    """Return the exact interval of a share of which `found` of n were seen."""
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if found <= 0 else float(beta.ppf(tail, found, n - found + 1))
    high = 1.0 if found >= n else float(beta.ppf(1 - tail, found + 1, n - found))
    return low, high


def likelihood_ratios(
    target: Numbers, shadows: Numbers, inside: NDArray[np.bool_]
) -> Floats:
    """Score patients by how much likelier their fit is if the model saw them (LiRA).

    Each patient's fits under the shadow models with and without the patient are taken
    as two normal distributions. With fewer than MANY_SHADOWS models all patients share
    a variance for each of the two. Where a patient is in no shadow model (the offline
    attack), the score is how many standard deviations the fit is above the mean.

    Parameters
    ----------
    target
        Fit of each patient under the audited model, higher is better, shape (N,).
        About normal: minus the log of an error, or the log-odds of the right class.
    shadows
        The same under shadow models, shape (M, N).
    inside
        Whether each shadow model was trained on each patient, shape (M, N). Every
        patient is left out of two models or more.

    Returns
    -------
    NDArray
        Log-likelihood ratios, or standard deviations, shape (N,).

    References
    ----------
    Carlini et al. (2022), Membership inference attacks from first principles, IEEE
    S&P, algorithm 1 and section IV-C.
    """
    without, sd_out = _normal(shadows, ~inside)
    if not inside.any(axis=0).all():
        return (target - without) / sd_out
    within, sd_in = _normal(shadows, inside)
    ratios: Floats = np.asarray(
        norm.logpdf(target, within, sd_in) - norm.logpdf(target, without, sd_out),
        dtype=np.float64,
    )
    return ratios


def _auc(members: Numbers, non_members: Numbers) -> Estimate:
    n, m = len(members), len(non_members)
    ranks = rankdata(np.concatenate([members, non_members]))
    # Share of the others that each one ranks above, ties half: DeLong's placements.
    above = (ranks[:n] - rankdata(members)) / m
    below = 1 - (ranks[n:] - rankdata(non_members)) / n
    auc = float(above.mean())
    variance = sum(
        float(np.var(each, ddof=1)) / len(each)
        for each in (above, below)
        if len(each) > 1
    )
    if variance <= 1e-15:
        pairs = min(n, m)
        return Estimate(auc, *clopper_pearson(auc * pairs, pairs))
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * sqrt(variance)
    return Estimate(auc, max(auc - half, 0.0), min(auc + half, 1.0))


def _found(members: Numbers, non_members: Numbers, rate: float) -> Estimate:
    allowed = floor(rate * len(non_members) + 1e-9)
    threshold = np.sort(non_members)[::-1][allowed]
    found = int((members > threshold).sum())
    return Estimate(found / len(members), *clopper_pearson(found, len(members)))


def _normal(fits: Numbers, chosen: NDArray[np.bool_]) -> tuple[Floats, Floats | float]:
    """Return mean (N,) and standard deviation, (N,) or shared, of chosen fits."""
    count = chosen.sum(axis=0)
    mean = np.where(chosen, fits, 0.0).sum(axis=0) / np.maximum(count, 1)
    square = np.where(chosen, fits - mean, 0.0) ** 2
    tiny = 1e-9
    if len(fits) >= MANY_SHADOWS:
        own = np.sqrt(square.sum(axis=0) / np.maximum(count - 1, 1))
        return mean, np.maximum(own, tiny)
    free = np.maximum(count - 1, 0).sum()
    return mean, max(sqrt(float(square.sum()) / max(int(free), 1)), tiny)


# ---- canaries ----


def canary_bound(
    scores: Numbers, inserted: NDArray[np.bool_], delta: float
) -> CanaryBound:
    """Bound epsilon from below by guesses about canaries, in one run.

    The highest and the lowest scores are guessed as inserted and omitted, all others
    are abstained from. Several shares are guessed, see GUESSED, and the best bound
    stands, each at its part of the error (Bonferroni).

    Parameters
    ----------
    scores
        Of each canary, higher for those taken as inserted, shape (m,).
    inserted
        Whether it was, by a fair coin of its own, shape (m,).
    delta
        Of the (epsilon, delta) that is put to the test.

    References
    ----------
    Steinke, Nasr and Jagielski (2023), Privacy auditing with one (1) training run,
    NeurIPS, algorithm 1 and theorem 5.2.
    """
    m = len(scores)
    order = np.argsort(scores, kind="stable")
    bounds = []
    for share in GUESSED:
        half = min(max(round(share * m / 2), 1), m // 2)
        correct = int(
            inserted[order[m - half :]].sum() + (~inserted[order[:half]]).sum()
        )
        error = (1 - CONFIDENCE) / len(GUESSED)
        least = least_epsilon(m, 2 * half, correct, delta, error)
        bounds.append(
            CanaryBound(canaries=m, guesses=2 * half, correct=correct, epsilon=least)
        )
    return max(bounds, key=lambda bound: bound.epsilon)


def least_epsilon(m: int, r: int, v: int, delta: float, error: float) -> float:
    """Return the largest epsilon that v right guesses of r refute, 0 if none.

    Parameters
    ----------
    m, r, v
        Canaries, guesses, right guesses.
    error
        Probability with which the answer may be too high.
    """
    low, high = 0.0, LARGEST_EPSILON
    if p_value(m, r, v, low, delta) >= error:
        return low
    if p_value(m, r, v, high, delta) < error:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        if p_value(m, r, v, middle, delta) < error:
            low = middle
        else:
            high = middle
    return low


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Bound the probability of v or more right guesses of r under (epsilon, delta)-DP.

    With W ~ Binomial(r, e^epsilon / (1 + e^epsilon)) it is at most

        P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i,      i = 1 ... m

    References
    ----------
    Steinke, Nasr and Jagielski (2023), theorem 5.2.
    """
    q = 1 / (1 + np.exp(-epsilon))
    bound = float(binom.sf(v - 1, r, q))
    if v and delta:
        nearest = binom.pmf(np.arange(v - 1, -1, -1), r, q).cumsum()  # i = 1 ... v
        bound += 2 * m * delta * float((nearest / np.arange(1, v + 1)).max())
    return min(bound, 1.0)


# ---- gradient inversion ----


def gradient(
    backbone: GexBert, values: Tensor, measured: Tensor, hidden: Tensor
) -> list[Tensor]:
    """Return the gradient of the restoration loss, differentiable in the values (B, V).

    Parameters
    ----------
    measured, hidden
        As in `restoration_loss`, shape (B, V).
    """
    trained = list(backbone.parameters())
    with sdpa_kernel(SDPBackend.MATH), differentiable_factors(backbone.encoder):
        loss, _ = restoration_loss(backbone, values, measured, hidden)
        parts = torch.autograd.grad(
            loss, trained, create_graph=values.requires_grad, allow_unused=True
        )
    return [
        torch.zeros_like(p) if part is None else part
        for p, part in zip(trained, parts, strict=True)
    ]


def clipped_mean(parts: Sequence[Sequence[Tensor]], clip: float) -> list[Tensor]:
    """Return the mean of patients' gradients, each scaled down to the norm `clip`.

    Parameters
    ----------
    parts
        Gradient of each patient, B of them.
    """
    scaled = []
    for own in parts:
        length = torch.stack([part.square().sum() for part in own]).sum().sqrt()
        scale = (clip / length.clamp(min=1e-12)).clamp(max=1.0)
        scaled.append([scale * part for part in own])
    return [torch.stack(every).mean(dim=0) for every in zip(*scaled, strict=True)]


def invert(
    gradient_of: Callable[[Tensor], Sequence[Tensor]],
    observed: Sequence[Tensor],
    shape: tuple[int, ...],
    rng: torch.Generator,
    *,
    noise: float = 0.0,
    steps: int = STEPS,
) -> Tensor:
    """Search the values (B, V) whose gradient is the observed one.

    Without noise each parameter's part counts by its relative squared error, so that
    small ones, which often say the most, are not drowned. With noise it is the most
    probable answer that is sought, for values that are standard normal beforehand.

    Parameters
    ----------
    noise
        Standard deviation of the normal noise on each number observed.

    References
    ----------
    Zhu, Liu and Han (2019), Deep leakage from gradients, NeurIPS.
    """
    values = (0.1 * torch.randn(shape, generator=rng)).requires_grad_()
    sizes = [float(part.square().sum()) for part in observed]
    weights = [
        1 / (2 * noise**2) if noise else 1 / size if size else 0.0 for size in sizes
    ]
    optimizer = torch.optim.Adam([values], lr=RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, least = values.detach().clone(), float("inf")
    for _ in range(steps):
        error = values.square().sum() / 2 if noise else values.new_zeros(())
        for part, seen, weight in zip(
            gradient_of(values), observed, weights, strict=True
        ):
            error = error + weight * (part - seen).square().sum()
        if error.item() < least:
            best, least = values.detach().clone(), error.item()
        (values.grad,) = torch.autograd.grad(error, [values])
        optimizer.step()
        falling.step()
    return best


def recovery(true: Tensor, recovered: Tensor) -> Recovery:
    """Compare recovered patients with the true ones, both (B, V); NaN in `true` is not.

    Patients are paired by the assignment of least squared error.
    """
    x, y = (t.double().numpy() for t in (true, recovered))
    known = ~np.isnan(x)
    errors = np.array([[_mse(a, b) for b in y] for a in x])
    rows, columns = linear_sum_assignment(errors)
    correlations = [
        _correlation(x[i, known[i]], y[j, known[i]])
        for i, j in zip(rows, columns, strict=True)
    ]
    return Recovery(
        correlation=float(np.mean(correlations)),
        best_correlation=float(np.max(correlations)),
        mse=float(errors[rows, columns].mean()),
        mse_of_mean=float(np.mean([_mse(a, np.zeros_like(a)) for a in x])),
    )


def _mse(true: Floats, guess: Floats) -> float:
    known = ~np.isnan(true)
    return float(((true - guess)[known] ** 2).mean())


def _correlation(x: Floats, y: Floats) -> float:
    """Return Pearson's r, 0 where one does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
