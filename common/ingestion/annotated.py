"""AnnData: the parts of an .h5ad file that are needed, and no others."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import h5py
import pandas as pd

from fedgex.common.codes import Code
from fedgex.common.ingestion.findings import refuse

RAW = "raw"
"""Name of `raw.X` as a layer."""


def read_h5ad(
    path: Path, layer: str | None, seen: list[str]
) -> tuple[Any, pd.Index[str], pd.DataFrame]:
    """Read X or a layer (N, G), the names of the genes, and obs.

    Other parts (uns, obsm and so on) are not read, so that they may be of any version
    of anndata. A column of obs that cannot be read is left out, with a word in `seen`.

    Raises
    ------
    DataError
        If there is no such layer, or a newer anndata wrote a part that is needed.
    """
    with h5py.File(path, "r") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repeated names become findings
        if not {"obs", "var"} <= set(file):
            refuse(
                Code.FILE_UNREADABLE,
                path,
                found="an HDF5 file that is no AnnData (loom, 10x or another)",
                action="Write it with anndata as .h5ad.",
            )
        layers = [*file.get("layers", ()), *([RAW] if "raw/X" in file else [])]
        place = {None: "X", RAW: "raw/X"}.get(layer, f"layers/{layer}")
        if place not in file:
            if layer is None:
                _refuse_empty(path, layers)
            refuse(
                Code.LAYER_MISSING,
                path,
                layer=layer,
                layers=", ".join(layers) or "none: remove data.layer",
            )
        values = _element(path, file[place])
        var = _frame(path, file["raw/var" if layer == RAW else "var"], [], [])
        obs = _frame(path, file["obs"], None, seen)
    if values is None or 0 in values.shape:
        _refuse_empty(path, layers)
    if layer is not None:
        seen.append(f'values of "{layer}"')
    dense = values.toarray() if hasattr(values, "toarray") else values
    return dense, var.index, obs


def _refuse_empty(path: Path, layers: list[str]) -> NoReturn:
    also = f", or data.layer as one of {', '.join(layers)}" if layers else ""
    refuse(Code.FILE_EMPTY, path, expected=f"values in X{also}")


def _frame(
    path: Path, group: Any, columns: list[str] | None, seen: list[str]
) -> pd.DataFrame:
    """Read the index of a table, and the columns that can be read; None is all."""
    if isinstance(group, h5py.Dataset):  # anndata before 0.7
        cells = pd.DataFrame.from_records(_element(path, group))
        frame = cells.map(
            lambda cell: cell.decode() if isinstance(cell, bytes) else cell
        )
        return frame.set_index(frame.columns[0])
    index = _element(path, group[group.attrs["_index"]])
    frame, lost = pd.DataFrame(index=pd.Index(index).astype(str)), []
    for name in group.attrs["column-order"] if columns is None else columns:
        try:
            frame[name] = _read(group[name])
        except Exception:  # a newer anndata's, or a damaged one
            lost.append(str(name))
    if lost:
        seen.append(f"columns of obs that cannot be read here: {', '.join(lost)}")
    return frame


def _element(path: Path, part: Any) -> Any:
    try:
        return _read(part)
    except Exception as error:  # anndata and HDF5 have many
        if type(error).__name__ != "IORegistryError":
            refuse(Code.FILE_UNREADABLE, path, found="a damaged file, or no AnnData")
        ours = version("anndata")
        refuse(
            Code.FILE_UNREADABLE,
            path,
            found=f"{part.name.strip('/')} written by a newer anndata than the one "
            f"installed ({ours})",
            expected=f"AnnData as anndata {ours} writes it",
            action="Write it with that version, or export the matrix as .parquet or "
            ".csv.",
        )


def _read(part: Any) -> Any:
    from anndata.io import read_elem  # a second to import; most need no AnnData

    return read_elem(part)
