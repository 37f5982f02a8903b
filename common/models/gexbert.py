"""GexBERT: a transformer over gene-plus-value tokens that restores expression.

Any subset of genes goes in, any set of genes is asked for. Genes meet only through a
fixed number of latent tokens (Perceiver IO, Jaegle et al. 2021, arXiv 2107.14795), so
that time and memory grow linearly with the number of genes.

B patients, T genes given, Q genes asked for, L latents,
D width, H heads, V genes in the vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name every PyTorch reader knows
from torch import Tensor, nn

from fedgex.common.constants import GATED_OUTPUT_SCALE
from fedgex.common.errors import ConfigError
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers, Posterior


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Size of a GexBERT."""

    n_genes: int
    """Genes in the vocabulary, V."""
    width: int
    """Width of every token, D."""
    n_latents: int
    """Latent tokens through which genes exchange information, L."""
    n_blocks: int
    """Self-attention blocks over the latents."""
    n_heads: int
    """Attention heads, H; divides the width."""
    linear_rank: int = 0
    """Rank of the factor model, R; 0 leaves it out."""
    linear_components: int = 1
    """Components of the factor model, K."""
    network_where: Literal["everywhere", "dropout"] = "everywhere"
    """Patients for whom the network's output is added to the factor model's, see
    `MixtureOfFactorAnalyzers.mnar_gate`."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        for name, value in asdict(self).items():
            if not isinstance(value, int):
                continue
            least = 0 if name == "linear_rank" else 1
            if value < least:
                raise ConfigError(f"model.{name} is {value}; expected {least} or more.")
        if self.width % self.n_heads:
            raise ConfigError(
                f"model.width is {self.width} and model.n_heads {self.n_heads}; "
                "expected a width that the number of heads divides."
            )


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "n_latents": 32, "n_blocks": 2, "n_heads": 4},
    "small": {"width": 128, "n_latents": 64, "n_blocks": 4, "n_heads": 8},
    "base": {"width": 256, "n_latents": 128, "n_blocks": 8, "n_heads": 8},
}


def preset(
    name: str,
    n_genes: int,
    linear_rank: int = 0,
    linear_components: int = 1,
    network_where: Literal["everywhere", "dropout"] = "everywhere",
) -> ModelConfig:
    """Return the named size for a vocabulary of `n_genes`.

    Raises
    ------
    ConfigError
        If there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f'model.preset is "{name}"; expected one of {", ".join(PRESETS)}.'
        )
    return ModelConfig(
        n_genes=n_genes,
        linear_rank=linear_rank,
        linear_components=linear_components,
        network_where=network_where,
        **PRESETS[name],
    )


class Attention(nn.Module):
    """Multi-head attention from one set of tokens to another.

    Written out with linear layers, because Opacus cannot take
    `nn.MultiheadAttention` apart into per-sample gradients.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        """Let x (B, N, D) read context (B, M, D) where keep (B, M) is true."""
        q, k, v = (  # (B, H, N or M, D/H)
            t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for t in (self.query(x), self.key(context), self.value(context))
        )
        mask = None if keep is None else keep[:, None, None, :]  # (B, 1, 1, M)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        joined: Tensor = self.out(y.transpose(1, 2).flatten(-2))  # (B, N, D)
        return joined


class FeedForward(nn.Module):
    """Two linear layers applied to each token by itself."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        mapped: Tensor = self.down(F.gelu(self.up(x)))
        return mapped


