import hashlib
import json
import tomllib
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.trust import contract as contract_module
from fedgex.common.trust import pki
from fedgex.common.trust.contract import Contract
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import commands, contracts, drafts, members
from fedgex.server.consortium.store import NotFoundError

EXPIRES = date(2999, 12, 31)


def draft(admitted: Any, drafted: dict[str, Path], **changed: Any) -> str:
    terms: dict[str, Any] = {
        "no_secure_aggregation": "a test",
        "purpose": "restoration of three genes",
        "expires": EXPIRES,
        "sites": ["north", "south"],
        "administrators": 2,
    } | changed
    return drafts.draft(
        admitted.consortium, drafted["study"], drafted["genes"], **terms
    )


def sign(admitted: Any, path: Path, *names: str) -> Signed:
    for name in names:
        key = admitted.key(name)
        signed = contracts.sign(path, key, admitted.consortium.administrator(key)[1])
    return signed


@pytest.fixture
def published(admitted: Any, drafted: dict[str, Path]) -> str:
    """Return the hash of a contract that ada signed and published."""
    drafted["contract"].write_text(draft(admitted, drafted))
    sign(admitted, drafted["contract"], "ada")
    contracts.publish(admitted.consortium, drafted["contract"], admitted.key("ada"))
    return hashlib.sha256(drafted["contract"].read_bytes()).hexdigest()


def answered(
    admitted: Any, site: str, contract: str, decision: str = "approved", **more: Any
) -> Signed:
    values = {
        "contract": contract,
        "decision": decision,
        "by": "Dr. N.",
        "at": datetime.now(UTC).isoformat(),
        "expires": "2999-01-01" if decision == "approved" else None,
        "reason": "" if decision == "approved" else "no consent",
    } | more
    certificate = pki.from_pem(admitted.consortium.sites()[site].certificate)
    return Signed(json.dumps(values)).signed_by(admitted.sites[site], certificate)


# ---- drafts ----


def test_a_draft_holds_every_key_of_the_study_with_its_explanation(
    admitted: Any,
    drafted: dict[str, Path],
) -> None:
    text = draft(admitted, drafted)

    values = tomllib.loads(text)
    assert values["study"]["pretraining"]["rounds"] == 2
    assert values["study"]["rounds"]["quorum"] == 2
    assert values["study"]["vocabulary"]["genes"] == ["ESR1", "MKI67", "TP53"]
    genes_hash = hashlib.sha256(b"ESR1\nMKI67\nTP53").hexdigest()
    assert values["vocabulary_hash"] == genes_hash
    assert "# Fewest updates that make a round.\nquorum = 2" in text
    assert Contract.from_toml(text, "test").sites == ("north", "south")


