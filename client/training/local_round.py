"""One round of local training, used by the ClientApp and by simulations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fedgex.common.codes import Code
from fedgex.common.data.dataset import Patients
from fedgex.common.errors import DataError, Finding
from fedgex.common.federation import RoundResult, round_update
from fedgex.common.models import tasks
from fedgex.common.models.losses import eligible, trained_parameters
from fedgex.common.models.parameters import load_parameters
from fedgex.common.models.tasks import Parameters, PhaseModel
from fedgex.common.models.training import round_learning_rate
from fedgex.common.privacy import accounting
from fedgex.common.study import CLASSIFICATION, SURVIVAL, Study
from fedgex.common.system import malloc

logger = logging.getLogger(__name__)


def train_round(
    study: Study,
    phase: str,
    number: int,
    patients: Patients,
    global_parameters: Parameters,
    *,
    site: str,
    min_cell_count: int,
    state_dir: Path,
    evaluate: bool = True,
    charge: Callable[[], None] = lambda: None,
) -> RoundResult:
    """Evaluate and train a phase's model for one round, by DP-SGD if the study asks.

    Parameters
    ----------
    number
        Number of the round in its phase, from 1.
    global_parameters
        Parameters that the round begins with.
    min_cell_count
        Small-cell threshold: fewest patients behind any number that leaves.
    state_dir
        Folder of the noised class counts between rounds.
    evaluate
        Whether the global model is evaluated before training.
    charge
        Debits the round, once all is checked, before anything is computed of a patient.

    Raises
    ------
    DataError
        If fewer patients than `min_cell_count` are eligible; with the Cox loss, deaths.
    UpdateError
        If the parameters do not fit the study's model.
    """
    malloc.keep_freed()
    fitting = require_min_patients(study, phase, patients, min_cell_count)
    model = tasks.build(study, patients.values.shape[1], phase)
    load_parameters(tasks.named(phase, model), global_parameters)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    charge()
    fit = None
    if study.privacy.patient is not None:
        fit = partial(_train_privately, study, phase, number, model, fitting, state_dir)
    return round_update(
        study,
        phase,
        number,
        model,
        fitting,
        global_parameters,
        site=site,
        fit=fit,
        evaluate=evaluate,
    )


def refuse_large_delta(study: Study, n_patients: int) -> None:
    """Refuse a study whose delta permits revealing one of its patients completely.

    Raises
    ------
    DataError
        `Code.DELTA_TOO_LARGE`, unless delta is below 1 / patients.
    """
    rule = study.privacy.patient
    if rule is None or rule.delta * n_patients < 1:
        return
    finding = Code.DELTA_TOO_LARGE.finding(
        where="privacy.patient.delta",
        found=f"delta = {rule.delta:g}, and 1 / delta patients or more",
        expected="a delta below 1 / patients; else one patient could be revealed",
        action="Ask for a study with a smaller delta.",
    )
    raise DataError([finding])


def require_min_patients(
    study: Study, phase: str, patients: Patients, min_cell_count: int
) -> Patients:
    """Return the patients eligible for a phase.

    Raises
    ------
    DataError
        If they are fewer than `min_cell_count`; with the Cox loss, their deaths.
    """
    fitting, types = eligible(study, phase, patients), _types(study, phase)
    other = sum(t is not None and t not in types for t in patients.cancer_type)
    if types and other:
        n = other if other >= min_cell_count else f"fewer than {min_cell_count}"
        text = (
            "%s patients are of a cancer type that the study does not know for %s: %s"
        )
        logger.warning(text, n, phase, ", ".join(types))
    if _unit_count(study, phase, fitting) < min_cell_count:
        raise DataError([_too_few(phase, types, min_cell_count)])
    return fitting


def _train_privately(
    study: Study,
    phase: str,
    number: int,
    model: PhaseModel,
    patients: Patients,
    state_dir: Path,
) -> None:
    # Opacus needs seconds and hundreds of MB: import it only here.
    from fedgex.client.training import dp_sgd

    rule, settings = study.privacy.patient, study.phases[phase]
    assert rule is not None
    model.requires_grad_(False)
    for parameter in trained_parameters(study, phase, model):
        parameter.requires_grad_(True)
    dp_sgd.fit_privately(
        dp_sgd.phase_loss(study, number, model, patients, state_dir=state_dir),
        len(patients),
        settings,
        rule,
        noise_multiplier=accounting.noise_multiplier(study),
        learning_rate=round_learning_rate(settings, number),
        proximal_mu=study.strategy.proximal_mu,
    )


def _unit_count(study: Study, phase: str, patients: Patients) -> int:
    """Return the number of terms in the phase's loss: deaths for Cox, else patients."""
    if phase == SURVIVAL and study.survival.loss == "cox":
        return int(patients.event.sum())
    return len(patients)


def _types(study: Study, phase: str) -> tuple[str, ...]:
    """Return the cancer types of which a phase learns; of pretraining, none named."""
    if phase == CLASSIFICATION:
        return study.classification.classes
    return study.survival.cancer_types if phase == SURVIVAL else ()


def _too_few(phase: str, types: Sequence[str], least: int) -> Finding:
    named = f", spelt as the study does: {', '.join(types)}" if types else ""
    return Code.TOO_FEW_FOR_PHASE.finding(
        where=phase,
        found=f"fewer than {least} patients (with the Cox loss: deaths) to learn from",
        expected=f"{least} or more, with the study's cancer types and follow-up{named}",
        action="Compare the cancer types with those of check-data. If they are right, "
        "nothing is to be done: the site takes no part in this phase.",
    )
