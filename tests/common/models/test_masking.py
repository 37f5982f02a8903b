import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedgex.common.errors import ConfigError
from fedgex.common.models.masking import (
    PATTERNS,
    draw_hidden,
    low_expression,
    mcar,
    panel,
    random_panel,
)
from fedgex.common.settings import added
from fedgex.common.study import MaskingRule


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, n_patients: int = 6, n_genes: int = 9) -> tuple[Tensor, Tensor]:
    """Return values and what of them is measured; rows from empty to complete."""
    generator = seeded(seed)
    values = torch.randn(n_patients, n_genes, generator=generator)
    share = torch.linspace(0, 1, n_patients)[:, None]
    measured = torch.rand(values.shape, generator=generator) < share
    return torch.where(measured, values, torch.nan), measured


def every_pattern(values: Tensor, measured: Tensor, rate: float, seed: int):
    yield mcar(measured, rate, seeded(seed))
    yield random_panel(measured, rate, seeded(seed))
    yield low_expression(values, measured, rate, seeded(seed))


@given(st.integers(0, 2**31), st.floats(0.01, 0.99))
def test_only_measured_cells_are_hidden_some_but_not_all_of_them(seed, rate):
    values, measured = batch(seed)

    for hidden in every_pattern(values, measured, rate, seed):
        assert hidden.shape == measured.shape
        assert not (hidden & ~measured).any()
        several = measured.sum(1) > 1
        assert (hidden.any(1) == several).all()
        assert ((measured & ~hidden).any(1) == measured.any(1)).all()


@given(st.integers(0, 2**31))
def test_equal_seeds_hide_equal_cells_and_other_seeds_others(seed):
    values = torch.randn(20, 100, generator=seeded(1))
    measured = torch.ones_like(values, dtype=torch.bool)

    first = list(every_pattern(values, measured, 0.5, seed))
    again = list(every_pattern(values, measured, 0.5, seed))
    other = list(every_pattern(values, measured, 0.5, seed + 1))

    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95])
def test_the_hidden_share_of_measured_cells_is_near_the_rate(rate):
    values = torch.randn(200, 1000, generator=seeded(2))
    measured = torch.rand(values.shape, generator=seeded(3)) < 0.7

    completely, genes, low = every_pattern(values, measured, rate, 4)

    # Two hundred thousand cells vary by .001, one thousand genes by .016 at most.
    assert (completely.sum() / measured.sum()).item() == pytest.approx(rate, abs=0.006)
    assert (low.sum() / measured.sum()).item() == pytest.approx(rate, abs=0.006)
    assert (genes.sum() / measured.sum()).item() == pytest.approx(rate, abs=0.06)


def test_cells_are_hidden_at_random_independently_of_each_other():
    measured = torch.ones(2000, 10, dtype=torch.bool)

    hidden = mcar(measured, 0.5, seeded()).float()

    correlation = torch.corrcoef(hidden.T) - torch.eye(10)
    assert correlation.abs().max() < 0.1


def test_whole_genes_are_hidden_for_every_patient_alike():
    measured = torch.ones(30, 50, dtype=torch.bool)
    measured[:, :5] = False

    hidden = random_panel(measured, 0.4, seeded())

    assert (hidden == hidden[0]).all()
    assert 0 < hidden[0].sum() < 45


def test_a_patient_with_gaps_misses_the_same_genes_as_the_others():
    measured = torch.ones(2, 200, dtype=torch.bool)
    measured[1, ::3] = False

    hidden = random_panel(measured, 0.5, seeded())

    assert torch.equal(hidden[1], hidden[0] & measured[1])


def test_low_values_drop_out_with_the_documented_probability():
    values = torch.tensor([-1.0, 0.0, 1.0]).repeat(2000, 100)
    measured = torch.ones_like(values, dtype=torch.bool)

    hidden = low_expression(values, measured, 0.5, seeded())

    # At rate 1/2 values symmetric about 0 have intercept 0: P = 1 / (1 + exp(2 x)).
    shares = [hidden[values == x].float().mean().item() for x in (-1.0, 0.0, 1.0)]
    assert shares == pytest.approx([0.880797, 0.5, 0.119203], abs=0.005)


def test_a_patient_of_low_expression_throughout_loses_no_more_than_others():
    values = torch.randn(2, 20_000, generator=seeded(5)) + torch.tensor([[0.0], [-3.0]])
    measured = torch.ones_like(values, dtype=torch.bool)

    hidden = low_expression(values, measured, 0.3, seeded())

    assert hidden.float().mean(1).tolist() == pytest.approx([0.3, 0.3], abs=0.02)


def test_extreme_values_do_not_break_low_expression():
    values = torch.tensor([[-60.0, -1.0, 0.0, 1.0, 80.0]]).repeat(2000, 20)
    measured = torch.ones_like(values, dtype=torch.bool)

    hidden = low_expression(values, measured, 0.4, seeded())

    assert hidden.float().mean().item() == pytest.approx(0.4, abs=0.01)
    assert hidden[:, 0].all()
    assert not hidden[:, 4].any()


@given(st.integers(0, 2**31), st.integers(1, 39))
def test_a_panel_leaves_exactly_the_genes_asked_for(seed, n_genes):
    measured = torch.ones(4, 50, dtype=torch.bool)
    measured[:, 40:] = False

    hidden = panel(measured, n_genes, seeded(seed))

    assert (hidden == hidden[0]).all()
    assert (measured & ~hidden).sum(1).tolist() == [n_genes] * 4
    assert not (hidden & ~measured).any()


def test_panels_of_equal_seed_are_nested_and_of_other_seeds_differ():
    measured = torch.ones(3, 200, dtype=torch.bool)

    small, large = (~panel(measured, n, seeded(1)) for n in (50, 100))

    assert not (small & ~large).any()
    assert not torch.equal(small, ~panel(measured, 50, seeded(2)))


@pytest.mark.parametrize("n_genes", [0, 5, 6])
def test_a_panel_that_leaves_nothing_to_hide_or_to_see_is_refused(n_genes):
    with pytest.raises(ConfigError, match="expected 1 to 4"):
        panel(torch.ones(2, 5, dtype=torch.bool), n_genes, seeded())


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_that_hides_nothing_or_everything_is_refused(rate):
    values, measured = batch(0)

    for hide in (mcar, random_panel):
        with pytest.raises(ConfigError, match="missing rate"):
            hide(measured, rate, seeded())
    with pytest.raises(ConfigError, match="missing rate"):
        low_expression(values, measured, rate, seeded())


def test_every_pattern_has_its_weight_in_a_study_and_the_other_way_round():
    rates = {"min_rate", "max_rate"}

    assert list(PATTERNS) == [n for n in MaskingRule.model_fields if n not in rates]


def test_a_pattern_that_was_added_moves_no_draw_of_a_study_that_does_not_use_it():
    class Later(MaskingRule):
        block: float = added(0.0, ge=0)

    values, measured = batch(1)
    for seed in range(20):
        torch.testing.assert_close(
            draw_hidden(values, measured, Later(), seeded(seed)),
            draw_hidden(values, measured, MaskingRule(), seeded(seed)),
        )


def test_a_pattern_that_was_added_hides_once_a_study_gives_it_all_the_weight(
    monkeypatch: pytest.MonkeyPatch,
):
    class Later(MaskingRule):
        block: float = added(0.0, ge=0)

    monkeypatch.setitem(PATTERNS, "block", lambda _, measured, __, ___: measured)
    values, measured = batch(1)
    rule = Later(mcar=0, panel=0, mnar=0, block=1)

    assert torch.equal(draw_hidden(values, measured, rule, seeded()), measured)
