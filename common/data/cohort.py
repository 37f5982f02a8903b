"""A hospital's checked patients: expression on the canonical scale, and follow-up.

N samples, G genes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedgex.common import parsing
from fedgex.common.data.patients import patient_key
from fedgex.common.data.scales import Scale, misfit
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError
from fedgex.common.settings import shown
from fedgex.common.system.files import write_atomic

CLINICAL_COLUMNS = ("duration", "event", "age", "sex", "cancer_type")
"""Columns of `Cohort.clinical`, each optional."""

EXPRESSION, CLINICAL, MANIFEST = "expression.parquet", "clinical.parquet", "cohort.json"
"""Files of a cohort's folder, see `save_cohort`."""
FORMAT = 1
REMAKE = "Make it again from its source files with fedgex-admin cohort build."


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Checked samples of one site, and what is known of their patients."""

    patients: tuple[str, ...]
    """Patient of each sample as its file spells it, length N; a patient may own
    several samples."""
    genes: tuple[str, ...]
    """HGNC symbols of the columns, length G, or a study's names of these genes."""
    expression: NDArray[np.float32]
    """Shape (N, G), on the study's canonical scale; NaN where not measured."""
    clinical: pd.DataFrame
    """One row a sample, in the order of `patients`; a subset of CLINICAL_COLUMNS:
    duration (days, float), event (0.0 or 1.0), age (years, float), sex ("female" or
    "male"), cancer_type (str). NaN or None where unknown."""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Key of each sample's patient, see `patient_key`, length N."""
        return tuple(map(patient_key, self.patients))

    @property
    def n_patients(self) -> int:
        """Distinct patients."""
        return len(set(self.keys))

    def first_samples(self) -> NDArray[np.intp]:
        """Return the row of each patient's first sample, rising."""
        _, first = np.unique(np.asarray(self.keys), return_index=True)
        return np.sort(first)

    def with_survival(self) -> NDArray[np.bool_]:
        """Mark samples with known event and a duration above zero, shape (N,)."""
        if not {"duration", "event"} <= set(self.clinical.columns):
            return np.zeros(len(self.patients), dtype=bool)
        known = self.clinical["event"].notna() & (self.clinical["duration"] > 0)
        return known.to_numpy(dtype=bool)

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Cohort:
        """Return the samples at the given rows."""
        return Cohort(
            patients=tuple(np.asarray(self.patients)[rows]),
            genes=self.genes,
            expression=self.expression[rows],
            clinical=self.clinical.iloc[rows],
        )

    @classmethod
    def joined(cls, cohorts: Sequence[Cohort]) -> Cohort:
        """Return the samples of all cohorts as one, on the genes that any has."""
        vocabulary = Vocabulary(tuple(sorted({g for c in cohorts for g in c.genes})))
        placed = [vocabulary.place(c.genes, c.expression) for c in cohorts]
        return cls(
            patients=tuple(p for cohort in cohorts for p in cohort.patients),
            genes=vocabulary.genes,
            expression=np.concatenate(placed),
            clinical=pd.concat([c.clinical for c in cohorts], ignore_index=True),
        )


