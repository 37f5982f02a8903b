"""What attributions say, held against changes of the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedgex.common.data.cross_products import by_type
from fedgex.common.data.dataset import Patients
from fedgex.common.models import factor_model
from fedgex.common.models.gexbert import (
    Encoder,
    GexBert,
    ModelConfig,
    differentiable_factors,
)
from fedgex.common.models.heads import ClassificationHead
from fedgex.simulations.analysis import attribution

V, N, C = 12, 9, 3
TYPES = ("a", "b", "c")
Models = tuple[GexBert, ClassificationHead]


def patients(seed: int = 0, n: int = N) -> Patients:
    rng = np.random.default_rng(seed)
    types = tuple(TYPES[i % C] for i in range(n))
    shift = np.array([[t == k for k in TYPES for _ in range(V // C)] for t in types])
    values = rng.normal(size=(n, V)) + 1.5 * shift
    return Patients(
        values=torch.tensor(values, dtype=torch.float32),
        cancer_type=types,
        duration=torch.ones(n),
        event=torch.zeros(n),
        clinical=torch.zeros(n, 2),
    )


def target(of: Patients) -> Tensor:
    return of.type_index(TYPES)


@pytest.fixture(scope="module")
def models() -> Models:
    config = ModelConfig(
        n_genes=V,
        width=8,
        n_latents=4,
        n_blocks=1,
        n_heads=2,
        linear_rank=3,
        linear_components=C,
    )
    torch.manual_seed(0)
    backbone, head = GexBert(config), ClassificationHead(config, C)
    many = patients(5, 300)
    groups = by_type(many.values.numpy(), many.cancer_type, TYPES, 1)
    assert backbone.encoder.linear is not None
    for name, array in factor_model.fit(groups, TYPES, 3).items():
        getattr(backbone.encoder.linear, name).copy_(torch.tensor(array))
    with torch.no_grad():
        for parameter in (*head.parameters(), backbone.decoder.weight.weight):
            parameter.normal_(std=0.3)
    head.start_from(TYPES, TYPES)
    return backbone.eval(), head.eval()


def margin(models: Models, values: Tensor, which: Tensor) -> Tensor:
    backbone, head = models
    genes = torch.arange(V)[None]
    with torch.no_grad():
        logits = head(
            backbone.encoder.embed(genes.expand(len(values), -1), values, None)
        )
    found: Tensor = logits - logits.mean(dim=1, keepdim=True)
    return found[torch.arange(len(which)), which]


def restored(backbone: GexBert, values: Tensor, gene: int) -> Tensor:
    others = torch.tensor([[g for g in range(V) if g != gene]] * len(values))
    asked = torch.full((len(values), 1), gene)
    with torch.no_grad():
        found: Tensor = backbone(others, values.gather(1, others), None, asked)
    return found.squeeze(1)


def test_the_genes_together_add_the_whole_change_of_the_margin(models: Models) -> None:
    some = patients()

    found = attribution.integrated_gradients(*encoder(models), some, target(some), 150)

    change = margin(models, some.values, target(some))
    change = change - margin(models, 0 * some.values, target(some))
    assert found.change == pytest.approx(change, rel=1e-4, abs=1e-4)
    assert found.genes.sum(dim=1) == pytest.approx(change, rel=0.02, abs=0.02)


def test_in_one_step_a_gene_gets_its_value_times_the_slope_half_way(
    models: Models,
) -> None:
    some, h = patients(), 1e-2

    found = attribution.integrated_gradients(*encoder(models), some, target(some), 1)

    for gene in (0, 5, 11):
        bump = h * torch.eye(V)[gene]
        up = margin(models, some.values / 2 + bump, target(some))
        down = margin(models, some.values / 2 - bump, target(some))
        slope = (up - down) / (2 * h)
        expected = some.values[:, gene] * slope
        assert found.genes[:, gene] == pytest.approx(expected, rel=0.02, abs=0.01)


def test_a_gene_that_was_not_measured_gets_nothing_and_changes_nobody_else(
    models: Models,
) -> None:
    some = patients()
    some.values[3, 2] = torch.nan

    found = attribution.integrated_gradients(*encoder(models), some, target(some), 4)

    whole = attribution.integrated_gradients(
        *encoder(models), patients(), target(some), 4
    )
    others = [i for i in range(N) if i != 3]
    assert found.genes.isnan().nonzero().tolist() == [[3, 2]]
    assert found.genes[others] == pytest.approx(whole.genes[others], abs=1e-4)
    assert (found.genes[3, 3:] != whole.genes[3, 3:]).all()


def test_attention_is_the_softmax_of_the_reading_layer(models: Models) -> None:
    encode, some = models[0].encoder, patients()
    some.values[0, :4] = torch.nan

    found = attribution.attention(encode, some)

    assert found.nansum(dim=1) == pytest.approx(np.ones(N), rel=1e-5)
    assert found.isnan().equal(some.values.isnan())
    one, genes = some.values[1:2], torch.arange(V)[None]
    with torch.no_grad():
        assert encode.linear is not None
        known = encode.linear(genes, one, None)
        x = encode.latents.weight[None] + encode.summary(known.features)[:, None]
        read = encode.read
        q = read.attention.query(read.norm_x(x))[0]
        k = read.attention.key(read.norm_context(encode.tokens(genes, one)))[0]
    naive = np.zeros(V)
    for head in (slice(0, 4), slice(4, 8)):
        for latent in q:
            weight = np.exp((k[:, head] @ latent[head]).numpy() / np.sqrt(4))
            naive += weight / weight.sum() / (2 * len(q))
    assert found[1] == pytest.approx(naive, rel=1e-4)


def test_the_gradient_of_a_restored_gene_is_what_moving_the_others_does(
    models: Models,
) -> None:
    some, gene, h = patients(), 4, 1e-2

    found = attribution.restored_gradient(models[0], some, gene)

    assert found[:, gene].isnan().all()
    for other in (0, 7):
        bump = h * torch.eye(V)[other]
        up = restored(models[0], some.values + bump, gene)
        down = restored(models[0], some.values - bump, gene)
        slope = (up - down) / (2 * h)
        assert found[:, other] == pytest.approx(slope, rel=0.02, abs=2e-3)
    assert not some.values.isnan().any()  # nothing of the patients was changed


def test_squared_gradients_of_one_gene_are_its_gradients_squared(
    models: Models,
) -> None:
    some, asked = patients(), torch.arange(V) == 4

    found = attribution.squared_gradients(
        models[0], some, asked, torch.Generator().manual_seed(0)
    )

    one = attribution.restored_gradient(models[0], some, 4)
    assert found[:, ~asked] == pytest.approx(one[:, ~asked] ** 2, rel=1e-4, abs=1e-7)


def test_squared_gradients_of_several_are_about_the_mean_of_each(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "SIGNS", 400)
    some, asked = patients(n=2), torch.isin(torch.arange(V), torch.tensor([1, 4]))

    found = attribution.squared_gradients(
        models[0], some, asked, torch.Generator().manual_seed(0)
    )

    backbone, squares = models[0], torch.zeros(2, V)
    for gene in (1, 4):
        given = attribution_of_two(backbone, some, gene, asked)
        squares += given**2 / 2
    assert found[:, ~asked] == pytest.approx(squares[:, ~asked], rel=0.2, abs=0.01)


def attribution_of_two(
    backbone: GexBert, some: Patients, gene: int, asked: Tensor
) -> Tensor:
    """Return the gradient of one gene where all that are asked for are hidden."""
    values = some.values.clone()
    values[:, asked] = torch.nan
    hidden = Patients(
        values=values,
        cancer_type=some.cancer_type,
        duration=some.duration,
        event=some.event,
        clinical=some.clinical,
    )
    return attribution.restored_gradient(backbone, hidden, gene)


def test_afterwards_the_factor_model_lets_no_gradient_through_again(
    models: Models,
) -> None:
    encode = models[0].encoder
    genes, values = torch.arange(V)[None], patients().values.requires_grad_()
    assert encode.linear is not None

    with differentiable_factors(encode):
        inside = encode.linear(genes, values, None).factors.requires_grad
    outside = encode.linear(genes, values, None).factors.requires_grad

    assert inside
    assert not outside


def test_sites_sums_add_up_to_those_of_all_patients() -> None:
    whole = patients(n=18)
    halves = [whole.take(torch.arange(9)), whole.take(torch.arange(9, 18))]

    pooled = attribution.pool_types(
        attribution.by_type(half.values, half.cancer_type, 3) for half in halves
    )

    assert sorted(pooled) == ["a", "b", "c"]
    for name, sums in pooled.items():
        rows = [t == name for t in whole.cancer_type]
        assert sums.mean == pytest.approx(whole.values[rows].mean(dim=0), rel=1e-5)


def test_a_type_of_too_few_patients_stays_at_its_site() -> None:
    some = patients(n=8)  # three of a and b, two of c

    assert sorted(attribution.by_type(some.values, some.cancer_type, 3)) == ["a", "b"]


def test_a_gene_measured_in_too_few_patients_of_a_type_stays_at_its_site() -> None:
    some = patients()
    some.values[0, 2] = torch.nan  # of three patients of type a

    sums = attribution.by_type(some.values, some.cancer_type, 3)["a"]

    assert sums.count[2] < 0
    assert sums.total[2] == 0
    assert (np.delete(sums.count, 2) == 3).all()


def test_a_type_that_one_of_several_sites_has_is_not_handed_out() -> None:
    some = patients()
    own = attribution.by_type(some.values, some.cancer_type, 3)

    pooled = attribution.pool_types([own, {"a": own["a"]}])

    assert sorted(pooled) == ["a"]
    assert sorted(attribution.pool_types([own])) == ["a", "b", "c"]


def encoder(models: Models) -> tuple[Encoder, ClassificationHead]:
    return models[0].encoder, models[1]
