"""Predict with a finished model: imputation, embedding, risk, cancer type.

Plain functions on DataFrames with one row a sample and one column a gene; `cli.predict`
is their command line. They run on the CPU, in float32.

N samples, G genes of the frame, V genes of the vocabulary, D width, K intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedgex.client.prediction.review import (
    possible_types,
    require,
    review,
    review_clinical,
    wanted_genes,
)
from fedgex.common.codes import Code
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.scales import Scale, convert, floor
from fedgex.common.errors import Finding
from fedgex.common.ingestion.findings import Findings
from fedgex.common.models import predict, tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.models.gexbert import GexBert
from fedgex.common.models.restoration import ModelImputer, embed_all
from fedgex.common.models.uncertainty import restore_with_uncertainty, unlikeness
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL

NONE = "none of these"
"""Answer for a sample that is unlike the patients of the training."""
BATCH_SIZE = 16
"""Samples restored at a time; each may need the full vocabulary."""


def impute(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    *,
    scale: Scale | None = None,
    genes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Impute NaN cells, and genes of the vocabulary that the frame lacks.

    Measured cells, and genes outside the vocabulary, stay as they are.

    Parameters
    ----------
    checkpoint
        A model that has been pretrained.
    frame
        Expression, shape (N, G), columns named by HGNC symbol; NaN where not measured.
    scale
        Scale of the frame and of the result; None: the study's.
    genes
        Genes to restore; None: all of the vocabulary.

    Returns
    -------
    DataFrame
        The columns of the frame in their order, then the restored genes that it lacks,
        sorted; one row a sample as in the frame. The row of a sample with no measured
        gene of the vocabulary stays NaN.

    Raises
    ------
    CheckpointError
        If the model has not been pretrained.
    ConfigError
        If no formula leads from `scale` to the study's, or `genes` holds others than
        those of the vocabulary.
    DataError
        If no gene of the vocabulary was measured, or columns share a name.
    """
    canonical = checkpoint.study.scale
    wanted = wanted_genes(checkpoint, genes)
    restored = restore(checkpoint, frame, scale=scale)
    in_scale = convert(restored.to_numpy(), canonical, scale or canonical)
    table = pd.DataFrame(in_scale, index=frame.index, columns=restored.columns)
    return fill(frame, table.loc[:, wanted])


def restore(
    checkpoint: Checkpoint, frame: pd.DataFrame, *, scale: Scale | None = None
) -> pd.DataFrame:
    """Return every gene of the vocabulary as the model restores it.

    Parameters
    ----------
    checkpoint, frame, scale
        As for `impute`.

    Returns
    -------
    DataFrame
        Shape (N, V), on the study's scale, never below zero expression; measured cells
        up to rounding. NaN for a sample with no measured gene of the vocabulary.

    Raises
    ------
    CheckpointError, ConfigError, DataError
        As for `impute`.
    """
    backbone = _backbone(checkpoint)
    patients = _patients(checkpoint, frame, scale)
    values = patients.values.numpy()
    seen = patients.measured.any(dim=1).numpy()
    standardised = np.full_like(values, np.nan)
    standardised[seen] = ModelImputer(backbone, BATCH_SIZE).impute(values[seen])
    restored = checkpoint.standardisation.undo(standardised)
    restored = np.maximum(restored, np.float32(floor(checkpoint.study.scale)))
    return pd.DataFrame(
        restored, index=frame.index, columns=list(checkpoint.vocabulary.genes)
    )


def fill(frame: pd.DataFrame, restored: pd.DataFrame) -> pd.DataFrame:
    """Fill NaN cells with restored values, and add the missing genes.

    Parameters
    ----------
    frame
        Shape (N, G).
    restored
        Genes to fill or to add, on the scale of the frame; one row for each of its
        rows.
    """
    values = frame.to_numpy(copy=True)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    place = frame.columns.get_indexer(restored.columns)  # -1 where not there
    there, new = place >= 0, place < 0
    cells, numbers = values[:, place[there]], restored.to_numpy()
    values[:, place[there]] = np.where(np.isnan(cells), numbers[:, there], cells)
    return pd.DataFrame(
        np.hstack([values, numbers[:, new].astype(values.dtype)]),
        index=frame.index,
        columns=[*frame.columns, *restored.columns[new]],
    )


