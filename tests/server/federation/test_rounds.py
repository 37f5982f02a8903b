import errno
import logging
import math
from collections.abc import Callable, Iterable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedgex.common import keys
from fedgex.common.arrays import Arrays
from fedgex.common.errors import FederationError, FedgexError
from fedgex.common.messages.requests import ReleaseRequest
from fedgex.common.study import RoundRule, Study
from fedgex.common.transport.records import packed, to_record
from fedgex.server.federation.participants import (
    Channel,
    Request,
    Simulated,
    SiteOutcome,
)
from fedgex.server.federation.rounds import RoundOutcome, Site, train_round
from fedgex.server.journal import Journal

EXPECTED = {"bias": (2,), "weight": (2, 3)}
NAMES = ("h1", "h2", "h3")
GOOD_METRICS: dict[str, float] = {
    keys.NUM_EXAMPLES: 40,
    keys.NUM_LOSS_TERMS: 280,
    "train-loss": 0.5,
    keys.PRE_TRAINING_LOSS: 0.75,
    "seconds": 2.5,
}

Reply = RecordDict | Error | None
"""What a node answers: content, an error from Flower, or nothing at all."""


class FakeGrid:
    """Delivers what each node is to answer; node numbers are 1, 2, 3 for NAMES."""

    def __init__(self, replies: dict[int, Reply], deaf: frozenset[int]) -> None:
        self.replies = replies
        self.deaf = deaf
        self.sent: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self.deaf:
                ids.append(f"message-{len(self.sent)}")
                self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        pulled = []
        for message_id in message_ids:
            message = self.sent[message_id]
            reply = self.replies.pop(message.metadata.dst_node_id, None)
            if reply is not None:
                pulled.append(Message(reply, reply_to=message))
        return pulled


@pytest.fixture(autouse=True)
def _flower_knows_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def good_arrays() -> dict[str, NDArray[np.generic]]:
    return {
        "bias": np.array([1, 2], dtype=np.float32),
        "weight": np.ones((2, 3), dtype=np.float32),
    }


def reply(arrays: Arrays | None = None, **metrics: Any) -> RecordDict:
    """Return an acceptable reply, but for what is given; None drops a metric."""
    numbers = GOOD_METRICS | {k.replace("_", "-"): v for k, v in metrics.items()}
    return RecordDict(
        {
            keys.UPDATE: to_record(good_arrays() if arrays is None else arrays),
            keys.METRICS: MetricRecord(
                {k: v for k, v in numbers.items() if v is not None}
            ),
        }
    )


def refusal(code: str) -> RecordDict:
    return RecordDict({keys.REFUSAL: ConfigRecord({"code": code})})


def without(record: str) -> RecordDict:
    content = reply()
    del content[record]
    return content


def changed(name: str, array: NDArray[np.generic]) -> RecordDict:
    return reply(good_arrays() | {name: array})


def sending(pack: bytes, name: str = "safetensors") -> RecordDict:
    """Return a reply that is acceptable but for the bytes of its update."""
    content = reply()
    array = Array("uint8", (len(pack),), "safetensors", pack)
    content[keys.UPDATE] = ArrayRecord({name: array})
    return content


def pack(header: bytes, numbers: bytes) -> bytes:
    padded = header + b" " * (-len(header) % 8)
    return len(padded).to_bytes(8, "little") + padded + numbers


def beside() -> RecordDict:
    content = reply()
    content.array_records[keys.UPDATE]["bias"] = Array(np.ones(2, np.float32))
    return content


GOOD_PACK = packed(to_record(good_arrays()))


def archive() -> bytes:
    file = BytesIO()
    np.savez(file, bias=good_arrays()["bias"])
    return file.getvalue()


def holding(value: float) -> NDArray[np.float32]:
    weight = np.ones((2, 3), dtype=np.float32)
    weight[1, 2] = value
    return weight


def site_privacy(clip: float) -> dict[str, Any]:
    return {
        "privacy": {"site": {"noise_multiplier": 1, "clip": clip, "delta": 1e-3}},
        "public": {"statistics": True},
        "strategy": {
            "name": "fedavg",
            "weights": "equal",
            "update": "delta",
            "per_gene": False,
        },
    }


