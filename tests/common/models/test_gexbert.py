"""GexBERT: any genes in, any genes out, at a cost that grows linearly with them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedgex.common.arrays import PER_GENE
from fedgex.common.errors import ConfigError
from fedgex.common.models.factor_model import (
    MixtureOfFactorAnalyzers,
)
from fedgex.common.models.gexbert import (
    PRESETS,
    Attention,
    GeneTokens,
    GexBert,
    ModelConfig,
    n_parameters,
    preset,
    select,
)
from fedgex.common.models.heads import ClassificationHead, SurvivalHead

from .small_models import R, V, drawn, mixture


def tiny() -> GexBert:
    torch.manual_seed(0)
    return GexBert(
        ModelConfig(n_genes=V, width=8, n_latents=3, n_blocks=2, n_heads=2)
    ).eval()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, V), st.integers(1, V))
def test_any_subset_of_genes_goes_in_and_any_genes_are_restored(n_given, n_asked):
    genes, values, asked = drawn(4, n_given, n_asked)

    restored = tiny()(genes, values, None, asked)

    assert restored.shape == (4, n_asked)
    assert restored.isfinite().all()


def test_what_is_restored_depends_on_what_is_given():
    genes, values, asked = drawn(1, 5, 5)
    model = tiny()

    here, there = model(genes, values, None, asked), model(genes, -values, None, asked)

    assert not torch.allclose(here, there, atol=1e-3)


def test_the_order_of_the_given_genes_changes_nothing():
    genes, values, asked = drawn(3, 11, 6)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    model = tiny()

    there = model(genes[:, order], values[:, order], None, asked)

    torch.testing.assert_close(there, model(genes, values, None, asked))


def test_genes_asked_for_together_are_restored_as_if_asked_for_alone():
    genes, values, asked = drawn(3, 11, 6)
    model = tiny()

    together = model(genes, values, None, asked)
    alone = [model(genes, values, None, asked[:, [i]]) for i in range(6)]

    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_padding_changes_nothing_whatever_it_holds():
    genes, values, asked = drawn(2, 11, 6)
    keep = torch.arange(11) < 7
    model = tiny()
    values[:, 7:] = 1e3

    padded = model(genes, values, keep.expand(2, -1), asked)

    torch.testing.assert_close(padded, model(genes[:, :7], values[:, :7], None, asked))


def test_a_patient_without_any_visible_gene_gets_finite_values_and_gradients():
    genes, values, asked = drawn(2, 4, 6)
    keep = torch.tensor([[True] * 4, [False] * 4])
    model = tiny()

    restored = model(genes, values, keep, asked)
    restored.sum().backward()

    assert restored.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_patients_of_a_batch_do_not_see_one_another():
    genes, values, asked = drawn(3, 9, 4)
    model = tiny()

    alone = [
        model(genes[i : i + 1], values[i : i + 1], None, asked[i : i + 1])
        for i in range(3)
    ]

    torch.testing.assert_close(model(genes, values, None, asked), torch.cat(alone))


@pytest.mark.parametrize("side", ["given", "asked"])
def test_twice_the_genes_cost_at_most_twice_the_operations(side):
    n_genes = 2048
    model = GexBert(preset("tiny", n_genes, linear_rank=4, linear_components=3))

    def operations(n: int) -> int:
        many, few = torch.arange(n)[None], torch.arange(8)[None]
        given, asked = (many, few) if side == "given" else (few, many)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(given, torch.zeros(given.shape), None, asked)
        return counter.get_total_flops()

    ratio = operations(n_genes) / operations(n_genes // 2)

    assert 1.0 < ratio < 2.1


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_builds_and_restores(name):
    model = GexBert(preset(name, V))

    restored = model(
        torch.tensor([[0, 3]]), torch.zeros(1, 2), None, torch.tensor([[1, 2, 22]])
    )

    assert restored.shape == (1, 3)
    assert model.config.n_genes == V


def test_an_unknown_preset_is_refused_with_the_names_that_exist():
    with pytest.raises(ConfigError, match=r'"huge".*tiny, small, base'):
        preset("huge", V)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_genes": 0}, "model.n_genes is 0; expected 1 or more"),
        ({"n_blocks": -1}, "model.n_blocks is -1"),
        ({"linear_components": 0}, "model.linear_components is 0"),
        ({"n_heads": 3}, "model.width is 8 and model.n_heads 3"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(change, message):
    sizes = {"n_genes": V, "width": 8, "n_latents": 3, "n_blocks": 1, "n_heads": 2}

    with pytest.raises(ConfigError, match=message):
        ModelConfig(**sizes | change)


def test_per_gene_names_exactly_the_parameters_with_a_row_for_each_gene():
    rows = {name for name, p in tiny().named_parameters() if len(p) == V}

    named = {
        name for name, _ in tiny().named_parameters() if name.endswith(tuple(PER_GENE))
    }
    assert named == rows
    assert len(rows) == len(PER_GENE)


def test_attention_is_that_of_pytorch():
    torch.manual_seed(0)
    ours, theirs = Attention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    parts = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, context = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    keep = torch.arange(6)[None, :] < torch.tensor([[6], [3], [1]])

    expected, _ = theirs(x, context, context, key_padding_mask=~keep)

    torch.testing.assert_close(ours(x, context, keep), expected)


def test_a_token_is_identity_plus_value_times_direction_plus_a_shared_curve():
    torch.manual_seed(0)
    tokens = GeneTokens(V, 4)
    genes, values = torch.tensor([[5, 2]]), torch.tensor([[1.5, -2.0]])

    found = tokens(genes, values)

    def curve(value: float) -> Tensor:
        x = tokens.curve_in.weight[:, 0] * value + tokens.curve_in.bias
        phi = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return tokens.curve_out.weight @ (x * phi) + tokens.curve_out.bias

    identity, direction = tokens.identity.weight, tokens.direction.weight
    torch.testing.assert_close(
        found[0, 0], identity[5] + 1.5 * direction[5] + curve(1.5)
    )
    torch.testing.assert_close(
        found[0, 1], identity[2] - 2 * direction[2] + curve(-2.0)
    )


def test_a_patients_vector_is_the_mean_of_the_latents():
    genes, values, _ = drawn(3, 5, 1)
    encoder = tiny().encoder

    found = encoder.embed(genes, values, None)

    latents, _ = encoder(genes, values, None)
    torch.testing.assert_close(found, latents.sum(1) / 3)
    assert found.shape == (3, 8)


def test_the_factor_model_stands_beside_the_network_and_is_never_trained():
    torch.manual_seed(0)
    config = ModelConfig(
        n_genes=V,
        width=8,
        n_latents=3,
        n_blocks=1,
        n_heads=2,
        linear_rank=R,
        linear_components=4,
    )
    model = GexBert(config)
    model.encoder.linear = mixture()
    genes, values, asked = drawn(2, 11, 6)

    at_first = model(genes, values, None, asked)
    torch.nn.init.normal_(model.decoder.weight.weight)
    trained = model(genes, values, None, asked)

    linear = model.encoder.linear
    alone = linear.restore(linear(genes, values, None), asked)
    torch.testing.assert_close(at_first, alone)
    assert not torch.allclose(trained, alone)
    vectors = model.encoder.embed(genes, values, None)
    known = linear(genes, values, None)
    assert vectors.shape == (2, 8 + R + 4)
    torch.testing.assert_close(
        vectors[:, 8 : 8 + R], known.factors * known.loading_scale
    )
    evidence = linear.evidence(genes, values, None)
    torch.testing.assert_close(vectors[:, 8 + R :], evidence)
    size = linear.loadings.norm(dim=0)
    torch.testing.assert_close(known.loading_scale, size / size.square().mean().sqrt())
    assert not [n for n, _ in model.named_parameters() if "linear." in n]


PLAIN = ModelConfig(n_genes=V, width=8, n_latents=3, n_blocks=1, n_heads=2)
STARTED = ModelConfig(
    n_genes=V,
    width=8,
    n_latents=3,
    n_blocks=1,
    n_heads=2,
    linear_rank=3,
    linear_components=2,
)


def test_the_classification_head_gives_a_logit_for_each_class():
    assert ClassificationHead(PLAIN, 5)(torch.randn(2, 8)).shape == (2, 5)
    assert ClassificationHead(STARTED, 5)(torch.randn(2, 13)).shape == (2, 5)


def test_a_new_classification_head_says_what_the_factor_model_says():
    head = ClassificationHead(STARTED, 3)
    head.start_from(("LUAD", "BRCA"), ("BRCA", "KIRC", "LUAD"))
    embedding = torch.randn(4, 13)

    logits = head(embedding)

    luad, brca = embedding[:, 11], embedding[:, 12]
    expected = torch.stack([brca, torch.zeros(4), luad], dim=1)
    torch.testing.assert_close(logits, expected)


def test_a_new_survival_head_gives_everyone_a_hazard_of_one_in_eight():
    head = SurvivalHead(PLAIN, n_types=3, n_intervals=4)
    types = torch.tensor([0, 2])

    logits = head(torch.randn(2, 8), torch.randn(2, 2), types)

    torch.testing.assert_close(logits.sigmoid(), torch.full((2, 4), 0.1192029))


def test_the_survival_head_adds_what_all_types_share_and_what_is_the_types_own():
    torch.manual_seed(0)
    head = SurvivalHead(STARTED, n_types=3, n_intervals=2)
    for weight in head.parameters():
        torch.nn.init.normal_(weight)
    embedding, clinical = torch.randn(13), torch.tensor([0.5, 1.0])

    logits = head(embedding[None], clinical[None], torch.tensor([2]))

    latents, factors = embedding[:8], embedding[8:11]  # responsibilities are not read
    normed = (latents - latents.mean()) / (latents.var(correction=0) + 1e-5).sqrt()
    x = torch.cat([normed / 8**0.5, factors / 3**0.5])
    weight = head.shared.weight[0] + 0.6 * head.own.weight[2]
    of_clinical = head.clinical_shared.weight[0] + 0.2 * head.clinical_own.weight[2]
    log_hazard = weight @ x + of_clinical @ clinical
    expected = -2 + 3 * head.baseline.weight[2] + log_hazard
    torch.testing.assert_close(logits[0], expected)


def test_select_lists_the_genes_of_each_row_and_marks_the_padding():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool()

    genes, keep = select(mask)

    assert keep is not None
    assert keep.tolist() == [[True, True, True], [True, False, False]]
    assert genes[0].tolist() == [1, 3, 4]
    assert genes[1, 0] == 0
    assert not mask[1, genes[1, 1:]].any()


def test_select_without_padding_says_so():
    genes, keep = select(torch.tensor([[0, 1, 1], [1, 0, 1]]).bool())

    assert keep is None
    assert genes.tolist() == [[1, 2], [0, 2]]


def test_parameters_are_counted_by_hand():
    assert n_parameters(torch.nn.Linear(3, 2)) == 3 * 2 + 2


def strong_start(n_genes: int) -> MixtureOfFactorAnalyzers:
    """Return one factor that half of the genes follow and half oppose."""
    start = MixtureOfFactorAnalyzers(n_genes, 1, 1)
    sign = torch.ones(n_genes, 1)
    sign[::2] = -1
    start.loadings.copy_(sign)
    start.noise.fill_(0.01)
    return start


def gate_of(
    start: MixtureOfFactorAnalyzers, measured: Tensor, values: Tensor
) -> Tensor:
    genes, keep = select(measured)
    given = values.gather(1, genes)
    return start.mnar_gate(start(genes, given, keep), genes, keep)


def test_the_gate_is_closed_if_genes_are_missing_whatever_their_value():
    start, values = strong_start(200), torch.ones(1, 200)
    values[:, ::2] = -1  # the factor is 1
    at_random = torch.ones(1, 200, dtype=torch.bool)
    at_random[:, :50] = False

    assert gate_of(start, at_random, values).item() == 0
    everything = torch.ones(1, 200, dtype=torch.bool)
    assert gate_of(start, everything, values).item() == 0
    assert gate_of(start, ~everything, values).item() == 0


def test_the_gate_is_open_if_the_low_genes_are_missing_and_not_if_the_high_are():
    start, values = strong_start(200), torch.ones(1, 200)
    values[:, ::2] = -1
    low_are_gone, high_are_gone = values > 0, values < 0

    assert gate_of(start, low_are_gone, values).item() == 1
    assert gate_of(start, high_are_gone, values).item() == 0


def test_under_dropout_the_network_adds_only_where_the_gate_is_open():
    torch.manual_seed(0)
    config = ModelConfig(
        n_genes=200,
        width=8,
        n_latents=3,
        n_blocks=1,
        n_heads=2,
        linear_rank=1,
        network_where="dropout",
    )
    model = GexBert(config)
    model.encoder.linear = strong_start(200)
    torch.nn.init.normal_(model.decoder.weight.weight)
    values = torch.ones(2, 200)
    values[:, ::2] = -1
    measured = torch.ones(2, 200, dtype=torch.bool)
    measured[0, :50] = False  # whatever their value
    measured[1] = values[1] > 0
    genes, keep = select(measured)
    asked = torch.arange(200).expand(2, -1)

    restored = model(genes, values.gather(1, genes), keep, asked)

    linear = model.encoder.linear
    start = linear.restore(linear(genes, values.gather(1, genes), keep), asked)
    torch.testing.assert_close(restored[0], start[0])
    assert not torch.allclose(restored[1], start[1], atol=0.1)
