"""A hospital's folder of a download: expression, clinical table, site.toml, policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from fedgex.client import policy
from fedgex.client.importing import cbioportal, gdc, geo, xena
from fedgex.client.importing.download import Download, files_in
from fedgex.common.data import scales
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.ingestion.expression import is_normal
from fedgex.common.ingestion.labels import ANNOTATION
from fedgex.common.ingestion.readers import read
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.ingestion.tables import to_numbers
from fedgex.common.system.files import write_atomic

PORTALS: tuple[Callable[[Sequence[Path]], Download | None], ...] = (
    gdc.find,
    cbioportal.find,
    geo.find,
    xena.find,
)
"""Each returns the download if the files are its portal's; asked in this order."""

SITE, EXPRESSION, CLINICAL = "site.toml", "expression.parquet", "clinical.csv"
SHEET = "samples.csv"

_HEAD = """\
# Made by fedgex-site import of a download of {source}: read it before you use it.
# What studies may do here stands in policy.toml, in the same folder.
name = {name}
{server}
state_dir = "state"                  # keys, approvals, replies, audit log; back it up

[data]                               # docs/hospital-data.md; try it with check-data
expression = "{expression}"    # made of {origin}
"""


def recognise(sources: Sequence[Path]) -> Download:
    """Return the download that files and folders are.

    Raises
    ------
    ConfigError
        If they are of no portal that is known, or something of it is missing.
    """
    files = files_in(sources)
    for find in PORTALS:
        if (download := find(files)) is not None:
            return download
    raise ConfigError(
        f"{len(files)} files, none of which is recognised; expected a download of the "
        "GDC (files, sample sheet, clinical.tsv), a study of cBioPortal, a matrix of "
        "Xena with its survival table, or a series matrix of GEO. Name them, "
        "or describe the files in site.toml yourself: docs/hospital-data.md."
    )


def write(
    download: Download,
    folder: Path,
    name: str,
    server: str | None,
    scale: Scale | None,
    value_column: str | None,
) -> Path:
    """Write the files of a hospital; nothing that exists is changed.

    Parameters
    ----------
    scale
        In place of what the download says.
    value_column
        Column of files of one sample each.

    Returns
    -------
    Path
        The new `site.toml`.

    Raises
    ------
    ConfigError
        If a file exists.
    DataError
        If the expression cannot be read.
    """
    there = [n for n in (SITE, EXPRESSION, CLINICAL, SHEET) if (folder / n).exists()]
    if there:
        raise ConfigError(
            f"{folder}: {', '.join(there)} exist and are kept. Take another folder, "
            "and copy [data] of its site.toml."
        )
    scale = scale or download.scale
    values = _matrix(download, scale, value_column)
    if scale is None:
        download.undecided.append(
            "data.scale: the download does not say. The numbers could be "
            f"{_fitting(values)}."
        )
    text = _HEAD.format(
        source=download.source,
        name=json.dumps(name),
        server='# server = "HOST:PORT"' if server is None else f'server = "{server}"',
        expression=EXPRESSION,
        origin=json.dumps(download.expression.name),
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for table, file in ((download.clinical, CLINICAL), (download.sheet, SHEET)):
        if table is not None:
            write_atomic(folder / file, table.to_csv(index=False).encode())
    if download.clinical is not None:
        text += f'clinical = "{CLINICAL}"\ntime_unit = "{download.time_unit}"\n'
    text += f'scale = "{scale or "CHANGE"}"\n'
    pa.parquet.write_table(values, folder / EXPRESSION, compression="zstd")
    if not (folder / policy.FILE).exists():
        write_atomic(folder / policy.FILE, policy.TEMPLATE.encode())
    write_atomic(folder / SITE, text.encode())
    return folder / SITE


def _matrix(
    download: Download, scale: Scale | None, value_column: str | None
) -> pa.Table:
    """Return genes by samples as numbers, without annotation and normal tissue."""
    with TemporaryDirectory() as temporary:
        sheet = None
        if download.sheet is not None:
            sheet = Path(temporary) / SHEET
            download.sheet.to_csv(sheet, index=False)
        data = DataSettings(
            expression=download.expression,
            sample_sheet=sheet,
            value_column=value_column,
            platform_table=download.platform_table,
            scale=scale or Scale.RELATIVE,
        )
        raw = read(data).expression
    labels = raw.columns
    normal = [is_normal(label) for label in labels]
    if any(normal):
        download.decided.append("Samples whose barcode says normal were left out.")
    kept = [
        place
        for place, label in enumerate(labels)
        if label.lower() not in ANNOTATION and not normal[place]
    ]
    cells = raw.cells.select(kept)
    numbers, is_text, _ = to_numbers(cells)
    columns = cells.columns if is_text.any() else list(map(pa.array, numbers.T))
    names = ["gene", *(labels[place] for place in kept)]
    return pa.Table.from_arrays([pa.array(raw.rows), *columns], names=names)


def _fitting(values: pa.Table) -> str:
    numbers, _, _ = to_numbers(values.drop_columns(["gene"]))
    finite = np.where(np.isfinite(numbers), numbers, np.nan)
    fitting = [*sorted(scales.recognise(finite.T)), *scales.formula_of(finite.T)]
    return ", ".join(fitting) or "on none that is known"
