"""GexBERT: a transformer over gene-plus-value tokens that restores expression.

Any subset of genes goes in, any set of genes is asked for. Genes meet only through a
fixed number of latent tokens (Perceiver IO, Jaegle et al. 2021, arXiv 2107.14795), so
that time and memory grow linearly with the number of genes.

Letters in shape remarks: B patients, T genes given, Q genes asked for, L latents,
D width, H heads, V genes in the vocabulary.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name every PyTorch reader knows
from torch import Tensor, nn

from fedgex.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The size of a GexBERT."""

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
    """Factors of the linear start, R; 0 leaves it out."""
    linear_components: int = 1
    """Components of the linear start, K."""
    network_where: Literal["everywhere", "dropout"] = "everywhere"
    """Where the network adds to the linear start, see `LinearStart.say`."""

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

    @property
    def embedding_width(self) -> int:
        """Length of a patient's vector: D, or D + R + K with a linear start."""
        if not self.linear_rank:
            return self.width
        return self.width + self.linear_rank + self.linear_components


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
    """Tokens read a context once, then think about it (pre-norm)."""

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
    """Tokens read one another (pre-norm)."""

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
    """A token for each measured gene: which gene it is, and how strongly expressed.

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


LEAST_LOG_WEIGHT = -20.0
"""Components less likely than this are all as unlikely to what reads the posterior."""

TYPE_NOISE = 0.5
"""Of the noise, where components are told apart: restoring unseen patients wants more
of it than telling types does. Chosen by cross-validation over training institutions."""

SILENT, LOUD = 0.4, 0.8
"""How far low expression must drop out for the network to add to the linear start. On
validation institutions, 98 of 100 patients with cells missing at random or by panel
are below .5 at all rates, and those with low expression missing above .7."""
LOUDNESS = 4.0
"""Of the network's output where it seldom speaks: how fast it learns to."""


class Posterior(NamedTuple):
    """What the linear start knows of a patient."""

    factors: Tensor
    """Mean of the factors over the components, shape (B, R)."""
    log_weights: Tensor
    """Log responsibility of each component, shape (B, K)."""

    spread: Tensor
    """Spread of each factor over genes as a multiple of their mean, shape (R,)."""

    @property
    def features(self) -> Tensor:
        """Factors by their spread, and log responsibilities, shape (B, R + K)."""
        certain = self.log_weights.clamp(min=LEAST_LOG_WEIGHT)
        return torch.cat([self.scaled, certain], dim=-1)

    @property
    def scaled(self) -> Tensor:
        """Factors by their spread, shape (B, R).

        A ridge on what is made of them treats them as it would the genes.
        """
        return self.factors * self.spread


