"""A released model in one file is used whole and unchanged, or not at all."""

from __future__ import annotations

import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedgex.common.errors import TrustError
from fedgex.common.models import checkpoint
from fedgex.common.trust import archive, bundle, pki
from fedgex.common.trust.signed import Signed

Make = Callable[..., Any]


def refusal(path: Path, made: Any) -> str:
    with pytest.raises(TrustError) as error:
        bundle.verify(path, made.authority)
    return str(error.value)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def stored(contents: dict[str, bytes]) -> bytes:
    """Return a zip as docs/bundle.md has it, by APPNOTE.TXT, without zipfile."""
    entries, directory = b"", b""
    for name, content in sorted(contents.items()):
        sizes = struct.pack("<III", zlib.crc32(content), len(content), len(content))
        common = struct.pack("<HHHHH", 20, 0, 0, 0, 0x21) + sizes
        common += struct.pack("<HH", len(name), 0)
        directory += b"PK\1\2" + struct.pack("<H", 0x0314) + common
        directory += struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16, len(entries))
        directory += name.encode()
        entries += b"PK\3\4" + common + name.encode() + content
    n, size, start = len(contents), len(directory), len(entries)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, n, n, size, start, 0)
    return entries + directory + end


# ---- whole ----


def test_a_bundle_says_what_it_is_and_who_released_it(release: Make) -> None:
    made = release()

    found = bundle.verify(made.write(), made.authority)

    assert found.administrators == ("ada", "bo")
    assert found.contract.study.name == "small"
    assert found.release.run == "run-1"
    assert found.release.contract == made.evidence.contract.hash
    assert found.release.last_receipt == made.evidence.receipts[-1].hash
    assert found.release.released == made.evidence.released
    lineage = found.release.lineage
    assert (lineage.rounds, lineage.sites) == (2, {"north": 2, "south": 2})


def test_it_unpacks_to_the_checkpoint_and_leaves_nothing_behind(release: Make) -> None:
    made = release()
    path = made.write()

    with bundle.opened(path, made.authority) as (_, folder):
        for file in made.evidence.checkpoint.iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()
        assert checkpoint.load(folder).round == 2
    assert not folder.parent.exists()


def test_every_byte_of_the_file_follows_from_its_members(release: Make) -> None:
    path = release().write()

    assert path.read_bytes() == stored(members(path))


def test_it_holds_exactly_the_members_of_its_format(release: Make) -> None:
    assert list(members(release().write())) == [
        "authority.crt",
        "checkpoint/manifest.json",
        "checkpoint/model.safetensors",
        "checkpoint/receipt.json",
        "contract.json",
        "orders/ada.json",
        "orders/bo.json",
        "receipts/00001.json",
        "receipts/00002.json",
        "release.json",
    ]


# ---- changed ----


def test_any_changed_byte_is_refused(release: Make) -> None:
    """At random places, most of them in release.json and the zip's directory."""
    made = release()
    path = made.write()
    whole = path.read_bytes()
    rng = random.Random(0)
    start = whole.index(b"release.json") - 30
    places = [
        *rng.sample(range(start), 150),
        *rng.sample(range(start, len(whole)), 450),
    ]

    taken = []
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            bundle.verify(path, made.authority)
        except TrustError:
            continue
        taken.append(place)
    assert taken == []


@pytest.mark.parametrize("keep", [0, 1, 21, 5000, -1])
def test_a_cut_file_is_refused(release: Make, keep: int) -> None:
    made = release()
    path = made.write()
    path.write_bytes(path.read_bytes()[:keep])

    assert "cannot be read as a bundle" in refusal(path, made)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_bytes_around_the_zip_are_refused(release: Make, place: str) -> None:
    made = release()
    path = made.write()
    whole = path.read_bytes()
    path.write_bytes(b"MZ" + whole if place == "before" else whole + b"\0")

    assert refusal(path, made)


@pytest.mark.parametrize(
    "name",
    [
        "authority.crt",
        "checkpoint/model.safetensors",
        "checkpoint/manifest.json",
        "contract.json",
        "orders/bo.json",
        "receipts/00001.json",
        "receipts/00002.json",
        "release.json",
    ],
)
def test_a_removed_member_is_refused_by_its_name(release: Make, name: str) -> None:
    made = release()
    path = made.write()
    contents = members(path)
    del contents[name]
    path.write_bytes(stored(contents))

    assert f"it lacks {name}" in refusal(path, made)


def test_swapped_members_are_refused_by_their_names(release: Make) -> None:
    made = release()
    path = made.write()
    contents = members(path)
    one, two = "receipts/00001.json", "receipts/00002.json"
    path.write_bytes(stored(contents | {one: contents[two], two: contents[one]}))

    assert f"{one}, {two} differ from what release.json says" in refusal(path, made)


def test_another_models_checkpoint_is_refused(release: Make) -> None:
    made = release()
    path = made.write()
    earlier = made.evidence.checkpoint.with_name("00001-pretraining-00001")
    other = {f"checkpoint/{p.name}": p.read_bytes() for p in earlier.iterdir()}
    path.write_bytes(stored(members(path) | other))

    assert "checkpoint/manifest.json, checkpoint/model" in refusal(path, made)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "notes.txt", "checkpoint/x.py", "orders/../x.json", "orders/"],
)
def test_a_member_that_no_bundle_has_is_refused(release: Make, name: str) -> None:
    made = release()
    path = made.write()
    path.write_bytes(stored(members(path) | {name: b"{}"}))

    assert "members that no bundle has" in refusal(path, made)
    assert not (made.folder / "x").exists()


