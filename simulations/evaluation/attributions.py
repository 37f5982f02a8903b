"""Attributions of a model, summed at the sites; and the effect of deleting genes.

Sums over the minimum cohort or more leave a site (simulations/analysis/attribution.py).
N patients, V genes, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgex.common.data.dataset import Patients
from fedgex.common.data.moments import GeneMoments, pool
from fedgex.common.models import masking, tasks
from fedgex.common.models.gexbert import Encoder, GexBert
from fedgex.common.models.heads import ClassificationHead
from fedgex.common.models.restoration import restore
from fedgex.common.seeds import generator
from fedgex.common.study import Study
from fedgex.simulations.analysis import attribution
from fedgex.simulations.evaluation.arms import Model
from fedgex.simulations.evaluation.protocol import Split

DELETED = (8, 16, 32, 64, 128)
"""Numbers of genes taken away."""
DRAWS, QUICK_DRAWS = 5, 2
"""Random sets of genes of each size."""
QUICK_PATIENTS, QUICK_STEPS = 20, 8
"""Most patients of a site, and steps of the integrated gradients, under --quick."""
TARGETS = 0.25
"""Share of the genes whose restoration is evaluated while others are deleted."""

GRADIENTS, ATTENTION = "integrated gradients", "attention"
RESTORING, CONTRAST = "restoration gradient", "spread of type means"
RANDOM, NOTHING, VALUES = "random", "nothing", "values"
RANKINGS = (GRADIENTS, ATTENTION, RESTORING, CONTRAST)
"""Orders of the genes; the last uses no model."""

Floats = NDArray[np.float64]
Found = dict[str, Any]


def at_sites(split: Split, model: Model) -> Found:
    """Return the sites' sums, by cancer type and of restoration."""
    study, backbone = model.study, backbone_of(model)
    asked = _targets(study, len(model.genes))
    gradients, errors = [], []
    for name, patients in _patients(split, model):
        rng = generator(study.seed, "interpretation", name)
        found = attribution.squared_gradients(backbone, patients, asked, rng)
        gradients.append(_leaving(study, found))
        errors.append(_leaving(study, _squared_errors(backbone, patients, rng)))
    restoring = {RESTORING: gradients, "error": errors}
    return by_type(split, model) | {
        key: _mean(pool(sites)).tolist() for key, sites in restoring.items()
    }


def by_type(split: Split, model: Model) -> Found:
    """Return attributions, attention and expression by type, from the sites' sums."""
    study, floor = model.study, model.study.minimum_cohort
    encoder, head = _classifier(model)
    steps = QUICK_STEPS if split.quick else attribution.STEPS
    typed: dict[str, list[dict[str, GeneMoments]]] = {}
    gaps: list[GeneMoments] = []
    for _, patients in _patients(split, model):
        target = patients.type_index(study.classification.classes)
        found = attribution.integrated_gradients(encoder, head, patients, target, steps)
        for key, of_types in (
            (GRADIENTS, found.genes),
            (ATTENTION, attribution.attention(encoder, patients)),
            (VALUES, patients.values),
        ):
            sums = attribution.by_type(of_types, patients.cancer_type, floor)
            typed.setdefault(key, []).append(sums)
        gap = found.genes.nansum(dim=1) - found.change
        both = torch.stack([gap, found.change], dim=1).abs()
        gaps.append(_leaving(study, both))
    pooled = {key: attribution.pool_types(sites) for key, sites in typed.items()}
    missed, changed = _mean(pool(gaps))
    types = sorted(pooled[GRADIENTS])
    numbers = {
        "types": types,
        "patients": [pooled[GRADIENTS][name].n_patients for name in types],
        "gap": float(missed / changed),
    }
    for key, of_key in pooled.items():
        numbers[key] = [_mean(of_key[name]).tolist() for name in types]
    return numbers


def contexts(split: Split, best: Sequence[int], model: Model) -> Found:
    """Return the mean gradient of each restored gene, and how well it is restored."""
    backbone, unseen = backbone_of(model), model.patients(split.unseen)
    gradients, correlations = [], []
    for gene in best:
        sites = (
            attribution.restored_gradient(backbone, patients, gene)
            for _, patients in _patients(split, model)
        )
        moments = pool(_leaving(model.study, of_site) for of_site in sites)
        gradients.append(_mean(moments).tolist())
        known = unseen.measured[:, gene].nonzero().squeeze(1)
        some = unseen.take(known)
        true = some.values[:, gene].numpy()
        asked = torch.zeros(len(model.genes), dtype=torch.bool)
        asked[gene] = True
        restored = _restored(backbone, some, asked).squeeze(1).numpy()
        correlations.append(float(np.corrcoef(true, restored)[0, 1]))
    return {"gradient": gradients, "correlation": correlations}


