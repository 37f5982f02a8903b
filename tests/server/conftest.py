"""A consortium of two hospitals and two administrators, as its folder stands."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.models import checkpoint
from fedgex.common.trust import pki
from fedgex.server.consortium import commands, contracts, drafts, members, runs
from fedgex.server.consortium.store import Consortium, ConsortiumSettings

STUDY = """
[study]
name = "small"
[study.pretraining]
rounds = 2
"""


@dataclass
class Asked:
    """A request of a hospital, and what the hospital keeps."""

    path: Path
    fingerprint: str
    key: pki.Key


@dataclass
class Admitted:
    """A consortium, and the private keys that others hold."""

    consortium: Consortium
    keys: dict[str, Path]
    """Key file of each administrator."""
    sites: dict[str, pki.Key]

    @property
    def folder(self) -> Path:
        return self.consortium.folder

    def key(self, administrator: str) -> pki.Key:
        return pki.load_key(self.keys[administrator])


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Asked]:
    """Return a function that writes a hospital's request as fedgex-site init does."""

    def make(name: str, **changed: object) -> Asked:
        key = pki.new_key()
        request = {
            "format": 1,
            "name": name,
            "node_public_key": pki.public_ssh(pki.new_node_key()),
            "certificate_request": pki.request(key, name, "site"),
            "version": "0.1.0",
        } | changed
        text = json.dumps(request, sort_keys=True, separators=(",", ":"))
        path = tmp_path / f"{name}.request.json"
        path.write_text(json.dumps(request, indent=2))
        return Asked(path, hashlib.sha256(text.encode()).hexdigest(), key)

    return make


@pytest.fixture
def founded(tmp_path: Path) -> Consortium:
    """Return a consortium that nobody has joined; nothing listens on its ports."""
    settings = ConsortiumSettings(
        name="alliance", host="fed.example.org", health_port=1
    )
    return Consortium.init(tmp_path / "state", settings)


@pytest.fixture
def admitted(
    founded: Consortium, ask: Callable[..., Asked], tmp_path: Path
) -> Admitted:
    """Return the consortium with hospitals north and south, administrators ada, bo."""
    keys, sites = {}, {}
    for name in ("ada", "bo"):
        request, asked = members.new_administrator(name, tmp_path / name)
        members.add_administrator(founded, request, asked.fingerprint)
        keys[name] = tmp_path / name / f"{name}.key"
    for name in ("north", "south"):
        asked_site = ask(name)
        members.add_site(founded, asked_site.path, asked_site.fingerprint)
        sites[name] = asked_site.key
    return Admitted(founded, keys, sites)


@pytest.fixture
def drafted(tmp_path: Path) -> dict[str, Path]:
    """Return the files from which a contract is drafted."""
    study, genes = tmp_path / "study.toml", tmp_path / "genes.txt"
    study.write_text(STUDY)
    genes.write_text("# three genes\nTP53\nESR1  # oestrogen receptor\n\nMKI67\n")
    return {"study": study, "genes": genes, "contract": tmp_path / "contract.toml"}


@pytest.fixture
def finish(
    admitted: Admitted, drafted: dict[str, Path], train: Callable[..., Any]
) -> Callable[..., runs.Run]:
    """Return a function that makes the run "small" at its end, launched by ada."""

    def make(release: str = "") -> runs.Run:
        """`release` goes into that section of the contract."""
        consortium, ada = admitted.consortium, admitted.key("ada")
        text = drafts.draft(
            consortium,
            drafted["study"],
            drafted["genes"],
            purpose="Restoration of gene panels, for tests",
            expires=(datetime.now(UTC) + timedelta(days=100)).date(),
            sites=("north", "south"),
            administrators=2,
            no_secure_aggregation="a test",
        )
        text = text.replace("[release]\n", f"[release]\n{release}")
        drafted["contract"].write_text(text)
        contracts.sign(drafted["contract"], ada, consortium.administrator(ada)[1])
        contract = contracts.publish(consortium, drafted["contract"], ada).subject
        order = commands.launch(consortium, contract, "small", ada)
        run = runs.launch(consortium, order)
        sites = {
            name: (key, pki.from_pem(consortium.site(name).certificate))
            for name, key in admitted.sites.items()
        }
        train(
            run.folder,
            contracts.load(consortium, contract).signed,
            (consortium.coordinator_key, consortium.coordinator),
            sites,
        )
        run.set("finished", reason=None)
        return run

    return make


def digest_of(run: runs.Run) -> str:
    """Return the digest of a run's last model."""
    last = checkpoint.latest(run.folder / "checkpoints")
    assert last is not None
    return checkpoint.digest(last / "manifest.json")
