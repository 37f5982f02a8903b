"""Private training against the definition: one patient at a time, by autograd."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from opacus.grad_sample import GradSampleModuleExpandedWeights
from torch import Tensor, nn

from fedgex.client.training import dp_sgd
from fedgex.client.training.dp_sgd import (
    ClassificationLoss,
    RestorationLoss,
    SecretOptimizer,
    SurvivalLoss,
    fit_privately,
    noised_log_share,
    take_step,
)
from fedgex.common.data.dataset import Patients
from fedgex.common.models import survival
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.common.models.gexbert import Encoder, GexBert, ModelConfig
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.models.restoration import embed, restore
from fedgex.common.privacy.secure_random import SecretRandom
from fedgex.common.study import (
    Classification,
    LocalTraining,
    PatientPrivacy,
    Pretraining,
    Survival,
)

N, V = 9, 12
TYPES = ("a", "b")
CONFIG = ModelConfig(
    n_genes=V,
    width=8,
    n_latents=3,
    n_blocks=1,
    n_heads=2,
    linear_rank=2,
    linear_components=2,
)
LOG_SHARE = torch.tensor([0.25, 0.75]).log()
ENDS = (365.0, 730.0)
RULE = PatientPrivacy(noise_multiplier=1.0, delta=1e-3, clip=0.3, sample_rate=1.0)
SGD = LocalTraining(
    rounds=1, batch_size=4, optimizer="sgd", weight_decay=0, learning_rate=1
)


def patients() -> Patients:
    """Return patients of whom some lack genes, one of them all genes but two."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(N, V, generator=rng)
    values[1, 2:4] = torch.nan
    values[2, 3] = torch.nan
    values[3, 2:] = torch.nan
    return Patients(
        values=values,
        cancer_type=tuple(TYPES[i % 2] for i in range(N)),
        duration=torch.rand(N, generator=rng) * 900 + 1,
        event=torch.tensor([i % 3 == 0 for i in range(N)]).float(),
        clinical=torch.randn(N, 2, generator=rng),
    )


def hand_restoration(loss: RestorationLoss, i: int, drawn: Tensor) -> Tensor:
    values = patients().values[i : i + 1]
    hidden = drawn[i : i + 1]
    seen = ~values.isnan() & ~hidden
    restored = restore(loss.backbone, values, seen, hidden)
    return ((restored - values)[hidden] ** 2).mean()


def hand_classification(loss: ClassificationLoss, i: int, drawn: Tensor) -> Tensor:
    values = patients().values[i : i + 1]
    logits = loss.head(embed(loss.encoder, values, drawn[i : i + 1])) + LOG_SHARE
    return -logits.log_softmax(1)[0, i % 2]


def hand_survival(loss: SurvivalLoss, i: int, drawn: Tensor) -> Tensor:
    who = patients().take(torch.tensor([i]))
    embedding = embed(loss.encoder, who.values, ~who.values.isnan())
    logits = loss.head(embedding, who.clinical, torch.tensor([i % 2]))
    at_risk, died = survival.intervals(who.duration, who.event, ENDS)
    return survival.discrete_time_loss(logits, at_risk, died)


def built(task: str, of: Patients | None = None) -> nn.Module:
    of = of or patients()
    torch.manual_seed(0)
    phase, _, backbone = task.partition(" ")
    if phase == "restoration":
        made: nn.Module = RestorationLoss(GexBert(CONFIG), of, Pretraining(rounds=1))
    else:
        encoder = Encoder(CONFIG)
        encoder.requires_grad_(backbone == "tuned")
        if phase == "classification":
            head: nn.Module = ClassificationHead(CONFIG, 2)
            made = ClassificationLoss(
                encoder, head, of, Classification(classes=TYPES), LOG_SHARE
            )
        else:
            head = SurvivalHead(CONFIG, 2, 2)
            for weight in head.parameters():
                nn.init.normal_(weight)
            rule = Survival(
                cancer_types=TYPES,
                interval_ends=ENDS,
                clinical=True,
                backbone=backbone,
            )
            made = SurvivalLoss(encoder, head, of, rule)
    for start in (m for m in made.modules() if isinstance(m, MixtureOfFactorAnalyzers)):
        nn.init.normal_(start.loadings)
        nn.init.normal_(start.means)
    if phase == "survival" and backbone == "frozen":
        made._frozen = embed(made.encoder, of.values, ~of.values.isnan()).detach()
    return made


