import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.trust import pinning, pki
from fedgex.server.consortium import members
from fedgex.server.consortium.store import (
    Consortium,
    NotFoundError,
)

Ask = Callable[..., Any]


@pytest.fixture
def founded(founded: Consortium, tmp_path: Path) -> Consortium:
    """Return a consortium with one administrator, whose key every kit names."""
    path, asked = members.new_administrator("cy", tmp_path / "cy")
    members.add_administrator(founded, path, asked.fingerprint)
    return founded


def test_the_kit_holds_what_the_hospital_needs_and_no_private_key(
    founded: Consortium, ask: Ask
) -> None:
    asked = ask("north")

    kit = members.add_site(founded, asked.path, asked.fingerprint, name="north")

    assert kit.keys() == {
        "format",
        "consortium",
        "site",
        "server",
        "authority",
        "certificate",
        "administrators",
        "signatures",
        "revoked",
    }
    assert (kit["site"], kit["server"]) == ("north", "fed.example.org:9092")
    certificate = pki.from_pem(kit["certificate"])
    assert pki.verify(certificate, pki.from_pem(kit["authority"]), "site") == "north"
    assert pki.fingerprint(certificate) == pki.fingerprint(asked.key.public_key())
    assert "PRIVATE" not in json.dumps(kit)
    assert founded.sites()["north"].state == "active"


