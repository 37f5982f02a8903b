import json
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.trust import audit_log, pki
from fedgex.server.consortium import store as module
from fedgex.server.consortium.store import (
    Consortium,
    ConsortiumSettings,
    Expiry,
    NotFoundError,
    new_administrator,
)

Ask = Callable[..., Any]


def test_a_founded_consortium_has_certificates_that_its_authority_signed(
    founded: Consortium,
) -> None:
    again = Consortium(founded.folder)

    server = pki.from_pem(again.server_certificate_path.read_text())
    assert pki.verify(server, again.authority, "server") == "alliance"
    assert pki.verify(again.coordinator, again.authority, "coordinator") == "alliance"
    assert pki.fingerprint(again.coordinator) == pki.fingerprint(
        again.coordinator_key.public_key()
    )


def test_the_servers_certificate_holds_the_host_that_hospitals_call(
    founded: Consortium,
) -> None:
    server = pki.from_pem(founded.server_certificate_path.read_text())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["fed.example.org"]


def test_private_keys_are_readable_by_their_owner_alone(founded: Consortium) -> None:
    modes = {p.name: p.stat().st_mode & 0o777 for p in founded.folder.glob("pki/*.key")}

    assert modes == {f"{n}.key": 0o600 for n in ("authority", "server", "coordinator")}


def test_an_authority_is_never_overwritten(founded: Consortium) -> None:
    before = (founded.folder / "pki" / "authority.key").read_bytes()

    with pytest.raises(ConfigError, match="never overwritten"):
        Consortium.init(founded.folder, founded.settings)
    assert (founded.folder / "pki" / "authority.key").read_bytes() == before


def test_a_folder_without_a_consortium_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"holds no consortium\.toml"):
        Consortium(tmp_path)


def test_every_wrong_setting_is_named_at_once() -> None:
    values = {"name": "Alliance", "host": "a b", "port": 70000}

    with pytest.raises(ConfigError) as caught:
        ConsortiumSettings.read(values, "test")

    assert [line.split(":")[1].strip() for line in str(caught.value).splitlines()] == [
        "name",
        "host",
        "port",
    ]


def test_two_services_cannot_have_one_port() -> None:
    values = {"name": "a", "host": "h", "port": 9000, "control_port": 9000}

    with pytest.raises(ConfigError, match="must differ"):
        ConsortiumSettings.read(values, "test")


