"""What the server asks of hospitals: a frozen dataclass a type of message."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from flwr.app import ArrayRecord, RecordDict

from fedgex.common import keys
from fedgex.common.data.moments import LARGEST, LEAST_SD, Standardisation
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import MessageError
from fedgex.common.messages.codec import (
    Codec,
    Message,
    arrays,
    by_hospital,
    converted,
    packed,
)
from fedgex.common.messages.fields import (
    Attempt,
    Genes,
    LastReceipt,
    Participant,
    Revocations,
    Round,
    Run,
    Server,
    Shared,
    SignedText,
    StudyText,
    Survived,
)
from fedgex.common.study import Study
from fedgex.common.trust.receipt import request_digest

Bytes = Mapping[str, bytes]
"""Bytes by hospital."""

_STUDY = converted(keys.STUDY, StudyText, StudyText.of, StudyText.study)
_VOCABULARY = converted(keys.VOCABULARY, Genes, Genes.of, Genes.vocabulary)
_STANDARDISATION: Codec[Standardisation] = arrays(
    keys.STANDARDISATION,
    {"mean": "float64", "sd": "float64"},
    lambda scale: {"mean": scale.mean, "sd": scale.sd},
    lambda found: Standardisation(**found),
)
BOXES = by_hospital(keys.BOXES, bytes.hex, bytes.fromhex)
CONFIRMATIONS = by_hospital(keys.CONFIRMATIONS, bytes.hex, bytes.fromhex)

_PARTICIPANTS = by_hospital(
    keys.PUBLIC_KEYS, Participant.to_text, Participant.from_text
)


@dataclass(frozen=True, kw_only=True)
class Envelope(Message):
    """Records that every request also holds; in a simulation, only the version."""

    server: Annotated[Server | None, keys.SERVER] = None
    run: Annotated[Run | None, keys.RUN] = None
    receipt: Annotated[LastReceipt | None, keys.RECEIPT] = None
    digest: str = ""
    """Of the request as it came, see `receipt.request_digest`."""


@dataclass(frozen=True, kw_only=True)
class ContractRequest(Envelope):
    """Offer a contract."""

    contract: Annotated[SignedText, keys.SIGNED_CONTRACT]
    revocations: Annotated[Revocations | None, keys.REVOCATIONS] = None
    """If the authority has signed a list."""


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest(Envelope):
    """Deliver a released model."""

    bundle: Annotated[ArrayRecord, packed(keys.BUNDLE, keys.BUNDLE)]


@dataclass(frozen=True, kw_only=True)
class StudyRequest(Envelope):
    """Base of what is asked under a study."""

    study: Annotated[Study, _STUDY]


@dataclass(frozen=True, kw_only=True)
class PrepareRequest(StudyRequest):
    """Ask for name, panel and number of patients."""


@dataclass(frozen=True, kw_only=True)
class StatisticsRequest(StudyRequest):
    """Ask for the moments of each gene."""

    vocabulary: Annotated[Vocabulary, _VOCABULARY]


@dataclass(frozen=True, kw_only=True)
class CrossProductsRequest(StatisticsRequest):
    """Ask for the cross-products of standardised genes."""

    standardisation: Annotated[Standardisation, _STANDARDISATION]

    def check(self) -> None:
        """Refuse means of other genes."""
        scale, expected = self.standardisation, (len(self.vocabulary),)
        if scale.mean.shape != expected or scale.sd.shape != expected:
            raise MessageError("the standardisation is not of the vocabulary's genes")
        if not scale.is_of_expression:
            raise MessageError(
                f"the standardisation has an SD below {LEAST_SD:g}, or an SD or mean "
                f"beyond {LARGEST:.3g}: it is no expression's"
            )


@dataclass(frozen=True, kw_only=True)
class TrainRequest(CrossProductsRequest):
    """Ask for a round of training."""

    model: Annotated[ArrayRecord, packed(keys.MODEL)]
    round: Annotated[Round, keys.ROUND]
    attempt: Annotated[Shared | None, keys.EXCHANGE] = None
    """Under secure aggregation, and then with `boxes`."""
    boxes: Annotated[Bytes | None, BOXES] = None
    """Shares encrypted for this hospital, by sender."""

    def check(self) -> None:
        """Refuse half of secure aggregation."""
        super().check()
        if (self.attempt is None) != (self.boxes is None):
            raise MessageError(f'"{keys.EXCHANGE}" and "{keys.BOXES}" go together')


@dataclass(frozen=True, kw_only=True)
class SecureRequest(StatisticsRequest):
    """Base of the requests of secure aggregation around training."""

    round: Annotated[Round, keys.ROUND]
    attempt: Annotated[Attempt, keys.EXCHANGE]


@dataclass(frozen=True, kw_only=True)
class KeysRequest(SecureRequest, CrossProductsRequest):
    """Ask for public keys for an attempt; who would refuse to train refuses here."""


@dataclass(frozen=True, kw_only=True)
class SharesRequest(SecureRequest):
    """Ask for shares of both secrets, encrypted for each participant."""

    participants: Annotated[
        Mapping[str, Participant],
        by_hospital(keys.PUBLIC_KEYS, Participant.to_text, Participant.from_text),
    ]


@dataclass(frozen=True, kw_only=True)
class ConfirmRequest(SecureRequest):
    """Ask for a confirmation of the lists of hospitals."""

    attempt: Annotated[Survived, keys.EXCHANGE]


@dataclass(frozen=True, kw_only=True)
class UnmaskRequest(ConfirmRequest):
    """Ask for the shares that take the masks off the sum."""

    confirmations: Annotated[Bytes, CONFIRMATIONS]
    """For this hospital, by sender."""


@dataclass(frozen=True, kw_only=True)
class Own(Message):
    """Records that only one hospital is sent."""

    boxes: Annotated[Bytes | None, BOXES] = None
    confirmations: Annotated[Bytes | None, CONFIRMATIONS] = None


REQUESTS: Mapping[str, type[Envelope]] = {
    keys.CONTRACT: ContractRequest,
    keys.PREPARE: PrepareRequest,
    keys.STATISTICS: StatisticsRequest,
    keys.CROSS_PRODUCTS: CrossProductsRequest,
    keys.TRAIN: TrainRequest,
    keys.SECURE_KEYS: KeysRequest,
    keys.SECURE_SHARES: SharesRequest,
    keys.SECURE_CONFIRM: ConfirmRequest,
    keys.SECURE_UNMASK: UnmaskRequest,
    keys.RELEASE: ReleaseRequest,
}
"""Every request that a hospital answers, by type of message."""


def read_request(kind: str, content: RecordDict) -> Envelope:
    """Read a request of a type.

    Raises
    ------
    MessageError
        If there is no such type, or as for `Message.from_records`.
    """
    if kind not in REQUESTS:
        raise MessageError(f"no message is of the type {kind[:64]!r}")
    request = REQUESTS[kind].from_records(content)
    return dataclasses.replace(request, digest=request_digest(kind, content))
