"""Training at one hospital, against hand calculations."""

import copy
import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedgex.client.training import (
    FitReport,
    Loss,
    classification_loss,
    fit,
    judge,
    pretraining_loss,
    round_learning_rate,
    survival_loss,
)
from fedgex.common.harmonise import Patients
from fedgex.common.model import (
    ClassificationHead,
    Encoder,
    GexBert,
    ModelConfig,
    SurvivalHead,
)
from fedgex.common.objectives import embed
from fedgex.common.study import (
    Classification,
    LocalTraining,
    MaskingRule,
    Pretraining,
    Survival,
)

N, V, LACKING = 6, 9, 4
CONFIG = ModelConfig(n_genes=V, width=8, n_latents=3, n_blocks=1, n_heads=2)
PRETRAINING = Pretraining(rounds=1, batch_size=4, local_epochs=2)


def patients() -> Patients:
    """Return patients of a site that does not measure the gene LACKING."""
    values = torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    values[0, 1] = torch.nan
    values[:, LACKING] = torch.nan
    return Patients(
        values=values,
        cancer_type=("BRCA", "KIRC", "BRCA", "BRCA", "KIRC", "KIRC"),
        duration=torch.tensor([100.0, 500.0, 500.0, 900.0, 50.0, 700.0]),
        event=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        clinical=torch.tensor([[0.5, 1.0]] * N),
    )


def built(module: type[GexBert] | type[Encoder]) -> nn.Module:
    torch.manual_seed(0)
    return module(CONFIG)


def survival_head() -> SurvivalHead:
    torch.manual_seed(1)
    head = SurvivalHead(CONFIG.width, 2, 2)
    nn.init.normal_(head.linear.weight)
    return head


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
    assert math.isnan(judge(lambda rows, rng: (p.sum(), 0), 5, 2, seed=0))


def test_training_lowers_the_loss_of_the_patients_trained_on():
    phase = Survival(
        rounds=1, local_epochs=60, cancer_types=("KIRC", "BRCA"), backbone="tuned"
    )
    encoder, head = built(Encoder), SurvivalHead(CONFIG.width, 2, 5)
    loss = survival_loss(encoder, head, patients(), phase)
    before = judge(loss, N, 32, seed=0)

    trained = [*encoder.parameters(), *head.parameters()]
    fit(trained, loss, N, phase, learning_rate=0.01, seed=0)

    assert judge(loss, N, 32, seed=0) < before / 2


def test_judging_is_a_mean_over_terms_that_changes_nothing():
    model = built(GexBert)
    before = copy.deepcopy(model)
    loss = pretraining_loss(model, patients(), PRETRAINING)

    first, again = judge(loss, N, 4, seed=3), judge(loss, N, 4, seed=3)
    mean = judge(lambda rows, rng: (rows.float().mean(), len(rows)), 5, 2, seed=0)

    assert first == again != judge(loss, N, 4, seed=4)
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
    before = judge(loss, N, 4, seed=0)

    with torch.no_grad():
        for table in gene_tables(model).values():
            table[LACKING] = 1e6

    assert judge(loss, N, 4, seed=0) == before


def test_pretraining_has_a_term_for_each_hidden_cell():
    phase = Pretraining(masking=MaskingRule(min_rate=0.99, max_rate=0.99))
    loss = pretraining_loss(built(GexBert), patients(), phase)

    terms = {loss(torch.arange(N), torch.Generator().manual_seed(i))[1] for i in (0, 1)}

    measured = (N - 1) * (V - 1) + V - 2
    assert all(measured - N - 5 <= n <= measured - N for n in terms)


# ---- fine-tuning ----


def test_with_all_genes_shown_classification_is_cross_entropy():
    encoder = built(Encoder)
    head = ClassificationHead(CONFIG.width, 2)
    known = patients()
    phase = Classification(rounds=1, classes=("KIRC", "BRCA"), min_genes=V)

    loss, n_terms = classification_loss(encoder, head, known, phase)(
        torch.arange(N), torch.Generator()
    )

    logits = head(embed(encoder, known.values, known.measured)).detach().double()
    logits = logits.numpy()
    target = [1, 0, 1, 1, 0, 0]
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.mean([np.log(row[k]) for row, k in zip(chance, target, strict=True)])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert n_terms == N


def site_of(types: tuple[str, ...]) -> tuple[float, ClassificationHead]:
    """Return loss and head, gradients filled, of a site with these cancer types."""
    known = replace(patients(), cancer_type=types)
    phase = Classification(rounds=1, classes=("KIRC", "BRCA", "LUAD"), min_genes=V)
    head = ClassificationHead(CONFIG.width, 3)
    loss, _ = classification_loss(built(Encoder), head, known, phase)(
        torch.arange(N), torch.Generator()
    )
    loss.backward()
    return loss.item(), head


def test_a_site_with_one_cancer_type_teaches_the_head_nothing():
    loss, head = site_of(("BRCA",) * N)

    assert loss == 0
    assert all(not p.grad.any() for p in head.parameters())