def save_cohort(cohort: Cohort, folder: Path, scale: Scale) -> None:
    """Write a cohort's folder: two tables that name the patient of each row.

    expression.parquet   patient, then one column a gene
    clinical.parquet     patient, then the columns of `Cohort.clinical`
    cohort.json          number of the format, scale, counts, SHA-256 of both tables
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # none until both tables are there
    expression = pd.DataFrame(cohort.expression, columns=list(cohort.genes))
    for name, table in ((EXPRESSION, expression), (CLINICAL, cohort.clinical)):
        table = table.reset_index(drop=True)
        table.insert(0, "patient", list(cohort.patients))
        table.to_parquet(folder / name)
    manifest = {
        "format": FORMAT,
        "scale": str(scale),
        "samples": len(cohort.patients),
        "patients": cohort.n_patients,
        "genes": len(cohort.genes),
        "sha256": {name: _digest(folder / name) for name in (EXPRESSION, CLINICAL)},
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode(), mode=0o644)


def load_cohort(folder: Path, scale: Scale) -> Cohort:
    """Read and check what `save_cohort` wrote.

    Parameters
    ----------
    scale
        Scale on which the expression must be: the study's.

    Raises
    ------
    ConfigError
        With everything in which the tables contradict each other, the manifest or the
        scale. Tables of 0.1.0 named no patient of the expression: they are refused.
    """
    manifest = _manifest(folder)
    expression = read_parquet(folder / EXPRESSION)
    clinical = read_parquet(folder / CLINICAL)
    problems = [
        f"{name} is not the file that was written with {MANIFEST}"
        for name, digest in manifest["sha256"].items()
        if _digest(folder / name) != digest
    ]
    if manifest["scale"] != scale:
        problems.append(
            f"it is on the scale {shown(manifest['scale'])}, and the study on {scale}"
        )
    problems += _contradictions(expression, clinical, scale)
    if problems:
        raise ConfigError(
            f"the cohort in {folder} cannot be used: {'; '.join(problems)}. {REMAKE}"
        )
    patients = tuple(expression.pop("patient"))
    return Cohort(
        patients=patients,
        genes=tuple(expression.columns),
        expression=expression.to_numpy(dtype=np.float32),
        clinical=clinical.drop(columns="patient"),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise ConfigError(
            f"{folder} holds no {MANIFEST}: without it nothing says which clinical row "
            f"belongs to which row of the expression. {REMAKE}"
        )
    found = parsing.json_object(path.read_bytes(), str(path))
    if found.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: format {shown(found.get('format'))}; expected {FORMAT}. {REMAKE}"
        )
    digests = found.get("sha256")
    complete = isinstance(digests, dict) and set(digests) == {EXPRESSION, CLINICAL}
    if not complete or "scale" not in found:
        raise ConfigError(f"{path}: scale or sha256 of a table is missing. {REMAKE}")
    return found


def _contradictions(
    expression: pd.DataFrame, clinical: pd.DataFrame, scale: Scale
) -> list[str]:
    """Return what is wrong with the two tables, or between them."""
    found = [
        f"{name} has no column patient"
        for name, table in ((EXPRESSION, expression), (CLINICAL, clinical))
        if "patient" not in table
    ]
    if not found:
        ours, theirs = list(expression["patient"]), list(clinical["patient"])
        if len(ours) != len(theirs):
            found.append(f"{len(ours)} rows of expression, {len(theirs)} clinical ones")
        elif ours != theirs:
            n = sum(a != b for a, b in zip(ours, theirs, strict=True))
            found.append(f"{n} of {len(ours)} rows are another patient's in {CLINICAL}")
        if any(not isinstance(x, str) or not x for x in ours + theirs):
            found.append("patients without identifier")
    genes = [name for name in expression.columns if name != "patient"]
    if not genes or genes != sorted(set(genes)):
        found.append("the genes are none, or not sorted, or repeated")
    strange = sorted(set(clinical.columns) - {"patient", *CLINICAL_COLUMNS})
    if strange:
        found.append(f"{CLINICAL} has the columns {shown(strange)}")
    texts = [name for name in genes if expression[name].dtype.kind != "f"]
    if texts:
        return [*found, f"{len(texts)} genes hold no decimal numbers"]
    values = expression[genes].to_numpy(dtype=np.float32)
    if n := int(np.isinf(values).sum()):
        found.append(f"{n} values are infinite")
    if reason := misfit(values, scale):
        found.append(f"{reason}, which cannot be on the scale {scale}")
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet table of any number of columns.

    `pandas.read_parquet` goes through Arrow's data set scanner, which with one thread
    (OMP_NUM_THREADS=1) took 1.8 GB for 3 samples and 20,000 genes; this takes 0.3 GB.

    Raises
    ------
    ConfigError
        If the file is missing or damaged.
    """
    try:
        frame: pd.DataFrame = pq.ParquetFile(path).read(use_threads=False).to_pandas()
    except Exception as error:  # Arrow, pandas and JSON have their own
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}); expected Parquet as "
            "fedgex wrote it. Make or fetch the file again."
        ) from error
    return frame