def test_a_whole_scenario_serves_as_a_study(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    alone = draft(admitted, drafted)
    more = '\n[data]\nexpression = "x.csv"\n'
    drafted["study"].write_text(drafted["study"].read_text() + more)

    assert draft(admitted, drafted) == alone


def test_a_study_without_the_heading_serves_as_well(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    alone = draft(admitted, drafted)
    drafted["study"].write_text('name = "small"\n[pretraining]\nrounds = 2\n')

    assert draft(admitted, drafted) == alone


def test_site_weights_and_awkward_words_survive_the_draft(
    admitted: Any,
    drafted: dict[str, Path],
) -> None:
    drafted["study"].write_text(
        '[study]\nname = "small"\n[study.pretraining]\nrounds = 1\n'
        'learning_rate = 1e-5\n[study.strategy]\nname = "fedavg"\nweights = "fixed"\n'
        "site_weights = { north = 2.0, south = 1.0 }\n"
    )
    purpose = 'gènes "à" \\ tab\there\nsecond line 🧬'

    contract = Contract.from_toml(draft(admitted, drafted, purpose=purpose), "test")

    assert contract.purpose == purpose
    assert contract.study.strategy.site_weights == {"north": 2.0, "south": 1.0}
    assert contract.study.pretraining.learning_rate == 1e-5


def test_everything_wrong_with_a_draft_is_named_at_once(
    admitted: Any,
    drafted: dict[str, Path],
) -> None:
    with pytest.raises(ConfigError) as caught:
        draft(admitted, drafted, purpose="short", sites=["North"])

    assert "purpose" in str(caught.value)
    assert "sites" in str(caught.value)


def test_a_contract_that_expired_before_it_was_drafted_is_refused(
    admitted: Any,
    drafted: dict[str, Path],
) -> None:
    with pytest.raises(ConfigError, match="expected a day to come"):
        draft(admitted, drafted, expires=date(2020, 1, 1))


def test_a_gene_list_with_repeats_is_refused_in_one_message(
    admitted: Any,
    drafted: dict[str, Path],
) -> None:
    drafted["genes"].write_text("TP53\nTP53\nESR1 MKI67\n")

    with pytest.raises(
        ConfigError, match=r"1 lines hold more.*1 genes stand in it twi"
    ):
        draft(admitted, drafted)


def test_an_empty_gene_list_is_refused(admitted: Any, drafted: dict[str, Path]) -> None:
    drafted["genes"].write_text("# none\n")

    with pytest.raises(ConfigError, match="it is empty"):
        draft(admitted, drafted)


def test_a_study_file_that_is_not_there_is_not_found(
    admitted: Any,
    drafted: dict[str, Path],
) -> None:
    drafted["study"].unlink()

    with pytest.raises(NotFoundError, match="there is no such file"):
        draft(admitted, drafted)


# ---- signatures ----


def test_two_administrators_sign_one_text(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    drafted["contract"].write_text(draft(admitted, drafted))

    signed = sign(admitted, drafted["contract"], "ada", "bo", "ada")

    assert sorted(admitted.consortium.signers(signed)) == ["ada", "bo"]
    beside = drafted["contract"].with_name("contract.toml.signed.json")
    assert Signed.from_json(beside.read_text(), "test") == signed


def test_a_draft_changed_after_it_was_signed_is_not_signed_again(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    drafted["contract"].write_text(draft(admitted, drafted))
    sign(admitted, drafted["contract"], "ada")
    with drafted["contract"].open("a") as file:
        file.write(" ")

    with pytest.raises(TrustError, match="was changed after ada signed it"):
        sign(admitted, drafted["contract"], "bo")


def test_what_is_no_contract_is_not_signed(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    drafted["contract"].write_text('purpose = "too little"\n')

    with pytest.raises(ConfigError, match="Field required"):
        sign(admitted, drafted["contract"], "ada")


def test_a_key_signs_under_its_own_certificate_only(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    drafted["contract"].write_text(draft(admitted, drafted))
    other = admitted.consortium.administrator(admitted.key("bo"))[1]

    with pytest.raises(TrustError, match="not that of bo's certificate"):
        contracts.sign(drafted["contract"], admitted.key("ada"), other)


# ---- publication ----


def test_a_published_contract_is_stored_byte_for_byte_and_ordered(
    admitted: Any, drafted: dict[str, Path], published: str
) -> None:
    found = contracts.load(admitted.consortium, published)

    assert found.signed.content.encode() == drafted["contract"].read_bytes()
    assert found.signers == ("ada",)
    (order,) = commands.take(admitted.consortium)
    assert (order.kind, order.subject) == ("publish", published)


def test_a_contract_is_found_by_hash_prefix_and_name(
    admitted: Any, published: str
) -> None:
    for which in (published, published[:6], "small"):
        assert contracts.find(admitted.consortium, which).hash == published


@pytest.mark.parametrize("which", ["other", "0" * 64, ""])
def test_an_unknown_contract_is_not_found_and_the_known_are_listed(
    admitted: Any, published: str, which: str
) -> None:
    with pytest.raises(NotFoundError, match=rf"{published[:12]} \(small\)"):
        contracts.find(admitted.consortium, which)


def test_an_unsigned_contract_is_not_published(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    drafted["contract"].write_text(draft(admitted, drafted))

    with pytest.raises(NotFoundError, match="was not signed"):
        contracts.publish(admitted.consortium, drafted["contract"], admitted.key("ada"))

    beside = contracts.signatures_path(drafted["contract"])
    beside.write_text(Signed(draft(admitted, drafted)).to_json())
    with pytest.raises(TrustError, match="bears the signatures of nobody"):
        contracts.publish(admitted.consortium, drafted["contract"], admitted.key("ada"))


def test_one_changed_byte_stops_publication(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    drafted["contract"].write_text(draft(admitted, drafted))
    sign(admitted, drafted["contract"], "ada")
    beside = contracts.signatures_path(drafted["contract"])
    for path in (drafted["contract"], beside):
        path.write_text(path.read_text().replace("of three genes", "of four genes"))

    with pytest.raises(TrustError, match="does not fit the content"):
        contracts.publish(admitted.consortium, drafted["contract"], admitted.key("ada"))


def test_a_contract_edited_after_signing_is_not_published(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    drafted["contract"].write_text(draft(admitted, drafted))
    sign(admitted, drafted["contract"], "ada")
    with drafted["contract"].open("a") as file:
        file.write("\n")

    with pytest.raises(TrustError, match="differs from the text that was signed"):
        contracts.publish(admitted.consortium, drafted["contract"], admitted.key("ada"))


def test_line_ends_are_part_of_what_is_signed(
    admitted: Any, drafted: dict[str, Path]
) -> None:
    text = draft(admitted, drafted).replace("\n", "\r\n").encode()
    drafted["contract"].write_bytes(text)
    signed = sign(admitted, drafted["contract"], "ada")

    assert signed.hash == hashlib.sha256(text).hexdigest()


def test_all_that_keeps_a_contract_from_use_is_said_at_once(
    admitted: Any, drafted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = draft(admitted, drafted)
    text = text.replace('sites = ["north", "south"]', 'sites = ["north", "east"]')
    text = text.replace('"south" = ', '"east" = ')
    drafted["contract"].write_text(
        text.replace('code_version = "', 'code_version = "9').replace(
            "expires = 2999-12-31", "expires = 2020-01-01"
        )
    )
    sign(admitted, drafted["contract"], "ada")

    with pytest.raises(ConfigError) as caught:
        contracts.publish(admitted.consortium, drafted["contract"], admitted.key("ada"))

    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "expired on 2020-01-01" in lines[0]
    assert "is for fedgex 9" in lines[1]
    assert "the contract names east" in lines[2]


def test_published_again_a_contract_keeps_all_signatures(
    admitted: Any, drafted: dict[str, Path], published: str
) -> None:
    contracts.signatures_path(drafted["contract"]).unlink()
    sign(admitted, drafted["contract"], "bo")
    contracts.publish(admitted.consortium, drafted["contract"], admitted.key("bo"))

    assert contracts.load(admitted.consortium, published).signers == ("ada", "bo")


def test_a_revoked_signature_makes_way_for_one_in_force(
    admitted: Any, drafted: dict[str, Path], published: str
) -> None:
    consortium = admitted.consortium
    members.revoke_administrator(consortium, "ada", "left")
    found = contracts.load(consortium, published)
    assert found.signers == ("ada",)
    with pytest.raises(
        TrustError, match=r"was revoked.*signed by administrators in fo"
    ):
        contracts.usable(consortium, found)

    contracts.signatures_path(drafted["contract"]).unlink()
    sign(admitted, drafted["contract"], "bo")
    contracts.publish(consortium, drafted["contract"], admitted.key("bo"))

    again = contracts.load(consortium, published)
    assert again.signers == ("bo",)
    contracts.usable(consortium, again)


def test_a_stored_contract_that_was_changed_is_not_loaded(
    admitted: Any, published: str
) -> None:
    path = admitted.folder / "contracts" / f"{published}.json"
    path.write_text(path.read_text().replace("three genes", "four genes"))

    with pytest.raises(TrustError, match="changed after publication"):
        contracts.load(admitted.consortium, published)


def test_an_expired_contract_is_shown_and_not_used(
    admitted: Any, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = contracts.load(admitted.consortium, published)
    monkeypatch.setattr(contract_module.Contract, "expired", lambda self: True)

    with pytest.raises(ConfigError, match="expired on 2999-12-31"):
        contracts.usable(admitted.consortium, found)


# ---- answers ----


def test_the_answer_of_a_hospital_is_kept(admitted: Any, published: str) -> None:
    signed = answered(admitted, "north", published)

    assert contracts.record_answer(admitted.consortium, published, signed) == "north"

    answer = contracts.answers(admitted.consortium, published)["north"]
    assert (answer.decision, answer.by) == ("approved", "Dr. N.")
    assert answer.expires == date(2999, 1, 1)
    assert [c.hash for c in contracts.published(admitted.consortium)] == [published]


def test_a_later_answer_replaces_an_earlier_one_and_not_the_other_way(
    admitted: Any, published: str
) -> None:
    consortium = admitted.consortium
    before = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    approval = answered(admitted, "north", published, at=before)
    withdrawal = answered(admitted, "north", published, "withdrawn")
    contracts.record_answer(consortium, published, approval)
    contracts.record_answer(consortium, published, withdrawal)

    with pytest.raises(TrustError, match="older than"):
        contracts.record_answer(consortium, published, approval)
    assert contracts.answers(consortium, published)["north"].decision == "withdrawn"


def test_an_answer_about_another_contract_is_refused(
    admitted: Any, published: str
) -> None:
    signed = answered(admitted, "north", "d" * 64)

    with pytest.raises(TrustError, match="north answered about the contract ddd"):
        contracts.record_answer(admitted.consortium, published, signed)


def test_an_answer_that_nobody_or_an_administrator_signed_is_refused(
    admitted: Any, published: str
) -> None:
    content = answered(admitted, "north", published).content
    key = admitted.key("ada")
    by_ada = Signed(content).signed_by(key, admitted.consortium.administrator(key)[1])

    for signed, message in ((Signed(content), "0 signatures"), (by_ada, "role site")):
        with pytest.raises(TrustError, match=message):
            contracts.record_answer(admitted.consortium, published, signed)


def test_a_hospital_outside_the_contract_has_no_answer_to_it(
    admitted: Any, published: str, ask: Callable[..., Any]
) -> None:
    asked = ask("east")
    members.add_site(admitted.consortium, asked.path, asked.fingerprint)
    admitted.sites["east"] = asked.key

    with pytest.raises(TrustError, match="east answered"):
        contracts.record_answer(
            admitted.consortium, published, answered(admitted, "east", published)
        )


def test_the_answer_of_a_revoked_hospital_is_refused(
    admitted: Any, published: str
) -> None:
    signed = answered(admitted, "north", published)
    members.revoke_site(admitted.consortium, "north", "left")

    with pytest.raises(TrustError, match="was revoked"):
        contracts.record_answer(admitted.consortium, published, signed)
