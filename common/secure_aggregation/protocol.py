"""The protocol by which a server learns the sum of vectors and none of them.

Bonawitz et al. (2017), figure 4, with its steps against an active server, over the
complete graph; no networking. n participants, threshold t, P numbers in a vector:

    1  advertise   each sends two public keys: for a channel, and for masks
    2  share       each gives every other t-of-n shares of its mask key and of its seed
    3  mask        each sends x + mask(seed) + sum over others of +-mask(pair), mod 2^32
    4  confirm     each sends every other a MAC of the server's list of vectors
    5  unmask      if t of them were given one list, each sends shares: of the seed of
                   a participant whose vector is there, else of its mask key

Where we differ from figure 4: step 4 confirms the senders of step 2 as well, and with
MACs under the channels' keys instead of signatures; the list of participants and keys
is in the context of every key, so that sites given different lists share nothing; and
shares that do not fit are found, by the public key and a commitment to the seed. Who
signs the public keys of step 1 is for the caller, and so is not to reveal twice.

Primitives are cryptography's: X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20
(RFC 8439) as the generator of masks, AES-256-GCM. Shamir's sharing is ours.

References
----------
Bonawitz et al. (2017), Practical secure aggregation for privacy-preserving machine
learning, doi 10.1145/3133956.3133982. Shamir (1979), How to share a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedgex.common.canonical import canonical_json
from fedgex.common.errors import TrustError, UpdateError
from fedgex.common.secure_aggregation import shamir
from fedgex.common.secure_aggregation.shamir import SECRET_BYTES, SHARE_BYTES
from fedgex.common.secure_aggregation.vectors import CHUNK, Words
from fedgex.common.study import FEWEST_SUMMED

ZEROS = bytes(4 * CHUNK)


# ---- who takes part ----


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all keys and shares of one exchange are for, and for nothing else."""

    contract: str
    """Hash of the contract; in a simulation, of the study."""
    run: str
    phase: str
    round: int
    attempt: int
    """From 1; a round whose exchange failed is tried again under new keys."""


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """What a site advertises."""

    channel: bytes
    """X25519, for what goes between two sites, 32 bytes."""
    mask: bytes
    """X25519, for the masks of pairs, 32 bytes."""
    measured: bytes
    """Genes that the site measures, `np.packbits` of shape (V,)."""


@dataclass(frozen=True, kw_only=True)
class PrivateKeys:
    """What a site keeps of one exchange, each 32 bytes."""

    channel: bytes
    mask: bytes
    seed: bytes
    """Of the mask that the site shares with no other."""

    @classmethod
    def new(cls) -> PrivateKeys:
        """Draw all three."""
        return cls(
            channel=X25519PrivateKey.generate().private_bytes_raw(),
            mask=X25519PrivateKey.generate().private_bytes_raw(),
            seed=secrets.token_bytes(SECRET_BYTES),
        )

    def public(self, measured: NDArray[np.bool_]) -> PublicKeys:
        """Return the public halves, and the genes that are measured."""
        return PublicKeys(
            channel=_public(self.channel),
            mask=_public(self.mask),
            measured=np.packbits(measured).tobytes(),
        )


def threshold(n_participants: int) -> int:
    """Return t: with more than two thirds, no two survivor lists can both be served."""
    return 2 * n_participants // 3 + 1


class Group:
    """The participants of one exchange, their keys and what follows from them."""

    def __init__(self, context: Context, keys: Mapping[str, PublicKeys]) -> None:
        """Take the keys of all participants.

        Raises
        ------
        TrustError
            If they are fewer than three, or two of them share a key.
        """
        self.context = context
        self.keys = dict(sorted(keys.items()))
        if len(keys) < FEWEST_SUMMED:
            raise TrustError(
                f"secure aggregation among {len(keys)} sites would tell each of the "
                f"others; expected {FEWEST_SUMMED} or more."
            )
        every = [key for each in keys.values() for key in (each.channel, each.mask)]
        if len(set(every)) < len(every):
            raise TrustError("two sites advertise one key; expected each its own.")

    @property
    def names(self) -> tuple[str, ...]:
        """Return the participants, sorted."""
        return tuple(self.keys)

    @property
    def threshold(self) -> int:
        """Return how many of them must be left to unmask."""
        return threshold(len(self.keys))

    @cached_property
    def binding(self) -> bytes:
        """SHA-256 of context, names and keys: equal where the same were given."""
        given = {
            "context": asdict(self.context),
            "keys": {
                name: {part: value.hex() for part, value in asdict(keys).items()}
                for name, keys in self.keys.items()
            },
        }
        return hashlib.sha256(canonical_json(given).encode()).digest()

    def place(self, name: str) -> int:
        """Return the point at which a participant's shares are evaluated, from 1."""
        return self.names.index(name) + 1

    def counts(self, names: Collection[str], n_genes: int) -> NDArray[np.int64]:
        """Return by how many of the named participants each gene is measured, (V,)."""
        counts = np.zeros(n_genes, dtype=np.int64)
        for name in names:
            counts += measured(self.keys[name], n_genes)
        return counts

    def require(self, names: Collection[str], among: Collection[str]) -> None:
        """Refuse a list of sites that is too short, or names others than `among`.

        Raises
        ------
        TrustError
            If so.
        """
        if set(names) - set(among):
            raise TrustError("the list names sites that were not on the one before.")
        if len(set(names)) < self.threshold:
            raise TrustError(
                f"the list names {len(set(names))} of {len(self.keys)} sites; expected "
                f"{self.threshold} or more."
            )


