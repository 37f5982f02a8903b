"""Membership inference on a released model with a hospital's own patients.

Members are the patients in its settings now; non-members are other patients of the
hospital, who never trained.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from fedgex.client.prediction import review
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.genes import spelt_as
from fedgex.common.data.patients import patient_key
from fedgex.common.errors import ConfigError
from fedgex.common.ingestion.cohort import check
from fedgex.common.ingestion.findings import Findings
from fedgex.common.ingestion.readers import RawCohort, read
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.models import tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.privacy import attacks
from fedgex.common.privacy.audit_report import AuditReport, Membership, Task
from fedgex.common.seeds import derive
from fedgex.common.study import CLASSIFICATION, PRETRAINING

NOTES = (
    "members are the patients that site.toml names now; one who came after the "
    "training, or who opted out after it, is misclassified and hides leakage",
    "members and non-members may differ by more than the training, such as by year or "
    "cancer type; such a difference moves the AUC away from 0.5, either way",
)


def audit(
    settings: SiteSettings, model: Checkpoint, digest: str, non_members: Path | None
) -> AuditReport:
    """Separate members from non-members by their losses under a model.

    Parameters
    ----------
    digest
        SHA-256 of the model's manifest.
    non_members
        Expression of own patients who never took part, in the format and on the scale
        of the hospital's own; None: those who opted out.

    Raises
    ------
    CheckpointError
        If the model has not been pretrained.
    ConfigError
        If members or non-members are fewer than the policy's minimum cohort, or
        a patient is both.
    DataError
        If a file cannot be used.
    """
    review.require(model, PRETRAINING)
    inside, outside = _groups(settings, model, non_members)
    found = {}
    for side, cohort in (("members", inside), ("non-members", outside)):
        _refuse_few(cohort.n_patients, settings.policy.minimum_cohort, side)
        patients = to_patients(cohort, model.vocabulary, model.standardisation)
        found[side] = _losses(model, patients)
    membership, notes = [], list(NOTES)
    for task in found["members"]:
        pair = [-losses[task] for losses in found.values()]
        known = [scores[~np.isnan(scores)] for scores in pair]
        if min(map(len, known)) < settings.policy.minimum_cohort:
            notes.append(f"{task} is left out: too few patients of its classes")
            continue
        curve = attacks.roc(*known)
        membership.append(Membership.of(curve, "released", "loss", task))
    return AuditReport(
        kind="hospital",
        study=model.study.name,
        study_hash=model.study.hash,
        model=digest,
        membership=tuple(membership),
        notes=tuple(notes),
    )


def _groups(
    settings: SiteSettings, model: Checkpoint, non_members: Path | None
) -> tuple[Cohort, Cohort]:
    """Return members and non-members."""

    def checked(raw: RawCohort, data: DataSettings, min_cell_count: int) -> Cohort:
        scale, phases = model.study.scale, tuple(model.study.phases)
        cohort = check(raw, data, scale, phases, Findings(min_cell_count)).cohort
        genes = spelt_as(cohort.genes, model.vocabulary.genes)
        return dataclasses.replace(cohort, genes=genes)

    raw, least = read(settings.data), settings.policy.minimum_cohort
    inside = checked(raw, settings.data, least)
    if non_members is None:
        opted_out = set(map(patient_key, raw.opt_outs or ()))
        cohort = checked(dataclasses.replace(raw, opt_outs=None), settings.data, least)
        rows = [i for i, who in enumerate(cohort.keys) if who in opted_out]
        return inside, _take(cohort, np.array(rows, dtype=np.intp))
    data = settings.data.model_copy(
        update={"expression": non_members, "clinical": None, "opt_outs": None}
    )
    # The audit compares the number of non-members with the minimum, not this check.
    outside = checked(read(data), data, min_cell_count=1)
    if set(outside.keys) & set(inside.keys):
        raise ConfigError(
            f"{non_members.name}: holds patients of the hospital's own data, who may "
            "have trained; expected patients who never took part. Leave the others "
            "out of the file."
        )
    return inside, outside


def _take(cohort: Cohort, rows: np.ndarray) -> Cohort:
    return dataclasses.replace(
        cohort,
        patients=tuple(cohort.patients[i] for i in rows),
        expression=cohort.expression[rows],
        clinical=cohort.clinical.iloc[rows],
    )


def _refuse_few(n: int, least: int, side: str) -> None:
    if n < least:
        raise ConfigError(
            f"there are fewer than {least} {side}; expected {least} or more "
            "(minimum_cohort in policy.toml), so that no number speaks of a few "
            "patients. Name own patients who never took part with --non-members."
        )


def _losses(model: Checkpoint, patients: Patients) -> dict[Task, np.ndarray]:
    """Return each patient's loss in each task that the model brings a head for."""
    study, n_genes = model.study, len(model.vocabulary)
    backbone = tasks.load_backbone(study, n_genes, model.parameters)
    seed = derive(study.seed, "audit", "masks")
    losses: dict[Task, np.ndarray] = {
        "restoration": attacks.restoration_losses(backbone, patients, seed)
    }
    if CLASSIFICATION in review.trained_phases(model):
        losses["classification"] = attacks.classification_losses(
            tasks.load_classifier(study, n_genes, model.parameters),
            patients,
            study.classification.classes,
        )
    return losses
