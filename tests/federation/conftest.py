"""A small consortium on disk, and a Flower Grid that runs the real apps in-process."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedgex.client.app import SITES_VARIABLE, app
from fedgex.client.settings import SiteSettings
from fedgex.client.validation import load_cohort
from fedgex.common import checkpoint
from fedgex.common.checkpoint import Checkpoint
from fedgex.common.cohort import Cohort, save_cohort
from fedgex.server.run import conduct
from fedgex.server.settings import ServerSettings
from fedgex.simulations.cohorts import new_data
from fedgex.simulations.scenario import Scenario
from fedgex.simulations.split import split

Deliver = Callable[[Message, Message], Message | None]
"""What becomes of a site's reply, given the message; None if it never arrives."""

N_SITES = 4
TYPES = ("type-1", "type-2")


class InProcessGrid(Grid):
    """Messages go straight to the sites' app, and every one is kept.

    Each is copied on the way, as on a network, so that nothing is shared.
    """

    def __init__(self, n_sites: int, deliver: Deliver | None = None) -> None:
        self.contexts = {
            100 + i: Context(1, 100 + i, {"partition-id": i}, RecordDict(), {})
            for i in range(n_sites)
        }
        self.deliver = deliver or (lambda message, reply: reply)
        self.messages: list[Message] = []
        self.replies: list[Message] = []
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message_id = str(len(self.messages))
            message.metadata.__dict__["_message_id"] = message_id
            self.messages.append(message)
            self._waiting[message_id] = message
            yield message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is None:
                continue
            reply = app(copy.deepcopy(message), self.contexts[message.metadata.dst_node_id])
            delivered = self.deliver(message, copy.deepcopy(reply))
            if delivered is not None:
                self.replies.append(delivered)
                yield delivered

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_nodes(self) -> Iterable[NodeInfo]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Consortium:
    """Simulated hospitals on disk, and how to run a study over them."""

    root: Path
    scenario: Scenario
    sites: tuple[str, ...]
    """Names in the order of the Grid's nodes."""

    def study(self, **changes: dict[str, Any]) -> dict[str, Any]:
        """Return the study's settings, with `changes` to its sections."""
        values = self.scenario.study.model_dump(mode="json")
        for section, change in changes.items():
            values[section] = (
                values[section] | change if isinstance(change, dict) else change
            )
        return values

    def cohort(self, name: str) -> Cohort:
        """Return a site's checked patients."""
        settings = SiteSettings.load(self.root / "sites" / name / "site.toml")
        return load_cohort(settings, self.scenario.study.scale, ())[0]

    def conduct(
        self, study: dict[str, Any], run_dir: Path, deliver: Deliver | None = None
    ) -> InProcessGrid:
        """Conduct a study in `run_dir` and return the Grid with all its messages."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir.with_suffix(".json")
        path.write_text(json.dumps(study))
        grid = InProcessGrid(len(self.sites), deliver)
        settings = ServerSettings(
            study=path,
            run_dir=run_dir,
            holdout=self.root / "holdout" / "checked",
            n_sites=len(self.sites),
            poll_s=0.001,
        )
        conduct(grid, settings)
        return grid


@pytest.fixture(scope="session")
def consortium(
    tmp_path_factory: pytest.TempPathFactory, flower_task: None
) -> Iterator[Consortium]:
    """Write four hospitals of about thirty patients and forty genes, and a hold-out."""
    root = tmp_path_factory.mktemp("consortium")
    data = root / "data"
    new_data(
        data,
        n_sites=N_SITES,
        n_holdouts=1,
        patients_per_site=30,
        n_genes=40,
        n_cancer_types=len(TYPES),
    )
    scenario = Scenario.read(SCENARIO, "the test")
    sites = split(scenario, data, root).sites
    settings = SiteSettings.load(root / "holdout" / "site.toml")
    holdout, _ = load_cohort(settings, scenario.study.scale, ())
    save_cohort(holdout, root / "holdout" / "checked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SITES_VARIABLE, str(root / "sites"))
        yield Consortium(root=root, scenario=scenario, sites=sites)


def final(run_dir: Path) -> Checkpoint:
    """Return a run's last checkpoint."""
    found = checkpoint.latest(run_dir / "checkpoints")
    assert found is not None
    return checkpoint.load(found)


SCENARIO: dict[str, Any] = {
    "study": {
        "name": "small",
        "minimum_cohort": 5,
        "cross_products": True,
        "pretraining": {"rounds": 3},
        "classification": {"rounds": 2, "classes": TYPES},
        "survival": {"rounds": 2, "cancer_types": TYPES},
        "evaluation": {"rates": (0.1, 0.5), "panels": (10, 20)},
    },
    "data": {
        "expression": "expression.parquet",
        "scale": "log2p1",
        "clinical": "clinical.csv",
    },
    "sites": {"column": "institution", "minimum_patients": 10},
    "holdout": {"institutions": ["Hold-out 01"]},
    "run": {"workers": 2},
}
