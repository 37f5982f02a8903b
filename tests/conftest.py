"""Fixtures that several test folders share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from cryptography import x509

from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.models import checkpoint, tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.trust import bundle, pki, receipt
from fedgex.common.trust.bundle import Evidence
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed, sign

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).parents[1]
GENES = ("AAA1", "BBB2", "CCC3", "DDD4", "EEE5", "FFF6")
CONTRACT = """\
purpose = "Restoration of gene panels, for tests"
expires = 2199-12-31
code_version = "{version}"
vocabulary_hash = "{vocabulary}"
sites = ["north", "south"]
[release]
administrators = 2
[study]
name = "small"
[study.pretraining]
rounds = 2
[study.vocabulary]
genes = {genes}
"""

OF_DELTAS: dict[str, Any] = {
    "strategy": {
        "name": "fedavg",
        "weights": "equal",
        "update": "delta",
        "per_gene": False,
    },
    "public": {"statistics": True},
}
"""What a study must say for the server to add noise to its mean."""

_GONE = "http://127.0.0.1:9"
_NAMED = {"http": _GONE, "https": _GONE, "all": _GONE, "grpc": _GONE, "no": ""}
PROXIES = {
    variable: url
    for name, url in _NAMED.items()
    for variable in (f"{name}_proxy", f"{name}_proxy".upper())
}
"""Variables of a machine whose proxy is gone: every call that obeys them fails."""
os.environ |= PROXIES  # for fixtures of a session


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Name the proxies anew: a command that a test calls forgets them."""
    os.environ |= PROXIES


Holder = tuple[pki.Key, x509.Certificate]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with the real expression data, or skip with the reason."""
    folder = Path(os.environ.get("FEDGEX_DATA", ROOT / "../shared/data")).resolve()
    if not (folder / "tcga" / "clinical.csv").is_file():
        pytest.skip(f"no real data: {folder}/tcga/clinical.csv is absent (FEDGEX_DATA)")
    return folder


def attack(training: str, high: float) -> dict[str, Any]:
    """Return an audit's attack whose AUC may be as much as `high`."""
    return {
        "training": training,
        "attack": "loss",
        "task": "restoration",
        "members": 40,
        "non_members": 50,
        "auc": {"value": 0.5, "low": 0.4, "high": high},
        "found": [],
    }


@dataclass
class Release:
    """A run that came to its end and was released, and the keys of all who signed."""

    folder: Path
    evidence: Evidence
    authority_key: pki.Key
    coordinator: Holder

    @property
    def authority(self) -> x509.Certificate:
        return self.evidence.authority

    def issue(self, name: str, role: pki.Role) -> Holder:
        return _issued(self.authority_key, self.authority, name, role)

    def write(self, **changes: Any) -> Path:
        """Write the bundle, with changes to what it is made of."""
        path = self.folder / "run-1.fedgex"
        evidence = dataclasses.replace(self.evidence, **changes)
        bundle.write(evidence, path, *self.coordinator)
        return path

    def order(self, name: str, signer: Holder | None = None, **changes: Any) -> Signed:
        """Return an administrator's order to release the model."""
        manifest = (self.evidence.checkpoint / "manifest.json").read_bytes()
        values = {
            "kind": "release",
            "token": f"token-of-{name}",
            "subject": "run-1",
            "administrator": name,
            "at": self.evidence.released.isoformat(),
            "run": "",
            "model": hashlib.sha256(manifest).hexdigest(),
        }
        holder = signer or self.issue(name, "administrator")
        return Signed(json.dumps(values | changes)).signed_by(*holder)


