"""The coordinator forges, withholds or doubles receipts; hospitals look at their own.

Each hospital holds what it was sent, with the coordinator's true signature: the attacks
are made with the keys that a coordinator has, that of the authority among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from typer.testing import CliRunner, Result

from fedgex.client.cli import app as command
from fedgex.common import keys
from fedgex.common.errors import TrustError
from fedgex.common.messages.replies import read_part
from fedgex.common.transport.records import to_arrays, to_record
from fedgex.common.trust import pki
from fedgex.common.trust.receipt import NO_RECEIPT, Part, Receipt, SitePart
from fedgex.common.trust.signed import Signed, sign
from fedgex.server.consortium.participants import Deployment
from fedgex.server.federation.participants import Request, SignedReply

from ..support.alliance import RUN, Alliance, code, round_of
from ..support.attacked import FIRST, NAMES, SECOND, alliance_in, on, short

Change = Callable[[Receipt], SitePart]
ROUNDS = 3


def log(*words: object) -> Result:
    return CliRunner().invoke(command, ["log", *map(str, words)])


def verified(alliance: Alliance, name: str = FIRST) -> Result:
    return log("verify", alliance.site_toml(name))


class Forger:
    """A coordinator that sends one hospital another chain of receipts, signed by it."""

    def __init__(self, alliance: Alliance, change: Change) -> None:
        self.alliance, self.change = alliance, change
        self.made: dict[int, Signed] = {}

    def __call__(self, site: str, message: Message) -> None:
        record = message.content.config_records.get(keys.RECEIPT, {})
        if site != FIRST or not record.get(keys.JSON):
            return
        true = Receipt.read_signed(Signed.from_json(str(record[keys.JSON]), "true"))
        if true.index not in self.made:
            before = self.made.get(true.index - 1)
            forged = {
                "sites": true.sites | {FIRST: self.change(true)},
                "previous": NO_RECEIPT if before is None else before.hash,
            }
            self.made[true.index] = Signed(
                true.model_copy(update=forged).to_json()
            ).signed_by(
                self.alliance.consortium.coordinator_key,
                self.alliance.consortium.coordinator,
            )
        record[keys.JSON] = self.made[true.index].to_json()


def another_part(alliance: Alliance, **changes: Any) -> Change:
    """Forge a part of the hospital under a second certificate of the authority."""
    consortium, key = alliance.consortium, pki.new_key()
    authority = pki.load_key(consortium.folder / "pki" / "authority.key")
    request = pki.request(key, FIRST, "site")
    second = pki.issue(
        authority, consortium.authority, request, name=FIRST, role="site", days=30
    )

    def change(true: Receipt) -> SitePart:
        genuine = true.sites[FIRST]
        part = Part.from_json(str(genuine.part), "the genuine part")
        forged = part.model_copy(update=changes)
        text = forged.to_json()
        return genuine.model_copy(
            update={
                "part": text,
                "signature": sign(key, text.encode()),
                "certificate": pki.to_pem(second),
                "update": forged.reply,
                "patients": forged.patients,
            }
        )

    return change


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Alliance:
    """Return the alliance after an honest run; nothing in it is changed."""
    alliance = alliance_in(tmp_path_factory.mktemp("ran"))
    alliance.conduct(alliance.agree(short(ROUNDS)))
    return alliance


def test_after_an_honest_run_every_hospitals_receipts_hold_and_are_the_same(
    ran: Alliance, tmp_path: Path
) -> None:
    for name in NAMES:
        result = verified(ran, name)
        assert result.exit_code == 0, result.output
        assert f"it holds what {ROUNDS - 1} receipts say of it" in result.stdout
    assert log("export", ran.site_toml(FIRST), tmp_path / "first.json").exit_code == 0

    result = log("compare", ran.site_toml(SECOND), tmp_path / "first.json")

    assert result.exit_code == 0
    assert (
        result.stdout == f"ok: {ROUNDS - 1} receipts are the same at both hospitals\n"
    )


@pytest.mark.parametrize(
    ("forged", "found"),
    [
        ({"reply": "a" * 64, "patients": 9999}, "patients 9999, the log says [0-9]+"),
        ({"reply": "a" * 64}, "reply a{64}, the log says"),
        ({"patients": 9999}, "patients 9999, the log says [0-9]+"),
        ({}, "key [0-9a-f]{16}, which this hospital never had"),
    ],
    ids=["both", "reply", "patients", "key only"],
)
def test_a_part_forged_with_the_authoritys_key_is_found_by_its_hospital(
    forged: dict[str, Any], found: str, tmp_path: Path
) -> None:
    alliance = alliance_in(tmp_path)
    forger = Forger(alliance, another_part(alliance, **forged))
    alliance.conduct(alliance.agree(short(ROUNDS)), before=forger)
    assert alliance.outcome.events("run-finished")

    result = verified(alliance)

    assert result.exit_code == 1
    assert "which this hospital never had" in result.stderr
    assert re.search(found, result.stderr)


def test_a_hospital_struck_out_as_late_finds_that_it_answered(tmp_path: Path) -> None:
    alliance = alliance_in(tmp_path)
    late = SitePart(state="late", reason="no answer in 3600 s")
    forger = Forger(alliance, lambda true: late)
    alliance.conduct(alliance.agree(short(ROUNDS)), before=forger)

    result = verified(alliance)

    assert result.exit_code == 5
    for number in range(1, ROUNDS):
        assert (
            f"Not counted: {RUN}, pretraining {number}: we answered, and "
            f"receipts/{RUN}/{number:05d}.json says late of us (no answer in 3600 s)"
        ) in result.stderr


def test_receipts_of_two_versions_are_found_by_comparing_hospitals(
    tmp_path: Path,
) -> None:
    alliance = alliance_in(tmp_path)
    late = SitePart(state="late", reason="no answer in 3600 s")
    alliance.conduct(
        alliance.agree(short(ROUNDS)), before=Forger(alliance, lambda true: late)
    )
    log("export", alliance.site_toml(SECOND), tmp_path / "second.json")

    result = log("compare", alliance.site_toml(FIRST), tmp_path / "second.json")

    assert result.exit_code == 6
    assert f"Equivocation: receipt 1 of {RUN} is " in result.stderr
    assert "the coordinator signed both" in result.stderr


def test_two_halves_of_a_chain_must_follow_each_other(tmp_path: Path) -> None:
    alliance = alliance_in(tmp_path)
    late = SitePart(state="late", reason="no answer in 3600 s")
    alliance.conduct(
        alliance.agree(short(ROUNDS)), before=Forger(alliance, lambda true: late)
    )
    for name, index in ((FIRST, 1), (SECOND, 2)):
        (alliance.state(name) / "receipts" / RUN / f"{index:05d}.json").unlink()
    log("export", alliance.site_toml(SECOND), tmp_path / "second.json")

    result = log("compare", alliance.site_toml(FIRST), tmp_path / "second.json")

    assert result.exit_code == 6
    assert "do not follow each other" in result.stderr


def test_what_another_exports_must_bear_the_coordinators_signature(
    ran: Alliance, tmp_path: Path
) -> None:
    log("export", ran.site_toml(SECOND), tmp_path / "second.json")
    text = (tmp_path / "second.json").read_text()
    (tmp_path / "second.json").write_text(text.replace("contributed", "contribute_", 1))

    result = log("compare", ran.site_toml(FIRST), tmp_path / "second.json")

    assert result.exit_code == 1


def strip(path: Path) -> None:
    signed = Signed.from_json(path.read_text(), path.name)
    path.write_text(Signed(signed.content).to_json())


def swap(path: Path) -> None:
    path.write_text(path.with_name("00002.json").read_text())


@pytest.mark.parametrize(
    ("do", "found"),
    [
        (strip, "bears no signature; expected the coordinator's"),
        (Path.unlink, "is missing, and the log says that it came"),
        (swap, f"it is receipt 2 of {RUN}"),
        (lambda path: path.write_text("{}"), "is no signed document"),
    ],
    ids=["no signature", "gap", "swapped", "torn"],
)
def test_a_receipt_that_was_changed_or_removed_is_found(
    do: Callable[[Path], Any], found: str, tmp_path: Path
) -> None:
    alliance = alliance_in(tmp_path)
    alliance.conduct(alliance.agree(short(ROUNDS)))
    do(alliance.state(FIRST) / "receipts" / RUN / "00001.json")

    result = verified(alliance)

    assert result.exit_code == 1
    assert f"receipts/{RUN}/00001.json" in result.stderr
    assert found in result.stderr


def test_every_finding_is_listed_not_only_the_first(tmp_path: Path) -> None:
    alliance = alliance_in(tmp_path)
    alliance.conduct(alliance.agree(short(ROUNDS)))
    folder = alliance.state(FIRST) / "receipts" / RUN
    strip(folder / "00001.json")
    strip(folder / "00002.json")

    assert verified(alliance).stderr.count("bears no signature") == 2


def test_an_outage_of_a_hospital_is_listed_and_is_no_forgery(tmp_path: Path) -> None:
    """It was not asked in a round, so it did not get the receipt of the one before."""
    alliance = alliance_in(tmp_path)
    alliance.conduct(
        alliance.agree(short(4, rounds={"quorum": 2, "deadline_s": 0.3})),
        silent=lambda site, message: site == FIRST and round_of(message.content) == 2,
    )
    held = sorted((alliance.state(FIRST) / "receipts" / RUN).iterdir())
    assert [path.stem for path in held] == ["00002", "00003"]

    result = verified(alliance)

    assert result.exit_code == 5
    assert "Error" not in result.stderr
    (line,) = (x for x in result.stderr.splitlines() if x.startswith("Not counted"))
    assert f"{RUN}, pretraining 1: we answered, the run went on" in line


def test_a_coordinator_that_stops_sending_receipts_is_not_answered(
    tmp_path: Path,
) -> None:
    alliance = alliance_in(tmp_path)

    def withhold(message: Message) -> None:
        message.content.config_records[keys.RECEIPT][keys.JSON] = ""

    alliance.conduct(alliance.agree(short(ROUNDS)), before=on(FIRST, 3, withhold))

    assert alliance.states(FIRST)[-1] == ("refused", "FX-RUN-007")


def test_answers_of_which_no_receipt_ever_came_are_listed(tmp_path: Path) -> None:
    alliance = alliance_in(tmp_path)

    def withhold(message: Message) -> None:
        message.content.config_records[keys.RECEIPT][keys.JSON] = ""

    alliance.conduct(alliance.agree(short(ROUNDS)), before=on(FIRST, 0, withhold))

    result = verified(alliance)

    assert result.exit_code == 5
    assert f"{RUN}, pretraining 1: we answered, the run went on" in result.stderr


# ---- other models to other hospitals ----


def another_model(message: Message) -> None:
    arrays = to_arrays(message.content.array_records[keys.MODEL])
    name = min(arrays)
    moved = {name: np.asarray(arrays[name] + np.float32(1), np.float32)}
    message.content[keys.MODEL] = to_record(arrays | moved)


@pytest.fixture
def knows_what_it_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the coordinator expect of each site what it sent to that site."""
    honest = Deployment.verify

    def verify(
        self: Deployment, site: str, request: Request, asked: str, reply: RecordDict
    ) -> SignedReply | None:
        part = read_part(reply)
        if part is not None:
            asked = Part.from_json(part.json_, "the part").request
        return honest(self, site, request, asked, reply)

    monkeypatch.setattr(Deployment, "verify", verify)