TASKS: dict[str, Callable[..., Tensor]] = {
    "restoration": hand_restoration,
    "classification tuned": hand_classification,
    "classification frozen": hand_classification,
    "survival tuned": hand_survival,
    "survival frozen": hand_survival,
}


def trained(loss: nn.Module) -> list[nn.Parameter]:
    return [p for p in loss.parameters() if p.requires_grad]


def gradients(loss: nn.Module, rows: Tensor, drawn: Tensor, clip: float = 0.3):
    """Return the summed clipped gradients of what is trained: a step without noise."""
    optimizer = SecretOptimizer(
        torch.optim.SGD(trained(loss), lr=0.0),
        SecretRandom(),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=4,
    )
    each = GradSampleModuleExpandedWeights(loss, loss_reduction="sum")
    take_step(each, optimizer, rows, drawn)
    return [4 * p.grad for p in trained(each.to_standard_module())]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_the_step_is_the_sum_of_gradients_that_are_clipped_one_by_one(task, clip):
    loss = built(task)
    drawn = loss.draw(torch.arange(N), torch.Generator().manual_seed(3))
    by_hand = copy.deepcopy(loss)
    expected = [torch.zeros_like(p) for p in trained(loss)]
    n_clipped = 0
    for i in range(N):
        by_hand.zero_grad()
        TASKS[task](by_hand, i, drawn).backward()
        own = [p.grad for p in trained(by_hand)]
        own = [torch.zeros(1) if g is None else g for g in own]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in own))
        n_clipped += norm > clip
        for total, g in zip(expected, own, strict=True):
            total += g * (clip / max(norm, clip))

    found = gradients(loss, torch.arange(N), drawn, clip)

    assert n_clipped > N // 2 if clip < 1 else n_clipped == 0
    for (name, _), a, b in zip(
        [x for x in loss.named_parameters() if x[1].requires_grad],
        found,
        expected,
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("task", TASKS)
def test_who_else_is_in_the_step_changes_no_patients_gradient(task):
    loss = built(task)
    drawn = loss.draw(torch.arange(N), torch.Generator().manual_seed(3))
    rows = torch.tensor([0, 1, 2, 5])

    without = gradients(loss, rows, drawn[rows])
    alone = gradients(loss, torch.tensor([3]), drawn[3:4])
    twice = torch.tensor([3, 0, 1, 2, 5, 3])
    together = gradients(loss, twice, drawn[twice])

    for a, b, c in zip(without, alone, together, strict=True):
        torch.testing.assert_close(a + 2 * b, c, atol=1e-5, rtol=1e-5)


def test_what_a_step_draws_for_all_depends_on_no_patient():
    """Pattern and rate, and the panel, come first: the rest is each patient's own."""
    other = patients()
    other.values[0] = torch.nan
    for task in ("restoration", "classification tuned"):
        a, b = (
            built(task, of).draw(torch.arange(N), torch.Generator().manual_seed(s))
            for of, s in ((patients(), 5), (other, 5))
        )
        assert torch.equal(a[1:], b[1:])


def test_one_patients_gradient_is_never_longer_than_the_clip():
    loss = built("restoration")
    drawn = loss.draw(torch.arange(N), torch.Generator().manual_seed(3))
    for i in range(N):
        found = gradients(loss, torch.tensor([i]), drawn[i : i + 1], 0.05)
        length = torch.cat([g.flatten() for g in found]).norm()
        assert length <= 0.05 * (1 + 1e-5)


def test_a_patient_without_a_finite_gradient_counts_as_nobody():
    broken = patients()
    broken.values[4, 0] = torch.inf
    loss = built("restoration", broken)
    drawn = torch.zeros(N, V, dtype=torch.bool)
    drawn[:, 1] = True
    others = torch.tensor([0, 1, 2, 5])

    found = gradients(loss, torch.tensor([0, 1, 4, 2, 5]), drawn[[0, 1, 4, 2, 5]])
    expected = gradients(loss, others, drawn[others])

    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_patient_of_whom_nothing_is_hidden_or_shown_is_no_obstacle():
    nothing = torch.zeros(N, V, dtype=torch.bool)
    for task in ("restoration", "classification tuned"):
        loss = built(task)
        found = gradients(loss, torch.arange(N), nothing)
        together = torch.cat([g.flatten() for g in found])
        assert together.isfinite().all()
        assert bool(together.any()) == (task != "restoration")


def test_what_was_trained_keeps_its_names_and_no_trace_of_opacus():
    loss = built("restoration")
    names = list(loss.state_dict())

    moved(loss, RULE)

    assert list(loss.state_dict()) == names
    assert not any(hasattr(p, "grad_sample") for p in loss.parameters())


def moved(loss: nn.Module, rule: PatientPrivacy, training=SGD, **kwargs) -> Tensor:
    """Return by how much a round moved all parameters, one after the other."""
    before = [p.detach().clone() for p in trained(loss)]
    fit_privately(
        loss,
        N,
        training,
        rule,
        **{"learning_rate": 1.0, "noise_multiplier": 1.0} | kwargs,
    )
    pairs = zip(trained(loss), before, strict=True)
    return torch.cat([(p.detach() - b).flatten() for p, b in pairs])


def test_noise_has_the_stated_standard_deviation_whoever_was_drawn():
    """Nobody is in a step of so low a rate, so that the step is noise alone."""
    rule = RULE.model_copy(update={"sample_rate": 1e-12, "clip": 0.5})
    once = SGD.model_copy(update={"batch_size": 10})
    loss = built("restoration")
    loss_steps = pytest.MonkeyPatch()
    loss_steps.setattr(dp_sgd.accounting, "steps", lambda *_: 1)

    with loss_steps.context():
        change = moved(loss, rule, once, noise_multiplier=3.0)
    loss_steps.undo()

    assert len(change) > 2000
    assert change.std() == pytest.approx(3.0 * 0.5 / 10, rel=0.06)
    assert abs(change.mean()) < 5 * 0.15 / math.sqrt(len(change))


def test_with_little_noise_a_round_is_the_clipped_sum_over_the_batch_size():
    loss = built("survival frozen")
    drawn = loss.draw(torch.arange(N), torch.Generator())
    expected = torch.cat(
        [g.flatten() for g in gradients(copy.deepcopy(loss), torch.arange(N), drawn)]
    )

    change = moved(loss, RULE, noise_multiplier=1e-9)

    torch.testing.assert_close(change, -expected / 4, atol=1e-5, rtol=1e-5)


def test_the_proximal_term_pulls_back_without_being_clipped():
    """Of two steps the second is pulled by what the first moved."""
    rule = RULE.model_copy(update={"sample_rate": 1.0})
    two = SGD.model_copy(update={"local_epochs": 2})
    free, pulled = built("survival frozen"), built("survival frozen")
    kwargs = {"noise_multiplier": 1e-9, "learning_rate": 1e-2}

    one = moved(built("survival frozen"), rule, **kwargs)
    without = moved(free, rule, two, **kwargs)
    with_pull = moved(pulled, rule, two, proximal_mu=10.0, **kwargs)

    torch.testing.assert_close(with_pull, without - 0.1 * one, atol=1e-6, rtol=1e-4)


def test_two_rounds_from_the_same_model_differ_and_leave_torchs_generator_alone():
    changes = []
    for _ in range(2):
        loss = built("survival frozen")
        before = torch.get_rng_state()
        changes.append(moved(loss, RULE))
        assert torch.equal(torch.get_rng_state(), before)

    assert not torch.equal(*changes)


def test_a_frozen_encoder_and_the_factor_model_stay_as_they_were():
    for task in ("restoration", "classification frozen"):
        loss = built(task)
        before = copy.deepcopy(loss.state_dict())
        moved(loss, RULE)
        for name, start in before.items():
            fixed = ".linear." in name or (
                "frozen" in task and name.startswith("encoder.")
            )
            if not name.startswith("head."):
                assert torch.equal(loss.state_dict()[name], start) == fixed, name


# ---- class shares ----


def test_class_counts_are_noised_once_and_then_kept(tmp_path: Path):
    loud = RULE.model_copy(update={"label_noise": 2.0})

    first = noised_log_share(patients(), TYPES, loud, tmp_path, 1)
    again = noised_log_share(patients(), TYPES, loud, tmp_path, 1)
    later = noised_log_share(patients(), TYPES, loud, tmp_path, 7)

    assert torch.equal(first, again)
    assert torch.equal(first, later)
    counts = json.loads((tmp_path / dp_sgd.COUNTS).read_text())
    assert counts != [5, 4]


def test_the_noise_on_class_counts_has_its_standard_deviation(tmp_path: Path):
    loud = RULE.model_copy(update={"label_noise": 10.0})
    off = []
    for i in range(300):
        noised_log_share(patients(), TYPES, loud, tmp_path / str(i), 1)
        counts = json.loads((tmp_path / str(i) / dp_sgd.COUNTS).read_text())
        off += [counts[0] - 5, counts[1] - 4]
    drawn = torch.tensor(off)
    assert drawn.std() == pytest.approx(10, rel=0.12)
    assert abs(drawn.mean()) < 2.1


@pytest.mark.parametrize(
    ("counts", "shares"),
    [([30.0, 10.0], [0.75, 0.25]), ([8.0, 0.9], [1, 0]), ([-3.0, 1.0], [0.5, 0.5])],
)
def test_a_class_of_at_most_one_by_its_noised_count_is_absent(
    tmp_path: Path, counts, shares
):
    (tmp_path / dp_sgd.COUNTS).write_text(json.dumps(counts))
    found = noised_log_share(patients(), TYPES, RULE, tmp_path, 2)
    torch.testing.assert_close(found.exp(), torch.tensor(shares).float())


def test_who_missed_the_first_round_counts_nobody(tmp_path: Path):
    found = noised_log_share(patients(), TYPES, RULE, tmp_path, 2)
    assert found.exp().tolist() == pytest.approx([0.5, 0.5])
    assert list(tmp_path.iterdir()) == []


def test_patients_of_a_class_that_noise_made_absent_have_no_loss():
    loss = built("classification tuned")
    loss._log_share = torch.tensor([0.0, -math.inf])
    drawn = loss.draw(torch.arange(N), torch.Generator())
    losses = loss(torch.arange(N), drawn)
    assert losses[1::2].tolist() == [0] * (N // 2)
    assert losses.isfinite().all()


def test_secret_draws_are_not_those_of_a_seed(monkeypatch):
    drawn = []
    real = SecretRandom.bernoulli

    def spy(self, n, rate):
        drawn.append(real(self, n, rate))
        return drawn[-1]

    monkeypatch.setattr(SecretRandom, "bernoulli", spy)
    rule = RULE.model_copy(update={"sample_rate": 0.5})
    many = SGD.model_copy(update={"local_epochs": 20, "learning_rate": 1e-6})
    for _ in range(2):
        torch.manual_seed(0)
        moved(built("survival frozen"), rule, many)
    first, second = torch.stack(drawn[:40]), torch.stack(drawn[40:])
    assert first.shape == second.shape == (40, N)
    assert not torch.equal(first, second)
    assert abs(float(first.float().mean()) - 0.5) < 0.15
    assert F.mse_loss(first.float(), second.float()) > 0.2
