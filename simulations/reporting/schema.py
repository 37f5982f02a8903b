"""Schema of the report of a simulated federation, checked before it is written.

docs/report.md explains every key. A misspelt top-level key is refused; further measures
inside a section are kept in report.json, though the page does not show them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from fedgex.common.settings import Settings

Imputer = Annotated[str, Field(pattern="^(model|mean|knn|ppca|gaussian|mixture)$")]
Scheme = Annotated[str, Field(pattern="^(mcar|panel|mnar)$")]
SurvivalMethod = Annotated[
    str, Field(pattern="^(alone|federated|pooled|cox_ridge|pca_cox)$")
]
Classifier = Annotated[str, Field(pattern="^(alone|federated|pooled|logistic)$")]
NumberText = Annotated[str, Field(pattern=r"^\d+(\.\d+)?$")]
"""A missing rate such as "0.5", or a number of genes such as "50"."""


class _Part(Settings):
    """A part of the report; measures that it does not know are let through."""

    model_config = ConfigDict(extra="allow")


class Site(_Part):
    """One hospital of the federation."""

    name: str
    patients: int
    """Patients who train."""
    genes: int
    """Genes of the vocabulary that the hospital measured."""
    train_loss: float | None = None
    """Loss of the last round of pretraining that it contributed to."""


class Apart(_Part):
    """The hold-out, or the server's public cohort."""

    patients: int
    institutions: list[str]
    """Where its patients were treated; no patient of these trains at a hospital."""


class VocabularyFacts(_Part):
    """The shared gene list."""

    genes: int
    hash: str


class StudyFacts(_Part):
    """The study, its data and its software."""

    name: str
    hash: str
    seed: int
    scale: str
    preset: str
    parameters: int
    """Trainable numbers of the model."""
    vocabulary: VocabularyFacts
    sites: list[Site]
    holdout: Apart
    public: Apart | None = None
    """None if there is none."""
    versions: dict[str, str]
    command: str
    seconds: float
    """Time of training, over every start of the run, without pauses."""
    protections: list[str]
    """Protections of patients and hospitals, a sentence each."""
    notes: list[str]
    """Remarks on this run."""


Errors = dict[Scheme, dict[NumberText, float | None]]
"""Mean squared error by scheme and missing rate, or number of genes measured."""


class Round(_Part):
    """One round of one phase."""

    phase: str
    round: int
    train_loss: float | None
    """Mean loss at the sites while they trained."""
    judged_loss: float | None
    """Mean loss at the sites, judged without learning."""
    holdout_mse: Errors | None
    """Restoration error on the hold-out; null where the round was not judged."""
    seconds: float | None
    """None where the server stopped before it was written."""
    sites_contributed: int
    sites_total: int


class ImputationScore(_Part):
    """Errors on hidden cells of the hold-out, genes standardised."""

    mse: float | None
    """Mean squared error over the hidden cells, gene variances."""
    mae: float | None = None
    """Mean absolute error, gene standard deviations."""
    pearson: float | None = None
    """Median over the genes of the correlation across patients."""
    spearman: float | None = None
    """The same by ranks."""
    genes_r_above_0: int | None = None
    genes_r_above_half: int | None = None
    genes_judged: int | None = None


Imputations = dict[Imputer, dict[Scheme, dict[NumberText, ImputationScore]]]
"""By method, scheme, and missing rate or number of genes measured."""


class PerGene(_Part):
    """Errors of each gene at one missing rate, all lists in the order of `genes`."""

    rate: NumberText
    genes: list[str]
    model_mse: list[float | None]
    gaussian_mse: list[float | None]
    model_r: list[float | None]

    @model_validator(mode="after")
    def _as_long_as_genes(self) -> Self:
        lists = (self.genes, self.model_mse, self.gaussian_mse, self.model_r)
        lengths = [len(values) for values in lists]
        if len(set(lengths)) > 1:
            raise ValueError(
                "genes, model_mse, gaussian_mse and model_r hold "
                f"{', '.join(map(str, lengths))} values; expected equally many"
            )
        return self

    def pairs(self) -> list[tuple[float, float]]:
        """Return (model, Gaussian) errors of the genes that have both."""
        return [
            (model, gaussian)
            for model, gaussian in zip(self.model_mse, self.gaussian_mse, strict=True)
            if model is not None and gaussian is not None
        ]


class SurvivalScore(_Part):
    """Concordance of one method in one cohort."""

    c_index: float | None
    """0.5 is chance, 1 a perfect order of the patients; null: not estimable."""
    sd: float | None = None
    patients: int
    events: int
    reason: str | None = None
    """Why there is no C-index."""


Survivals = dict[str, dict[SurvivalMethod, SurvivalScore]]
"""By cohort and method."""


class RiskGroup(_Part):
    """Kaplan-Meier curve of the patients with low, or high, predicted risk."""

    days: list[float]
    """Where the curve steps down, rising."""
    survival: list[float]
    """Share surviving from that day on."""
    patients: int

    @model_validator(mode="after")
    def _one_share_a_day(self) -> Self:
        if len(self.days) != len(self.survival):
            raise ValueError(
                f"{len(self.days)} days but {len(self.survival)} survival values"
            )
        return self


class KaplanMeier(_Part):
    """Survival by predicted risk in one cohort."""

    low: RiskGroup
    high: RiskGroup
    logrank_p: float | None


class ClassificationScore(_Part):
    """Classification of the cancer type from one number of genes."""

    accuracy: float | None
    macro_f1: float | None


Classifications = dict[Classifier, dict[NumberText, ClassificationScore]]
"""By method and number of genes measured."""


class Cost(_Part):
    """Cost of the run; a measure that was not taken is left out."""

    samples_per_s: float | None = None
    round_overhead_s: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    peak_rss_mb: float | None = None


class Report(Settings):
    """The complete report."""

    schema_: Literal[1] = Field(alias="schema")
    study: StudyFacts
    rounds: tuple[Round, ...] = ()
    imputation: Imputations
    imputation_per_gene: PerGene | None = None
    survival: Survivals
    kaplan_meier: dict[str, KaplanMeier] = Field(default_factory=dict)
    classification: Classifications
    cost: Cost


def headline_key(keys: Iterable[str]) -> str:
    """Return the key that stands for all: "0.5" if there, else the middle one."""
    ordered = sorted(set(keys), key=float)
    return "0.5" if "0.5" in ordered else ordered[len(ordered) // 2]


def plain(value: Any, digits: int | None = None) -> Any:
    """Return what JSON can hold: NaN as None, numpy's numbers as Python's.

    Parameters
    ----------
    digits
        Significant digits of floats; None: all.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each, digits) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), digits)
    if isinstance(value, list | tuple):
        return [plain(each, digits) for each in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value
