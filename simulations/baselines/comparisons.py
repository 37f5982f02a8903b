"""What the federation is compared with: each site alone, all pooled, simple methods.

The method developer alone can compute these, since they need pooled rows. Every method
is judged on the same hold-out patients, cells and panels as the federated model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgex.client.data.cohort import load_cohort
from fedgex.client.settings import SiteSettings
from fedgex.common import federation
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
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
from fedgex.simulations.processes import process_pool

PANEL_SIZES = (8, 16, 32, 64, 128, 256)
POOLED = "pooled"
Told = Callable[[str, int, int], None]
"""Called with a step's name, how many of its parts are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A finished federation, with the rows that only a simulation may see."""

    final: Checkpoint
    sites: Mapping[str, Patients]
    holdout: Patients
    start: Parameters | None
    """The model before the first round, if it comes from the public cohort: everybody
    may begin with it."""
    public: Patients | None
    """The public cohort, on which everybody may begin a phase."""

    @property
    def study(self) -> Study:
        """The study that was run."""
        return self.final.study

    @property
    def pooled(self) -> Patients:
        """All sites' patients in order of site name."""
        return Patients.joined([self.sites[name] for name in sorted(self.sites)])


def open_federation(
    final: Checkpoint,
    sites_dir: Path,
    names: list[str],
    holdout: Patients,
    start: Parameters | None,
    public: Patients | None,
) -> Federation:
    """Read the patients of the sites that took part, standardised as in the run."""
    sites = {}
    for name in names:
        settings = SiteSettings.load(sites_dir / name / "site.toml")
        phases = tuple(final.study.phases)
        cohort, _ = load_cohort(settings, final.study.scale, phases)
        sites[name] = to_patients(cohort, final.vocabulary, final.standardisation)
    return Federation(
        final=final, sites=sites, holdout=holdout, start=start, public=public
    )


