"""The contract around a study: for what, until when, with whom, and who releases it.

A contract is a TOML text that administrators sign; the hash of the text's bytes is what
a hospital approves. The format stands in docs/contract.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Self

from pydantic import Field, model_validator

from fedgex.common import parsing
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.secure_aggregation.protocol import threshold
from fedgex.common.settings import Digest, Name, Settings
from fedgex.common.study import Study
from fedgex.common.trust.signed import Signed

MAX_BYTES = 1 << 22
"""Of a contract's text, which may name 200,000 genes."""


class ReleaseRule(Settings):
    """Conditions for the release of the model."""

    administrators: int = Field(default=2, ge=1)
    """How many of them must order it, each with a key of their own."""
    audit_max_auc: float | None = Field(default=None, ge=0.5, le=1)
    """Most that the upper end of the interval of a membership attack's AUC may be; each
    order must then name an audit report (docs/audit.md). None: none is needed."""


class Contract(Settings):
    """What a hospital approves, and what a run must keep to."""

    purpose: str = Field(min_length=10)
    """For what, in words that the person who approves understands."""
    expires: date
    """Last day, in UTC, on which it holds."""
    code_version: str = Field(pattern=r"^\d+\.\d+$")
    """Major and minor version of fedgex, on the server and at every site."""
    vocabulary_hash: Digest
    """Hash of the vocabulary that the study's genes make, once sorted."""
    sites: tuple[Name, ...] = Field(min_length=2)
    """Sites that may take part."""
    site_keys: dict[Name, Digest] = Field(default={})
    """Fingerprint of each site's key (SHA-256 of the public key). Hospitals take nobody
    else for that site; secure aggregation needs them."""
    administrator_keys: dict[Name, Digest] = Field(default={})
    """Fingerprint of each administrator's key: who may sign this contract and order the
    release of its model."""
    no_secure_aggregation: str = ""
    """Why the server may see the update of each site; empty with secure aggregation."""
    release: ReleaseRule = ReleaseRule()
    study: Study

    @model_validator(mode="after")
    def _contract_and_study_fit(self) -> Self:
        if wrong := list(self._misfits()):
            raise ValueError("; ".join(wrong))
        return self

    @classmethod
    def from_toml(cls, text: str, source: str) -> Self:
        """Read a contract's text.

        Raises
        ------
        ConfigError
            If it is no TOML, or with everything else that is wrong with it.
        """
        return cls.read(parsing.toml_table(text, source, most=MAX_BYTES), source)

    @classmethod
    def read_signed(cls, signed: Signed) -> Self:
        """Read a signed contract's text; signatures and expiry are not verified.

        `Signed.signers` says whose signatures hold, `expired` whether it is too late.

        Raises
        ------
        ConfigError
            As for `from_toml`.
        """
        return cls.from_toml(signed.content, f"contract {signed.hash[:12]}")

    def supports(self, version: str) -> bool:
        """Return whether this fedgex version is of the contract's major and minor."""
        found = re.match(r"\d+\.\d+(?!\d)", version)
        return found is not None and found[0] == self.code_version

    def expired(self, at: datetime | None = None) -> bool:
        """Return whether its last day, in UTC, is over at this time; now, if absent."""
        at = at or datetime.now(UTC)
        return at.astimezone(UTC).date() > self.expires

    def _misfits(self) -> Iterator[str]:
        study, sites = self.study, set(self.sites)
        if len(sites) < len(self.sites):
            yield "sites must be distinct; one is named more than once"
        if not study.vocabulary.genes:
            yield (
                "study.vocabulary.genes is empty; between hospitals the genes are "
                "fixed in the contract"
            )
        elif self.vocabulary_hash != (found := _hash(study.vocabulary.genes)):
            yield (
                f"vocabulary_hash is {self.vocabulary_hash}, that of "
                f"study.vocabulary.genes is {found}"
            )
        yield from self._wrong_pins()
        if self.no_secure_aggregation and study.secure_aggregation is not None:
            yield "no_secure_aggregation gives a reason, and the study asks for it"
        if study.rounds.quorum > len(sites):
            yield (
                f"study.rounds.quorum is {study.rounds.quorum}, more than the "
                f"{len(sites)} sites"
            )
        if strange := set(study.rounds.mandatory_sites) - sites:
            yield f"study.rounds.mandatory_sites not among sites: {_listed(strange)}"
        if study.strategy.weights == "fixed":
            named = set(study.strategy.site_weights)
            if missing := sites - named:
                yield f"study.strategy.site_weights lacks {_listed(missing)}"
            if strange := named - sites:
                yield f"study.strategy.site_weights not among sites: {_listed(strange)}"

    def _wrong_pins(self) -> Iterator[str]:
        """Yield what is wrong with the pinned keys; a contract may pin none."""
        of_sites, of_administrators = self.site_keys, self.administrator_keys
        if bool(of_sites) != bool(of_administrators):
            yield "site_keys and administrator_keys come together"
        if of_sites and (differing := set(of_sites) ^ set(self.sites)):
            yield f"site_keys and sites differ in {_listed(differing)}"
        every = [*of_sites.values(), *of_administrators.values()]
        if len(set(every)) < len(every):
            yield "a key is pinned under two names"


def remaining(contract: Contract) -> list[str]:
    """Return a sentence for each thing that a contract does not protect from."""
    return list(_remaining(contract))


def _remaining(contract: Contract) -> Iterator[str]:
    study, n_sites = contract.study, len(contract.sites)
    if study.secure_aggregation is None:
        reason = contract.no_secure_aggregation or "no reason is given"
        yield f"The server sees this hospital's update of each round ({reason})."
    else:
        sizes = range(study.rounds.quorum, n_sites + 1)
        fewest = min(2 * threshold(n) - n for n in sizes)
        yield (
            f"A server with which {fewest} or more hospitals of a round collude may "
            "read the update of another; all but one can always compute that one's."
        )
        yield (
            f"The coordinator chooses who is in a round, {study.rounds.quorum} "
            "hospitals or more; sums of rounds over different hospitals can be "
            "compared."
        )
    if not contract.site_keys:
        yield (
            "The contract pins no keys: who holds the authority's key can act under "
            "the name of any hospital or administrator."
        )
    if study.privacy.patient is None:
        yield "Nothing bounds what the model reveals of a patient."
    if not study.public.statistics:
        yield "Sums over this hospital's patients go to the server before round 1."
    yield (
        "The server holds the model after each round. Who runs it can use it, or give "
        "it away, without the administrators; what has left cannot be taken back."
    )


def _hash(genes: tuple[str, ...]) -> str:
    return Vocabulary(tuple(sorted(genes))).hash


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
