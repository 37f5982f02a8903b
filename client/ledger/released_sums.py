"""Sums over patients that left this hospital, in all its contracts and runs.

Two sums of one gene over cohorts that differ by a patient give that patient's value. So
of each sum that leaves, the cohort stays here, under keyed names, and the sum. A new
one leaves if its cohort equals each old one, or differs from it by the floor or more;
otherwise the old sum is sent again, which reveals nothing new.

What follows from three sums or more is not bounded. N patients, V genes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedgex.client.identity import AUDIT
from fedgex.common import parsing
from fedgex.common.codes import Code
from fedgex.common.data.cross_products import (
    OTHERS,
    CrossProducts,
    PairMoments,
    groups_of,
    known_pairs,
    pack,
    smallest_joined,
    standardised,
    unpack,
)
from fedgex.common.data.moments import GeneMoments, Standardisation
from fedgex.common.errors import ConfigError, FedgexError
from fedgex.common.system.files import exclusive_lock, explained, write_atomic
from fedgex.common.trust import audit_log
from fedgex.common.trust.audit_log import Chain

logger = logging.getLogger(__name__)

FOLDER, KEY, LOCK = "sums", "key", "lock"
"""Folder in the state directory, and its files that hold no sums."""
LEFT = "sum-left"
"""Event of the audit log, with the fingerprint of the cohorts."""
MOMENTS, PRODUCTS = "moments", "products"
"""Kinds of sums: of each gene, and of each two by group of patients."""
HMAC_BYTES = 32

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]
Sums = Mapping[str, Any]
"""Arrays by name."""


class SumsError(FedgexError):
    """A sum's cohort differs by a few patients from one that left before."""

    code = Code.SUMS_TOO_CLOSE


