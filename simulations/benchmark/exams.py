"""The exams of imputation: patients with hidden cells, of whom the truth is known.

Those of the unseen institutions, and other data: RSEM of tumours beside normals of the
same patients, and a microarray. N patients, V genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.cohort import Cohort, read_parquet
from fedgex.common.harmonise import Patients
from fedgex.common.masking import Pattern
from fedgex.common.scale import Scale, convert, is_convertible
from fedgex.common.statistics import GeneMoments
from fedgex.common.study import Evaluation
from fedgex.server import evaluation
from fedgex.simulations.benchmark.ground import Ground, institutions

UNSEEN = "unseen institutions"
RATES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
"""Missing completely at random."""
PANELS = (50, 100, 200)
"""Genes that are measured."""
DROPOUT_RATES = (0.3, 0.5, 0.7, 0.9)
"""Of low expression dropping out."""
OTHER_RATES = (0.5, 0.9)
"""Completely at random, on other data."""

PAIRED = "tcga/paired"
"""Folder of tumours and normals, a file a cancer type, as log2(RSEM + 0.25)."""
TUMOUR, NORMAL = "01", "11"
"""Kinds of tissue, in a sample's barcode."""
MICROARRAY = "other/GSE1992_breast.parquet"
"""Breast tumours as log ratios."""
BREAST = "BRCA"
FILE_TYPES = {"COAD": "COADREAD"}
"""Cancer type of a file whose name is another."""
FEWEST = 10
"""Patients that other data are judged on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Samples of the paired layer; S of them."""

    expression: pd.DataFrame
    """Genes by their names, on `Scale.LOG2P025`; S rows."""
    patient: NDArray[np.str_]
    """Of each sample, shape (S,), as are those below."""
    tissue: NDArray[np.str_]
    cancer_type: NDArray[np.str_]
    institution: NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Patients with hidden cells, of whom the truth is known."""

    name: str
    patients: Patients
    group: NDArray[np.str_]
    """Institution of each patient, shape (N,)."""
    rules: Sequence[tuple[Evaluation, Sequence[Pattern]]]

    def settings(self, seed: int) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Yield each setting with the cells that it hides, (N, V)."""
        for rule, patterns in self.rules:
            for pattern, key, hidden in evaluation.hidden_cells(
                self.patients, rule, seed, tuple(patterns)
            ):
                yield f"{pattern} {key}", hidden.numpy()


def unseen(ground: Ground) -> Exam:
    """Return the exam of the unseen institutions, at every setting."""
    rules: list[tuple[Evaluation, tuple[Pattern, ...]]]
    if ground.quick:
        rules = [
            (Evaluation(rates=(0.5, 0.9), panels=(100,)), ("mcar", "panel")),
            (Evaluation(rates=(0.5,), panels=()), ("mnar",)),
        ]
    else:
        rules = [
            (Evaluation(rates=RATES, panels=PANELS), ("mcar", "panel")),
            (Evaluation(rates=DROPOUT_RATES, panels=()), ("mnar",)),
        ]
    return Exam(
        name=UNSEEN,
        patients=ground.patients(ground.unseen),
        group=ground.institution,
        rules=rules,
    )


def other_data(ground: Ground) -> tuple[list[Exam], list[str]]:
    """Return the exams on other data, and why some are not there."""
    exams: list[Exam] = []
    notes: list[str] = []
    for found in (*_paired(ground), _microarray(ground)):
        if isinstance(found, str):
            notes.append(found)
        else:
            exams.append(found)
    return exams, notes


