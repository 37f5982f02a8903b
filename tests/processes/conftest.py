"""The one consortium of a session, or of each of two workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from .consortium import Served, serving
from .troubles import SESSION, Road, clear_away

FIRST_HALF = (
    "test_kills",
    "test_links",
    "test_refusals",
    "test_upgrade",
    "test_what_remains",
)
"""Modules that take as long as all others. The last looks at what the rest left."""


class Halves(LoadScopeScheduling):
    """Gives each of two workers a half; pytest 9 knows no groups (pytest-xdist 3.8)."""

    def _split_scope(self, nodeid: str) -> str:
        return "first" if Path(nodeid.split("::")[0]).stem in FIRST_HALF else "second"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Halves:
    return Halves(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put last what shares the session's consortium, whose processes cost time."""
    items.sort(key=lambda item: "served" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def road() -> Iterator[Road]:
    """Return a road into a network namespace, or one that says why there is none."""
    clear_away()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    made = Road(SESSION, number=int(worker.removeprefix("gw")))
    try:
        made.open()
    except OSError as error:
        made.why_not = f"no network of our own can be made: {error}"
    yield made
    made.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, road: Road) -> Iterator[Served]:
    """Provision, start and approve once for all tests of a session."""
    with serving(tmp_path_factory.mktemp("consortium"), road) as made:
        yield made
        made.replays()