def measured(keys: PublicKeys, n_genes: int) -> NDArray[np.bool_]:
    """Return which genes a site measures, shape (V,).

    Raises
    ------
    TrustError
        If its list is of another number of genes.
    """
    packed = np.frombuffer(keys.measured, dtype=np.uint8)
    if len(packed) != -(-n_genes // 8):
        raise TrustError(f"a site's list of genes is not over {n_genes} of them.")
    return np.unpackbits(packed, count=n_genes).astype(np.bool_)


# ---- shares of secrets ----


def commitment(group: Group, name: str, seed: bytes) -> bytes:
    """Return what a seed can be compared with, and what reveals nothing else of it."""
    return _derive(seed, "commitment", group.binding, name)


@dataclass(frozen=True)
class Shares:
    """One participant's shares of another's two secrets."""

    mask: int
    seed: int

    def to_bytes(self) -> bytes:
        """Return 66 bytes."""
        return b"".join(x.to_bytes(SHARE_BYTES, "big") for x in (self.mask, self.seed))

    @classmethod
    def from_bytes(cls, content: bytes) -> Shares:
        """Read what `to_bytes` returned.

        Raises
        ------
        TrustError
            If it is anything else.
        """
        if len(content) != 2 * SHARE_BYTES:
            raise TrustError(f"shares of {len(content)} bytes; expected 66.")
        return cls(
            shamir.share(content[:SHARE_BYTES]), shamir.share(content[SHARE_BYTES:])
        )


def share_out(group: Group, own: PrivateKeys) -> dict[str, Shares]:
    """Return every participant's shares of both own secrets, the own ones included."""
    n, t = len(group.keys), group.threshold
    pairs = zip(shamir.split(own.mask, n, t), shamir.split(own.seed, n, t), strict=True)
    return {name: Shares(*pair) for name, pair in zip(group.names, pairs, strict=True)}


def seal(group: Group, own: PrivateKeys, sender: str, to: str, shares: Shares) -> bytes:
    """Encrypt shares for another participant; no one else can open them."""
    key = _channel(group, own, sender, to, "shares")
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, shares.to_bytes(), _told(sender, to))


def unseal(group: Group, own: PrivateKeys, sender: str, to: str, box: bytes) -> Shares:
    """Open what `seal` made.

    Raises
    ------
    TrustError
        If it was changed, or made for another site, round, attempt, or list of keys.
    """
    key = _channel(group, own, to, sender, "shares")
    try:
        content = AESGCM(key).decrypt(box[:12], box[12:], _told(sender, to))
    except (InvalidTag, ValueError) as error:
        raise TrustError(
            f"the shares from {sender} cannot be opened: they were changed, or made "
            "for another exchange, or that site was given other keys than this one."
        ) from error
    return Shares.from_bytes(content)


# ---- masks ----


def masked(
    group: Group, own: PrivateKeys, name: str, sharers: Collection[str], x: Words
) -> Words:
    """Return a site's vector under its own mask and those with each other sharer."""
    total = x.copy()
    _add(total, _own_seed(group, name, own.seed), 1)
    for other in sharers:
        if other != name:
            pair = _pair_seed(group, own.mask, name, other)
            _add(total, pair, _sign(name, other))
    return total


def unmasked(
    group: Group,
    sharers: Collection[str],
    survivors: Collection[str],
    total: Words,
    seeds: Mapping[str, Mapping[str, int]],
    mask_keys: Mapping[str, Mapping[str, int]],
    commitments: Mapping[str, bytes],
) -> Words:
    """Return the sum of the survivors' vectors.

    Parameters
    ----------
    total
        Sum of their masked vectors.
    seeds
        Of each survivor, shares of its seed by their holder.
    mask_keys
        Of each other sharer, shares of its mask key by their holder.
    commitments
        Of each survivor.

    Raises
    ------
    UpdateError
        If there are too few shares, or they do not fit.
    """
    result = total.copy()
    for name in survivors:
        seed = _joined(group, name, seeds)
        found = commitment(group, name, seed)
        if not hmac.compare_digest(found, commitments[name]):
            raise UpdateError(_misfit(name))
        _add(result, _own_seed(group, name, seed), -1)
    for gone in sorted(set(sharers) - set(survivors)):
        key = _joined(group, gone, mask_keys)
        if _public(key) != group.keys[gone].mask:
            raise UpdateError(_misfit(gone))
        for name in survivors:
            pair = _pair_seed(group, key, gone, name)
            _add(result, pair, -_sign(name, gone))
    return result


