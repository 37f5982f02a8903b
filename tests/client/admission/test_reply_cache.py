"""Stored replies: one answer to a question, and the same bytes ever after."""

import errno
import os
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedgex.client.admission.reply_cache import AnotherRequestError, Replies
from fedgex.common.errors import FedgexError


@pytest.fixture
def replies(tmp_path: Path) -> Replies:
    return Replies(tmp_path / "replies" / "run-1")


def reply(said: str) -> RecordDict:
    return RecordDict({"update": ConfigRecord({"said": said})})


def as_bytes(content: RecordDict | None) -> bytes:
    assert content is not None
    sent: bytes = recorddict_to_proto(content).SerializeToString(deterministic=True)
    return sent


def test_a_question_that_was_not_answered_has_no_reply(replies: Replies) -> None:
    assert replies.find("train-pretraining-00001", "a" * 64) is None


def test_the_same_request_finds_the_same_bytes(replies: Replies) -> None:
    replies.store("train-pretraining-00001", "a" * 64, reply("one"))

    found = replies.find("train-pretraining-00001", "a" * 64)

    assert as_bytes(found) == as_bytes(reply("one"))


def test_another_request_for_an_answered_question_is_refused(replies: Replies) -> None:
    replies.store("train-pretraining-00001", "a" * 64, reply("one"))

    with pytest.raises(AnotherRequestError, match="answered for request aaaa"):
        replies.find("train-pretraining-00001", "b" * 64)


def test_of_rounds_before_the_last_two_only_the_question_stays(
    replies: Replies,
) -> None:
    replies.store("train-classification-00001", "c" * 64, reply("of its own phase"))
    for number in range(1, 5):
        question = f"train-pretraining-{number:05d}"
        replies.store(question, str(number) * 64, reply("long " * 1000))

    for number in (1, 2):
        question = f"train-pretraining-{number:05d}"
        with pytest.raises(AnotherRequestError, match="no longer kept"):
            replies.find(question, str(number) * 64)
        with pytest.raises(AnotherRequestError, match="was answered for request"):
            replies.find(question, "f" * 64)
    for number in (3, 4):
        assert replies.find(f"train-pretraining-{number:05d}", str(number) * 64)
    assert replies.find("train-classification-00001", "c" * 64)
    size = sum(path.stat().st_size for path in replies.folder.glob("*pretraining*"))
    assert size < 2 * 5000 + 4 * 65 + 1000


def test_a_round_costs_the_same_however_many_were_before(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 10):
        replies.store(f"train-pretraining-{number:05d}", "a" * 64, reply("one"))
    renamed, honest = [], os.replace

    def replace(source: Path, target: Path) -> None:
        renamed.append(target.name)
        honest(source, target)

    monkeypatch.setattr(os, "replace", replace)
    replies.store("train-pretraining-00010", "a" * 64, reply("one"))

    assert renamed == ["train-pretraining-00010.reply", "train-pretraining-00008.reply"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_reply_that_cannot_be_stored_was_not_given(
    replies: Replies, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, call, fail)
        with pytest.raises(FedgexError, match="Free space"):
            replies.store("train-pretraining-00001", "a" * 64, reply("one"))

    assert not list(replies.folder.iterdir())
    replies.store("train-pretraining-00001", "b" * 64, reply("two"))
    assert replies.find("train-pretraining-00001", "b" * 64)