def test_a_class_that_a_site_lacks_is_not_pushed_down():
    _, head = site_of(("KIRC", "BRCA", "KIRC", "BRCA", "KIRC", "BRCA"))

    assert head.linear.bias.grad[:2].any()
    assert head.linear.bias.grad[2] == 0


def test_rarer_classes_are_not_told_less_often_for_being_rare():
    known = replace(patients(), cancer_type=("KIRC",) * 5 + ("BRCA",))
    phase = Classification(rounds=1, classes=("KIRC", "BRCA"), min_genes=V)
    head = ClassificationHead(CONFIG.width, 2)
    nn.init.zeros_(head.linear.weight)
    nn.init.zeros_(head.linear.bias)

    loss, _ = classification_loss(built(Encoder), head, known, phase)(
        torch.arange(N), torch.Generator()
    )
    loss.backward()

    # with equal logits the shares of the classes are predicted already
    assert head.linear.bias.grad.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_panels_are_drawn_evenly_on_the_log_scale_down_to_the_smallest(monkeypatch):
    sizes = []

    def spy(encoder: Encoder, values: Tensor, visible: Tensor) -> Tensor:
        assert (visible == visible[0]).all()
        sizes.append(int(visible[0].sum()))
        return torch.zeros(len(values), CONFIG.width)

    monkeypatch.setattr("fedgex.client.training.embed", spy)
    complete = Patients(
        values=torch.zeros(2, 64),
        cancer_type=("A", "B"),
        duration=torch.zeros(2),
        event=torch.zeros(2),
        clinical=torch.zeros(2, 2),
    )
    phase = Classification(rounds=1, classes=("A", "B"), min_genes=4)
    head = ClassificationHead(CONFIG.width, 2)
    loss = classification_loss(built(Encoder), head, complete, phase)
    rng = torch.Generator().manual_seed(0)

    for _ in range(400):
        loss(torch.arange(2), rng)

    assert (min(sizes), max(sizes)) == (4, 64)
    assert np.median(sizes) == pytest.approx(16, abs=4)  # sqrt(4 * 64)


def by_hand(logits: Tensor) -> float:
    """Return the discrete-time loss for intervals that end on days 365 and 730."""
    h = torch.sigmoid(logits.detach().double()).tolist()
    terms = [
        -math.log(h[0][0]),  # died on day 100
        -math.log(1 - h[1][0]) - math.log(h[1][1]),  # died on day 500
        -math.log(1 - h[2][0]),  # censored before the middle of the second interval
        -math.log(1 - h[3][0]) - math.log(1 - h[3][1]),  # died after the last end
        0.0,  # censored before the middle of the first
        -math.log(1 - h[5][0]) - math.log(h[5][1]),  # died on day 700
    ]
    return sum(terms) / N


@pytest.mark.parametrize("backbone", ["frozen", "tuned"])
@pytest.mark.parametrize("clinical", [True, False])
def test_discrete_time_survival_is_the_likelihood_by_hand(backbone, clinical):
    encoder, head, known = built(Encoder), survival_head(), patients()
    phase = Survival(
        rounds=1,
        cancer_types=("KIRC", "BRCA"),
        interval_ends=(365, 730),
        backbone=backbone,
        clinical=clinical,
    )

    loss, n_terms = survival_loss(encoder, head, known, phase)(
        torch.arange(N), torch.Generator()
    )

    embedding = embed(encoder, known.values, known.measured)
    covariates = known.clinical if clinical else torch.zeros(N, 2)
    logits = head(embedding, covariates, torch.tensor([1, 0, 1, 1, 0, 0]))
    assert loss.item() == pytest.approx(by_hand(logits), rel=1e-5)
    assert n_terms == N


def test_cox_compares_patients_of_one_cancer_type_and_counts_events():
    encoder, head, known = built(Encoder), survival_head(), patients()
    phase = Survival(rounds=1, cancer_types=("KIRC", "BRCA"), loss="cox")

    loss, n_terms = survival_loss(encoder, head, known, phase)(
        torch.arange(N), torch.Generator()
    )

    embedding = embed(encoder, known.values, known.measured)
    types = torch.tensor([1, 0, 1, 1, 0, 0])
    risk = head.log_hazard(embedding, torch.zeros(N, 2), types).tolist()
    risk_sets = {0: (0, 2, 3), 3: (3,), 1: (1, 5), 5: (5,)}
    expected = [
        math.log(sum(math.exp(risk[j]) for j in risk_set)) - risk[i]
        for i, risk_set in risk_sets.items()
    ]
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert n_terms == 4


def test_a_cox_batch_without_events_moves_nothing():
    encoder, head = built(Encoder), survival_head()
    phase = Survival(rounds=1, cancer_types=("KIRC", "BRCA"), loss="cox")

    loss, n_terms = survival_loss(encoder, head, patients(), phase)(
        torch.tensor([2, 4]), torch.Generator()
    )
    loss.backward()

    assert (loss.item(), n_terms) == (0.0, 0)
    assert not head.linear.weight.grad.any()