def test_a_member_that_stands_twice_is_refused(release: Make) -> None:
    made = release()
    path = made.write()
    contents = members(path)
    whole = stored(contents | {"orders/zz.json": contents["orders/bo.json"]})
    path.write_bytes(whole.replace(b"orders/zz.json", b"orders/bo.json"))

    assert "members more than once: orders/bo.json" in refusal(path, made)


def test_a_compressed_zip_of_the_same_members_is_refused(release: Make) -> None:
    made = release()
    path = made.write()
    contents = members(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)

    assert "compressed members" in refusal(path, made)


def test_a_great_text_is_refused_before_it_is_unpacked(
    release: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = release()
    path = made.write()
    monkeypatch.setattr(archive, "MAX_TEXT_BYTES", 1000)

    assert "members of more than 1000 bytes: " in refusal(path, made)


def test_what_is_no_bundle_is_refused(release: Make, tmp_path: Path) -> None:
    made = release()
    (tmp_path / "x.fedgex").write_text("hello")

    for name in ("x.fedgex", "absent.fedgex", "run-1"):
        assert "cannot be read as a bundle" in refusal(tmp_path / name, made)


# ---- signed, and still not right ----


def test_a_bundle_of_another_consortium_is_refused(release: Make) -> None:
    path = release().write()
    _, authority = pki.new_authority("alliance")

    with pytest.raises(TrustError, match="it is of another consortium"):
        bundle.verify(path, authority)


def test_too_few_administrators_release_nothing(release: Make) -> None:
    made = release()
    path = made.write(orders={"ada": made.order("ada")})

    found = refusal(path, made)
    assert "1 administrators ordered the release (ada), the contract demands 2" in found


def test_an_administrator_under_two_names_counts_once(release: Make) -> None:
    made = release()
    ada = made.order("ada")

    assert "orders/bo.json is not that admin" in refusal(
        made.write(orders={"ada": ada, "bo": ada}), made
    )


@pytest.mark.parametrize(
    "change",
    [{"model": "0" * 64}, {"subject": "run-2"}, {"administrator": "cy"}],
    ids=["model", "run", "name"],
)
def test_an_order_for_something_else_is_refused(release: Make, change: Any) -> None:
    made = release()
    orders = {"ada": made.order("ada"), "bo": made.order("bo", **change)}

    assert "orders/bo.json is not" in refusal(made.write(orders=orders), made)


def test_an_order_of_another_kind_releases_nothing(release: Make) -> None:
    made = release()
    orders = {"ada": made.order("ada"), "bo": made.order("bo", kind="launch")}

    found = refusal(made.write(orders=orders), made)
    assert "orders/bo.json is no order to release a model" in found


def test_an_order_signed_by_a_site_is_refused(release: Make) -> None:
    made = release()
    bo = made.order("bo", signer=made.issue("bo", "site"))

    found = refusal(made.write(orders={"ada": made.order("ada"), "bo": bo}), made)
    assert "expected one for the role administrator" in found


def test_only_the_coordinator_signs_a_release(release: Make) -> None:
    made = release()
    made.coordinator = made.issue("ada", "administrator")

    assert "expected one for the role coordinator" in refusal(made.write(), made)


def test_a_contract_that_no_administrator_signed_is_refused(release: Make) -> None:
    made = release()
    unsigned = Signed(made.evidence.contract.content)

    assert "contract.json is not signed" in refusal(made.write(contract=unsigned), made)


def test_a_run_without_the_receipt_of_each_round_is_refused(release: Make) -> None:
    made = release()

    found = refusal(made.write(receipts=made.evidence.receipts[:1]), made)
    assert "it holds 1 receipts, expected receipts 1 to 2" in found


def test_receipts_out_of_order_are_refused(release: Make) -> None:
    made = release()

    found = refusal(made.write(receipts=made.evidence.receipts[::-1]), made)
    assert "receipt 1 does not hold" in found


def test_parameters_that_no_receipt_speaks_of_are_refused(release: Make) -> None:
    def change(index: int, values: Any) -> None:
        if index == 2:
            values["outgoing"] = "0" * 64

    made = release(change=change)

    assert "differs from receipts or contract in parameters" in refusal(
        made.write(), made
    )


@pytest.mark.parametrize("what", ["run", "quorum", "site"])
def test_a_round_that_did_not_keep_to_the_contract_is_refused(
    release: Make, what: str
) -> None:
    absent = dict.fromkeys(("patients", "update", "part", "signature", "certificate"))

    def change(index: int, values: Any) -> None:
        if what == "quorum" and index == 1:
            values["sites"]["south"] = absent | {"state": "late", "reason": "late"}
        if what == "site":
            values["sites"]["west"] = absent | {"state": "late", "reason": "late"}

    made = release(change=change)
    path = made.write(run="run-2") if what == "run" else made.write()

    assert "receipt 1 is not of this run, or its round did not" in refusal(path, made)


def test_an_earlier_checkpoint_with_all_receipts_is_refused(release: Make) -> None:
    made = release()
    earlier = made.evidence.checkpoint.with_name("00001-pretraining-00001")
    orders = {
        name: made.order(name, model=checkpoint.digest(earlier / "manifest.json"))
        for name in ("ada", "bo")
    }
    path = made.write(checkpoint=earlier, orders=orders)

    assert "in receipt, parameters, round" in refusal(path, made)


def test_a_release_outlives_the_certificates_that_it_was_signed_with(
    release: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = release()
    path = made.write()
    monkeypatch.setattr(pki, "now", lambda: datetime.now(UTC) + timedelta(days=60))

    assert bundle.verify(path, made.authority).administrators == ("ada", "bo")


def test_a_release_dated_before_its_certificates_is_refused(release: Make) -> None:
    made = release(days_ago=10)

    assert "is valid from" in refusal(made.write(), made)
