"""The named values of each record, with their types and bounds.

Their docstrings are Markdown: docs/messages.md is written from them (common/pages.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from flwr.app import MetricRecord
from pydantic import Field

from fedgex.common import parsing
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import MessageError
from fedgex.common.messages.codec import Fields
from fedgex.common.secure_aggregation.protocol import PublicKeys
from fedgex.common.settings import Digest, Name
from fedgex.common.study import Study
from fedgex.common.trust.audit_log import Head

Text = Annotated[str, Field(max_length=parsing.LONG_BYTES)]
Line = Annotated[str, Field(max_length=200)]
"""A version, a name or a hash."""
Proof = Annotated[str, Field(max_length=1 << 16)]
"""A part, certificate or signed decision of one hospital."""
Count = Annotated[int, Field(ge=0, le=10**9)]
Ordinal = Annotated[int, Field(ge=1, le=10**9)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Symbol = Annotated[str, Field(max_length=64, pattern=r"^[^\pC]+$")]
Symbols = Annotated[tuple[Symbol, ...], Field(max_length=200_000, strict=False)]
Sites = Annotated[tuple[Name, ...], Field(max_length=10_000, strict=False)]


class Server(Fields):
    """The server's software."""

    version: Line
    """The server's fedgex version"""


class Run(Fields):
    """The run that a message belongs to."""

    contract: Line
    """The contract's hash"""
    run: Line
    """The run's name; "" when a contract is published"""


class LastReceipt(Fields):
    """The run's last receipt, and how much of a hospital's audit log is known."""

    json_: Text
    """The run's last receipt as the coordinator signed it, see [receipts](#receipts);
    "" before the first"""
    head: Annotated[str, Field(pattern=r"^(\d{1,12}:[0-9a-f]{64})?$")]
    """"index:hash" of the last line of this hospital's own audit log that the server
    holds its signature over; "" if none"""

    @property
    def known(self) -> Head | None:
        """The head of the log, if one is known."""
        index, _, digest = self.head.partition(":")
        return Head(int(index), digest) if self.head else None


class SignedText(Fields):
    """A text that was signed."""

    json_: Text
    """The contract as administrators signed it, [contract.md](contract.md)"""


class Revocations(Fields):
    """Certificates that count no more."""

    crl: Text
    """The authority's newest signed list (X.509 CRL, PEM)"""


class SignedPart(Fields):
    """What a hospital signs of its reply, see `receipt.Part`."""

    json_: Proof
    """What the hospital signs of this answer: `contract`, `run`, `site`, `type`,
    `phase`, `round`, digests of question (`request`) and answer (`reply`), `head`
    (index and hash of the last line of its audit log), `patients` (`num-examples`, or
    "suppressed" where that does not leave)"""
    signature: Line
    """Its signature"""
    certificate: Proof
    """Its certificate, PEM"""


class StudyText(Fields):
    """A study, and its hash."""

    json_: Text
    """The study in canonical JSON: sorted keys, no spaces"""
    hash: Digest
    """Its SHA-256"""

    @classmethod
    def of(cls, study: Study) -> Self:
        """Return the study's canonical text."""
        return cls(json_=study.to_json(), hash=study.hash)

    def study(self) -> Study:
        """Return the study, whose text must be canonical and have this hash."""
        study = Study.from_json(self.json_, "the study sent")
        if (self.json_, self.hash) != (study.to_json(), study.hash):
            raise MessageError("the study differs from its hash")
        return study


class Genes(Fields):
    """A vocabulary, and its hash."""

    genes: Symbols
    """Gene symbols in order"""
    hash: Digest
    """SHA-256 of them joined by newlines"""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Self:
        """Return the vocabulary's genes."""
        return cls(genes=vocabulary.genes, hash=vocabulary.hash)

    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary, which must have this hash."""
        vocabulary = Vocabulary(self.genes)
        if self.hash != vocabulary.hash:
            raise MessageError("the vocabulary differs from its hash")
        return vocabulary


class Round(Fields):
    """A round of a phase."""

    phase: Name
    """Name of the phase"""
    number: Ordinal
    """Number of the round in its phase, from 1"""


class Attempt(Fields):
    """An attempt at the secure aggregation of a round."""

    attempt: Ordinal
    """Number of the attempt, from 1"""
    run: Line
    """The run's name; in a simulation, drawn"""


class Shared(Attempt):
    """An attempt at which hospitals have shared their secrets."""

    sharers: Sites
    """Hospitals that shared their secrets; in `train` and after it"""


class Survived(Shared):
    """An attempt at which masked updates have come."""

    survivors: Sites
    """Hospitals whose masked updates came; to confirm and to unmask"""


