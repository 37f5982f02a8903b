"""A run that was killed goes on from its last checkpoint, and ends in the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedgex.common.errors import CheckpointError, FederationError
from fedgex.server.journal import Journal

if TYPE_CHECKING:
    from .conftest import Consortium, Finished

SITES = 4


class Cut(BaseException):
    """Ends the server between two statements."""


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(0, id="before the first round"),
        pytest.param(2, id="within the first round"),
        pytest.param(1 * SITES, id="after the first round"),
        pytest.param(2 * SITES, id="between two phases"),
        pytest.param(3 * SITES + 3, id="within a later phase"),
        pytest.param(5 * SITES, id="before the last round"),
    ],
)
def test_a_run_killed_and_conducted_again_ends_in_the_same_bits(
    consortium: Consortium, finished: Finished, tmp_path: Path, messages: int
) -> None:
    killed = consortium.conduct(consortium.study(), tmp_path, kill_after=messages)
    assert killed.rounds == finished.rounds[: messages // SITES]
    assert not killed.events("run-finished")

    resumed = consortium.conduct(consortium.study(), tmp_path)

    assert resumed.digest == finished.digest
    assert resumed.rounds == finished.rounds
    assert len(resumed.events("run-finished")) == 1


def test_what_the_servers_optimiser_remembers_survives_the_kill(
    consortium: Consortium, tmp_path: Path
) -> None:
    only_pretraining: dict[str, Any] = {
        "strategy": {"name": "fedadam"},
        "pretraining": {"rounds": 3},
        "classification": {"rounds": 0},
        "survival": {"rounds": 0},
    }
    study = consortium.study(**only_pretraining)
    whole = consortium.conduct(study, tmp_path / "whole")

    consortium.conduct(study, tmp_path / "killed", kill_after=2 * SITES)
    resumed = consortium.conduct(study, tmp_path / "killed")

    assert resumed.digest == whole.digest


def test_a_kill_between_checkpoint_and_journal_leaves_each_round_in_it_once(
    consortium: Consortium,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = Journal.write

    def cut_at_round_2(journal: Journal, event: str, **fields: Any) -> None:
        if event == "round" and fields["round"] == 2:
            raise Cut
        write(journal, event, **fields)

    monkeypatch.setattr(Journal, "write", cut_at_round_2)
    with pytest.raises(Cut):
        consortium.conduct(consortium.study(), tmp_path)
    monkeypatch.undo()

    resumed = consortium.conduct(consortium.study(), tmp_path)

    assert resumed.rounds == finished.rounds
    assert resumed.digest == finished.digest
    caught_up, undisturbed = resumed.events("round")[1], finished.events("round")[1]
    assert caught_up["seconds"] is None
    assert caught_up["holdout"] == undisturbed["holdout"]
    assert caught_up["train_loss"] == undisturbed["train_loss"]


def test_a_kill_before_the_last_line_of_all_trains_nothing_again(
    consortium: Consortium,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = Journal.write

    def cut_at_the_end(journal: Journal, event: str, **fields: Any) -> None:
        if event == "run-finished":
            raise Cut
        write(journal, event, **fields)

    monkeypatch.setattr(Journal, "write", cut_at_the_end)
    with pytest.raises(Cut):
        consortium.conduct(consortium.study(), tmp_path)
    monkeypatch.undo()

    resumed = consortium.conduct(consortium.study(), tmp_path)

    assert {exchange.message_type for exchange in resumed.exchanges} == {
        "query.prepare"
    }
    assert resumed.rounds == finished.rounds
    assert len(resumed.events("run-finished")) == 1


def test_a_run_that_missed_its_quorum_goes_on_once_the_sites_are_back(
    consortium: Consortium, finished: Finished, tmp_path: Path
) -> None:
    study = consortium.study(rounds={"quorum": SITES})
    sites = tmp_path / "sites"
    shutil.copytree(consortium.sites, sites)
    settings = sites / consortium.names[0] / "policy.toml"
    permitted = settings.read_text()
    settings.write_text(permitted.replace(', "survival"]', "]"))
    run_dir = tmp_path / "run"

    with pytest.raises(FederationError, match="survival-1: 3 of 4 sites contributed"):
        consortium.conduct(study, run_dir, sites=sites)
    settings.write_text(permitted)
    resumed = consortium.conduct(study, run_dir, sites=sites)

    (failed,) = resumed.events("run-failed")
    assert f"{consortium.names[0]}: refused (FX-SITE-002)" in failed["reason"]
    assert resumed.rounds == finished.rounds
    # The quorum has no part in the numbers, so they are those of the other study.
    assert resumed.digest == finished.digest


def test_another_study_in_the_same_folder_is_refused(
    consortium: Consortium, tmp_path: Path
) -> None:
    killed = consortium.conduct(consortium.study(), tmp_path, kill_after=SITES)
    before = killed.digest
    other = consortium.study(seed=2)

    with pytest.raises(CheckpointError, match=f"this is {other.hash[:12]}"):
        consortium.conduct(other, tmp_path)

    assert killed.digest == before
    assert killed.rounds == [("pretraining", 1)]