def test_the_kit_holds_what_the_hospital_needs_and_no_private_key(
    founded: Consortium, ask: Ask
) -> None:
    asked = ask("north")

    kit = founded.add_site(asked.path, asked.fingerprint, name="north")

    assert kit.keys() == {
        "format",
        "consortium",
        "site",
        "server",
        "authority",
        "certificate",
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

    assert founded.add_site(asked.path, spoken)["site"] == "north"


def test_a_wrong_fingerprint_admits_nobody(founded: Consortium, ask: Ask) -> None:
    asked = ask("north")

    with pytest.raises(TrustError, match=r"fingerprint is .* expected the one that"):
        founded.add_site(asked.path, "0" * 64)
    assert founded.sites() == {}


def test_a_request_that_was_changed_on_its_way_has_another_fingerprint(
    founded: Consortium, ask: Ask
) -> None:
    asked = ask("north")
    text = asked.path.read_text().replace('"0.1.0"', '"0.1.1"')
    asked.path.write_text(text)

    with pytest.raises(TrustError, match="was changed on its way"):
        founded.add_site(asked.path, asked.fingerprint)


def test_all_that_speaks_against_a_request_is_said_at_once(
    admitted: Any, ask: Ask
) -> None:
    known = admitted.consortium.sites()["south"].node_public_key
    asked = ask(
        "north", node_public_key=known, certificate_request="no certificate request"
    )

    with pytest.raises(TrustError) as caught:
        admitted.consortium.add_site(asked.path, "ff", name="east")

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
        admitted.consortium.add_site(asked.path, asked.fingerprint)


@pytest.mark.parametrize(
    ("name", "role"), [("south", "site"), ("north", "administrator")]
)
def test_a_certificate_request_for_another_name_or_role_is_refused(
    founded: Consortium, ask: Ask, name: str, role: pki.Role
) -> None:
    other = pki.request(pki.new_key(), name, role)
    asked = ask("north", certificate_request=other)

    with pytest.raises(TrustError, match='expected site "north"'):
        founded.add_site(asked.path, asked.fingerprint)


def test_a_node_key_of_another_kind_is_refused(founded: Consortium, ask: Ask) -> None:
    asked = ask("north", node_public_key=pki.public_ssh(pki.new_key()))

    with pytest.raises(TrustError, match="expected EC on P-384"):
        founded.add_site(asked.path, asked.fingerprint)


def test_a_file_that_is_no_request_is_refused_with_every_missing_key(
    founded: Consortium, tmp_path: Path
) -> None:
    path = tmp_path / "request.json"
    path.write_text('{"name": "north"}')

    with pytest.raises(ConfigError) as caught:
        founded.add_site(path, "00")
    assert "certificate_request" in str(caught.value)
    assert "node_public_key" in str(caught.value)


def test_rotation_revokes_the_old_certificate_and_touches_nobody_else(
    admitted: Any, ask: Ask
) -> None:
    consortium = admitted.consortium
    before = consortium.sites()
    files = {p: p.read_bytes() for p in consortium.folder.glob("**/*.crt")}
    new = ask("north")

    kit = consortium.rotate_site("north", new.path, new.fingerprint)

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
        consortium.rotate_site("north", same.path, same.fingerprint)
    assert consortium.revoked() == set()


def test_renewal_gives_a_new_certificate_over_the_same_keys(admitted: Any) -> None:
    consortium = admitted.consortium
    old = pki.from_pem(consortium.sites()["north"].certificate)

    kit = consortium.renew_site("north")

    new = pki.from_pem(kit["certificate"])
    assert new.serial_number != old.serial_number
    assert pki.fingerprint(new) == pki.fingerprint(old)
    assert consortium.revoked() == set()


def test_revocation_strikes_the_certificates_before_a_renewal_too(
    admitted: Any,
) -> None:
    consortium = admitted.consortium
    first = pki.from_pem(consortium.sites()["north"].certificate)
    second = pki.from_pem(consortium.renew_site("north")["certificate"])

    consortium.revoke_site("north", "left")

    assert consortium.revoked() == {first.serial_number, second.serial_number}


def test_a_revoked_hospital_stays_known_and_comes_back_with_new_keys_only(
    admitted: Any, ask: Ask
) -> None:
    consortium = admitted.consortium
    old = consortium.sites()["north"]

    consortium.revoke_site("north", "left the consortium")

    assert consortium.sites()["north"].state == "revoked"
    with pytest.raises(TrustError, match=r"was revoked \(left the consortium\)"):
        consortium.renew_site("north")
    same = ask("north", node_public_key=old.node_public_key)
    with pytest.raises(TrustError, match="node key is registered already"):
        consortium.add_site(same.path, same.fingerprint)
    new = ask("north")
    consortium.add_site(new.path, new.fingerprint)
    assert consortium.sites()["north"].state == "active"


def test_a_key_that_was_rotated_away_never_comes_back(admitted: Any, ask: Ask) -> None:
    consortium = admitted.consortium
    lost = consortium.sites()["north"].node_public_key
    new = ask("north")
    consortium.rotate_site("north", new.path, new.fingerprint)
    again = ask("east", node_public_key=lost)

    with pytest.raises(TrustError, match='as that of site "north", revoked'):
        consortium.add_site(again.path, again.fingerprint)


def test_an_unknown_hospital_is_not_found_and_the_known_are_listed(
    admitted: Any,
) -> None:
    with pytest.raises(NotFoundError, match=r'no hospital "east".*north, south'):
        admitted.consortium.revoke_site("east", "why")


def test_the_key_of_an_administrator_is_made_where_the_administrator_is(
    founded: Consortium, tmp_path: Path
) -> None:
    path, asked = new_administrator("ada", tmp_path / "own")

    certificate = founded.add_administrator(path, asked.fingerprint)

    key = pki.load_key(tmp_path / "own" / "ada.key")
    assert founded.administrator(key) == ("ada", certificate)
    assert "PRIVATE" not in path.read_text()


def test_a_second_administrator_of_one_name_is_refused(
    admitted: Any, tmp_path: Path
) -> None:
    path, asked = new_administrator("ada", tmp_path / "other")

    with pytest.raises(TrustError, match='administrator "ada" exists already'):
        admitted.consortium.add_administrator(path, asked.fingerprint)


def test_a_revoked_administrator_signs_no_more(admitted: Any) -> None:
    consortium = admitted.consortium
    _, certificate = consortium.administrator(admitted.key("ada"))
    signed = pki.Signed("text").signed_by(admitted.key("ada"), certificate)
    assert consortium.signers(signed) == ("ada",)

    consortium.revoke_administrator("ada", "left")

    with pytest.raises(TrustError, match="was revoked"):
        consortium.signers(signed)
    with pytest.raises(TrustError, match="is no administrator's of alliance"):
        consortium.administrator(admitted.key("ada"))
    assert list(consortium.administrators()) == ["bo"]


def test_a_certificate_of_the_authority_that_nobody_registered_signs_nothing(
    admitted: Any,
) -> None:
    consortium = admitted.consortium
    _, certificate = consortium.administrator(admitted.key("ada"))
    signed = pki.Signed("text").signed_by(admitted.key("ada"), certificate)
    (consortium.folder / "administrators" / "ada.crt").unlink()

    with pytest.raises(TrustError, match="not registered here; expected one of bo"):
        consortium.signers(signed)


def test_certificates_are_warned_of_thirty_days_before_their_end(
    admitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    consortium = admitted.consortium
    assert consortium.expiries() == ()

    later = datetime.now(UTC) + timedelta(days=module.VALID_DAYS - 29)
    monkeypatch.setattr(module, "_now", lambda: later)

    roles = sorted((each.role, each.name) for each in consortium.expiries())
    assert roles == [
        ("administrator", "ada"),
        ("administrator", "bo"),
        ("coordinator", "alliance"),
        ("server", "alliance"),
        ("site", "north"),
        ("site", "south"),
    ]


def test_a_warning_says_what_to_do() -> None:
    ended = Expiry("north", "site", datetime(2020, 1, 1, tzinfo=UTC))

    assert 'the certificate of site "north" expired on 2020-01-01' in str(ended)
    assert "fedgex-admin site renew north" in str(ended)


def test_renewing_the_servers_certificates_keeps_keys_and_kits(
    admitted: Any,
) -> None:
    consortium = admitted.consortium
    before, sites = consortium.coordinator, consortium.sites()

    consortium.renew()

    assert consortium.coordinator.serial_number != before.serial_number
    assert pki.fingerprint(consortium.coordinator) == pki.fingerprint(before)
    assert consortium.sites() == sites


def test_every_change_stands_in_the_audit_log(admitted: Any) -> None:
    consortium = admitted.consortium
    consortium.revoke_site("south", "merged")

    path = consortium.folder / "audit.jsonl"
    audit_log.verify(path)
    events = [line["event"] for line in audit_log.read(path)]
    assert events == [
        "consortium-founded",
        "server-certificates-issued",
        "administrator-added",
        "administrator-added",
        "site-added",
        "site-added",
        "site-revoked",
    ]


def test_a_consortium_is_served_while_something_answers_on_its_health_port(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        settings = ConsortiumSettings(name="a", host="h", health_port=port)
        consortium = Consortium.init(tmp_path / "state", settings)
        assert consortium.is_served()

    assert not consortium.is_served()
