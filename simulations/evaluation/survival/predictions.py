"""Survival predictions of every method for the unseen patients, cached.

A prediction is an array of shape (N, 1 + K): each patient's log-hazard, then the
probability of living past each end of the study's K follow-up intervals; NaN where a
method predicts nothing. N unseen patients, T training patients of one cancer, V genes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.data.dataset import Patients
from fedgex.common.data.moments import pool
from fedgex.common.evaluation.imputers import GaussianImputer, Imputer, MeanImputer
from fedgex.common.evaluation.survival import kaplan_meier
from fedgex.common.models import masking, tasks
from fedgex.common.models import predict as predicting
from fedgex.common.models.losses import eligible
from fedgex.common.models.survival import breslow, predict_survival
from fedgex.common.seeds import derive, generator
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Study
from fedgex.server import evaluation
from fedgex.simulations import resumable
from fedgex.simulations.analysis import cox_screen
from fedgex.simulations.analysis.cox_screen import CoxScore
from fedgex.simulations.baselines import references
from fedgex.simulations.baselines.references import Floats
from fedgex.simulations.evaluation.arms import (
    FEDERATED,
    LOCAL,
    POOLED,
    Arm,
    Model,
    arms,
    models,
    train,
)
from fedgex.simulations.evaluation.protocol import Split

Predictions = dict[str, NDArray[np.float64]]
"""By method, each of shape (N, 1 + K)."""
Fit = Callable[[Floats, Floats, Floats, Floats], Floats]
"""Training rows, their days and events, test rows, to the risk of the test rows."""

COX_RIDGE = "Cox ridge"
COX_CLINICAL = "Cox ridge + clinical"
PCA_COX = "PCA + Cox"
CLINICAL_COX = "clinical Cox"
TYPE_ONLY = "cancer type only"
WITH_CLINICAL = "federated + clinical"
TUNED = "federated, tuned"
TUNED_ROUNDS = 4

PANEL = 100
"""Genes of the small panel."""
RATE = 0.5
"""Share of the values that are hidden completely at random."""
SCHEMES = {"panel": f"{PANEL} random genes", "mcar": f"{RATE:.0%} of values missing"}
DRAWS = 3
"""Panels, and patterns of hidden values, for each model."""
OURS = "federated"
GAUSSIAN = "Cox ridge, Gaussian-imputed"
CLINICAL_GAUSSIAN = "Cox ridge + clinical, Gaussian-imputed"
RESTORED = "Cox ridge, restored by the federated model"
MEAN_FILLED = "Cox ridge, mean-filled"
PANEL_TRAINED = "Cox ridge trained on the panel"

N_ANCHORS = 50
"""Genes of largest |z| in a cancer's Cox screen; at most a quarter of all genes."""


Job = tuple[Arm, Study, Model]
"""An arm, the study whose survival phase is trained, and the arm's model."""


def variants(study: Study) -> dict[str, Study]:
    """Return the study's variants that are compared, by method."""
    changes: dict[str, dict[str, Any]] = {
        OURS: {"clinical": False, "backbone": "frozen"},
        WITH_CLINICAL: {"clinical": True, "backbone": "frozen"},
        # Goes on from the trained head: hundreds of full-batch steps suit a
        # head, but are too many for an encoder, and hours of work.
        TUNED: {
            "clinical": study.survival.clinical,
            "backbone": "tuned",
            "rounds": min(study.survival.rounds, TUNED_ROUNDS),
            "local_epochs": 1,
            "batch_size": study.pretraining.batch_size,
            "learning_rate": study.survival.learning_rate / 10,
        },
    }
    return {
        name: study.model_copy(
            update={"survival": study.survival.model_copy(update=change)}
        )
        for name, change in changes.items()
    }


