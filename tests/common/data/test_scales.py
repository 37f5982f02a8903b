"""Scales: conversion by hand, and which numbers fit which scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgex.common.data.scales import (
    CONVERTIBLE,
    Scale,
    convert,
    counts_per_million,
    formula_of,
    is_convertible,
    is_faint,
    misfit,
    recognise,
    scale_of,
)
from fedgex.common.errors import ConfigError

BY_HAND = {  # x = 0, 1 and 3 on every scale
    Scale.LINEAR: [0.0, 1.0, 3.0],
    Scale.LOG2P1: [0.0, 1.0, 2.0],
    Scale.LOG2P025: [-2.0, 0.3219280949, 1.7004397181],
    Scale.LN1P: [0.0, 0.6931471806, 1.3862943611],
    Scale.LOG10P1: [0.0, 0.3010299957, 0.6020599913],
}


def panel(n_genes: int, seed: int = 0) -> np.ndarray:
    """Return abundances of 50 samples: level of each gene, noise of each cell."""
    rng = np.random.default_rng(seed)
    level = rng.normal(8, 2.5, n_genes)
    return np.exp2(level + rng.normal(0, 1, (50, n_genes)))


@pytest.mark.parametrize("source", BY_HAND)
@pytest.mark.parametrize("target", BY_HAND)
def test_every_pair_of_scales_agrees_with_the_hand_calculation(
    source: Scale, target: Scale
) -> None:
    converted = convert([BY_HAND[source]], source, target)

    assert converted.dtype == np.float32
    np.testing.assert_allclose(converted, [BY_HAND[target]], atol=1e-6)


@given(
    x=st.floats(0, 1e6),
    source=st.sampled_from(sorted(CONVERTIBLE)),
    target=st.sampled_from(sorted(CONVERTIBLE)),
)
def test_there_and_back_again_is_where_it_began(
    x: float, source: Scale, target: Scale
) -> None:
    start = convert([x], Scale.LINEAR, source).astype(float)

    back = convert(convert(start, source, target).astype(float), target, source)

    np.testing.assert_allclose(back, start, rtol=1e-4, atol=1e-5)


def test_what_was_not_measured_stays_so() -> None:
    converted = convert([[np.nan, 1.0]], Scale.LOG2P1, Scale.LN1P)

    assert np.isnan(converted[0, 0])
    assert not np.isnan(converted[0, 1])


def test_a_rounded_floor_becomes_zero_and_nothing_below() -> None:
    assert convert([-2.00003], Scale.LOG2P025, Scale.LOG2P1)[0] == 0


@pytest.mark.parametrize("closed", [Scale.COUNTS, Scale.RELATIVE])
def test_counts_and_relative_values_convert_to_nothing_but_themselves(
    closed: Scale,
) -> None:
    assert is_convertible(closed, closed)
    np.testing.assert_array_equal(convert([1.0, 2.0], closed, closed), [1, 2])
    for other in set(Scale) - {closed}:
        assert not is_convertible(closed, other)
        assert not is_convertible(other, closed)
        with pytest.raises(ConfigError, match="cannot become"):
            convert([1.0], closed, other)


def test_counts_per_million_divide_by_the_library_and_not_by_the_panel() -> None:
    counts = [[10, 30], [5, 0]]

    cpm = counts_per_million(counts, [1_000_000, 500_000])

    np.testing.assert_allclose(cpm, [[10, 30], [10, 0]])


@pytest.mark.parametrize("n_genes", [1, 5, 50, 500])
@pytest.mark.parametrize("scale", sorted(CONVERTIBLE))
def test_true_scales_are_never_refused_whatever_the_panel(
    scale: Scale, n_genes: int
) -> None:
    values = convert(panel(n_genes), Scale.LINEAR, scale)

    assert misfit(values, scale) is None


def faint_genes(n_genes: int, seed: int) -> np.ndarray:
    """Return a panel of which every abundance is below 30."""
    x = np.exp2(np.random.default_rng(seed).normal(-0.5, 1.3, (100, n_genes)))
    return x.clip(max=30)


@pytest.mark.parametrize("n_genes", [1, 5, 20, 50])
@pytest.mark.parametrize("seed", range(5))
def test_a_panel_of_faint_genes_may_be_linear_and_deserves_a_look(
    n_genes: int, seed: int
) -> None:
    values = faint_genes(n_genes, seed)

    assert misfit(values, Scale.LINEAR) is None
    assert is_faint(values, Scale.LINEAR)


def test_five_evenly_faint_genes_are_not_taken_for_logarithms() -> None:
    even = np.random.default_rng(0).uniform(8, 25, (100, 5))

    assert misfit(even, Scale.LINEAR) is None
    assert is_faint(even, Scale.LINEAR)


def test_rounded_abundances_may_be_counts_and_others_may_not() -> None:
    assert misfit(np.rint(panel(30)), Scale.COUNTS) is None
    assert misfit(panel(30), Scale.COUNTS) == "some values are not integers"


@pytest.mark.parametrize(
    ("declared", "actual"),
    [
        (Scale.LINEAR, Scale.LOG2P1),
        (Scale.LINEAR, Scale.LN1P),
        (Scale.LOG2P1, Scale.LINEAR),
        (Scale.LN1P, Scale.LINEAR),
        (Scale.LOG10P1, Scale.LINEAR),
        (Scale.LOG10P1, Scale.LOG2P1),
        (Scale.COUNTS, Scale.LOG2P1),
        (Scale.RELATIVE, Scale.LOG2P1),
    ],
)
@pytest.mark.parametrize("n_genes", [20, 500])
def test_a_wrong_declaration_is_recognised(
    declared: Scale, actual: Scale, n_genes: int
) -> None:
    values = convert(panel(n_genes), Scale.LINEAR, actual)

    assert misfit(values, declared) is not None
    assert declared not in recognise(values)
    assert actual in recognise(values)


def test_negative_values_leave_two_scales_and_below_minus_two_one() -> None:
    assert recognise(np.array([[-1.0, 3.0]])) == {Scale.LOG2P025, Scale.RELATIVE}
    assert recognise(np.array([[-2.5, 3.0]])) == {Scale.RELATIVE}


def test_nothing_measured_could_be_anything() -> None:
    assert recognise(np.full((3, 2), np.nan)) == set(Scale)


def test_logarithms_to_base_ten_declared_as_base_two_look_faint() -> None:
    values = convert(panel(500), Scale.LINEAR, Scale.LOG10P1)

    assert is_faint(values, Scale.LOG2P1)
    assert not is_faint(values, Scale.LOG10P1)
    assert not is_faint(values[:, :50], Scale.LOG2P1)


# ---- what portals add before the logarithm ----

FORMULAS = {  # x = 0, 1 and 3
    "log2(x+0.001)": [-9.9657842847, 0.0014419741, 1.5854433821],
    "log2(tpm + 0.001)": [-9.9657842847, 0.0014419741, 1.5854433821],
    "ln(x+0.5)": [-0.6931471806, 0.4054651081, 1.2527629685],
    "log10(x + 0.1)": [-1.0, 0.0413926852, 0.4913616938],
    "log2(x)": [-np.inf, 0.0, 1.5849625007],
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_is_a_scale_of_its_own(formula: str) -> None:
    scale = Scale(formula)

    there = convert([0.0, 1.0, 3.0], Scale.LINEAR, scale)
    back = convert(FORMULAS[formula], scale, Scale.LOG2P1)

    np.testing.assert_allclose(there, FORMULAS[formula], atol=1e-6)
    np.testing.assert_allclose(back, [0.0, 1.0, 2.0], atol=1e-6)
    assert misfit(np.array([FORMULAS[formula][1:]]), scale) is None


@pytest.mark.parametrize(
    ("formula", "member"),
    [
        ("log2(x+1)", Scale.LOG2P1),
        ("log2(norm_count+1)", Scale.LOG2P1),
        ("log2(x + 0.25)", Scale.LOG2P025),
        ("ln(x+1.0)", Scale.LN1P),
        ("LOG10(TPM+1)", Scale.LOG10P1),
    ],
)
def test_a_formula_that_has_a_name_is_that_member(formula: str, member: Scale) -> None:
    assert Scale(formula) is member


def test_two_spellings_of_a_formula_are_one_scale() -> None:
    one, other = Scale("log2(x+0.001)"), Scale("log2( TPM + 1e-3 )")

    assert one == other
    assert one.value == str(other) == "log2(x+0.001)"
    assert is_convertible(one, other)
    np.testing.assert_array_equal(convert([-9.5], one, other), np.float32([-9.5]))


@pytest.mark.parametrize(
    ("nonsense", "words"),
    [
        ("log2", "what was added"),
        ("log(x+1)", "what was added"),
        ("log2(x-1)", "what was added"),
        ("log2(x+1000)", "at most 100"),
        ("log2(y+1)", "what was added"),
        ("log2(x+nan)", "what was added"),
        ("log2(count+1)", "raw counts"),
        ("log2(expected_count+1)", "raw counts"),
    ],
)
def test_nonsense_is_refused_with_what_is_accepted(nonsense: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scale_of(nonsense)
    with pytest.raises(ValueError, match="Scale"):
        Scale(nonsense)


def test_values_below_what_was_added_do_not_fit() -> None:
    scale = Scale("log2(x+0.001)")

    assert misfit(np.array([[-9.9658, 3.0]]), scale) is None  # four decimals
    assert misfit(np.array([[-11.0, 3.0]]), scale) == "some values are below -9.96578"


@pytest.mark.parametrize("decimals", [1, 2, 3, 6])
def test_a_rounded_floor_fits_whatever_the_decimals(decimals: int) -> None:
    scale = Scale("log2(x+0.001)")
    x = np.array([[0.0, 0.0, 5.0], [0.0, 2.0, 7.0]])

    values = convert(x, Scale.LINEAR, scale).astype(float).round(decimals)

    assert misfit(values, scale) is None
    assert formula_of(values) == (scale,)
    zeros = convert(values, scale, Scale.LINEAR)[x == 0]
    np.testing.assert_allclose(zeros, 0, atol=1e-6)
