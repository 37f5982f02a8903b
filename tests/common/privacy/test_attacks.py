"""Attacks find what leaks, find nothing where nothing leaks, and count honestly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom, binomtest
from sklearn.metrics import roc_auc_score

from fedgex.common.data.dataset import Patients
from fedgex.common.models import tasks
from fedgex.common.models.gexbert import GexBert
from fedgex.common.privacy import attacks
from fedgex.common.study import Study

# ---- ROC ----


def test_the_auc_is_that_of_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    members = rng.integers(0, 8, 70) + 1.0
    others = rng.integers(0, 8, 50).astype(float)

    found = attacks.roc(members, others)

    truth = np.repeat([1, 0], [70, 50])
    scores = np.concatenate([members, others])
    assert found.auc.value == pytest.approx(roc_auc_score(truth, scores))
    assert (found.members, found.non_members) == (70, 50)


def test_the_interval_of_the_auc_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth = 0.7602  # P[N(1, 1) > N(0, 1)] = Phi(1 / sqrt(2))
    held = 0
    for _ in range(400):
        auc = attacks.roc(rng.normal(1, 1, 60), rng.normal(0, 1, 80)).auc
        held += auc.low <= truth <= auc.high

    assert 0.92 <= held / 400 <= 0.98


def test_delong_by_hand() -> None:
    # Placements: members 2, 4 are above 1/2 and 2/2 of {1, 3}; 1 and 3 are below 2/2
    # and 1/2 of the members. Variance: 1/8 / 2 + 1/8 / 2 = 1/8.
    auc = attacks.roc(np.array([2.0, 4.0]), np.array([1.0, 3.0])).auc

    assert auc.value == 0.75
    assert auc.low == pytest.approx(0.75 - 1.959964 * math.sqrt(1 / 8))
    assert auc.high == 1.0


@pytest.mark.parametrize(("shift", "ends"), [(9.0, (0.05**0.2, 1)), (-9.0, (0, 0.0))])
def test_few_patients_who_separate_wholly_prove_little(
    shift: float, ends: tuple[float, float]
) -> None:
    members, others = np.arange(5) + shift, np.arange(8.0) / 10

    auc = attacks.roc(members, others).auc

    low, high = (
        getattr(binomtest(5 if shift > 0 else 0, 5).proportion_ci(), end)
        for end in ("low", "high")
    )
    assert (auc.low, auc.high) == pytest.approx((low, high))


def test_the_tpr_allows_no_more_false_positives_than_it_says() -> None:
    others = np.arange(100.0)
    members = np.array([98.5, 99.0, 99.5, 0.0])

    tpr = attacks.roc(members, others).tpr

    one_percent = tpr[0.01]  # one non-member (99) may be above: more than 98 is found
    assert one_percent is not None
    assert one_percent.value == 0.75
    truth = binomtest(3, 4).proportion_ci(method="exact")
    assert (one_percent.low, one_percent.high) == pytest.approx((truth.low, truth.high))


def test_a_low_rate_is_not_estimated_from_few_non_members() -> None:
    few = attacks.roc(np.zeros(5), np.zeros(99)).tpr
    many = attacks.roc(np.zeros(5), np.zeros(10_000)).tpr

    assert [rate for rate, at in few.items() if at is None] == [0.01, 0.001]
    assert None not in many.values()


def test_equal_scores_find_nobody() -> None:
    found = attacks.roc(np.ones(50), np.ones(200))

    assert found.auc.value == 0.5
    assert found.auc.low < 0.5 < found.auc.high
    assert all(at is None or at.value == 0 for at in found.tpr.values())


def test_the_curve_passes_through_hand_counted_points() -> None:
    false, true = attacks.curve(np.array([3.0, 1.0]), np.array([2.0, 0.0]))

    assert false.tolist() == [0, 0, 0.5, 0.5, 1]
    assert true.tolist() == [0, 0.5, 0.5, 1, 1]


# ---- likelihood ratios ----


def memorised(leak: float, n_shadows: int = 16) -> dict[str, NDArray[Any]]:
    """Return fits of 300 patients; a model that saw one fits it better by `leak`.

    Patients differ in how hard they are, ten times as much as models do.
    """
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 1, 300)
    inside = np.array([np.arange(300) % 2 == i % 2 for i in range(n_shadows)])
    noise = rng.normal(0, 0.1, (n_shadows, 300))
    member = rng.random(300) < 0.5
    return {
        "target": hard + leak * member + rng.normal(0, 0.1, 300),
        "shadows": hard + leak * inside + noise,
        "inside": inside,
        "member": member,
    }


@pytest.mark.parametrize("n_shadows", [4, 64])
def test_the_ratio_sees_a_leak_that_hides_among_hard_patients(n_shadows: int) -> None:
    made = memorised(leak=0.4, n_shadows=n_shadows)
    member = made.pop("member")

    scores = attacks.likelihood_ratios(**made)

    by_loss = attacks.roc(made["target"][member], made["target"][~member]).auc
    by_ratio = attacks.roc(scores[member], scores[~member]).auc
    assert by_loss.value < 0.7
    assert by_ratio.value > 0.95


def test_the_ratio_without_shadow_models_that_saw_anybody_is_a_z_score() -> None:
    shadows = np.array([[1.0, 5.0], [3.0, 7.0]])  # means 2 and 6, pooled SD sqrt(2)
    inside = np.zeros((2, 2), dtype=bool)

    scores = attacks.likelihood_ratios(np.array([4.0, 6.0]), shadows, inside)

    assert scores == pytest.approx([math.sqrt(2), 0])


def test_the_ratio_finds_nobody_in_a_model_that_forgets() -> None:
    made = memorised(leak=0.0)
    member = made.pop("member")

    scores = attacks.likelihood_ratios(**made)

    auc = attacks.roc(scores[member], scores[~member]).auc
    assert auc.low < 0.5 < auc.high


def test_fits_are_log_errors_and_log_odds() -> None:
    half = attacks.fit_of(np.array([math.log(2)]), "classification")
    assert half == pytest.approx([0.0], abs=1e-12)
    assert attacks.fit_of(np.array([math.e]), "restoration") == pytest.approx([-1.0])


# ---- canaries ----


def test_hundred_right_guesses_of_hundred_by_hand() -> None:
    # Pure DP: P = (e^eps / (1 + e^eps))^100 = 0.05.
    q = 0.05 ** (1 / 100)

    found = attacks.least_epsilon(100, 100, 100, delta=0, error=0.05)

    assert found == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


def test_the_p_value_adds_what_delta_may_betray() -> None:
    # r = 2, v = 2, eps = 0: W ~ Binomial(2, 1/2). P[W >= 2] = 1/4;
    # max of P[W = 1] / 1 = 1/2 and P[W in {0, 1}] / 2 = 3/8; times 2 m delta.
    assert attacks.p_value(5, 2, 2, 0, 0.01) == pytest.approx(0.25 + 2 * 5 * 0.01 / 2)
    assert attacks.p_value(5, 2, 2, 0, 0) == pytest.approx(0.25)


def test_half_of_the_guesses_right_prove_nothing() -> None:
    assert attacks.least_epsilon(100, 100, 50, 1e-5, 0.05) == 0


def test_canaries_of_randomised_response_bound_its_epsilon_from_below() -> None:
    epsilon, rng, broken = 1.0, np.random.default_rng(3), 0
    for _ in range(40):
        inserted = rng.random(400) < 0.5
        honest = rng.random(400) < 1 / (1 + math.exp(-epsilon))
        scores = np.where(honest, inserted, ~inserted) + rng.random(400) / 10
        broken += attacks.canary_bound(scores, inserted, 0).epsilon > epsilon

    assert broken <= binom.ppf(0.999, 40, 0.05)


def test_canaries_that_are_told_apart_bound_epsilon_high() -> None:
    inserted = np.arange(200) % 2 == 0
    leaky = attacks.canary_bound(inserted + 0.0, inserted, 1e-5)
    silent = attacks.canary_bound(np.arange(200.0), inserted, 1e-5)

    assert (leaky.canaries, leaky.guesses, leaky.correct) == (200, 200, 200)
    assert leaky.epsilon > 3
    assert silent.epsilon == 0


# ---- a model ----


def backbone(n_genes: int = 12) -> GexBert:
    study = Study.read({"name": "t", "pretraining": {"rounds": 1}}, "t")
    return tasks.new_backbone(study, n_genes)


def drawn(n: int, n_genes: int = 12, seed: int = 0) -> Patients:
    rng = torch.Generator().manual_seed(seed)
    return Patients(
        values=torch.randn(n, n_genes, generator=rng),
        cancer_type=(None,) * n,
        duration=torch.full((n,), torch.nan),
        event=torch.full((n,), torch.nan),
        clinical=torch.zeros(n, 2),
    )


def test_a_patients_loss_does_not_depend_on_who_is_beside() -> None:
    model, patients = backbone(), drawn(70)

    whole = attacks.restoration_losses(model, patients, seed=4)
    part = attacks.restoration_losses(model, patients.take(torch.tensor([66])), seed=4)

    assert part == pytest.approx(whole[66:67], rel=1e-5)


def test_a_model_that_memorises_is_found_by_its_losses_and_a_constant_one_is_not() -> (
    None
):
    model, members, others = backbone(), drawn(6, seed=1), drawn(60, seed=2)
    constant = attacks.roc(
        *(-attacks.restoration_losses(model, each, 5) for each in (members, others))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(60):
        hidden = torch.rand(members.values.shape, generator=rng) < 0.5
        loss, _ = attacks.restoration_loss(
            model, members.values, members.measured, hidden
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trained = attacks.roc(
        *(-attacks.restoration_losses(model, each, 5) for each in (members, others))
    )

    assert constant.auc.low < 0.5 < constant.auc.high
    assert trained.auc.low > (0.5 if trained.auc.value == 1 else 0.8)  # 6 of 6: .54


# ---- gradient inversion ----


def test_a_patient_is_recovered_from_a_gradient_and_not_from_a_noisy_one() -> None:
    model, patients = backbone(), drawn(1, seed=6)
    measured = patients.measured
    hidden = torch.arange(12)[None] % 2 == 0

    def gradient_of(values: torch.Tensor) -> list[torch.Tensor]:
        return attacks.gradient(model, values, measured, hidden)

    def recovered(noise: float, steps: int) -> attacks.Recovery:
        rng = torch.Generator().manual_seed(0)
        seen = [
            part.detach() + noise * torch.randn(part.shape, generator=rng)
            for part in gradient_of(patients.values)
        ]
        found = attacks.invert(
            gradient_of, seen, (1, 12), rng, noise=noise, steps=steps
        )
        return attacks.recovery(patients.values, found)

    bare, noisy = recovered(0.0, 70), recovered(3.0, 20)

    assert bare.correlation > 0.95
    assert bare.mse < 0.1 * bare.mse_of_mean
    assert noisy.mse > 0.5 * noisy.mse_of_mean


def test_each_gradient_is_clipped_by_itself() -> None:
    long, short = (
        [torch.tensor([3.0, 0.0]), torch.tensor([4.0])],
        [
            torch.tensor([0.0, 0.6]),
            torch.tensor([0.0]),
        ],
    )

    mean = attacks.clipped_mean([long, short], clip=1.0)  # 5 long becomes 1; 0.6 stays

    assert mean[0].tolist() == pytest.approx([0.3, 0.3])
    assert mean[1].tolist() == pytest.approx([0.4])


def test_the_factor_model_is_seen_by_the_attack_and_left_as_it_was() -> None:
    study = Study.read(
        {
            "name": "t",
            "pretraining": {"rounds": 1},
            "linear_rank": 2,
            "cross_products": True,
        },
        "t",
    )
    model = tasks.new_backbone(study, 12)
    assert isinstance(model, GexBert)
    assert model.encoder.linear is not None
    torch.nn.init.ones_(model.encoder.linear.loadings)
    values = drawn(1).values.requires_grad_()
    hidden = torch.arange(12)[None] < 6

    parts = attacks.gradient(model, values, ~values.isnan(), hidden)
    sum(part.square().sum() for part in parts).backward()

    assert values.grad is not None
    assert values.grad.abs().min() > 0
    assert "forward" not in model.encoder.linear.__dict__


def test_recovered_patients_are_matched_to_the_true_ones() -> None:
    true = torch.tensor([[1.0, 2.0, torch.nan], [3.0, -1.0, 2.0]])

    found = attacks.recovery(true, torch.tensor([[3.0, -1.0, 1.0], [1.0, 2.0, 9.0]]))

    assert found.mse == pytest.approx((0 + 1 / 3) / 2)
    assert found.mse_of_mean == pytest.approx((5 / 2 + 14 / 3) / 2)
    assert found.best_correlation == pytest.approx(1)