def test_a_model_that_the_last_receipt_did_not_announce_is_refused(
    tmp_path: Path,
) -> None:
    alliance = alliance_in(tmp_path)

    alliance.conduct(alliance.agree(short(ROUNDS)), before=on(FIRST, 2, another_model))

    assert alliance.log(FIRST, "refused")[-1]["code"] == "FX-RUN-007"
    assert not [x for x in alliance.log(FIRST, "asked") if x["round"] == 2]


def test_a_first_model_that_others_were_not_sent_is_found_with_the_receipt(
    tmp_path: Path, knows_what_it_sent: None
) -> None:
    """No receipt announces the first; the one after it names what all were sent."""
    alliance = alliance_in(tmp_path)
    replies: list[Message] = []
    alliance.conduct(
        alliance.agree(short(ROUNDS)),
        before=on(FIRST, 1, another_model),
        after=lambda site, reply: replies.append(reply) if site == FIRST else None,
    )

    assert [code(reply.content) for reply in replies][-1] == "FX-RUN-007"
    result = verified(alliance)
    assert result.exit_code == 1
    assert "its sites were sent different requests" in result.stderr


def test_a_receipt_with_parts_about_different_requests_does_not_hold(
    tmp_path: Path, knows_what_it_sent: None
) -> None:
    alliance = alliance_in(tmp_path)
    alliance.conduct(
        alliance.agree(short(ROUNDS)), before=on(FIRST, ROUNDS, _another_scale)
    )

    with pytest.raises(TrustError, match="its sites were sent different requests"):
        alliance.receipts()


def _another_scale(message: Message) -> None:
    arrays = to_arrays(message.content.array_records[keys.STANDARDISATION])
    changed = {"mean": arrays["mean"] + np.float64(1e-6)}
    message.content[keys.STANDARDISATION] = to_record(arrays | changed)