def deletions(
    split: Split, rankings: Mapping[int, Mapping[str, Sequence[int]]], model: Model
) -> Found:
    """Return accuracy and error on unseen institutions as genes are deleted.

    Accuracy: from all genes but those deleted. Error: of a fixed part of the genes,
    the same in all settings, restored from the others but those deleted.
    """
    study, V = model.study, len(model.genes)
    encoder, head = _classifier(model)
    backbone = backbone_of(model)
    asked = _targets(study, V)
    unseen = model.patients(split.unseen)
    target = unseen.type_index(study.classification.classes)
    known = target >= 0
    unseen = unseen.take(known.nonzero().squeeze(1))
    target, institution = target[known], split.institution[known.numpy()]

    def given(deleted: Sequence[int]) -> Patients:
        gone = torch.zeros(V, dtype=torch.bool)
        gone[list(deleted)] = True
        return unseen.without(gone)

    def right(deleted: Sequence[int]) -> Floats:
        found = _classes(encoder, head, given(deleted))
        return (found == target).double().numpy()

    def error(deleted: Sequence[int]) -> Floats:
        off = _restored(backbone, given(deleted), asked) - unseen.values[:, asked]
        return off.square().nanmean(dim=1).double().numpy()

    found: dict[str, Any] = {}
    n_draws = QUICK_DRAWS if split.quick else DRAWS
    inputs = (~asked).nonzero().squeeze(1).tolist()
    for name, score, genes in (
        ("accuracy", right, list(range(V))),
        ("mse", error, inputs),
    ):
        ways = {
            ranking: [[g for g in order if g in set(genes)]]
            for ranking, order in rankings[study.seed].items()
            if name == "mse" or ranking != RESTORING
        }
        rngs = [np.random.default_rng([study.seed, draw]) for draw in range(n_draws)]
        ways[RANDOM] = [rng.permutation(genes).tolist() for rng in rngs]
        found[name] = {NOTHING: {"0": _by_institution(score([]), institution)}}
        for way, lists in ways.items():
            of_way = found[name][way] = dict[str, Found]()
            for size in [size for size in DELETED if size < len(genes)]:
                values = np.mean([score(each[:size]) for each in lists], axis=0)
                of_way[str(size)] = _by_institution(values, institution)
    return found


def orders(site: Found) -> dict[str, list[int]]:
    """Return the genes by each ranking, the first in it first."""
    importance = {
        GRADIENTS: np.abs(site[GRADIENTS]).mean(axis=0),
        ATTENTION: np.mean(site[ATTENTION], axis=0),
        RESTORING: np.asarray(site[RESTORING]),
        CONTRAST: np.var(site[VALUES], axis=0),
    }
    return {way: descending(of).tolist() for way, of in importance.items()}


def descending(values: Floats) -> NDArray[np.intp]:
    """Return the order of the values, the largest first and those unknown last."""
    return np.argsort(-np.where(np.isnan(values), -np.inf, values))


def _patients(split: Split, model: Model) -> list[tuple[str, Patients]]:
    """Return each site's patients of the model's cancer types."""
    found = []
    for name, cohort in sorted(split.sites.items()):
        patients = model.patients(cohort)
        known = patients.type_index(model.study.classification.classes) >= 0
        rows = known.nonzero().squeeze(1)
        if split.quick:
            rows = rows[:QUICK_PATIENTS]
        if len(rows):
            found.append((name, patients.take(rows)))
    return found


def _classifier(model: Model) -> tuple[Encoder, ClassificationHead]:
    loaded = tasks.load_classifier(model.study, len(model.genes), model.parameters)
    loaded.eval()
    return loaded.encoder, loaded.head


def backbone_of(model: Model) -> GexBert:
    """Return a model's backbone, for evaluation."""
    backbone = tasks.load_backbone(model.study, len(model.genes), model.parameters)
    return backbone.eval()


def _targets(study: Study, n_genes: int) -> Tensor:
    """Return the genes whose restoration is evaluated, (V,), bool."""
    rng = generator(study.seed, "interpretation", "targets")
    chosen = torch.randperm(n_genes, generator=rng)[: max(1, int(TARGETS * n_genes))]
    return torch.zeros(n_genes, dtype=torch.bool).index_fill(0, chosen, True)


@torch.no_grad()
def _squared_errors(
    backbone: GexBert, patients: Patients, rng: torch.Generator
) -> Tensor:
    """Hide half of the cells; return their squared errors, NaN elsewhere, (N, V)."""
    hidden = masking.mcar(patients.measured, 0.5, rng)
    batches = (each.split(attribution.BATCH) for each in (patients.values, hidden))
    found = [
        (restore(backbone, values, ~values.isnan() & ~gone, gone) - values).square()
        for values, gone in zip(*batches, strict=True)
    ]
    return torch.where(hidden, torch.cat(found), torch.nan)


@torch.no_grad()
def _restored(backbone: GexBert, patients: Patients, asked: Tensor) -> Tensor:
    """Return the genes asked for, from all others, (N, Q); NaN where none is given."""
    wanted = asked.nonzero().T  # (1, Q)
    found = torch.full((len(patients), wanted.shape[1]), torch.nan)
    for rows, genes in attribution.alike(patients.measured & ~asked):
        values = patients.values[rows[:, None], genes]
        found[rows] = backbone(genes, values, None, wanted.expand(len(rows), -1))
    return found


@torch.no_grad()
def _classes(encoder: Encoder, head: ClassificationHead, patients: Patients) -> Tensor:
    """Return the class of each patient, shape (N,); -1 where no gene is given."""
    found = torch.full((len(patients),), -1)
    for rows, genes in attribution.alike(patients.measured):
        values = patients.values[rows[:, None], genes]
        found[rows] = attribution.margins(encoder, head, genes, values).argmax(dim=1)
    return found


def _by_institution(values: Floats, institution: NDArray[np.str_]) -> Found:
    """Return the mean over all patients, and over those of each institution."""
    names = np.unique(institution)
    return {
        "all": float(np.nanmean(values)),
        "institutions": [float(np.mean(values[institution == n])) for n in names],
    }


def _leaving(study: Study, values: Tensor) -> GeneMoments:
    """Return the sums over a site's patients that may leave it."""
    return GeneMoments.of(values.numpy()).suppressed(study.minimum_cohort)


def _mean(moments: GeneMoments) -> Floats:
    """Return the mean, NaN where nothing is known."""
    return np.where(moments.count > 0, moments.mean, np.nan)
