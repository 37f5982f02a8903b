import socket
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from fedgex.common.errors import ConfigError, TrustError
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import members
from fedgex.server.consortium.store import (
    Consortium,
    ConsortiumSettings,
    NotFoundError,
)


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


def test_a_revoked_administrator_signs_no_more(admitted: Any) -> None:
    consortium = admitted.consortium
    _, certificate = consortium.administrator(admitted.key("ada"))
    signed = Signed("text").signed_by(admitted.key("ada"), certificate)
    assert consortium.signers(signed) == ("ada",)

    members.revoke_administrator(consortium, "ada", "left")

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
    signed = Signed("text").signed_by(admitted.key("ada"), certificate)
    (consortium.folder / "administrators" / "ada.crt").unlink()

    with pytest.raises(TrustError, match="not registered here; expected one of bo"):
        consortium.signers(signed)


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
    members.revoke_site(consortium, "south", "merged")

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
