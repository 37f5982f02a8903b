"""What the guard before the SuperLink writes down."""

import errno
import json
import os
from pathlib import Path

import pytest

from fedgex.server.service.superlink import Activity


def node_of(key: bytes) -> int:
    """Return a number for every key, as Flower's state does."""
    return 7


def test_what_moved_on_a_full_disk_is_told_once_there_is_room(tmp_path, monkeypatch):
    def fail(*args, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    activity = Activity(tmp_path / "activity.json")
    activity.moved(b"key")
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            activity.write(node_of)

    activity.write(node_of)

    assert json.loads(activity.path.read_text())["7"]["moved"] > 0


def test_nothing_is_written_while_nothing_changes(tmp_path):
    activity = Activity(tmp_path / "activity.json")

    activity.write(node_of)

    assert not activity.path.exists()