def train_all(
    finished: Federation, kinds: set[str], folder: Path, workers: int, told: Told
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Train without federation, for as many epochs as the federated model.

    Parameters
    ----------
    kinds
        "alone" (each site by itself), "pooled" (all together).
    folder
        Where finished models are kept; those already there are not trained again.

    Returns
    -------
    dict
        Parameters of each model, by site name or `pooled`.
    """
    jobs: dict[str, Patients] = {}
    if POOLED in kinds:
        jobs[POOLED] = finished.pooled
    if "alone" in kinds:
        jobs |= {f"alone-{name}": rows for name, rows in finished.sites.items()}
    paths = {name: folder / f"{name}.safetensors" for name in jobs}
    todo = [name for name in jobs if not paths[name].exists()]
    told("training for comparison", len(jobs) - len(todo), len(jobs))
    with process_pool(workers) as pool:
        running = [
            pool.submit(
                _train_and_save,
                finished.final,
                name,
                jobs[name],
                finished.start,
                finished.public,
                paths[name],
            )
            for name in todo
        ]
        for done, future in enumerate(as_completed(running), len(jobs) - len(todo) + 1):
            future.result()
            told("training for comparison", done, len(jobs))
    return {name: resumable.load(path) for name, path in paths.items()}


def train(
    study: Study,
    name: str,
    patients: Patients,
    start: Parameters | None,
    public: Patients | None,
    scale: Standardisation,
    genes: Vocabulary,
) -> dict[str, NDArray[np.float32]]:
    """Train every phase on one set of patients; return the state dict.

    A federation of one site without privacy: its update is the next model. A phase that
    no patient can take part in is left out.

    Parameters
    ----------
    start
        Model to begin with; without it a new one, its linear start from the patients.
    public
        Public cohort to begin each fine-tuning on.
    """
    if start is None:
        first: dict[str, NDArray[np.float32]] = tasks.initial(study, len(genes))
        if study.linear_rank:
            least = study.minimum_cohort
            groups = federation.cross_products(study, patients, least)
            first |= tasks.mixture(study, groups)
    else:
        first = dict(start)
    by_itself = study.model_copy(
        update={
            "minimum_cohort": 1,
            "privacy": Privacy(),
            "secure_aggregation": None,
            "strategy": StrategyRule(name="fedavg", weights="equal", per_gene=False),
        }
    )
    model = training.model_of(by_itself, genes, scale, first, [name])
    trained = training.train(model, {name: patients}, public=public)
    return dict(trained.parameters)


def imputation(finished: Federation, told: Told) -> dict[str, Any]:
    """Judge nearest neighbours and the mixture by cancer type, from pooled rows."""
    study, pooled = finished.study, finished.pooled
    values = pooled.values.numpy()
    imputers: dict[str, Imputer] = {"knn": NearestNeighbours(values)}
    typed = {i: name for i, name in enumerate(pooled.cancer_type) if name is not None}
    if len(set(typed.values())) > 1:
        imputers["mixture"] = fit_mixture(values[list(typed)], list(typed.values()))
    scores = {}
    for done, (name, imputer) in enumerate(imputers.items()):
        told("reference imputers", done, len(imputers))
        judged = evaluation.evaluate_imputer(
            imputer, finished.holdout, study.evaluation, study.seed
        )
        scores[name] = evaluation.as_numbers(judged)
    told("reference imputers", len(imputers), len(imputers))
    return scores


def survival(
    finished: Federation, models: Mapping[str, tasks.Parameters], told: Told
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return C-index tables, and Kaplan-Meier curves by federated risk, per cohort."""
    study, holdout, pooled = finished.study, finished.holdout, finished.pooled
    if SURVIVAL not in study.phases:
        return {}, {}
    risks = {
        name: evaluation.predict_risk(study, m, holdout) for name, m in models.items()
    }
    risks["federated"] = evaluation.predict_risk(
        study, finished.final.parameters, holdout
    )
    table: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    types = study.survival.cancer_types
    for done, cohort in enumerate(types):
        told("reference survival models", done, len(types))
        judged = {
            name: evaluation.evaluate_risk(holdout, cohort, risk)
            for name, risk in risks.items()
            if name in ("federated", POOLED)
        }
        judged["alone"] = _mean_alone(finished, cohort, risks)
        judged |= _cox(pooled, holdout, cohort, study.seed)
        table[cohort] = judged
        curves |= _curves(holdout, cohort, risks["federated"])
    told("reference survival models", len(types), len(types))
    return table, curves


def classification(
    finished: Federation, models: Mapping[str, tasks.Parameters], told: Told
) -> dict[str, Any]:
    """Return accuracy and macro-F1 against panel size, for every method."""
    study, genes = finished.study, finished.final.vocabulary.genes
    if CLASSIFICATION not in study.phases:
        return {}
    sizes = [size for size in PANEL_SIZES if size < len(genes)] + [len(genes)]
    panels = references.panels(genes, sizes, study.seed)
    named = dict(models)
    named["federated"] = finished.final.parameters
    table: dict[str, Any] = {}
    for done, (size, panel) in enumerate(panels.items()):
        told("reference classifiers", done, len(panels))
        seen = torch.tensor([gene in set(panel) for gene in genes])
        scores = {
            name: evaluation.evaluate_classes(study, model, finished.holdout, seen)
            for name, model in named.items()
            if not name.startswith("alone-") or _can_classify(finished, name)
        }
        alone = [score for name, score in scores.items() if name.startswith("alone-")]
        kept = {n: s for n, s in scores.items() if not n.startswith("alone-")}
        if alone:
            kept["alone"] = (
                float(np.mean([accuracy for accuracy, _ in alone])),
                float(np.mean([f1 for _, f1 in alone])),
            )
        kept["logistic"] = _logistic(finished, seen)
        for name, (accuracy, macro_f1) in kept.items():
            numbers = {"accuracy": accuracy, "macro_f1": macro_f1}
            table.setdefault(name, {})[str(size)] = numbers
    told("reference classifiers", len(panels), len(panels))
    return table


def _train_and_save(
    final: Checkpoint,
    name: str,
    patients: Patients,
    start: Parameters | None,
    public: Patients | None,
    path: Path,
) -> None:
    trained = train(
        final.study,
        name,
        patients,
        start,
        public,
        final.standardisation,
        final.vocabulary,
    )
    resumable.save(path, trained)


def _mean_alone(
    finished: Federation, cohort: str, risks: Mapping[str, NDArray[np.float32]]
) -> dict[str, Any]:
    """Return the mean C-index over sites that have the minimum cohort of this type.

    The SD is that between sites.
    """
    study = finished.study
    able = [
        f"alone-{name}"
        for name, patients in finished.sites.items()
        if eligible(study, SURVIVAL, patients).cancer_type.count(cohort)
        >= study.minimum_cohort
    ]
    judged = [
        evaluation.evaluate_risk(finished.holdout, cohort, risks[name])
        for name in able
        if name in risks
    ]
    if not judged:
        nobody = evaluation.evaluate_risk(
            finished.holdout, cohort, np.full(len(finished.holdout), np.nan)
        )
        return nobody | {"reason": "no site has the minimum cohort of this type"}
    found = [one["c_index"] for one in judged if one["c_index"] is not None]
    if not found:
        return judged[0]
    spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
    reason = f"mean over {len(found)} sites"
    return judged[0] | {
        "c_index": float(np.mean(found)),
        "sd": spread,
        "reason": reason,
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
    scores = {}
    for name in ("cox_ridge", "pca_cox"):
        risk = np.full(len(holdout), np.nan)
        if event.sum() >= evaluation.MIN_EVENTS:
            risk[of_type] = (
                references.cox_ridge(x, duration, event, test, seed)
                if name == "cox_ridge"
                else references.pca_cox(x, duration, event, test)
            )
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


def _can_classify(finished: Federation, name: str) -> bool:
    """Whether a site has two cancer types to tell apart."""
    patients = finished.sites[name.removeprefix("alone-")]
    return len(set(eligible(finished.study, CLASSIFICATION, patients).cancer_type)) > 1


def _logistic(finished: Federation, seen: torch.Tensor) -> tuple[float, float]:
    classes = finished.study.classification.classes
    known = []
    for patients in (finished.pooled, finished.holdout):
        target = patients.type_index(classes)
        values = patients.values.nan_to_num(0.0)[target >= 0][:, seen]
        known.append((values.numpy(), target[target >= 0].numpy()))
    (x, y), (test, truth) = known
    return evaluation.class_scores(truth, references.logistic(x, y, test))
