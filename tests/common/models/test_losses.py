"""Training at one hospital, against hand calculations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedgex.common.data.dataset import Patients
from fedgex.common.models.gexbert import Encoder
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.models.losses import classification_loss, survival_loss
from fedgex.common.models.restoration import embed
from fedgex.common.models.training import evaluate, fit
from fedgex.common.study import (
    Classification,
    Survival,
)

from .small_site import CONFIG, N, V, built, patients


def survival_head() -> SurvivalHead:
    torch.manual_seed(1)
    head = SurvivalHead(CONFIG, 2, 2)
    nn.init.normal_(head.shared.weight)
    nn.init.normal_(head.own.weight)
    nn.init.normal_(head.clinical_shared.weight)
    return head


def test_with_all_genes_shown_classification_is_cross_entropy():
    encoder = built(Encoder)
    head = ClassificationHead(CONFIG, 2)
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
    head = ClassificationHead(CONFIG, 3)
    nn.init.normal_(head.linear.weight)
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
    head = ClassificationHead(CONFIG, 2)
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

    monkeypatch.setattr("fedgex.common.models.losses.embed", spy)
    complete = Patients(
        values=torch.zeros(2, 64),
        cancer_type=("A", "B"),
        duration=torch.zeros(2),
        event=torch.zeros(2),
        clinical=torch.zeros(2, 2),
    )
    phase = Classification(rounds=1, classes=("A", "B"), min_genes=4)
    head = ClassificationHead(CONFIG, 2)
    loss = classification_loss(built(Encoder), head, complete, phase)
    rng = torch.Generator().manual_seed(0)

    for _ in range(400):
        loss(torch.arange(2), rng)

    assert (min(sizes), max(sizes)) == (4, 64)
    assert np.median(sizes) == pytest.approx(16, abs=4)  # sqrt(4 * 64)


def test_training_lowers_the_loss_of_the_patients_trained_on():
    phase = Survival(
        rounds=1, local_epochs=60, cancer_types=("KIRC", "BRCA"), backbone="tuned"
    )
    encoder, head = built(Encoder), SurvivalHead(CONFIG, 2, 5)
    loss = survival_loss(encoder, head, patients(), phase)
    before = evaluate(loss, N, 32, seed=0)

    trained = [*encoder.parameters(), *head.parameters()]
    fit(trained, loss, N, phase, learning_rate=0.01, seed=0)

    assert evaluate(loss, N, 32, seed=0) < before / 2


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
    assert not head.shared.weight.grad.any()
    assert not head.own.weight.grad.any()
