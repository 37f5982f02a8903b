import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from fedgex.common.errors import ConfigError
from fedgex.simulations.scenario import Scenario, find, shipped

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "scenarios.md"

MINIMAL = """
[study]
name = "small"
[data]
expression = "expression.csv"
scale = "log2p1"
clinical = "clinical.csv"
[sites]
column = "hospital"
[holdout]
institutions = ["H"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_scenario_can_be_used_and_is_named_after_its_study(name: str):
    assert find(name).study.name == name


def test_demo_private_and_release_are_shipped():
    assert {"demo", "private", "release"} <= set(shipped())


def test_a_scenario_is_found_by_its_path(tmp_path: Path):
    path = written(tmp_path, MINIMAL)

    scenario = find(str(path))

    assert scenario == Scenario.load(path)
    assert scenario.study.name == "small"


def test_what_is_not_said_has_the_documented_default(tmp_path: Path):
    scenario = Scenario.load(written(tmp_path, MINIMAL))

    assert scenario.sites.minimum_patients == 20
    assert scenario.sites.small == "region"
    assert scenario.sites.share_cross_products
    assert scenario.reference.pooled
    assert scenario.run.workers == 2


def test_an_unknown_name_is_refused_with_the_names_there_are_and_the_nearest():
    expected = r'demo, private, release.*Did you mean "release"\?'
    with pytest.raises(ConfigError, match=expected):
        find("relaese")


def test_an_absent_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no such file"):
        find(str(tmp_path / "absent.toml"))


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not TOML"):
        Scenario.load(written(tmp_path, "[study"))


def test_everything_wrong_is_named_at_once(tmp_path: Path):
    text = (
        MINIMAL.replace('scale = "log2p1"', 'scale = "log2"')
        .replace('column = "hospital"', 'colum = "hospital"')
        .replace('["H"]', "[]")
    )

    with pytest.raises(ConfigError) as refused:
        Scenario.load(written(tmp_path, text))

    message = str(refused.value)
    for key in ("data.scale", "sites.colum:", "sites.column:", "holdout.institutions"):
        assert key in message


@pytest.mark.parametrize(
    ("found", "instead", "reason"),
    [
        ('["H"]', '["H", "H"]', "more than once"),
        ('"clinical.csv"', '"/data/clinical.csv"', "relative to the data folder"),
        (
            "[data]",
            "[study.public]\nstatistics = true\n[data]",
            r"name its institutions in \[public\]",
        ),
        (
            "[data]",
            '[public]\ninstitutions = ["P", "H"]\n[data]',
            "holdout and public both name H",
        ),
        (
            "[sites]",
            'cancer_type_from = "file"\n[data.columns]\ncancer_type = "type"\n[sites]',
            "cancer_type_from",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, found: str, instead: str, reason: str
):
    with pytest.raises(ConfigError, match=reason):
        Scenario.load(written(tmp_path, MINIMAL.replace(found, instead)))


def documented() -> dict[str, str]:
    """Return the default that docs/scenarios.md gives, by full name of the key."""
    defaults, sections = {}, []
    for line in DOCUMENTATION.read_text().splitlines():
        if line.startswith("#"):
            sections = re.findall(r"\[([a-z_.]+)\]", line)
        elif row := re.match(r"\| `(\w+)` \| ([^|]+) \|", line):
            key, default = row.groups()
            defaults |= {f"{section}.{key}": default for section in sections}
    return defaults


def section(kind: Any) -> type[BaseModel] | None:
    """Return the settings class of a section, which may be left out as a whole."""
    kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type)]
    return next((k for k in kinds if issubclass(k, BaseModel)), None)


def in_code(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Return the defaults of a settings class in the words of the documentation."""
    defaults = {}
    for name, field in model.model_fields.items():
        if (kind := section(field.annotation)) is not None:
            defaults |= in_code(kind, f"{prefix}{name}.")
        elif field.is_required():
            defaults[prefix + name] = "required"
        elif field.default is None:
            defaults[prefix + name] = "none"
        else:
            defaults[prefix + name] = f"`{json.dumps(field.default)}`"
    return defaults


def test_the_documentation_names_every_key_with_its_default():
    assert documented() == in_code(Scenario)
