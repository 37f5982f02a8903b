"""What we change of Flower's SuperNode."""

from __future__ import annotations

import errno
import os
from functools import partial

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import InMemoryNodeState, NodeStateFactory

from fedgex.client.service import flower, supernode
from fedgex.client.service.supernode import NODE_FILE

RUN = 7


@pytest.fixture
def message(monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN)
    content = RecordDict({"question": ConfigRecord({"number": 1})})
    made = Message(content, dst_node_id=RUN, message_type="train")
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def ended(*given):
    raise RunNotRunningException


@pytest.mark.parametrize("step", ["pull_object", "confirm_message_received"])
def test_a_message_whose_run_ends_while_it_is_fetched_is_forgotten(
    monkeypatch, message, step
):
    fetch = "_pull_and_store_message"
    monkeypatch.setattr(
        start_client_internal, fetch, vars(start_client_internal)[fetch]
    )
    arrived = []
    flower.note_messages(lambda: arrived.append(RUN))
    stores = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=stores).state()
    state.store_run(Run.create_empty(RUN))
    nested = get_all_nested_objects(message)
    objects = {digest: each.deflate() for digest, each in nested.items()}
    calls = {
        "pull_object": lambda run, digest: objects[digest],
        "confirm_message_received": lambda run, digest: None,
    }
    fetched = start_client_internal._pull_and_store_message(
        state=state,
        object_store=stores.store(),
        node_config={},
        receive=lambda: (message, get_object_tree(message)),
        get_run=None,
        get_fab=None,
        trusted_entities=None,
        **calls | {step: ended},
    )
    assert fetched is None
    assert arrived == []
    assert state.get_messages_legacy() == []
    assert [task.status.status for task in state.get_tasks()] == ["finished"]


@pytest.mark.parametrize("broken", ["send", "push_object"])
def test_an_upload_that_tls_breaks_off_is_tried_again(monkeypatch, message, broken):
    push = "_push_messages"
    monkeypatch.setattr(start_client_internal, push, vars(start_client_internal)[push])
    monkeypatch.setattr(flower, "UPLOAD_PAUSES_S", (0.0,))
    flower.upload_again()
    stores = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=stores).state()
    state.store_run(Run.create_empty(RUN))
    reply = Message(RecordDict({"answer": ConfigRecord({"x": 2})}), reply_to=message)
    start_client_internal._insert_message(reply, state, stores.store())
    breaks, sent = [broken], {}

    def on_the_way(step):
        if step in breaks:
            breaks.remove(step)
            raise httpx.WriteError("[SSL: SSLV3_ALERT_BAD_RECORD_MAC]")

    def send(message, tree, seconds):
        on_the_way("send")
        return set(get_all_nested_objects(reply)), "session"

    def push_object(run, session, digest, content):
        on_the_way("push_object")
        sent[digest] = content

    start_client_internal._push_messages(
        state=state,
        object_store=stores.store(),
        send=send,
        push_object=push_object,
    )

    assert breaks == []
    assert sent == {d: o.deflate() for d, o in get_all_nested_objects(reply).items()}


def test_a_node_number_that_a_full_disk_cut_off_does_not_stop_the_next_start(tmp_path):
    (tmp_path / NODE_FILE).write_text("")

    supernode._sign_off(tmp_path, "nowhere:1", b"", None)


def test_a_full_disk_costs_the_nodes_number_and_not_the_node(
    tmp_path, monkeypatch, caplog
):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(InMemoryNodeState, "set_node_id", lambda state, node: None)
    flower.note_number(partial(supernode.write_number, tmp_path))
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.set_node_id(RUN)
    before = (tmp_path / NODE_FILE).read_text()

    monkeypatch.setattr(os, "fsync", fail)
    state.set_node_id(RUN + 1)

    assert (tmp_path / NODE_FILE).read_text() == before
    assert "Free space" in caplog.text
