"""What identifies a question: a coordinator that dresses one question up as another.

Sums are answered once a run. Were there a second name for the same question, it would
be computed again, over the patients of then.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedgex.common import keys
from fedgex.common.data.moments import Standardisation
from fedgex.common.study import Study
from fedgex.common.transport.records import PACKED, packed, to_arrays, to_record

from ..federation.conftest import Consortium, write_hospitals
from ..support import alliance as alliances
from ..support.alliance import STUDY, Alliance
from ..support.coordinator import Coordinator, Refused

SITE = "hospital-01"
ASKED = (keys.STATISTICS, keys.CROSS_PRODUCTS)
Dress = Callable[[RecordDict], object]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return write_hospitals(tmp_path_factory.mktemp("consortium") / "data")


@pytest.fixture(scope="module")
def alliance(data: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Alliance:
    folder = tmp_path_factory.mktemp("founded") / "alliance"
    alliance = alliances.found(folder, data.sites, data.names[:3])
    alliance.permit(SITE, share_cross_products=True)
    return alliance


@pytest.fixture(scope="module")
def coordinator(alliance: Alliance) -> Coordinator:
    study = Study.read(STUDY, "a test's study")
    return Coordinator(alliance, alliance.agree(study))


def add(record: str, **values: str | int) -> Dress:
    def dress(content: RecordDict) -> None:
        before = content.config_records.get(record, {})
        content[record] = ConfigRecord({**before, **values})

    return dress


def rescaled(change: Callable[[dict[str, np.ndarray]], object]) -> Dress:
    """Return what changes the arrays of the standardisation, if there is one."""

    def dress(content: RecordDict) -> None:
        record = content.array_records.get(keys.STANDARDISATION)
        arrays = {} if record is None else dict(to_arrays(record))
        change(arrays)
        content[keys.STANDARDISATION] = to_record(arrays)

    return dress


def narrowed(arrays: dict[str, np.ndarray]) -> None:
    arrays["mean"] = arrays["mean"].astype(np.float32) if "mean" in arrays else 0


def padded(content: RecordDict) -> None:
    """Write the same arrays in other bytes: a header filled up with more spaces."""
    sent = packed(content.array_records[keys.STANDARDISATION])
    (length,) = struct.unpack("<Q", sent[:8])
    header = sent[8 : 8 + length] + b" " * 64
    array = struct.pack("<Q", len(header)) + header + sent[8 + length :]
    piece = Array(dtype="uint8", shape=(len(array),), stype=PACKED, data=array)
    content[keys.STANDARDISATION] = ArrayRecord({PACKED: piece})


DRESSES: dict[str, Dress] = {
    "an attempt": add(keys.EXCHANGE, attempt=2, run="run-1"),
    "a round": add(keys.ROUND, phase="pretraining", number=2),
    "a key more": add(keys.VOCABULARY, number=2),
    "a key of the run": add(keys.RUN, number=2),
    "an unknown record": add("again", number=2),
    "another server": add(keys.SERVER, version="0.1.77"),
    "an array more": rescaled(lambda arrays: arrays.update(again=np.zeros(1))),
    "narrower numbers": rescaled(narrowed),
    "more spaces": padded,
}


def outcome(
    coordinator: Coordinator, kind: str, content: RecordDict
) -> dict[str, object] | str:
    """Return the answer, or the code of a refusal."""
    try:
        return dict(coordinator.send(SITE, kind, content))
    except Refused as refused:
        return str(refused)


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("dress", DRESSES)
def test_a_question_in_other_dress_is_not_computed_again(
    alliance: Alliance, coordinator: Coordinator, kind: str, dress: str
) -> None:
    run = f"run-{list(DRESSES).index(dress)}-{ASKED.index(kind)}"
    scale = Standardisation.identity(len(coordinator.vocabulary))
    fields = {"standardisation": scale} if kind == keys.CROSS_PRODUCTS else {}
    first = coordinator.ask(SITE, kind, run, **fields)
    computed = len(alliance.log(SITE, "asked"))

    content = coordinator.content(kind, run, **fields)
    if not fields and dress in ("narrower numbers", "more spaces"):
        return  # it has no arrays
    DRESSES[dress](content)
    answer = outcome(coordinator, kind, content)

    expected = "FX-RUN-002" if dress == "more spaces" else "FX-STUDY-006"
    assert answer == (dict(first) if dress == "another server" else expected)
    assert len(alliance.log(SITE, "asked")) == computed
