"""An alliance of three hospitals, its undisturbed run, and what its tests share."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedgex.common.study import Study
from fedgex.common.trust import audit_log

from ...support import alliance as alliances
from ...support.alliance import (
    STUDY,
    Alliance,
    round_of,
    trainings,
)
from ..conftest import Consortium, Exchange, Finished, _parse

FIRST, SECOND, THIRD = NAMES = ("hospital-01", "hospital-02", "hospital-03")
DAY_S = 86_400
SECRET = "patient-0042"
CONTRIBUTED = ("contributed", None)

Change = Callable[[RecordDict], None]
Tamper = Callable[..., list[tuple[str, str | None]]]


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """The run to which all others are compared."""

    alliance: Alliance
    contract: str
    run: Finished
    trained: dict[tuple[str, str, int], int]

    def exchange(self, site: str, kind: str, number: int = 0) -> Exchange:
        """Return a message as it went to a hospital, and its reply."""
        (found,) = [
            e
            for e in self.run.exchanges
            if (e.site, e.message_type, round_of(e.message)) == (site, kind, number)
        ][:1]  # round 1 is one of pretraining
        return found


@pytest.fixture(scope="session")
def founded(
    consortium: Consortium, tmp_path_factory: pytest.TempPathFactory
) -> Alliance:
    """Found the alliance and have its contract approved, once for all tests."""
    assert consortium.names[:3] == NAMES
    folder = tmp_path_factory.mktemp("alliance") / "founded"
    return alliances.found(folder, consortium.sites, NAMES)


@pytest.fixture(scope="session")
def undisturbed(
    founded: Alliance, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed") / "alliance"
    shutil.copytree(founded.folder, folder)
    alliance = Alliance(folder, NAMES)
    contract = alliance.agree(small())
    with trainings() as trained:
        run = alliance.conduct(contract)
    return Undisturbed(alliance, contract, run, dict(trained))


@pytest.fixture
def alliance(founded: Alliance, tmp_path: Path) -> Iterator[Alliance]:
    """Return a copy of the alliance; whatever a test does, its logs must hold."""
    shutil.copytree(founded.folder, tmp_path / "alliance")
    copy = Alliance(tmp_path / "alliance", NAMES)
    yield copy
    for name in NAMES:
        audit_log.verify(copy.state(name) / "audit.jsonl")


@pytest.fixture
def ran(undisturbed: Undisturbed, tmp_path: Path) -> Alliance:
    """Return a copy of the alliance after its run."""
    shutil.copytree(undisturbed.alliance.folder, tmp_path / "ran")
    return Alliance(tmp_path / "ran", NAMES)


def small(**changes: Any) -> Study:
    """Return the study of three rounds, with sections replaced."""
    return Study.read(STUDY | changes, "a test's study")


def short(n_rounds: int = 2, quorum: int = 2, **changes: Any) -> Study:
    """Return a study of pretraining alone."""
    only: dict[str, Any] = {
        "pretraining": {"rounds": n_rounds},
        "classification": {"rounds": 0},
        "cross_products": False,
        "rounds": {"quorum": quorum},
    }
    return small(**(only | changes))


def at(site: str, number: int, do: Callable[[], object]) -> Any:
    """Return a hook that does something as a round's message reaches a hospital."""

    def hook(name: str, message: Message) -> None:
        if (name, round_of(message.content)) == (site, number):
            do()

    return hook


def asked(alliance: Alliance, exchange: Exchange, change: Change | None = None) -> Any:
    """Send a hospital again what went to it; return its reply's content."""
    return answered(alliance, exchange, change).reply


def answered(
    alliance: Alliance, exchange: Exchange, change: Change | None = None
) -> Exchange:
    grid = alliance.grid()
    node = grid.nodes[exchange.site]
    content = _parse(exchange.message_bytes)
    if change is not None:
        change(content)
    message = Message(content, node.number, exchange.message_type)
    message.metadata.__dict__["_message_id"] = "again"
    grid.ask(exchange.site, message)
    return grid.exchanges[0]


def last(run: Finished, site: str, kind: str) -> Exchange:
    return [e for e in run.exchanges if (e.site, e.message_type) == (site, kind)][-1]
