"""Evaluate the global model on the public hold-out: imputation, class, survival.

N hold-out patients, V genes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from torch import Tensor

from fedgex.common.data.dataset import Patients
from fedgex.common.evaluation.imputation import RestorationScore, restoration
from fedgex.common.evaluation.imputers import (
    GaussianImputer,
    Imputer,
    MeanImputer,
    ppca,
)
from fedgex.common.evaluation.survival import c_index_with_se
from fedgex.common.models import masking, predict, tasks
from fedgex.common.models.masking import Pattern
from fedgex.common.models.restoration import ModelImputer, embed
from fedgex.common.models.tasks import Parameters
from fedgex.common.models.uncertainty import unlikeness
from fedgex.common.seeds import generator
from fedgex.common.study import (
    CLASSIFICATION,
    PRETRAINING,
    Evaluation,
    Study,
)

Scores = dict[str, dict[str, RestorationScore]]
"""Scores by pattern and key (the rate as "0.1", or the number of measured genes)."""
PPCA_RANK = 128
LIKE = 0.99
"""Share of the hold-out's patients who count as like those of the training."""
LEAST_REFERENCE = 30
"""Fewest patients of the hold-out from which the threshold is taken."""
MIN_EVENTS = 5
"""Fewest deaths for which a C-index is estimated."""


def hidden_cells(
    patients: Patients, rule: Evaluation, seed: int, patterns: tuple[Pattern, ...]
) -> Iterator[tuple[Pattern, str, Tensor]]:
    """Yield every setting of the evaluation: pattern, key, hidden cells (N, V).

    The cells depend only on seed, setting and patients, so that every method is
    evaluated on the same ones. Panels that leave nothing to restore are skipped.
    """
    measured = patients.measured
    n_genes = int(measured.any(dim=0).sum())
    for pattern in patterns:
        if pattern == "panel":
            for size in rule.panels:
                if size < n_genes:
                    rng = generator(seed, "hold-out", pattern)
                    yield pattern, str(size), masking.panel(measured, size, rng)
            continue
        for rate in rule.rates:
            rng = generator(seed, "hold-out", pattern, str(rate))
            if pattern == "mcar":
                hidden = masking.mcar(measured, rate, rng)
            else:
                hidden = masking.low_expression(patients.values, measured, rate, rng)
            yield pattern, f"{rate:g}", hidden


def evaluate_imputer(
    imputer: Imputer,
    patients: Patients,
    rule: Evaluation,
    seed: int,
    patterns: tuple[Pattern, ...] = ("mcar", "panel", "mnar"),
) -> Scores:
    """Evaluate an imputer at every setting of the evaluation."""
    scores: Scores = {}
    true = patients.values.numpy()
    for pattern, key, hidden in hidden_cells(patients, rule, seed, patterns):
        gone = hidden.numpy()
        restored = imputer.impute(np.where(gone, np.float32(np.nan), true))
        scores.setdefault(pattern, {})[key] = restoration(true, restored, gone)
    return scores


def linear_references(
    covariance: NDArray[np.float64] | None, n_genes: int
) -> dict[str, Imputer]:
    """Return the imputers that need federated statistics only.

    Parameters
    ----------
    covariance
        Covariance of standardised genes, shape (V, V); None without cross-products.
    """
    references: dict[str, Imputer] = {"mean": MeanImputer()}
    if covariance is not None:
        references["ppca"] = ppca(covariance, min(PPCA_RANK, n_genes - 1))
        references["gaussian"] = GaussianImputer(covariance)
    return references


def evaluate_round(
    study: Study, phase: str, state_dict: Parameters, patients: Patients
) -> dict[str, Any]:
    """Judge the model after a round, by what the phase is about.

    Pretraining: error of imputation at every rate and panel, on the first patients of a
    fixed shuffle. Classification: accuracy from all genes. Survival: C-index within
    each cancer type.
    """
    if phase == PRETRAINING:
        chosen = torch.randperm(len(patients), generator=generator(study.seed, "judge"))
        some = patients.take(chosen[: study.evaluation.patients_per_round])
        scores = evaluate_imputer(
            model_imputer(study, state_dict, patients.values.shape[1]),
            some,
            study.evaluation,
            study.seed,
            ("mcar", "panel"),
        )
        return as_numbers(scores)
    if phase == CLASSIFICATION:
        everything = torch.ones(patients.values.shape[1], dtype=torch.bool)
        return {
            "accuracy": evaluate_classes(study, state_dict, patients, everything)[0]
        }
    return evaluate_survival(study, state_dict, patients)


