"""What a portal's download holds, whichever portal it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.ingestion.samples.formats import first_rows
from fedgex.common.ingestion.tables import MISSING, read_table


@dataclass(kw_only=True)
class Download:
    """Where the expression lies, and the clinical table under our own names."""

    source: str
    """Portal, for people."""
    expression: Path
    """A matrix, or a folder of files of one sample each."""
    sheet: pd.DataFrame | None = None
    """Files and samples of a folder, as `data.sample_sheet` has them."""
    platform_table: Path | None = None
    """GEO's table of the array's platform."""
    clinical: pd.DataFrame | None
    """Text, a row a patient or a sample; None where the download has none."""
    scale: Scale | None
    """None where the download does not say."""
    time_unit: str = "days"
    decided: list[str] = field(default_factory=list)
    """What was done, one sentence each, without a count of patients."""
    undecided: list[str] = field(default_factory=list)
    """What a person must decide, each with the key of site.toml."""


def files_in(sources: Iterable[Path]) -> list[Path]:
    """Return every file named, and those in folders, but for hidden ones and logs.

    Raises
    ------
    ConfigError
        If a source is not there.
    """

    def each() -> Iterator[Path]:
        for source in sources:
            if not source.exists():
                raise ConfigError(f"{source}: no such file or folder.")
            inside = source.rglob("*") if source.is_dir() else (source,)
            for path in inside:
                parts = path.parts[len(source.parts) :]
                hidden = any(part.startswith(".") or part == "logs" for part in parts)
                if path.is_file() and not hidden:
                    yield path.absolute()

    return sorted(set(each()))


def header(path: Path) -> list[str]:
    """Return the first row of a tab-separated text that is no comment."""
    return [name.strip().strip('"') for name in first_rows(path)[0]]


def table(path: Path) -> pd.DataFrame:
    """Read a table as text, None where a cell is missing."""
    frame: pd.DataFrame = (
        read_table(path).to_pandas().astype("string").apply(lambda c: c.str.strip())
    )
    frame.columns = frame.columns.str.strip()
    return frame.astype(object).mask(frame.isna() | frame.isin(MISSING), None)


def column(frame: pd.DataFrame, names: Sequence[str]) -> pd.Series[str]:
    """Return the first of some columns that has a value; else an empty one."""
    for name in names:
        if name in frame and frame[name].notna().any():
            return frame[name]
    return pd.Series(None, index=frame.index, dtype=object)


def one(files: Sequence[Path], what: str) -> Path:
    """Return the one file of a kind.

    Raises
    ------
    ConfigError
        If there are none or several.
    """
    if len(files) == 1:
        return files[0]
    names = ", ".join(sorted(path.name for path in files)) or "none"
    raise ConfigError(f"found {names} for {what}; expected one. Name the files singly.")
