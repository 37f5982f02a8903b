"""Comparison of the federation with local, pooled and simple models.

Only the method developer can compute these, since they need pooled rows. Every method
is judged on the same hold-out patients, cells and panels as the federated model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common import federation
from fedgex.common.data.dataset import Patients
from fedgex.common.evaluation.imputers import Imputer, NearestNeighbours, fit_mixture
from fedgex.common.evaluation.survival import kaplan_meier, logrank_p
from fedgex.common.models import tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.models.losses import eligible
from fedgex.common.models.tasks import Parameters
from fedgex.common.study import (
    CLASSIFICATION,
    SURVIVAL,
    Privacy,
    StrategyRule,
    Study,
)
from fedgex.server import evaluation
from fedgex.simulations import resumable, training
from fedgex.simulations.baselines import references

PANEL_SIZES = (8, 16, 32, 64, 128, 256)
LOCAL, POOLED = "alone", "pooled"


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A finished federation, with the rows that only a simulation may see."""

    final: Checkpoint
    sites: Mapping[str, Patients]
    """Patients of the sites that took part, standardised as in the run."""
    holdout: Patients
    start: Parameters | None
    """Model before the first round, if it comes from the public cohort."""
    public: Patients | None
    """Public cohort, on which each fine-tuning begins."""

    @property
    def study(self) -> Study:
        """The study that was run."""
        return self.final.study

    @cached_property
    def pooled(self) -> Patients:
        """All sites' patients in order of site name."""
        return Patients.joined([self.sites[name] for name in sorted(self.sites)])


def train_all(
    finished: Federation,
    kinds: set[str],
    folder: Path,
    workers: int,
    console: Console,
) -> dict[str, Parameters]:
    """Train without federation, for as many epochs as the federated model.

    Parameters
    ----------
    kinds
        LOCAL (each site by itself), POOLED (all together).
    folder
        Of finished models; those already there are not trained again.

    Returns
    -------
    dict
        Parameters of each model, by POOLED, or LOCAL and site.
    """
    rows = {POOLED: finished.pooled} if POOLED in kinds else {}
    if LOCAL in kinds:
        rows |= {f"{LOCAL}-{name}": own for name, own in finished.sites.items()}
    jobs = {folder / f"{name}.safetensors": (name, own) for name, own in rows.items()}
    train = partial(_train, finished.final, finished.start, finished.public)
    resumable.compute_all(train, jobs, workers, console, itemgetter(0))
    return {path.stem: resumable.load(path) for path in jobs}


def _train(
    final: Checkpoint,
    start: Parameters | None,
    public: Patients | None,
    job: tuple[str, Patients],
) -> Parameters:
    """Train every phase on one set of patients, as a federation of one site.

    Without privacy, its update is the next model. A phase in which no patient can take
    part is left out. Without `start` the linear start comes from the patients.
    """
    (name, patients), study = job, final.study
    if start is None:
        start = tasks.initial(study, len(final.vocabulary))
        if study.linear_rank:
            least = study.minimum_cohort
            groups = federation.cross_products(study, patients, least)
            start |= tasks.mixture(study, groups)
    by_itself = study.model_copy(
        update={
            "minimum_cohort": 1,
            "privacy": Privacy(),
            "secure_aggregation": None,
            "strategy": StrategyRule(name="fedavg", weights="equal", per_gene=False),
        }
    )
    model = training.model_of(
        by_itself, final.vocabulary, final.standardisation, start, [name]
    )
    return training.train(model, {name: patients}, public=public).parameters


def imputation(finished: Federation) -> dict[str, Any]:
    """Judge nearest neighbours and the mixture by cancer type, from pooled rows."""
    study, pooled = finished.study, finished.pooled
    values = pooled.values.numpy()
    imputers: dict[str, Imputer] = {"knn": NearestNeighbours(values)}
    typed = {i: name for i, name in enumerate(pooled.cancer_type) if name is not None}
    if len(set(typed.values())) > 1:
        imputers["mixture"] = fit_mixture(values[list(typed)], list(typed.values()))
    rule = finished.holdout, study.evaluation, study.seed
    return {
        name: evaluation.as_numbers(evaluation.evaluate_imputer(imputer, *rule))
        for name, imputer in imputers.items()
    }


