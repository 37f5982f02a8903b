"""Bad luck with files: one finding or one refusal each, and no stack trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pytest

from fedgex.common.data.scales import Scale
from fedgex.common.errors import CheckpointError, DataError, TrustError
from fedgex.common.ingestion.readers import read
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.models import checkpoint
from fedgex.common.trust import bundle

from ..client.data import cases


def torn_gzip(path: Path) -> None:
    packed = gzip.compress(cases.expression().to_csv().encode())
    path.write_bytes(packed[: len(packed) // 2])


def changed_gzip(path: Path) -> None:
    text = cases.expression().to_csv().encode()
    packed = bytearray(gzip.compress(text))
    packed[len(packed) // 3] ^= 0xFF
    path.write_bytes(packed)


def _parquet_with(metadata: bytes, path: Path) -> None:
    table = pa.table({"patient": ["P1"] * 20, "TP53": [1.0] * 20})
    described = table.replace_schema_metadata({b"pandas": metadata})
    pa.parquet.write_table(described, path)


def parquet_with_torn_metadata(path: Path) -> None:
    _parquet_with(b'{"index_columns": ["pat', path)


def parquet_with_metadata_of_other_bytes(path: Path) -> None:
    _parquet_with(b"\xff\xfe\xfd", path)


def parquet_with_text_that_is_no_utf8(path: Path) -> None:
    raw = pa.array([b"\xff\xfe"] * 20, pa.binary())
    labels = pa.StringArray.from_buffers(20, *raw.buffers()[1:])
    pa.parquet.write_table(pa.table({"patient": labels, "TP53": [1.0] * 20}), path)


def _h5ad(path: Path) -> None:
    sheet = cases.expression().astype(float)
    made = anndata.AnnData(sheet.to_numpy(), uns={"tool": {"version": 2}})
    made.var_names, made.obs_names = list(sheet.columns), list(cases.PATIENTS)
    made.write_h5ad(path)


def h5ad_with_unknown_values(path: Path) -> None:
    _h5ad(path)
    with h5py.File(path, "a") as file:
        file["X"].attrs["encoding-type"] = "of-the-next-century"


def h5ad_cut_off(path: Path) -> None:
    _h5ad(path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".csv.gz", torn_gzip),
        (".csv.gz", changed_gzip),
        (".parquet", parquet_with_torn_metadata),
        (".parquet", parquet_with_metadata_of_other_bytes),
        (".parquet", parquet_with_text_that_is_no_utf8),
        (".h5ad", h5ad_with_unknown_values),
        (".h5ad", h5ad_cut_off),
    ],
)
def test_a_damaged_file_is_one_finding(
    suffix: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / f"e{suffix}"
    damage(path)

    with pytest.raises(DataError) as refusal:
        read(DataSettings(expression=path, scale=Scale.LOG2P1))

    (finding,) = refusal.value.findings
    assert finding.code == "FX-DATA-002"
    assert finding.where == path.name


def test_a_checkpoint_of_torn_parameters_is_refused(
    release: Callable[..., Any],
) -> None:
    folder = release().evidence.checkpoint
    model, manifest = folder / "model.safetensors", folder / "manifest.json"
    model.write_bytes(model.read_bytes()[:-100])
    listed = json.loads(manifest.read_text())
    listed["files"][model.name] = checkpoint.digest(model)
    manifest.write_text(json.dumps(listed))

    with pytest.raises(CheckpointError, match="expected a checkpoint that"):
        checkpoint.load(folder)


def test_a_checkpoint_names_no_file_outside_its_folder(
    release: Callable[..., Any],
) -> None:
    folder = release().evidence.checkpoint
    manifest = folder / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["files"]["../../secret"] = "a" * 64
    manifest.write_text(json.dumps(listed))

    with pytest.raises(CheckpointError, match="files"):
        checkpoint.load(folder)


def test_a_bundle_that_is_no_zip_is_refused_when_its_orders_are_listed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run-1.fedgex"
    np.zeros(1000, np.uint8).tofile(path)

    with pytest.raises(TrustError, match="cannot be read as a bundle"):
        bundle.administrators(path)
