"""One readable TOML that names a simulated federation: its study, data and hospitals.

Every key is described in docs/scenarios.md. Scenarios that come with fedgex are found
by name (`demo`, `release`), any other by its path.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fedgex.common import parsing
from fedgex.common.data.scales import DeclaredScale
from fedgex.common.errors import ConfigError
from fedgex.common.settings import Settings
from fedgex.common.study import Study


class Columns(Settings):
    """What the clinical table calls its columns.

    A column that is named here must be in the table. One that is not may be absent: no
    simulated hospital holds it then, and the split says so.
    """

    patient: str = "patient"
    """Patient identifier; each patient stands in one row."""
    duration: str = "duration"
    """Time to the event or to the end of follow-up, in `time_unit`."""
    event: str = "event"
    """1 if the event was observed, 0 if follow-up ended before it."""
    age: str = "age"
    """Years."""
    sex: str = "sex"
    """Female or male."""
    cancer_type: str = "cancer_type"
    """Cancer type; not read if it comes from the files' names."""


class Data(Settings):
    """Files of the real data, relative to the data folder, and their meaning."""

    expression: str = Field(min_length=1)
    """File, or glob of several: samples in rows, genes in columns."""
    scale: DeclaredScale
    """Scale of the expression values."""
    patient_from_sample: int | None = Field(default=None, ge=1)
    """A sample's patient is this many leading characters of the sample's identifier;
    without it, they are the same."""
    cancer_type_from: Literal["column", "file"] = "column"
    """`column` of the clinical table, or name of the expression `file` (BRCA.parquet
    holds BRCA)."""
    clinical: str = Field(min_length=1)
    """Table with a row for each patient."""
    time_unit: Literal["days", "months", "years"] = "days"
    """Unit of the duration."""
    columns: Columns = Columns()

    @field_validator("expression", "clinical")
    @classmethod
    def _relative(cls, path: str) -> str:
        if Path(path).is_absolute():
            raise ValueError("expected a path relative to the data folder")
        return path

    @model_validator(mode="after")
    def _one_source_of_cancer_type(self) -> Self:
        named = "cancer_type" in self.columns.model_fields_set
        if named and self.cancer_type_from == "file":
            raise ValueError('columns.cancer_type is for cancer_type_from = "column"')
        return self


class Sites(Settings):
    """How patients become simulated hospitals."""

    column: str = Field(min_length=1)
    """Column of the clinical table that names a patient's institution."""
    minimum_patients: int = Field(default=20, ge=1)
    """An institution with fewer patients is small."""
    small: Literal["region", "leave-out"] = "region"
    """Small institutions form one site named `region`, or take no part."""
    max_sites: int | None = Field(default=None, ge=1)
    """Keep this many sites, those with the most patients; without it, all."""
    panel_share: float = Field(default=1.0, gt=0, le=1)
    """Each site measures a random share of its genes; 1 means all of them."""
    share_cross_products: bool = True
    """Whether the simulated hospitals permit cross-products (linear references)."""


class Apart(Settings):
    """Institutions of which no site has a patient."""

    institutions: tuple[str, ...] = Field(min_length=1)
    """Values of the site column."""

    @field_validator("institutions")
    @classmethod
    def _each_once(cls, institutions: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(institutions)) < len(institutions):
            raise ValueError("an institution is listed more than once")
        return institutions


class Holdout(Apart):
    """Who judges the models."""


class Public(Apart):
    """Whose patients are the server's public cohort; they do not judge either."""


class Reference(Settings):
    """Models that the simulation computes to compare the federation with."""

    alone: bool = True
    """Each site trains by itself."""
    pooled: bool = True
    """All sites' patients train together, as if there were no walls."""


class Run(Settings):
    """How the simulation uses this machine."""

    workers: int = Field(default=2, ge=1)
    """Simulated sites that are trained at the same time."""
    engine: Literal["local", "flower"] = "local"
    """What carries the messages: processes of this machine, or Flower's own simulation
    runtime, which needs Ray."""


class Scenario(Settings):
    """A simulated federation, complete."""

    study: Study
    data: Data
    sites: Sites
    holdout: Holdout
    public: Public | None = None
    """None: the server has no public cohort."""
    reference: Reference = Reference()
    run: Run = Run()

    @property
    def public_institutions(self) -> tuple[str, ...]:
        """Institutions of the public cohort, none without it."""
        return self.public.institutions if self.public else ()

    @model_validator(mode="after")
    def _public_fits(self) -> Self:
        wanted = self.study.public.statistics or self.study.public.epochs
        if wanted and self.public is None:
            raise ValueError(
                "study.public takes from a public cohort, and there is none; name "
                "its institutions in [public]"
            )
        both = sorted({*self.public_institutions} & {*self.holdout.institutions})
        if both:
            raise ValueError(
                f"holdout and public both name {', '.join(both)}; what the models "
                "learn from cannot judge them"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a scenario from a TOML file.

        Raises
        ------
        ConfigError
            If the file is absent or not TOML, or if any key is unknown, missing, or
            holds a value that cannot be used; everything wrong is named at once.
        """
        if not path.is_file():
            raise ConfigError(
                f"{path}: there is no such file; expected a scenario (TOML), or one of "
                f"the names {', '.join(shipped())}."
            )
        return cls._parse(path, str(path))

    @classmethod
    def _parse(cls, file: Path | Traversable, source: str) -> Self:
        most = parsing.LONG_BYTES
        values = parsing.toml_table(file.read_bytes(), f"{source}:", most=most)
        return cls.read(values, source)


def find(name_or_path: str) -> Scenario:
    """Return a scenario that comes with fedgex, or the one in a file.

    Parameters
    ----------
    name_or_path
        A name such as `demo`; or a path, known by its `.toml` or its slash.

    Raises
    ------
    ConfigError
        If there is no such scenario, or if it cannot be used.
    """
    if name_or_path.endswith(".toml") or len(Path(name_or_path).parts) > 1:
        return Scenario.load(Path(name_or_path))
    if name_or_path not in shipped():
        near = get_close_matches(name_or_path, shipped(), n=1)
        raise ConfigError(
            f'there is no scenario "{name_or_path}"; expected a path ending in .toml, '
            f"or one of the names {', '.join(shipped())}."
            + (f' Did you mean "{near[0]}"?' if near else "")
        )
    file = _folder() / f"{name_or_path}.toml"
    return Scenario._parse(file, f"{name_or_path}.toml")


def shipped() -> tuple[str, ...]:
    """Return the names of the scenarios that come with fedgex, sorted."""
    names = (file.name for file in _folder().iterdir())
    return tuple(sorted(n.removesuffix(".toml") for n in names if n.endswith(".toml")))


def shortened(study: Study, rounds: int | None) -> Study:
    """Return the study with at most so many rounds a phase; None: as many as it has."""
    if rounds is None:
        return study
    fewer = {
        phase: settings.model_copy(update={"rounds": min(settings.rounds, rounds)})
        for phase, settings in study.phases.items()
    }
    return study.model_copy(update=fewer)


def _folder() -> Traversable:
    return resources.files("fedgex.simulations") / "scenarios"
