"""Keys, certificates and signatures: what is trusted, and what is refused and why."""

import base64
import dataclasses
import hashlib
import json
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedgex.common.errors import TrustError
from fedgex.common.trust import pki
from fedgex.common.trust.signed import Signed, check_signature, sign

AUTHORITY_KEY, AUTHORITY = pki.new_authority("consortium")
NOW = datetime.now(UTC)


def certificate(
    key: pki.Key, name: str = "north", role: pki.Role = "site", days: int = 90
) -> x509.Certificate:
    return pki.issue(
        AUTHORITY_KEY,
        AUTHORITY,
        pki.request(key, name, role),
        name=name,
        role=role,
        days=days,
    )


KEY = pki.new_key()
CERTIFICATE = certificate(KEY)


def refusal(*arguments, **settings) -> str:
    with pytest.raises(TrustError) as error:
        pki.verify(*arguments, **settings)
    return str(error.value)


# ---- keys ----


def test_a_saved_key_is_read_back_and_readable_by_its_owner_alone(tmp_path: Path):
    pki.save_key(KEY, tmp_path / "site.key")

    found = pki.load_key(tmp_path / "site.key")

    assert found.private_numbers() == KEY.private_numbers()
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("save", [pki.save_key, pki.save_node_key])
def test_a_key_is_never_overwritten(save, tmp_path: Path):
    path = tmp_path / "a.key"
    save(KEY, path)
    before = path.read_bytes()

    with pytest.raises(TrustError, match="exists already"):
        save(pki.new_key(), path)

    assert path.read_bytes() == before


def test_a_node_key_is_what_flower_reads_and_its_public_half_fits(tmp_path: Path):
    key = pki.new_node_key()
    pki.save_node_key(key, tmp_path / "node.key")

    content = (tmp_path / "node.key").read_bytes()
    found = serialization.load_ssh_private_key(content, password=None)
    public = serialization.load_ssh_public_key(pki.public_ssh(key).encode())

    assert content.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert isinstance(found, ec.EllipticCurvePrivateKey)
    assert isinstance(found.curve, ec.SECP384R1)
    assert found.public_key() == public


def pem(key, encryption=None) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"", "holds no unencrypted private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "holds no"),
        (
            pem(KEY, serialization.BestAvailableEncryption(b"secret")),
            "holds no unencrypted private key",
        ),
        (pem(rsa.generate_private_key(65537, 1024)), "of another kind"),
        (pem(pki.new_node_key()), "of another kind"),
    ],
    ids=["absent", "empty", "torn", "encrypted", "rsa", "p384"],
)
def test_a_file_that_is_no_key_is_refused_by_its_path(content, reason, tmp_path: Path):
    path = tmp_path / "site.key"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(TrustError, match=reason) as error:
        pki.load_key(path)

    assert str(path) in str(error.value)


def test_the_fingerprint_is_the_hash_of_the_public_key_in_der():
    der = KEY.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    assert pki.fingerprint(KEY.public_key()) == hashlib.sha256(der).hexdigest()
    assert pki.fingerprint(CERTIFICATE) == pki.fingerprint(KEY.public_key())


# ---- certificates ----


@pytest.mark.parametrize("role", ["server", "coordinator", "administrator", "site"])
def test_an_issued_certificate_is_trusted_for_its_role_and_no_other(role):
    found = certificate(pki.new_key(), "someone", role)

    assert pki.verify(found, AUTHORITY, role) == "someone"
    for other in {"server", "coordinator", "administrator", "site"} - {role}:
        message = refusal(found, AUTHORITY, other)
        assert f'is for {role} "someone"; expected one for the role {other}' in message


def test_a_certificate_survives_its_text():
    assert pki.from_pem(pki.to_pem(CERTIFICATE)) == CERTIFICATE
    with pytest.raises(TrustError, match="cannot be read"):
        pki.from_pem("north")


def test_a_certificate_of_another_authority_of_the_same_name_is_refused():
    _, other = pki.new_authority("consortium")

    message = refusal(CERTIFICATE, other, "site")

    assert "was not issued by this consortium's authority" in message
    assert pki.fingerprint(other)[:16] in message


def test_a_site_cannot_issue_certificates():
    forged = pki.issue(
        KEY,
        CERTIFICATE,
        pki.request(pki.new_key(), "anna", "administrator"),
        name="anna",
        role="administrator",
        days=9,
    )

    assert "was not issued" in refusal(forged, AUTHORITY, "administrator")


