"""Imputation methods, and their errors on the test sets, cached.

N patients, V genes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import norm
from torch import Tensor

from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.dataset import Patients
from fedgex.common.evaluation.imputation import restoration
from fedgex.common.evaluation.imputers import (
    Float,
    GaussianImputer,
    Imputer,
    MeanImputer,
    NearestNeighbours,
    fit_mixture,
    ppca,
)
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.common.models.gexbert import GexBert, select
from fedgex.common.models.tasks import Parameters
from fedgex.common.models.uncertainty import restore_with_uncertainty
from fedgex.common.study import Study
from fedgex.server.evaluation import model_imputer
from fedgex.simulations import resumable
from fedgex.simulations.evaluation.arms import (
    FEDERATED,
    LOCAL,
    LOCAL_SITES,
    POOLED,
    arms,
    models,
)
from fedgex.simulations.evaluation.protocol import Split
from fedgex.simulations.evaluation.test_sets import TestSet

QUICK_LOCAL = 2
"""Sites with a local model under --quick."""

MEAN, KNN, GAUSSIAN, MIXTURE = "mean", "knn", "gaussian", "mixture"
PPCA_RANKS = (32, 128)
REFERENCES = (MEAN, KNN, *(f"ppca-{r}" for r in PPCA_RANKS), GAUSSIAN, MIXTURE)
LINEAR, UNCERTAINTY = "linear start", "spread"
LABELS = {
    MEAN: "gene mean",
    KNN: "10 nearest neighbours",
    "ppca-32": "PPCA, rank 32",
    "ppca-128": "PPCA, rank 128",
    GAUSSIAN: "Gaussian conditional mean",
    MIXTURE: "mixture by cancer type",
    FEDERATED: "ours, federated",
    LINEAR: "ours, network switched off",
    POOLED: "ours, pooled",
    LOCAL: f"ours, local ({LOCAL_SITES} largest sites)",
}
"""Labels of the methods, in the order of the tables."""
PATTERNS: dict[str, str] = {
    "mcar": "missing completely at random",
    "panel": "only a panel's genes measured",
    "mnar": "low expression drops out",
}
BY_GENE = "mcar 0.5"
"""Setting of the comparison gene by gene."""
LEVELS = tuple(k / 20 for k in range(1, 20))
"""Nominal coverages of the intervals."""

Found = Mapping[str, Any]
"""Content of a file: test set, then setting, to numbers."""


class LinearImputer:
    """Imputer by the linear start of a backbone without its network."""

    def __init__(self, linear: MixtureOfFactorAnalyzers, batch_size: int = 64) -> None:
        self.linear = linear
        self.batch_size = batch_size

    @torch.no_grad()
    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Fill the NaN cells of standardised values (N, V)."""
        filled = values.copy()
        every = torch.arange(values.shape[1])
        for start in range(0, len(values), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = torch.as_tensor(values[rows], dtype=torch.float32)
            missing = batch.isnan()
            genes, keep = select(~missing)
            given = batch.gather(1, genes).nan_to_num(0.0)
            known = self.linear(genes, given, keep)
            restored = self.linear.restore(known, every.expand(len(batch), -1))
            filled[rows][missing.numpy()] = restored[missing].numpy()
        return filled


Job = tuple[str, int, Parameters | None]
"""A key of LABELS, UNCERTAINTY or one site's arm; the seed; and the parameters, if the
method is one of ours."""


def collect(
    split: Split, test_sets: Sequence[TestSet], console: Console
) -> pd.DataFrame:
    """Return the results of every method and seed.

    Keys: cohort (name of the test set), setting, method, seed, metric, and group: the
    number of an institution, a gene or a level, if the metric has several.
    """
    seen = [split.genes.hash, *(c.n_patients for c in split.sites.values())]
    asked = [[e.name, len(e.patients), repr(e.rules)] for e in test_sets]
    key = resumable.digest(json.dumps([seen, asked]))
    folder = split.folder / "imputation"
    jobs: dict[Path, Job] = {}
    for seed in split.seeds:
        for method in REFERENCES:
            jobs[folder / f"{method}-{seed}-{key}.json"] = method, seed, None
        most = QUICK_LOCAL if split.quick else LOCAL_SITES
        for arm, model in models(split, arms(split, seed, most_local=most), console):
            methods = [arm.name]
            if arm.name == FEDERATED and arm.study.linear_rank:
                methods += [LINEAR, UNCERTAINTY]
            named = sorted(model.parameters.items())
            own = resumable.digest(*(part for pair in named for part in pair))
            for method in methods:
                path = folder / f"{method.replace(' ', '-')}-{seed}-{key}-{own}.json"
                jobs[path] = method, seed, model.parameters
    resumable.compute_all(
        partial(_compute, split.study, test_sets, split.pooled),
        jobs,
        split.workers,
        console,
        lambda job: f"evaluated {job[0]}, seed {job[1]}",
    )
    found: dict[tuple[str, int], list[Found]] = {}
    for path, (method, seed, _) in jobs.items():
        method = LOCAL if method.startswith(f"{LOCAL}-") else method
        found.setdefault((method, seed), []).append(resumable.load(path))
    order = [*LABELS, UNCERTAINTY]
    return pd.DataFrame(
        [
            dict(zip(("method", "seed", *_KEYS, "value"), (*key, *row), strict=True))
            for key in sorted(found, key=lambda each: (order.index(each[0]), each[1]))
            for row in _rows([each.name for each in test_sets], found[key])
            if key[0] != LOCAL or not row[2].startswith("gene_")
        ]
    )


_KEYS = ("cohort", "setting", "metric", "group")


def _rows(cohorts: Sequence[str], found: Sequence[Found]) -> list[tuple[Any, ...]]:
    """Return test set, setting, metric, group and value, the mean over models."""

    def place(setting: str) -> tuple[int, float]:
        pattern, key = setting.split(" ")
        return list(PATTERNS).index(pattern), float(key)

    return [
        (cohort, setting, metric, group, value)
        for cohort in sorted(found[0], key=cohorts.index)
        for setting in sorted(found[0][cohort], key=place)
        for metric in found[0][cohort][setting]
        for group, value in enumerate(
            np.atleast_1d(
                np.mean([each[cohort][setting][metric] for each in found], axis=0)
            ).tolist()
        )
    ]


def _compute(
    study: Study, test_sets: Sequence[TestSet], pooled: Patients, job: Job
) -> Found:
    """Return the results of a method on every test set; of UNCERTAINTY on the first."""
    method, seed, parameters = job
    n_genes = pooled.values.shape[1]
    if parameters is None:
        imputer = _reference(method, pooled)
        return {each.name: evaluate(imputer, each, seed) for each in test_sets}
    ours = model_imputer(study, parameters, n_genes)
    if method == UNCERTAINTY:
        return {test_sets[0].name: _uncertainty(ours.backbone, test_sets[0], seed)}
    imputer = ours
    if method == LINEAR:
        assert ours.backbone.encoder.linear is not None
        imputer = LinearImputer(ours.backbone.encoder.linear)
    return {each.name: evaluate(imputer, each, seed) for each in test_sets}


def evaluate(imputer: Imputer, test_set: TestSet, seed: int) -> dict[str, Any]:
    """Return the error of an imputer at each setting of a test set.

    Returns
    -------
    dict
        By setting: mse; by_group, that of each group in order of name;
        at BY_GENE also gene_mse and gene_pearson, each of length V.
    """
    true = test_set.patients.values.numpy()
    found: dict[str, Any] = {}
    groups = [test_set.group == name for name in np.unique(test_set.group)]
    for setting, hidden in test_set.settings(seed):
        restored = imputer.impute(np.where(hidden, np.float32(np.nan), true))
        score = restoration(true, restored, hidden)
        square = np.where(hidden, restored - true, 0.0) ** 2
        sums = [(square[rows].sum(), hidden[rows].sum()) for rows in groups]
        by_group = [float(total / n) if n else math.nan for total, n in sums]
        found[setting] = {"mse": score.mse, "by_group": by_group}
        if setting == BY_GENE:
            found[setting]["gene_mse"] = score.gene_mse.tolist()
            found[setting]["gene_pearson"] = score.gene_pearson.tolist()
    return found


def _reference(method: str, pooled: Patients) -> Imputer:
    """Return an imputer of REFERENCES, fitted to pooled rows."""
    values = pooled.values.numpy()
    if method == MEAN:
        return MeanImputer()
    if method == KNN:
        return NearestNeighbours(values)
    if method == MIXTURE:
        typed = {i: t for i, t in enumerate(pooled.cancer_type) if t is not None}
        return fit_mixture(values[list(typed)], list(typed.values()))
    covariance = CrossProducts.of(values).covariance()
    if method == GAUSSIAN:
        return GaussianImputer(covariance)
    rank = int(method.removeprefix("ppca-"))
    return ppca(covariance, min(rank, values.shape[1] - 1))


def _uncertainty(backbone: GexBert, test_set: TestSet, seed: int) -> dict[str, Any]:
    """Return coverage and width of the intervals of the hidden values, by setting."""
    true = test_set.patients.values
    found: dict[str, Any] = {}
    for setting, hidden in test_set.settings(seed):
        gone = torch.from_numpy(hidden)
        given = torch.where(gone, torch.nan, true)
        mean, sd = restore_with_uncertainty(backbone, given)
        found[setting] = coverage(true[gone], mean[gone], sd[gone])
    return found


def coverage(true: Tensor, mean: Tensor, sd: Tensor) -> dict[str, Any]:
    """Return the share of values within central intervals of a Gaussian.

    Parameters
    ----------
    true, mean, sd
        Of each restored cell, shape (C,).

    Returns
    -------
    dict
        held, share of the values within the interval of each of LEVELS; width, of
        the 95 % interval in the mean, SD of the gene; square, mean squared error over
        its own variance.
    """
    z = ((true - mean) / sd).abs().numpy()
    half = norm.ppf(0.5 + np.array(LEVELS) / 2)
    return {
        "held": [float((z <= h).mean()) for h in half],
        "width": float(2 * norm.ppf(0.975) * sd.mean()),
        "square": float((z.astype(np.float64) ** 2).mean()),
    }
