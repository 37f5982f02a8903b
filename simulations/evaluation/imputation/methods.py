"""Imputation methods, and their errors on the test sets, cached.

N patients, V genes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from fedgex.common.models.gexbert import select
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
    LOCAL: f"ours, a site alone ({LOCAL_SITES} largest)",
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


@dataclass(frozen=True, kw_only=True)
class _Material:
    """Inputs of any method, and its test sets."""

    study: Study
    test_sets: Sequence[TestSet]
    pooled: Patients
    n_genes: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    method: str
    """A key of LABELS, UNCERTAINTY, or one site's arm."""
    seed: int
    parameters: Parameters | None = None
    """Those of the model, if the method is one of ours."""


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
    jobs: dict[Path, _Job] = {}
    for seed in split.seeds:
        for method in REFERENCES:
            path = folder / f"{method}-{seed}-{key}.json"
            jobs[path] = _Job(method=method, seed=seed)
        most = QUICK_LOCAL if split.quick else LOCAL_SITES
        for arm, model in models(split, arms(split, seed, most_local=most), console):
            methods = [arm.name]
            if arm.name == FEDERATED and arm.study.linear_rank:
                methods += [LINEAR, UNCERTAINTY]
            named = sorted(model.parameters.items())
            own = resumable.digest(*(part for pair in named for part in pair))
            for method in methods:
                path = folder / f"{method.replace(' ', '-')}-{seed}-{key}-{own}.json"
                jobs[path] = _Job(method=method, seed=seed, parameters=model.parameters)
    material = _Material(
        study=split.study,
        test_sets=test_sets,
        pooled=split.pooled,
        n_genes=len(split.genes),
    )
    resumable.compute_all(
        partial(_compute, material),
        jobs,
        split.workers,
        console,
        lambda job: f"evaluated {job.method}, seed {job.seed}",
    )
    found: dict[tuple[str, int], list[Found]] = {}
    for path, job in jobs.items():
        method = LOCAL if job.method.startswith(f"{LOCAL}-") else job.method
        found.setdefault((method, job.seed), []).append(resumable.load(path))
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


def _compute(material: _Material, job: _Job) -> Found:
    if job.method == UNCERTAINTY:
        return _evaluate_uncertainty(material, job)
    imputer = _imputer(material, job)
    return {each.name: evaluate(imputer, each, job.seed) for each in material.test_sets}


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
    for setting, hidden in test_set.settings(seed):
        restored = imputer.impute(np.where(hidden, np.float32(np.nan), true))
        score = restoration(true, restored, hidden)
        square = np.where(hidden, restored - true, 0.0) ** 2
        rows = [test_set.group == name for name in np.unique(test_set.group)]
        found[setting] = {
            "mse": score.mse,
            "by_group": [
                float(square[r].sum() / hidden[r].sum())
                if hidden[r].any()
                else math.nan
                for r in rows
            ],
        }
        if setting == BY_GENE:
            found[setting]["gene_mse"] = score.gene_mse.tolist()
            found[setting]["gene_pearson"] = score.gene_pearson.tolist()
    return found


def _imputer(material: _Material, job: _Job) -> Imputer:
    if job.parameters is not None:
        ours = model_imputer(material.study, job.parameters, material.n_genes)
        if job.method != LINEAR:
            return ours
        assert ours.backbone.encoder.linear is not None
        return LinearImputer(ours.backbone.encoder.linear)
    values = material.pooled.values.numpy()
    if job.method == MEAN:
        return MeanImputer()
    if job.method == KNN:
        return NearestNeighbours(values)
    if job.method == MIXTURE:
        typed = {
            i: t for i, t in enumerate(material.pooled.cancer_type) if t is not None
        }
        return fit_mixture(values[list(typed)], list(typed.values()))
    covariance = CrossProducts.of(values).covariance()
    if job.method == GAUSSIAN:
        return GaussianImputer(covariance)
    rank = int(job.method.removeprefix("ppca-"))
    return ppca(covariance, min(rank, material.n_genes - 1))


def _evaluate_uncertainty(material: _Material, job: _Job) -> dict[str, Any]:
    """Return coverage and width of the intervals of the unseen values."""
    assert job.parameters is not None
    ours = model_imputer(material.study, job.parameters, material.n_genes)
    test_set = material.test_sets[0]
    true = test_set.patients.values
    found: dict[str, Any] = {}
    for setting, hidden in test_set.settings(job.seed):
        gone = torch.from_numpy(hidden)
        mean, sd = restore_with_uncertainty(
            ours.backbone, torch.where(gone, torch.nan, true)
        )
        found[setting] = coverage(true[gone], mean[gone], sd[gone])
    return {test_set.name: found}


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
