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
    with pytest.raises(ConfigError, match=r"study\.toml cannot be read: .*No such"):
        ServerSettings.load().read_study()


def test_a_study_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("name: pooled")

    with pytest.raises(ConfigError, match=r"study\.toml cannot be read"):
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