def test_a_certificate_is_valid_from_before_its_making_until_its_end():
    last = CERTIFICATE.not_valid_after_utc

    assert abs(last - NOW - timedelta(days=90)) < timedelta(minutes=1)
    pki.verify(CERTIFICATE, AUTHORITY, "site", at=NOW - timedelta(days=1))
    pki.verify(CERTIFICATE, AUTHORITY, "site", at=last)
    after, before = last + timedelta(seconds=1), NOW - timedelta(days=3)
    assert "expired on" in refusal(CERTIFICATE, AUTHORITY, "site", at=after)
    early = refusal(CERTIFICATE, AUTHORITY, "site", at=before)
    assert "is valid from" in early
    assert "clock" in early


def test_no_certificate_outlives_its_authority():
    key, authority = pki.new_authority("short", days=3)
    csr = pki.request(KEY, "north", "site")

    found = pki.issue(key, authority, csr, name="north", role="site", days=90)

    assert found.not_valid_after_utc == authority.not_valid_after_utc


def test_a_certificate_of_an_expired_authority_is_refused_by_its_name():
    later = AUTHORITY.not_valid_after_utc + timedelta(days=1)

    message = refusal(CERTIFICATE, AUTHORITY, "site", at=later)

    assert "the certificate of consortium expired" in message


def test_a_revoked_certificate_is_refused_and_another_of_that_site_is_not():
    rotated = certificate(pki.new_key())

    message = refusal(
        CERTIFICATE, AUTHORITY, "site", revoked={CERTIFICATE.serial_number}
    )

    assert 'site "north"' in message
    assert "was revoked" in message
    pki.verify(rotated, AUTHORITY, "site", revoked={CERTIFICATE.serial_number})


@pytest.mark.parametrize(
    ("name", "role", "found"),
    [("south", "site", 'site "north"'), ("north", "administrator", 'site "north"')],
)
def test_a_request_is_granted_only_for_the_name_and_role_that_it_asks_for(
    name, role, found
):
    with pytest.raises(TrustError, match=f"request is for {found}") as error:
        pki.issue(
            AUTHORITY_KEY,
            AUTHORITY,
            pki.request(KEY, "north", "site"),
            name=name,
            role=role,
            days=9,
        )

    assert f'expected {role} "{name}"' in str(error.value)


def test_a_request_with_two_roles_is_refused():
    both = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, "north"),
            x509.NameAttribute(x509.NameOID.ORGANIZATIONAL_UNIT_NAME, "site"),
            x509.NameAttribute(x509.NameOID.ORGANIZATIONAL_UNIT_NAME, "administrator"),
        ]
    )
    made = x509.CertificateSigningRequestBuilder().subject_name(both)
    csr = made.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    with pytest.raises(TrustError, match="no role"):
        pki.issue(
            AUTHORITY_KEY, AUTHORITY, csr.decode(), name="north", role="site", days=9
        )


