"""A site of six patients, and a model small enough to follow by hand."""

import torch
from torch import nn

from fedgex.common.data.dataset import Patients
from fedgex.common.models.gexbert import Encoder, GexBert, ModelConfig

N, V, LACKING = 6, 9, 4
CONFIG = ModelConfig(n_genes=V, width=8, n_latents=3, n_blocks=1, n_heads=2)


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
