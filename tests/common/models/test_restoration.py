"""Restoration and embedding of partly visible patients, against a row-by-row loop."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedgex.common.data.dataset import Patients
from fedgex.common.models import restoration
from fedgex.common.models.gexbert import GexBert, ModelConfig
from fedgex.common.models.masking import draw_hidden
from fedgex.common.models.restoration import (
    ModelImputer,
    embed,
    embed_all,
    restoration_loss,
    restore,
)
from fedgex.common.study import MaskingRule

N, V = 5, 9


def model() -> GexBert:
    torch.manual_seed(0)
    return GexBert(ModelConfig(n_genes=V, width=8, n_latents=3, n_blocks=1, n_heads=2))


def patients() -> tuple[Tensor, Tensor, Tensor]:
    """Return values, measured and hidden; rows differ in how much is there."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(N, V, generator=rng)
    measured = torch.rand(N, V, generator=rng) < torch.linspace(0.3, 1.1, N)[:, None]
    hidden = measured & (torch.rand(N, V, generator=rng) < 0.4)
    return torch.where(measured, values, torch.nan), measured, hidden


def one_by_one(values: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
    """Restore each patient alone, with genes listed by hand and no padding."""
    restored = torch.zeros(values.shape)
    for i in range(len(values)):
        seen, wanted = visible[i].nonzero().T, asked[i].nonzero().T
        if wanted.numel():
            restored[i, wanted[0]] = model()(seen, values[i, seen], None, wanted)[0]
    return restored


def test_a_batch_is_restored_as_its_patients_are_one_by_one():
    values, measured, hidden = patients()
    visible = measured & ~hidden

    restored = restore(model(), values, visible, hidden)

    expected = one_by_one(values, visible, hidden)
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_asked_for_is_zero():
    values, measured, hidden = patients()

    restored = restore(model(), values, measured & ~hidden, hidden)

    assert not restored[~hidden].any()
    assert restored[hidden].all()


def test_hidden_values_do_not_leak_into_what_is_restored():
    values, measured, hidden = patients()
    poisoned = torch.where(hidden, 1e6, values)

    clean = restore(model(), values, measured & ~hidden, hidden)

    assert torch.equal(clean, restore(model(), poisoned, measured & ~hidden, hidden))


def test_the_restoration_loss_is_the_mean_square_over_hidden_cells():
    values, measured, hidden = patients()

    loss, n_terms = restoration_loss(model(), values, measured, hidden)

    restored = one_by_one(values, measured & ~hidden, hidden).detach()
    errors = [float(restored[i, j] - values[i, j]) ** 2 for i, j in hidden.nonzero()]
    assert n_terms == len(errors)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_nothing_hidden_gives_zero_loss_zero_terms_and_zero_gradient():
    values, measured, _ = patients()
    backbone = model()

    loss, n_terms = restoration_loss(
        backbone, values, measured, torch.zeros_like(measured)
    )
    loss.backward()

    assert (loss.item(), n_terms) == (0.0, 0)
    assert not any(p.grad.any() for p in backbone.parameters() if p.grad is not None)


def test_a_gene_that_no_patient_has_gets_no_gradient_and_no_term():
    values, measured, hidden = patients()
    values[:, 4], measured[:, 4], hidden[:, 4] = torch.nan, False, False
    backbone = model()

    loss, n_terms = restoration_loss(backbone, values, measured, hidden)
    loss.backward()

    tokens, decoder = backbone.encoder.tokens, backbone.decoder
    tables = (tokens.identity, tokens.direction, decoder.question, decoder.weight)
    for table in (*tables, decoder.bias):
        assert not table.weight.grad[4].any()
        assert table.weight.grad.any()
    assert n_terms == int(hidden[:, [j for j in range(V) if j != 4]].sum())


def cohort(values: Tensor) -> Patients:
    return Patients(
        values=values,
        cancer_type=(None,) * len(values),
        duration=torch.full((len(values),), torch.nan),
        event=torch.full((len(values),), torch.nan),
        clinical=torch.zeros(len(values), 2),
    )


def test_embedding_everybody_does_not_depend_on_the_batches():
    values, measured, _ = patients()
    encoder = model().encoder

    whole = embed_all(encoder, cohort(values))

    assert whole.shape == (N, 8)
    assert not whole.requires_grad
    assert embed(encoder, values, measured).requires_grad
    torch.testing.assert_close(embed_all(encoder, cohort(values), batch_size=2), whole)


def test_the_imputer_fills_what_is_missing_and_leaves_the_rest_alone():
    values, measured, _ = patients()
    imputer = ModelImputer(model(), batch_size=2)

    filled = imputer.impute(values.numpy())

    expected = one_by_one(values, measured, ~measured).detach().numpy()
    hidden = ~measured.numpy()
    assert np.array_equal(filled[~hidden], values.numpy()[~hidden])
    np.testing.assert_allclose(filled[hidden], expected[hidden], atol=1e-5)


@pytest.mark.parametrize(
    ("cells", "batches"), [(2**18, [5]), (2 * V, [2, 2, 1]), (1, [1, 1, 1, 1, 1])]
)
def test_the_imputer_takes_few_patients_at_once_if_they_have_many_genes(
    monkeypatch, cells, batches
):
    monkeypatch.setattr(restoration, "BATCH_CELLS", cells)
    values, _, _ = patients()
    values[:, 0] = torch.nan
    taken = []

    def counted(backbone, values, measured, hidden):
        taken.append(len(values))
        return restore(backbone, values, measured, hidden)

    monkeypatch.setattr(restoration, "restore", counted)
    ModelImputer(model()).impute(values.numpy())

    assert taken == batches


def test_the_imputer_does_not_change_what_it_was_given():
    values, _, _ = patients()
    before = values.numpy().copy()

    ModelImputer(model()).impute(values.numpy())

    assert np.array_equal(values.numpy(), before, equal_nan=True)


@pytest.mark.parametrize("pattern", ["mcar", "panel", "mnar"])
def test_the_hidden_share_follows_the_rule_for_each_pattern(pattern):
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(200, 300, generator=rng)
    measured = torch.ones_like(values, dtype=torch.bool)
    weights = {"mcar": 0.0, "panel": 0.0, "mnar": 0.0} | {pattern: 1.0}
    rule = MaskingRule(min_rate=0.3, max_rate=0.3, **weights)

    hidden = draw_hidden(values, measured, rule, rng)

    deviation = 4 * math.sqrt(0.3 * 0.7 / 300)  # a panel draws genes, not cells
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=deviation)
    whole_genes = bool((hidden == hidden[0]).all())
    low_first = values[hidden].mean() < values[~hidden].mean() - 0.5
    assert whole_genes == (pattern == "panel")
    assert bool(low_first) == (pattern == "mnar")


