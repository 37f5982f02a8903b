"""The example settings in deploy/ are what the commands write, word for word."""

from pathlib import Path

import pytest

from fedgex.client import policy
from fedgex.client.cli import site
from fedgex.client.settings import SiteSettings
from fedgex.server.consortium import annotated_toml
from fedgex.server.consortium.store import ConsortiumSettings

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
WRITTEN = {
    "site.toml": site.TEMPLATE.format(name="north", server="fedgex.example.org:9092"),
    "policy.toml": policy.TEMPLATE,
    "consortium.toml": annotated_toml.render(
        ConsortiumSettings(name="oncology", host="fedgex.example.org")
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_example_is_what_the_command_writes(name: str) -> None:
    assert (EXAMPLES / name).read_text() == WRITTEN[name]


def test_there_is_no_example_that_nothing_compares() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == set(WRITTEN)


def test_a_hospital_can_begin_with_the_examples() -> None:
    settings = SiteSettings.load(EXAMPLES / "site.toml")

    assert settings.name == "north"
    assert settings.policy.minimum_cohort == 10
