import json
from pathlib import Path

import pytest

from fedgex.common.errors import ConfigError
from fedgex.server.settings import ServerSettings

PREFIX = "FEDGEX_SERVER_"


@pytest.fixture(autouse=True)
def complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set exactly what is needed."""
    for name in ("HOLDOUT", "START_DEADLINE_S", "POLL_S"):
        monkeypatch.delenv(PREFIX + name, raising=False)
    monkeypatch.setenv(PREFIX + "STUDY", str(tmp_path / "study.toml"))
    monkeypatch.setenv(PREFIX + "RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv(PREFIX + "N_SITES", "3")


def test_study_run_folder_and_number_of_sites_are_enough(tmp_path: Path) -> None:
    settings = ServerSettings.load()

    assert settings.study == tmp_path / "study.toml"
    assert settings.run_dir == tmp_path / "run"
    assert settings.n_sites == 3
    assert settings.holdout is None
    assert settings.start_deadline_s == 600
    assert settings.poll_s == 1


def test_all_missing_variables_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("STUDY", "RUN_DIR", "N_SITES"):
        monkeypatch.delenv(PREFIX + name)

    with pytest.raises(ConfigError) as caught:
        ServerSettings.load()

    assert str(caught.value).splitlines() == [
        "FEDGEX_SERVER_STUDY: Field required",
        "FEDGEX_SERVER_RUN_DIR: Field required",
        "FEDGEX_SERVER_N_SITES: Field required",
    ]


def test_unusable_and_missing_variables_are_named_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(PREFIX + "STUDY")
    monkeypatch.setenv(PREFIX + "N_SITES", "0")
    monkeypatch.setenv(PREFIX + "POLL_S", "often")

    with pytest.raises(ConfigError) as caught:
        ServerSettings.load()

    variables = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert variables == [PREFIX + name for name in ("STUDY", "N_SITES", "POLL_S")]


TOML = """
name = "pooled"
[pretraining]
rounds = 4
"""


def test_a_study_is_the_same_in_toml_and_in_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "study.toml").write_text(TOML)
    from_toml = ServerSettings.load().read_study()
    as_json = {"name": "pooled", "pretraining": {"rounds": 4}}
    (tmp_path / "study.json").write_text(json.dumps(as_json))
    monkeypatch.setenv(PREFIX + "STUDY", str(tmp_path / "study.json"))

    from_json = ServerSettings.load().read_study()

    assert from_toml.pretraining.rounds == 4
    assert from_json.hash == from_toml.hash


def test_a_study_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"study\.toml: cannot be read \(No such"):
        ServerSettings.load().read_study()


def test_a_study_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("name: pooled")

    with pytest.raises(ConfigError, match=r"study\.toml: is not TOML"):
        ServerSettings.load().read_study()


def test_everything_wrong_in_a_study_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        TOML.replace("rounds = 4", "rounds = -1\nepoch = 1") + "[rounds]\nquorum = 0\n"
    )

    with pytest.raises(ConfigError) as caught:
        ServerSettings.load().read_study()

    message = str(caught.value)
    assert "study.toml: pretraining.rounds: " in message
    assert "study.toml: pretraining.epoch: " in message
    assert "study.toml: rounds.quorum: " in message


def test_a_file_stands_for_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("STUDY", "RUN_DIR", "N_SITES"):
        monkeypatch.delenv(PREFIX + name)
    path = tmp_path / "settings.json"
    values = {"study": "s.json", "run_dir": "run", "n_sites": 4, "poll_s": 0.2}
    path.write_text(json.dumps(values))

    settings = ServerSettings.load(path)

    assert settings.job == "conduct"
    assert (settings.n_sites, settings.poll_s) == (4, 0.2)
    assert settings.run_dir == Path("run")


def test_between_hospitals_the_state_directory_says_where_everything_lies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("STUDY", "RUN_DIR", "N_SITES"):
        monkeypatch.delenv(PREFIX + name)
    path = tmp_path / "settings.json"
    values = {"state_dir": "state", "contract": "0" * 64, "run": "small-1"}
    path.write_text(json.dumps(values | {"holdout": None}))

    settings = ServerSettings.load(path)

    assert settings.run_dir == Path("state/runs/small-1")
    assert settings.study == Path("state/runs/small-1/study.json")
    assert settings.bundle == Path("state/releases/small-1.fedgex")
    assert settings.holdout is None


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"state_dir": "state"}, "contract, run"),
        ({"job": "publish", "run_dir": "x"}, "state_dir, contract"),
        ({"job": "deliver", "state_dir": "state", "contract": "0" * 64}, "run"),
    ],
)
def test_a_job_that_lacks_something_names_it(
    tmp_path: Path, values: dict[str, str], missing: str
) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(values))

    with pytest.raises(ConfigError) as caught:
        ServerSettings.load(path)

    assert f"{path}: settings: " in str(caught.value)
    assert str(caught.value).endswith(f"needs {missing}")


def test_a_key_that_there_is_not_is_named(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"pol_s": 1}')

    with pytest.raises(ConfigError, match=r"settings\.json: pol_s: "):
        ServerSettings.load(path)
