"""The training loop and the loss of restoration, against hand calculations."""

import copy
import math
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from fedgex.common.models.gexbert import GexBert
from fedgex.common.models.training import (
    FitReport,
    Loss,
    evaluate,
    fit,
    fit_at_once,
    pretraining_loss,
    round_learning_rate,
)
from fedgex.common.study import (
    LocalTraining,
    MaskingRule,
    Pretraining,
)

from .small_site import LACKING, N, V, built, patients

PRETRAINING = Pretraining(rounds=1, batch_size=4, local_epochs=2)


def sgd(**changes: float) -> LocalTraining:
    """Return plain gradient descent, one batch an epoch, without clipping in effect."""
    plain = {
        "rounds": 1,
        "optimizer": "sgd",
        "weight_decay": 0,
        "max_grad_norm": 1e9,
        "batch_size": 100,
    }
    return LocalTraining.model_validate(plain | changes)


def to_three(p: nn.Parameter) -> Loss:
    """Return the loss (p - 3)^2 / 2, whatever the rows."""
    return lambda rows, rng: ((p - 3).square().sum() / 2, len(rows))


def one_fit(seed: int, learning_rate: float = 0.01) -> tuple[nn.Module, FitReport]:
    model = built(GexBert)
    loss = pretraining_loss(model, patients(), PRETRAINING)
    report = fit(
        model.parameters(),
        loss,
        N,
        PRETRAINING,
        learning_rate=learning_rate,
        seed=seed,
    )
    return model, report


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_equal_seeds_give_equal_bits_and_other_seeds_others():
    (first, report), (again, repeated), (other, _) = map(one_fit, (1, 1, 2))

    assert same(first, again)
    assert report == repeated
    assert not same(first, other)


def test_training_neither_reads_nor_moves_the_global_generator():
    first, _ = one_fit(1)
    model = built(GexBert)
    torch.manual_seed(77)
    before = torch.random.get_rng_state()

    loss = pretraining_loss(model, patients(), PRETRAINING)
    fit(model.parameters(), loss, N, PRETRAINING, learning_rate=0.01, seed=1)

    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(model, first)


def test_a_step_goes_down_the_gradient_by_the_learning_rate():
    p = nn.Parameter(torch.tensor([1.0]))

    fit([p], to_three(p), 5, sgd(), learning_rate=0.1, seed=0)

    assert p.item() == pytest.approx(1.0 - 0.1 * (1.0 - 3.0))


def test_a_proximal_term_pulls_the_second_step_towards_the_incoming_parameters():
    p = nn.Parameter(torch.tensor([1.0]))

    fit(
        [p],
        to_three(p),
        5,
        sgd(local_epochs=2),
        learning_rate=0.1,
        proximal_mu=4.0,
        seed=0,
    )

    first = 1.0 - 0.1 * (1.0 - 3.0)  # 1.2; the pull is zero at the start
    second = first - 0.1 * ((first - 3.0) + 4.0 * (first - 1.0))
    assert p.item() == pytest.approx(second)


def test_the_reported_loss_leaves_the_proximal_term_out():
    reports = []
    for mu in (0.0, 4.0):
        p = nn.Parameter(torch.tensor([1.0]))
        training = sgd(local_epochs=2)
        reports.append(
            fit(
                [p], to_three(p), 5, training, learning_rate=0.1, proximal_mu=mu, seed=0
            )
        )

    assert reports[1].train_loss == pytest.approx((2.0 + 1.8**2 / 2) / 2)
    assert reports[0] == reports[1]


def test_long_gradients_are_cut_to_the_greatest_norm():
    p = nn.Parameter(torch.zeros(2))
    slope = torch.tensor([3.0, 4.0])

    fit(
        [p],
        lambda rows, rng: (p @ slope, 1),
        5,
        sgd(max_grad_norm=1),
        learning_rate=1.0,
        seed=0,
    )

    torch.testing.assert_close(p.detach(), -slope / 5, atol=1e-5, rtol=1e-5)


def test_the_first_step_of_adamw_is_the_learning_rate_beside_the_decay():
    p = nn.Parameter(torch.tensor([1.0]))
    training = LocalTraining(rounds=1, batch_size=100, weight_decay=0.5)

    fit([p], to_three(p), 5, training, learning_rate=0.1, seed=0)

    assert p.item() == pytest.approx(1.0 * (1 - 0.1 * 0.5) + 0.1, rel=1e-5)


