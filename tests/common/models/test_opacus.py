"""Opacus can take the model apart: its per-sample gradients are those of each patient.

Opacus hooks modules by their forward, so each task is wrapped in a module whose forward
is the task, as private training has to.
"""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from opacus import GradSampleModule, PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedgex.common.models import survival
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.common.models.gexbert import Encoder, GexBert, ModelConfig
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.models.restoration import embed, restoration_loss

B, V = 4, 7
CONFIG = ModelConfig(
    n_genes=V,
    width=8,
    n_latents=3,
    n_blocks=1,
    n_heads=2,
    linear_rank=2,
    linear_components=2,
)
ENDS = (365.0, 730.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),
]


class Restoration(nn.Module):
    """A sum over hidden cells: a mean over them would tie the patients together."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = GexBert(CONFIG)
        nn.init.normal_(self.backbone.decoder.weight.weight)

    def forward(self, values: Tensor, hidden: Tensor) -> Tensor:
        loss, n_terms = restoration_loss(self.backbone, values, ~values.isnan(), hidden)
        return loss * n_terms


class Classification(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(CONFIG)
        self.head = ClassificationHead(CONFIG, 3)
        for weight in self.head.parameters():
            nn.init.normal_(weight)

    def forward(self, values: Tensor, target: Tensor) -> Tensor:
        logits = self.head(embed(self.encoder, values, ~values.isnan()))
        return F.cross_entropy(logits, target, reduction="sum")


class Survival(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(CONFIG)
        self.head = SurvivalHead(CONFIG, 2, len(ENDS))
        for weight in self.head.parameters():
            nn.init.normal_(weight)

    def forward(self, values: Tensor, types: Tensor) -> Tensor:
        embedding = embed(self.encoder, values, ~values.isnan())
        logits = self.head(embedding, torch.ones(len(values), 2), types)
        duration = 200.0 * (1 + types.float())
        at_risk, died = survival.intervals(duration, 1 - types.float(), ENDS)
        return survival.discrete_time_loss(logits, at_risk, died) * len(values)


TASKS = {
    "restoration": (Restoration, torch.tensor([[1, 0, 0, 0, 0, 0, 1]] * B).bool()),
    "classification": (Classification, torch.tensor([0, 2, 1, 0])),
    "survival": (Survival, torch.tensor([0, 1, 1, 0])),
}


def values() -> Tensor:
    """Return patients of whom some lack genes, so that there is padding."""
    drawn = torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    drawn[1, 2:4] = torch.nan
    drawn[2, 3] = torch.nan
    return drawn


def built(task: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kind, second = TASKS[task]
    module = kind()
    for start in (
        m for m in module.modules() if isinstance(m, MixtureOfFactorAnalyzers)
    ):
        nn.init.normal_(start.loadings)
        nn.init.normal_(start.means)
    return module, second


@pytest.mark.parametrize("task", TASKS)
def test_per_sample_gradients_are_those_of_each_patient_alone(task):
    module, second = built(task)
    naive = copy.deepcopy(module)

    private = GradSampleModule(module, loss_reduction="sum")
    private(values(), second).backward()

    for i in range(B):
        naive.zero_grad()
        naive(values()[i : i + 1], second[i : i + 1]).backward()
        for (name, p), q in zip(
            private._module.named_parameters(), naive.parameters(), strict=True
        ):
            assert p.grad_sample.shape == (B, *p.shape), name
            torch.testing.assert_close(
                p.grad_sample[i], q.grad, atol=1e-5, rtol=1e-4, msg=f"{name} {i}"
            )


def test_every_parameter_of_every_task_takes_part():
    for task in TASKS:
        module, second = built(task)
        module(values(), second).backward()
        idle = [n for n, p in module.named_parameters() if not p.grad.any()]
        # A constant added to every key changes no softmax.
        assert [name for name in idle if not name.endswith("key.bias")] == []


@pytest.mark.parametrize("task", TASKS)
def test_a_private_step_of_the_privacy_engine_moves_every_parameter(task):
    module, second = built(task)
    before = copy.deepcopy(module.state_dict())
    loader = DataLoader(TensorDataset(values(), second), batch_size=B)

    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="hooks",
        loss_reduction="sum",
    )
    for batch in loader:
        private(*batch).backward()
        optimizer.step()

    after = private._module.state_dict()
    for name, start in before.items():
        assert after[name].isfinite().all(), name
        fixed = "encoder.linear." in name
        assert torch.equal(after[name], start) == fixed, name


def test_a_frozen_encoder_has_no_per_sample_gradient_and_stays_as_it_was():
    module, second = built("survival")
    module.encoder.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())

    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=module,
        optimizer=torch.optim.SGD(module.head.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(values(), second), batch_size=B),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        loss_reduction="sum",
    )
    for batch in loader:
        private(*batch).backward()
        optimizer.step()

    after = private._module.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {name for name in before if name.startswith("head.")}
