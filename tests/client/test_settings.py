"""A hospital's site.toml: what is required, and where paths start."""

from pathlib import Path

import pytest

from fedgex.client.policy import TEMPLATE, Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.data.scales import Scale
from fedgex.common.errors import ConfigError
from fedgex.common.ingestion.settings import DataSettings

ROOT = Path(__file__).parents[2]
MINIMAL = """\
name = "north"

[data]
expression = "expression.csv"
scale = "log2p1"
"""


def load(folder: Path, text: str, policy: str = TEMPLATE) -> SiteSettings:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    path.with_name("policy.toml").write_text(policy, encoding="utf-8")
    return SiteSettings.load(path)


def test_what_may_be_left_out_is_nothing(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL)

    assert settings.policy == Policy.proposed()
    assert settings.proxy is None
    assert settings.server_authority is None
    assert settings.health_port == settings.metrics_port == 0
    assert settings.data.scale == Scale.LOG2P1
    assert settings.data.clinical is None
    assert settings.data.opt_outs is None
    assert settings.data.columns.patient is None


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        'server_authority = "ca.pem"\n'
        + MINIMAL
        + 'clinical = "../elsewhere/clinical.csv"\nopt_outs = "opt-outs.txt"\n',
    )

    assert settings.state_dir == tmp_path / "state"
    assert settings.server_authority == tmp_path / "ca.pem"
    assert settings.data.expression == tmp_path / "expression.csv"
    assert settings.data.clinical == tmp_path / "../elsewhere/clinical.csv"
    assert settings.data.opt_outs == tmp_path / "opt-outs.txt"


def test_absolute_paths_stay(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL + 'hgnc_table = "/data/hgnc.txt"\n')

    assert settings.data.hgnc_table == Path("/data/hgnc.txt")


@pytest.mark.parametrize("key", ["name", "scale"])
def test_a_missing_key_refuses_and_is_named(tmp_path: Path, key: str) -> None:
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(key)]

    with pytest.raises(ConfigError, match=rf"site.toml: .*{key}: Field required"):
        load(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"north"', '"North Hospital"', "name"),
        ('"log2p1"', '"log2"', "data.scale"),
        ("[data]", "[data]\nexpresion = 'x'", "data.expresion"),
        ("\n\n", "\nproxy = 'proxy.example'\n", "proxy"),
        ("\n\n", "\nproxy = 'http://me:secret@proxy.example:3128'\n", "proxy"),
        ("\n\n", "\nhealth_port = 65536\n", "health_port"),
    ],
)
def test_an_unusable_value_refuses_and_is_named(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    assert old in MINIMAL
    with pytest.raises(ConfigError, match=f"site.toml: {named}"):
        load(tmp_path, MINIMAL.replace(old, new))


@pytest.mark.parametrize(
    "proxy",
    ["http://proxy.example:3128", "https://10.0.0.1:443", "http://[fd00::1]:3128"],
)
def test_a_proxy_is_named_by_scheme_host_and_port(tmp_path: Path, proxy: str) -> None:
    assert load(tmp_path, f'proxy = "{proxy}"\n' + MINIMAL).proxy == proxy


@pytest.mark.parametrize(
    "line", ["minimum_cohort = 10", 'tasks = ["survival"]', "policy = 3"]
)
def test_what_belongs_into_the_policy_is_refused_elsewhere(
    tmp_path: Path, line: str
) -> None:
    key = line.split()[0]

    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, f"{line}\n{MINIMAL}")

    assert str(refusal.value) == (
        f"site.toml: {key} cannot be set here; what the hospital permits stands in its "
        "folder's policy.toml. Move it."
    )


def test_everything_wrong_in_both_files_is_named_at_once(tmp_path: Path) -> None:
    policy = TEMPLATE.replace("threads = 1", "threads = 0")

    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, 'name = "n"\n[data]\nscale = "log2"\n', policy)

    for named in (
        "site.toml: data.expression",
        "site.toml: data.scale",
        "policy.toml: threads",
    ):
        assert named in str(refusal.value)


def test_without_a_policy_nothing_is_permitted(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(MINIMAL)

    with pytest.raises(ConfigError, match=r"policy\.toml: is not there"):
        SiteSettings.load(path)


def test_settings_are_frozen_and_equal_files_give_equal_settings(
    tmp_path: Path,
) -> None:
    settings = load(tmp_path, MINIMAL)

    assert hash(settings) == hash(load(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "south"  # type: ignore[misc]


def test_the_annotated_examples_of_the_docs_are_complete_and_load(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "hospital-data.md").read_text(encoding="utf-8")
    site, policy = (part.split("```")[0] for part in page.split("```toml\n")[1:])

    settings = load(tmp_path, site, policy)

    assert settings.model_fields_set == set(SiteSettings.model_fields)
    assert settings.data.model_fields_set == set(DataSettings.model_fields)
    assert policy == TEMPLATE


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not TOML"):
        load(tmp_path, 'expression = "C:\\Users\\data.csv"')


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteSettings.load(tmp_path / "site.toml")


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + MINIMAL).name == "north"


def test_every_path_of_the_data_starts_at_its_folder() -> None:
    """A new one too: nobody has to name it."""
    paths = {
        name: Path(name)
        for name, field in DataSettings.model_fields.items()
        if "Path" in str(field.annotation)
    }
    assert {"expression", "sample_sheet", "platform_table", "opt_outs"} <= set(paths)

    found = DataSettings(scale=Scale.LOG2P1, **paths).anchored(Path("/srv"))

    assert all(getattr(found, name) == Path("/srv") / name for name in paths)
