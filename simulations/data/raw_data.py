"""The raw files of real data: samples x genes, and a clinical row for each patient."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from fedgex.common.data.cohort import read_parquet
from fedgex.common.data.patients import ambiguous
from fedgex.common.errors import ConfigError
from fedgex.simulations.scenario import Columns, Data, Scenario


@dataclass(frozen=True, kw_only=True)
class RawData:
    """All samples whose patient and institution are known, sorted by sample."""

    expression: pd.DataFrame
    """Samples x genes (sorted), float32."""
    clinical: pd.DataFrame
    """Samples x (patient, institution, and those of CLINICAL_COLUMNS that exist)."""
    notes: tuple[str, ...]


def find_files(data: Data, data_dir: Path) -> tuple[list[Path], Path]:
    """Return the expression files, sorted, and the clinical file.

    Raises
    ------
    ConfigError
        If one of them is absent.
    """
    expression = sorted(p for p in data_dir.glob(data.expression) if p.is_file())
    clinical = data_dir / data.clinical
    problems = []
    if not expression:
        problems.append(f"{data.expression}: data.expression matches no file")
    if not clinical.is_file():
        problems.append(f"{data.clinical}: data.clinical is not a file")
    if problems:
        raise ConfigError(
            "\n".join(
                f"{problem} in {data_dir}. Correct the scenario, or the data folder."
                for problem in problems
            )
        )
    return expression, clinical


def read_raw(
    scenario: Scenario, expression_files: Sequence[Path], clinical_file: Path
) -> RawData:
    """Read all samples whose patient and institution are known.

    Raises
    ------
    ConfigError
        If the files do not fit the scenario.
    """
    tables = [_read_expression(path) for path in expression_files]
    expression = pd.concat(tables).sort_index().sort_index(axis=1)
    repeated = int(expression.index.duplicated().sum())
    if repeated:
        raise ConfigError(
            f"{scenario.data.expression}: {repeated} samples occur more than once; "
            "expected each sample in one row of one file. Correct the files."
        )

    patients, notes = _read_clinical(scenario, clinical_file)
    patient = expression.index.str.slice(stop=scenario.data.patient_from_sample)
    if spelt := ambiguous({*patient, *patients.index}):
        raise ConfigError(
            f"{scenario.data.clinical} and {scenario.data.expression}: {spelt} patients"
            " share a key with another (docs/hospital-data.md); expected one spelling "
            "for each. Correct the files."
        )
    clinical = patients.reindex(patient).set_axis(expression.index)
    clinical.insert(0, "patient", patient)
    if scenario.data.cancer_type_from == "file":
        stems = [
            pd.Series(path.stem, index=table.index)
            for path, table in zip(expression_files, tables, strict=True)
        ]
        clinical["cancer_type"] = pd.concat(stems).reindex(expression.index)

    known = clinical["institution"].notna()
    homeless = clinical["patient"][~known].nunique()
    if homeless:
        notes.append(
            f"left out: {homeless} patients who have expression, but no row or no "
            f"{scenario.sites.column} in {scenario.data.clinical}"
        )
    if not known.any():
        raise ConfigError(
            f"{scenario.data.clinical}: none of {patient.nunique()} patients with "
            f"expression has a row with a {scenario.sites.column}; expected identifiers"
            " that are equal in both. Check data.columns.patient and "
            "data.patient_from_sample."
        )
    return RawData(
        expression=expression[known], clinical=clinical[known], notes=tuple(notes)
    )


def _read_expression(path: Path) -> pd.DataFrame:
    """Read samples x genes from any supported format, as float32."""
    if path.suffix == ".h5ad":
        import anndata  # takes seconds, and few scenarios need it

        table: pd.DataFrame = anndata.read_h5ad(path).to_df()
    else:
        table = _read_table(path)
        if isinstance(table.index, pd.RangeIndex):
            table = table.set_index(table.columns[0])
    text = [str(c) for c, d in table.dtypes.items() if not is_numeric_dtype(d)]
    if text:
        raise ConfigError(
            f"{path.name}: {len(text)} columns are not numeric, such as {text[0]!r}; "
            "expected samples in rows and nothing but genes in columns."
        )
    if not table.columns.is_unique:
        twice = int(table.columns.duplicated().sum())
        raise ConfigError(
            f"{path.name}: {twice} columns repeat a gene; expected each gene once."
        )
    table.index = table.index.astype(str).rename("sample")
    table.columns = table.columns.astype(str).rename(None)
    return table.astype(np.float32)


def _read_clinical(scenario: Scenario, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return institution and clinical columns by patient, in our names, and notes."""
    data, site_column = scenario.data, scenario.sites.column
    table = _read_table(path, as_text=(data.columns.patient, site_column))
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()

    wanted = {getattr(data.columns, ours): ours for ours in _columns_of(data)}
    needed = {data.columns.patient, site_column, *_columns_needed(scenario)}
    absent = [name for name in (site_column, *wanted) if name not in table.columns]
    refused = [name for name in absent if name in needed]
    if refused:
        raise ConfigError(
            "\n".join(
                f"{data.clinical}: there is no column {name!r}; the scenario names it "
                f"or its study needs it. Columns are {', '.join(map(str, table))}."
                for name in refused
            )
        )
    repeated = int(table[data.columns.patient].duplicated().sum())
    if repeated:
        raise ConfigError(
            f"{data.clinical}: {repeated} rows repeat a patient; expected one row for "
            "each patient. Correct the table."
        )
    patients = table[[name for name in wanted if name not in absent]]
    patients = patients.rename(columns=wanted)
    patients["institution"] = table[site_column].dropna().astype(str)
    patients.index = pd.Index(patients.pop("patient").astype(str))
    notes = [f"no site holds {wanted[name]}: the table has none" for name in absent]
    return patients, notes


def _columns_of(data: Data) -> list[str]:
    """Return the keys of `data.columns` that are read from the clinical table."""
    from_file = data.cancer_type_from == "file"
    return [k for k in Columns.model_fields if not (from_file and k == "cancer_type")]


def _columns_needed(scenario: Scenario) -> set[str]:
    """Return the clinical columns that the scenario names or its study needs."""
    data, study = scenario.data, scenario.study
    ours = set(data.columns.model_fields_set)
    if study.survival.rounds:
        ours |= {"duration", "event", "cancer_type"}
    if study.classification.rounds:
        ours |= {"cancer_type"}
    return {getattr(data.columns, key) for key in ours & set(_columns_of(data))}


def _read_table(path: Path, as_text: Collection[str] = ()) -> pd.DataFrame:
    """Read Parquet, CSV or TSV; the columns `as_text`, and the first, stay text."""
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix not in (".csv", ".tsv"):
        raise ConfigError(
            f"{path.name}: cannot be read; expected .parquet, .csv, .tsv or, for "
            "expression, .h5ad."
        )
    separator = "," if path.suffix == ".csv" else "\t"
    first = pd.read_csv(path, sep=separator, nrows=0).columns[:1]
    text: dict[Hashable, type[str]] = dict.fromkeys((*first, *as_text), str)
    return pd.read_csv(path, sep=separator, dtype=text, low_memory=False)
