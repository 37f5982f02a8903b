"""A finished model on a hospital's own samples: restore, embed, risk, cancer type.

Plain functions on DataFrames with one row a sample and one column a gene; `predict_cli`
is their command line. They run on the CPU, in float32.

N samples, G genes of the frame, V genes of the vocabulary, D width, K intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedgex.client import state
from fedgex.common import predictions, tasks
from fedgex.common.checkpoint import Checkpoint
from fedgex.common.codes import Code
from fedgex.common.cohort import Cohort
from fedgex.common.errors import CheckpointError, ConfigError, DataError, Finding
from fedgex.common.harmonise import Patients, to_patients
from fedgex.common.model import GexBert
from fedgex.common.objectives import ModelImputer, embed_all
from fedgex.common.parameters import load_parameters
from fedgex.common.scale import LOGARITHMIC, Scale, convert, floor
from fedgex.common.statistics import foreign_scale
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Study
from fedgex.common.tasks import BACKBONE, Modules
from fedgex.common.uncertainty import restore_with_spread

FEW_GENES = 0.1
"""Below this share of the vocabulary a warning says that little is known."""

BATCH_SIZE = 16
"""Samples restored at a time: each asks for up to the whole vocabulary."""


def impute(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    *,
    scale: Scale | None = None,
    genes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Restore what was not measured: NaN cells, and genes of the vocabulary not there.

    Measured cells, and genes outside the vocabulary, stay as they are. A restored value
    that is below zero expression is set to zero expression.

    Parameters
    ----------
    checkpoint
        A model that has been pretrained.
    frame
        Expression, shape (N, G), columns named by HGNC symbol; NaN where not measured.
    scale
        Scale of the frame and of the result; None: the study's.
    genes
        Genes to restore; None: the whole vocabulary.

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
    scale = scale or checkpoint.study.scale
    wanted = wanted_genes(checkpoint, genes)
    backbone = _modules(checkpoint, PRETRAINING, None)[BACKBONE]
    assert isinstance(backbone, GexBert)
    patients = _patients(checkpoint, frame, scale)
    values = patients.values.numpy()
    seen = patients.measured.any(dim=1).numpy()
    standardised = np.full_like(values, np.nan)
    standardised[seen] = ModelImputer(backbone, BATCH_SIZE).impute(values[seen])
    canonical = checkpoint.standardisation.undo(standardised)
    canonical = np.maximum(canonical, np.float32(floor(checkpoint.study.scale)))
    restored = convert(canonical, checkpoint.study.scale, scale)  # (N, V)
    return _fill(frame, checkpoint.vocabulary.genes, restored, wanted)


def spread(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    *,
    scale: Scale | None = None,
    genes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return the standard deviation by which each value that `impute` fills may be off.

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
        As for `impute`, or if the model has no linear start, which alone knows how sure
        it is.
    """
    wanted = wanted_genes(checkpoint, genes)
    backbone = _modules(checkpoint, PRETRAINING, None)[BACKBONE]
    assert isinstance(backbone, GexBert)
    patients = _patients(checkpoint, frame, scale)
    seen = patients.measured.any(dim=1)
    _, sd = restore_with_spread(backbone, patients.values[seen])
    known = patients.measured[seen].numpy()
    numbers = np.where(known, np.nan, sd.numpy() * checkpoint.standardisation.sd)
    names = [
        g
        for g, is_wanted in zip(checkpoint.vocabulary.genes, wanted, strict=True)
        if is_wanted
    ]
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
    backbone = _modules(checkpoint, PRETRAINING, None)[BACKBONE]
    assert isinstance(backbone, GexBert)
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
    state_dir: Path | None = None,
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
    state_dir
        Where this hospital keeps its heads of this study, if they stay local.

    Returns
    -------
    DataFrame
        `log_hazard`; with the discrete-time loss also `survival_{end}_days`, the
        probability of living past each interval's end. NaN for a sample with no
        measured gene of the vocabulary, or a cancer type that is not in the study.

    Raises
    ------
    CheckpointError
        If the model has no survival head, or the hospital has none.
    ConfigError
        If no formula leads from `scale` to the study's.
    DataError
        As for `impute`, or if no cancer type is in the study.
    """
    study = checkpoint.study
    modules = _modules(checkpoint, SURVIVAL, state_dir)
    _refuse(review_clinical(study, clinical))
    patients = _patients(checkpoint, frame, scale, clinical)
    known = patients.type_index(study.survival.cancer_types) >= 0
    judged = patients.measured.any(dim=1) & known
    names = ["log_hazard"]
    if study.survival.loss == "discrete-time":
        names += [f"survival_{end:g}_days" for end in study.survival.interval_ends]
    numbers = np.empty((0, len(names)), dtype=np.float32)
    if judged.any():
        some = patients.take(_places(judged))
        log_hazard = predictions.log_hazard(study, modules, some)
        survival = predictions.survival(study, modules, some, log_hazard)
        both = torch.cat([log_hazard[:, None], survival], dim=1)  # (N, 1 + K)
        numbers = both.numpy()[:, : len(names)]
    return _over_all(frame.index, judged, numbers, names)


def classify(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    *,
    scale: Scale | None = None,
    among: Sequence[str] | None = None,
    state_dir: Path | None = None,
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
    state_dir
        As for `risk`.

    Returns
    -------
    DataFrame
        `most_probable`, then `probability_{class}` for each class; None and NaN for a
        sample with no measured gene of the vocabulary.

    Raises
    ------
    CheckpointError, ConfigError, DataError
        As for `risk`.
    """
    classes = checkpoint.study.classification.classes
    modules = _modules(checkpoint, CLASSIFICATION, state_dir)
    patients = _patients(checkpoint, frame, scale)
    seen = patients.measured.any(dim=1)
    some = patients.take(_places(seen))
    possible = torch.from_numpy(possible_types(checkpoint, among))
    probabilities = predictions.class_probabilities(modules, some, possible).numpy()
    names = [f"probability_{name}" for name in classes]
    table = _over_all(frame.index, seen, probabilities, names)
    best = np.full(len(frame), None, dtype=object)
    best[seen.numpy()] = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
    table.insert(0, "most_probable", best)
    return table