def survival_models(
    split: Split, seed: int, console: Console
) -> tuple[Model, dict[str, Model]]:
    """Return the federated model, and the models of every method and site.

    Each arm is trained once; a variant of its survival phase starts from the parameters
    before that phase.
    """
    kinds = (FEDERATED, POOLED) if split.quick else (FEDERATED, POOLED, LOCAL)
    jobs: dict[str, Job] = {}
    for arm, model in models(split, arms(split, seed, kinds), console):
        wanted = variants(arm.study)
        if arm.name == FEDERATED:
            federated = model
        else:  # local-SITE becomes local/SITE, which names no method
            wanted = {arm.name.replace(f"{LOCAL}-", f"{LOCAL}/", 1): wanted[OURS]}
        jobs |= {name: (arm, study, model) for name, study in wanted.items()}
    return federated, _trained(split, jobs, console)


def cached(
    split: Split, study: Study, part: str, compute: Callable[[], Predictions]
) -> Predictions:
    """Return predictions from their file, found by study and patients."""
    about = [study.hash, *split.unseen.patients, *split.genes.genes]
    for name, cohort in sorted(split.sites.items()):
        about += [name, *cohort.patients]
    name = f"{part}-{resumable.digest(json.dumps(about))}.safetensors"
    found: Predictions = resumable.cached(split.folder / "survival" / name, compute)
    return found


def of_models(
    split: Split,
    trained: Mapping[str, Model],
    unseen_sets: Mapping[str, Patients],
    screens: Mapping[str, CoxScore],
) -> Predictions:
    """Return the predictions of trained models from all genes, and from some.

    Those of the federated models also for partly visible patients, by set and method;
    and with each cancer's anchors hidden, `all/federated`.
    """
    unseen = split.patients(split.unseen)
    found = {name: _of_model(model, unseen) for name, model in sorted(trained.items())}
    for name, patients in unseen_sets.items():
        for method in (OURS, WITH_CLINICAL):
            found[f"{name}/{method}"] = _of_model(trained[method], patients)
    hidden = torch.zeros_like(unseen.measured)
    for name, scores in screens.items():
        gone = torch.zeros(len(split.genes), dtype=torch.bool)
        gone[torch.from_numpy(cox_screen.anchors(scores, n_anchors(split)))] = True
        hidden[unseen.type_index((name,)) == 0] = gone
    return found | {"all/federated": _of_model(trained[OURS], unseen.without(hidden))}


def hidden_sets(split: Split, seed: int) -> dict[str, Patients]:
    """Return the unseen patients with small panels and with missing values.

    Named by scheme and draw, as `panel-0`. The draws depend on seed and split only,
    and every method sees the same ones.
    """
    unseen, genes = split.patients(split.unseen), split.genes.genes
    found = {}
    for draw in range(1 if split.quick else DRAWS):
        names = (split.folder.name, draw)
        if len(genes) > PANEL:
            panel_seed = derive(seed, "survival", "panel", *names)
            panel = set(references.panels(genes, (PANEL,), panel_seed)[PANEL])
            visible = torch.tensor([gene in panel for gene in genes])
            found[f"panel-{draw}"] = unseen.without(~visible)
        rng = generator(seed, "survival", "mcar", *names)
        found[f"mcar-{draw}"] = unseen.without(masking.mcar(unseen.measured, RATE, rng))
    return found


def screen(split: Split) -> dict[str, CoxScore]:
    """Return each cancer's Cox screen, summed over the training sites.

    Sites below the minimum cohort of a cancer send nothing of it, and nothing of genes
    that fewer patients have.
    """
    study, found = split.study, {}
    able = [eligible(study, SURVIVAL, split.patients(c)) for c in _cohorts(split)]
    for name in study.survival.cancer_types:
        rows = [_of_type(patients, name) for patients in able]
        least = study.minimum_cohort
        scores = [
            CoxScore.of(some.values.numpy(), some.duration, some.event, least)
            for some in rows
            if len(some) >= least
        ]
        if scores:
            found[name] = reduce(add, scores)
    return found


