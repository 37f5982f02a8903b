"""The protocol by itself: vectors by hand, exact sums, and what nobody can learn."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from fedgex.common.errors import TrustError, UpdateError
from fedgex.common.secure_aggregation import protocol, shamir
from fedgex.common.secure_aggregation.protocol import (
    Context,
    Group,
    PrivateKeys,
    PublicKeys,
    Shares,
)
from fedgex.common.secure_aggregation.shamir import PRIME
from fedgex.common.secure_aggregation.vectors import FixedPoint, Words

CONTEXT = Context(
    contract="c" * 64, run="run-1", phase="pretraining", round=3, attempt=1
)
SIZE = 60_000
SURELY = 1e-7
"""Probability with which chance alone fails a test of uniformity."""


@dataclass
class Exchange:
    """n sites that have made and shared their keys; no network between them."""

    n: int
    context: Context = CONTEXT

    def __post_init__(self) -> None:
        self.names = tuple(f"site-{i}" for i in range(self.n))
        self.own = {name: PrivateKeys.new() for name in self.names}
        every = np.ones(5, dtype=np.bool_)
        self.group = Group(
            self.context, {name: own.public(every) for name, own in self.own.items()}
        )
        self.dealt = {
            name: protocol.share_out(self.group, own) for name, own in self.own.items()
        }

    def masked(self, name: str, x: Words, sharers: Sequence[str] = ()) -> Words:
        return protocol.masked(
            self.group, self.own[name], name, sharers or self.names, x
        )

    def unmasked(
        self,
        masked: dict[str, Words],
        *,
        sharers: Sequence[str] = (),
        helpers: Collection[str] = (),
    ) -> Words:
        sharers = sharers or self.names
        survivors = tuple(masked)
        helpers = helpers or survivors
        total = np.zeros(len(next(iter(masked.values()))), dtype=np.uint32)
        for each in masked.values():
            total += each
        return protocol.unmasked(
            self.group,
            sharers,
            survivors,
            total,
            {s: {h: self.dealt[s][h].seed for h in helpers} for s in survivors},
            {
                s: {h: self.dealt[s][h].mask for h in helpers}
                for s in sharers
                if s not in survivors
            },
            {
                s: protocol.commitment(self.group, s, self.own[s].seed)
                for s in survivors
            },
        )


def vectors(names: Sequence[str], size: int = 50) -> dict[str, Words]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 2**32, size, dtype=np.uint32, endpoint=False)
        for name in names
    }


def total_of(x: dict[str, Words], names: Collection[str]) -> Words:
    exact = sum(x[name].astype(object) for name in names)
    return np.array([int(v) % 2**32 for v in exact], dtype=np.uint32)


def assert_uniform(words: Words) -> None:
    """Assert that each of the four bytes is uniform, by chi-square with 255 degrees."""
    for part in words.view(np.uint8).reshape(-1, 4).T:
        counts = np.bincount(part, minlength=256)
        assert stats.chisquare(counts).pvalue > SURELY


def structured(size: int = SIZE) -> Words:
    """Return what an update looks like: small numbers, far from uniform."""
    values = np.random.default_rng(1).normal(0, 1e-3, size)
    words = FixedPoint(1.0, 10).encode(values)
    with pytest.raises(AssertionError):
        assert_uniform(words)
    return words


# ---- thresholds ----


@pytest.mark.parametrize(("n", "t"), [(3, 3), (4, 3), (5, 4), (6, 5), (9, 7), (10, 7)])
def test_the_threshold_is_the_least_above_two_thirds(n: int, t: int) -> None:
    assert protocol.threshold(n) == t
    assert 3 * t > 2 * n >= 3 * (t - 1)


@pytest.mark.parametrize("n", range(3, 40))
def test_no_two_lists_can_both_find_as_many_sites_as_the_threshold(n: int) -> None:
    assert 2 * protocol.threshold(n) > n


def test_two_participants_are_refused() -> None:
    with pytest.raises(TrustError, match="among 2 sites"):
        Exchange(2)


# ---- keys and masks, against other implementations ----


def test_a_mask_is_the_key_stream_of_rfc_8439() -> None:
    (found,) = protocol._stream(bytes(32), 4)
    # RFC 8439, A.1, test vector 1
    stream = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28")
    assert found.tolist() == np.frombuffer(stream, "<u4").tolist()


def test_the_stream_goes_on_over_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(protocol._stream(b"k" * 32, 100)))
    monkeypatch.setattr(protocol, "CHUNK", 32)
    assert np.concatenate(list(protocol._stream(b"k" * 32, 100))).tolist() == (
        whole.tolist()
    )


def test_keys_are_derived_by_hkdf_with_everything_that_they_are_for() -> None:
    binding = hashlib.sha256(b"x").digest()
    found = protocol._derive(b"secret", "pair mask", binding, "north", "south")

    # RFC 5869, 2.2 and 2.3, with a salt of zeros
    told = json.dumps(["pair mask", binding.hex(), "north", "south"]).encode()
    info = b"fedgex secure aggregation 1\n" + told
    extracted = hmac.digest(bytes(32), b"secret", "sha256")
    assert found == hmac.digest(extracted, info + b"\x01", "sha256")


@pytest.mark.parametrize(
    "change",
    [
        {"contract": "d" * 64},
        {"run": "run-2"},
        {"phase": "survival"},
        {"round": 4},
        {"attempt": 2},
    ],
)
def test_what_is_agreed_upon_differs_with_the_context(change: dict[str, str]) -> None:
    first = Exchange(3)
    other = Group(dataclasses.replace(CONTEXT, **change), first.group.keys)
    assert other.binding != first.group.binding


def test_what_is_agreed_upon_differs_with_the_participants() -> None:
    first = Exchange(4)
    fewer = {name: first.group.keys[name] for name in first.names[:3]}
    assert Group(CONTEXT, fewer).binding != first.group.binding


def test_a_key_that_agrees_on_zero_with_anybody_is_refused() -> None:
    first = Exchange(3)
    keys = dict(first.group.keys)
    weak = dataclasses.replace(
        keys["site-1"], mask=bytes(32), channel=bytes([1] + [0] * 31)
    )
    group = Group(CONTEXT, keys | {"site-1": weak})
    with pytest.raises(TrustError, match="X25519"):
        protocol.masked(
            group, first.own["site-0"], "site-0", first.names, np.zeros(1, np.uint32)
        )
    with pytest.raises(TrustError, match="X25519"):
        protocol.seal(group, first.own["site-0"], "site-0", "site-1", Shares(1, 2))


def test_one_key_under_two_names_is_refused() -> None:
    first = Exchange(3)
    keys = dict(first.group.keys)
    with pytest.raises(TrustError, match="one key"):
        Group(CONTEXT, keys | {"site-9": keys["site-1"]})


# ---- sums ----


@pytest.mark.parametrize("n", [3, 4, 7, 10])
def test_the_sum_is_exact_with_everybody(n: int) -> None:
    sites = Exchange(n)
    x = vectors(sites.names)
    masked = {name: sites.masked(name, x[name]) for name in sites.names}
    assert sites.unmasked(masked).tolist() == total_of(x, sites.names).tolist()


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_the_sum_is_exact_when_sites_leave_after_sharing(gone: int) -> None:
    sites = Exchange(10)
    x, left = vectors(sites.names), sites.names[gone:]
    masked = {name: sites.masked(name, x[name]) for name in left}
    assert sites.unmasked(masked).tolist() == total_of(x, left).tolist()


def test_the_sum_is_exact_when_sites_leave_before_sharing() -> None:
    sites = Exchange(7)
    x, sharers = vectors(sites.names), sites.names[:6]
    left = sharers[1:]
    masked = {name: sites.masked(name, x[name], sharers) for name in left}
    found = sites.unmasked(masked, sharers=sharers)
    assert found.tolist() == total_of(x, left).tolist()


def test_the_sum_is_exact_when_sites_leave_after_sending_their_vector() -> None:
    sites = Exchange(7)
    x = vectors(sites.names)
    masked = {name: sites.masked(name, x[name]) for name in sites.names}
    found = sites.unmasked(masked, helpers=sites.names[2:])
    assert found.tolist() == total_of(x, sites.names).tolist()


def test_below_the_threshold_there_is_no_sum() -> None:
    sites = Exchange(7)
    x = vectors(sites.names)
    masked = {name: sites.masked(name, x[name]) for name in sites.names}
    with pytest.raises(UpdateError, match=r"4 shares .* expected 5"):
        sites.unmasked(masked, helpers=sites.names[:4])


def test_a_wrong_share_is_found() -> None:
    sites = Exchange(4)
    x = vectors(sites.names)
    masked = {name: sites.masked(name, x[name]) for name in sites.names}
    dealt = sites.dealt["site-2"]
    dealt["site-1"] = Shares(dealt["site-1"].mask, (dealt["site-1"].seed + 1) % PRIME)
    with pytest.raises(UpdateError, match=r"do not (fit|belong)"):
        sites.unmasked(masked)

    del masked["site-2"]
    dealt["site-1"] = Shares((dealt["site-1"].mask + 1) % PRIME, dealt["site-1"].seed)
    with pytest.raises(UpdateError, match=r"do not (fit|belong)"):
        sites.unmasked(masked)


# ---- what nobody can learn ----


def test_a_masked_update_is_uniform() -> None:
    sites, x = Exchange(4), structured()
    for name in sites.names:
        assert_uniform(sites.masked(name, x))


def test_a_sum_that_lacks_one_vector_is_uniform() -> None:
    sites, x = Exchange(4), structured()
    total = np.zeros(SIZE, dtype=np.uint32)
    for name in sites.names[1:]:
        total += sites.masked(name, x)
    assert_uniform(total)


def test_taking_off_the_seeds_alone_leaves_the_masks_of_pairs() -> None:
    sites, x = Exchange(4), structured()
    masked = sites.masked("site-0", x)
    protocol._add(
        masked,
        protocol._own_seed(sites.group, "site-0", sites.own["site-0"].seed),
        -1,
    )
    assert_uniform(masked)


def test_knowing_the_masks_of_pairs_leaves_the_own_mask() -> None:
    """The vector of a site that came too late, whose mask key was reconstructed."""
    sites, x = Exchange(4), structured()
    masked = sites.masked("site-0", x)
    for other in sites.names[1:]:
        pair = protocol._pair_seed(
            sites.group, sites.own["site-0"].mask, "site-0", other
        )
        protocol._add(masked, pair, -protocol._sign("site-0", other))
    assert_uniform(masked)


@pytest.mark.parametrize("n", [4, 7, 10])
def test_as_many_colluding_sites_as_may_be_missing_learn_no_other_update(
    n: int,
) -> None:
    """They pool keys and shares with the coordinator, after an honest unmasking."""
    sites, x = Exchange(n), structured()
    bad = sites.names[: n - sites.group.threshold]
    assert bad
    # Of the sum they know their own parts; of one honest vector, its own mask (the
    # seeds were given out) and its masks with them.
    masked, name = sites.masked(sites.names[-1], x), sites.names[-1]
    protocol._add(
        masked, protocol._own_seed(sites.group, name, sites.own[name].seed), -1
    )
    for each in bad:
        pair = protocol._pair_seed(sites.group, sites.own[each].mask, each, name)
        protocol._add(masked, pair, -protocol._sign(name, each))
    assert_uniform(masked)
    # Their shares of its mask key are too few.
    held = {sites.group.place(b): sites.dealt[name][b].mask for b in bad}
    assert protocol._public(_forced(held)) != sites.group.keys[name].mask


def _forced(held: dict[int, int]) -> bytes:
    try:
        return shamir.join(held)
    except UpdateError:
        return bytes(32)


def test_others_messages_do_not_depend_on_an_update() -> None:
    sites = Exchange(3)
    x = vectors(sites.names)
    before = {name: sites.masked(name, x[name]) for name in sites.names}
    x["site-0"] = x["site-0"] + np.uint32(1)
    after = {name: sites.masked(name, x[name]) for name in sites.names}
    for name in ("site-1", "site-2"):
        assert before[name].tolist() == after[name].tolist()
    # One mask for two vectors would show their difference: hence new keys each time.
    assert set((after["site-0"] - before["site-0"]).tolist()) == {1}


def test_the_same_update_under_new_keys_is_another_message() -> None:
    x = structured()
    first, second = (Exchange(3).masked("site-0", x) for _ in range(2))
    assert_uniform(first - second)


# ---- shares on their way ----


def test_shares_arrive_as_they_were_sealed() -> None:
    sites = Exchange(3)
    sent = sites.dealt["site-0"]["site-1"]
    box = protocol.seal(sites.group, sites.own["site-0"], "site-0", "site-1", sent)
    found = protocol.unseal(sites.group, sites.own["site-1"], "site-0", "site-1", box)
    assert found == sent


def test_shares_cannot_be_opened_by_another_site_or_come_from_another() -> None:
    sites = Exchange(3)
    sent = sites.dealt["site-0"]["site-1"]
    box = protocol.seal(sites.group, sites.own["site-0"], "site-0", "site-1", sent)
    for sender, to in (("site-0", "site-2"), ("site-2", "site-1")):
        with pytest.raises(TrustError, match="cannot be opened"):
            protocol.unseal(sites.group, sites.own[to], sender, to, box)
    # Nor sent back to where they came from, though both ends have one key.
    with pytest.raises(TrustError, match="cannot be opened"):
        protocol.unseal(sites.group, sites.own["site-0"], "site-1", "site-0", box)


@pytest.mark.parametrize("change", [{"round": 4}, {"attempt": 2}, {"run": "run-2"}])
def test_shares_of_another_exchange_are_refused_even_under_the_same_keys(
    change: dict[str, str],
) -> None:
    sites = Exchange(3)
    sent = sites.dealt["site-0"]["site-1"]
    box = protocol.seal(sites.group, sites.own["site-0"], "site-0", "site-1", sent)
    later = Group(dataclasses.replace(CONTEXT, **change), sites.group.keys)
    with pytest.raises(TrustError, match="cannot be opened"):
        protocol.unseal(later, sites.own["site-1"], "site-0", "site-1", box)


def test_a_changed_share_is_refused() -> None:
    sites = Exchange(3)
    sent = sites.dealt["site-0"]["site-1"]
    box = protocol.seal(sites.group, sites.own["site-0"], "site-0", "site-1", sent)
    for i in range(0, len(box), 7):
        changed = box[:i] + bytes([box[i] ^ 1]) + box[i + 1 :]
        with pytest.raises(TrustError, match="cannot be opened"):
            protocol.unseal(
                sites.group, sites.own["site-1"], "site-0", "site-1", changed
            )
    with pytest.raises(TrustError, match="cannot be opened"):
        protocol.unseal(sites.group, sites.own["site-1"], "site-0", "site-1", b"")


def test_sites_that_were_told_other_keys_share_nothing() -> None:
    """A coordinator that replaces a key for one site is found by its neighbours."""
    sites = Exchange(3)
    keys = dict(sites.group.keys)
    forged = PrivateKeys.new().public(np.ones(5, dtype=np.bool_))
    lied_to = Group(CONTEXT, keys | {"site-2": forged})
    sent = sites.dealt["site-0"]["site-1"]
    box = protocol.seal(lied_to, sites.own["site-0"], "site-0", "site-1", sent)
    with pytest.raises(TrustError, match="given other keys"):
        protocol.unseal(sites.group, sites.own["site-1"], "site-0", "site-1", box)


# ---- the same lists for all ----


def confirmations(
    sites: Exchange, lists: dict[str, tuple[str, ...]], to: str
) -> dict[str, bytes]:
    return {
        name: protocol.confirm(
            sites.group, sites.own[name], name, to, sites.names, survivors
        )
        for name, survivors in lists.items()
        if name != to
    }


def test_sites_that_were_told_the_same_go_on() -> None:
    sites = Exchange(4)
    told = sites.names[:3]
    for name in told:
        tags = confirmations(sites, dict.fromkeys(told, told), name)
        protocol.require_confirmed(
            sites.group, sites.own[name], name, sites.names, told, tags
        )


def test_sites_that_were_told_different_survivors_stop() -> None:
    sites = Exchange(4)
    told, other = sites.names[:3], sites.names[1:]
    tags = confirmations(
        sites, {"site-0": told, "site-1": told, "site-2": other}, "site-1"
    )
    with pytest.raises(TrustError, match="site-2 did not confirm"):
        protocol.require_confirmed(
            sites.group, sites.own["site-1"], "site-1", sites.names, told, tags
        )


def test_too_few_confirmations_are_not_enough() -> None:
    sites = Exchange(4)
    told = sites.names
    tags = confirmations(sites, {"site-0": told, "site-1": told}, "site-1")
    with pytest.raises(TrustError, match="2 sites confirmed"):
        protocol.require_confirmed(
            sites.group, sites.own["site-1"], "site-1", sites.names, told, tags
        )


def test_a_confirmation_for_one_site_is_none_for_another() -> None:
    sites = Exchange(3)
    tags = confirmations(sites, dict.fromkeys(sites.names, sites.names), "site-1")
    tags["site-2"] = confirmations(
        sites, dict.fromkeys(sites.names, sites.names), "site-0"
    )["site-2"]
    with pytest.raises(TrustError, match="site-2 did not confirm"):
        protocol.require_confirmed(
            sites.group, sites.own["site-1"], "site-1", sites.names, sites.names, tags
        )


# ---- panels ----


def test_a_panel_survives_its_way() -> None:
    for n in (1, 8, 9, 700):
        panel = np.random.default_rng(n).random(n) > 0.5
        keys = PrivateKeys.new().public(panel)
        assert protocol.measured(keys, n).tolist() == panel.tolist()
    with pytest.raises(TrustError, match="not over 30"):
        protocol.measured(PublicKeys(channel=b"", mask=b"", measured=b"ab"), 30)


def test_genes_are_counted_over_the_named_sites() -> None:
    panels = ([1, 0, 1], [1, 1, 0], [1, 0, 0])
    keys = {
        name: PrivateKeys.new().public(np.array(panel, dtype=np.bool_))
        for name, panel in zip("abc", panels, strict=True)
    }
    group = Group(CONTEXT, keys)
    assert group.counts("abc", 3).tolist() == [3, 1, 1]
    assert group.counts("ab", 3).tolist() == [2, 1, 1]


def test_pairs_of_masks_cancel_for_every_pair() -> None:
    sites = Exchange(3)
    for one, other in itertools.permutations(sites.names, 2):
        seeds = {
            protocol._pair_seed(sites.group, sites.own[a].mask, a, b)
            for a, b in ((one, other), (other, one))
        }
        assert len(seeds) == 1
        assert protocol._sign(one, other) == -protocol._sign(other, one)
