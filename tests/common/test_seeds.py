"""Seeds come from names alone."""

import hashlib

import pytest
import torch

from fedgex.common.seeds import derive, generator, seeded


def test_a_seed_is_the_first_63_bits_of_the_hash_of_the_names():
    digest = hashlib.sha256(b"7/round/3").hexdigest()

    assert derive(7, "round", 3) == int(digest[:16], 16) // 2


def test_every_name_and_the_order_of_names_make_another_seed():
    seeds = {
        derive(1),
        derive(2),
        derive(1, "a"),
        derive(1, "b"),
        derive(1, "a", "b"),
        derive(1, "b", "a"),
        derive(1, "a", 1),
    }

    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_of_one_name_agree_and_ignore_the_global_one():
    first = torch.rand(4, generator=generator(1, "x"))
    torch.rand(3)

    assert torch.equal(torch.rand(4, generator=generator(1, "x")), first)
    assert not torch.equal(torch.rand(4, generator=generator(1, "y")), first)


def test_a_seeded_block_repeats_itself_and_leaves_the_global_generator_as_it_was():
    before = torch.random.get_rng_state()

    drawn = []
    for _ in range(2):
        with seeded(3, "block"):
            drawn.append(torch.rand(4))

    assert torch.equal(*drawn)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_global_generator_is_put_back_after_an_error_too():
    before = torch.random.get_rng_state()

    with pytest.raises(ZeroDivisionError), seeded(3):
        torch.rand(4 // 0)

    assert torch.equal(torch.random.get_rng_state(), before)
