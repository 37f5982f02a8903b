"""Heads over a patient's embedding: cancer type and survival.

B patients, D width, R factors, K components.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedgex.common.constants import BASELINE_SCALE, CLINICAL_SHARE, OWN_SHARE
from fedgex.common.models.gexbert import ModelConfig


class ClassificationHead(nn.Module):
    """Linear classifier of the cancer type over a patient's embedding.

    logits = linear(norm(latents, factors)) + known(evidence)

    The second term exists if the factor model has components for types, and begins as
    their generative classifier, which needs few genes and no training. The first begins
    at zero and learns the residual.
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
        """Initialise each class with the evidence for the component of its name."""
        if self.known is None:
            return
        same = [[float(a == b) for b in types] for a in classes]
        with torch.no_grad():
            self.known.weight.copy_(torch.tensor(same))


class SurvivalHead(nn.Module):
    """Log-hazard of a patient, and a baseline for each cancer type and interval.

    logit hazard_k(patient) = baseline[type, k] + log_hazard(patient)
    log_hazard(patient)     = shared(x) + OWN_SHARE * own[type](x)

    with x the latents and the factors, each block of mean square about 1 in all, and
    likewise for the clinical covariates, with CLINICAL_SHARE. With a ridge of strength
    r on all weights (weight decay of SGD), that is a ridge of r on the shared weights
    and of r / OWN_SHARE^2 on a type's own.
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


BASELINE_START = -2.0
"""Logit of the hazard of an interval before training: about one in eight."""
CLINICAL = ("age", "sex")
"""Clinical covariates of the survival head: (age - 60) / 10 years, and male = 1."""
