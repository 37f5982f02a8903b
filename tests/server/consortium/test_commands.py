import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import commands, members
from fedgex.server.consortium.store import Consortium

CONTRACT = "c" * 64


def pending(consortium: Consortium) -> list[Path]:
    return sorted((consortium.folder / "orders" / "pending").iterdir())


def forged(admitted: Any, signer: str, **changed: object) -> Path:
    """Put an order into the folder as its files stand, signed by `signer`."""
    values = {
        "kind": "stop",
        "token": "t1",
        "subject": "small",
        "administrator": "ada",
        "at": datetime.now(UTC).isoformat(),
        "run": "",
        "model": "",
    } | changed
    _, certificate = admitted.consortium.administrator(admitted.key(signer))
    signed = Signed(json.dumps(values)).signed_by(admitted.key(signer), certificate)
    path: Path = admitted.folder / "orders" / "pending" / "t1.json"
    path.write_text(signed.to_json())
    return path


def refusal(consortium: Consortium, token: str = "t1") -> str:
    assert list(commands.take(consortium)) == []
    assert pending(consortium) == []
    outcome = commands.outcome(consortium, token)
    assert outcome is not None
    assert outcome.state == "refused"
    return outcome.reason


def test_an_order_is_taken_as_it_was_given(admitted: Any) -> None:
    given = commands.submit(admitted.consortium, "stop", "small", admitted.key("ada"))

    (taken,) = commands.take(admitted.consortium)

    assert taken == given
    assert (taken.kind, taken.subject, taken.administrator) == ("stop", "small", "ada")


def test_orders_are_taken_in_the_order_in_which_they_were_given(admitted: Any) -> None:
    key = admitted.key("ada")
    tokens = ["z", "m", "a"]
    for token in tokens:
        commands.submit(admitted.consortium, "stop", "small", key, token=token)

    assert [order.token for order in commands.take(admitted.consortium)] == tokens


def test_an_order_comes_again_until_it_is_finished_and_then_never(
    admitted: Any,
) -> None:
    commands.submit(admitted.consortium, "stop", "small", admitted.key("ada"))

    (first,) = commands.take(admitted.consortium)
    (second,) = commands.take(admitted.consortium)
    commands.finish(admitted.consortium, second)
    commands.finish(admitted.consortium, second)

    assert first == second
    assert list(commands.take(admitted.consortium)) == []
    outcome = commands.outcome(admitted.consortium, first.token)
    assert outcome is not None
    assert outcome.state == "accepted"
    events = audit_log.read(admitted.folder / "audit.jsonl")
    assert [e["event"] for e in events].count("order-accepted") == 1


def test_the_same_launch_twice_is_one_order(admitted: Any) -> None:
    consortium, key = admitted.consortium, admitted.key("ada")

    first = commands.launch(consortium, CONTRACT, "small", key, token="t1")
    again = commands.launch(consortium, CONTRACT, "small", key, token="t1")
    by_other = commands.launch(
        consortium, CONTRACT, "small", admitted.key("bo"), token="t1"
    )

    assert first == again == by_other
    assert len(pending(consortium)) == 1


def test_the_same_launch_after_it_was_carried_out_is_still_that_one(
    admitted: Any,
) -> None:
    consortium, key = admitted.consortium, admitted.key("ada")
    first = commands.launch(consortium, CONTRACT, "small", key)
    commands.finish(consortium, first)

    assert commands.launch(consortium, CONTRACT, "small", key) == first
    assert pending(consortium) == []


def test_a_token_cannot_mean_two_things(admitted: Any) -> None:
    consortium, key = admitted.consortium, admitted.key("ada")
    commands.launch(consortium, CONTRACT, "small", key, token="t1")

    with pytest.raises(ConfigError, match="for another order"):
        commands.launch(consortium, "d" * 64, "other", key, token="t1")


def test_a_runs_name_cannot_mean_two_runs(admitted: Any) -> None:
    consortium, key = admitted.consortium, admitted.key("ada")
    commands.launch(consortium, CONTRACT, "small", key, token="t1")

    with pytest.raises(ConfigError, match=r'a run "small" already.*token t1'):
        commands.launch(consortium, CONTRACT, "small", key, token="t2")


def test_a_refused_launch_needs_another_token_and_says_why(admitted: Any) -> None:
    consortium, key = admitted.consortium, admitted.key("ada")
    order = commands.launch(consortium, CONTRACT, "small", key, token="t1")
    commands.finish(consortium, order, refused="the contract expired.")

    with pytest.raises(ConfigError, match=r"refused: the contract expired\."):
        commands.launch(consortium, CONTRACT, "small", key, token="t1")
    assert commands.launch(consortium, CONTRACT, "small", key, token="t2").token == "t2"