def unlike_from(
    study: Study, state_dict: Parameters, patients: Patients
) -> float | None:
    """Return the unlikeness that one in a hundred patients exceeds by chance.

    The (.99 (N + 1))-th smallest of the hold-out's, or the largest; see
    `uncertainty.unlikeness`.

    Returns
    -------
    float or None
        None without a factor model, or with fewer than `LEAST_REFERENCE` patients.
    """
    linear = tasks.load_backbone(
        study, patients.values.shape[1], state_dict
    ).encoder.linear
    some = patients.values[patients.measured.any(dim=1)]
    if linear is None or len(some) < LEAST_REFERENCE:
        return None
    place = min(math.ceil(LIKE * (len(some) + 1)), len(some))
    found: float = unlikeness(linear, some).kthvalue(place).values.item()
    return found


def model_imputer(study: Study, state_dict: Parameters, n_genes: int) -> ModelImputer:
    """Return the model's backbone as an imputer."""
    return ModelImputer(tasks.load_backbone(study, n_genes, state_dict))


@torch.no_grad()
def evaluate_classes(
    study: Study, state_dict: Parameters, patients: Patients, panel: Tensor
) -> tuple[float, float]:
    """Return accuracy and macro-F1 of the cancer type from a panel's genes.

    Parameters
    ----------
    panel
        Genes that the model may see, shape (V,), bool.
    """
    classes = study.classification.classes
    target = patients.type_index(classes)
    known = (target >= 0).nonzero().squeeze(1)
    if len(known) == 0:
        return math.nan, math.nan
    some, target = patients.take(known), target[known]
    model = tasks.load_classifier(study, patients.values.shape[1], state_dict)
    predicted = torch.cat(
        [
            model.head(embed(model.encoder, values, ~values.isnan() & panel)).argmax(
                dim=1
            )
            for values in some.values.split(64)
        ]
    )
    return class_scores(target.numpy(), predicted.numpy())


def class_scores(
    target: NDArray[np.generic], predicted: NDArray[np.generic]
) -> tuple[float, float]:
    """Return accuracy, and F1 averaged over the classes that occur in the target."""
    f1 = f1_score(target, predicted, average="macro", labels=np.unique(target))
    return float((target == predicted).mean()), float(f1)


def predict_risk(
    study: Study, state_dict: Parameters, patients: Patients
) -> NDArray[np.float32]:
    """Return each patient's log-hazard, shape (N,); NaN for types not in the study."""
    model = tasks.load_survival(study, patients.values.shape[1], state_dict)
    return predict.log_hazard(study, model, patients).numpy()


def evaluate_survival(
    study: Study, state_dict: Parameters, patients: Patients
) -> dict[str, dict[str, Any]]:
    """Return the C-index within each cancer type of the study."""
    risk = predict_risk(study, state_dict, patients)
    return {
        name: evaluate_risk(patients, name, risk)
        for name in study.survival.cancer_types
    }


def evaluate_risk(
    patients: Patients, cancer_type: str, risk: NDArray[np.floating]
) -> dict[str, Any]:
    """Return the C-index of a risk within one cancer type, with its standard error.

    Parameters
    ----------
    risk
        Higher means an earlier death, shape (N,).

    Returns
    -------
    dict
        patients, events, c_index and sd; both None where the reason says why.
    """
    of_type = np.array([name == cancer_type for name in patients.cancer_type])
    rows = of_type & (patients.duration > 0).numpy() & ~patients.event.isnan().numpy()
    duration, event = patients.duration.numpy()[rows], patients.event.numpy()[rows]
    result: dict[str, Any] = {
        "patients": int(rows.sum()),
        "events": int(event.sum()),
        "c_index": None,
        "sd": None,
        "reason": None,
    }
    if result["events"] < MIN_EVENTS:
        result["reason"] = f"fewer than {MIN_EVENTS} events"
    elif np.isnan(risk[rows]).any():
        result["reason"] = "no risk predicted"
    else:
        c_index, sd = c_index_with_se(duration, event, risk[rows])
        if math.isnan(c_index):
            result["reason"] = "no two patients whose order is known"
        else:
            result["c_index"], result["sd"] = c_index, sd
    return result


def as_numbers(scores: Scores) -> dict[str, dict[str, dict[str, float | int]]]:
    """Return the scores as plain numbers, without those of single genes."""
    return {
        pattern: {key: score.as_dict() for key, score in of_pattern.items()}
        for pattern, of_pattern in scores.items()
    }


def mse_only(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return pattern -> key -> mse of what `as_numbers` returned."""
    return {
        pattern: {key: score["mse"] for key, score in of_pattern.items()}
        for pattern, of_pattern in metrics.items()
    }
