"""Heads that stay at their site, one file a round."""

import errno
import os

import pytest
import torch
from torch import nn

from fedgex.client.state import KEPT_ROUNDS, latest_head, load_head, save_head
from fedgex.common.errors import CheckpointError, FedgexError, UpdateError


def head(value: float = 0.0) -> dict[str, nn.Module]:
    linear = nn.Linear(2, 1)
    nn.init.constant_(linear.weight, value)
    return {"survival.head": linear}


def value(modules: dict[str, nn.Module]) -> float:
    (linear,) = modules.values()
    assert isinstance(linear, nn.Linear)
    return linear.weight[0, 0].item()


def loaded(folder, number: int) -> float:
    found = head(-1)
    load_head(found, folder, "survival", number)
    return value(found)


def test_a_head_comes_back_bit_by_bit(tmp_path):
    kept, found = nn.Linear(2, 1), nn.Linear(2, 1)

    save_head({"survival.head": kept}, tmp_path / "new", "survival", 1)
    load_head({"survival.head": found}, tmp_path / "new", "survival", 1)

    assert torch.equal(found.weight, kept.weight)
    assert torch.equal(found.bias, kept.bias)


def test_the_head_of_the_round_asked_for_is_loaded_not_a_later_one(tmp_path):
    for number in (9, 10, 11):
        save_head(head(number), tmp_path, "survival", number)

    assert [loaded(tmp_path, number) for number in (9, 10, 11)] == [9, 10, 11]


def test_a_site_that_was_away_goes_on_from_its_last_head(tmp_path):
    save_head(head(3), tmp_path, "survival", 3)

    assert loaded(tmp_path, 7) == 3


def test_a_site_that_never_took_part_keeps_the_head_it_was_built_with(tmp_path):
    assert loaded(tmp_path / "absent", 4) == -1
    save_head(head(5), tmp_path, "survival", 5)
    assert loaded(tmp_path, 4) == -1


def test_a_repeated_round_replaces_its_head(tmp_path):
    save_head(head(1), tmp_path, "survival", 2)
    save_head(head(8), tmp_path, "survival", 2)

    assert loaded(tmp_path, 2) == 8
    assert len(list(tmp_path.iterdir())) == 1


def test_a_head_that_cannot_be_written_leaves_the_one_that_was_there(
    tmp_path, monkeypatch
):
    save_head(head(1), tmp_path, "survival", 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(FedgexError, match=r"head-00002.* No space left on device"):
            save_head(head(8), tmp_path, "survival", 2)

    assert loaded(tmp_path, 2) == 1
    assert len(list(tmp_path.iterdir())) == 1
    save_head(head(8), tmp_path, "survival", 2)
    assert loaded(tmp_path, 2) == 8


def test_only_the_operator_may_read_a_head(tmp_path):
    save_head(head(), tmp_path, "survival", 1)

    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_old_rounds_are_deleted(tmp_path):
    for number in range(1, 8):
        save_head(head(number), tmp_path, "survival", number)

    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"survival-head-0000{n}.safetensors" for n in (5, 6, 7)]
    assert len(kept) == KEPT_ROUNDS


def test_the_heads_of_two_phases_do_not_meet(tmp_path):
    save_head(head(1), tmp_path, "survival", 1)
    save_head(head(2), tmp_path, "classification", 1)

    assert loaded(tmp_path, 1) == 1


def test_a_shared_head_leaves_no_trace(tmp_path):
    save_head({}, tmp_path / "state", "survival", 1)
    load_head({}, tmp_path / "state", "survival", 1)

    assert not (tmp_path / "state").exists()


def test_the_latest_head_is_that_of_the_last_round(tmp_path):
    for number in (9, 10):
        save_head(head(number), tmp_path, "survival", number)

    found = head()
    latest_head(found, tmp_path, "survival")

    assert value(found) == 10


def test_no_head_at_all_is_an_error_that_says_why(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no survival head.*did not take"):
        latest_head(head(), tmp_path, "survival")


def test_a_head_of_another_size_is_refused(tmp_path):
    save_head(head(), tmp_path, "survival", 1)

    with pytest.raises(UpdateError, match=r"survival.head.weight has shape \(1, 2\)"):
        load_head({"survival.head": nn.Linear(3, 1)}, tmp_path, "survival", 1)