def n_anchors(split: Split) -> int:
    """Return how many anchors a cancer gets."""
    return min(N_ANCHORS, len(split.genes) // 4)


def of_references(
    split: Split,
    seed: int,
    federated: Model,
    unseen_sets: Mapping[str, Patients],
    screens: Mapping[str, CoxScore],
) -> Predictions:
    """Return the simple models' predictions, trained on pooled rows of each cancer.

    From all genes, by method; from what is left of the values, by set and method; and
    by the fate of the anchor genes, `anchors/...` of models that read nothing else,
    `all/...` of models that read all genes.
    """
    study, unseen = split.study, split.patients(split.unseen)
    imputers = _imputers(split, federated)
    filled = {
        f"{name}/{method}": imputer.impute(patients.values.numpy())
        for name, patients in unseen_sets.items()
        for method, imputer in imputers.items()
    }
    pooled = eligible(study, SURVIVAL, split.pooled)
    ends = np.asarray(study.survival.interval_ends)
    found: Predictions = {}
    for name in study.survival.cancer_types:
        train = _of_type(pooled, name)
        rows = (unseen.type_index((name,)) == 0).nonzero().squeeze(1)
        if len(train) == 0 or len(rows) == 0:
            continue
        of_cancer = _of_cancer(
            train,
            unseen.take(rows),
            {key: values[rows.numpy()] for key, values in filled.items()},
            {
                key: patients.take(rows)
                for key, patients in unseen_sets.items()
                if key.startswith("panel-")
            },
            cox_screen.anchors(screens[name], n_anchors(split))
            if name in screens
            else None,
            imputers,
            seed,
            ends,
        )
        for key, prediction in of_cancer.items():
            empty = np.full((len(unseen), 1 + len(ends)), np.nan)
            found.setdefault(key, empty)[rows.numpy()] = prediction
    return found


def _of_cancer(
    train: Patients,
    test: Patients,
    filled: Mapping[str, Floats],
    panels: Mapping[str, Patients],
    anchors: NDArray[np.intp] | None,
    imputers: Mapping[str, Imputer],
    seed: int,
    ends: Floats,
) -> Predictions:
    """Return the simple models' predictions for one cancer, each (n, 1 + K).

    Parameters
    ----------
    filled
        Values for which the model of all genes predicts too, each (n, V).
    panels
        Test patients with a panel's genes, for models trained on the same panel.
    anchors
        Genes that are deleted and restored.
    """
    ridge: Fit = partial(references.cox_ridge, seed=seed)
    x, clinical = train.values.numpy(), train.clinical.numpy()
    true, test_clinical = test.values.numpy(), test.clinical.numpy()
    with_clinical: Fit = partial(
        references.cox_ridge, seed=seed, n_clinical=clinical.shape[1]
    )

    def both(values: Floats) -> Floats:
        return np.concatenate([values, test_clinical], axis=1)

    of_all: dict[str, Floats] = {COX_RIDGE: true, **filled}
    of_both = {COX_CLINICAL: both(true)} | {
        key.replace(GAUSSIAN, CLINICAL_GAUSSIAN): both(values)
        for key, values in filled.items()
        if key.endswith(GAUSSIAN)
    }
    fits = [
        (ridge, x, of_all),
        (with_clinical, np.concatenate([x, clinical], axis=1), of_both),
        (references.pca_cox, x, {PCA_COX: true}),
        (references.clinical_cox, clinical, {CLINICAL_COX: test_clinical}),
    ]
    for key, patients in panels.items():
        seen = patients.measured.any(dim=0).numpy()
        only = {f"{key}/{PANEL_TRAINED}": patients.values.numpy()[:, seen]}
        fits.append((ridge, x[:, seen], only))
    if anchors is not None:
        deleted = true.copy()
        deleted[:, anchors] = np.nan
        restored = {key: i.impute(deleted) for key, i in imputers.items()}
        of_all |= {f"all/{key}": values for key, values in restored.items()}
        only = {f"anchors/{key}": v[:, anchors] for key, v in restored.items()}
        only["anchors/true"] = true[:, anchors]
        fits.append((ridge, x[:, anchors], only))
        without = {"all/without": np.delete(true, anchors, axis=1)}
        fits.append((ridge, np.delete(x, anchors, axis=1), without))
    found: Predictions = {
        TYPE_ONLY: np.tile(_kaplan_meier(train, ends), (len(test), 1))
    }
    for fit, rows, tests in fits:
        found |= _predictions(fit, rows, train, tests, ends)
    return found


def _predictions(
    fit: Fit, x: Floats, train: Patients, tests: Mapping[str, Floats], ends: Floats
) -> Predictions:
    """Fit one Cox model; return its risk and survival for each set of test rows.

    The baseline is Breslow's, on the risk of the training rows themselves.
    """
    duration, event = train.duration.numpy(), train.event.numpy()
    risk = fit(x, duration, event, np.concatenate([x, *tests.values()]))
    # Equal rows get equal risks only up to rounding, which would order them.
    log_hazard = torch.tensor(np.round(risk, 9), dtype=torch.float64)
    baseline = breslow(log_hazard[: len(x)], train.duration, train.event)
    found, until = {}, torch.tensor(ends, dtype=train.duration.dtype)
    of_tests = log_hazard[len(x) :].split([len(rows) for rows in tests.values()])
    for name, own in zip(tests, of_tests, strict=True):
        alive = predict_survival(baseline, own, until)
        found[name] = torch.cat([own[:, None], alive.double()], dim=1).numpy()
    return found


def _kaplan_meier(train: Patients, ends: Floats) -> Floats:
    """Return the prediction from the cancer type, by Kaplan-Meier, (1 + K,)."""
    days, alive = kaplan_meier(train.duration, train.event)
    at_ends = alive[np.searchsorted(days, ends, side="right") - 1]
    return np.concatenate([[0.0], at_ends])


def _of_model(model: Model, patients: Patients) -> NDArray[np.float64]:
    n_genes = patients.values.shape[1]
    loaded = tasks.load_survival(model.study, n_genes, model.parameters)
    risk = predicting.log_hazard(model.study, loaded, patients)
    alive = predicting.survival(model.study, loaded, patients, risk)
    if model.study.survival.loss == "cox":  # which trains no baseline
        alive = torch.full_like(alive, torch.nan)
    return torch.cat([risk[:, None], alive], dim=1).double().numpy()


def _imputers(split: Split, federated: Model) -> dict[str, Imputer]:
    """Return the imputers for the simple Cox model, by name of the result."""
    floor = split.study.minimum_cohort
    sums = pool(
        CrossProducts.of(split.patients(cohort).values.numpy()).suppressed(floor)
        for cohort in _cohorts(split)
    )
    ours = federated.study, federated.parameters, len(split.genes)
    return {
        GAUSSIAN: GaussianImputer(sums.covariance()),
        RESTORED: evaluation.model_imputer(*ours),
        MEAN_FILLED: MeanImputer(),
    }


def _trained(
    split: Split, jobs: Mapping[str, Job], console: Console
) -> dict[str, Model]:
    """Return the model of each job, its survival phase trained if it is another one."""
    paths = {
        name: split.folder
        / "models"
        / f"survival-{arm.name}-{study.hash[:12]}.safetensors"
        for name, (arm, study, _) in jobs.items()
        if study != arm.study
    }
    resumable.compute_all(
        _train,
        {path: jobs[name] for name, path in paths.items()},
        split.workers,
        console,
        lambda job: f"survival of {job[0].name}, seed {job[1].seed}",
    )
    trained = {name: model for name, (_, _, model) in jobs.items()}
    for name, path in paths.items():
        trained[name] = dataclasses.replace(
            trained[name], study=jobs[name][1], parameters=resumable.load(path)
        )
    return trained


def _train(job: Job) -> Mapping[str, NDArray[np.float32]]:
    """Train a survival phase again from the parameters before it."""
    arm, study, model = job
    before = dict(model.parameters)
    if study.survival.backbone == "frozen":
        fresh = tasks.initial(study, len(model.genes))
        before |= {k: v for k, v in fresh.items() if k.startswith(f"{SURVIVAL}.")}
    scale, others = model.standardisation, (PRETRAINING, CLASSIFICATION)
    return train(study, model.genes, scale, arm.sites, before, without=others)


def _cohorts(split: Split) -> list[Cohort]:
    return [cohort for _, cohort in sorted(split.sites.items())]


def _of_type(patients: Patients, name: str) -> Patients:
    return patients.take((patients.type_index((name,)) == 0).nonzero().squeeze(1))