def uncertainty(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    *,
    scale: Scale | None = None,
    genes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return the predictive standard deviation of each value that `impute` fills.

    Parameters
    ----------
    checkpoint, frame, scale, genes
        As for `impute`.

    Returns
    -------
    DataFrame
        The genes that were asked for, in the order of the vocabulary, one row a sample;
        on the study's scale, whatever `scale` is. NaN where measured, and for a sample
        with no measured gene of the vocabulary.

    Raises
    ------
    CheckpointError, DataError
        As for `impute`.
    ConfigError
        As for `impute`, or if the model has no factor model, from which the standard
        deviation is computed.
    """
    wanted = wanted_genes(checkpoint, genes)
    backbone = _backbone(checkpoint)
    patients = _patients(checkpoint, frame, scale)
    seen = patients.measured.any(dim=1)
    _, sd = restore_with_uncertainty(backbone, patients.values[seen])
    known = patients.measured[seen].numpy()
    numbers = np.where(known, np.nan, sd.numpy() * checkpoint.standardisation.sd)
    names = [checkpoint.vocabulary.genes[i] for i in np.flatnonzero(wanted)]
    return _over_all(frame.index, seen, numbers[:, wanted].astype(np.float32), names)


def embed(
    checkpoint: Checkpoint, frame: pd.DataFrame, *, scale: Scale | None = None
) -> pd.DataFrame:
    """Return one vector a sample, from the pretrained encoder.

    Parameters
    ----------
    checkpoint, frame, scale
        As for `impute`.

    Returns
    -------
    DataFrame
        Columns `embedding_0` to `embedding_{D - 1}`; NaN for a sample with no measured
        gene of the vocabulary.

    Raises
    ------
    CheckpointError, ConfigError, DataError
        As for `impute`.
    """
    backbone = _backbone(checkpoint)
    patients = _patients(checkpoint, frame, scale)
    seen = patients.measured.any(dim=1)
    vectors = embed_all(backbone.encoder, patients.take(_places(seen))).numpy()
    names = [f"embedding_{i}" for i in range(vectors.shape[1])]
    return _over_all(frame.index, seen, vectors, names)


def risk(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    clinical: pd.DataFrame,
    *,
    scale: Scale | None = None,
) -> pd.DataFrame:
    """Return the log-hazard of each sample's patient and, if modelled, survival.

    A log-hazard compares patients of one cancer type; higher means an earlier death.

    Parameters
    ----------
    checkpoint
        A model that has been trained for survival.
    frame, scale
        As for `impute`.
    clinical
        One row a sample, in the order of the frame: cancer_type as the study spells it,
        and age (years) and sex ("female" or "male") if the study uses them.

    Returns
    -------
    DataFrame
        `log_hazard`; with the discrete-time loss also `survival_{end}_days`, the
        probability of living past each interval's end. NaN for a sample with no
        measured gene of the vocabulary, or a cancer type that is not in the study.

    Raises
    ------
    CheckpointError
        If the model has not been trained for survival.
    ConfigError
        If no formula leads from `scale` to the study's.
    DataError
        As for `impute`, or if no cancer type is in the study.
    """
    study = checkpoint.study
    require(checkpoint, SURVIVAL)
    n_genes = len(checkpoint.vocabulary)
    model = tasks.load_survival(study, n_genes, checkpoint.parameters)
    Findings(found=[*review_clinical(study, clinical)]).refuse_errors()
    patients = _patients(checkpoint, frame, scale, clinical)
    known = patients.type_index(study.survival.cancer_types) >= 0
    predicted = patients.measured.any(dim=1) & known
    names = ["log_hazard"]
    if study.survival.loss == "discrete-time":
        names += [f"survival_{end:g}_days" for end in study.survival.interval_ends]
    numbers = np.empty((0, len(names)), dtype=np.float32)
    if predicted.any():
        some = patients.take(_places(predicted))
        log_hazard = predict.log_hazard(study, model, some)
        survival = predict.survival(study, model, some, log_hazard)
        both = torch.cat([log_hazard[:, None], survival], dim=1)  # (N, 1 + K)
        numbers = both.numpy()[:, : len(names)]
    return _over_all(frame.index, predicted, numbers, names)


def classify(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    *,
    scale: Scale | None = None,
    among: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return the probability of each cancer type, and the most probable one.

    Parameters
    ----------
    checkpoint
        A model that has been trained for classification.
    frame, scale
        As for `impute`.
    among
        Cancer types that are possible; None: all of the study. The others get 0.

    Returns
    -------
    DataFrame
        `most_probable`: a class, or `NONE` where the sample is unlike the training
        patients; `unlike_training`: yes, no or unknown; `unlikeness`; then
        `probability_{class}` for each class. None and NaN for a sample with no
        measured gene of the vocabulary.

    Raises
    ------
    CheckpointError, ConfigError, DataError
        As for `risk`.
    """
    classes = checkpoint.study.classification.classes
    require(checkpoint, CLASSIFICATION)
    n_genes = len(checkpoint.vocabulary)
    model = tasks.load_classifier(checkpoint.study, n_genes, checkpoint.parameters)
    patients = _patients(checkpoint, frame, scale)
    seen = patients.measured.any(dim=1)
    some = patients.take(_places(seen))
    possible = torch.from_numpy(possible_types(checkpoint, among))
    probabilities = predict.class_probabilities(model, some, possible).numpy()
    names = [f"probability_{name}" for name in classes]
    table = _over_all(frame.index, seen, probabilities, names)
    best = np.full(len(frame), None, dtype=object)
    best[seen.numpy()] = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
    found = likeness(checkpoint, frame, scale=scale)
    best[(found["unlike_training"] == "yes").to_numpy()] = NONE
    return pd.concat(
        [pd.Series(best, frame.index, name="most_probable"), found, table], axis=1
    )


def likeness(
    checkpoint: Checkpoint, frame: pd.DataFrame, *, scale: Scale | None = None
) -> pd.DataFrame:
    """Return how far each sample lies from the patients of the training.

    Parameters
    ----------
    checkpoint, frame, scale
        As for `impute`.

    Returns
    -------
    DataFrame
        `unlike_training`: "yes" where `unlikeness` (see `uncertainty.unlikeness`)
        exceeds the checkpoint's `unlike_from`, else "no"; "unknown" where the model
        has no factor model or no threshold. None and NaN for a sample with no measured
        gene of the vocabulary.

    Raises
    ------
    CheckpointError, ConfigError, DataError
        As for `impute`.
    """
    study, n_genes = checkpoint.study, len(checkpoint.vocabulary)
    linear = tasks.load_backbone(study, n_genes, checkpoint.parameters).encoder.linear
    patients = _patients(checkpoint, frame, scale)
    seen = patients.measured.any(dim=1).numpy()
    score = np.full(len(frame), np.nan, dtype=np.float32)
    if linear is not None:
        score = unlikeness(linear, patients.values).numpy()
    answer = np.full(len(frame), "unknown", dtype=object)
    if linear is not None and checkpoint.unlike_from is not None:
        answer = np.where(score > checkpoint.unlike_from, "yes", "no").astype(object)
    answer[~seen] = None
    columns = {"unlike_training": answer, "unlikeness": score}
    return pd.DataFrame(columns, index=frame.index)


def review_likeness(checkpoint: Checkpoint, frame: pd.DataFrame) -> tuple[Finding, ...]:
    """Return how many samples are unlike the patients of the training, or unknown."""
    found = likeness(checkpoint, frame)["unlike_training"]
    findings = Findings()
    total = int(found.notna().sum())
    if count := int((found == "yes").sum()):
        findings.add(Code.UNLIKE_TRAINING, "samples", count=count, total=total)
    if (found == "unknown").any():
        findings.add(Code.LIKENESS_UNKNOWN, "model", total=total)
    return tuple(findings.found)


def _backbone(checkpoint: Checkpoint) -> GexBert:
    require(checkpoint, PRETRAINING)
    n_genes = len(checkpoint.vocabulary)
    return tasks.load_backbone(checkpoint.study, n_genes, checkpoint.parameters)


def _patients(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    scale: Scale | None,
    clinical: pd.DataFrame | None = None,
) -> Patients:
    """Return one row a sample on the vocabulary, standardised."""
    Findings(found=[*review(checkpoint, frame, scale=scale)]).refuse_errors()
    study = checkpoint.study
    cohort = Cohort(
        patients=tuple(map(str, range(len(frame)))),  # each sample by itself
        genes=tuple(frame.columns),
        expression=convert(frame.to_numpy(), scale or study.scale, study.scale),
        clinical=pd.DataFrame(index=frame.index) if clinical is None else clinical,
    )
    return to_patients(cohort, checkpoint.vocabulary, checkpoint.standardisation)


def _places(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero().squeeze(1)


def _over_all(
    index: pd.Index, rows: torch.Tensor, numbers: NDArray[np.float32], names: list[str]
) -> pd.DataFrame:
    """Return numbers of some rows as a table of all rows, NaN in the others."""
    table = np.full((len(index), len(names)), np.nan, dtype=np.float32)
    table[rows.numpy()] = numbers
    return pd.DataFrame(table, index=index, columns=names)
