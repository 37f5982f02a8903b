"""Nothing runs before a person approved exactly this contract, and not for longer."""

import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fedgex.client.admission import approvals
from fedgex.client.admission.approvals import Desk, Refusal
from fedgex.client.identity import Identity
from fedgex.client.policy import Policy
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.audit_log import Chain
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed

GENES = ("EGFR", "MYC", "TP53")
TODAY = datetime.now(UTC).date()
NEXT_WEEK, NEXT_MONTH = TODAY + timedelta(days=7), TODAY + timedelta(days=30)
TEXT = f"""\
purpose = "Learn to restore missing genes"
expires = {NEXT_MONTH}
code_version = "0.1"
vocabulary_hash = "{Vocabulary(GENES).hash}"
sites = ["north", "south"]

[study]
name = "restoration"
minimum_cohort = 5
vocabulary.genes = {json.dumps(list(GENES))}
pretraining.rounds = 2
strategy.name = "fedavg"
"""

Authority = tuple[pki.Key, x509.Certificate]
Open = Callable[..., Desk]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return pki.new_authority("oncology")


def certified(
    authority: Authority, name: str, role: pki.Role, days: int = 365
) -> tuple[pki.Key, x509.Certificate]:
    key = pki.new_key()
    csr = pki.request(key, name, role)
    return key, pki.issue(*authority, csr, name=name, role=role, days=days)


@pytest.fixture(scope="module")
def ada(authority: Authority) -> tuple[pki.Key, x509.Certificate]:
    return certified(authority, "ada", "administrator")


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    key, certificate = certified(authority, "north", "site")
    return Identity(
        name="north",
        consortium="oncology",
        server="localhost:9092",
        key=key,
        certificate=certificate,
        authority=authority[1],
        node_key_path=Path("node.key"),
    )


@pytest.fixture
def desk(tmp_path: Path, identity: Identity) -> Open:
    """Return what opens the hospital's desk, with changes to the proposed policy."""

    def open_desk(**policy: object) -> Desk:
        audit = Chain(tmp_path / "audit.jsonl")
        return Desk(tmp_path, identity, audit, Policy.proposed(**policy))

    return open_desk


@pytest.fixture
def signed(ada: tuple[pki.Key, x509.Certificate]) -> Signed:
    return Signed(TEXT, ()).signed_by(*ada)