class CrossBlock(nn.Module):
    """Cross-attention of tokens to a context, then an MLP (pre-norm)."""

    def __init__(self, width: int, n_heads: int, ratio: int) -> None:
        super().__init__()
        self.norm_x = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = FeedForward(width, ratio)

    def forward(self, x: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map x (B, N, D) and context (B, M, D) to (B, N, D)."""
        x = x + self.attention(self.norm_x(x), self.norm_context(context), keep)
        x = x + self.mlp(self.norm_mlp(x))
        return x


class SelfBlock(nn.Module):
    """Self-attention among tokens, then an MLP (pre-norm)."""

    def __init__(self, width: int, n_heads: int, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = FeedForward(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed)
        x = x + self.mlp(self.norm_mlp(x))
        return x


class GeneTokens(nn.Module):
    """Embedding of each measured gene and its value as a token.

    token = identity[gene] + value * direction[gene] + shape(value)

    The second term gives every gene its own direction of change; the third is a curve
    that all genes share.
    """

    def __init__(self, n_genes: int, width: int) -> None:
        super().__init__()
        self.identity = nn.Embedding(n_genes, width)
        self.direction = nn.Embedding(n_genes, width)
        self.curve_in = nn.Linear(1, width)
        self.curve_out = nn.Linear(width, width)

    def forward(self, genes: Tensor, values: Tensor) -> Tensor:
        """Map gene indices (B, T) and values (B, T) to tokens (B, T, D)."""
        value = values.unsqueeze(-1)  # (B, T, 1)
        curve = self.curve_out(F.gelu(self.curve_in(value)))
        tokens: Tensor = self.identity(genes) + value * self.direction(genes) + curve
        return tokens


class Encoder(nn.Module):
    """Map a patient's measured genes to latent tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.width, config.n_heads
        self.tokens = GeneTokens(config.n_genes, D)
        self.latents = nn.Embedding(config.n_latents, D)
        self.read = CrossBlock(D, H, 4)
        self.blocks = nn.ModuleList(SelfBlock(D, H, 4) for _ in range(config.n_blocks))
        self.norm = nn.LayerNorm(D)
        self.linear: MixtureOfFactorAnalyzers | None = None
        if config.linear_rank:
            R, K = config.linear_rank, config.linear_components
            self.linear = MixtureOfFactorAnalyzers(config.n_genes, R, K)
            self.summary = nn.Linear(R + K, D)

    def forward(
        self, genes: Tensor, values: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Posterior | None]:
        """Map genes, values and keep (B, T) to latents (B, L, D) and the posterior."""
        ids = torch.arange(self.latents.num_embeddings, device=values.device)
        x = self.latents(ids.expand(len(values), -1))  # (B, L, D)
        known = None
        if self.linear is not None:
            known = self.linear(genes, values, keep)
            x = x + self.summary(known.features).unsqueeze(1)
        x = self.read(x, self.tokens(genes, values), keep)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x, known

    def embed(self, genes: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
        """Return one vector a patient, shape (B, D + R + K).

        Mean latent, factors, and evidence for the components; the latter two where
        there is a factor model.
        """
        latents, known = self(genes, values, keep)
        embedding: Tensor = latents.mean(dim=1)
        if known is None or self.linear is None:
            return embedding
        evidence = self.linear.evidence(genes, values, keep)
        return torch.cat([embedding, known.scaled, evidence], dim=1)


class Decoder(nn.Module):
    """Restore each gene asked for by cross-attention to the latents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.width, config.n_heads
        self.question = nn.Embedding(config.n_genes, D)
        self.read = CrossBlock(D, H, 2)
        self.norm = nn.LayerNorm(D)
        self.weight = nn.Embedding(config.n_genes, D)
        self.bias = nn.Embedding(config.n_genes, 1)

    def forward(self, latents: Tensor, genes: Tensor) -> Tensor:
        """Map latents (B, L, D) and gene indices (B, Q) to values (B, Q)."""
        x = self.norm(self.read(self.question(genes), latents))  # (B, Q, D)
        values: Tensor = (x * self.weight(genes)).sum(-1)  # (B, Q)
        values = values + self.bias(genes).squeeze(-1)
        return values


class GexBert(nn.Module):
    """Backbone shared by all tasks: encoder and decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._initialise()

    def forward(
        self, genes: Tensor, values: Tensor, keep: Tensor | None, asked: Tensor
    ) -> Tensor:
        """Restore the genes asked for from the genes given.

        Parameters
        ----------
        genes
            Vocabulary indices of the given genes, shape (B, T), int64.
        values
            Their standardised expression, shape (B, T).
        keep
            False where a column is padding, shape (B, T); None if nothing is.
        asked
            Vocabulary indices of the genes to restore, shape (B, Q), int64.

        Returns
        -------
        Tensor
            Standardised expression of the genes asked for, shape (B, Q).
        """
        latents, known = self.encoder(genes, values, keep)
        restored: Tensor = self.decoder(latents, asked)
        linear = self.encoder.linear
        if linear is None:
            return restored
        if self.config.network_where == "dropout":
            gate = linear.mnar_gate(known, genes, keep).unsqueeze(1)  # (B, 1)
            restored = GATED_OUTPUT_SCALE * gate * restored
        return linear.restore(known, asked) + restored

    def _initialise(self) -> None:
        """Initialise so that the latents differ between patients from the first step.

        Averaging T independent tokens divides their SD by sqrt(T): under the usual
        small initialisation latents are nearly equal for all patients, and the loss
        does not fall for ten epochs. Unit-size gene tables and a large value map in the
        reading attention compensate for it.
        """
        for table in (
            self.encoder.latents,
            self.encoder.tokens.identity,
            self.encoder.tokens.direction,
            self.decoder.question,
        ):
            nn.init.normal_(table.weight)
        # Over a factor model the network's output begins at zero.
        nn.init.normal_(
            self.decoder.weight.weight, std=0.0 if self.config.linear_rank else 0.02
        )
        nn.init.zeros_(self.decoder.bias.weight)
        for attention in (self.encoder.read.attention, self.decoder.read.attention):
            nn.init.orthogonal_(attention.query.weight)
            nn.init.orthogonal_(attention.key.weight)
        nn.init.orthogonal_(self.encoder.read.attention.value.weight, gain=20.0)


@contextmanager
def differentiable_factors(encoder: Encoder) -> Iterator[None]:
    """Let gradients flow through the factor model, for attribution of its part."""
    linear = encoder.linear
    if linear is None:
        yield
        return
    plain: Any = MixtureOfFactorAnalyzers.forward
    linear.__dict__["forward"] = types.MethodType(plain.__wrapped__, linear)
    try:
        yield
    finally:
        del linear.__dict__["forward"]


def select(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Turn a mask over the vocabulary into lists of gene indices.

    Parameters
    ----------
    mask
        Genes to take, shape (B, V), bool.

    Returns
    -------
    genes : Tensor
        Their indices in rising order, shape (B, T), T the most that any row takes, or
        1; shorter rows are padded with genes that they do not take.
    keep : Tensor or None
        False at the padding, shape (B, T); None if there is none.
    """
    counts = mask.sum(dim=1)
    longest = max(int(counts.max()), 1)  # Opacus takes no empty list
    genes = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)
    genes = genes[:, :longest]
    keep = torch.arange(longest, device=mask.device)[None, :] < counts[:, None]
    return genes, None if bool(keep.all()) else keep


def n_parameters(module: nn.Module) -> int:
    """Return the number of a module's trainable parameters."""
    return sum(p.numel() for p in module.parameters())