Run = Callable[..., RoundOutcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a round of NAMES whose nodes all answer well, but for what is given."""

    def run(
        *,
        deaf: frozenset[int] = frozenset(),
        floor: int = 10,
        weighted_by: str | None = keys.NUM_EXAMPLES,
        update: str = "parameters",
        absent: dict[str, SiteOutcome] | None = None,
        clip: float | None = None,
        **replies: Reply,
    ) -> RoundOutcome:
        rule = cast(RoundRule, replies.pop("rule", RoundRule(deadline_s=0.05)))
        answers: dict[int, Reply] = {
            i: replies.get(name, reply()) for i, name in enumerate(NAMES, start=1)
        }
        nodes = {name: i for i, name in enumerate(NAMES, start=1)}
        study = Study.model_validate(
            {
                "name": "small",
                "minimum_cohort": floor,
                "strategy": {
                    "name": "fedavg",
                    "weights": "patients" if weighted_by else "equal",
                    "update": update,
                },
                "rounds": rule.model_dump(),
            }
            | ({} if clip is None else site_privacy(clip))
        )
        channel = Channel(
            grid=cast(Grid, FakeGrid(answers, deaf)),
            participants=Simulated(study=study, n_sites=3, by_name=nodes),
            journal=Journal(tmp_path / "journal.jsonl"),
            poll_s=0.01,
        )
        return train_round(
            channel,
            [
                Site(name=name, measured=np.array([True, i > 1, False]), n_patients=100)
                for name, i in nodes.items()
            ],
            Request(
                type=keys.TRAIN,
                message=lambda: ReleaseRequest(bundle=to_record(good_arrays())),
                group="pretraining-1",
                phase="pretraining",
                round=1,
            ),
            {k: np.zeros(shape, np.float32) for k, shape in EXPECTED.items()},
            study,
            absent={} if absent is None else absent,
            spool_dir=tmp_path,
        )

    return run


def test_every_good_update_is_taken_with_its_numbers(run: Run) -> None:
    outcome = run(h3=reply(num_examples=70, num_loss_terms=5))

    assert [update.site for update in outcome.updates] == ["h1", "h2", "h3"]
    assert [update.num_examples for update in outcome.updates] == [40, 40, 70]
    assert [update.num_loss_terms for update in outcome.updates] == [280, 280, 5]
    assert outcome.updates[0].measured.tolist() == [True, False, False]
    assert outcome.updates[1].measured.tolist() == [True, True, False]
    assert outcome.updates[2].arrays["bias"].tolist() == [1.0, 2.0]
    assert outcome.sites["h3"].to_json() == {
        "state": "contributed",
        "reason": None,
        "num_examples": 70,
        "num_loss_terms": 5,
        "train_loss": 0.5,
        "judged_loss": 0.75,
        "seconds": 2.5,
    }


def withholding(*names: str) -> RecordDict:
    """Return an acceptable reply of a site whose policy keeps some metrics back."""
    content = reply(**{name.replace("-", "_"): None for name in names})
    content[keys.WITHHELD] = ConfigRecord({keys.METRICS: list(names)})
    return content


def test_a_withheld_number_is_none_and_never_nought(run: Run) -> None:
    outcome = run(h2=withholding("train-loss", "seconds"))

    assert outcome.sites["h2"].to_json() == {
        "state": "contributed",
        "reason": None,
        "num_examples": 40,
        "num_loss_terms": 280,
        "train_loss": None,
        "judged_loss": 0.75,
        "seconds": None,
    }


def test_patients_may_be_withheld_where_updates_are_weighted_otherwise(
    run: Run,
) -> None:
    outcome = run(
        weighted_by=None, h2=withholding(keys.NUM_EXAMPLES, keys.NUM_LOSS_TERMS)
    )

    assert outcome.updates[1].num_examples is None
    assert outcome.updates[1].num_loss_terms is None
    assert outcome.sites["h2"].to_json()["num_examples"] is None


def test_nobody_withholds_the_number_that_weighs_its_update(run: Run) -> None:
    outcome = run(
        weighted_by=keys.NUM_EXAMPLES,
        h2=withholding(keys.NUM_EXAMPLES, keys.NUM_LOSS_TERMS),
    )

    assert outcome.sites["h2"].state == "quarantined"
    assert (
        outcome.sites["h2"].reason
        == '"num-examples" is withheld, and updates are weighted by it'
    )


def test_half_precision_is_as_good_as_single(run: Run) -> None:
    halves = {k: v.astype(np.float16) for k, v in good_arrays().items()}

    outcome = run(h2=reply(halves))

    assert outcome.sites["h2"].state == "contributed"


CANNOT_BE_AGGREGATED: dict[str, tuple[RecordDict, str]] = {
    "NaN": (changed("weight", holding(np.nan)), "weight holds NaN or infinity"),
    "infinity": (changed("weight", holding(-np.inf)), "weight holds NaN or infinity"),
    "an extra name": (changed("gate", np.ones(1, np.float32)), "gate is not asked for"),
    "a missing name": (reply({"bias": good_arrays()["bias"]}), "weight is missing"),
    "another name": (
        reply({"bias": good_arrays()["bias"], "Weight": np.ones((2, 3), np.float32)}),
        "weight is missing; Weight is not asked for",
    ),
    "another shape": (
        changed("weight", np.ones((3, 2), np.float32)),
        "weight has shape (3, 2), expected (2, 3)",
    ),
    "integers": (
        changed("bias", np.array([1, 2])),
        "bias is of type int64, expected floating point",
    ),
    "everything at once": (
        reply({"bias": np.array([np.nan, 0], np.float32), "weight": np.ones(4)}),
        "bias holds NaN or infinity; weight has shape (4,), expected (2, 3)",
    ),
    "a torn pack": (sending(GOOD_PACK[:-1]), "the arrays cannot be read"),
    "an empty pack": (sending(b""), "the arrays cannot be read"),
    "an archive for a pack": (sending(archive()), "the arrays cannot be read"),
    "a pack without arrays": (reply({}), "bias is missing; weight is missing"),
    "a pack under another name": (
        sending(GOOD_PACK, "pack"),
        'the arrays are not packed as "safetensors"',
    ),
    "an array beside the pack": (
        beside(),
        'the arrays are not packed as "safetensors"',
    ),
    "no pack": (
        RecordDict({**reply(), keys.UPDATE: ArrayRecord()}),
        'the arrays are not packed as "safetensors"',
    ),
    "a number format that NumPy lacks": (
        sending(
            pack(
                b'{"bias":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
                b'"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]}}',
                bytes(28),
            )
        ),
        "bias cannot be read",
    ),
    "another shape beside that format": (
        sending(
            pack(
                b'{"bias":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
                b'"weight":{"dtype":"F32","shape":[3,2],"data_offsets":[4,28]}}',
                bytes(28),
            )
        ),
        "bias cannot be read; weight has shape (3, 2), expected (2, 3)",
    ),
    "complex numbers": (
        changed("bias", np.ones(2, np.complex64)),
        "bias is of type complex64, expected floating point",
    ),
    "no arrays": (without(keys.UPDATE), 'the reply has no "update"'),
    "no metrics": (without(keys.METRICS), '"metrics": it is missing'),
    "another record": (
        RecordDict({**reply(), "more": ConfigRecord({"a": 1})}),
        "it holds 'more', which is not asked for",
    ),
    "another metric": (
        reply(median_age=63),
        "\"metrics\": it holds 'median-age', which is not asked for",
    ),
    "no number of patients": (
        reply(num_examples=None),
        "'num-examples' is missing and not withheld",
    ),
    "no loss": (reply(train_loss=None), "'train-loss' is missing and not withheld"),
    "a loss that is not a number": (
        reply(train_loss=float("nan")),
        '"metrics": train-loss: Input should be a finite number',
    ),
    "an infinite number of patients": (
        reply(num_examples=float("inf")),
        '"metrics": num-examples: Input should be a valid integer',
    ),
    "a negative number of loss terms": (
        reply(num_loss_terms=-1),
        '"metrics": num-loss-terms: Input should be greater than or equal to 0',
    ),
    "several numbers for one": (
        reply(num_examples=[40, 40]),
        '"metrics": num-examples: Input should be a valid integer',
    ),
    "too few patients": (reply(num_examples=9), "trained on fewer than 10 patients"),
}


@pytest.mark.parametrize(
    ("content", "reason"),
    CANNOT_BE_AGGREGATED.values(),
    ids=CANNOT_BE_AGGREGATED.keys(),
)
def test_a_reply_that_cannot_be_aggregated_is_quarantined_and_says_why(
    run: Run,
    content: RecordDict,
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="fedgex"):
        outcome = run(h2=content)

    assert outcome.sites["h2"].to_json() == {"state": "quarantined", "reason": reason}
    assert [update.site for update in outcome.updates] == ["h1", "h3"]
    assert not (tmp_path / "h2.safetensors").exists()
    [warning] = caplog.messages
    assert warning == f"pretraining-1 site=h2 state=quarantined {reason}"


def test_exactly_the_floor_is_enough_patients(run: Run) -> None:
    outcome = run(h2=reply(num_examples=10), floor=10)

    assert outcome.sites["h2"].state == "contributed"


def test_a_site_that_refuses_is_named_with_its_code(run: Run) -> None:
    outcome = run(h1=refusal("FX-SITE-003"))

    assert outcome.sites["h1"].to_json() == {
        "state": "refused",
        "reason": "FX-SITE-003",
    }
    assert [update.site for update in outcome.updates] == ["h2", "h3"]


def test_an_error_of_flower_fails_its_site_alone(run: Run) -> None:
    outcome = run(h3=Error(code=3, reason="client app crashed"))

    assert outcome.sites["h3"].state == "failed"
    assert outcome.sites["h3"].reason == "Flower error 3: client app crashed"
    assert [update.site for update in outcome.updates] == ["h1", "h2"]


def test_a_site_that_does_not_answer_in_time_is_late(run: Run) -> None:
    outcome = run(h2=None)

    assert outcome.sites["h2"].to_json() == {
        "state": "late",
        "reason": "no answer in 0.05 s",
    }
    assert [update.site for update in outcome.updates] == ["h1", "h3"]


def test_a_node_that_takes_no_message_has_failed(run: Run) -> None:
    outcome = run(deaf=frozenset({1}))

    assert outcome.sites["h1"].state == "failed"
    assert outcome.sites["h1"].reason == "message not accepted"
    assert [update.site for update in outcome.updates] == ["h2", "h3"]


def test_fewer_updates_than_the_quorum_are_no_round_and_everybody_missing_is_named(
    run: Run,
) -> None:
    with pytest.raises(FederationError) as caught:
        run(h1=changed("weight", holding(np.nan)), h3=refusal("FX-SITE-003"))

    message = str(caught.value)
    assert "pretraining-1: 1 of 3 sites contributed, the quorum is 2." in message
    assert "h1: quarantined (weight holds NaN or infinity)" in message
    assert "h3: refused (FX-SITE-003)" in message
    assert "h2" not in message
    assert "mandatory" not in message


def test_exactly_the_quorum_makes_a_round(run: Run) -> None:
    outcome = run(h3=None, rule=RoundRule(quorum=2, deadline_s=0.05))

    assert len(outcome.updates) == 2


def test_no_round_counts_without_a_mandatory_site(run: Run) -> None:
    rule: Any = RoundRule(quorum=1, mandatory_sites=("h1", "h2"), deadline_s=0.05)

    with pytest.raises(FederationError) as caught:
        run(h2=None, rule=rule)

    assert "and mandatory ['h2'] did not" in str(caught.value)
    assert "h2: late (no answer in 0.05 s)" in str(caught.value)


def test_a_mandatory_site_that_was_never_there_is_named(run: Run) -> None:
    rule: Any = RoundRule(quorum=1, mandatory_sites=("absent",), deadline_s=0.05)

    with pytest.raises(FederationError, match=r"mandatory \['absent'\] did not"):
        run(rule=rule)


def test_the_bytes_of_arrays_are_counted_both_ways(run: Run) -> None:
    # Length of the header, the header in whole eights of bytes, the numbers.
    header = (
        '{"bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        '"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}'
    )
    n_bytes = 8 + 8 * math.ceil(len(header) / 8) + (2 + 6) * 4

    outcome = run()

    assert outcome.bytes_down == 3 * (n_bytes + len(version("fedgex")))
    assert outcome.bytes_up == 3 * n_bytes


def times(factor: float) -> Arrays:
    return {name: (factor * a).astype(np.float32) for name, a in good_arrays().items()}


@pytest.mark.parametrize("kind", ["parameters", "delta"])
def test_an_update_with_a_norm_far_beyond_the_others_is_quarantined(
    run: Run, kind: str
) -> None:
    # The model began with zeros: the norm of the others is sqrt(1 + 4 + 6 * 1).
    outcome = run(h2=reply(times(10.01)), update=kind)

    assert outcome.sites["h2"].to_json() == {
        "state": "quarantined",
        "reason": "its change of the model has norm 33.2, more than 10 times the "
        "others' median of 3.32",
    }
    assert [update.site for update in outcome.updates] == ["h1", "h3"]


def test_just_under_ten_times_the_others_norm_is_taken(run: Run) -> None:
    assert len(run(h2=reply(times(9.99))).updates) == 3


def test_the_ratio_of_norms_is_the_studys(run: Run) -> None:
    rule: Any = RoundRule(deadline_s=0.05, max_norm_ratio=2)

    outcome = run(h2=reply(times(2.1)), rule=rule)

    assert outcome.sites["h2"].state == "quarantined"


def test_two_updates_are_too_few_to_call_one_of_them_large(run: Run) -> None:
    outcome = run(h1=refusal("FX-SITE-003"), h2=reply(times(1e6)))

    assert [update.site for update in outcome.updates] == ["h2", "h3"]


def test_the_quorum_counts_after_norms_were_compared(run: Run) -> None:
    rule: Any = RoundRule(quorum=3, deadline_s=0.05)

    with pytest.raises(FederationError, match="2 of 3 sites contributed") as caught:
        run(h2=reply(times(1e30)), rule=rule)

    assert "h2: quarantined (its change of the model has norm" in str(caught.value)


def test_a_site_that_was_not_asked_stands_among_the_others_with_its_reason(
    run: Run,
) -> None:
    gone = SiteOutcome(state="refused", reason="FX-STUDY-002")

    outcome = run(absent={"h0": gone})

    assert outcome.sites["h0"] == gone
    assert list(outcome.sites) == ["h0", "h1", "h2", "h3"]


def of_norm(norm: float) -> RecordDict:
    weight = np.zeros((2, 3), np.float32)
    weight[0, 0] = norm
    return reply({"bias": np.zeros(2, np.float32), "weight": weight})


def test_a_change_longer_than_the_clip_by_more_than_rounding_is_quarantined(
    run: Run,
) -> None:
    outcome = run(clip=2.0, h1=of_norm(2.001), h2=of_norm(2.01), h3=of_norm(0.5))

    assert [update.site for update in outcome.updates] == ["h1", "h3"]
    assert "more than the 2 of privacy.site.clip" in str(outcome.sites["h2"].reason)


def test_under_site_level_privacy_no_site_decides_whether_another_counts(
    run: Run,
) -> None:
    outcome = run(clip=2.0, h1=of_norm(2), h2=of_norm(1e-3), h3=of_norm(1e-3))

    assert [update.site for update in outcome.updates] == ["h1", "h2", "h3"]


def test_an_update_that_finds_no_room_on_the_disk_ends_the_round_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = Path.open

    def fail(path: Path, *args: Any, **named: Any) -> Any:
        if path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return really_open(path, *args, **named)

    monkeypatch.setattr(Path, "open", fail)

    with pytest.raises(FedgexError, match=r"h1\.safetensors.*Free space on that disk"):
        run()