@dataclass(frozen=True, kw_only=True, eq=False)
class People:
    """The patients of a hospital today, one row each."""

    patients: Sequence[str]
    """Key of each patient, length N."""
    values: NDArray[np.float32]
    """The study's genes on its scale, shape (N, V); NaN where not measured."""
    as_filed: NDArray[np.float32]
    """The same on the scale of the hospital's file, which no study changes."""
    genes: tuple[str, ...]
    """Those of the study, length V."""
    scale: str
    """The study's."""
    cancer_type: Sequence[str | None]
    """Length N."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohorts:
    """The patients behind each sum of an answer."""

    kind: str
    scale: str
    floor: int
    genes: tuple[str, ...]
    groups: tuple[str, ...]
    who: NDArray[np.uint8]
    """Keyed name of each patient, shape (N, 32)."""
    what: NDArray[np.uint32]
    """Keyed hash of each value as it stands in the file, shape (N, V)."""
    group: NDArray[np.int64]
    """Index of each patient's group, shape (N,)."""
    pattern: NDArray[np.int64]
    """Index of each gene's pattern, shape (V,)."""
    patterns: Mask
    """Patients who have the genes of a pattern, shape (N, P); few patterns where
    patients have the same genes."""

    @classmethod
    def of(
        cls, people: People, key: bytes, kind: str, group: Sequence[str], floor: int
    ) -> Cohorts:
        """Return the cohorts of an answer to be; `group` is each patient's."""
        who = [hmac.digest(key, f"who {p}".encode(), "sha256") for p in people.patients]
        order = sorted(range(len(who)), key=who.__getitem__)
        groups = tuple(sorted(set(group)))
        patterns, pattern = np.unique(
            ~np.isnan(people.values[order]), axis=1, return_inverse=True
        )
        return cls(
            kind=kind,
            scale=people.scale,
            floor=floor,
            genes=people.genes,
            groups=groups,
            who=_rows([who[i] for i in order]),
            what=_hashes(_rows(who), people, key)[order],
            group=np.array([groups.index(group[i]) for i in order], dtype=np.int64),
            pattern=pattern.reshape(-1).astype(np.int64),
            patterns=patterns,
        )

    def take(self, genes: Mask) -> Cohorts:
        """Return the cohorts of the genes that are marked, shape (V,)."""
        kept = tuple(g for g, is_kept in zip(self.genes, genes, strict=True) if is_kept)
        return replace(
            self, genes=kept, pattern=self.pattern[genes], what=self.what[:, genes]
        )

    @property
    def about(self) -> str:
        """What no array holds, as JSON."""
        names = ("kind", "scale", "floor", "genes", "groups")
        return json.dumps({name: getattr(self, name) for name in names})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays, the patterns as bits."""
        named = {n: getattr(self, n) for n in ("who", "what", "group", "pattern")}
        return named | {"patterns": np.packbits(self.patterns, axis=0)}

    @classmethod
    def read(cls, about: str, arrays: Sums) -> Cohorts:
        """Return what `about` and `arrays` returned."""
        most = parsing.LONG_BYTES
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in parsing.json_object(about, "a sum", most=most).items()
        }
        bits = np.unpackbits(arrays["patterns"], axis=0, count=len(arrays["who"]))
        return cls(**{**values, **arrays, "patterns": bits.astype(bool)})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all of it."""
        hashed = hashlib.sha256(self.about.encode())
        for array in self.arrays().values():
            hashed.update(f"{array.shape}".encode() + array.tobytes())
        return hashed.hexdigest()

    @cached_property
    def summed(self) -> list[tuple[Mask, Mask]]:
        """Patients, shape (N,), and known patterns, of each group and of all together.

        The patterns have shape (P, P) for products, else (P,).
        """
        groups = [self.group == i for i in range(len(self.groups))]
        if len(groups) > 1:  # who has the sums of all groups has those of all patients
            groups.append(np.ones_like(groups[0]))
        if self.kind == MOMENTS:
            return [
                (g, _sizes(self.patterns & g[:, None]) >= self.floor) for g in groups
            ]
        counts = [_pairs(self.patterns & g[:, None]) for g in groups]
        return list(zip(groups, known_pairs(counts, self.floor), strict=True))

    def close_to(self, old: Cohorts) -> Mask:
        """Return the genes with a sum that differs from an old one by too few, (V,).

        Too few have come or gone; or nobody has, and the values of too few are others.
        """
        found = np.zeros(len(self.genes), dtype=bool)
        _, mine, theirs = np.intersect1d(self.genes, old.genes, return_indices=True)
        place = {name.tobytes(): i for i, name in enumerate([*self.who, *old.who])}
        at = {name: i for i, name in enumerate(place)}
        now, then = ([at[n.tobytes()] for n in each.who] for each in (self, old))
        values = np.zeros((2, len(at), len(mine)), dtype=np.uint32)
        values[0, now], values[1, then] = self.what[:, mine], old.what[:, theirs]
        kept, of_kept = np.unique(values[0] == values[1], axis=1, return_inverse=True)
        joint, of_gene = np.unique(
            [self.pattern[mine], old.pattern[theirs], of_kept.reshape(-1)],
            axis=1,
            return_inverse=True,
        )
        floor = max(self.floor, old.floor)
        count = _pairs if self.kind == old.kind == PRODUCTS else _sizes
        for group, known in self.summed:
            x = np.zeros((len(at), len(joint[0])), dtype=bool)
            x[now] = self.patterns[:, joint[0]] & group[:, None]
            for old_group, old_known in old.summed:
                y = np.zeros_like(x)
                y[then] = old.patterns[:, joint[1]] & old_group[:, None]
                if not (x & y).any():
                    continue  # two cohorts of the floor each, and nobody in both
                both = count(x & y)
                differ = count(x) + count(y) - 2 * both
                changed = both - count(x & y & kept[:, joint[2]])
                few = np.where(differ > 0, differ, changed)
                left = _at(known, joint[0], few.ndim)
                left = left & _at(old_known, joint[1], few.ndim)
                close = np.reshape(left & (few > 0) & (few < floor), (len(few), -1))
                found[mine] |= np.logical_or.reduce(close, axis=1)[of_gene.reshape(-1)]
        return found


@dataclass(frozen=True)
class Record:
    """A file with the sums of one answer that left."""

    path: Path
    cohorts: Cohorts

    def sums(self) -> dict[str, NDArray[Any]]:
        """Read the sums."""
        with safe_open(self.path, framework="numpy") as file:
            names = set(file.keys()) - set(self.cohorts.arrays())
            return {name: file.get_tensor(name) for name in names}