def test_a_fingerprint_may_be_written_with_colons_and_capitals(
    founded: Consortium, ask: Ask
) -> None:
    asked = ask("north")
    spoken = ":".join(asked.fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()

    assert members.add_site(founded, asked.path, spoken)["site"] == "north"


def test_a_wrong_fingerprint_admits_nobody(founded: Consortium, ask: Ask) -> None:
    asked = ask("north")

    with pytest.raises(TrustError, match=r"fingerprint is .* expected the one that"):
        members.add_site(founded, asked.path, "0" * 64)
    assert founded.sites() == {}


def test_a_request_that_was_changed_on_its_way_has_another_fingerprint(
    founded: Consortium, ask: Ask
) -> None:
    asked = ask("north")
    text = asked.path.read_text().replace('"0.1.0"', '"0.1.1"')
    asked.path.write_text(text)

    with pytest.raises(TrustError, match="was changed on its way"):
        members.add_site(founded, asked.path, asked.fingerprint)


def test_all_that_speaks_against_a_request_is_said_at_once(
    admitted: Any, ask: Ask
) -> None:
    known = admitted.consortium.sites()["south"].node_public_key
    asked = ask(
        "north", node_public_key=known, certificate_request="no certificate request"
    )

    with pytest.raises(TrustError) as caught:
        members.add_site(admitted.consortium, asked.path, "ff", name="east")

    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for part, line in zip(
        (
            "fingerprint is",
            'is of "north"; expected "east"',
            'node key is registered already, as that of hospital "south"',
            'a hospital "north" exists already',
            "certificate request cannot be read",
        ),
        lines,
        strict=True,
    ):
        assert part in line


def test_a_signing_key_that_another_hospital_has_is_refused(
    admitted: Any, ask: Ask
) -> None:
    stolen = pki.request(admitted.sites["south"], "east", "site")
    asked = ask("east", certificate_request=stolen)

    with pytest.raises(TrustError, match=r'signing key is registered .* "south"'):
        members.add_site(admitted.consortium, asked.path, asked.fingerprint)


@pytest.mark.parametrize(
    ("name", "role"), [("south", "site"), ("north", "administrator")]
)
def test_a_certificate_request_for_another_name_or_role_is_refused(
    founded: Consortium, ask: Ask, name: str, role: pki.Role
) -> None:
    other = pki.request(pki.new_key(), name, role)
    asked = ask("north", certificate_request=other)

    with pytest.raises(TrustError, match='expected site "north"'):
        members.add_site(founded, asked.path, asked.fingerprint)


def test_a_node_key_of_another_kind_is_refused(founded: Consortium, ask: Ask) -> None:
    asked = ask("north", node_public_key=pki.public_ssh(pki.new_key()))

    with pytest.raises(TrustError, match="expected EC on P-384"):
        members.add_site(founded, asked.path, asked.fingerprint)


def test_a_file_that_is_no_request_is_refused_with_every_missing_key(
    founded: Consortium, tmp_path: Path
) -> None:
    path = tmp_path / "request.json"
    path.write_text('{"name": "north"}')

    with pytest.raises(ConfigError) as caught:
        members.add_site(founded, path, "00")
    assert "certificate_request" in str(caught.value)
    assert "node_public_key" in str(caught.value)


def test_rotation_revokes_the_old_certificate_and_touches_nobody_else(
    admitted: Any, ask: Ask
) -> None:
    consortium = admitted.consortium
    before = consortium.sites()
    files = {p: p.read_bytes() for p in consortium.folder.glob("**/*.crt")}
    new = ask("north")

    kit = members.rotate_site(consortium, "north", new.path, new.fingerprint)

    after, old = consortium.sites(), pki.from_pem(before["north"].certificate)
    assert consortium.revoked() == {old.serial_number}
    assert after["south"] == before["south"]
    assert after["north"].node_public_key != before["north"].node_public_key
    assert kit["certificate"] == after["north"].certificate
    assert {p: p.read_bytes() for p in consortium.folder.glob("**/*.crt")} == files


def test_rotation_wants_new_keys(admitted: Any, ask: Ask) -> None:
    consortium = admitted.consortium
    present = consortium.sites()["north"]
    same = ask("north", node_public_key=present.node_public_key)

    with pytest.raises(TrustError, match=r'node key is registered .* "north"'):
        members.rotate_site(consortium, "north", same.path, same.fingerprint)
    assert consortium.revoked() == set()


def test_renewal_gives_a_new_certificate_over_the_same_keys(admitted: Any) -> None:
    consortium = admitted.consortium
    old = pki.from_pem(consortium.sites()["north"].certificate)

    kit = members.renew_site(consortium, "north")

    new = pki.from_pem(kit["certificate"])
    assert new.serial_number != old.serial_number
    assert pki.fingerprint(new) == pki.fingerprint(old)
    assert consortium.revoked() == set()


def test_revocation_strikes_the_certificates_before_a_renewal_too(
    admitted: Any,
) -> None:
    consortium = admitted.consortium
    first = pki.from_pem(consortium.sites()["north"].certificate)
    second = pki.from_pem(members.renew_site(consortium, "north")["certificate"])

    members.revoke_site(consortium, "north", "left")

    assert consortium.revoked() == {first.serial_number, second.serial_number}


def test_a_revoked_hospital_stays_known_and_comes_back_with_new_keys_only(
    admitted: Any, ask: Ask
) -> None:
    consortium = admitted.consortium
    old = consortium.sites()["north"]

    members.revoke_site(consortium, "north", "left the consortium")

    assert consortium.sites()["north"].state == "revoked"
    with pytest.raises(TrustError, match=r"was revoked \(left the consortium\)"):
        members.renew_site(consortium, "north")
    same = ask("north", node_public_key=old.node_public_key)
    with pytest.raises(TrustError, match="node key is registered already"):
        members.add_site(consortium, same.path, same.fingerprint)
    new = ask("north")
    members.add_site(consortium, new.path, new.fingerprint)
    assert consortium.sites()["north"].state == "active"


def test_a_key_that_was_rotated_away_never_comes_back(admitted: Any, ask: Ask) -> None:
    consortium = admitted.consortium
    lost = consortium.sites()["north"].node_public_key
    new = ask("north")
    members.rotate_site(consortium, "north", new.path, new.fingerprint)
    again = ask("east", node_public_key=lost)

    with pytest.raises(TrustError, match='as that of site "north", revoked'):
        members.add_site(consortium, again.path, again.fingerprint)


def test_an_unknown_hospital_is_not_found_and_the_known_are_listed(
    admitted: Any,
) -> None:
    with pytest.raises(NotFoundError, match=r'no hospital "east".*north, south'):
        members.revoke_site(admitted.consortium, "east", "why")


def test_the_key_of_an_administrator_is_made_where_the_administrator_is(
    founded: Consortium, tmp_path: Path
) -> None:
    path, asked = members.new_administrator("ada", tmp_path / "own")

    certificate = members.add_administrator(founded, path, asked.fingerprint)

    key = pki.load_key(tmp_path / "own" / "ada.key")
    assert founded.administrator(key) == ("ada", certificate)
    assert "PRIVATE" not in path.read_text()


def test_a_second_administrator_of_one_name_is_refused(
    admitted: Any, tmp_path: Path
) -> None:
    path, asked = members.new_administrator("ada", tmp_path / "other")

    with pytest.raises(TrustError, match='administrator "ada" exists already'):
        members.add_administrator(admitted.consortium, path, asked.fingerprint)


def test_a_request_may_replace_only_the_key_that_is_registered(
    admitted: Any, ask: Ask
) -> None:
    consortium = admitted.consortium
    held = pki.from_pem(consortium.site("north").certificate)
    key = pki.new_key()
    statement = pinning.replacement(admitted.sites["north"], held, key)
    asked = ask(
        "north", certificate_request=pki.request(key, "north", "site", statement)
    )

    members.rotate_site(consortium, "north", asked.path, asked.fingerprint)

    now = pki.from_pem(consortium.site("north").certificate)
    pinning.require(now, {"north": pki.fingerprint(held)}, "the contract")
    renewed = members.renew_site(consortium, "north")["certificate"]
    pinning.require(
        pki.from_pem(renewed), {"north": pki.fingerprint(held)}, "the contract"
    )


def test_a_new_hospital_replaces_no_key(admitted: Any, ask: Ask) -> None:
    consortium = admitted.consortium
    old, key = pki.new_key(), pki.new_key()
    asked_old = pki.request(old, "east", "site")
    held = consortium.issue(asked_old, "east", "site")
    statement = pinning.replacement(old, held, key)
    asked = ask("east", certificate_request=pki.request(key, "east", "site", statement))

    with pytest.raises(TrustError, match="expected a request that replaces none"):
        members.add_site(consortium, asked.path, asked.fingerprint)


def test_hospitals_are_admitted_once_enough_administrators_are(
    admitted: Any, ask: Ask
) -> None:
    for name in ("ada", "bo"):
        members.revoke_administrator(admitted.consortium, name, "left")

    asked = ask("east")
    with pytest.raises(ConfigError, match="0 administrators are admitted, and 1 must"):
        members.add_site(admitted.consortium, asked.path, asked.fingerprint)