def refusal(what: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        what()
    return caught.value


def approve(desk: Desk, hash: str, expires: date = NEXT_WEEK) -> None:
    desk.decide(hash, "approved", by="Dr. Curie", expires=expires)


def at(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    """Set the clock of the desk to noon of a day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime(day.year, day.month, day.day, 12, tzinfo=UTC)

    monkeypatch.setattr(approvals, "datetime", Clock)


# ---- approval ----


def test_by_default_a_contract_is_refused(desk: Open, signed: Signed) -> None:
    desk().receive(signed)

    refused = refusal(lambda: desk().admitted(signed.hash))

    assert str(refused) == (
        f"FX-STUDY-001: nobody here has approved contract {signed.hash[:16]}; read it "
        "with fedgex-site study show, then approve or reject it."
    )


def test_an_approved_contract_is_admitted(desk: Open, signed: Signed) -> None:
    desk().receive(signed)

    approve(desk(), signed.hash)

    assert desk().admitted(signed.hash).purpose == "Learn to restore missing genes"


def test_an_approval_is_signed_and_logged_with_who_approved(
    desk: Open, signed: Signed, tmp_path: Path, authority: Authority
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)

    stored = (tmp_path / f"decisions/{signed.hash}.json").read_text()
    decision = Signed.from_json(stored, "decision")
    assert decision.signers(authority[1], "site") == ("north",)
    said = json.loads(decision.content)
    assert said.pop("at")
    assert said == {
        "contract": signed.hash,
        "decision": "approved",
        "by": "Dr. Curie",
        "expires": NEXT_WEEK.isoformat(),
        "reason": "",
    }
    lines = audit_log.read(tmp_path / "audit.jsonl")
    assert [line["event"] for line in lines] == ["contract-received", "decision"]
    assert lines[0]["signers"] == ["ada"]
    assert (lines[1]["by"], lines[1]["decision"]) == ("Dr. Curie", "approved")
    audit_log.verify(tmp_path / "audit.jsonl")


def test_approving_one_contract_does_not_admit_another(
    desk: Open, signed: Signed, ada: tuple[pki.Key, x509.Certificate]
) -> None:
    other = Signed(TEXT.replace("rounds = 2", "rounds = 3"), ()).signed_by(*ada)
    desk().receive(signed)
    desk().receive(other)

    approve(desk(), signed.hash)

    assert refusal(lambda: desk().admitted(other.hash)).code == "FX-STUDY-001"


@pytest.mark.parametrize("hash", ["0" * 64, "", "../../etc/passwd", "x" * 64])
def test_an_unknown_contract_is_neither_admitted_nor_approved(
    desk: Open, hash: str
) -> None:
    assert refusal(lambda: desk().admitted(hash)).code == "FX-STUDY-001"
    assert refusal(lambda: approve(desk(), hash)).code == "FX-STUDY-001"


def test_an_approval_ends_after_its_last_day(
    desk: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)

    at(monkeypatch, NEXT_WEEK)
    desk().admitted(signed.hash)
    at(monkeypatch, NEXT_WEEK + timedelta(days=1))

    refused = refusal(lambda: desk().admitted(signed.hash))
    assert str(refused) == (
        f"FX-STUDY-004: the approval of contract {signed.hash[:16]} ended on "
        f"{NEXT_WEEK}; to go on, approve it again."
    )


def test_an_approval_can_be_renewed(
    desk: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    at(monkeypatch, NEXT_WEEK + timedelta(days=1))

    approve(desk(), signed.hash, expires=NEXT_MONTH)

    assert desk().admitted(signed.hash).sites == ("north", "south")


@pytest.mark.parametrize(
    "expires", [NEXT_MONTH + timedelta(days=1), TODAY - timedelta(days=1), None]
)
def test_an_approval_ends_no_later_than_the_contract_and_not_in_the_past(
    desk: Open, signed: Signed, expires: date | None
) -> None:
    desk().receive(signed)

    with pytest.raises(ConfigError) as caught:
        desk().decide(signed.hash, "approved", by="Dr. Curie", expires=expires)

    assert str(caught.value) == (
        f"the approval would expire on {expires}; expected a day from {TODAY} to "
        f"{NEXT_MONTH}, when the contract expires."
    )
    assert desk().decision(signed.hash) is None


def test_an_expired_contract_is_neither_approved_nor_admitted(
    desk: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash, expires=NEXT_MONTH)

    at(monkeypatch, NEXT_MONTH + timedelta(days=1))

    for refused in (
        refusal(lambda: desk().admitted(signed.hash)),
        refusal(lambda: approve(desk(), signed.hash)),
    ):
        assert refused.code == "FX-STUDY-004"
        assert refused.why.startswith(f"the contract expired on {NEXT_MONTH}; ask the")


@pytest.mark.parametrize("by", ["", "  "])
def test_nobody_cannot_approve(desk: Open, signed: Signed, by: str) -> None:
    desk().receive(signed)

    with pytest.raises(ConfigError, match="the decision: by: "):
        desk().decide(signed.hash, "approved", by=by, expires=NEXT_WEEK)


def test_an_expired_certificate_cannot_sign_an_approval(
    desk: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk().receive(signed)
    at(monkeypatch, TODAY + timedelta(days=400))

    with pytest.raises(FedgexError, match=r'site "north" expired on'):
        approve(desk(), signed.hash)


# ---- rejection and withdrawal ----


def test_a_rejected_contract_is_refused_with_the_reason(
    desk: Open, signed: Signed
) -> None:
    desk().receive(signed)

    desk().decide(signed.hash, "rejected", by="Dr. Curie", reason="no ethics vote")

    assert str(refusal(lambda: desk().admitted(signed.hash))) == (
        f"FX-STUDY-002: Dr. Curie rejected contract {signed.hash[:16]} on {TODAY}: no "
        "ethics vote"
    )


def test_a_rejection_can_be_thought_over(desk: Open, signed: Signed) -> None:
    desk().receive(signed)
    desk().decide(signed.hash, "rejected", by="Dr. Curie", reason="no ethics vote")

    approve(desk(), signed.hash)

    desk().admitted(signed.hash)


def test_a_withdrawal_is_final(desk: Open, signed: Signed) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)

    desk().decide(signed.hash, "withdrawn", by="Dr. Meitner", reason="we leave")

    for refused in (
        refusal(lambda: desk().admitted(signed.hash)),
        refusal(lambda: approve(desk(), signed.hash)),
    ):
        assert str(refused) == (
            f"FX-STUDY-003: Dr. Meitner withdrew contract {signed.hash[:16]} on "
            f"{TODAY}, and that is final: we leave"
        )


def test_a_withdrawn_contract_that_is_sent_again_stays_withdrawn(
    desk: Open, signed: Signed
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    desk().decide(signed.hash, "withdrawn", by="Dr. Meitner", reason="we leave")

    desk().receive(signed)

    assert refusal(lambda: desk().admitted(signed.hash)).code == "FX-STUDY-003"


def test_a_withdrawal_survives_an_older_decision_put_back(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    path = tmp_path / f"decisions/{signed.hash}.json"
    approved = path.read_bytes()
    desk().decide(signed.hash, "withdrawn", by="Dr. Meitner", reason="we leave")

    path.write_bytes(approved)

    assert refusal(lambda: desk().admitted(signed.hash)).code == "FX-STUDY-003"


@pytest.mark.parametrize("before", ["undecided", "rejected"])
def test_only_what_was_approved_can_be_withdrawn(
    desk: Open, signed: Signed, before: str
) -> None:
    desk().receive(signed)
    if before == "rejected":
        desk().decide(signed.hash, "rejected", by="Dr. Curie", reason="no vote")

    with pytest.raises(ConfigError, match=f"is {before}; withdraw takes back"):
        desk().decide(signed.hash, "withdrawn", by="Dr. Curie", reason="we leave")


def test_a_rejection_needs_a_reason(desk: Open, signed: Signed) -> None:
    desk().receive(signed)

    with pytest.raises(ConfigError, match="a rejection or withdrawal needs a reason"):
        desk().decide(signed.hash, "rejected", by="Dr. Curie")


# ---- atomic ----


@pytest.mark.parametrize("cut_off", ["before the file", "before the log"])
def test_an_approval_that_was_cut_off_admits_nothing_and_can_be_repeated(
    desk: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    desk().receive(signed)

    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if cut_off == "before the file":
            patch.setattr(approvals, "write_atomic", die)
        else:
            patch.setattr(Chain, "append", die)
        with pytest.raises(KeyboardInterrupt):
            approve(desk(), signed.hash)

    assert refusal(lambda: desk().admitted(signed.hash)).code == "FX-STUDY-001"
    approve(desk(), signed.hash)
    desk().admitted(signed.hash)


def test_a_withdrawal_counts_as_soon_as_it_is_logged(
    desk: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)

    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(approvals, "write_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            desk().decide(signed.hash, "withdrawn", by="Dr. Curie", reason="we leave")

    assert refusal(lambda: desk().admitted(signed.hash)).code == "FX-STUDY-003"


def test_an_approval_that_the_log_does_not_know_admits_nothing(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    audit = tmp_path / "audit.jsonl"

    audit.write_bytes(audit.read_bytes().splitlines(keepends=True)[0])

    assert refusal(lambda: desk().admitted(signed.hash)).code == "FX-STUDY-001"


def test_a_decision_changed_by_hand_admits_nothing(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    path = tmp_path / f"decisions/{signed.hash}.json"

    path.write_text(
        path.read_text().replace(NEXT_WEEK.isoformat(), NEXT_MONTH.isoformat())
    )

    assert refusal(lambda: desk().admitted(signed.hash)).code == "FX-STUDY-001"


def test_another_hospitals_approval_admits_nothing(
    desk: Open, signed: Signed, tmp_path: Path, authority: Authority
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    path = tmp_path / f"decisions/{signed.hash}.json"
    ours = Signed.from_json(path.read_text(), "decision")
    theirs = Signed(ours.content, ()).signed_by(*certified(authority, "south", "site"))

    path.write_text(theirs.to_json())

    assert refusal(lambda: desk().admitted(signed.hash)).code == "FX-STUDY-001"


# ---- contracts ----


def test_a_contract_changed_by_one_byte_is_refused(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    changed = Signed(signed.content.replace("rounds = 2", "rounds = 3"), ())
    changed = Signed(changed.content, signed.signatures)

    refused = refusal(lambda: desk().receive(changed))

    assert refused.code == "FX-STUDY-005"
    assert "the signature does not fit the content" in refused.why
    assert not (tmp_path / "contracts").exists()


def test_a_stored_contract_changed_by_one_byte_is_refused(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    path = tmp_path / f"contracts/{signed.hash}.json"

    path.write_text(path.read_text().replace("rounds = 2", "rounds = 3"))

    refused = refusal(lambda: desk().admitted(signed.hash))
    assert refused.code == "FX-STUDY-005"
    assert refused.why.startswith(
        f"the text of contract {signed.hash[:16]} was changed: it hashes to "
    )
    assert desk().contracts() == []


def test_a_stored_contract_that_was_changed_is_replaced_when_sent_again(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    (tmp_path / f"contracts/{signed.hash}.json").write_text("torn")

    desk().receive(signed)

    desk().admitted(signed.hash)


def test_a_contract_put_here_by_hand_is_refused(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    (tmp_path / "contracts").mkdir()
    (tmp_path / f"contracts/{signed.hash}.json").write_text(signed.to_json())

    refused = refusal(lambda: approve(desk(), signed.hash))

    assert refused.code == "FX-STUDY-005"
    assert "the audit log does not say that it came from the consortium" in refused.why


def refused_to_receive(desk: Desk, signed: Signed) -> str:
    refused = refusal(lambda: desk.receive(signed))
    assert refused.code == "FX-STUDY-005"
    assert desk.contracts() == []
    return refused.why


def test_a_contract_without_signature_is_refused(desk: Open) -> None:
    why = refused_to_receive(desk(), Signed(TEXT, ()))

    assert "it bears no signature; expected an administrator's" in why


def test_a_contract_signed_by_a_hospital_is_refused(
    desk: Open, authority: Authority
) -> None:
    south = certified(authority, "south", "site")

    why = refused_to_receive(desk(), Signed(TEXT, ()).signed_by(*south))

    assert "expected one for the role administrator" in why


def test_a_contract_signed_under_another_authority_is_refused(desk: Open) -> None:
    mallory = certified(pki.new_authority("oncology"), "ada", "administrator")

    why = refused_to_receive(desk(), Signed(TEXT, ()).signed_by(*mallory))

    assert "was not issued by this consortium's authority" in why


def test_a_contract_signed_with_an_expired_certificate_is_refused(
    desk: Open, authority: Authority
) -> None:
    late = certified(authority, "ada", "administrator", days=-1)

    assert "expired on" in refused_to_receive(desk(), Signed(TEXT).signed_by(*late))


def test_an_approved_contract_outlives_its_signers_certificate(
    desk: Open, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = Signed(TEXT, ()).signed_by(
        *certified(authority, "ada", "administrator", days=3)
    )
    desk().receive(signed)
    approve(desk(), signed.hash)

    at(monkeypatch, TODAY + timedelta(days=5))

    desk().admitted(signed.hash)


def test_a_contract_between_others_is_refused(
    desk: Open, ada: tuple[pki.Key, x509.Certificate]
) -> None:
    text = TEXT.replace('"north", "south"', '"east", "south"')

    why = refused_to_receive(desk(), Signed(text, ()).signed_by(*ada))

    assert "is between east, south; expected north among them." in why


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("rounds = 2", "rounds = two", "is not TOML"),
        ("purpose", "purposes", "purpose: Field required"),
        ("vocabulary_hash = ", 'vocabulary_hash = "0" #', "vocabulary_hash"),
    ],
)
def test_a_text_that_is_no_contract_is_refused(
    desk: Open, ada: tuple[pki.Key, x509.Certificate], old: str, new: str, reason: str
) -> None:
    signed = Signed(TEXT.replace(old, new), ()).signed_by(*ada)

    assert reason in refused_to_receive(desk(), signed)


def test_a_contract_that_is_sent_again_is_logged_once(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    desk().receive(signed)
    desk().receive(signed)

    assert len(audit_log.read(tmp_path / "audit.jsonl")) == 1


def test_one_unreadable_contract_does_not_hide_the_others(
    desk: Open, signed: Signed, tmp_path: Path
) -> None:
    desk().receive(signed)
    (tmp_path / f"contracts/{'0' * 64}.json").write_text("torn")

    assert [each.hash for each in desk().contracts()] == [signed.hash]


# ---- version and policy ----


def test_a_version_outside_the_window_names_both(
    desk: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)
    monkeypatch.setattr(approvals, "version", lambda name: "0.2.0")

    assert str(refusal(lambda: desk().admitted(signed.hash))) == (
        "FX-STUDY-007: fedgex 0.2.0 is installed, and the contract is for 0.1; install "
        "a release of that, or ask the coordinator for a contract for yours."
    )


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (
            {"tasks": ["survival"]},
            "The study trains pretraining; policy.toml permits survival.",
        ),
        (
            {"demand_privacy": True},
            "The study trains without differential privacy; policy.toml has "
            "demand_privacy = true.",
        ),
        (
            {"metrics": ["train-loss"]},
            'The study weights updates by "patients"; policy.toml does not let '
            "num-patients leave. Weights that tell nothing are equal or fixed in the "
            "contract.",
        ),
    ],
)
def test_no_approval_overrides_the_policy(
    desk: Open, signed: Signed, policy: dict[str, object], why: str
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)

    assert str(refusal(lambda: desk(**policy).admitted(signed.hash))) == (
        f"FX-STUDY-008: {why}"
    )


def test_all_that_the_policy_refuses_is_told_at_once(signed: Signed) -> None:
    policy = Policy.proposed(tasks=["survival"], demand_privacy=True, metrics=[])

    assert len(policy.objections(Contract.read_signed(signed).study)) == 3


def test_weights_of_the_contract_need_no_number_of_patients(
    desk: Open, ada: tuple[pki.Key, x509.Certificate]
) -> None:
    text = re.sub(
        r"strategy\..*",
        'strategy = { name = "fedavg", weights = "fixed", '
        "site_weights = { north = 1.0, south = 2.0 } }",
        TEXT,
    )
    signed = Signed(text, ()).signed_by(*ada)
    desk().receive(signed)
    approve(desk(), signed.hash)

    desk(metrics=[]).admitted(signed.hash)


def test_a_stricter_minimum_cohort_refuses_no_contract(
    desk: Open, signed: Signed
) -> None:
    desk().receive(signed)
    approve(desk(), signed.hash)

    assert desk(minimum_cohort=50).admitted(signed.hash).study.minimum_cohort == 5