def paired(ground: Ground, genes: Sequence[str] | None = None) -> Layer | str:
    """Return the samples of the paired layer, or why there are none.

    Parameters
    ----------
    genes
        NaN where a file lacks one; None: those that all files have.
    """
    files = sorted((ground.data_dir / PAIRED).glob("*.parquet"))
    if not files:
        return f"{PAIRED} is absent"
    if not is_convertible(Scale.LOG2P025, ground.study.scale):
        return f"{PAIRED} cannot be converted to the {ground.study.scale} scale"
    tables = {FILE_TYPES.get(f.stem, f.stem): read_parquet(f) for f in files}
    if genes is None:
        found = pd.concat(tables.values(), join="inner")
    else:
        found = pd.concat([t.reindex(columns=list(genes)) for t in tables.values()])
    barcode = found.index.astype(str)
    patient = barcode.str[:12]
    where = institutions(ground.scenario, ground.data_dir).reindex(patient)
    return Layer(
        expression=found,
        patient=patient.to_numpy(dtype=str),
        tissue=barcode.str[13:15].to_numpy(dtype=str),
        cancer_type=np.repeat([*tables], [len(table) for table in tables.values()]),
        institution=where.to_numpy().astype(str),
    )


def apart(ground: Ground) -> tuple[str, ...]:
    """Return the institutions that neither train nor judge."""
    return ground.scenario.public.institutions if ground.scenario.public else ()


def _paired(ground: Ground) -> list[Exam | str]:
    """Return tumours of the training types, of other types, and normals.

    Nobody who trains is among them, nor anybody of the institutions set apart.
    """
    layer = paired(ground, ground.genes.genes)
    if isinstance(layer, str):
        return [f"{layer}, so no other layer was judged"]
    trained = [p for cohort in ground.sites.values() for p in cohort.patients]
    allowed = ~np.isin(layer.patient, trained)
    allowed &= ~np.isin(layer.institution, apart(ground))
    known = np.isin(layer.cancer_type, [t for t in set(ground.pooled.cancer_type) if t])
    tumour, normal = layer.tissue == TUMOUR, layer.tissue == NORMAL
    groups = {
        "paired, tumours": tumour & known,
        "paired, tumours of other types": tumour & ~known,
        "paired, normals": normal,
    }
    found = layer.expression.to_numpy(np.float32)
    values = convert(found, Scale.LOG2P025, ground.study.scale)
    return [
        _exam(ground, name, layer.patient[rows], values[rows], layer.institution[rows])
        for name, rows in ((name, g & allowed) for name, g in groups.items())
    ]


def _microarray(ground: Ground) -> Exam | str:
    """Return breast tumours, each gene with the mean and SD of the sites' own.

    A log ratio has no level, so that `predict` takes none. The means and SDs follow
    from the sums by cancer type that sites send.
    """
    path = ground.data_dir / MICROARRAY
    if not path.is_file():
        return f"{MICROARRAY} is absent, so no other platform was judged"
    of_type = [t == BREAST for t in ground.pooled.cancer_type]
    if sum(of_type) < FEWEST:
        return (
            f"{MICROARRAY} was not judged: fewer than {FEWEST} {BREAST} patients train"
        )
    table = read_parquet(path).reindex(columns=list(ground.genes.genes))
    own = GeneMoments.of(table.to_numpy())
    wanted = GeneMoments.of(ground.pooled.values.numpy()[of_type])
    standard = (table.to_numpy() - own.mean) / own.sd * wanted.sd + wanted.mean
    scale = ground.standardisation
    return _exam(
        ground,
        "GSE1992",
        table.index.to_numpy().astype(str),
        (standard * scale.sd + scale.mean).astype(np.float32),
        np.full(len(table), "GSE1992"),
    )


def _exam(
    ground: Ground,
    name: str,
    patients: NDArray[np.str_],
    values: NDArray[np.float32],
    group: NDArray[np.str_],
) -> Exam | str:
    """Return an exam on expression (N, V), study's scale, or why there is none."""
    _, first = np.unique(patients, return_index=True)
    first = np.sort(first)
    if len(first) < FEWEST:
        return f"{name}: fewer than {FEWEST} patients who do not train, so not judged"
    cohort = Cohort(
        patients=tuple(patients[first]),
        genes=ground.genes.genes,
        expression=values[first],
        clinical=pd.DataFrame(index=range(len(first))),
    )
    return Exam(
        name=name,
        patients=ground.patients(cohort),
        group=group[first],
        rules=[(Evaluation(rates=OTHER_RATES, panels=()), ("mcar",))],
    )