def test_rates_are_drawn_evenly_between_the_least_and_the_greatest():
    rng = torch.Generator().manual_seed(0)
    measured = torch.ones(20, 200, dtype=torch.bool)
    rule = MaskingRule(min_rate=0.2, max_rate=0.8, mcar=1, panel=0, mnar=0)

    shares = torch.stack(
        [
            draw_hidden(measured.float(), measured, rule, rng).float().mean()
            for _ in range(300)
        ]
    )

    low, middle, high = shares.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert low == pytest.approx(0.23, abs=0.04)
    assert middle == pytest.approx(0.5, abs=0.08)
    assert high == pytest.approx(0.77, abs=0.04)


def test_equal_generators_hide_equal_cells():
    values, measured, _ = patients()

    def drawn(seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.stack(
            [draw_hidden(values, measured, MaskingRule(), rng) for _ in range(5)]
        )

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def cohort_of(values: Tensor) -> Patients:
    n = len(values)
    return Patients(
        values=values,
        cancer_type=(None,) * n,
        duration=torch.zeros(n),
        event=torch.zeros(n),
        clinical=torch.zeros(n, 2),
    )


def test_vectors_are_remembered_for_the_same_encoder_and_patients_alone(monkeypatch):
    values, _, _ = patients()
    encoder = model().encoder
    first = embed_all(encoder, cohort_of(values))
    asked: list[int] = []

    def counted(*args: object) -> Tensor:
        asked.append(1)
        return embed(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("fedgex.common.models.restoration.embed", counted)
    again = embed_all(encoder, cohort_of(values.clone()))
    assert torch.equal(again, first)
    assert not asked
    again.zero_()  # what the caller does to it is the caller's own
    assert torch.equal(embed_all(encoder, cohort_of(values)), first)

    torch.nn.init.normal_(encoder.tokens.direction.weight)
    assert not torch.allclose(embed_all(encoder, cohort_of(values)), first)
    embed_all(encoder, cohort_of(values + 1))
    assert len(asked) == 2
