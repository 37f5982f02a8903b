"""A hospital's site.toml: what is required, and where paths start."""

from pathlib import Path

import pytest

from fedgex.client.settings import DataSettings, SiteSettings
from fedgex.common.errors import ConfigError
from fedgex.common.scale import Scale

ROOT = Path(__file__).parents[2]
MINIMAL = """\
name = "north"
minimum_cohort = 10
tasks = ["pretraining", "survival"]

[data]
expression = "expression.csv"
scale = "log2p1"
"""


def load(folder: Path, text: str) -> SiteSettings:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return SiteSettings.load(path)


def test_what_is_not_set_is_not_permitted(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL)

    assert settings.tasks == ("pretraining", "survival")
    assert settings.share_cross_products is False
    assert settings.data.scale == Scale.LOG2P1
    assert settings.data.clinical is None
    assert settings.data.columns.patient is None


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL + 'clinical = "../elsewhere/clinical.csv"\n')

    assert settings.state_dir == tmp_path / "state"
    assert settings.data.expression == tmp_path / "expression.csv"
    assert settings.data.clinical == tmp_path / "../elsewhere/clinical.csv"


def test_absolute_paths_stay(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL + 'hgnc_table = "/data/hgnc.txt"\n')

    assert settings.data.hgnc_table == Path("/data/hgnc.txt")


@pytest.mark.parametrize("key", ["name", "minimum_cohort", "tasks", "scale"])
def test_a_missing_key_refuses_and_is_named(tmp_path: Path, key: str) -> None:
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(key)]

    with pytest.raises(ConfigError, match=rf"site.toml: .*{key}: Field required"):
        load(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("minimum_cohort = 10", "minimum_cohort = 0", "minimum_cohort"),
        ('"survival"', '"imputation"', "tasks.1"),
        ('["pretraining", "survival"]', "[]", "tasks"),
        ('"north"', '"North Hospital"', "name"),
        ('"log2p1"', '"log2"', "data.scale"),
        ("[data]", "[data]\nexpresion = 'x'", "data.expresion"),
    ],
)
def test_an_unusable_value_refuses_and_is_named(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load(tmp_path, MINIMAL.replace(old, new))


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, 'name = "n"\n[data]\nscale = "log2"\n')

    for key in ("minimum_cohort", "tasks", "data.expression", "data.scale"):
        assert f"site.toml: {key}" in str(refusal.value)


def test_settings_are_frozen_and_equal_files_give_equal_settings(
    tmp_path: Path,
) -> None:
    settings = load(tmp_path, MINIMAL)

    assert hash(settings) == hash(load(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "south"  # type: ignore[misc]


def test_the_annotated_example_of_the_docs_is_complete_and_loads(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "hospital-data.md").read_text(encoding="utf-8")
    example = page.split("```toml\n")[1].split("```")[0]

    settings = load(tmp_path, example)

    assert settings.model_fields_set == set(SiteSettings.model_fields)
    assert settings.data.model_fields_set == set(DataSettings.model_fields)


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not TOML"):
        load(tmp_path, 'expression = "C:\\Users\\data.csv"')


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteSettings.load(tmp_path / "site.toml")


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + MINIMAL).name == "north"