class ReleasedSums:
    """What left a hospital; one process at a time has it open."""

    def __init__(self, state_dir: Path) -> None:
        """Read everything; the caller holds the lock.

        Raises
        ------
        SumsError
            If a file is missing or damaged, so that nothing can be compared with it.
        """
        self.folder, self.audit = state_dir / FOLDER, Chain(state_dir / AUDIT)
        paths = sorted(self.folder.glob("*.safetensors"))
        logged = audit_log.events(self.audit.path, LEFT)
        known = {line["cohorts"] for line in logged}
        try:
            self.records = [_read(path) for path in paths]
            if not paths and not known and not (self.folder / KEY).exists():
                key = secrets.token_bytes(HMAC_BYTES)
                write_atomic(self.folder / KEY, key.hex().encode())
            self.key = bytes.fromhex((self.folder / KEY).read_text())
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            SafetensorError,
            ConfigError,
        ) as error:
            raise self._lost(f"cannot be used ({error})") from error
        if known - {each.cohorts.fingerprint for each in self.records}:
            raise self._lost(
                "lacks a sum that left, by the audit log, or has it changed"
            )

    @classmethod
    @contextmanager
    def opened(cls, state_dir: Path) -> Iterator[ReleasedSums]:
        """Open what left, and keep other processes from adding to it."""
        folder = state_dir / FOLDER
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with exclusive_lock(folder / LOCK):
            yield cls(state_dir)

    def close(self, cohorts: Cohorts) -> Mask:
        """Return the genes whose sums are too close to one that left, shape (V,)."""
        found = np.zeros(len(cohorts.genes), dtype=bool)
        for each in self.records:
            found |= cohorts.close_to(each.cohorts)
        return found

    def of_kind(self, kind: str, scale: str) -> Iterator[Record]:
        """Yield the records of a kind and scale, newest first."""
        for each in reversed(self.records):
            if (each.cohorts.kind, each.cohorts.scale) == (kind, scale):
                yield each

    def add(self, cohorts: Cohorts, sums: Sums) -> None:
        """Record sums before they leave; the same ones once."""
        if cohorts.fingerprint in {r.cohorts.fingerprint for r in self.records}:
            return
        path = self.folder / f"{len(self.records):05d}.safetensors"
        arrays = {**cohorts.arrays(), **sums}
        content = save(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            metadata={"about": cohorts.about},
        )
        write_atomic(path, content)
        self.audit.append(LEFT, kind=cohorts.kind, cohorts=cohorts.fingerprint)

    def _lost(self, found: str) -> SumsError:
        return SumsError(
            f"{self.folder} {found}; expected it as fedgex left it, so that no two "
            "sums differ by a few patients. Put the newest backup of it back, see "
            "docs/hospital-operation.md."
        )


def moments(people: People, state_dir: Path, floor: int) -> GeneMoments:
    """Return the moments that may leave, gene by gene the present or the old ones.

    Raises
    ------
    SumsError
        If a gene's differ by too few patients from a sum that left, and none of its
        moments on this scale left.
    """
    now = GeneMoments.of(people.values).suppressed(floor)
    with ReleasedSums.opened(state_dir) as left:
        everyone = [OTHERS] * len(people.patients)
        cohorts = Cohorts.of(people, left.key, MOMENTS, everyone, floor)
        close = left.close(cohorts)
        found: dict[str, Any] = {
            "count": now.count.copy(),
            "total": now.total.copy(),
            "square-total": now.square_total.copy(),
        }
        fresh = cohorts.take(~close)
        sums = {name: array[~close] for name, array in found.items()}
        missing = close.copy()
        for record in left.of_kind(MOMENTS, people.scale) if close.any() else ():
            old, genes = record.sums(), record.cohorts.genes
            _, mine, theirs = np.intersect1d(people.genes, genes, return_indices=True)
            usable = missing[mine] & (old["count"][theirs] >= floor)
            for name, array in found.items():
                array[mine[usable]] = old[name][theirs[usable]]
            missing[mine[usable]] = False
        if missing.any():
            raise _too_close(f"the sums of {missing.sum()} genes", floor)
        if close.any():
            logger.warning("sums of %d genes leave as they left before", close.sum())
        left.add(fresh, sums)
    return GeneMoments(
        count=found["count"],
        total=found["total"],
        square_total=found["square-total"],
        n_patients=max(now.n_patients, int(found["count"].max(initial=0))),
    )


def products(
    people: People,
    state_dir: Path,
    floor: int,
    types: Collection[str],
    scale: Standardisation,
) -> dict[str, CrossProducts]:
    """Return the cross-products that may leave, see `cross_products.by_type`.

    A type whose sums would be too close to some that left is among the others.

    Raises
    ------
    SumsError
        If those of all patients are too close too, and none of these genes, groups and
        scale left.
    """
    group: list[str] | None = groups_of(people.cancer_type, types, floor)
    with ReleasedSums.opened(state_dir) as left:
        while group is not None:
            cohorts = Cohorts.of(people, left.key, PRODUCTS, group, floor)
            if not left.close(cohorts).any():
                sums = {
                    name: PairMoments.of(people.values[[g == name for g in group]])
                    for name in cohorts.groups
                }
                left.add(cohorts, _packed(sums, cohorts))
                return standardised(sums, floor, scale)
            group = smallest_joined(group)
        wanted = {*types, OTHERS}
        for record in left.of_kind(PRODUCTS, people.scale):
            old = record.cohorts
            if set(people.genes) <= set(old.genes) and wanted.issuperset(old.groups):
                logger.warning("cross-products leave as they left before")
                at = [old.genes.index(gene) for gene in people.genes]
                sums = _unpacked(record.sums(), old, np.array(at, dtype=np.intp))
                return standardised(sums, max(floor, old.floor), scale)
    raise _too_close("the cross-products", floor)


