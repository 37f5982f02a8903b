"""A small consortium, and the simulator's Grid with a hand in it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.data.cohort import save_cohort
from fedgex.common.ingestion.cohort import read_cohort
from fedgex.common.models import checkpoint
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.study import Study
from fedgex.server import journal
from fedgex.server.federation.participants import Simulated
from fedgex.server.federation.run import conduct
from fedgex.server.settings import ServerSettings
from fedgex.simulations.data.split import split
from fedgex.simulations.data.synthetic import new_data
from fedgex.simulations.grid import LocalGrid
from fedgex.simulations.scenario import Scenario

TYPES = ["type-1", "type-2"]
N_SITES = 4

Alter = Callable[[str, Message], None]
"""Changes a message on its way to the named site."""


class Killed(BaseException):
    """Ends the server as a signal would: nothing of it catches this."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One message to a site and its reply, as they went over the wire."""

    site: str
    message_type: str
    message: RecordDict
    reply: RecordDict
    message_bytes: bytes
    reply_bytes: bytes


class InProcessGrid(LocalGrid):
    """The simulator's grid, which notes what is exchanged, and may be disturbed."""

    def __init__(
        self, sites: Path, *, kill_after: int | None = None, alter: Alter | None = None
    ) -> None:
        """Open a grid over a folder of sites.

        Parameters
        ----------
        kill_after
            Raise `Killed` instead of delivering any training message after so many.
        """
        super().__init__(sites)
        self.kill_after, self.alter = kill_after, alter
        self.exchanges: list[Exchange] = []

    def deliver(self, message: Message, message_id: str) -> Message:
        message_type = message.metadata.message_type
        trained = sum(e.message_type == keys.TRAIN for e in self.exchanges)
        if message_type == keys.TRAIN and trained == self.kill_after:
            raise Killed
        node = message.metadata.dst_node_id
        sent = Message(_parse(_bytes(message.content)), node, message_type)
        if self.alter is not None:
            self.alter(self.names[node], sent)
        reply = super().deliver(sent, message_id)
        reply_bytes = _bytes(reply.content)
        self.exchanges.append(
            Exchange(
                site=self.names[node],
                message_type=message_type,
                message=sent.content,
                reply=_parse(reply_bytes),  # the server empties its own
                message_bytes=_bytes(sent.content),
                reply_bytes=reply_bytes,
            )
        )
        return reply


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is left of a run in its folder, and what its grid has seen."""

    run_dir: Path
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def final(self) -> Checkpoint:
        return checkpoint.load(self.final_folder)

    @property
    def final_folder(self) -> Path:
        return checkpoint.find(self.run_dir)

    @property
    def digest(self) -> str:
        """SHA-256 of the last checkpoint's model."""
        return checkpoint.digest(self.final_folder / "model.safetensors")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the journal's events of one kind."""
        written = journal.read(self.run_dir / "journal.jsonl")
        return [event for event in written if event["event"] == name]

    @property
    def rounds(self) -> list[tuple[str, int]]:
        """Phase and number of every round in the journal."""
        return [(e["phase"], e["round"]) for e in self.events("round")]


@dataclass(frozen=True, kw_only=True)
class Consortium:
    """Four hospitals, a hold-out, and what it takes to run studies over them."""

    data: Path
    sites: Path
    holdout: Path
    """The same rows as of other patients lie in its neighbour `public`."""
    names: tuple[str, ...]

    def study(self, **changes: Any) -> Study:
        """Return the study of `study_values`, with sections replaced."""
        return Study.read(study_values() | changes, "a test's study")

    def conduct(
        self,
        study: Study,
        run_dir: Path,
        *,
        sites: Path | None = None,
        kill_after: int | None = None,
        alter: Alter | None = None,
        public: Path | None = None,
    ) -> Finished:
        """Run a study, or go on with it, until it ends or is killed."""
        run_dir.mkdir(parents=True, exist_ok=True)
        study_file = run_dir / "study.json"
        study_file.write_text(study.to_json())
        grid = InProcessGrid(sites or self.sites, kill_after=kill_after, alter=alter)
        settings = ServerSettings(
            study=study_file,
            run_dir=run_dir,
            holdout=self.holdout,
            public=public,
            n_sites=len(grid.names),
            poll_s=0.001,
        )
        with contextlib.suppress(Killed):
            participants = Simulated(study=study, n_sites=len(grid.names))
            conduct(grid, settings, participants)
        return Finished(run_dir=run_dir, exchanges=grid.exchanges)

    def patient_ids(self) -> list[str]:
        """Return the identifier of every patient of every site."""
        return [
            line.split(",")[0]
            for name in self.names
            for line in (self.sites / name / "clinical.csv").read_text().split()[1:]
        ]


def study_values() -> dict[str, Any]:
    """Return a study of three phases, two rounds each, that takes about a second."""
    return {
        "name": "small",
        "minimum_cohort": 10,
        "cross_products": True,
        "pretraining": {"rounds": 2},
        "classification": {"rounds": 2, "classes": TYPES},
        "survival": {"rounds": 2, "cancer_types": TYPES},
        "evaluation": {"rates": [0.1, 0.5, 0.9], "panels": [10, 20]},
    }


def scenario_values() -> dict[str, Any]:
    """Return the scenario that splits the consortium's data into its hospitals."""
    return {
        "study": study_values(),
        "data": {
            "expression": "expression.parquet",
            "scale": "log2p1",
            "clinical": "clinical.csv",
        },
        "sites": {"column": "institution", "minimum_patients": 10},
        "holdout": {"institutions": ["Hold-out 01"]},
        "reference": {"alone": False, "pooled": False},
    }


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Write the hospitals' files once; a test that changes one takes a copy."""
    torch.set_num_threads(1)
    return write_hospitals(tmp_path_factory.mktemp("consortium") / "data")


def write_hospitals(
    data: Path,
    *,
    n_genes: int = 40,
    patients_per_site: int = 30,
    n_sites: int = N_SITES,
) -> Consortium:
    """Draw a consortium's data, and split it into its hospitals beside."""
    new_data(
        data,
        n_sites=n_sites,
        n_holdouts=1,
        patients_per_site=patients_per_site,
        n_genes=n_genes,
        n_cancer_types=len(TYPES),
    )
    out = data.with_name("split")
    scenario = Scenario.read(scenario_values(), "a test's scenario")
    parts = split(scenario, data, out)
    assert len(parts.sites) == n_sites
    holdout = out / "holdout" / "checked"
    settings = SiteSettings.load(out / "holdout" / "site.toml")
    study = scenario.study
    floor, tasks = settings.policy.minimum_cohort, tuple(study.phases)
    cohort, _ = read_cohort(settings.data, floor, study.scale, tasks)
    save_cohort(cohort, holdout, study.scale)
    others = tuple(f"public-{patient}" for patient in cohort.patients)
    public = dataclasses.replace(cohort, patients=others)
    save_cohort(public, holdout.with_name("public"), study.scale)
    return Consortium(
        data=data, sites=out / "sites", holdout=holdout, names=parts.sites
    )


@pytest.fixture(scope="session")
def finished(
    consortium: Consortium, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Run the study to its end, undisturbed, once for all tests that only look."""
    return consortium.conduct(consortium.study(), tmp_path_factory.mktemp("run"))


def _bytes(content: RecordDict) -> bytes:
    return recorddict_to_proto(content).SerializeToString(deterministic=True)


def _parse(content: bytes) -> RecordDict:
    return recorddict_from_proto(RecordDictProto.FromString(content))
