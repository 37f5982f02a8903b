"""A hospital, or the coordinator in its name, refuses with a text of its choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedgex.common import keys
from fedgex.common.trust.receipt import REASON, Part

from ..support.attacked import FIRST, SECOND, alliance_in, on, short, sign_again

ANSI = "\x1b[2J\x1b[31mall is well\n"


def refuse_with(code: str) -> Any:
    def change(reply: Message) -> None:
        part = reply.content[keys.PART]
        refusal = ConfigRecord({"code": code})
        reply.content = RecordDict({keys.REFUSAL: refusal, keys.PART: part})

    return change


@pytest.mark.parametrize(
    "code", [ANSI * 800_000, "FX-DATA-999", "FX-RUN-002\n", ANSI], ids=len
)
def test_a_refusal_with_a_text_for_a_code_reaches_no_other_hospital(
    code: str, tmp_path: Path
) -> None:
    """17 MB of it made each receipt so large that the model could not be released."""
    alliance = alliance_in(tmp_path)

    def attack(reply: Message) -> None:
        refuse_with(code)(reply)
        sign_again(alliance, FIRST, reply.content)

    alliance.conduct(alliance.agree(short()), after=on_reply(FIRST, attack))

    for state, reason in alliance.states(FIRST):
        assert state == "quarantined"
        assert reason is not None
        assert len(reason) <= REASON
        assert reason.isprintable()
    for path in alliance.folder.rglob("receipts/*/*.json"):
        assert path.stat().st_size < 100_000
        assert "\\u001b" not in path.read_text()
    journal = (alliance.run_dir / "journal.jsonl").read_text()
    assert len(journal) < 100_000
    assert "\\u001b" not in journal


def test_a_refusal_is_signed_and_stands_in_the_receipt_with_its_signature(
    tmp_path: Path,
) -> None:
    alliance = alliance_in(tmp_path)
    contract = alliance.agree(short())

    def withdraw(message: Message) -> None:
        alliance.approvals(FIRST).decide(contract, "withdrawn", by="Dr. N.", reason="-")

    alliance.conduct(contract, before=on(FIRST, 2, withdraw))

    entry = alliance.receipts()[-1].sites[FIRST]
    assert (entry.state, entry.reason) == ("refused", "FX-STUDY-003")
    assert entry.part is not None
    part = Part.from_json(entry.part, "the part")
    (line,) = alliance.log(FIRST, "refused")
    assert (part.reply, part.head.hash) == (line["reply"], line["hash"])


def test_a_refusal_that_the_hospital_did_not_sign_is_not_taken_for_its_word(
    tmp_path: Path,
) -> None:
    alliance = alliance_in(tmp_path)

    def attack(reply: Message) -> None:
        refusal = ConfigRecord({"code": "FX-STUDY-003"})
        reply.content = RecordDict({keys.REFUSAL: refusal})

    def alter(reply: Message) -> None:
        refuse_with("FX-STUDY-003")(reply)

    alliance.conduct(
        alliance.agree(short(quorum=1)),
        after=lambda site, reply: (
            on_reply(FIRST, attack)(site, reply),
            on_reply(SECOND, alter)(site, reply),
        ),
    )

    unsigned, signed_for_another = alliance.states(FIRST)[0], alliance.states(SECOND)[0]
    assert unsigned[0] == signed_for_another[0] == "quarantined"
    assert "the refusal FX-STUDY-003 is not signed" in str(unsigned[1])
    assert "signed for reply" in str(signed_for_another[1])


def test_a_log_that_was_cut_is_not_taken_for_whole_because_its_refusal_is_signed(
    tmp_path: Path,
) -> None:
    alliance = alliance_in(tmp_path)
    log = alliance.state(FIRST) / "audit.jsonl"
    kept: list[bytes] = []

    def cut(message: Message) -> None:
        kept.append(log.read_bytes())
        log.write_bytes(b"".join(kept[0].splitlines(keepends=True)[:3]))

    alliance.conduct(alliance.agree(short(3)), before=on(FIRST, 2, cut))

    assert alliance.states(FIRST)[1:] == [("refused", "FX-RUN-003")] * 2


def on_reply(site: str, change: Any) -> Any:
    """Return a hook that changes a site's replies to training."""

    def hook(name: str, reply: Message) -> None:
        if name == site and reply.metadata.message_type == keys.TRAIN:
            change(reply)

    return hook
