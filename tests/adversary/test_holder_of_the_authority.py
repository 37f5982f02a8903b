"""A coordinator with the authority's key names administrators, and hides who left.

The hospital north has joined; kits, certificates and lists are the commands' own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedgex.client import identity
from fedgex.client.admission.approvals import ApprovalStore, Received, Refusal
from fedgex.client.identity import Identity
from fedgex.client.policy import TEMPLATE
from fedgex.client.settings import SiteSettings
from fedgex.common.codes import Code
from fedgex.common.errors import TrustError
from fedgex.common.trust import audit_log, pki, revocation
from fedgex.common.trust.enrolment import SiteRequest
from fedgex.common.trust.signed import Signed
from fedgex.server.consortium import members
from fedgex.server.consortium.store import Consortium, ConsortiumSettings

from ..support.hospital import CONTRACT


@dataclass
class Joined:
    """A consortium with administrators ada and bo, whose two signatures it wants."""

    folder: Path
    settings: SiteSettings

    @property
    def consortium(self) -> Consortium:
        return Consortium(self.folder / "server")

    def administrator(self, name: str) -> pki.Key:
        """Admit an administrator as its holder would, and return the key."""
        path, asked = members.new_administrator(name, self.folder / name)
        members.add_administrator(self.consortium, path, asked.fingerprint)
        return pki.load_key(self.folder / name / f"{name}.key")

    def sign(self, *names: str, text: str = CONTRACT) -> Signed:
        signed = Signed(text)
        for name in names:
            key = pki.load_key(self.folder / name / f"{name}.key")
            certificate = self.consortium.administrators()[name]
            signed = signed.signed_by(key, certificate)
        return signed

    def receive(self, signed: Signed) -> Received:
        return ApprovalStore.of(self.settings).receive(signed)

    def kit(self) -> Path:
        """Return a new kit, as the coordinator makes it now."""
        path = self.folder / "north.kit.json"
        path.write_text(json.dumps(members.renew_site(self.consortium, "north")))
        return path

    def revoked(self, *serials: int, day: int = 0) -> str:
        """Return a list that the authority signed so many days from now."""
        consortium, now = self.consortium, pki.now() + timedelta(days=day)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pki, "now", lambda: now)
            return revocation.new_list(
                consortium.authority_key,
                consortium.authority,
                [(serial, now) for serial in serials],
            )


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("holder") / "begun"
    values: dict[str, Any] = {"name": "alliance", "host": "fed.example.org"}
    Consortium.init(folder / "server", ConsortiumSettings(**values, signatures=2))
    (folder / "policy.toml").write_text(TEMPLATE)
    hospital = at(folder)
    for name in ("ada", "bo"):
        hospital.administrator(name)
    request = identity.create(hospital.settings)
    spoken = SiteRequest.load(request).fingerprint
    kit = folder / "kit.json"
    made = members.add_site(hospital.consortium, request, spoken)
    kit.write_text(json.dumps(made))
    identity.join(hospital.settings, kit)
    return folder


def at(folder: Path) -> Joined:
    (folder / "site.toml").write_text(
        'name = "north"\ndata.expression = "absent.csv"\ndata.scale = "log2p1"\n'
    )
    return Joined(folder, SiteSettings.load(folder / "site.toml"))


@pytest.fixture
def north(begun: Path, tmp_path: Path) -> Joined:
    shutil.copytree(begun, tmp_path / "north")
    return at(tmp_path / "north")


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as refused:
        call()
    return refused.value.code


# ---- administrators ----


def test_a_contract_counts_with_as_many_signatures_as_the_kit_says(
    north: Joined,
) -> None:
    assert north.receive(north.sign("ada", "bo")).signers == ("ada", "bo")
    one = north.sign("ada", text=CONTRACT + "# once more\n")
    assert code_of(lambda: north.receive(one)) == Code.NOT_PINNED


def test_an_administrator_of_the_coordinators_own_making_counts_nothing(
    north: Joined,
) -> None:
    north.administrator("eve")

    signed = north.sign("ada", "eve")

    assert code_of(lambda: north.receive(signed)) == Code.NOT_PINNED


def test_another_key_under_an_administrators_name_counts_nothing(
    north: Joined,
) -> None:
    key = pki.new_key()
    asked = pki.request(key, "bo", "administrator")
    forged = north.consortium.issue(asked, "bo", "administrator")

    signed = north.sign("ada").signed_by(key, forged)

    assert code_of(lambda: north.receive(signed)) == Code.NOT_PINNED


def test_a_renewed_certificate_of_an_administrator_counts_as_before(
    north: Joined,
) -> None:
    members.renew_administrator(north.consortium, "bo")

    assert north.receive(north.sign("ada", "bo")).signers == ("ada", "bo")


def test_a_kit_with_other_administrators_needs_the_operators_word(
    north: Joined,
) -> None:
    north.administrator("eve")
    kit = north.kit()

    with pytest.raises(TrustError, match=r"Before: 2 of ada \w+, bo \w+\. In .* eve"):
        identity.join(north.settings, kit)
    signed = north.sign("ada", "eve")
    assert code_of(lambda: north.receive(signed)) == Code.NOT_PINNED

    identity.join(north.settings, kit, administrators_changed=True)
    assert north.receive(signed).signers == ("ada", "eve")
    joined = audit_log.read(north.settings.state_dir / "audit.jsonl")[-2]
    assert sorted(joined["administrators"]) == ["ada", "bo", "eve"]


@pytest.mark.parametrize("values", [{"signatures": 1}, {"administrators": {}}])
def test_a_kit_that_asks_for_less_needs_the_operators_word(
    north: Joined, values: dict[str, Any]
) -> None:
    kit = north.kit()
    kit.write_text(json.dumps(json.loads(kit.read_text()) | values))

    with pytest.raises(TrustError, match=r"names (other|no) administrators"):
        identity.join(north.settings, kit)


def test_a_hospital_that_joined_before_goes_on_and_its_next_kit_pins(
    north: Joined,
) -> None:
    path = north.settings.state_dir / "identity" / "kit.json"
    values = json.loads(path.read_text())
    old = {k: v for k, v in values.items() if k not in ("administrators", "signatures")}
    path.write_text(json.dumps(old))
    assert north.receive(north.sign("ada")).signers == ("ada",)
    assert "not pinned" in ApprovalStore.of(north.settings).administrators

    identity.join(north.settings, north.kit())

    again = north.sign("ada", text=CONTRACT + "# once more\n")
    assert code_of(lambda: north.receive(again)) == Code.NOT_PINNED


# ---- revocations ----


def serial(north: Joined, name: str) -> int:
    return north.consortium.administrators()[name].serial_number


def test_a_revoked_administrator_counts_nothing_here_either(north: Joined) -> None:
    signed = north.sign("ada", "bo")
    received = north.receive(signed)
    members.revoke_administrator(north.consortium, "bo", "left")

    listed = north.revoked(*north.consortium.revoked(), day=1)
    identity.keep_revocations(north.settings.state_dir, listed)

    assert code_of(lambda: north.receive(signed)) == Code.UNTRUSTED
    approvals = ApprovalStore.of(north.settings)
    assert code_of(lambda: approvals.contract(received.hash)) == Code.UNTRUSTED


def test_a_list_that_the_authority_did_not_sign_is_refused(north: Joined) -> None:
    key, authority = pki.new_authority("alliance")
    forged = revocation.new_list(key, authority, [(serial(north, "ada"), pki.now())])

    with pytest.raises(TrustError, match="not signed by this consortium"):
        identity.keep_revocations(north.settings.state_dir, forged)
    with pytest.raises(TrustError, match="cannot be read"):
        identity.keep_revocations(north.settings.state_dir, "no list")


def test_an_older_list_does_not_take_the_place_of_a_newer_one(north: Joined) -> None:
    older, newer = north.revoked(day=1), north.revoked(serial(north, "bo"), day=2)
    state = north.settings.state_dir
    identity.keep_revocations(state, newer)

    identity.keep_revocations(state, older)

    assert Identity.load(state).revoked == {serial(north, "bo")}


def test_a_newer_list_cannot_forget_a_revocation(north: Joined) -> None:
    state = north.settings.state_dir
    identity.keep_revocations(state, north.revoked(serial(north, "bo"), day=1))

    with pytest.raises(TrustError, match="nothing is taken back"):
        identity.keep_revocations(state, north.revoked(day=2))

    assert Identity.load(state).revoked == {serial(north, "bo")}


# ---- the authority's key is elsewhere ----


def test_what_admits_or_revokes_changes_nothing_without_the_authoritys_medium(
    north: Joined,
) -> None:
    consortium = north.consortium
    apart = north.folder / "medium"
    apart.mkdir()
    shutil.move(consortium.folder / "pki" / "authority.key", apart)
    before = {p: p.read_bytes() for p in consortium.folder.rglob("*") if p.is_file()}

    for change in (
        lambda: consortium.renew(),
        lambda: members.renew_site(consortium, "north"),
        lambda: members.revoke_site(consortium, "north", "left"),
        lambda: members.renew_administrator(consortium, "ada"),
        lambda: members.revoke_administrator(consortium, "ada", "left"),
    ):
        with pytest.raises(TrustError, match="Put its medium in place"):
            change()

    del before[consortium.folder / "registry.lock"]
    assert {p: p.read_bytes() for p in before} == before
    members.renew_site(Consortium(consortium.folder, apart), "north")


def test_a_key_of_another_authority_signs_nothing(north: Joined) -> None:
    consortium = north.consortium
    path = consortium.folder / "pki" / "authority.key"
    path.unlink()
    pki.save_key(pki.new_key(), path)

    with pytest.raises(TrustError, match="another authority"):
        members.renew_site(consortium, "north")


def test_a_consortium_is_founded_with_its_key_on_a_medium(tmp_path: Path) -> None:
    settings = ConsortiumSettings(
        name="alliance", host="fed.example.org", authority_dir=str(tmp_path / "medium")
    )

    founded = Consortium.init(tmp_path / "server", settings)

    assert (tmp_path / "medium" / "authority.key").exists()
    assert not (founded.folder / "pki" / "authority.key").exists()
    assert Consortium(founded.folder).authority_dir == tmp_path / "medium"