def changed_request() -> str:
    """Return a request whose last byte, of its signature, is another."""
    made = x509.load_pem_x509_csr(pki.request(KEY, "north", "site").encode())
    der = bytearray(made.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return (
        x509.load_der_x509_csr(bytes(der))
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


@pytest.mark.parametrize(
    ("csr", "reason"),
    [
        ("", "cannot be read"),
        (changed_request(), "was changed"),
        (pki.request(pki.new_node_key(), "north", "site"), "another kind of key"),
    ],
    ids=["empty", "changed", "p384"],
)
def test_an_unusable_request_is_refused(csr, reason):
    with pytest.raises(TrustError, match=reason):
        pki.issue(AUTHORITY_KEY, AUTHORITY, csr, name="north", role="site", days=9)


def test_a_server_is_named_by_dns_and_by_address_and_nobody_else_can_be_a_server():
    csr = pki.request(KEY, "coordinator", "server")

    server = pki.issue(
        AUTHORITY_KEY,
        AUTHORITY,
        csr,
        name="coordinator",
        role="server",
        days=9,
        hosts=["fl.example.org", "127.0.0.1"],
    )

    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    addresses = names.value.get_values_for_type(x509.IPAddress)
    assert [str(each) for each in addresses] == ["127.0.0.1"]
    for_tls = x509.ExtendedKeyUsageOID.SERVER_AUTH
    for found, expected in ((server, True), (CERTIFICATE, False)):
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (for_tls in usage) is expected


# ---- signatures ----


def test_a_signature_holds_for_these_bytes_and_this_key_alone():
    signature = sign(KEY, b"content")

    check_signature(CERTIFICATE, b"content", signature)
    for holder, content in (
        (CERTIFICATE, b"Content"),
        (certificate(pki.new_key()), b"content"),
    ):
        with pytest.raises(TrustError, match="does not fit"):
            check_signature(holder, content, signature)


@pytest.mark.parametrize("signature", ["", "?", "é", base64.b64encode(b"x").decode()])
def test_what_is_no_signature_does_not_hold(signature):
    with pytest.raises(TrustError, match="does not fit"):
        check_signature(CERTIFICATE, b"content", signature)


ANNA_KEY, BERT_KEY = pki.new_key(), pki.new_key()
ANNA = certificate(ANNA_KEY, "anna", "administrator")
BERT = certificate(BERT_KEY, "bert", "administrator")
TEXT = "Zweck = 'ä'\r\n"
BOTH = Signed(TEXT).signed_by(ANNA_KEY, ANNA).signed_by(BERT_KEY, BERT)


def test_the_hash_is_that_of_the_bytes_and_signatures_do_not_change_it():
    expected = hashlib.sha256(TEXT.encode()).hexdigest()

    assert Signed(TEXT).hash == BOTH.hash == expected


def test_a_document_names_its_signers_in_order_each_once():
    again = BOTH.signed_by(BERT_KEY, BERT)
    copied = dataclasses.replace(BOTH, signatures=BOTH.signatures * 2)

    assert BOTH.signers(AUTHORITY, "administrator") == ("anna", "bert")
    assert again.signers(AUTHORITY, "administrator") == ("anna", "bert")
    assert copied.signers(AUTHORITY, "administrator") == ("anna", "bert")
    assert Signed(TEXT).signers(AUTHORITY, "administrator") == ()


def test_a_document_survives_its_text_which_is_canonical():
    text = BOTH.to_json()

    assert Signed.from_json(text, "test") == BOTH
    values = json.loads(text)
    assert text == json.dumps(values, sort_keys=True, separators=(",", ":"))


def test_one_bad_signature_spoils_the_document():
    other_text = dataclasses.replace(BOTH, content=TEXT + " ")
    stolen_name = dataclasses.replace(
        BOTH, signatures=(dataclasses.replace(BOTH.signatures[0], name="bert"),)
    )
    by_a_site = BOTH.signed_by(KEY, CERTIFICATE)

    for document, reason in (
        (other_text, "does not fit"),
        (stolen_name, 'says to be of "bert", its certificate is of "anna"'),
        (by_a_site, 'is for site "north"'),
    ):
        with pytest.raises(TrustError, match=reason):
            document.signers(AUTHORITY, "administrator")


def test_signers_are_verified_for_the_time_and_the_revocations_given():
    late = ANNA.not_valid_after_utc + timedelta(days=1)

    with pytest.raises(TrustError, match="expired"):
        BOTH.signers(AUTHORITY, "administrator", at=late)
    with pytest.raises(TrustError, match="revoked"):
        BOTH.signers(AUTHORITY, "administrator", revoked={BERT.serial_number})


def test_nobody_signs_with_a_certificate_that_is_not_theirs():
    with pytest.raises(TrustError, match="not that of anna's certificate"):
        Signed(TEXT).signed_by(BERT_KEY, ANNA)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"content": 3, "signatures": []}',
        '{"content": "a", "signatures": [{"name": "b"}]}',
        '{"content": "a", "signatures": [], "more": 1}',
        '{"content": "\\ud800", "signatures": []}',
        "[" * 100_000,
    ],
    ids=["empty", "list", "number", "unsigned", "more", "surrogate", "deep"],
)
def test_text_that_is_no_document_is_refused_by_its_source(text):
    with pytest.raises(TrustError, match=r"kit\.json is no signed document"):
        Signed.from_json(text, "kit.json")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_certificate_and_the_signature(tmp_path: Path):
    first = BOTH.signatures[0]
    public = ANNA.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for name, content in {
        "authority.crt": pki.to_pem(AUTHORITY).encode(),
        "signer.crt": first.certificate.encode(),
        "signer.pub": public,
        "signature": base64.b64decode(first.signature),
        "contract.toml": TEXT.encode(),
    }.items():
        (tmp_path / name).write_bytes(content)

    def openssl(command: str) -> str:
        done = subprocess.run(
            ["openssl", *command.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert "OK" in openssl("verify -x509_strict -CAfile authority.crt signer.crt")
    assert "Verified OK" in openssl(
        "dgst -sha256 -verify signer.pub -signature signature contract.toml"
    )
    subject = openssl("x509 -in signer.crt -noout -subject -nameopt RFC2253")
    assert "CN=anna,OU=administrator,O=fedgex" in subject