@pytest.fixture
def release(
    tmp_path: Path, train: Callable[..., list[Signed]]
) -> Callable[..., Release]:
    """Return a function that makes a run of two rounds, released by ada and bo."""

    def make(days_ago: int = 0, **changes: Any) -> Release:
        """`changes` are those of `train`."""
        key, authority = pki.new_authority("alliance")
        coordinator = _issued(key, authority, "alliance", "coordinator")
        text = CONTRACT.format(
            version=".".join(version("fedgex").split(".")[:2]),
            vocabulary=Vocabulary(GENES).hash,
            genes=json.dumps(GENES),
        )
        contract = Signed(text).signed_by(
            *_issued(key, authority, "ada", "administrator")
        )
        sites = {
            name: _issued(key, authority, name, "site") for name in ("north", "south")
        }
        receipts = train(tmp_path / "run-1", contract, coordinator, sites, **changes)
        last = checkpoint.latest(tmp_path / "run-1" / "checkpoints")
        assert last is not None
        now = datetime.now(UTC).replace(microsecond=0) - timedelta(days=days_ago)
        evidence = Evidence("run-1", last, contract, receipts, {}, authority, now)
        made = Release(tmp_path, evidence, key, coordinator)
        orders = {name: made.order(name) for name in ("ada", "bo")}
        made.evidence = dataclasses.replace(evidence, orders=orders)
        return made

    return make


@pytest.fixture(scope="session")
def train() -> Callable[..., list[Signed]]:
    """Return a function that writes checkpoints and receipts as a run leaves them."""
    return _train


def _train(
    run: Path,
    contract_text: Signed,
    coordinator: Holder,
    sites: Mapping[str, Holder],
    change: Callable[[int, dict[str, Any]], None] = lambda index, values: None,
) -> list[Signed]:
    """Write each round's checkpoint; `change` may edit a receipt before it is signed.

    A round adds 1 to every parameter; south's number of patients is suppressed.
    """
    contract = Contract.read_signed(contract_text)
    study = contract.study
    vocabulary = Vocabulary(tuple(sorted(study.vocabulary.genes)))
    at = Checkpoint(
        study=study,
        vocabulary=vocabulary,
        standardisation=Standardisation(
            mean=np.full(len(vocabulary), 4.0), sd=np.full(len(vocabulary), 1.5)
        ),
        phase="pretraining",
        round=0,
        parameters=tasks.initial(study, len(vocabulary)),
        trained_on={"sites": sorted(sites), "patients": None},
    )
    checkpoint.save(at, run / "checkpoints" / "00000-pretraining-00000")
    receipts: list[Signed] = []
    for index in range(1, study.phases["pretraining"].rounds + 1):
        before = at
        parameters = {k: v + np.float32(1) for k, v in before.parameters.items()}
        at = dataclasses.replace(before, round=index, parameters=parameters)
        values = {
            "contract": contract_text.hash,
            "run": run.name,
            "index": index,
            "phase": "pretraining",
            "round": index,
            "incoming": receipt.parameters_digest(before.parameters),
            "outgoing": receipt.parameters_digest(at.parameters),
            "sites": {
                name: _entry(contract_text.hash, run.name, index, name, holder)
                for name, holder in sites.items()
            },
            "previous": receipts[-1].hash if receipts else receipt.NO_RECEIPT,
            "time": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        }
        change(index, values)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        receipts.append(Signed(text).signed_by(*coordinator))
        folder = run / "checkpoints" / f"{index:05d}-pretraining-{index:05d}"
        checkpoint.save(at, folder, receipt=receipts[-1].to_json())
    return receipts


def _entry(
    contract: str, run: str, index: int, site: str, holder: Holder
) -> dict[str, Any]:
    part = {
        "contract": contract,
        "run": run,
        "site": site,
        "type": "train",
        "phase": "pretraining",
        "round": index,
        "request": hashlib.sha256(b"request").hexdigest(),
        "reply": hashlib.sha256(site.encode()).hexdigest(),
        "head": {"index": index, "hash": hashlib.sha256(b"head").hexdigest()},
        "patients": "suppressed" if site == "south" else 412,
    }
    text = json.dumps(part, sort_keys=True, separators=(",", ":"))
    return {
        "state": "contributed",
        "reason": None,
        "patients": part["patients"],
        "update": part["reply"],
        "part": text,
        "signature": sign(holder[0], text.encode()),
        "certificate": pki.to_pem(holder[1]),
    }


def _issued(
    authority_key: pki.Key, authority: x509.Certificate, name: str, role: pki.Role
) -> Holder:
    key = pki.new_key()
    csr = pki.request(key, name, role)
    made = pki.issue(authority_key, authority, csr, name=name, role=role, days=30)
    return key, made
