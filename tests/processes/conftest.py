"""The one consortium of a session, or of each of two workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .consortium import Served, serving
from .troubles import SESSION, Road, clear_away

FIRST_HALF = {"test_kills", "test_links", "test_refusals", "test_what_remains"}
"""Modules for one worker, the last of which looks at what the others left; the rest
take as long. Each half has its own consortium."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the modules in two, last in each what shares the session's consortium.

    Its processes cost the others time.
    """
    items.sort(key=lambda item: "served" in getattr(item, "fixturenames", ()))
    for item in items:
        if item.path.parent == Path(__file__).parent:
            half = "first" if item.path.stem in FIRST_HALF else "second"
            item.add_marker(pytest.mark.xdist_group(half))


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
