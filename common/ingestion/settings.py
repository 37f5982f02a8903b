"""How a hospital's or a coordinator's data files are described."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fedgex.common.data.scales import DeclaredScale
from fedgex.common.settings import Settings


class DataColumns(Settings):
    """Names of the clinical columns in the hospital's file.

    A column that is not set is read under its own name here, if the file has it.
    """

    patient: str | None = None
    """Identifier of the patient; the one column that a clinical table must have."""
    sample: str | None = None
    """Label of the sample in the expression file, if it is not the patient's."""
    duration: str | None = None
    """Time to event or end of follow-up, in `time_unit`."""
    event: str | None = None
    """1 if the event happened at that time, 0 if follow-up ended before."""
    age: str | None = None
    """Age, years."""
    sex: str | None = None
    """female or male, or f or m, in any case."""
    cancer_type: str | None = None
    """Cancer type, spelt as in the study."""
    diagnosis_date: str | None = None
    """Date of diagnosis, such as 2019-03-31, from which time is counted where the table
    has no duration."""
    last_contact_date: str | None = None
    """Date of last contact: the end of follow-up of a patient without a death date."""
    death_date: str | None = None
    """Date of death: the event, where the table has no event."""
    library_size: str | None = None
    """All reads of the sample, for raw counts."""


class DataSettings(Settings):
    """The hospital's files, and what the numbers in them mean."""

    expression: Path
    """Text (CSV, TSV, GCT, GEO series matrix), Parquet, Feather, Excel, or AnnData; or
    a folder with files of one sample each."""
    sample_sheet: Path | None = None
    """Files and samples of a folder, with columns such as file and sample; or GDC's."""
    value_column: str | None = None
    """Column of values in files of one sample each: tpm_unstranded, FPKM; without it,
    the first on the declared scale."""
    layer: str | None = None
    """Layer of an .h5ad file in place of X, or `raw` for `raw.X`."""
    platform_table: Path | None = None
    """GEO's table of an array's platform, which has the symbols of its probes."""
    clinical: Path | None = None
    """CSV or TSV (also .gz) or Parquet. Without it, `obs` of an .h5ad is read."""
    scale: DeclaredScale
    """Scale of the expression values, by name or as log2(x+0.001); never guessed."""
    orientation: Literal["auto", "samples-by-genes", "genes-by-samples"] = "auto"
    """What the rows are; `auto` looks at the labels."""
    hgnc_table: Path | None = None
    """HGNC's complete set; needed to update retired symbols."""
    unknown_genes: Literal["refuse", "keep"] = "refuse"
    """What becomes of a file of whose labels fewer than half name known human genes,
    and whether labels of no known gene may leave as names of genes."""
    opt_outs: Path | None = None
    """Text file of patients to leave out, one identifier a line; # begins a comment."""
    unknown_opt_outs: Literal["warn", "refuse"] = "warn"
    """What a line of `opt_outs` that matches nobody does: warn, or refuse the data."""
    columns: DataColumns = DataColumns()
    time_unit: Literal["days", "months", "years"] = "days"
    """Unit of the duration; a month is 30.4375 days, a year 365.25."""
    max_missing_per_gene: float = Field(default=0.5, ge=0, le=1)
    """Share of missing samples above which a gene is reported."""
    max_missing_per_patient: float = Field(default=0.5, ge=0, le=1)
    """Share of missing genes above which a patient's sample is reported."""
