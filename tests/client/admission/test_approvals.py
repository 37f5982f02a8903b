"""Nothing runs before a person approved exactly this contract, and not for longer."""

import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fedgex.client.admission import approvals
from fedgex.client.admission.approvals import ApprovalStore, Refusal
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
Open = Callable[..., ApprovalStore]


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
def store(tmp_path: Path, identity: Identity) -> Open:
    """Return a function that opens the approval store under a changed policy."""

    def open_desk(**policy: object) -> ApprovalStore:
        audit = Chain(tmp_path / "audit.jsonl")
        return ApprovalStore(tmp_path, identity, audit, Policy.proposed(**policy))

    return open_desk


@pytest.fixture
def signed(ada: tuple[pki.Key, x509.Certificate]) -> Signed:
    return Signed(TEXT, ()).signed_by(*ada)


def refusal(what: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        what()
    return caught.value


def approve(store: ApprovalStore, hash: str, expires: date = NEXT_WEEK) -> None:
    store.decide(hash, "approved", by="Dr. Curie", expires=expires)


def at(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    """Set the clock of the approval store to noon of a day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime(day.year, day.month, day.day, 12, tzinfo=UTC)

    monkeypatch.setattr(approvals, "datetime", Clock)


# ---- approval ----


def test_by_default_a_contract_is_refused(store: Open, signed: Signed) -> None:
    store().receive(signed)

    refused = refusal(lambda: store().admitted(signed.hash))

    assert str(refused) == (
        f"FX-STUDY-001: nobody here has approved contract {signed.hash[:16]}; read it "
        "with fedgex-site study show, then approve or reject it."
    )


def test_an_approved_contract_is_admitted(store: Open, signed: Signed) -> None:
    store().receive(signed)

    approve(store(), signed.hash)

    assert store().admitted(signed.hash).purpose == "Learn to restore missing genes"


def test_an_approval_is_signed_and_logged_with_who_approved(
    store: Open, signed: Signed, tmp_path: Path, authority: Authority
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)

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
        "runs": 1,
    }
    lines = audit_log.read(tmp_path / "audit.jsonl")
    assert [line["event"] for line in lines] == ["contract-received", "decision"]
    assert lines[0]["signers"] == ["ada"]
    assert (lines[1]["by"], lines[1]["decision"]) == ("Dr. Curie", "approved")
    audit_log.verify(tmp_path / "audit.jsonl")


def test_approving_one_contract_does_not_admit_another(
    store: Open, signed: Signed, ada: tuple[pki.Key, x509.Certificate]
) -> None:
    other = Signed(TEXT.replace("rounds = 2", "rounds = 3"), ()).signed_by(*ada)
    store().receive(signed)
    store().receive(other)

    approve(store(), signed.hash)

    assert refusal(lambda: store().admitted(other.hash)).code == "FX-STUDY-001"


@pytest.mark.parametrize("hash", ["0" * 64, "", "../../etc/passwd", "x" * 64])
def test_an_unknown_contract_is_neither_admitted_nor_approved(
    store: Open, hash: str
) -> None:
    assert refusal(lambda: store().admitted(hash)).code == "FX-STUDY-001"
    assert refusal(lambda: approve(store(), hash)).code == "FX-STUDY-001"


def test_an_approval_ends_after_its_last_day(
    store: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)

    at(monkeypatch, NEXT_WEEK)
    store().admitted(signed.hash)
    at(monkeypatch, NEXT_WEEK + timedelta(days=1))

    refused = refusal(lambda: store().admitted(signed.hash))
    assert str(refused) == (
        f"FX-STUDY-004: the approval of contract {signed.hash[:16]} ended on "
        f"{NEXT_WEEK}; to go on, approve it again."
    )


def test_an_approval_can_be_renewed(
    store: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    at(monkeypatch, NEXT_WEEK + timedelta(days=1))

    approve(store(), signed.hash, expires=NEXT_MONTH)

    assert store().admitted(signed.hash).sites == ("north", "south")


@pytest.mark.parametrize(
    "expires", [NEXT_MONTH + timedelta(days=1), TODAY - timedelta(days=1), None]
)
def test_an_approval_ends_no_later_than_the_contract_and_not_in_the_past(
    store: Open, signed: Signed, expires: date | None
) -> None:
    store().receive(signed)

    with pytest.raises(ConfigError) as caught:
        store().decide(signed.hash, "approved", by="Dr. Curie", expires=expires)

    assert str(caught.value) == (
        f"the approval would expire on {expires}; expected a day from {TODAY} to "
        f"{NEXT_MONTH}, when the contract expires."
    )
    assert store().decision(signed.hash) is None


def test_an_expired_contract_is_neither_approved_nor_admitted(
    store: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().receive(signed)
    approve(store(), signed.hash, expires=NEXT_MONTH)

    at(monkeypatch, NEXT_MONTH + timedelta(days=1))

    for refused in (
        refusal(lambda: store().admitted(signed.hash)),
        refusal(lambda: approve(store(), signed.hash)),
    ):
        assert refused.code == "FX-STUDY-004"
        assert refused.why.startswith(f"the contract expired on {NEXT_MONTH}; ask the")


@pytest.mark.parametrize("by", ["", "  "])
def test_nobody_cannot_approve(store: Open, signed: Signed, by: str) -> None:
    store().receive(signed)

    with pytest.raises(ConfigError, match="the decision: by: "):
        store().decide(signed.hash, "approved", by=by, expires=NEXT_WEEK)


def test_an_expired_certificate_cannot_sign_an_approval(
    store: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().receive(signed)
    at(monkeypatch, TODAY + timedelta(days=400))

    with pytest.raises(FedgexError, match=r'site "north" expired on'):
        approve(store(), signed.hash)


# ---- rejection and withdrawal ----


def test_a_rejected_contract_is_refused_with_the_reason(
    store: Open, signed: Signed
) -> None:
    store().receive(signed)

    store().decide(signed.hash, "rejected", by="Dr. Curie", reason="no ethics vote")

    assert str(refusal(lambda: store().admitted(signed.hash))) == (
        f"FX-STUDY-002: Dr. Curie rejected contract {signed.hash[:16]} on {TODAY}: no "
        "ethics vote"
    )


def test_a_rejection_can_be_thought_over(store: Open, signed: Signed) -> None:
    store().receive(signed)
    store().decide(signed.hash, "rejected", by="Dr. Curie", reason="no ethics vote")

    approve(store(), signed.hash)

    store().admitted(signed.hash)


def test_a_withdrawal_is_final(store: Open, signed: Signed) -> None:
    store().receive(signed)
    approve(store(), signed.hash)

    store().decide(signed.hash, "withdrawn", by="Dr. Meitner", reason="we leave")

    for refused in (
        refusal(lambda: store().admitted(signed.hash)),
        refusal(lambda: approve(store(), signed.hash)),
    ):
        assert str(refused) == (
            f"FX-STUDY-003: Dr. Meitner withdrew contract {signed.hash[:16]} on "
            f"{TODAY}, and that is final: we leave"
        )


def test_a_withdrawn_contract_that_is_sent_again_stays_withdrawn(
    store: Open, signed: Signed
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    store().decide(signed.hash, "withdrawn", by="Dr. Meitner", reason="we leave")

    store().receive(signed)

    assert refusal(lambda: store().admitted(signed.hash)).code == "FX-STUDY-003"


def test_a_withdrawal_survives_an_older_decision_put_back(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    path = tmp_path / f"decisions/{signed.hash}.json"
    approved = path.read_bytes()
    store().decide(signed.hash, "withdrawn", by="Dr. Meitner", reason="we leave")

    path.write_bytes(approved)

    assert refusal(lambda: store().admitted(signed.hash)).code == "FX-STUDY-003"


@pytest.mark.parametrize("before", ["undecided", "rejected"])
def test_only_what_was_approved_can_be_withdrawn(
    store: Open, signed: Signed, before: str
) -> None:
    store().receive(signed)
    if before == "rejected":
        store().decide(signed.hash, "rejected", by="Dr. Curie", reason="no vote")

    with pytest.raises(ConfigError, match=f"is {before}; withdraw takes back"):
        store().decide(signed.hash, "withdrawn", by="Dr. Curie", reason="we leave")


def test_a_rejection_needs_a_reason(store: Open, signed: Signed) -> None:
    store().receive(signed)

    with pytest.raises(ConfigError, match="a rejection or withdrawal needs a reason"):
        store().decide(signed.hash, "rejected", by="Dr. Curie")


# ---- atomic ----


@pytest.mark.parametrize("cut_off", ["before the file", "before the log"])
def test_an_approval_that_was_cut_off_admits_nothing_and_can_be_repeated(
    store: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    store().receive(signed)

    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if cut_off == "before the file":
            patch.setattr(approvals, "write_atomic", die)
        else:
            patch.setattr(Chain, "append", die)
        with pytest.raises(KeyboardInterrupt):
            approve(store(), signed.hash)

    assert refusal(lambda: store().admitted(signed.hash)).code == "FX-STUDY-001"
    approve(store(), signed.hash)
    store().admitted(signed.hash)


def test_a_withdrawal_counts_as_soon_as_it_is_logged(
    store: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)

    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(approvals, "write_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            store().decide(signed.hash, "withdrawn", by="Dr. Curie", reason="we leave")

    assert refusal(lambda: store().admitted(signed.hash)).code == "FX-STUDY-003"


def test_an_approval_that_the_log_does_not_know_admits_nothing(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    audit = tmp_path / "audit.jsonl"

    audit.write_bytes(audit.read_bytes().splitlines(keepends=True)[0])

    assert refusal(lambda: store().admitted(signed.hash)).code == "FX-STUDY-001"


def test_a_decision_changed_by_hand_admits_nothing(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    path = tmp_path / f"decisions/{signed.hash}.json"

    path.write_text(
        path.read_text().replace(NEXT_WEEK.isoformat(), NEXT_MONTH.isoformat())
    )

    assert refusal(lambda: store().admitted(signed.hash)).code == "FX-STUDY-001"


def test_another_hospitals_approval_admits_nothing(
    store: Open, signed: Signed, tmp_path: Path, authority: Authority
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    path = tmp_path / f"decisions/{signed.hash}.json"
    ours = Signed.from_json(path.read_text(), "decision")
    theirs = Signed(ours.content, ()).signed_by(*certified(authority, "south", "site"))

    path.write_text(theirs.to_json())

    assert refusal(lambda: store().admitted(signed.hash)).code == "FX-STUDY-001"


# ---- contracts ----


def test_a_contract_changed_by_one_byte_is_refused(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    changed = Signed(signed.content.replace("rounds = 2", "rounds = 3"), ())
    changed = Signed(changed.content, signed.signatures)

    refused = refusal(lambda: store().receive(changed))

    assert refused.code == "FX-STUDY-005"
    assert "the signature does not fit the content" in refused.why
    assert not (tmp_path / "contracts").exists()


def test_a_stored_contract_changed_by_one_byte_is_refused(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    path = tmp_path / f"contracts/{signed.hash}.json"

    path.write_text(path.read_text().replace("rounds = 2", "rounds = 3"))

    refused = refusal(lambda: store().admitted(signed.hash))
    assert refused.code == "FX-STUDY-005"
    assert refused.why.startswith(
        f"the text of contract {signed.hash[:16]} was changed: it hashes to "
    )
    assert store().contracts() == []


def test_a_stored_contract_that_was_changed_is_replaced_when_sent_again(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    (tmp_path / f"contracts/{signed.hash}.json").write_text("torn")

    store().receive(signed)

    store().admitted(signed.hash)


def test_a_contract_put_here_by_hand_is_refused(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    (tmp_path / "contracts").mkdir()
    (tmp_path / f"contracts/{signed.hash}.json").write_text(signed.to_json())

    refused = refusal(lambda: approve(store(), signed.hash))

    assert refused.code == "FX-STUDY-005"
    assert "the audit log does not say that it came from the consortium" in refused.why


def refused_to_receive(store: ApprovalStore, signed: Signed) -> str:
    refused = refusal(lambda: store.receive(signed))
    assert refused.code == "FX-STUDY-005"
    assert store.contracts() == []
    return refused.why


def test_a_contract_without_signature_is_refused(store: Open) -> None:
    why = refused_to_receive(store(), Signed(TEXT, ()))

    assert "it bears no signature; expected an administrator's" in why


def test_a_contract_signed_by_a_hospital_is_refused(
    store: Open, authority: Authority
) -> None:
    south = certified(authority, "south", "site")

    why = refused_to_receive(store(), Signed(TEXT, ()).signed_by(*south))

    assert "expected one for the role administrator" in why


def test_a_contract_signed_under_another_authority_is_refused(store: Open) -> None:
    mallory = certified(pki.new_authority("oncology"), "ada", "administrator")

    why = refused_to_receive(store(), Signed(TEXT, ()).signed_by(*mallory))

    assert "was not issued by this consortium's authority" in why


def test_a_contract_signed_with_an_expired_certificate_is_refused(
    store: Open, authority: Authority
) -> None:
    late = certified(authority, "ada", "administrator", days=-1)

    assert "expired on" in refused_to_receive(store(), Signed(TEXT).signed_by(*late))


def test_an_approved_contract_outlives_its_signers_certificate(
    store: Open, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = Signed(TEXT, ()).signed_by(
        *certified(authority, "ada", "administrator", days=3)
    )
    store().receive(signed)
    approve(store(), signed.hash)

    at(monkeypatch, TODAY + timedelta(days=5))

    store().admitted(signed.hash)


def test_a_contract_between_others_is_refused(
    store: Open, ada: tuple[pki.Key, x509.Certificate]
) -> None:
    text = TEXT.replace('"north", "south"', '"east", "south"')

    why = refused_to_receive(store(), Signed(text, ()).signed_by(*ada))

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
    store: Open, ada: tuple[pki.Key, x509.Certificate], old: str, new: str, reason: str
) -> None:
    signed = Signed(TEXT.replace(old, new), ()).signed_by(*ada)

    assert reason in refused_to_receive(store(), signed)


def test_a_contract_that_is_sent_again_is_logged_once(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    store().receive(signed)
    store().receive(signed)

    assert len(audit_log.read(tmp_path / "audit.jsonl")) == 1


def test_one_unreadable_contract_does_not_hide_the_others(
    store: Open, signed: Signed, tmp_path: Path
) -> None:
    store().receive(signed)
    (tmp_path / f"contracts/{'0' * 64}.json").write_text("torn")

    assert [each.hash for each in store().contracts()] == [signed.hash]


# ---- version and policy ----


def test_a_version_outside_the_window_names_both(
    store: Open, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)
    monkeypatch.setattr(approvals, "version", lambda name: "0.2.0")

    assert str(refusal(lambda: store().admitted(signed.hash))) == (
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
    store: Open, signed: Signed, policy: dict[str, object], why: str
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)

    assert str(refusal(lambda: store(**policy).admitted(signed.hash))) == (
        f"FX-STUDY-008: {why}"
    )


def test_all_that_the_policy_refuses_is_told_at_once(signed: Signed) -> None:
    policy = Policy.proposed(tasks=["survival"], demand_privacy=True, metrics=[])

    assert len(policy.objections(Contract.read_signed(signed).study)) == 3


def test_weights_of_the_contract_need_no_number_of_patients(
    store: Open, ada: tuple[pki.Key, x509.Certificate]
) -> None:
    text = re.sub(
        r"strategy\..*",
        'strategy = { name = "fedavg", weights = "fixed", '
        "site_weights = { north = 1.0, south = 2.0 } }",
        TEXT,
    )
    signed = Signed(text, ()).signed_by(*ada)
    store().receive(signed)
    approve(store(), signed.hash)

    store(metrics=[]).admitted(signed.hash)


def test_a_stricter_minimum_cohort_refuses_no_contract(
    store: Open, signed: Signed
) -> None:
    store().receive(signed)
    approve(store(), signed.hash)

    assert store(minimum_cohort=50).admitted(signed.hash).study.minimum_cohort == 5
