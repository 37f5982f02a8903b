"""The file of a bundle: a zip of which every byte follows from names and contents."""

from __future__ import annotations

import filecmp
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedgex.common.errors import FedgexError, TrustError
from fedgex.common.system import files

MEMBER = re.compile(
    r"authority\.crt|(contract|release)\.json|receipts/[0-9]{5,9}\.json"
    r"|orders/[a-z0-9][a-z0-9-]{0,62}\.json"
    r"|checkpoint/((manifest|receipt)\.json|(model|server)\.safetensors)"
)
"""Every name that a member may have."""
MAX_MEMBERS = 20_000
MAX_TEXT_BYTES = 16 * 2**20
"""Of one member that is no safetensors file."""


def pack(members: Mapping[str, Path | bytes], path: Path) -> None:
    """Write a zip of which every byte follows from names and contents."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            content = members[name]
            info = zipfile.ZipInfo(name)  # of 1980-01-01 00:00
            info.create_system, info.external_attr = 3, 0o100644 << 16  # on any system
            if isinstance(content, bytes):
                archive.writestr(info, content)
                continue
            info.file_size = content.stat().st_size
            with content.open("rb") as source, archive.open(info, "w") as file:
                shutil.copyfileobj(source, file)


def unpack(path: Path, folder: Path) -> set[str]:
    """Unpack a bundle into a new folder and return its members' names.

    Raises
    ------
    TrustError
        If its bytes are not exactly those that `pack` writes for its members.
    """
    with _readable(), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _verify_members(members, path.stat().st_size)
        for name in ("checkpoint", "receipts", "orders"):
            (folder / name).mkdir(parents=True)
        for member in members:
            target = folder / member.filename
            with (
                archive.open(member) as source,
                files.explained(target),
                target.open("wb") as file,
            ):
                shutil.copyfileobj(source, file)
    names = {member.filename for member in members}
    again = folder / "again.zip"
    with files.explained(again):
        pack({name: folder / name for name in names}, again)
    if not filecmp.cmp(path, again, shallow=False):
        raise TrustError("it holds bytes that belong to none of its members.")
    again.unlink()
    return names


def members(path: Path) -> list[str]:
    """Return the names of a bundle's members; nothing is verified.

    Raises
    ------
    TrustError
        If the file is no zip.
    """
    with _readable(), zipfile.ZipFile(path) as archive:
        return archive.namelist()


@contextmanager
def _readable() -> Iterator[None]:
    """Refuse what is no bundle, whatever `zipfile` raises of it."""
    try:
        yield
    except FedgexError:
        raise
    except Exception as error:
        raise TrustError(f"it cannot be read as a bundle ({error!s:.200}).") from error


def _verify_members(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse anything but the known members, each once, and of bounded size."""
    names = [member.filename for member in members]
    if len(names) > MAX_MEMBERS:
        raise TrustError(
            f"it has {len(names)} members, expected {MAX_MEMBERS} or fewer."
        )
    strange = [repr(name)[:80] for name in names if not MEMBER.fullmatch(name)]
    twice = [name for name, n in Counter(names).items() if n > 1]
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    great = [
        member.filename
        for member in members
        if member.file_size > MAX_TEXT_BYTES
        and not member.filename.endswith(".safetensors")
    ]
    found = {
        "members that no bundle has": strange,
        "members more than once": twice,
        "compressed members": packed,
        f"members of more than {MAX_TEXT_BYTES} bytes": great,
    }
    wrong = [
        f"{what}: {', '.join(these[:3])}" for what, these in found.items() if these
    ]
    if (total := sum(member.file_size for member in members)) > size:
        wrong.append(f"members of {total} bytes together, in a file of {size}")
    if wrong:
        raise TrustError(f"it holds {'; '.join(wrong)}.")