class AdvertisedKeys(Fields):
    """Public keys of a hospital for one attempt, as it sends and signs them."""

    attempt: Ordinal
    """Number of the attempt"""
    channel: Line
    """Public key, hexadecimal"""
    mask: Line
    """Public key, hexadecimal"""
    measured: Proof
    """Its genes, one bit each, hexadecimal"""

    @property
    def public(self) -> PublicKeys:
        """The keys, from hexadecimal."""
        return _public_keys(self.channel, self.mask, self.measured)

    @classmethod
    def of(cls, public: PublicKeys, attempt: int) -> Self:
        """Return the keys in hexadecimal."""
        return cls(
            attempt=attempt,
            channel=public.channel.hex(),
            mask=public.mask.hex(),
            measured=public.measured.hex(),
        )


class Participant(Fields):
    """Public keys of a hospital as the server passes them on, and who signed them."""

    channel: Line
    mask: Line
    measured: Proof
    json_: Proof | None = None
    signature: Line | None = None
    certificate: Proof | None = None

    @property
    def public(self) -> PublicKeys:
        """The keys, from hexadecimal."""
        return _public_keys(self.channel, self.mask, self.measured)

    def to_text(self) -> str:
        """Return the text that travels; its bytes are not canonical."""
        return json.dumps(self.encode())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` returned."""
        found = cls.decode(parsing.json_object(text, "the keys", error=MessageError))
        _ = found.public  # raises where the keys cannot be used
        return found


class Commitment(Fields):
    """A hospital's commitment to its seed, hexadecimal."""

    commitment: Digest
    """32 bytes that distinguish a wrong seed from its own, hexadecimal"""


class Introduction(Fields):
    """What a hospital reports before the first round."""

    name: Name
    """The hospital's name in `site.toml`"""
    version: Line
    """Its fedgex version"""
    genes: Symbols
    """Symbols of the genes it measures in at least the floor and `min_patient_share` of
    its samples"""
    shares_cross_products: bool
    """Whether it permits them"""
    num_patients: Count | None = None
    """Exact number of patients, if permitted; not below its own `minimum_cohort`, or it
    refuses"""


class Decision(Fields):
    """A hospital's decision about a contract, as it signed it."""

    name: Name
    """The hospital's name"""
    decision: Proof
    """Its approval as it signed it: contract, who approved, when, until when. A
    hospital that has not approved refuses; why it rejected or withdrew does not
    leave"""


class Hospital(Fields):
    """A hospital."""

    name: Name
    """The hospital's name: it has verified and kept the model"""


class Withheld(Fields):
    """Numbers that a hospital's policy keeps back."""

    metrics: Annotated[tuple[Symbol, ...], Field(max_length=99, strict=False)]
    """Names of the numbers that its policy does not permit and that are therefore
    missing; no such record if none is"""


class CohortSize(Fields):
    """Number of patients of a hospital; None: withheld."""

    KIND = MetricRecord
    num_patients: Count | None = None
    """Exact number of patients, if permitted"""


class TrainingMetrics(Fields):
    """Numbers of a round of training at one hospital; None: withheld."""

    KIND = MetricRecord
    num_examples: Count | None = None
    """Patients trained on; at least the floor, or it refuses"""
    num_loss_terms: Count | None = None
    """Terms of the loss in one pass: hidden cells; patients; with the Cox loss,
    observed deaths. The floor does not apply to these"""
    train_loss: Measure | None = None
    """Mean loss while training"""
    pre_training_loss: Measure | None = None
    """Mean loss of the incoming model before it"""
    seconds: Measure | None = None
    """Time the hospital took"""

    def by_name(self) -> dict[str, float | None]:
        """Return the numbers as the journal names them."""
        values = self.model_dump(by_alias=True)
        return {name.replace("-", "_"): value for name, value in values.items()}

    @classmethod
    def from_names(cls, values: Mapping[str, float | None]) -> Self:
        """Read what `by_name` returned."""
        return cls.decode({k.replace("_", "-"): v for k, v in values.items()})


class RefusalCode(Fields):
    """Why a hospital does not do as asked."""

    code: Annotated[str, Field(pattern=r"^FX-[A-Z]{1,20}-\d{3}$")]
    """Instead of all else but `part`: a code, never a text"""


def _public_keys(*texts: str) -> PublicKeys:
    channel, mask, measured = map(bytes.fromhex, texts)
    if len(channel) != 32 or len(mask) != 32 or channel == mask:
        raise MessageError("the public keys are not two of 32 bytes")
    for key in (channel, mask):  # one of small order lets no peer agree on a secret
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    return PublicKeys(channel=channel, mask=mask, measured=measured)