def require(checkpoint: Checkpoint, phase: str, *, has_state_dir: bool = False) -> None:
    """Refuse a model that cannot do what a phase teaches.

    Parameters
    ----------
    has_state_dir
        Whether a head that stays local could be taken from the hospital's state.

    Raises
    ------
    CheckpointError
        If the phase has not been trained, or its head is not at hand.
    """
    trained = trained_phases(checkpoint)
    said = f"This model has been trained for: {', '.join(trained) or 'nothing yet'}."
    if phase not in trained:
        raise CheckpointError(
            f"the model has not been trained for {phase}, which this prediction needs. "
            f"{said} Choose a later checkpoint, or a model of another study."
        )
    if head_is_local(checkpoint.study, phase) and not has_state_dir:
        raise CheckpointError(
            f"the model has no {phase} head, because this study keeps that head at "
            f"each hospital. {said} Name the site.toml of a hospital that took part "
            "with --site; it has a head of its own."
        )


def trained_phases(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the phases of which the model has seen at least one round, in order."""
    order = tuple(checkpoint.study.phases)
    at = order.index(checkpoint.phase)
    return order[: at + 1] if checkpoint.round else order[:at]


def head_is_local(study: Study, phase: str) -> bool:
    """Return whether a phase's head stays at each hospital."""
    return phase != PRETRAINING and f"{phase}.head" not in tasks.travelling(
        study, phase
    )


def wanted_genes(
    checkpoint: Checkpoint, genes: Sequence[str] | None
) -> NDArray[np.bool_]:
    """Return which genes of the vocabulary are asked for, shape (V,); None is all.

    Raises
    ------
    ConfigError
        If any gene is not in the vocabulary.
    """
    vocabulary = checkpoint.vocabulary
    if genes is None:
        return np.ones(len(vocabulary), dtype=bool)
    unknown = sorted({gene for gene in genes if gene not in vocabulary.index})
    if unknown or not genes:
        said = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        raise ConfigError(
            f"{len(unknown)} of {len(genes)} genes asked for are not in the study's "
            f"vocabulary ({said}); expected one or more of its {len(vocabulary)} HGNC "
            "symbols. No other gene can be restored by this model."
        )
    wanted = np.zeros(len(vocabulary), dtype=bool)
    wanted[[vocabulary.index[gene] for gene in genes]] = True
    return wanted


def possible_types(
    checkpoint: Checkpoint, among: Sequence[str] | None
) -> NDArray[np.bool_]:
    """Return which of the study's classes are possible, shape (C,); None is all.

    Raises
    ------
    ConfigError
        If one named is no class of the study, or fewer than two are named.
    """
    classes = checkpoint.study.classification.classes
    if among is None:
        return np.ones(len(classes), dtype=bool)
    unknown = sorted(set(among) - set(classes))
    if unknown or len(set(among)) < 2:
        said = f"; not known: {', '.join(unknown)}" if unknown else ""
        raise ConfigError(
            f"{len(set(among))} cancer types are named as possible{said}; expected two "
            f"or more of {', '.join(classes)}, which this model tells apart."
        )
    return np.isin(classes, list(among))


def review(
    checkpoint: Checkpoint, frame: pd.DataFrame, *, scale: Scale | None = None
) -> tuple[Finding, ...]:
    """Say how well the genes of a frame (N, G) fit the model; see docs/predict.md.

    Parameters
    ----------
    scale
        That of the values, as for `impute`.
    """
    index, n_vocabulary = checkpoint.vocabulary.index, len(checkpoint.vocabulary)
    inside = [name in index for name in frame.columns]
    measured = frame.loc[:, inside].notna().to_numpy()
    n_repeated = int(frame.columns.duplicated().sum())
    n_genes = int(measured.any(axis=0).sum())
    n_empty = int((~measured.any(axis=1)).sum())
    if n_repeated:
        finding = Code.GENE_COLUMNS_DIFFER.finding(
            where="genes",
            found=f"{n_repeated} columns repeat the name of another",
            expected="one column a gene",
            action="Keep the right one, or label them apart.",
        )
        return (finding,)
    if n_genes == 0:
        finding = Code.NO_VOCABULARY_GENE.finding(
            where="genes",
            found=f"none of the vocabulary's {n_vocabulary} genes is measured",
            expected="HGNC symbols as in the study, or Ensembl ids and an HGNC table",
            action="Check the names of the genes, and which axis they are on.",
        )
        return (finding,)
    findings = []
    if n_genes < FEW_GENES * n_vocabulary:
        finding = Code.FEW_VOCABULARY_GENES.finding(
            where="genes",
            found=f"{n_genes} of the vocabulary's {n_vocabulary} genes are measured",
            expected=f"{FEW_GENES:.0%} or more",
            action="Trust the predictions little; they rest on few genes.",
        )
        findings.append(finding)
    if n_empty:
        finding = Code.SAMPLES_WITHOUT_GENES.finding(
            where="samples",
            found=f"{n_empty} of {len(frame)} without any gene of the vocabulary, for "
            "which nothing is predicted",
            expected="one measured gene or more in every sample",
            action="Nothing, or export their values.",
        )
        findings.append(finding)
    ratio = _foreign_scale(checkpoint, frame.loc[:, inside], scale)
    if ratio is not None:
        finding = Code.FOREIGN_SCALE.finding(
            where="values",
            found=f"the means of the genes are {ratio:.2f} times those that the model "
            "was trained on",
            expected=f"about 1, whatever the cancer, on the {checkpoint.study.scale} "
            "scale",
            action="Check the scale that is named; natural logarithms called log2p1 "
            "give 0.69. Do not use the predictions before.",
        )
        findings.append(finding)
    return tuple(findings)


def _foreign_scale(
    checkpoint: Checkpoint, frame: pd.DataFrame, scale: Scale | None
) -> float | None:
    """Return what `statistics.foreign_scale` says of a frame of the model's genes."""
    canonical = checkpoint.study.scale
    if canonical not in LOGARITHMIC:
        return None
    values = convert(frame.to_numpy(), scale or canonical, canonical)
    places = [checkpoint.vocabulary.index[name] for name in frame.columns]
    level = checkpoint.standardisation.mean[places]
    return foreign_scale(pd.DataFrame(values).mean().to_numpy(np.float64), level)


def review_clinical(study: Study, clinical: pd.DataFrame) -> tuple[Finding, ...]:
    """Say whether a clinical table, one row a sample, suffices to predict risk."""
    findings = []
    types = study.survival.cancer_types
    known = np.zeros(len(clinical), dtype=bool)
    if "cancer_type" in clinical:
        known = clinical["cancer_type"].isin(types).to_numpy(dtype=bool)
    if not known.all():
        some, none = Code.SOME_CANCER_TYPES_MISSING, Code.CANCER_TYPES_MISSING
        finding = (some if known.any() else none).finding(
            where="cancer_type",
            found=f"{int((~known).sum())} of {len(clinical)} samples without a cancer "
            "type of the study, for which no risk is predicted",
            expected=f"one of {', '.join(types)}",
            action="Add a clinical column cancer_type, spelt like this, or name the "
            "type of all samples with --cancer-type.",
        )
        findings.append(finding)
    lacking = np.zeros(len(clinical), dtype=bool)
    for name in ("age", "sex"):
        lacking |= clinical[name].isna().to_numpy() if name in clinical else True
    if study.survival.clinical and lacking.any():
        finding = Code.COVARIATES_MISSING.finding(
            where="age and sex",
            found=f"{int(lacking.sum())} of {len(clinical)} samples without age or "
            "sex, taken as 60 years and female",
            expected="both, because the study uses them",
            action="Add clinical columns age (years) and sex.",
        )
        findings.append(finding)
    return tuple(findings)


def _modules(checkpoint: Checkpoint, phase: str, state_dir: Path | None) -> Modules:
    """Return a phase's modules, with the hospital's own head if heads stay local."""
    require(checkpoint, phase, has_state_dir=state_dir is not None)
    study, whole = checkpoint.study, checkpoint.parameters
    n_genes = len(checkpoint.vocabulary)
    if state_dir is None or not head_is_local(study, phase):
        return tasks.load(study, n_genes, phase, whole)
    modules = tasks.build(study, n_genes, phase)
    encoder, head = f"{phase}.encoder", f"{phase}.head"
    load_parameters({encoder: modules[encoder]}, tasks.sent(study, phase, whole))
    state.latest_head({head: modules[head]}, state_dir, phase)
    return modules


def _patients(
    checkpoint: Checkpoint,
    frame: pd.DataFrame,
    scale: Scale | None,
    clinical: pd.DataFrame | None = None,
) -> Patients:
    """Return one row a sample on the vocabulary, standardised."""
    _refuse(review(checkpoint, frame, scale=scale))
    study = checkpoint.study
    cohort = Cohort(
        patients=tuple(map(str, range(len(frame)))),  # each sample by itself
        genes=tuple(frame.columns),
        expression=convert(frame.to_numpy(), scale or study.scale, study.scale),
        clinical=pd.DataFrame(index=frame.index) if clinical is None else clinical,
    )
    return to_patients(cohort, checkpoint.vocabulary, checkpoint.standardisation)


def _refuse(findings: Sequence[Finding]) -> None:
    if any(finding.severity == "error" for finding in findings):
        raise DataError(findings)


def _fill(
    frame: pd.DataFrame,
    genes: Sequence[str],
    restored: NDArray[np.float32],
    wanted: NDArray[np.bool_],
) -> pd.DataFrame:
    """Put restored values (N, V) into NaN cells, and add the genes that are not there.

    Parameters
    ----------
    wanted
        Genes to fill or add, shape (V,).
    """
    values = frame.to_numpy(copy=True)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    place = frame.columns.get_indexer(pd.Index(genes))  # (V,), -1 where not there
    there, new = wanted & (place >= 0), wanted & (place < 0)
    cells = values[:, place[there]]
    values[:, place[there]] = np.where(np.isnan(cells), restored[:, there], cells)
    added = [gene for gene, is_new in zip(genes, new, strict=True) if is_new]
    return pd.DataFrame(
        np.hstack([values, restored[:, new].astype(values.dtype)]),
        index=frame.index,
        columns=[*frame.columns, *added],
    )


def _places(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero().squeeze(1)


def _over_all(
    index: pd.Index, rows: torch.Tensor, numbers: NDArray[np.float32], names: list[str]
) -> pd.DataFrame:
    """Return numbers of some rows as a table of all rows, NaN in the others."""
    table = np.full((len(index), len(names)), np.nan, dtype=np.float32)
    table[rows.numpy()] = numbers
    return pd.DataFrame(table, index=index, columns=names)