class LinearStart(nn.Module):
    """What a mixture of factor models knows of a patient, one component a cancer type.

    In component k, x = mean_k + loadings z + noise, z ~ N(0, C_k), see common/start.py.
    All of it comes from the federation's pooled cross-products before the first round
    and is never trained, so that the network learns only what these do not tell. Given
    the measured genes, with G = sum_g w_g w_g' / noise_g and A_k = C_k^-1 + G (Bishop
    2006, eqs. 12.42 and 9.13, with a noise for each gene),

        z_k        = A_k^-1 t_k,    t_k = sum_g w_g (x_g - mean_kg) / noise_g
        log p_k(x) = -(log det C_k + log det A_k + sum_g (x_g - mean_kg)^2 / noise_g
                       - t_k' z_k) / 2 + what is the same for all k

    and component k has the responsibility share_k p_k(x) / sum_j share_j p_j(x).

    V genes, K components, R factors.
    """

    loadings: Tensor
    noise: Tensor
    means: Tensor
    precisions: Tensor
    log_shares: Tensor

    def __init__(self, n_genes: int, rank: int, n_components: int) -> None:
        super().__init__()
        K, V = n_components, n_genes
        self.register_buffer("loadings", torch.zeros(V, rank))
        self.register_buffer("noise", torch.ones(V))
        self.register_buffer("means", torch.zeros(K, V))
        self.register_buffer("precisions", torch.eye(rank).repeat(K, 1, 1))  # C_k^-1
        self.register_buffer("log_shares", torch.full((K,), -math.log(K)))

    @torch.no_grad()
    def forward(
        self,
        genes: Tensor,
        values: Tensor,
        keep: Tensor | None,
        noise_share: float = 1.0,
    ) -> Posterior:
        """Return what genes, values and keep (B, T) tell of factors and component.

        Parameters
        ----------
        noise_share
            Of the noise that is taken to be in the values.
        """
        with torch.autocast(values.device.type, enabled=False):
            off = values.float().unsqueeze(1) - self.means[:, genes].transpose(0, 1)
            if _alike(genes) and (keep is None or _alike(keep)):
                # What follows from the panel alone is worked out once: b is 1, else B.
                genes, keep = genes[:1], None if keep is None else keep[:1]
            w = self.loadings[genes]  # (b, T, R)
            precise = 1 / (noise_share * self.noise[genes])  # (b, T)
            if keep is not None:
                precise = precise * keep
            weighted = (w * precise.unsqueeze(-1)).mT  # (b, R, T)
            target = off @ weighted.mT  # (B, K, R)
            root, _ = torch.linalg.cholesky_ex(
                (weighted @ w).unsqueeze(1) + self.precisions
            )  # (b, K, R, R)
            if len(root) == 1:
                factors = torch.cholesky_solve(target.permute(1, 2, 0), root[0])
                factors = factors.permute(2, 0, 1)  # (B, K, R)
            else:
                factors = torch.cholesky_solve(target.unsqueeze(-1), root).squeeze(-1)
            distance = (off.square() * precise.unsqueeze(1)).sum(-1)
            distance = distance - (target * factors).sum(-1)  # (B, K)
            log_density = -(_log_det(root) - self._log_det_precisions() + distance / 2)
            log_weights = (self.log_shares + log_density).log_softmax(-1)
            weights = log_weights.exp()
            mean = (weights.unsqueeze(-1) * factors).sum(1)  # (B, R)
            size = self.loadings.square().sum(0)  # (R,)
            spread = (size / size.mean().clamp(min=1e-12)).sqrt()
            return Posterior(factors=mean, log_weights=log_weights, spread=spread)

    def evidence(self, genes: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
        """Return log responsibilities as if types were equally common, shape (B, K).

        How common each is differs between hospitals more than what it looks like.
        """
        log_weights = self(genes, values, keep, TYPE_NOISE).log_weights
        unknown = self.log_shares < LEAST_LOG_WEIGHT
        shares = self.log_shares.masked_fill(unknown, 0.0)
        evidence: Tensor = (log_weights - shares).log_softmax(-1)
        return evidence.clamp(min=LEAST_LOG_WEIGHT)

    def restore(self, known: Posterior, genes: Tensor) -> Tensor:
        """Return the mean of the genes asked for, (B, Q)."""
        means = self.means[:, genes].transpose(0, 1)  # (B, K, Q)
        of_type = (known.log_weights.exp().unsqueeze(1) @ means).squeeze(1)
        linear = (self.loadings[genes] @ known.factors.unsqueeze(-1)).squeeze(-1)
        restored: Tensor = of_type + linear
        return restored

    @torch.no_grad()
    def say(self, known: Posterior, genes: Tensor, keep: Tensor | None) -> Tensor:
        """Return how far missingness itself tells of the values, 0 to 1, shape (B,).

        The start takes cells to be missing at random. Where those restored lie below
        those measured, by `SILENT` SDs of the patient's restored genes or more, they
        are not, and the network has the word; at `LOUD` SDs in full.
        """
        V = self.loadings.shape[0]
        everything = torch.arange(V, device=genes.device).expand(len(genes), -1)
        restored = self.restore(known, everything)  # (B, V)
        there = torch.ones_like(genes) if keep is None else keep.long()
        measured = torch.zeros_like(everything).scatter_add(1, genes, there).bool()
        n_measured = measured.sum(1)
        high = (restored * measured).sum(1) / n_measured.clamp(min=1)
        low = (restored * ~measured).sum(1) / (V - n_measured).clamp(min=1)
        drop = (high - low) / restored.std(1).clamp(min=1e-6)
        told = ((drop - SILENT) / (LOUD - SILENT)).clamp(0, 1)
        some = (n_measured > 0) & (n_measured < V)
        return torch.where(some, told, 0.0)

    def _log_det_precisions(self) -> Tensor:
        """Return half the log determinant of each C_k^-1, shape (K,)."""
        return _log_det(torch.linalg.cholesky_ex(self.precisions)[0])


def _alike(rows: Tensor) -> bool:
    """Return whether all rows are the same; none are."""
    return bool((rows == rows[:1]).all())


def _log_det(root: Tensor) -> Tensor:
    """Return half the log determinant of L L', from L of shape (..., R, R)."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Encoder(nn.Module):
    """Measured genes in, latents out: what is known about the patient."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.width, config.n_heads
        self.tokens = GeneTokens(config.n_genes, D)
        self.latents = nn.Embedding(config.n_latents, D)
        self.read = CrossBlock(D, H, 4)
        self.blocks = nn.ModuleList(SelfBlock(D, H, 4) for _ in range(config.n_blocks))
        self.norm = nn.LayerNorm(D)
        self.linear: LinearStart | None = None
        if config.linear_rank:
            R, K = config.linear_rank, config.linear_components
            self.linear = LinearStart(config.n_genes, R, K)
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
        there is a linear start.
        """
        latents, known = self(genes, values, keep)
        embedding: Tensor = latents.mean(dim=1)
        if known is None or self.linear is None:
            return embedding
        evidence = self.linear.evidence(genes, values, keep)
        return torch.cat([embedding, known.scaled, evidence], dim=1)


class Decoder(nn.Module):
    """Each gene asked for reads the latents and gives its standardised value."""

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
    """The shared backbone: encoder and decoder."""

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
            said = linear.say(known, genes, keep).unsqueeze(1)  # (B, 1)
            restored = LOUDNESS * said * restored
        return linear.restore(known, asked) + restored

    def _initialise(self) -> None:
        """Let the first step see the patients.

        Averaging T independent tokens leaves 1/sqrt(T) of their spread, so that under
        the usual small initialisation the latents are all but equal for all patients,
        and training stands still for ten epochs. Unit-size gene tables and a large
        value map in the reading attention make up for it.
        """
        for table in (
            self.encoder.latents,
            self.encoder.tokens.identity,
            self.encoder.tokens.direction,
            self.decoder.question,
        ):
            nn.init.normal_(table.weight)
        # Over a linear start the network is silent at first.
        nn.init.normal_(
            self.decoder.weight.weight, std=0.0 if self.config.linear_rank else 0.02
        )
        nn.init.zeros_(self.decoder.bias.weight)
        for attention in (self.encoder.read.attention, self.decoder.read.attention):
            nn.init.orthogonal_(attention.query.weight)
            nn.init.orthogonal_(attention.key.weight)
        nn.init.orthogonal_(self.encoder.read.attention.value.weight, gain=20.0)


@contextmanager
def differentiable_start(encoder: Encoder) -> Iterator[None]:
    """Let gradients through the linear start, which training has no use for.

    Without it nobody would see how the values act through factors and components.
    """
    linear = encoder.linear
    if linear is None:
        yield
        return
    plain: Any = LinearStart.forward
    linear.__dict__["forward"] = types.MethodType(plain.__wrapped__, linear)
    try:
        yield
    finally:
        del linear.__dict__["forward"]


class ClassificationHead(nn.Module):
    """Cancer type from a patient's vector.

    logits = linear(norm(latents, factors)) + known(evidence)

    The second is there if the linear start has a component for each of some types. At
    first it says what these say (a generative classifier, which needs no training and
    few genes); the rest is silent, and learns what they miss.
    """

    def __init__(self, config: ModelConfig, n_classes: int) -> None:
        super().__init__()
        self.n_read = config.width + config.linear_rank
        self.norm = nn.LayerNorm(self.n_read)
        self.linear = nn.Linear(self.n_read, n_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.known: nn.Linear | None = None
        if config.linear_rank and config.linear_components > 1:
            self.known = nn.Linear(config.linear_components, n_classes, bias=False)
            nn.init.zeros_(self.known.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map (B, D + R + K) to logits (B, classes)."""
        logits: Tensor = self.linear(self.norm(embedding[:, : self.n_read]))
        if self.known is not None:
            logits = logits + self.known(embedding[:, self.n_read :])
        return logits

    def start_from(self, types: Sequence[str], classes: Sequence[str]) -> None:
        """Let each class begin with the evidence for the component of its name."""
        if self.known is None:
            return
        same = [[float(a == b) for b in types] for a in classes]
        with torch.no_grad():
            self.known.weight.copy_(torch.tensor(same))


class SurvivalHead(nn.Module):
    """A log-hazard over a baseline for each cancer type and interval.

    logit hazard_k(patient) = baseline[type, k] + log_hazard(patient)
    log_hazard(patient)     = shared(x) + OWN_SHARE * own[type](x)

    with x the latents and the factors, each block of mean square about 1 in all, and so
    for the clinical covariates, with CLINICAL_SHARE: what is prognostic in all
    cancers is learned from all of them, and each cancer departs from it as far as its
    own patients say. With a ridge of strength r on all weights (weight decay of SGD),
    that is a ridge of r on what is shared and r / OWN_SHARE^2 on what is a type's own.
    """

    def __init__(self, config: ModelConfig, n_types: int, n_intervals: int) -> None:
        super().__init__()
        self.sizes = [size for size in (config.width, config.linear_rank) if size]
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        width = sum(self.sizes)
        self.shared = nn.Linear(width, 1, bias=False)
        self.own = nn.Linear(width, n_types, bias=False)
        self.clinical_shared = nn.Linear(len(CLINICAL), 1, bias=False)
        self.clinical_own = nn.Linear(len(CLINICAL), n_types, bias=False)
        self.baseline = nn.Embedding(n_types, n_intervals)
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def log_hazard(self, embedding: Tensor, clinical: Tensor, types: Tensor) -> Tensor:
        """Return one number a patient, shape (B,); higher means an earlier death.

        Parameters
        ----------
        embedding
            Shape (B, D + R + K), see `Encoder.embed`.
        clinical
            Shape (B, 2), see CLINICAL; zeros where unknown or unused.
        types
            Index of the cancer type, shape (B,).
        """
        read = embedding[:, : sum(self.sizes)].split(self.sizes, dim=1)
        blocks = [self.norm(read[0]), *read[1:]]  # latents, factors
        x = torch.cat([block / block.shape[1] ** 0.5 for block in blocks], dim=1)
        own = OWN_SHARE * self.own(x) + CLINICAL_SHARE * self.clinical_own(clinical)
        shared = self.shared(x) + self.clinical_shared(clinical)  # (B, 1)
        scores: Tensor = shared + own.gather(1, types[:, None])
        return scores.squeeze(1)

    def forward(self, embedding: Tensor, clinical: Tensor, types: Tensor) -> Tensor:
        """Return the logits of the interval hazards, shape (B, intervals)."""
        baseline: Tensor = self.baseline_logits(types)
        return baseline + self.log_hazard(embedding, clinical, types)[:, None]

    def baseline_logits(self, types: Tensor) -> Tensor:
        """Return the logits of the interval hazards at log-hazard 0, (B, intervals)."""
        # Opacus' expanded weights take no table's index of one dimension.
        scaled: Tensor = self.baseline(types[:, None]).squeeze(1)
        return BASELINE_START + BASELINE_SCALE * scaled


OWN_SHARE, CLINICAL_SHARE = 0.6, 0.2
"""How freely a cancer type departs from what all share: in expression, and in age and
sex. Chosen by cross-validation over training institutions (docs/decisions/0006)."""
BASELINE_START = -2.0
"""Logit of the hazard of an interval before training: about one in eight."""
BASELINE_SCALE = 3.0
"""Lets gradient steps that suit the weights move the baseline as fast."""

CLINICAL = ("age", "sex")
"""Clinical covariates of the survival head: (age - 60) / 10 years, and male = 1."""


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
    """Count the trainable numbers of a module."""
    return sum(p.numel() for p in module.parameters())
