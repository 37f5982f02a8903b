"""Keys are made at the hospital; a kit is taken if it answers exactly our request."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedgex.client import identity
from fedgex.client.identity import Identity
from fedgex.client.policy import Policy
from fedgex.client.settings import SiteSettings
from fedgex.common.errors import ConfigError, FedgexError, TrustError
from fedgex.common.trust import audit_log, pki
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.signed import check_signature

Authority = tuple[pki.Key, x509.Certificate]
SERVER = "fedgex.example.org:9092"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return pki.new_authority("oncology")


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    values = {
        "name": "north",
        "policy": Policy.proposed(),
        "server": SERVER,
        "state_dir": tmp_path / "state",
        "data": {"expression": tmp_path / "expression.csv", "scale": "log2p1"},
    }
    return SiteSettings.read(values, "site.toml")


def write_kit(
    folder: Path, authority: Authority, request: Path, /, **other: Any
) -> Path:
    """Write what the administrator returns; `other` replaces its keys."""
    asked = SiteRequest.load(request)
    certificate = pki.issue(
        *authority,
        asked.certificate_request,
        name=asked.name,
        role="site",
        days=365,
    )
    kit = {
        "format": 1,
        "consortium": "oncology",
        "site": asked.name,
        "server": SERVER,
        "authority": pki.to_pem(authority[1]),
        "certificate": pki.to_pem(certificate),
    }
    path = folder / "kit.json"
    path.write_text(json.dumps(kit | other))
    return path


def test_the_request_holds_public_keys_only(settings: SiteSettings) -> None:
    path = identity.create(settings)

    request = json.loads(path.read_text())
    assert sorted(request) == [
        "certificate_request",
        "format",
        "name",
        "node_public_key",
        "version",
    ]
    assert "PRIVATE" not in path.read_text()
    csr = x509.load_pem_x509_csr(request["certificate_request"].encode())
    assert csr.is_signature_valid
    assert csr.subject.rfc4514_string() == "CN=north,OU=site,O=fedgex"


def test_private_keys_are_readable_by_their_owner_only(settings: SiteSettings) -> None:
    identity.create(settings)

    folder = settings.state_dir / "identity"
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("node.key", "site.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_the_node_key_is_the_one_of_the_request_and_on_p384(
    settings: SiteSettings,
) -> None:
    request = SiteRequest.load(identity.create(settings))

    private = (settings.state_dir / "identity/node.key").read_bytes()
    key = load_ssh_private_key(private, None).public_key()
    assert key == load_ssh_public_key(request.node_public_key.encode())
    assert key.curve.name == "secp384r1"  # type: ignore[union-attr]


def test_the_fingerprint_is_that_of_the_canonical_json(settings: SiteSettings) -> None:
    path = identity.create(settings)

    values = json.loads(path.read_text())
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert SiteRequest.load(path).fingerprint == (
        hashlib.sha256(canonical.encode()).hexdigest()
    )


def test_keys_are_never_overwritten(settings: SiteSettings) -> None:
    identity.create(settings)
    before = (settings.state_dir / "identity/site.key").read_bytes()

    with pytest.raises(ConfigError, match="has its keys, and they are never overwrit"):
        identity.create(settings)

    assert (settings.state_dir / "identity/site.key").read_bytes() == before


def test_making_keys_can_be_repeated_after_it_was_cut_off(
    settings: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(identity, "write_atomic", cut_off)
        with pytest.raises(KeyboardInterrupt):
            identity.create(settings)

    assert identity.create(settings).exists()


def test_joining_gives_an_identity_that_signs(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    kit = write_kit(tmp_path, authority, identity.create(settings))

    identity.join(settings, kit)

    ours = Identity.load(settings.state_dir)
    assert (ours.name, ours.consortium, ours.server) == ("north", "oncology", SERVER)
    assert pki.verify(ours.certificate, authority[1], "site") == "north"
    check_signature(ours.certificate, b"a reply", ours.sign(b"a reply"))
    assert ours.node_key_path.exists()
    assert [e["event"] for e in audit_log.read(settings.state_dir / "audit.jsonl")] == [
        "joined"
    ]


def test_a_newer_kit_of_the_same_authority_is_taken(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)
    first = identity.join(settings, write_kit(tmp_path, authority, request))

    second = identity.join(settings, write_kit(tmp_path, authority, request))

    assert first.certificate.serial_number != second.certificate.serial_number
    assert Identity.load(settings.state_dir).certificate == second.certificate


def test_before_joining_there_is_no_identity(settings: SiteSettings) -> None:
    identity.create(settings)

    with pytest.raises(ConfigError, match="has not joined a consortium"):
        Identity.load(settings.state_dir)


def test_joining_without_keys_says_to_make_them(
    settings: SiteSettings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has no keys yet"):
        identity.join(settings, tmp_path / "kit.json")


def refused(settings: SiteSettings, kit: Path) -> str:
    """Return why a kit is refused; nothing of it may have been kept."""
    with pytest.raises(FedgexError) as caught:
        identity.join(settings, kit)
    assert not (settings.state_dir / "identity/kit.json").exists()
    return str(caught.value)


def test_the_kit_of_another_hospital_is_refused(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)

    why = refused(settings, write_kit(tmp_path, authority, request, site="south"))

    assert why == (
        'kit.json is for the hospital "south", and site.toml says "north". Ask the '
        "administrator for the right kit."
    )


def test_a_certificate_of_another_name_is_refused(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)
    key = pki.load_key(settings.state_dir / "identity/site.key")
    csr = pki.request(key, "south", "site")
    south = pki.issue(*authority, csr, name="south", role="site", days=9)

    kit = write_kit(tmp_path, authority, request, certificate=pki.to_pem(south))

    assert 'the certificate is for "south", and this hospital is "north"' in refused(
        settings, kit
    )


def test_a_certificate_for_another_key_is_refused(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)
    csr = pki.request(pki.new_key(), "north", "site")
    other = pki.issue(*authority, csr, name="north", role="site", days=9)

    kit = write_kit(tmp_path, authority, request, certificate=pki.to_pem(other))

    assert "it answers another request. Send the present request.json" in refused(
        settings, kit
    )


def test_a_certificate_of_another_authority_is_refused(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)
    other = pki.to_pem(pki.new_authority("elsewhere")[1])

    kit = write_kit(tmp_path, authority, request, authority=other)

    assert "was not issued by this consortium's authority" in refused(settings, kit)


def test_an_administrators_certificate_does_not_make_a_hospital(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)
    key = pki.load_key(settings.state_dir / "identity/site.key")
    csr = pki.request(key, "north", "administrator")
    made = pki.issue(*authority, csr, name="north", role="administrator", days=9)

    kit = write_kit(tmp_path, authority, request, certificate=pki.to_pem(made))

    assert "expected one for the role site" in refused(settings, kit)


def test_a_kit_for_another_server_is_refused(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)

    why = refused(settings, write_kit(tmp_path, authority, request, server="evil:1"))

    assert why.startswith(
        f"kit.json names the server evil:1, and site.toml says {SERVER}."
    )


def test_the_consortium_cannot_change_under_a_hospitals_feet(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)
    identity.join(settings, write_kit(tmp_path, authority, request))
    kit = write_kit(tmp_path, pki.new_authority("oncology"), request)

    with pytest.raises(TrustError, match="and this hospital joined"):
        identity.join(settings, kit)

    assert Identity.load(settings.state_dir).authority == authority[1]


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_that_is_no_kit_is_refused(
    settings: SiteSettings, tmp_path: Path, text: str
) -> None:
    identity.create(settings)
    (tmp_path / "kit.json").write_text(text)

    assert "expected the administrator's kit" in refused(
        settings, tmp_path / "kit.json"
    )


def test_everything_wrong_with_a_kit_is_told_at_once(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    request = identity.create(settings)

    kit = write_kit(tmp_path, authority, request, server="no port", key="x")

    why = refused(settings, kit)
    assert "kit.json: server: " in why
    assert "kit.json: key: " in why


def test_an_authority_that_is_not_the_kits_is_found(
    settings: SiteSettings, authority: Authority, tmp_path: Path
) -> None:
    identity.join(settings, write_kit(tmp_path, authority, identity.create(settings)))
    other = pki.to_pem(pki.new_authority("oncology")[1])
    (settings.state_dir / "identity" / "authority.crt").write_text(other)

    with pytest.raises(TrustError, match="expected the same"):
        Identity.load(settings.state_dir)
