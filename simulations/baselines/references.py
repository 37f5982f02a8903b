"""Reference models on pooled rows, which a simulation compares with the federated one.

Arguments, unless a function says otherwise: `train`, expression of N training rows and
G genes, shape (N, G); `duration` (days) and `event` (0 or 1) of these, shape (N,);
`test`, shape (T, G). A Cox model returns log-hazards of the test rows up to a constant,
shape (T,); all zero if no event was observed.

Every model standardises the genes with the mean and standard deviation of its training
rows. A missing value (NaN) becomes the gene's training mean; a gene that the training
rows lack, or that never varies in them, has no influence. The models are those of
scikit-learn and lifelines, but for one that lifelines fits too slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from lifelines import CoxPHFitter
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fedgex.common.errors import ConfigError
from fedgex.common.evaluation.survival import stratified_c_index
from fedgex.common.models.survival import cox_loss

Floats = NDArray[np.floating[Any]]

N_FOLDS = 5
"""Folds of the cross-validation that chooses the strength of the ridge."""
PENALTIES = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
"""Ridges to choose from, for a loss averaged over events; the strongest first."""
PCA_PENALTY = 0.1
"""Ridge on principal components scaled to unit variance: just enough to be stable."""
CLINICAL_PENALTY = 0.01
"""Ridge on clinical covariates, scaled likewise: nothing but a fence against those that
do not vary among those who died."""
LOGISTIC_C = 0.1
"""Inverse ridge of the logistic regression. Fixed, so that panels of all sizes are
treated alike: on TCGA, with institutions held out, none of 0.01, 1 and 10 was better by
more than 0.006 in accuracy at 8, 16, 64 or 256 genes."""


def cox_ridge(
    train: Floats,
    duration: Floats,
    event: Floats,
    test: Floats,
    seed: int,
    n_clinical: int = 0,
) -> Floats:
    """Return the risk of the test rows by a ridge-penalised Cox model on all genes.

    The strength of the ridge is the one of `PENALTIES` with the best C-index in a
    cross-validation on the training rows, over pairs within a fold; the strongest on a
    tie, or if no fold holds a comparable pair.

    The solver is our own. `CoxPHFitter(penalizer=...)` finds the same weights
    (correlation above 0.9999), but with 300 patients and 698 genes of kidney cancer and
    ridges of 300, 30 and 3 it took 2.7 to 3.5 s a fit on one core, where this one takes
    less than 0.1 s; to choose the ridge takes 36 fits.

    Parameters
    ----------
    seed
        Decides who is in which fold.
    n_clinical
        Last columns of `train` and `test` that are no genes but clinical covariates,
        whose ridge is CLINICAL_PENALTY, so that they need not compete with the genes.

    References
    ----------
    Verweij and van Houwelingen (1994), Stat. Med. 13:2427-2436.
    """
    train, test = _standardise(train, test)
    fold = _folds(event, seed)
    is_gene = np.arange(train.shape[1]) < train.shape[1] - n_clinical
    ridges = [np.where(is_gene, strength, CLINICAL_PENALTY) for strength in PENALTIES]
    risk = np.zeros((len(PENALTIES), len(train)))
    for k in range(N_FOLDS):
        inside, outside = fold != k, fold == k
        weight: Floats = np.zeros(train.shape[1])
        for i, ridge in enumerate(ridges):
            weight = _fit_cox(
                train[inside], duration[inside], event[inside], ridge, weight
            )
            risk[i, outside] = train[outside] @ weight
    scores = [stratified_c_index(duration, event, r, fold) for r in risk]
    best = int(np.argmax(np.nan_to_num(scores)))
    start = np.zeros(train.shape[1])
    return test @ _fit_cox(train, duration, event, ridges[best], start)


def clinical_cox(
    train: Floats, duration: Floats, event: Floats, test: Floats
) -> Floats:
    """Return the risk by a Cox model on clinical covariates, ridge CLINICAL_PENALTY.

    Covariates stand in the columns of `train` and `test`.
    """
    train, test = _standardise(train, test)
    ridge = np.full(train.shape[1], CLINICAL_PENALTY)
    return test @ _fit_cox(train, duration, event, ridge, np.zeros(len(ridge)))


def pca_cox(
    train: Floats,
    duration: Floats,
    event: Floats,
    test: Floats,
    n_components: int = 32,
) -> Floats:
    """Return the risk of the test rows by a Cox model on principal components.

    Parameters
    ----------
    n_components
        Components of the training rows; fewer if these have a lower rank.
    """
    train, test = _standardise(train, test)
    if not event.any() or not train.any():
        return np.zeros(len(test))
    pca = PCA(min(n_components, *train.shape), svd_solver="full").fit(train)
    kept = pca.singular_values_ > 1e-8 * pca.singular_values_[0]
    frame = pd.DataFrame(pca.transform(train)[:, kept])
    frame = frame.assign(duration=duration, event=event)
    # lifelines averages its loss over patients, not events.
    model = CoxPHFitter(penalizer=PCA_PENALTY * event.mean())
    model.fit(frame, "duration", "event")
    risk = model.predict_log_partial_hazard(pd.DataFrame(pca.transform(test)[:, kept]))
    log_hazard: Floats = risk.to_numpy()
    return log_hazard


def logistic(train: Floats, labels: NDArray[Any], test: Floats) -> NDArray[Any]:
    """Return the labels of the test rows (T,) by multinomial logistic regression.

    `labels` are of the training rows, shape (N,), two or more distinct ones.
    """
    train, test = _standardise(train, test)
    model = LogisticRegression(C=LOGISTIC_C, max_iter=1000).fit(train, labels)
    predicted: NDArray[Any] = model.predict(test)
    return predicted


def panels(
    genes: Sequence[str], sizes: Sequence[int], seed: int
) -> dict[int, tuple[str, ...]]:
    """Draw nested random gene panels, by size; each contains all smaller ones.

    Every method that is compared sees these genes; they depend on the set of `genes`
    and the seed, not on the order of `genes` or on the other sizes.

    Raises
    ------
    ConfigError
        If a panel is to hold no gene, or more than there are.
    """
    wrong = [size for size in sizes if not 1 <= size <= len(set(genes))]
    if wrong:
        raise ConfigError(
            f"panel sizes {', '.join(map(str, wrong))} with {len(set(genes))} genes; "
            "expected sizes from 1 to the number of genes. Correct the sizes."
        )
    order = np.random.default_rng(seed).permutation(sorted(set(genes)))
    return {size: tuple(sorted(map(str, order[:size]))) for size in sizes}


def _standardise(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Return both on the scale of the training rows, gaps at its mean."""
    known = ~np.isnan(train)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, train, 0).sum(0) / count
    deviation = np.where(known, train - mean, 0)
    spread = np.sqrt(np.square(deviation).sum(0) / count)
    varies = spread > 1e-6
    scale = np.where(varies, 1 / np.where(varies, spread, 1), 0)
    return deviation * scale, np.nan_to_num(test - mean) * scale


def _folds(event: Floats, seed: int) -> NDArray[np.int64]:
    """Deal rows to folds at random, as evenly as they go, and so the events."""
    chance = np.random.default_rng(seed).random(len(event))
    fold = np.empty(len(event), dtype=np.int64)
    fold[np.lexsort((chance, event))] = np.arange(len(event)) % N_FOLDS
    return fold


def _fit_cox(
    x: Floats, duration: Floats, event: Floats, penalty: Floats, start: Floats
) -> Floats:
    """Return the weights (G,) that minimise Cox loss + penalties / 2 * their squares.

    Parameters
    ----------
    penalty
        Of each weight, shape (G,).
    """
    x_, duration_, event_, penalty_ = (
        torch.as_tensor(a, dtype=torch.float64) for a in (x, duration, event, penalty)
    )
    weight = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = cox_loss(x_ @ weight, duration_, event_)
        loss = loss + (penalty_ / 2 * weight.square()).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach().numpy()
