"""What a hospital decides for itself: where its data lie and what it permits."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from fedgex.common.errors import ConfigError
from fedgex.common.scale import Scale
from fedgex.common.study import NAME_PATTERN, Settings

Task = Literal["pretraining", "classification", "survival"]


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
    library_size: str | None = None
    """All reads of the sample, for raw counts."""


class DataSettings(Settings):
    """The hospital's files, and what the numbers in them mean."""

    expression: Path
    """CSV or TSV (also .gz), Parquet, or AnnData (.h5ad)."""
    clinical: Path | None = None
    """CSV or TSV (also .gz) or Parquet. Without it, `obs` of an .h5ad is read."""
    scale: Scale
    """Scale of the expression values; never guessed."""
    orientation: Literal["auto", "samples-by-genes", "genes-by-samples"] = "auto"
    """What the rows are; `auto` looks at the labels."""
    hgnc_table: Path | None = None
    """HGNC's complete set; needed for Ensembl ids and to update retired symbols."""
    columns: DataColumns = DataColumns()
    time_unit: Literal["days", "months", "years"] = "days"
    """Unit of the duration; a month is 30.4375 days, a year 365.25."""
    max_missing_per_gene: float = Field(default=0.5, ge=0, le=1)
    """Share of missing samples above which a gene is reported."""
    max_missing_per_patient: float = Field(default=0.5, ge=0, le=1)
    """Share of missing genes above which a patient's sample is reported."""


class SiteSettings(Settings):
    """One hospital's `site.toml`. What it does not permit does not happen."""

    name: str = Field(pattern=NAME_PATTERN)
    """Lower-case letters, digits and hyphens."""
    minimum_cohort: int = Field(ge=1)
    """With fewer patients the site takes no part, and smaller counts are not told."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """Tasks that the hospital permits."""
    share_cross_products: bool = False
    """Permit sums of products of genes to leave, for the linear references."""
    state_dir: Path = Path("state")
    """Where the site keeps what it must remember between rounds."""
    data: DataSettings

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `site.toml`; relative paths in it start at its folder.

        Raises
        ------
        ConfigError
            If the file cannot be read, or any key is unknown, missing or unusable.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); expected a site.toml."
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{path}: is not TOML ({error}). Write Windows paths in single quotes."
            ) from error
        settings = cls.read(values, path.name)
        folder, data = path.resolve().parent, settings.data
        paths = {
            name: folder / value
            for name in ("expression", "clinical", "hgnc_table")
            if (value := getattr(data, name)) is not None
        }
        return settings.model_copy(
            update={
                "state_dir": folder / settings.state_dir,
                "data": data.model_copy(update=paths),
            }
        )