# ---- the same lists for all ----


def confirm(
    group: Group,
    own: PrivateKeys,
    sender: str,
    to: str,
    sharers: Collection[str],
    survivors: Collection[str],
) -> bytes:
    """Return the MAC of the lists that this participant was given, for another one."""
    key = _channel(group, own, sender, to, "lists")
    given = json.dumps([sender, to, sorted(sharers), sorted(survivors)])
    return hmac.digest(key, given.encode(), "sha256")


def require_confirmed(
    group: Group,
    own: PrivateKeys,
    name: str,
    sharers: Collection[str],
    survivors: Collection[str],
    tags: Mapping[str, bytes],
) -> None:
    """Refuse to go on unless t survivors, the own site among them, have the same lists.

    Raises
    ------
    TrustError
        If fewer have, or one confirmed other lists.
    """
    for sender, tag in tags.items():
        if sender not in survivors or sender == name:
            raise TrustError(f"{sender} is not among the other survivors.")
        # What the sender computed for us: the channel's two ends have one key.
        key = _channel(group, own, name, sender, "lists")
        given = json.dumps([sender, name, sorted(sharers), sorted(survivors)])
        expected = hmac.digest(key, given.encode(), "sha256")
        if not hmac.compare_digest(tag, expected):
            raise TrustError(
                f"{sender} did not confirm the lists that this site was given; the "
                "coordinator gave sites different lists, or one of them lies."
            )
    if len(tags) + 1 < group.threshold:
        raise TrustError(
            f"{len(tags) + 1} sites confirmed the list of survivors; expected "
            f"{group.threshold} or more."
        )


# ---- helpers ----


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _agreed(private: bytes, public: bytes) -> bytes:
    """Return the secret that two holders of keys share.

    Raises
    ------
    TrustError
        If the public key is none that a site can have made.
    """
    try:
        theirs = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(private).exchange(theirs)
    except ValueError as error:
        raise TrustError("a public key is none of X25519's.") from error


def _derive(secret: bytes, purpose: str, binding: bytes, *names: str) -> bytes:
    """Return 32 bytes for one purpose, independent of those for any other."""
    purposes = json.dumps([purpose, binding.hex(), *names]).encode()
    info = b"fedgex secure aggregation 1\n" + purposes
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def _channel(group: Group, own: PrivateKeys, name: str, to: str, purpose: str) -> bytes:
    """Return the key of two participants for a purpose; both get the same."""
    agreed = _agreed(own.channel, group.keys[to].channel)
    return _derive(agreed, purpose, group.binding, *sorted((name, to)))


def _own_seed(group: Group, name: str, seed: bytes) -> bytes:
    return _derive(seed, "own mask", group.binding, name)


def _pair_seed(group: Group, mask_key: bytes, name: str, other: str) -> bytes:
    agreed = _agreed(mask_key, group.keys[other].mask)
    return _derive(agreed, "pair mask", group.binding, *sorted((name, other)))


def _sign(name: str, other: str) -> int:
    """Return the sign with which `name` adds a pair's mask; the other has the other."""
    return 1 if name < other else -1


def _add(total: Words, seed: bytes, sign: int) -> None:
    """Add a mask to `total`, in place, or subtract it."""
    for i, stream in zip(
        range(0, total.size, CHUNK), _stream(seed, total.size), strict=True
    ):
        part = total[i : i + CHUNK]
        if sign > 0:
            part += stream
        else:
            part -= stream


def _stream(seed: bytes, n: int) -> Iterator[Words]:
    """Yield n numbers of a generator, by chunks: the key stream, little-endian."""
    cipher = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    for i in range(0, n, CHUNK):
        zeros = ZEROS[: 4 * min(CHUNK, n - i)]
        yield np.frombuffer(cipher.update(zeros), dtype="<u4")


def _joined(group: Group, name: str, shares: Mapping[str, Mapping[str, int]]) -> bytes:
    held = shares.get(name, {})
    if len(held) < group.threshold:
        raise UpdateError(
            f"{len(held)} shares of a secret of {name}; expected {group.threshold} or "
            "more."
        )
    return shamir.join({group.place(holder): number for holder, number in held.items()})


def _misfit(name: str) -> str:
    return (
        f"the shares of a secret of {name} do not fit: a site sent a wrong one, or "
        f"{name} gave out wrong ones."
    )


def _told(sender: str, to: str) -> bytes:
    return json.dumps([sender, to]).encode()
