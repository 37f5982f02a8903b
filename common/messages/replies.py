"""What a hospital answers: a frozen dataclass a type of reply.

V genes of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedgex.common import keys
from fedgex.common.data.cross_products import CrossProducts, pack, unpack
from fedgex.common.data.moments import GeneMoments
from fedgex.common.errors import MessageError
from fedgex.common.messages.codec import (
    Codec,
    Fields,
    Message,
    arrays,
    by_hospital,
    converted,
    packed,
    shown,
)
from fedgex.common.messages.fields import (
    AdvertisedKeys,
    CohortSize,
    Commitment,
    Decision,
    Hospital,
    Introduction,
    RefusalCode,
    SignedPart,
    TrainingMetrics,
    Withheld,
)
from fedgex.common.messages.requests import BOXES, CONFIRMATIONS, Bytes

Products = Mapping[str, CrossProducts]
"""Cross-products by group of patients, see `cross_products.by_type`."""


def pack_products(groups: Products) -> dict[str, NDArray[Any]]:
    """Return cross-products as arrays, upper triangles of shape (V (V + 1) / 2,)."""
    return {
        f"{group}/{name}": array
        for group, sums in groups.items()
        for name, array in (
            ("products", pack(sums.products)),
            ("pair-counts", pack(sums.pair_counts)),
            ("totals", sums.totals),
        )
    }


def unpack_products(packed: Mapping[str, NDArray[Any]]) -> dict[str, CrossProducts]:
    """Return what `pack_products` packed.

    Raises
    ------
    UpdateError
        If it cannot be of any patients.
    """
    return {
        group: CrossProducts(
            products=unpack(packed[f"{group}/products"]),
            pair_counts=unpack(packed[f"{group}/pair-counts"]),
            totals=packed[f"{group}/totals"],
        )
        for group in sorted({name.rpartition("/")[0] for name in packed})
    }


_MOMENTS: Codec[GeneMoments] = arrays(
    keys.MOMENTS,
    {"count": "int64", "total": "float64", "square-total": "float64"},
    lambda sums: {
        "count": sums.count,
        "total": sums.total,
        "square-total": sums.square_total,
    },
    lambda found: GeneMoments(
        count=found["count"],
        total=found["total"],
        square_total=found["square-total"],
        n_patients=int(found["count"].max(initial=0)),
    ),
)
_PRODUCTS: Codec[Products] = arrays(
    keys.PRODUCTS,
    {
        "GROUP/products": "float64",
        "GROUP/pair-counts": "int64",
        "GROUP/totals": "float64",
    },
    pack_products,
    unpack_products,
)
_WITHHELD = converted(
    keys.WITHHELD,
    Withheld,
    lambda names: Withheld(metrics=names),
    lambda found: found.metrics,
)


@dataclass(frozen=True, kw_only=True)
class Reply(Message):
    """Base of all replies."""

    part: Annotated[SignedPart | None, keys.PART] = None
    """Between hospitals."""


def read_part(content: RecordDict) -> SignedPart | None:
    """Read the signed part of any reply; None if it has none.

    Raises
    ------
    MessageError
        If it cannot be used.
    """
    codec = Reply.codecs()["part"]
    return codec.read(content) if codec.record in content else None


@dataclass(frozen=True, kw_only=True)
class Refusal(Reply):
    """A reply instead of any other: a code, never a text."""

    refusal: Annotated[RefusalCode, keys.REFUSAL]

    @classmethod
    def of(cls, code: str) -> Self:
        """Return the refusal of a code."""
        return cls(refusal=RefusalCode(code=str(code)))


@dataclass(frozen=True, kw_only=True)
class ContractReply(Reply):
    """The hospital's decision about a contract."""

    site: Annotated[Decision, keys.SITE]


@dataclass(frozen=True, kw_only=True)
class ReleaseReply(Reply):
    """The hospital has verified and kept the model."""

    site: Annotated[Hospital, keys.SITE]