def test_every_patient_is_seen_once_an_epoch_in_batches_in_an_order_of_its_own():
    p, seen = nn.Parameter(torch.zeros(1)), []

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, int]:
        seen.append(rows.tolist())
        return p.sum(), len(rows)

    fit([p], loss, 20, sgd(batch_size=8, local_epochs=2), learning_rate=0.1, seed=0)

    assert [len(batch) for batch in seen] == [8, 8, 4] * 2
    first, second = (tuple(chain(*epoch)) for epoch in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({first, second, tuple(range(20))}) == 3


def test_the_report_weighs_batches_by_their_terms_and_counts_one_pass():
    p = nn.Parameter(torch.zeros(1))

    report = fit(
        [p],
        lambda rows, rng: (rows.float().mean() + 0 * p.sum(), 3 * len(rows)),
        5,
        sgd(batch_size=2, local_epochs=2),
        learning_rate=0.1,
        seed=0,
    )

    assert (report.num_examples, report.num_loss_terms) == (5, 15)
    assert report.train_loss == pytest.approx(2.0)


def test_a_round_without_any_term_has_no_loss_rather_than_a_loss_of_zero():
    p = nn.Parameter(torch.zeros(1))

    report = fit(
        [p], lambda rows, rng: (0 * p.sum(), 0), 5, sgd(), learning_rate=0.1, seed=0
    )

    assert math.isnan(report.train_loss)
    assert report.num_loss_terms == 0
    assert math.isnan(evaluate(lambda rows, rng: (p.sum(), 0), 5, 2, seed=0))


def test_judging_is_a_mean_over_terms_that_changes_nothing():
    model = built(GexBert)
    before = copy.deepcopy(model)
    loss = pretraining_loss(model, patients(), PRETRAINING)

    first, again = evaluate(loss, N, 4, seed=3), evaluate(loss, N, 4, seed=3)
    mean = evaluate(lambda rows, rng: (rows.float().mean(), len(rows)), 5, 2, seed=0)

    assert first == again != evaluate(loss, N, 4, seed=4)
    assert mean == pytest.approx(2.0)
    assert same(model, before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("server_round", "expected"), [(1, 1.0), (2, 0.8828427), (3, 0.6), (5, 0.2)]
)
def test_the_learning_rate_falls_by_a_half_cosine_over_the_rounds(
    server_round, expected
):
    training = LocalTraining(rounds=5, learning_rate=1.0, final_learning_rate=0.2)

    assert round_learning_rate(training, server_round) == pytest.approx(expected)


def test_a_single_round_has_the_peak_learning_rate():
    training = LocalTraining(rounds=1, learning_rate=0.3, final_learning_rate=0.2)

    assert round_learning_rate(training, 1) == pytest.approx(0.3)


# ---- pretraining ----


def gene_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if len(p) == V}


def test_a_gene_that_the_site_lacks_has_exactly_zero_gradient_rows():
    model = built(GexBert)
    loss = pretraining_loss(model, patients(), PRETRAINING)
    rng = torch.Generator().manual_seed(0)

    for _ in range(20):
        loss(torch.arange(N), rng)[0].backward()

    others = torch.arange(V) != LACKING
    assert len(gene_tables(model)) == 5
    for name, table in gene_tables(model).items():
        assert table.grad is not None
        assert not table.grad[LACKING].any(), name
        assert table.grad[others].any(dim=1).all(), name


def test_a_gene_that_the_site_lacks_has_no_term_in_the_loss():
    model = built(GexBert)
    loss = pretraining_loss(model, patients(), PRETRAINING)
    before = evaluate(loss, N, 4, seed=0)

    with torch.no_grad():
        for table in gene_tables(model).values():
            table[LACKING] = 1e6

    assert evaluate(loss, N, 4, seed=0) == before


def test_pretraining_has_a_term_for_each_hidden_cell():
    phase = Pretraining(masking=MaskingRule(min_rate=0.99, max_rate=0.99))
    loss = pretraining_loss(built(GexBert), patients(), phase)

    terms = {loss(torch.arange(N), torch.Generator().manual_seed(i))[1] for i in (0, 1)}

    measured = (N - 1) * (V - 1) + V - 2
    assert all(measured - N - 5 <= n <= measured - N for n in terms)


# ---- fine-tuning ----


def test_many_epochs_at_once_take_the_learning_rates_of_as_many_rounds():
    # The loss 3 p has the gradient 3, so that p falls by thrice the sum of the rates.
    p = nn.Parameter(torch.tensor([0.0]))
    training = sgd(learning_rate=0.4, final_learning_rate=0.5)

    last = fit_at_once(
        [p], lambda rows, rng: (3 * p.sum(), len(rows)), N, training, epochs=3, seed=1
    )

    assert p.item() == pytest.approx(-3 * (0.4 + 0.3 + 0.2))
    assert last == pytest.approx(3 * -3 * (0.4 + 0.3))  # before the last step


def test_many_epochs_at_once_keep_one_optimiser():
    # Adam's step is the learning rate while the gradient keeps its sign and size; begun
    # anew with a gradient a tenth as large it would be so again, and kept it is not.
    p = nn.Parameter(torch.tensor([0.0]))
    slopes = iter([1.0, 0.1])
    training = sgd(learning_rate=0.1, final_learning_rate=1).model_copy(
        update={"optimizer": "adamw"}
    )

    def loss(rows: Tensor, rng: torch.Generator) -> tuple[Tensor, int]:
        return next(slopes) * p.sum(), len(rows)

    fit_at_once([p], loss, N, training, epochs=2, seed=1)

    # by hand: m = .19 and v = .020096 after two steps, without bias .6 * and / .0396
    first, m, v = 0.1, 0.9 * 0.1 + 0.1 * 0.1, 0.98 * 0.02 + 0.02 * 0.01
    second = 0.1 * (m / (1 - 0.9**2)) / math.sqrt(v / (1 - 0.98**2))
    assert p.item() == pytest.approx(-(first + second), rel=1e-4)
    assert second < 0.09
