"""Every file of data is read, or refused with findings; no stack trace."""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import pytest

from fedgex.client.ledger import ledger as ledgers
from fedgex.client.ledger.ledger import Ledger
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.data.cohort import read_parquet
from fedgex.common.data.genes import TABLE_COLUMNS, GeneTable
from fedgex.common.data.scales import Scale
from fedgex.common.errors import CheckpointError, ConfigError, DataError, UpdateError
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.ingestion.readers import read
from fedgex.common.ingestion.settings import DataSettings
from fedgex.common.models import checkpoint
from fedgex.server.federation.strategy import Spooled

from ..client.data import cases
from .mutations import attack


def loaded(**data: Any) -> object:
    """Read and check a hospital's files."""
    settings = SiteSettings(
        name="north",
        policy=Policy.proposed(minimum_cohort=cases.FLOOR),
        data=DataSettings(scale=Scale.LOG2P1, **data),
    )
    return read_cohort(
        settings.data, settings.policy.minimum_cohort, Scale.LOG2P1, ("pretraining",)
    )


def zipped(sheet: pd.DataFrame, file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("e.csv", sheet.to_csv(index=False))


BINARY: dict[str, Callable[[pd.DataFrame, io.BytesIO], object]] = {
    ".parquet": pd.DataFrame.to_parquet,
    ".feather": pd.DataFrame.to_feather,
    ".xlsx": lambda sheet, file: sheet.to_excel(file, index=False),
    ".csv.zip": zipped,
}


def written(suffix: str) -> bytes:
    """Return the small hospital's expression in a format."""
    sheet, file = cases.expression(), io.BytesIO()
    if suffix in BINARY:
        BINARY[suffix](sheet.astype(float).reset_index(), file)
        return file.getvalue()
    text = sheet.to_csv(sep="\t" if "tsv" in suffix else ",").encode()
    return gzip.compress(text, mtime=0) if suffix.endswith(".gz") else text


@pytest.mark.parametrize(
    ("suffix", "examples"),
    [
        *((".csv", 150), (".tsv", 50), (".csv.gz", 150), (".parquet", 150)),
        *((".feather", 100), (".xlsx", 20), (".csv.zip", 50)),
    ],
)
def test_expression(suffix: str, examples: int, tmp_path: Path) -> None:
    path, table = tmp_path / f"e{suffix}", tmp_path / "c.csv"
    cases.clinical().to_csv(table, index=False)

    def load(content: bytes) -> object:
        path.write_bytes(content)
        return loaded(expression=path, clinical=table)

    attack(f"expression {suffix}", load, DataError, [written(suffix)], examples)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_clinical(suffix: str, tmp_path: Path) -> None:
    path, sheet = tmp_path / f"c{suffix}", tmp_path / "e.csv"
    sheet.write_bytes(written(".csv"))
    file = io.BytesIO()
    if suffix == ".parquet":
        cases.clinical().to_parquet(file)
    else:
        cases.clinical().to_csv(file, index=False)

    def load(content: bytes) -> object:
        path.write_bytes(content)
        return loaded(expression=sheet, clinical=path)

    attack(f"clinical {suffix}", load, DataError, [file.getvalue()], 100)


def test_h5ad(tmp_path: Path) -> None:
    path = tmp_path / "e.h5ad"
    sheet = cases.expression().astype(float)
    obs = cases.clinical().set_index("patient").astype(str)
    made = anndata.AnnData(sheet.to_numpy(), obs=obs, uns={"pca": {"n": 2}})
    made.var_names = list(sheet.columns)
    made.write_h5ad(path)

    def load(content: bytes) -> object:
        path.write_bytes(content)
        return read(DataSettings(expression=path, scale=Scale.LOG2P1))

    attack("expression .h5ad", load, DataError, [path.read_bytes()], 40)


def test_opt_outs(tmp_path: Path) -> None:
    path, sheet = tmp_path / "opt-outs.txt", tmp_path / "e.csv"
    sheet.write_bytes(written(".csv"))

    def load(content: bytes) -> object:
        path.write_bytes(content)
        return read(DataSettings(expression=sheet, opt_outs=path, scale=Scale.LOG2P1))

    attack("opt-outs", load, DataError, [b"PAT-001 # by letter\nPAT-002\n"], 100)


def of_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], object]:
    def through(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return through


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_gene_table(suffix: str, tmp_path: Path) -> None:
    row = dict.fromkeys(TABLE_COLUMNS, "TP53") | {"status": "Approved"}
    seed = pd.DataFrame([row] * 3).to_csv(sep="\t", index=False).encode()
    seed = gzip.compress(seed, mtime=0) if suffix.endswith(".gz") else seed
    target = of_file(tmp_path / f"hgnc{suffix}", GeneTable.read)

    attack(f"gene table {suffix}", target, ConfigError, [seed], 100)


def test_public_cohort(tmp_path: Path) -> None:
    target = of_file(tmp_path / "expression.parquet", read_parquet)

    attack("public cohort", target, ConfigError, [written(".parquet")], 100)


def test_ledger(tmp_path: Path) -> None:
    ledgers.Ledger.create(tmp_path)
    path = tmp_path / ledgers.FILE
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    seed = path.read_bytes()

    def load(content: bytes) -> object:
        for other in tmp_path.glob(f"{ledgers.FILE}-*"):
            other.unlink()
        path.write_bytes(content)
        return Ledger.open(tmp_path).read()

    attack("ledger", load, ledgers.LedgerError, [seed], 100)


# ---- models ----


def test_checkpoint(release: Callable[..., Any], tmp_path: Path) -> None:
    folder = release().evidence.checkpoint
    manifest, model = folder / "manifest.json", folder / "model.safetensors"
    whole, tensors = manifest.read_bytes(), model.read_bytes()

    def load_manifest(content: bytes) -> object:
        manifest.write_bytes(content)
        return checkpoint.load(folder)

    attack("manifest", load_manifest, CheckpointError, [whole], 150)

    def load_model(content: bytes) -> object:
        model.write_bytes(content)
        listed = json.loads(whole)
        listed["files"][model.name] = checkpoint.digest(model)
        manifest.write_text(json.dumps(listed))
        return checkpoint.load(folder)

    attack("model.safetensors", load_model, CheckpointError, [tensors], 150)


def test_spooled_update(release: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    seed = (release().evidence.checkpoint / "model.safetensors").read_bytes()

    attack("update", of_file(path, lambda p: dict(Spooled(p))), UpdateError, [seed])