@dataclass(frozen=True, kw_only=True)
class _Numbered(Reply):
    """Base of replies with numbers that a hospital's policy may keep back."""

    withheld: Annotated[tuple[str, ...] | None, _WITHHELD] = None
    """Names of the numbers that are missing, written by `to_records`."""

    NUMBERS: ClassVar[str]
    """Field with the numbers; those that are None are missing."""

    def to_records(self) -> RecordDict:
        """Return the reply, and the names of what is missing."""
        named = dataclasses.replace(self, withheld=self._missing() or None)
        return super(_Numbered, named).to_records()

    def check(self) -> None:
        """Refuse numbers that are missing and not named, or named and there."""
        named, missing = set(self.withheld or ()), set(self._missing())
        if unnamed := missing - named:
            raise MessageError(f"{shown(unnamed)} is missing and not withheld")
        if wrong := named - missing:
            raise MessageError(f"{shown(wrong)} is withheld, and there or unknown")

    def _missing(self) -> tuple[str, ...]:
        numbers: Fields = getattr(self, self.NUMBERS)
        return tuple(sorted(set(numbers.keys()) - set(numbers.encode())))


@dataclass(frozen=True, kw_only=True)
class PrepareReply(_Numbered):
    """Name, panel and number of patients of a hospital."""

    NUMBERS = "site"
    site: Annotated[Introduction, keys.SITE]


@dataclass(frozen=True, kw_only=True)
class StatisticsReply(_Numbered):
    """Moments of each gene of the vocabulary."""

    NUMBERS = "metrics"
    sums: Annotated[GeneMoments, _MOMENTS]
    """Read without `metrics`: of as many patients as have the best measured gene."""
    metrics: Annotated[CohortSize, keys.METRICS]

    def check(self) -> None:
        """Refuse more values of a gene than patients."""
        super().check()
        assert self.moments

    @property
    def moments(self) -> GeneMoments:
        """The moments, with the number of patients if it is not withheld."""
        n = self.metrics.num_patients
        return dataclasses.replace(
            self.sums, n_patients=self.sums.n_patients if n is None else n
        )


@dataclass(frozen=True, kw_only=True)
class CrossProductsReply(Reply):
    """Cross-products of each group of patients."""

    products: Annotated[Products, _PRODUCTS]


@dataclass(frozen=True, kw_only=True)
class TrainReply(_Numbered):
    """An update of the model, in the open or under masks."""

    NUMBERS = "metrics"
    update: Annotated[ArrayRecord | None, packed(keys.UPDATE)] = None
    masked: Annotated[ArrayRecord | None, packed(keys.MASKED, keys.MASKED)] = None
    metrics: Annotated[TrainingMetrics, keys.METRICS]

    def check(self) -> None:
        """Refuse two updates."""
        super().check()
        if self.update is not None and self.masked is not None:
            raise MessageError(
                f'"{keys.UPDATE}" and "{keys.MASKED}" exclude each other'
            )


@dataclass(frozen=True, kw_only=True)
class KeysReply(Reply):
    """A hospital's public keys for an attempt."""

    advertised: Annotated[AdvertisedKeys, keys.PUBLIC_KEYS]


@dataclass(frozen=True, kw_only=True)
class SharesReply(Reply):
    """Shares encrypted for each other participant, and a commitment to the seed."""

    boxes: Annotated[Bytes, BOXES]
    commitment: Annotated[Commitment, keys.EXCHANGE]


@dataclass(frozen=True, kw_only=True)
class ConfirmReply(Reply):
    """A confirmation of the lists for each other survivor."""

    confirmations: Annotated[Bytes, CONFIRMATIONS]


@dataclass(frozen=True, kw_only=True)
class UnmaskReply(Reply):
    """Shares of the seeds of survivors, and of the mask keys of the others."""

    seeds: Annotated[Bytes, by_hospital(keys.SEED_SHARES, bytes.hex, bytes.fromhex)]
    masks: Annotated[Bytes, by_hospital(keys.MASK_SHARES, bytes.hex, bytes.fromhex)]


REPLIES: Mapping[str, type[Reply]] = {
    keys.CONTRACT: ContractReply,
    keys.PREPARE: PrepareReply,
    keys.STATISTICS: StatisticsReply,
    keys.CROSS_PRODUCTS: CrossProductsReply,
    keys.TRAIN: TrainReply,
    keys.SECURE_KEYS: KeysReply,
    keys.SECURE_SHARES: SharesReply,
    keys.SECURE_CONFIRM: ConfirmReply,
    keys.SECURE_UNMASK: UnmaskReply,
    keys.RELEASE: ReleaseReply,
}
"""The reply to each request, by type of message; any may be a `Refusal` instead."""
