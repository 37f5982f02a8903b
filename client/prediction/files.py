"""Files of a prediction: model, checked table of samples, results and card.

N samples pass the checks; L columns of the file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from fedgex.client.settings import SiteSettings
from fedgex.common.codes import Code
from fedgex.common.data import genes as gene_names
from fedgex.common.data.genes import GeneTable
from fedgex.common.data.scales import Scale, convert
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError, Finding, TrustError
from fedgex.common.ingestion.cohort import CheckedCohort, check
from fedgex.common.ingestion.findings import Advice, Findings
from fedgex.common.ingestion.readers import RawCohort, read
from fedgex.common.ingestion.settings import DataColumns, DataSettings
from fedgex.common.models import checkpoint as checkpoints
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.system.files import explained, replacing
from fedgex.common.trust import bundle, pki
from fedgex.common.trust.bundle import Released

FORMATS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
"""Endings of a table that can be written."""

ADVICE = Advice(
    scale="--scale",
    orientation="--orientation",
    hgnc_table="--hgnc-table",
    sample_column="column sample",
    missing_file="Correct the path.",
    missing_column="Name the column so, or give the site.toml that names it with "
    "--site.",
    library_size="Give all reads of each sample as library_size in the table of "
    "--clinical",
)
"""Advice on findings, in the options of `fedgex-site predict`."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a file, after the checks that a site's own data pass."""

    expression: pd.DataFrame
    """On the study's scale, N samples by genes (symbols), float32."""
    clinical: pd.DataFrame
    """One row for each row of `expression`."""
    findings: tuple[Finding, ...]
    """Warnings of the checks."""
    checked: CheckedCohort
    """The cohort, and every sample and column of the file."""
    scale: Scale
    """Of the file."""
    study_scale: Scale
    is_float32: bool
    """Whether the file holds float32."""
    is_integer: bool
    """Whether every number of the file is an integer, and none is declared a float."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Every sample of the file in its order."""
        return self.checked.sheet.samples

    def as_in_file(self, vocabulary: Vocabulary) -> pd.DataFrame:
        """Return every sample and number of the file as they are.

        Columns of the vocabulary's genes bear their symbols, all others the file's
        labels. Of columns with one label and the same values the first is kept.

        Raises
        ------
        DataError
            If columns share a label and differ.
        """
        sheet, places = self.checked.sheet, self.checked.columns
        labels = list(sheet.labels)
        for gene, column in places.items():
            if gene in vocabulary.index:
                labels[column] = gene
        chosen = set(places.values())
        names = {labels[i] for i in chosen}
        kept = [i for i, x in enumerate(labels) if i in chosen or x not in names]
        columns = pd.Index([labels[i] for i in kept])
        if columns.has_duplicates:
            findings, n = Findings(), int(columns.duplicated().sum())
            findings.add(Code.GENE_COLUMNS_DIFFER, sheet.file, count=n)
            findings.refuse()
        values = sheet.values[:, kept]
        if self.is_float32:
            values = values.astype(np.float32)  # as exact as the file, half the size
        return pd.DataFrame(values, index=list(self.labels), columns=columns)

    def with_integers(self, table: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
        """Make integers of the columns of a file of integers that were measured.

        Parameters
        ----------
        table
            Filled, with the columns of `frame` and others.
        frame
            The file as it is.
        """
        if not self.is_integer:
            return table
        own = table.columns.isin(frame.columns[frame.notna().all().to_numpy()])
        parts = [table.loc[:, own].astype(np.int64), table.loc[:, ~own]]
        return pd.concat(parts, axis=1)[list(table.columns)]

    def on_file_scale(self, restored: pd.DataFrame) -> pd.DataFrame:
        """Convert values from the study's scale to the file's, one row a sample of it.

        Counts are those expected of as many reads as the sample has; samples that the
        checks left out have NaN.

        Parameters
        ----------
        restored
            One row for each row of `expression`.
        """
        scale = Scale.LINEAR if self.scale == Scale.COUNTS else self.scale
        values = convert(restored.to_numpy(), self.study_scale, scale)
        table = pd.DataFrame(values, restored.index, restored.columns)
        if self.scale == Scale.COUNTS:
            assert self.checked.library_size is not None  # else refused
            table = table.mul(self.checked.library_size / 1e6, axis=0)
        return table.reindex(list(self.labels))


def read_samples(
    data: DataSettings, model: Checkpoint, clinical_columns: Collection[str]
) -> Samples:
    """Read and check the samples to predict for.

    Parameters
    ----------
    data
        The files, and what their numbers mean.
    model
        The expression is converted to its scale; its vocabulary shows which axis holds
        the genes, unless `data` does.
    clinical_columns
        Our names of the clinical columns to read, besides what counts need; without
        any, no clinical table is.

    Raises
    ------
    DataError
        If the files cannot be used; carries all findings.
    """
    if data.scale == Scale.COUNTS:
        clinical_columns = {*clinical_columns, "library_size"}
    raw, columns = _only(read(data, ADVICE), data.columns, clinical_columns)
    data = data.model_copy(update={"columns": columns})
    if data.orientation == "auto":
        orientation = _orientation(raw, model.vocabulary)
        data = data.model_copy(update={"orientation": orientation})
    # Predictions stay here, so a single sample is welcome and counts are reported.
    findings = Findings(1, ADVICE)
    checked = check(raw, data, model.study.scale, (), findings)
    spelt = gene_names.spelt_as(tuple(checked.columns), model.vocabulary.genes)
    names = dict(zip(checked.columns, spelt, strict=True))
    columns_of = {names[gene]: column for gene, column in checked.columns.items()}
    checked, cohort = replace(checked, columns=columns_of), checked.cohort
    index = list(cohort.patients)
    kinds, numbers = raw.expression.cells.schema.types, checked.sheet.values
    return Samples(
        expression=pd.DataFrame(
            cohort.expression, index, [names[gene] for gene in cohort.genes]
        ),
        clinical=cohort.clinical.set_axis(index, axis=0),
        findings=tuple(findings.found),
        checked=checked,
        scale=data.scale,
        study_scale=model.study.scale,
        is_float32=all(pa.types.is_float32(kind) for kind in kinds),
        is_integer=not any(pa.types.is_floating(kind) for kind in kinds)
        and bool((np.isnan(numbers) | (numbers % 1 == 0)).all()),
    )


@contextmanager
def opened_model(
    path: Path, authority: Path | None, site: SiteSettings | None
) -> Iterator[tuple[Path, Released | None]]:
    """Find a checkpoint, of a released model once that is verified.

    Parameters
    ----------
    path
        A released model, a checkpoint's folder, or a run's.
    authority
        Certificate of the authority whose releases are trusted; None: that of the site.

    Yields
    ------
    tuple
        The folder of the checkpoint, and the release, None for a model that is none.

    Raises
    ------
    TrustError
        If a released model cannot be trusted, or no readable authority was named.
    CheckpointError
        If there is no checkpoint.
    """
    if not path.is_file():
        yield checkpoints.find(path), None
        return
    if authority is None and site is not None:
        authority = site.state_dir / "identity" / "authority.crt"
    if authority is None:
        raise TrustError(
            f"{path} is a released model, and nothing says whose releases are "
            "trusted here; name the hospital's site.toml with --site, or the "
            "consortium's authority.crt with --authority."
        )
    try:
        trusted = pki.from_pem(authority.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError, TrustError) as error:
        raise TrustError(
            f"{authority}: holds no readable certificate; expected the consortium's "
            "authority.crt, which fedgex-site join writes. Join first, or name it "
            "with --authority."
        ) from error
    with bundle.opened(path, trusted) as (released, folder):
        yield folder, released


def write(
    table: pd.DataFrame, card: Mapping[str, Any], output: Path, card_path: Path
) -> None:
    """Write a table and its card atomically, the card first, for their owner only.

    The index becomes the first column, `sample`.

    Raises
    ------
    ConfigError
        If a file cannot be written.
    """
    text = json.dumps(card, indent=1, ensure_ascii=False)
    with (
        explained(output, ConfigError),
        replacing(output) as table_file,
        replacing(card_path) as card_file,
    ):
        card_file.write(text.encode() + b"\n")
        _write_table(table.rename_axis("sample"), table_file, ending(output))


def ending(path: Path) -> str | None:
    """Return which of `FORMATS` a path ends in, or None."""
    return next((form for form in FORMATS if path.name.endswith(form)), None)


def _only(
    raw: RawCohort, columns: DataColumns, wanted: Collection[str]
) -> tuple[RawCohort, DataColumns]:
    """Keep the wanted clinical columns, linked by the label of the sample.

    Nothing else in the table can then stand in the way, and two samples of one patient
    are two rows.
    """
    if raw.clinical is None or not wanted:
        return replace(raw, clinical=None), columns
    table = raw.clinical.table
    label = columns.sample or ("sample" if "sample" in table else columns.patient)
    named = {own: name for own, name in columns.model_dump().items() if own in wanted}
    keep = {label or "patient"} | {name or own for own, name in named.items()}
    clinical = replace(raw.clinical, table=table.loc[:, table.columns.isin(keep)])
    return replace(raw, clinical=clinical), DataColumns(patient=label, **named)


def _orientation(raw: RawCohort, vocabulary: Vocabulary) -> str:
    """Return on which axis the vocabulary's genes are; `auto` if that is not clear."""
    in_rows, in_columns = (
        _count(labels, raw.gene_table, vocabulary)
        for labels in (raw.expression.rows, raw.expression.columns)
    )
    if in_rows == in_columns:
        return "auto"
    return "samples-by-genes" if in_columns > in_rows else "genes-by-samples"


def _count(
    labels: tuple[str, ...], table: GeneTable | None, vocabulary: Vocabulary
) -> int:
    symbols = gene_names.current_symbols(labels, table).symbols
    return sum(symbol in vocabulary.index for symbol in symbols)


def _write_table(table: pd.DataFrame, file: IO[bytes], form: str | None) -> None:
    if form == ".parquet":
        table.reset_index().to_parquet(file, index=False)
        return
    delimiter = "\t" if form in (".tsv", ".tsv.gz") else ","
    if form in (".csv", ".tsv"):
        table.to_csv(file, sep=delimiter, mode="wb", encoding="utf-8")
        return
    # No name and time inside: equal tables give equal bytes.
    with (
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        table.to_csv(text, sep=delimiter)