def _too_close(what: str, floor: int) -> SumsError:
    return SumsError(
        f"{what} would differ by fewer than {floor} patients from some that left this "
        "hospital before, and so reveal these patients; the old ones cannot be sent "
        "instead, because none is of these genes, this scale and these cancer types. "
        "Nothing was sent; it can be once more patients have come. See docs/privacy.md."
    )


def _read(path: Path) -> Record:
    with safe_open(path, framework="numpy") as file:
        names = ("who", "what", "group", "pattern", "patterns")
        arrays = {name: file.get_tensor(name) for name in names}
        return Record(path, Cohorts.read(file.metadata()["about"], arrays))


def _packed(sums: Mapping[str, PairMoments], cohorts: Cohorts) -> dict[str, Any]:
    """Return sums as arrays; counts and totals once for all genes of a pattern."""
    _, first = np.unique(cohorts.pattern, return_index=True)
    return {
        f"{name}/{part}": array
        for name, each in sums.items()
        for part, array in (
            ("products", pack(each.products)),
            ("pair-totals", each.pair_totals[:, first]),
            ("pair-counts", each.pair_counts[np.ix_(first, first)]),
        )
    }


def _unpacked(
    arrays: Sums, cohorts: Cohorts, genes: NDArray[np.intp]
) -> dict[str, PairMoments]:
    """Return what `_packed` packed, of some genes."""
    _, pattern = np.unique(cohorts.pattern, return_inverse=True)
    return {
        name: PairMoments(
            products=unpack(arrays[f"{name}/products"])[np.ix_(genes, genes)],
            pair_totals=arrays[f"{name}/pair-totals"][np.ix_(genes, pattern[genes])],
            pair_counts=arrays[f"{name}/pair-counts"][
                np.ix_(pattern[genes], pattern[genes])
            ],
        )
        for name in cohorts.groups
    }


def _hashes(who: NDArray[np.uint8], people: People, key: bytes) -> NDArray[np.uint32]:
    """Return a keyed hash of each value, shape (N, V).

    Of each cell one block of AES: patient, gene and value. A hash for each by itself
    would take minutes; equal blocks are equal cells, which is what is compared.
    """
    blocks = np.zeros((*people.as_filed.shape, 4), dtype=np.uint32)
    genes = [hashlib.sha256(gene.encode()).digest()[:4] for gene in people.genes]
    blocks[:, :, :2] = who[:, None, :8].copy().view(np.uint32)
    blocks[:, :, 2] = np.frombuffer(b"".join(genes), dtype=np.uint32)
    known = np.where(np.isnan(people.as_filed), np.nan, people.as_filed + 0.0)
    blocks[:, :, 3] = known.astype(np.float32).view(np.uint32)
    cipher = Cipher(AES(hmac.digest(key, b"values", "sha256")), ECB()).encryptor()
    hashed = np.frombuffer(cipher.update(blocks.tobytes()), dtype=np.uint32)
    return hashed.reshape(blocks.shape)[:, :, 0]


def _rows(digests: Iterable[bytes]) -> NDArray[np.uint8]:
    joined = np.frombuffer(b"".join(digests), dtype=np.uint8)
    return joined.reshape(-1, HMAC_BYTES)


def _sizes(members: Mask) -> Counts:
    """Return the number of members of each column's cohort, shape (P,)."""
    sizes: Counts = members.sum(axis=0)
    return sizes


def _pairs(members: Mask) -> Counts:
    """Return the number of members whom each two columns share, shape (P, P)."""
    exact = members.astype(np.float32)  # up to 2^24
    pairs: Counts = np.rint(exact.T @ exact).astype(np.int64)
    return pairs


def _at(known: Mask, patterns: Counts, ndim: int) -> Mask:
    """Return what is known of patterns, or of each two of them."""
    diagonal = known if known.ndim == 1 else known.diagonal()
    found: Mask = known[np.ix_(patterns, patterns)] if ndim == 2 else diagonal[patterns]
    return found
