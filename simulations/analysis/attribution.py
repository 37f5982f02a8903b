"""Attribution of a model's predictions to its input genes.

    a site's patients -> attribution of each -> sums and counts by cancer type
    -> the same of all sites

Attributions of single patients stay at their site; sums over the minimum cohort leave
it. N patients, V genes of the vocabulary, B patients who have the same T genes
measured, C classes. An attribution is NaN where the gene was not given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedgex.common.data.cross_products import MIN_SITES
from fedgex.common.data.dataset import Patients
from fedgex.common.data.moments import GeneMoments, pool
from fedgex.common.models.gexbert import Encoder, GexBert, differentiable_factors
from fedgex.common.models.heads import ClassificationHead

STEPS = 64
"""Of the path from the mean patient to each, over which gradients are averaged. For
48 patients of TCGA and a model of one round, attributions missed 8 % of the margin's
change with 32 and 3 % with 64."""
SIGNS = 4
"""Random signs that estimate the squared gradients of many restored genes."""
BATCH = 64
"""Most patients at a time."""


class Attributed(NamedTuple):
    """The margin of a class, shared out among the genes."""

    genes: Tensor
    """Addition of each gene to the margin, shape (N, V)."""
    change: Tensor
    """Sum of all additions: the margin less that of the mean patient, shape (N,)."""


def integrated_gradients(
    encoder: Encoder,
    head: ClassificationHead,
    patients: Patients,
    target: Tensor,
    steps: int = STEPS,
) -> Attributed:
    """Attribute the margin of each patient's class to the patient's genes.

    Gene g gets x_g times the mean of d margin / d x_g on the straight way from the
    federation's mean patient, who is all zeros, to the patient x; midpoint rule.
    Summed over the genes this is the change of the margin, up to the rule's error.

    Parameters
    ----------
    target
        Class of each patient, shape (N,).
    steps
        Points on the way.

    References
    ----------
    Sundararajan, Taly and Yan (2017), Axiomatic attribution for deep networks, ICML.
    """
    genes_found = torch.full_like(patients.values, torch.nan)
    change = torch.empty(len(patients))
    with differentiable_factors(encoder):
        for rows, genes in alike(patients.measured):
            values = patients.values[rows[:, None], genes]
            own = target[rows, None]
            gradient = torch.zeros_like(values)
            for step in range(steps):
                at = ((step + 0.5) / steps * values).requires_grad_()
                of_own = margins(encoder, head, genes, at).gather(1, own)
                gradient += torch.autograd.grad(of_own.sum(), at)[0]
            genes_found[rows[:, None], genes] = values * gradient / steps
            with torch.no_grad():
                moved = margins(encoder, head, genes, values)
                moved = moved - margins(encoder, head, genes, 0 * values[:1])
            change[rows] = moved.gather(1, own).squeeze(1)
    return Attributed(genes=genes_found, change=change)


def margins(
    encoder: Encoder, head: ClassificationHead, genes: Tensor, values: Tensor
) -> Tensor:
    """Return each class' logit less the mean of all, shape (B, C).

    An equal rise of all logits does not change the class.

    Parameters
    ----------
    genes
        Indices of the genes, the same for all patients, shape (1, T).
    values
        Shape (B, T).
    """
    logits: Tensor = head(encoder.embed(genes, values, None))
    return logits - logits.mean(dim=1, keepdim=True)


@torch.no_grad()
def attention(encoder: Encoder, patients: Patients) -> Tensor:
    """Return the attention of the latents to each gene, shape (N, V).

    That of the one layer in which they read the genes, averaged over latents and heads;
    a patient's add up to 1.
    """
    reader = encoder.read.attention
    caught: list[tuple[Tensor, ...]] = []
    hook = reader.register_forward_pre_hook(lambda _, given: caught.append(given))
    found = torch.full_like(patients.values, torch.nan)
    try:
        for rows, genes in alike(patients.measured):
            encoder(genes, patients.values[rows[:, None], genes], None)
            x, context, _ = caught.pop()
            q, k = (  # (B, H, L or T, D/H)
                t.unflatten(-1, (reader.n_heads, -1)).transpose(1, 2)
                for t in (reader.query(x), reader.key(context))
            )
            weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
            found[rows[:, None], genes] = weights.mean(dim=(1, 2))
    finally:
        hook.remove()
    return found


def restored_gradient(backbone: GexBert, patients: Patients, gene: int) -> Tensor:
    """Return d restored gene / d x_g, with all other measured genes given, (N, V)."""
    given = patients.measured
    given[:, gene] = False
    found = torch.full_like(patients.values, torch.nan)
    with differentiable_factors(backbone.encoder):
        for rows, genes in alike(given):
            at = patients.values[rows[:, None], genes].requires_grad_()
            asked = torch.full((len(rows), 1), gene)
            restored = backbone(genes, at, None, asked)
            found[rows[:, None], genes] = torch.autograd.grad(restored.sum(), at)[0]
    return found


def squared_gradients(
    backbone: GexBert, patients: Patients, asked: Tensor, rng: torch.Generator
) -> Tensor:
    """Return the squared gradient by x_g, averaged over many restored genes, (N, V).

    With random signs s_q the square of d (sum_q s_q restored_q) / d x_g is, on average,
    the sum of the squares (Hutchinson 1990), so that SIGNS gradients stand for all.

    Parameters
    ----------
    asked
        Genes to restore, shape (V,), bool; the other measured ones are given.
    """
    wanted = asked.nonzero().T  # (1, Q)
    found = torch.full_like(patients.values, torch.nan)
    with differentiable_factors(backbone.encoder):
        for rows, genes in alike(patients.measured & ~asked):
            at = patients.values[rows[:, None], genes].requires_grad_()
            restored = backbone(genes, at, None, wanted.expand(len(rows), -1))
            total = torch.zeros_like(at)
            for _ in range(SIGNS):
                sign = 2 * torch.randint(2, restored.shape, generator=rng) - 1
                signed = (sign * restored).sum()
                (one,) = torch.autograd.grad(signed, at, retain_graph=True)
                total += one.square()
            found[rows[:, None], genes] = total / (SIGNS * wanted.shape[1])
    return found


def by_type(
    attributions: Tensor, cancer_type: Sequence[str | None], floor: int
) -> dict[str, GeneMoments]:
    """Return the sums over a site's patients of each cancer type, which may leave it.

    Parameters
    ----------
    attributions
        Shape (N, V).
    cancer_type
        Of each patient, length N.
    floor
        A type of fewer patients, or a gene given in fewer, is kept back.
    """
    sizes = Counter(name for name in cancer_type if name is not None)
    return {
        name: GeneMoments.of(
            attributions[[each == name for each in cancer_type]].numpy()
        ).suppressed(floor)
        for name in sorted(sizes)
        if sizes[name] >= floor
    }


def pool_types(sites: Iterable[Mapping[str, GeneMoments]]) -> dict[str, GeneMoments]:
    """Return the sums of each type over all sites.

    A type with sums from fewer than `MIN_SITES` of several sites is left out, so that
    no site's own mean reaches the others.
    """
    reported = list(sites)
    counts = Counter(name for site in reported for name in site)
    least = min(MIN_SITES, len(reported))
    return {
        name: pool(site[name] for site in reported if name in site)
        for name in sorted(counts)
        if counts[name] >= least
    }


def alike(given: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows (B,), and the indices (1, T) of the genes that all of them are given.

    One list of genes for many patients lets the linear start factorise once for all. A
    patient without any gene is left out.

    Parameters
    ----------
    given
        Shape (N, V), bool.
    """
    patterns, which = torch.unique(given, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        genes = pattern.nonzero().T
        if genes.numel():
            for rows in (which == number).nonzero().squeeze(1).split(BATCH):
                yield rows, genes
