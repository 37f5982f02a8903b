"""What a launch writes down, and when it is refused."""

import hashlib
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import ConfigError
from fedgex.server.consortium import contracts, drafts, runs
from fedgex.server.consortium.commands import Order
from fedgex.server.settings import ServerSettings


@pytest.fixture
def order(admitted: Any, drafted: dict[str, Path]) -> Order:
    """Return the launch of a published study that takes from a public cohort."""
    study = drafted["study"]
    study.write_text(study.read_text() + "[study.public]\nstatistics = true\n")
    text = drafts.draft(
        admitted.consortium,
        study,
        drafted["genes"],
        purpose="restoration of three genes",
        expires=date(2999, 12, 31),
        sites=["north", "south"],
        administrators=2,
        no_secure_aggregation="a test",
    )
    drafted["contract"].write_text(text)
    key = admitted.key("ada")
    contracts.sign(drafted["contract"], key, admitted.consortium.administrator(key)[1])
    contracts.publish(admitted.consortium, drafted["contract"], key)
    return Order(
        kind="launch",
        token="t1",
        subject=hashlib.sha256(text.encode()).hexdigest(),
        administrator="ada",
        at=datetime.now(UTC),
        run="small",
    )


def test_a_study_is_not_launched_without_the_public_cohort_that_it_wants(
    admitted: Any, order: Order
) -> None:
    with pytest.raises(
        ConfigError, match=r"public cohort, and .*public does not exist"
    ):
        runs.launch(admitted.consortium, order)

    assert not (admitted.folder / "runs" / "small").exists()


def test_the_server_finds_the_public_cohort_in_the_state_directory(
    admitted: Any, order: Order
) -> None:
    (admitted.folder / "public").mkdir()

    run = runs.launch(admitted.consortium, order)

    assert json.loads(run.settings_path.read_text())["holdout"] is None
    settings = ServerSettings.load(run.settings_path)
    assert settings.public == admitted.folder / "public"
