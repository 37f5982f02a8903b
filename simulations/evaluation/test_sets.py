"""Test sets of imputation: patients with hidden cells whose values are known.

The unseen institutions, and other data: RSEM of tumours and of normal tissue of the
same patients, and a microarray. N patients, V genes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.data.cohort import Cohort, read_parquet
from fedgex.common.data.dataset import Patients
from fedgex.common.data.moments import GeneMoments
from fedgex.common.data.scales import Scale, convert, floor, is_convertible
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models.masking import Pattern
from fedgex.common.study import Evaluation, Survival
from fedgex.server import evaluation
from fedgex.simulations.evaluation.protocol import Split, institutions

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
RANK = 100
"""Most factors of the model of the other layer, which has a fifth of the patients."""
FEWEST = 10
"""Fewest patients of a test set."""


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
class TestSet:
    """Patients with hidden cells whose values are known."""

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


def unseen(split: Split) -> TestSet:
    """Return the test set of the unseen institutions, at every setting."""
    at_random, dropout, panels = (
        ((0.5, 0.9), (0.5,), (100,)) if split.quick else (RATES, DROPOUT_RATES, PANELS)
    )
    rules: list[tuple[Evaluation, tuple[Pattern, ...]]] = [
        (Evaluation(rates=at_random, panels=panels), ("mcar", "panel")),
        (Evaluation(rates=dropout, panels=()), ("mnar",)),
    ]
    unseen = split.patients(split.unseen)
    return TestSet(name=UNSEEN, patients=unseen, group=split.institution, rules=rules)


def other_data(split: Split) -> tuple[list[TestSet], list[str]]:
    """Return the test sets on other data, and the reasons why some are absent."""
    found = [*_paired(split), _microarray(split)]
    notes = [each for each in found if isinstance(each, str)]
    return [each for each in found if not isinstance(each, str)], notes


def paired(split: Split, genes: Sequence[str] | None = None) -> Layer | str:
    """Return the samples of the paired layer, or the reason why there are none.

    Parameters
    ----------
    genes
        NaN where a file lacks one; None: those that all files have.
    """
    files = sorted((split.data_dir / PAIRED).glob("*.parquet"))
    if not files:
        return f"{PAIRED} is absent"
    if not is_convertible(Scale.LOG2P025, split.study.scale):
        return f"{PAIRED} cannot be converted to the {split.study.scale} scale"
    tables = {FILE_TYPES.get(f.stem, f.stem): read_parquet(f) for f in files}
    if genes is None:
        found = pd.concat(tables.values(), join="inner")
    else:
        found = pd.concat([t.reindex(columns=list(genes)) for t in tables.values()])
    barcode = found.index.astype(str)
    patient = barcode.str[:12]
    where = institutions(split.scenario, split.data_dir).reindex(patient)
    return Layer(
        expression=found,
        patient=patient.to_numpy(dtype=str),
        tissue=barcode.str[13:15].to_numpy(dtype=str),
        cancer_type=np.repeat([*tables], [len(table) for table in tables.values()]),
        institution=where.to_numpy().astype(str),
    )


def other_layer(split: Split) -> Split | str:
    """Return a split of the paired layer's tumours, or the reason why there is none.

    Pooled, since few hospitals there have the minimum cohort of any cancer type;
    without survival, and without patients of the unseen institutions.
    """
    if split.quick:
        return "left out with --quick"
    layer = paired(split)
    if isinstance(layer, str):
        return layer
    held = {*split.institution, *split.scenario.public_institutions}
    rows = (layer.tissue == TUMOUR) & ~np.isin(layer.institution, sorted(held))
    names, counts = np.unique(layer.cancer_type[rows], return_counts=True)
    types = tuple(map(str, names[counts >= split.study.minimum_cohort]))
    if len(types) < 2:
        return (
            f"{PAIRED} has {len(types)} cancer types of "
            f"{split.study.minimum_cohort} patients; expected two"
        )
    rows &= np.isin(layer.cancer_type, types)
    # Some of its files write NaN for a count of zero.
    found = layer.expression[rows].fillna(floor(Scale.LOG2P025))
    genes = Vocabulary(tuple(sorted(found.columns)))
    cohort = Cohort(
        patients=tuple(layer.patient[rows]),
        genes=genes.genes,
        expression=convert(
            found[list(genes.genes)].to_numpy(np.float32),
            Scale.LOG2P025,
            split.study.scale,
        ),
        clinical=pd.DataFrame({"cancer_type": layer.cancer_type[rows]}),
    )
    study = split.study
    folder = split.folder / "paired"
    folder.mkdir(exist_ok=True)
    changes = {
        "linear_rank": min(study.linear_rank, RANK),
        "linear_types": types,
        "classification": study.classification.model_copy(update={"classes": types}),
        "survival": Survival(),
    }
    return dataclasses.replace(
        split,
        study=study.model_copy(update=changes),
        seeds=split.seeds[:1],
        sites={"pooled": cohort},
        genes=genes,
        folder=folder,
        workers=1,
    )


def _paired(split: Split) -> list[TestSet | str]:
    """Return tumours of the training types, of other types, and normals.

    Without patients who train and without the institutions set apart.
    """
    layer = paired(split, split.genes.genes)
    if isinstance(layer, str):
        return [f"{layer}, so no other layer was judged"]
    trained = [p for cohort in split.sites.values() for p in cohort.patients]
    allowed = ~np.isin(layer.patient, trained)
    allowed &= ~np.isin(layer.institution, split.scenario.public_institutions)
    known = np.isin(layer.cancer_type, [t for t in set(split.pooled.cancer_type) if t])
    tumour, normal = layer.tissue == TUMOUR, layer.tissue == NORMAL
    groups = {
        "paired, tumours": tumour & known,
        "paired, tumours of other types": tumour & ~known,
        "paired, normals": normal,
    }
    table = layer.expression.to_numpy(np.float32)
    values = convert(table, Scale.LOG2P025, split.study.scale)
    found = []
    for name, group in groups.items():
        rows = group & allowed
        own = layer.patient[rows], values[rows], layer.institution[rows]
        found.append(_test_set(split, name, *own))
    return found


def _microarray(split: Split) -> TestSet | str:
    """Return breast tumours, each gene with the mean and SD of the sites' own.

    A log ratio has no level, so that `predict` refuses it. The means and SDs follow
    from the sums by cancer type that sites send.
    """
    path = split.data_dir / MICROARRAY
    if not path.is_file():
        return f"{MICROARRAY} is absent, so no other platform was judged"
    of_type = [t == BREAST for t in split.pooled.cancer_type]
    if sum(of_type) < FEWEST:
        return (
            f"{MICROARRAY} was not judged: fewer than {FEWEST} {BREAST} patients train"
        )
    table = read_parquet(path).reindex(columns=list(split.genes.genes))
    own = GeneMoments.of(table.to_numpy())
    wanted = GeneMoments.of(split.pooled.values.numpy()[of_type])
    standard = (table.to_numpy() - own.mean) / own.sd * wanted.sd + wanted.mean
    scale = split.standardisation
    return _test_set(
        split,
        "GSE1992",
        table.index.to_numpy().astype(str),
        (standard * scale.sd + scale.mean).astype(np.float32),
        np.full(len(table), "GSE1992"),
    )


def _test_set(
    split: Split,
    name: str,
    patients: NDArray[np.str_],
    values: NDArray[np.float32],
    group: NDArray[np.str_],
) -> TestSet | str:
    """Return a test set on expression (N, V), or the reason why there is none."""
    _, first = np.unique(patients, return_index=True)
    first = np.sort(first)
    if len(first) < FEWEST:
        return f"{name}: fewer than {FEWEST} patients who do not train, so not judged"
    cohort = Cohort(
        patients=tuple(patients[first]),
        genes=split.genes.genes,
        expression=values[first],
        clinical=pd.DataFrame(index=range(len(first))),
    )
    return TestSet(
        name=name,
        patients=split.patients(cohort),
        group=group[first],
        rules=[(Evaluation(rates=OTHER_RATES, panels=()), ("mcar",))],
    )
