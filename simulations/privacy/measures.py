"""Measures of what a model is worth on the hold-out, all in one unit.

N patients, V genes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedgex.common import federation
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.evaluation.imputers import Float, Imputer
from fedgex.common.models.tasks import Parameters
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Evaluation, Study
from fedgex.server import evaluation
from fedgex.simulations.baselines import references
from fedgex.simulations.evaluation.protocol import MIN_EVENTS, Measure

RESTORED = Evaluation(rates=(0.5, 0.9), panels=(100,))
SMALL_PANEL = 64
"""Genes of the small panel from which the cancer type is predicted."""


MEASURES = (
    Measure("mse-mcar-0.5", "restoration MSE, 50 % of cells hidden", "lower"),
    Measure("mse-mcar-0.9", "restoration MSE, 90 % of cells hidden", "lower"),
    Measure("mse-panel-100", "restoration MSE from 100 genes", "lower"),
    Measure("accuracy", "accuracy of cancer type, all genes", "higher"),
    Measure(
        f"accuracy-{SMALL_PANEL}",
        f"accuracy of cancer type, {SMALL_PANEL} random genes",
        "higher",
    ),
    Measure("c-index", "C-index of survival", "higher"),
)
"""Errors are compared by ratio, the others by difference."""


def evaluate(
    study: Study,
    model: Parameters,
    scale: Standardisation,
    genes: Vocabulary,
    holdout: Cohort,
    public: Cohort,
) -> dict[str, float]:
    """Evaluate a model on the hold-out by every measure that its study has.

    Parameters
    ----------
    scale
        Standardisation that the model was trained with.
    public
        Public cohort, whose standardisation is the unit of the errors.
    """
    values: dict[str, float] = {}
    patients = to_patients(holdout, genes, scale)
    if PRETRAINING in study.phases:
        unit = federation.public_standardisation(public, genes)
        imputer = evaluation.model_imputer(study, model, len(genes))
        scores = evaluation.evaluate_imputer(
            _Rescaled(imputer, scale, unit),
            to_patients(holdout, genes, unit),
            RESTORED,
            study.seed,
            ("mcar", "panel"),
        )
        values = {
            f"mse-{pattern}-{key}": score.mse
            for pattern, of_pattern in scores.items()
            for key, score in of_pattern.items()
        }
    if CLASSIFICATION in study.phases:
        values |= _accuracies(study, model, patients, genes.genes)
    if SURVIVAL in study.phases:
        found = _c_index(study, model, patients)
        if found is not None:
            values["c-index"] = found
    return values


class _Rescaled:
    """An imputer judged on another scale of the genes than that of its training."""

    def __init__(
        self, imputer: Imputer, trained: Standardisation, judged: Standardisation
    ) -> None:
        self._imputer, self._trained, self._judged = imputer, trained, judged

    def impute(self, values: NDArray[Float]) -> NDArray[Float]:
        """Return a copy of values (N, V) with every NaN filled, and nothing else."""
        there = self._trained.apply(self._judged.undo(values))
        filled = self._judged.apply(self._trained.undo(self._imputer.impute(there)))
        restored: NDArray[Float] = np.where(np.isnan(values), filled, values)
        return restored


def _accuracies(
    study: Study, model: Parameters, patients: Patients, genes: Sequence[str]
) -> dict[str, float]:
    panels = {"accuracy": tuple(genes)}
    if len(genes) > SMALL_PANEL:
        drawn = references.panels(genes, [SMALL_PANEL], study.seed)[SMALL_PANEL]
        panels[f"accuracy-{SMALL_PANEL}"] = drawn
    return {
        key: evaluation.evaluate_classes(
            study, model, patients, torch.tensor([g in set(panel) for g in genes])
        )[0]
        for key, panel in panels.items()
    }


def _c_index(study: Study, model: Parameters, patients: Patients) -> float | None:
    """Return the mean C-index within cancer types, weighted by their deaths."""
    judged = [
        each
        for each in evaluation.evaluate_survival(study, model, patients).values()
        if each["c_index"] is not None and each["events"] >= MIN_EVENTS
    ]
    if not judged:
        return None
    values, deaths = zip(*((e["c_index"], e["events"]) for e in judged), strict=True)
    return float(np.average(values, weights=deaths))