@pytest.mark.parametrize("token", ["", "../x", "a/b", "a" * 129, ".t"])
def test_a_token_that_cannot_name_a_file_is_refused(admitted: Any, token: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        commands.submit(
            admitted.consortium,
            "stop",
            "small",
            admitted.key("ada"),
            token=token or " ",
        )


def test_a_stranger_cannot_give_orders(admitted: Any) -> None:
    with pytest.raises(TrustError, match="is no administrator's of alliance"):
        commands.submit(admitted.consortium, "stop", "small", pki.new_key())
    assert pending(admitted.consortium) == []


def test_a_hospitals_signature_is_no_administrators(admitted: Any) -> None:
    path = forged(admitted, "ada")
    site = pki.from_pem(admitted.consortium.sites()["north"].certificate)
    content = Signed.from_json(path.read_text(), "test").content
    signed = Signed(content).signed_by(admitted.sites["north"], site)
    path.write_text(signed.to_json())

    assert "expected one for the role administrator" in refusal(admitted.consortium)


def test_one_changed_byte_of_an_order_is_found(admitted: Any) -> None:
    path = forged(admitted, "ada")
    path.write_text(path.read_text().replace("small", "smalk"))

    assert "does not fit the content" in refusal(admitted.consortium)


def test_an_order_under_anothers_name_is_refused(admitted: Any) -> None:
    forged(admitted, "bo", administrator="ada")

    assert 'is of "ada" and signed by bo' in refusal(admitted.consortium)


def test_an_order_without_any_signature_is_refused(admitted: Any) -> None:
    path = forged(admitted, "ada")
    signed = Signed.from_json(path.read_text(), "test")
    path.write_text(Signed(signed.content).to_json())

    assert "signed by nobody" in refusal(admitted.consortium)


def test_an_order_of_another_consortium_is_refused(
    admitted: Any, tmp_path: Path
) -> None:
    other = Consortium.init(tmp_path / "other", admitted.consortium.settings)
    request, asked = members.new_administrator("ada", tmp_path / "twin")
    members.add_administrator(other, request, asked.fingerprint)
    key = pki.load_key(tmp_path / "twin" / "ada.key")
    commands.submit(other, "stop", "small", key, token="t1")
    (source,) = pending(other)
    (admitted.folder / "orders" / "pending" / "t1.json").write_bytes(
        source.read_bytes()
    )

    assert "was not issued by this consortium's authority" in refusal(
        admitted.consortium
    )


def test_an_order_of_an_administrator_revoked_meanwhile_is_refused(
    admitted: Any,
) -> None:
    forged(admitted, "ada")
    members.revoke_administrator(admitted.consortium, "ada", "left")

    assert "was revoked" in refusal(admitted.consortium)


def test_an_order_under_an_expired_certificate_is_refused(
    admitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(admitted, "ada")
    now = datetime.now(UTC).replace(microsecond=0)
    later = now.replace(year=now.year + 2, day=1)
    monkeypatch.setattr(pki, "now", lambda: later)

    assert "expired on" in refusal(admitted.consortium)


def test_a_done_order_that_is_put_back_is_not_carried_out_again(admitted: Any) -> None:
    path = forged(admitted, "ada")
    copy = path.read_bytes()
    (order,) = commands.take(admitted.consortium)
    commands.finish(admitted.consortium, order)

    path.write_bytes(copy)

    assert list(commands.take(admitted.consortium)) == []
    assert pending(admitted.consortium) == []


def test_a_done_order_under_another_name_is_not_carried_out_again(
    admitted: Any,
) -> None:
    path = forged(admitted, "ada")
    copy = path.read_bytes()
    (order,) = commands.take(admitted.consortium)
    commands.finish(admitted.consortium, order)

    path.with_name("t2.json").write_bytes(copy)

    assert "lies under the name t2" in refusal(admitted.consortium, "t2")


@pytest.mark.parametrize("text", ["", "{}", "\x00\xff", '{"content": 1}'])
def test_a_file_that_is_no_order_is_refused(admitted: Any, text: str) -> None:
    path = admitted.folder / "orders" / "pending" / "t1.json"
    path.write_bytes(text.encode("latin-1"))

    assert "is no signed document" in refusal(admitted.consortium)


def test_an_order_of_an_unknown_kind_is_refused(admitted: Any) -> None:
    forged(admitted, "ada", kind="delete-everything")

    assert "cannot be read" in refusal(admitted.consortium)


def test_a_refused_order_stands_in_the_audit_log_with_its_reason(admitted: Any) -> None:
    forged(admitted, "bo", administrator="ada")
    list(commands.take(admitted.consortium))

    last = audit_log.read(admitted.folder / "audit.jsonl")[-1]
    assert (last["event"], last["token"]) == ("order-refused", "t1")
    assert "signed by bo" in last["reason"]


def test_a_release_counts_distinct_administrators_for_exactly_one_model(
    admitted: Any,
) -> None:
    consortium = admitted.consortium
    for name, model in (("ada", "m1"), ("ada", "m1"), ("bo", "m2")):
        key = admitted.key(name)
        commands.submit(consortium, "release", "small", key, model=model)

    assert commands.approvals(consortium, "small", "m1") == ("ada",)
    commands.submit(consortium, "release", "small", admitted.key("bo"), model="m1")
    assert commands.approvals(consortium, "small", "m1") == ("ada", "bo")


def test_a_release_order_counts_when_accepted_and_not_when_refused(
    admitted: Any,
) -> None:
    consortium = admitted.consortium
    for name, reason in (("ada", None), ("bo", "not finished")):
        order = commands.submit(
            consortium, "release", "small", admitted.key(name), model="m"
        )
        commands.finish(consortium, order, refused=reason)

    assert commands.approvals(consortium, "small", "m") == ("ada",)


def test_the_release_order_of_a_revoked_administrator_counts_no_more(
    admitted: Any,
) -> None:
    consortium = admitted.consortium
    key = admitted.key("ada")
    commands.submit(consortium, "release", "small", key, model="m")
    members.revoke_administrator(consortium, "ada", "left")

    assert commands.approvals(consortium, "small", "m") == ()
