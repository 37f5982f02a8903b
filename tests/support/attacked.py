"""Three hospitals for tests that attack a run: founded once, copied for each test."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict

from fedgex.client.identity import Identity
from fedgex.common import keys
from fedgex.common.canonical import canonical_json
from fedgex.common.study import Study
from fedgex.common.trust.receipt import reply_digest

from ..federation.conftest import write_hospitals
from .alliance import STUDY, Alliance, found, round_of

NAMES = FIRST, SECOND, THIRD = "hospital-01", "hospital-02", "hospital-03"


def short(n_rounds: int = 2, quorum: int = 2, **changes: Any) -> Study:
    """Return a study of pretraining only, without cross-products."""
    only: dict[str, Any] = {
        "pretraining": {"rounds": n_rounds},
        "classification": {"rounds": 0},
        "cross_products": False,
        "rounds": {"quorum": quorum},
    }
    return Study.read(STUDY | only | changes, "a test's study")


def alliance_in(folder: Path) -> Alliance:
    """Return a copy of the alliance, in a folder of its own."""
    shutil.copytree(_founded().folder, folder / "alliance")
    return Alliance(folder / "alliance", NAMES)


def on(
    site: str, number: int, change: Callable[[Message], None], kind: str = keys.TRAIN
) -> Callable[[str, Message], None]:
    """Return a hook that changes a site's message or reply of a round.

    Parameters
    ----------
    number
        Of the round; 0 in any.
    """

    def hook(name: str, message: Message) -> None:
        of_kind = message.metadata.message_type == kind
        if name == site and of_kind and number in (0, round_of(message.content)):
            change(message)

    return hook


def sign_again(alliance: Alliance, site: str, content: RecordDict) -> None:
    """Sign a changed reply with the site's own key, as a dishonest site would."""
    record = content.config_records[keys.PART]
    numbers = content.metric_records.get(keys.METRICS, {})
    changed = json.loads(str(record[keys.JSON])) | {
        "reply": reply_digest(content),
        "patients": numbers.get(keys.NUM_EXAMPLES, "suppressed"),
    }
    text = canonical_json(changed)
    record[keys.JSON] = text
    signer = Identity.load(alliance.state(site))
    record[keys.SIGNATURE] = signer.sign(text.encode())


@cache
def _founded() -> Alliance:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fedgex-attacked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    data = write_hospitals(folder / "data", n_sites=len(NAMES))
    return found(folder / "founded", data.sites, NAMES)
