"""Texts and files of other parties are parsed in one place for each kind.

There a library's own errors become the documented one, and sizes are bounded; a call of
the library anywhere else would raise whatever it likes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PLACES: dict[str, set[str]] = {
    "json.load": set(),
    "json.loads": {
        "common/parsing.py",
        # what this party wrote itself
        "client/service/supernode.py",
        "common/system/metrics_server.py",
        "common/trust/audit_log.py",
    },
    "json.JSONDecoder": set(),
    "tomllib.load": set(),
    "tomllib.loads": {"common/parsing.py"},
    "model_validate_json": set(),
    "validate_json": set(),
    "x509.load_pem_x509_certificate": {"common/trust/pki.py"},
    "x509.load_pem_x509_csr": {"common/trust/pki.py"},
    "x509.load_pem_x509_crl": {"common/trust/revocation.py"},
    "x509.load_der_x509_certificate": {"client/service/connection.py"},
    "serialization.load_pem_private_key": {"common/trust/pki.py"},
    "load_ssh_private_key": {
        # the hospital's own
        "client/service/connection.py",
        "client/service/supernode.py",
    },
    "load_ssh_public_key": {
        "server/consortium/members.py",
        "server/service/flower.py",  # what members took
    },
    "zipfile.ZipFile": {
        "common/trust/archive.py",
        "common/ingestion/content.py",  # a hospital's own file
    },
    "openpyxl.load_workbook": {"common/ingestion/content.py"},
    "h5py.File": {"common/ingestion/annotated.py"},
    "safe_open": {
        "client/ledger/released_sums.py",  # what this hospital wrote
        "server/federation/strategy.py",
    },
    "load_file": {
        "common/models/checkpoint.py",
        # what the server wrote itself
        "server/federation/initialization.py",
        "server/federation/run.py",
    },
    "safetensors.load": {"common/transport/records.py"},
    "np.load": set(),
    "np.fromfile": {"server/consortium/participants.py"},  # a verified bundle
    "pickle.load": set(),
    "pickle.loads": set(),
    "torch.load": set(),
    "pd.read_csv": {"common/data/genes.py"},
    "pd.read_parquet": set(),
    "pq.ParquetFile": {"common/data/cohort.py"},
    "pa.parquet.ParquetFile": {"common/ingestion/tables.py"},
    "pa.feather.read_table": {"common/ingestion/tables.py"},
    "pa.csv.read_csv": {"common/ingestion/text.py"},
    "anndata.read_h5ad": set(),
    "RecordDictProto.FromString": {"common/transport/flower.py"},
}
"""Calls that parse, and the only modules that make them; all catch `Exception`, or
read what this party wrote itself."""


@cache
def calls(path: Path) -> frozenset[str]:
    """Return the dotted names that a module uses."""
    return frozenset(_names(path))


def _names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                short = node.module.split(".")[0]
                yield f"{short}.{name.name}"
                yield name.name


@pytest.mark.parametrize("call", PLACES)
def test_a_parser_is_called_in_its_own_places_only(call: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("client", "common", "server")
        for path in (ROOT / folder).rglob("*.py")
        if any(name == call or name.endswith(f".{call}") for name in calls(path))
    }

    assert found <= PLACES[call], f"read with fedgex.common.parsing: {found}"
