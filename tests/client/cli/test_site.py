"""`fedgex-site` init, join, pause, resume, check-connection: exit codes and texts."""

import json
import re
from pathlib import Path

import pytest

from fedgex.client.identity import Identity
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.trust import pinning, pki
from fedgex.common.trust.enrolment import SiteRequest

from .conftest import (
    SERVER,
    Authority,
    audit,
    init,
    site,
    write_kit,
)

# ---- init and join ----


def test_init_writes_settings_policy_keys_and_a_request(tmp_path: Path) -> None:
    result = init(tmp_path / "north")

    assert result.exit_code == 0
    settings = SiteSettings.load(tmp_path / "north/site.toml")
    assert (settings.name, settings.server) == ("north", SERVER)
    assert settings.policy == Policy.proposed()
    assert settings.policy.minimum_cohort == 10
    request = tmp_path / "north/state/request.json"
    assert result.stdout == SiteRequest.load(request).fingerprint + "\n"
    assert f"Send {request} to the administrator" in result.stderr


def test_init_again_changes_nothing_and_tells_the_same(folder: Path) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    result = init(folder)

    assert result.exit_code == 0
    request = SiteRequest.load(folder / "state/request.json")
    assert result.stdout == request.fingerprint + "\n"
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_init_keeps_a_policy_that_was_changed(folder: Path) -> None:
    path = folder / "policy.toml"
    path.write_text(path.read_text().replace("cohort = 10", "cohort = 25"))

    init(folder)

    assert SiteSettings.load(folder / "site.toml").policy.minimum_cohort == 25


def test_init_refuses_the_folder_of_another_hospital(folder: Path) -> None:
    result = init(folder, name="south")

    assert result.exit_code == 1
    assert result.stderr == (
        f'Error: {folder / "site.toml"} exists, for "north" at {SERVER}, and is kept; '
        f'expected "south" at {SERVER}. Change it by hand, or take another folder.\n'
    )


@pytest.mark.parametrize(
    ("name", "server"), [("North", SERVER), ('a"b', SERVER), ("north", "no-port")]
)
def test_init_with_an_unusable_name_or_server_is_wrong_usage(
    tmp_path: Path, name: str, server: str
) -> None:
    assert init(tmp_path / "north", name, server).exit_code == 2
    assert not (tmp_path / "north").exists()


def test_join_tells_what_to_compare(folder: Path, authority: Authority) -> None:
    result = site("join", folder / "site.toml", write_kit(folder, authority))

    assert result.exit_code == 0
    assert result.stdout.startswith(
        f"joined oncology as north, server {SERVER}, certificate until "
    )
    assert pki.fingerprint(authority[1]) in result.stderr


def test_join_refuses_with_one_line(folder: Path) -> None:
    result = site("join", folder / "site.toml", folder / "kit.json")

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {folder / 'kit.json'}: cannot be read (No such file or directory); "
        "expected the administrator's kit.\n"
    )


def test_join_names_the_administrators_whose_keys_are_kept(
    folder: Path, authority: Authority
) -> None:
    kit = write_kit(folder, authority)
    (key,) = json.loads(kit.read_text())["administrators"].values()

    result = site("join", folder / "site.toml", kit)

    assert f"contracts need 1 of ada {key[:16]}\n" in result.stdout
    assert f"ada {key}\n" in result.stderr


def test_other_administrators_are_joined_with_a_word_that_shows_both(
    site_toml: Path, authority: Authority
) -> None:
    kit = write_kit(site_toml.parent, authority)
    values = json.loads(kit.read_text())
    before = values["administrators"]["ada"][:16]
    kit.write_text(json.dumps(values | {"administrators": {"eve": "e" * 64}}))

    assert "Before: 1 of ada" in site("join", site_toml, kit).stderr
    result = site("join", site_toml, kit, "--administrators-changed")

    assert f"contracts needed 1 of ada {before}\n" in result.stdout
    assert f"contracts need 1 of eve {'e' * 16}\n" in result.stdout


def test_new_keys_serve_once_their_kit_is_joined(
    site_toml: Path, authority: Authority
) -> None:
    state = site_toml.parent / "state"
    held = Identity.load(state)

    result = site("rotate", site_toml)

    request = SiteRequest.load(state / "request.json")
    assert result.stdout == request.fingerprint + "\n"
    assert Identity.load(state).fingerprint == held.fingerprint
    assert "new keys wait for their kit" in site("rotate", site_toml).stderr
    kit = write_kit(site_toml.parent, authority)
    assert site("join", site_toml, kit).exit_code == 0
    now = Identity.load(state)
    assert pinning.replaced(now.certificate) == (held.fingerprint,)
    assert (state / f"identity.replaced-{held.fingerprint[:16]}").is_dir()
    assert not (state / "identity.next").exists()


def test_a_server_that_is_not_the_kits_is_refused(site_toml: Path) -> None:
    site_toml.write_text(site_toml.read_text().replace(SERVER, "elsewhere.example:1"))

    result = site("check-connection", site_toml)

    assert result.exit_code == 1
    assert f"the kit names the server {SERVER}" in result.stderr
    assert "site.toml names the server elsewhere" in site("status", site_toml).stdout


# ---- pause and resume ----


def test_pause_and_resume_are_told_and_logged(site_toml: Path) -> None:
    options = ("--by", "Dr. Curie", "--reason", "backup tonight")

    assert site("pause", site_toml, *options).stdout == "paused by Dr. Curie\n"
    paused = site("status", site_toml).stdout
    resumed = site("resume", site_toml, "--by", "Dr. Meitner")

    assert re.search("paused       by Dr. Curie since .*: backup tonight\n", paused)
    assert resumed.stdout == "resumed by Dr. Meitner\n"
    assert "paused       no\n" in site("status", site_toml).stdout
    assert audit(site_toml)[1:] == [("paused", "Dr. Curie"), ("resumed", "Dr. Meitner")]


def test_resuming_what_runs_is_refused(site_toml: Path) -> None:
    result = site("resume", site_toml, "--by", "Dr. Curie")

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: this hospital is not paused; there is nothing to do.\n"
    )


# ---- check-connection ----


def test_check_connection_to_nobody_exits_with_four(tmp_path: Path) -> None:
    init(tmp_path / "north", server="server.invalid:9092")

    result = site("check-connection", tmp_path / "north/site.toml", "--format", "json")

    steps = json.loads(result.stdout)
    assert result.exit_code == 4
    assert [step["state"] for step in steps] == ["failed"] + ["skipped"] * 6
    assert steps[0]["name"] == "name"
