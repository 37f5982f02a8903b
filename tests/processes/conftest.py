"""The one consortium of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .consortium import Served, serving
from .troubles import SESSION, Road, clear_away


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put last what shares the session's consortium, whose processes cost time."""
    items.sort(key=lambda item: "served" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def road() -> Iterator[Road]:
    """Return a road into a network namespace, or one that says why there is none."""
    clear_away()
    made = Road(SESSION)
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
