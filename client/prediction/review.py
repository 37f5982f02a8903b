"""Check that a model can make a prediction for the given samples.

N samples, G genes of the frame, V genes of the vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.codes import Code
from fedgex.common.data.moments import foreign_scale
from fedgex.common.data.scales import Scale, convert
from fedgex.common.errors import CheckpointError, ConfigError, Finding
from fedgex.common.ingestion.findings import Findings
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import Study

FEW_GENES = 0.1
"""Measured share of the vocabulary below which a warning is given."""


def require(checkpoint: Checkpoint, phase: str) -> None:
    """Refuse a model that cannot predict what a phase trains.

    Raises
    ------
    CheckpointError
        If the phase has not been trained.
    """
    trained = trained_phases(checkpoint)
    has = f"This model has been trained for: {', '.join(trained) or 'nothing yet'}."
    if phase not in trained:
        raise CheckpointError(
            f"the model has not been trained for {phase}, which this prediction needs. "
            f"{has} Choose a later checkpoint, or a model of another study."
        )


def trained_phases(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the phases of which the model has seen at least one round, in order."""
    order = tuple(checkpoint.study.phases)
    at = order.index(checkpoint.phase)
    return order[: at + 1] if checkpoint.round else order[:at]


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
        some = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        raise ConfigError(
            f"{len(unknown)} of {len(genes)} genes asked for are not in the study's "
            f"vocabulary ({some}); expected one or more of its {len(vocabulary)} HGNC "
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
        which = f"; not known: {', '.join(unknown)}" if unknown else ""
        raise ConfigError(
            f"{len(set(among))} cancer types are named as possible{which}; expected "
            f"two or more of {', '.join(classes)}, the classes of this model."
        )
    return np.isin(classes, list(among))


def review(
    checkpoint: Checkpoint, frame: pd.DataFrame, *, scale: Scale | None = None
) -> tuple[Finding, ...]:
    """Return how well the genes of a frame (N, G) fit the model; see docs/predict.md.

    Parameters
    ----------
    scale
        That of the values, as for `impute`.
    """
    findings = Findings()
    unknown, n_vocabulary = checkpoint.unknown_genes, len(checkpoint.vocabulary)
    known = checkpoint.vocabulary.index.keys() - set(unknown)
    inside = [name in known for name in frame.columns]
    measured = frame.loc[:, inside].notna().to_numpy()
    n_repeated = int(frame.columns.duplicated().sum())
    n_genes = int(measured.any(axis=0).sum())
    n_empty = int((~measured.any(axis=1)).sum())
    if n_repeated:
        found = "{count} columns repeat the name of another"
        code = Code.GENE_COLUMNS_DIFFER
        findings.add(code, "genes", count=n_repeated, found=found)
        return tuple(findings.found)
    sizes: dict[str, Any] = {"n_genes": n_genes, "n_vocabulary": n_vocabulary}
    if n_genes == 0:
        findings.add(Code.NO_VOCABULARY_GENE, "genes", **sizes)
        return tuple(findings.found)
    if n_genes < FEW_GENES * n_vocabulary:
        findings.add(Code.FEW_VOCABULARY_GENES, "genes", **sizes, share=FEW_GENES)
    if unknown:
        some = ", ".join(unknown[:10]) + ", ..." * (len(unknown) > 10)
        code, n_unknown = Code.GENES_NOT_LEARNT, len(unknown)
        findings.add(code, "model", n_unknown=n_unknown, genes=some)
    if n_empty:
        code, total = Code.SAMPLES_WITHOUT_GENES, len(frame)
        findings.add(code, "samples", count=n_empty, total=total)
    ratio = _foreign_scale(checkpoint, frame.loc[:, inside], scale)
    if ratio is not None:
        study = checkpoint.study.scale
        findings.add(Code.FOREIGN_SCALE, "values", ratio=ratio, study=study)
    return tuple(findings.found)


def review_clinical(study: Study, clinical: pd.DataFrame) -> tuple[Finding, ...]:
    """Return what a clinical table, one row a sample, lacks to predict risk."""
    findings = Findings()
    types = study.survival.cancer_types
    known = np.zeros(len(clinical), dtype=bool)
    if "cancer_type" in clinical:
        known = clinical["cancer_type"].isin(types).to_numpy(dtype=bool)
    total = len(clinical)
    if not known.all():
        findings.add(
            Code.SOME_CANCER_TYPES_MISSING
            if known.any()
            else Code.CANCER_TYPES_MISSING,
            "cancer_type",
            count=int((~known).sum()),
            total=total,
            types=", ".join(types),
        )
    lacking = np.zeros(total, dtype=bool)
    for name in ("age", "sex"):
        lacking |= clinical[name].isna().to_numpy() if name in clinical else True
    if study.survival.clinical and lacking.any():
        code, count = Code.COVARIATES_MISSING, int(lacking.sum())
        findings.add(code, "age and sex", count=count, total=total)
    return tuple(findings.found)


def _foreign_scale(
    checkpoint: Checkpoint, frame: pd.DataFrame, scale: Scale | None
) -> float | None:
    """Apply `moments.foreign_scale` to a frame of genes of the vocabulary."""
    canonical = checkpoint.study.scale
    if canonical.logarithm is None:
        return None
    values = convert(frame.to_numpy(), scale or canonical, canonical)
    places = [checkpoint.vocabulary.index[name] for name in frame.columns]
    level = checkpoint.standardisation.mean[places]
    return foreign_scale(pd.DataFrame(values).mean().to_numpy(np.float64), level)
