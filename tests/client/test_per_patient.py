"""Gradients by patient agree with Opacus', and what has none is refused."""

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from fedgex.client.per_patient import taken_apart
from fedgex.common.errors import ConfigError
from fedgex.common.model import GexBert, ModelConfig

B, V, T = 5, 11, 6

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


class Bag(nn.Module):
    """A table whose rows a patient may have more than once, and one layer of each."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.norm(self.table(rows))).square().sum((1, 2))


class Restore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = GexBert(
            ModelConfig(n_genes=V, width=8, n_latents=3, n_blocks=1, n_heads=2)
        )

    def forward(self, genes: Tensor) -> Tensor:
        values = genes.float() / V - 0.5
        return self.model(genes, values, None, genes).square().sum(1)


def rows(repeated: bool) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    if repeated:
        return torch.randint(0, 3, (B, T), generator=rng)
    return torch.stack([torch.randperm(V, generator=rng)[:T] for _ in range(B)])


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("kind", [Bag, Restore])
@pytest.mark.parametrize("clip", [0.1, 1e9])
def test_the_clipped_sum_is_that_of_opacus_per_sample_gradients(kind, clip, repeated):
    torch.manual_seed(0)
    module = kind()
    opacus = GradSampleModule(module, loss_reduction="sum")
    opacus(rows(repeated)).sum().backward()
    samples = {p: p.grad_sample for p in module.parameters()}
    norm = torch.cat([s.flatten(1) for s in samples.values()], dim=1).norm(dim=1)
    factor = (clip / norm).clamp(max=1)
    expected = {p: torch.einsum("b,b...->...", factor, s) for p, s in samples.items()}
    opacus.to_standard_module()
    for p in module.parameters():
        p.grad = None

    total = {p: torch.zeros_like(p) for p in module.parameters()}
    with taken_apart(module) as gradients:
        module(rows(repeated)).sum().backward()
    gradients.add_clipped(total, clip)

    for p, found in total.items():
        assert p.grad is None
        torch.testing.assert_close(found, expected[p], atol=1e-5, rtol=1e-4)


def test_the_way_forward_is_the_same_and_layers_are_as_before_afterwards():
    module = Restore()
    plain = module(rows(False))

    with taken_apart(module):
        inside = module(rows(False))
    module(rows(False)).sum().backward()

    torch.testing.assert_close(inside, plain, atol=1e-6, rtol=1e-6)
    assert all(p.grad is not None for p in module.parameters())


def test_a_layer_of_another_kind_is_refused():
    with (
        pytest.raises(ConfigError, match="BatchNorm1d"),
        taken_apart(nn.BatchNorm1d(3)),
    ):
        pass


def test_a_layer_that_is_frozen_in_part_is_refused():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen as a whole"), taken_apart(layer):
        pass


def test_a_frozen_layer_of_any_kind_is_left_alone():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    with taken_apart(module) as gradients:
        module(torch.randn(B, 3)).sum().backward()
    assert set(gradients.by_parameter) == set(module[1].parameters())


def test_a_layer_that_is_used_twice_is_refused():
    layer = nn.Linear(2, 2)
    with taken_apart(layer), pytest.raises(ConfigError, match="used twice"):
        layer(layer(torch.randn(B, 2))).sum().backward()