def survival(
    finished: Federation, models: Mapping[str, Parameters]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return C-index tables, and Kaplan-Meier curves by federated risk, per cohort."""
    study, holdout = finished.study, finished.holdout
    table: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    if SURVIVAL not in study.phases:
        return table, curves
    risks = {
        name: evaluation.predict_risk(study, model, holdout)
        for name, model in (*models.items(), ("federated", finished.final.parameters))
    }
    for cohort in study.survival.cancer_types:
        table[cohort] = {
            name: evaluation.evaluate_risk(holdout, cohort, risks[name])
            for name in ("federated", POOLED)
            if name in risks
        }
        table[cohort][LOCAL] = _mean_local(finished, cohort, risks)
        table[cohort] |= _cox(finished.pooled, holdout, cohort, study.seed)
        curves |= _curves(holdout, cohort, risks["federated"])
    return table, curves


def classification(
    finished: Federation, models: Mapping[str, Parameters]
) -> dict[str, Any]:
    """Return accuracy and macro-F1 against panel size, for every method."""
    study, genes = finished.study, finished.final.vocabulary.genes
    if CLASSIFICATION not in study.phases:
        return {}
    sizes = [size for size in PANEL_SIZES if size < len(genes)] + [len(genes)]
    able = {
        f"{LOCAL}-{name}"
        for name, rows in finished.sites.items()
        if len(set(eligible(study, CLASSIFICATION, rows).cancer_type)) > 1
    }
    named, holdout = (
        {**models, "federated": finished.final.parameters},
        finished.holdout,
    )
    table: dict[str, Any] = {}
    for size, panel in references.panels(genes, sizes, study.seed).items():
        seen = torch.tensor([gene in set(panel) for gene in genes])
        scores = {"logistic": [_logistic(finished, seen)]}
        for name, model in named.items():
            alone = name.startswith(f"{LOCAL}-")
            if not alone or name in able:
                found = evaluation.evaluate_classes(study, model, holdout, seen)
                scores.setdefault(LOCAL if alone else name, []).append(found)
        for name, several in scores.items():
            accuracy, macro_f1 = np.mean(several, axis=0).tolist()
            numbers = {"accuracy": accuracy, "macro_f1": macro_f1}
            table.setdefault(name, {})[str(size)] = numbers
    return table


def _mean_local(
    finished: Federation, cohort: str, risks: Mapping[str, NDArray[np.float32]]
) -> dict[str, Any]:
    """Return the mean C-index over sites that have the minimum cohort of this type.

    The SD is that between sites.
    """
    study = finished.study
    judged = [
        evaluation.evaluate_risk(finished.holdout, cohort, risks[f"{LOCAL}-{name}"])
        for name, patients in finished.sites.items()
        if f"{LOCAL}-{name}" in risks
        and eligible(study, SURVIVAL, patients).cancer_type.count(cohort)
        >= study.minimum_cohort
    ]
    if not judged:
        nobody = evaluation.evaluate_risk(
            finished.holdout, cohort, np.full(len(finished.holdout), np.nan)
        )
        return nobody | {"reason": "no site has the minimum cohort of this type"}
    found = [one["c_index"] for one in judged if one["c_index"] is not None]
    if not found:
        return judged[0]
    return judged[0] | {
        "c_index": float(np.mean(found)),
        "sd": float(np.std(found, ddof=1)) if len(found) > 1 else None,
        "reason": f"mean over {len(found)} sites",
    }


def _cox(
    pooled: Patients, holdout: Patients, cohort: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Judge the two simple Cox models, trained on the pooled patients of a type."""
    rows = torch.tensor([name == cohort for name in pooled.cancer_type])
    rows &= (pooled.duration > 0) & ~pooled.event.isnan()
    train_rows = pooled.take(rows.nonzero().squeeze(1))
    of_type = [i for i, name in enumerate(holdout.cancer_type) if name == cohort]
    test = holdout.values.nan_to_num(0.0).numpy()[of_type]
    x = train_rows.values.nan_to_num(0.0).numpy()
    duration, event = train_rows.duration.numpy(), train_rows.event.numpy()
    ridge = partial(references.cox_ridge, seed=seed)
    scores = {}
    for name, fit in (("cox_ridge", ridge), ("pca_cox", references.pca_cox)):
        risk = np.full(len(holdout), np.nan)
        if event.sum() >= evaluation.MIN_EVENTS:
            risk[of_type] = fit(x, duration, event, test)
        scores[name] = evaluation.evaluate_risk(holdout, cohort, risk)
    return scores


def _curves(
    holdout: Patients, cohort: str, risk: NDArray[np.float32]
) -> dict[str, Any]:
    """Return survival of the patients below and above the median risk."""
    of_type = np.array([name == cohort for name in holdout.cancer_type])
    rows = of_type & (holdout.duration > 0).numpy() & ~holdout.event.isnan().numpy()
    if rows.sum() < 2 or holdout.event.numpy()[rows].sum() < evaluation.MIN_EVENTS:
        return {}
    duration, event = holdout.duration.numpy()[rows], holdout.event.numpy()[rows]
    high = risk[rows] > np.median(risk[rows])
    curve: dict[str, Any] = {"logrank_p": logrank_p(duration, event, high)}
    for name, group in (("low", ~high), ("high", high)):
        days, alive = kaplan_meier(duration[group], event[group])
        curve[name] = {
            "days": days.tolist(),
            "survival": alive.tolist(),
            "patients": int(group.sum()),
        }
    return {cohort: curve}


def _logistic(finished: Federation, seen: torch.Tensor) -> tuple[float, float]:
    classes = finished.study.classification.classes
    known = []
    for patients in (finished.pooled, finished.holdout):
        target = patients.type_index(classes)
        values = patients.values.nan_to_num(0.0)[target >= 0][:, seen]
        known.append((values.numpy(), target[target >= 0].numpy()))
    (x, y), (test, truth) = known
    return evaluation.class_scores(truth, references.logistic(x, y, test))
