"""What the federated model looks at, and whether that makes sense.

    sites' patients -> attributions -> sums by cancer type -> genes of each type
                    -> gradients of restored genes         -> their context
                    -> scores of gene programmes -> Cox screen -> prognostic programmes
    unseen patients -> the same genes deleted; the same programmes' C-index

What leaves a site are sums over the minimum cohort or more (common/attribution.py).
Seed by seed; N patients, V genes, P programmes, R factors, C classes, I institutions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import false_discovery_control, norm, spearmanr
from torch import Tensor

from fedgex.common import attribution, masking, tasks
from fedgex.common.errors import ConfigError
from fedgex.common.harmonise import Patients
from fedgex.common.model import Encoder, GexBert
from fedgex.common.models.heads import ClassificationHead
from fedgex.common.objectives import restore
from fedgex.common.phases import take_part
from fedgex.common.screening import CoxScore
from fedgex.common.seeds import generator
from fedgex.common.start import LinearStart
from fedgex.common.statistics import GeneMoments, pool
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Study
from fedgex.common.survival_metrics import c_index_with_se
from fedgex.common.tasks import BACKBONE
from fedgex.simulations import in_process
from fedgex.simulations.benchmark import exams, markers
from fedgex.simulations.benchmark.ground import (
    FEDERATED,
    POOLED,
    Ground,
    Model,
    arms,
    models,
)
from fedgex.simulations.benchmark.markers import ATTENTION, GRADIENTS
from fedgex.simulations.benchmark.outcome import Outcome, Part, Section, plain
from fedgex.simulations.benchmark.tables import markdown, paired_p, spread
from fedgex.simulations.comparisons import cached

TOP = 10
"""Genes in the table of a cancer type."""
CONTEXTS, DRIVERS = 12, 5
"""Restored genes whose context is shown, and genes that drive each."""
PROGRAMMES = 32
"""At most; the leading directions of the linear start's loadings."""
SHOWN = 8
"""Programmes in the table, by the screen's |z|."""
DELETED = (8, 16, 32, 64, 128)
"""Genes taken away."""
DRAWS, QUICK_DRAWS = 5, 2
"""Random sets of genes of each size."""
QUICK_PATIENTS, QUICK_STEPS = 20, 8
"""Most patients of a site, and steps of the integrated gradients, with --quick."""
TARGETS = 0.25
"""Share of the genes whose restoration is judged while others are deleted."""
MIN_EVENTS = 10
"""Fewer deaths of a cancer type than this, and it is not estimable."""
FALSE_SHARE = 0.05
"""Share of false ones allowed among the programmes called prognostic."""

RESTORING, CONTRAST = "restoration gradient", "spread of type means"
RANDOM, NOTHING, VALUES = "random", "nothing", "values"
RANKINGS = (GRADIENTS, ATTENTION, RESTORING, CONTRAST)
"""Ways of putting genes in order; the last knows no model."""

Floats = NDArray[np.float64]
Found = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Programmes:
    """Gene programmes that all sites compute alike from the model they share."""

    loadings: Floats
    """Of each gene on each programme, shape (V, P)."""
    from_factors: Floats
    """From the linear start's factors to the programmes, shape (R, P)."""

    @classmethod
    def of(cls, linear: LinearStart) -> Programmes:
        """Rotate the leading directions of the loadings to a simple structure.

        Each points where most of its weight, by third powers, is positive.
        """
        loadings = linear.loadings.double().numpy()
        left, sizes, right = np.linalg.svd(loadings, full_matrices=False)
        known = int((sizes > 1e-6 * sizes[0]).sum())
        P = min(PROGRAMMES, known)
        leading = left[:, :P] * sizes[:P]
        turn = varimax(leading)
        turn = turn * np.where(((leading @ turn) ** 3).sum(axis=0) < 0, -1, 1)
        order = np.argsort(-((leading @ turn) ** 2).sum(axis=0), kind="stable")
        turn = turn[:, order]
        return cls(loadings=leading @ turn, from_factors=right[:P].T @ turn)

    @torch.no_grad()
    def scores(self, linear: LinearStart, patients: Patients) -> Floats:
        """Return each patient's scores, which stay local, shape (N, P)."""
        factors = torch.zeros(len(patients), linear.loadings.shape[1])
        for rows, genes in attribution.alike(patients.measured):
            values = patients.values[rows[:, None], genes]
            factors[rows] = linear(genes, values, None).factors
        scores: Floats = factors.double().numpy() @ self.from_factors
        return scores


def varimax(loadings: Floats, n_steps: int = 500) -> Floats:
    """Return the rotation after which the squared loadings vary most, shape (P, P).

    Parameters
    ----------
    loadings
        Shape (V, P).

    References
    ----------
    Kaiser (1958), Psychometrika 23:187-200; here by repeated SVD.
    """
    V, P = loadings.shape
    turn, reached = np.eye(P), 0.0
    for _ in range(n_steps):
        turned = loadings @ turn
        slope = turned**3 - turned * (turned**2).sum(axis=0) / V
        left, sizes, right = np.linalg.svd(loadings.T @ slope)
        turn = left @ right
        if sizes.sum() <= reached * (1 + 1e-8):
            break
        reached = sizes.sum()
    return turn


def run(grounds: Callable[[int], Ground], console: Console) -> Outcome:
    """Look into the federated model of each seed.

    Raises
    ------
    ConfigError
        If the study lacks something that is looked into.
    """
    ground = grounds(0)
    _refuse_unfit(ground.study)
    wanted = [a for s in ground.seeds for a in arms(ground, s, (FEDERATED,))]
    trained = [model for _, model in models(ground, wanted, console)]
    each = partial(_each, ground, trained, console)
    sites = each("sites", partial(_at_sites, ground))
    best = _best_restored(sites)
    of_best = hashlib.sha256(repr(best).encode()).hexdigest()[:8]
    contexts = each(f"contexts-{of_best}", partial(_contexts, ground, best))
    seeds = [model.study.seed for model in trained]
    orders = dict(zip(seeds, map(_orders, sites), strict=True))
    deleted = each("deletion", partial(_deletions, ground, orders))
    parts = [
        _genes_of_types(ground, sites),
        _context_of(ground, best, contexts),
        _prognostic(ground, _screen(ground, trained[0])),
        _what_deletion_costs(deleted),
        *_known_markers(ground, sites, console),
    ]
    said: dict[str, Any] = {
        "seeds": seeds,
        "genes": ground.genes.genes,
        "unseen_patients": ground.unseen.n_patients,
        "unseen_institutions": len(set(ground.institution)),
    }
    return Outcome(
        name="interpretation",
        sections=[part.section for part in parts],
        numbers=plain(said | {str(p.section.figure): p.numbers for p in parts}),
        figures={str(p.section.figure): p.figure for p in parts},
    )


def _refuse_unfit(study: Study) -> None:
    lacking = [p for p in (CLASSIFICATION, SURVIVAL) if p not in study.phases]
    if not study.linear_rank:
        lacking.append("linear_rank")
    if study.classification.head == "local":
        lacking.append("a shared head of classification")
    if lacking:
        raise ConfigError(
            f'the study "{study.name}" has no {", ".join(lacking)}; expected all that '
            "interpretation looks into. Choose a scenario such as release."
        )


# ---- what is computed of each model, kept in files ----


def _each(
    ground: Ground,
    trained: Sequence[Model],
    console: Console,
    name: str,
    compute: Callable[[Model], Found],
) -> list[Found]:
    """Return what is computed of each model, unless a file has it already."""
    folder = ground.folder / "interpretation"
    folder.mkdir(exist_ok=True)
    ending = "-quick.json" if ground.quick else ".json"
    paths = {
        model.study.seed: folder / f"{model.study.hash[:12]}-{name}{ending}"
        for model in trained
    }
    todo = [model for model in trained if not paths[model.study.seed].exists()]
    keep = partial(_keep, compute, paths)
    for model, seconds in in_process.each_done(keep, todo, ground.workers):
        console.print(
            f"{name}: seed {model.study.seed}, {seconds:.0f} s", highlight=False
        )
    return [json.loads(path.read_text()) for path in paths.values()]


def _keep(
    compute: Callable[[Model], Found], paths: Mapping[int, Path], model: Model
) -> float:
    """Write what is computed of a model; return the seconds that it took."""
    started = time.monotonic()
    cached(paths[model.study.seed], lambda: compute(model))
    return time.monotonic() - started


def _at_sites(ground: Ground, model: Model) -> Found:
    """Return what the sites' sums say, of cancer types and of restoration."""
    study, floor = model.study, model.study.minimum_cohort
    backbone = _backbone(model)
    asked = _targets(study, len(model.genes))
    sums: dict[str, list[GeneMoments]] = {RESTORING: [], "error": []}
    for name, patients in _patients(ground, model):
        rng = generator(study.seed, "interpretation", name)
        for key, of_all in (
            (RESTORING, attribution.squared_gradients(backbone, patients, asked, rng)),
            ("error", _squared_errors(backbone, patients, rng)),
        ):
            sums[key].append(GeneMoments.of(of_all.numpy()).suppressed(floor))
    restoring = {key: _mean(pool(sites)).tolist() for key, sites in sums.items()}
    return {**_typed(ground, model), **restoring}


def _typed(ground: Ground, model: Model) -> Found:
    """Return attributions, attention and expression by type, from the sites' sums."""
    study, floor = model.study, model.study.minimum_cohort
    encoder, head = _classifier(model)
    steps = QUICK_STEPS if ground.quick else attribution.STEPS
    typed: dict[str, list[dict[str, GeneMoments]]] = {}
    gaps: list[GeneMoments] = []
    for _, patients in _patients(ground, model):
        target = patients.type_index(study.classification.classes)
        found = attribution.integrated_gradients(encoder, head, patients, target, steps)
        for key, of_types in {
            GRADIENTS: found.genes,
            ATTENTION: attribution.attention(encoder, patients),
            VALUES: patients.values,
        }.items():
            sums = attribution.by_type(of_types, patients.cancer_type, floor)
            typed.setdefault(key, []).append(sums)
        gap = found.genes.nansum(dim=1) - found.change
        both = torch.stack([gap, found.change], dim=1).abs()
        gaps.append(GeneMoments.of(both.numpy()).suppressed(floor))
    pooled = {key: attribution.pool_types(sites) for key, sites in typed.items()}
    missed, changed = _mean(pool(gaps))
    types = sorted(pooled[GRADIENTS])
    return {
        "types": types,
        "patients": [pooled[GRADIENTS][name].n_patients for name in types],
        "gap": float(missed / changed),
    } | {
        key: [_mean(of_key[name]).tolist() for name in types]
        for key, of_key in pooled.items()
    }


def _contexts(ground: Ground, best: Sequence[int], model: Model) -> Found:
    """Return the mean gradient of each restored gene, and how well it is restored."""
    backbone, floor = _backbone(model), model.study.minimum_cohort
    unseen = model.patients(ground.unseen)
    gradients, correlations = [], []
    for gene in best:
        moments = [
            GeneMoments.of(
                attribution.restored_gradient(backbone, patients, gene).numpy()
            ).suppressed(floor)
            for _, patients in _patients(ground, model)
        ]
        gradients.append(_mean(pool(moments)).tolist())
        known = unseen.measured[:, gene].nonzero().squeeze(1)
        some = unseen.take(known)
        true = some.values[:, gene].numpy()
        asked = torch.zeros(len(model.genes), dtype=torch.bool)
        asked[gene] = True
        restored = _restored(backbone, some, asked).squeeze(1).numpy()
        correlations.append(float(np.corrcoef(true, restored)[0, 1]))
    return {"gradient": gradients, "correlation": correlations}


def _deletions(
    ground: Ground, orders: Mapping[int, Mapping[str, Sequence[int]]], model: Model
) -> Found:
    """Return accuracy and error on unseen institutions, the fewer genes the worse.

    Accuracy: from all genes but those deleted. Error: of a fixed part of the genes,
    the same in all settings, restored from the others but those deleted.
    """
    study, V = model.study, len(model.genes)
    encoder, head = _classifier(model)
    backbone = _backbone(model)
    asked = _targets(study, V)
    unseen = model.patients(ground.unseen)
    known = unseen.type_index(study.classification.classes) >= 0
    unseen = unseen.take(known.nonzero().squeeze(1))
    target = unseen.type_index(study.classification.classes)
    institution = ground.institution[known.numpy()]

    def right(deleted: Sequence[int]) -> Floats:
        kept = _without(unseen, deleted)
        return (_classes(encoder, head, kept) == target).double().numpy()

    def error(deleted: Sequence[int]) -> Floats:
        given = _without(unseen, deleted)
        off = _restored(backbone, given, asked) - unseen.values[:, asked]
        return off.square().nanmean(dim=1).double().numpy()

    judged: dict[str, Any] = {}
    n_draws = QUICK_DRAWS if ground.quick else DRAWS
    inputs = (~asked).nonzero().squeeze(1).tolist()
    for name, judge, genes in (
        ("accuracy", right, list(range(V))),
        ("mse", error, inputs),
    ):
        ways = {
            ranking: [[g for g in order if g in set(genes)]]
            for ranking, order in orders[study.seed].items()
            if name == "mse" or ranking != RESTORING
        }
        rngs = [np.random.default_rng([study.seed, draw]) for draw in range(n_draws)]
        ways[RANDOM] = [rng.permutation(genes).tolist() for rng in rngs]
        judged[name] = {NOTHING: {"0": _by_institution(judge([]), institution)}}
        for way, lists in ways.items():
            judged[name][way] = {
                str(size): _by_institution(
                    np.mean([judge(each[:size]) for each in lists], axis=0), institution
                )
                for size in DELETED
                if size < len(genes)
            }
    return judged


def _patients(ground: Ground, model: Model) -> list[tuple[str, Patients]]:
    """Return each site's patients of the types that the model tells apart."""
    found = []
    for name, cohort in sorted(ground.sites.items()):
        patients = model.patients(cohort)
        known = patients.type_index(model.study.classification.classes) >= 0
        rows = known.nonzero().squeeze(1)
        if ground.quick:
            rows = rows[:QUICK_PATIENTS]
        if len(rows):
            found.append((name, patients.take(rows)))
    return found


def _classifier(model: Model) -> tuple[Encoder, ClassificationHead]:
    modules = tasks.load(
        model.study, len(model.genes), CLASSIFICATION, model.parameters
    )
    encoder, head = (
        modules[f"{CLASSIFICATION}.{part}"].eval() for part in ("encoder", "head")
    )
    assert isinstance(encoder, Encoder)
    assert isinstance(head, ClassificationHead)
    return encoder, head


def _backbone(model: Model) -> GexBert:
    modules = tasks.load(model.study, len(model.genes), PRETRAINING, model.parameters)
    backbone = modules[BACKBONE].eval()
    assert isinstance(backbone, GexBert)
    return backbone


def _targets(study: Study, n_genes: int) -> Tensor:
    """Return the genes whose restoration is judged while others go, (V,), bool."""
    rng = generator(study.seed, "interpretation", "targets")
    chosen = torch.randperm(n_genes, generator=rng)[: max(1, int(TARGETS * n_genes))]
    return torch.zeros(n_genes, dtype=torch.bool).index_fill(0, chosen, True)


@torch.no_grad()
def _squared_errors(
    backbone: GexBert, patients: Patients, rng: torch.Generator
) -> Tensor:
    """Hide half of the cells; return their squared errors, NaN elsewhere, (N, V)."""
    hidden = masking.mcar(patients.measured, 0.5, rng)
    found = [
        (restore(backbone, values, ~values.isnan() & ~gone, gone) - values).square()
        for values, gone in zip(
            patients.values.split(attribution.BATCH),
            hidden.split(attribution.BATCH),
            strict=True,
        )
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


def _without(patients: Patients, genes: Sequence[int]) -> Patients:
    """Return the patients as if some genes had not been measured."""
    values = patients.values.clone()
    values[:, list(genes)] = torch.nan
    return dataclasses.replace(patients, values=values)


def _by_institution(values: Floats, institution: NDArray[np.str_]) -> Found:
    """Return the mean over all patients, and over those of each institution."""
    names = np.unique(institution)
    return {
        "all": float(np.nanmean(values)),
        "institutions": [float(np.mean(values[institution == n])) for n in names],
    }


def _mean(moments: GeneMoments) -> Floats:
    """Return the mean, NaN where nothing is known."""
    return np.where(moments.count > 0, moments.mean, np.nan)


# ---- gene programmes ----


@dataclass(frozen=True, kw_only=True)
class Screened:
    """What survival says of the programmes, where they were found and elsewhere."""

    programmes: Programmes
    by_type: Mapping[str, CoxScore]
    """Summed over the sites, by cancer type."""
    at_sites: Follow
    unseen: Follow

    @property
    def total(self) -> CoxScore:
        """Over all sites and cancer types."""
        return reduce(add, self.by_type.values())


@dataclass(frozen=True, kw_only=True)
class Follow:
    """Scores and follow-up of patients; N of them."""

    scores: Floats
    """Shape (N, P)."""
    duration: Floats
    event: Floats
    cancer_type: NDArray[np.str_]
    stratum: NDArray[np.str_]
    """Whom a patient is compared with, shape (N,)."""

    def c_index(self, risk: Floats, cancer_type: str | None = None) -> Floats:
        """Return the C-index within strata and its standard error, shape (2,).

        Parameters
        ----------
        risk
            Shape (N,).
        cancer_type
            None: all.
        """
        rows = np.full(len(risk), True)
        if cancer_type is not None:
            rows = self.cancer_type == cancer_type
        found = c_index_with_se(
            self.duration[rows], self.event[rows], risk[rows], self.stratum[rows]
        )
        return np.array(found)


def _screen(ground: Ground, model: Model) -> Screened:
    """Screen the programmes at the sites, and score the unseen patients.

    The linear start alone makes them, so that all seeds have the same.
    """
    study, linear = model.study, _backbone(model).encoder.linear
    assert linear is not None
    programmes = Programmes.of(linear)
    by_type: dict[str, CoxScore] = {}
    follows = []
    for name, cohort in sorted(ground.sites.items()):
        patients = take_part(study, SURVIVAL, model.patients(cohort))
        if len(patients) == 0:
            continue
        follow = _follow(programmes, linear, patients, f"{name}/")
        follows.append(follow)
        for kind in np.unique(follow.cancer_type):
            rows = follow.cancer_type == kind
            if rows.sum() < study.minimum_cohort:
                continue
            own = CoxScore.of(
                follow.scores[rows], follow.duration[rows], follow.event[rows]
            )
            by_type[kind] = by_type[kind] + own if kind in by_type else own
    if not by_type:
        raise ConfigError(
            "no site has the minimum cohort of any cancer type with known follow-up; "
            "expected one or more, for programmes to be screened."
        )
    unseen = take_part(study, SURVIVAL, model.patients(ground.unseen))
    return Screened(
        programmes=programmes,
        by_type=by_type,
        at_sites=Follow(
            **{
                field.name: np.concatenate([getattr(f, field.name) for f in follows])
                for field in dataclasses.fields(Follow)
            }
        ),
        unseen=_follow(programmes, linear, unseen, ""),
    )


def _follow(
    programmes: Programmes, linear: LinearStart, patients: Patients, site: str
) -> Follow:
    return Follow(
        scores=programmes.scores(linear, patients),
        duration=patients.duration.double().numpy(),
        event=patients.event.double().numpy(),
        cancer_type=np.array(patients.cancer_type, dtype=str),
        stratum=np.array([f"{site}{t}" for t in patients.cancer_type], dtype=str),
    )


# ---- the page ----


def _genes_of_types(ground: Ground, sites: Sequence[Found]) -> Part:
    """Show the genes of each cancer type, by gradients and by attention."""
    genes, types = np.asarray(ground.genes.genes), sites[0]["types"]
    seeds = [np.asarray(site[GRADIENTS]) for site in sites]  # each (C, V)
    mean, extra = np.mean(seeds, axis=0), _extra_attention(sites)
    raw = np.mean([site[ATTENTION] for site in sites], axis=0)
    first = {
        t: [set(np.argsort(-_low(seed[k]))[:TOP]) for seed in seeds]
        for k, t in enumerate(types)
    }
    shared = [
        len(a & b)
        for tops in first.values()
        for i, a in enumerate(tops)
        for b in tops[:i]
    ]
    alike = [_rank_correlation(a, b) for i, a in enumerate(raw) for b in raw[:i]]
    table: dict[str, dict[str, str]] = {}
    numbers: dict[str, Any] = {}
    for k, name in enumerate(types):
        by = {GRADIENTS: mean[k], ATTENTION: extra[k]}
        tops = {way: np.argsort(-_low(of))[:TOP] for way, of in by.items()}
        table[f"{name} ({sites[0]['patients'][k]})"] = {
            way: ", ".join(genes[top]) for way, top in tops.items()
        }
        numbers[name] = {
            way: {str(genes[g]): float(by[way][g]) for g in top}
            for way, top in tops.items()
        }
    gaps = [site["gap"] for site in sites]
    lines = [
        f"The {TOP} genes that add most to the margin of their cancer type (integrated "
        "gradients of the class logit, less the mean of all logits, from the mean "
        "patient to each), and those that the latents attend to more than in the mean "
        "of the types. Means over the patients of each type, from the sums that sites "
        f"with {ground.study.minimum_cohort} such patients or more send; in brackets "
        "how many patients.",
        "",
        *markdown("cancer type", table),
        "",
        f"Attributions miss {spread([100 * gap for gap in gaps], 1)} % of the change "
        "of the margin, for want of steps. "
        + (
            f"Two seeds share {np.mean(shared):.1f} of the {TOP} genes of a type by "
            "integrated gradients. "
            if shared
            else ""
        )
        + "Between two types the attention to all genes has a mean rank correlation "
        f"of {np.mean(alike) if alike else math.nan:.2f}.",
    ]
    chosen = list(
        dict.fromkeys(
            g for k in range(len(types)) for g in np.argsort(-_low(mean[k]))[:4]
        )
    )
    figure = Figure(figsize=(0.24 * len(chosen) + 2, 0.3 * len(types) + 1.8))
    _heat(figure, mean[:, chosen], types, genes[chosen], "added to the margin")
    numbers |= {"unexplained": gaps, "shared_by_seeds": shared, "alike": alike}
    every = {
        "mean_attribution": mean,
        "mean_attention": raw,
        "types": types,
    }
    return Part(
        section=Section(
            title="Genes of each cancer type", lines=lines, figure="attribution"
        ),
        figure=figure,
        numbers=numbers | every,
    )


def _context_of(ground: Ground, best: Sequence[int], contexts: Sequence[Found]) -> Part:
    """Show which genes drive each restored gene."""
    genes = np.asarray(ground.genes.genes)
    gradient = np.mean([each["gradient"] for each in contexts], axis=0)  # (genes, V)
    r = np.array([each["correlation"] for each in contexts])  # (seeds, genes)
    table, numbers, chosen = {}, {}, list[int]()
    for i, gene in enumerate(best):
        drivers = np.argsort(-np.abs(np.nan_to_num(gradient[i])))[:DRIVERS]
        chosen += [g for g in drivers[:3] if g not in chosen]
        said = ", ".join(f"{genes[g]} {gradient[i, g]:+.2f}" for g in drivers)
        table[str(genes[gene])] = {"r": spread(list(r[:, i])), "driven by": said}
        numbers[str(genes[gene])] = {
            "r": r[:, i],
            "drivers": {str(genes[g]): gradient[i, g] for g in drivers},
        }
    figure = Figure(figsize=(0.24 * len(chosen) + 2, 0.26 * len(best) + 1.8))
    _heat(
        figure, gradient[:, chosen], list(genes[list(best)]), genes[chosen], "gradient"
    )
    lines = [
        f"The {len(best)} genes that are restored best at the sites (half of all cells "
        "hidden). Each is deleted and restored from all others: r on unseen "
        "institutions; and the genes that move it most, in SD per SD: the mean "
        "gradient over the sites' patients.",
        "",
        *markdown("restored", table),
    ]
    return Part(
        section=Section(
            title="Context of restored genes", lines=lines, figure="context"
        ),
        figure=figure,
        numbers=numbers,
    )


def _prognostic(ground: Ground, screened: Screened) -> Part:
    """Show the programmes that go with survival, and judge them held out."""
    genes, total, unseen = ground.genes.genes, screened.total, screened.unseen
    z = total.z
    q = false_discovery_control(2 * norm.sf(np.abs(z)))
    order = np.argsort(-np.abs(z), kind="stable")[:SHOWN]
    types = [
        t
        for t in ground.study.survival.cancer_types
        if unseen.event[unseen.cancer_type == t].sum() >= MIN_EVENTS
    ]
    prognostic = [int(p) for p in np.flatnonzero(q < FALSE_SHARE)]
    judged = {
        p: _judge_risk(screened, np.sign(z[p]) * np.eye(len(z))[p], types)
        for p in sorted({*order.tolist(), *prognostic})
    }
    steps = np.divide(
        total.score, total.information, out=np.zeros(len(z)), where=q < FALSE_SHARE
    )
    together = _judge_risk(screened, steps, types) if prognostic else None
    table: dict[str, dict[str, str]] = {}
    for p in order:
        strongest = np.argsort(-np.abs(screened.programmes.loadings[:, p]))[:6]
        weights = screened.programmes.loadings[strongest, p]
        named = [
            f"{genes[g]}{'' if w > 0 else ' (-)'}"
            for g, w in zip(strongest, weights, strict=True)
        ]
        table[str(p + 1)] = {
            "genes": ", ".join(named),
            "z": f"{z[p]:+.2f}",
            "q": f"{q[p]:.2g}",
        } | _c_columns(judged[int(p)])
    if together is not None:
        said = {"genes": f"the {len(prognostic)} with q < {FALSE_SHARE:g} together"}
        table["all"] = said | _c_columns(together)
    confirmed = sum(judged[p]["unseen"][0] > 0.5 for p in prognostic)
    lines = [
        f"{len(z)} programmes: the leading directions of the loadings that all sites "
        "share, turned to few genes each (varimax). Scores of patients stay at their "
        "site; it sends a Cox score and its information for each programme and cancer "
        f"type of {ground.study.minimum_cohort} patients or more. z of all sites "
        "together, above 0 where more of the programme goes with earlier death; q by "
        "Benjamini and Hochberg. C-index of the programme alone in that direction, "
        "within cancer types: at the sites (in sample; within sites too), and on "
        "unseen institutions, with its standard error; cancers with "
        f"{MIN_EVENTS} deaths or more there. No seed enters.",
        "",
        *markdown("programme", table),
        "",
        f"{len(prognostic)} of {len(z)} programmes have q < {FALSE_SHARE:g}, of "
        f"which {confirmed} point the same way on unseen institutions. Cancers not "
        "estimable there: "
        + (
            ", ".join(sorted(set(ground.study.survival.cancer_types) - set(types)))
            or "none"
        )
        + ".",
    ]
    return Part(
        section=Section(
            title="Prognostic gene programmes", lines=lines, figure="programmes"
        ),
        figure=_draw_programmes(screened, order, judged),
        numbers={
            "z": z,
            "q": q,
            "z_by_type": {t: one.z for t, one in screened.by_type.items()},
            "c_index": {str(p + 1): one for p, one in judged.items()},
            "together": together,
            "genes": {
                str(p + 1): {
                    genes[g]: screened.programmes.loadings[g, p]
                    for g in np.argsort(-np.abs(screened.programmes.loadings[:, p]))[
                        :20
                    ]
                }
                for p in order
            },
        },
    )


def _judge_risk(screened: Screened, weights: Floats, types: Sequence[str]) -> Found:
    """Return the C-index of weighted scores at the sites, unseen, and by cancer."""
    seen, unseen = (
        follow.scores @ weights for follow in (screened.at_sites, screened.unseen)
    )
    return {
        "sites": screened.at_sites.c_index(seen),
        "unseen": screened.unseen.c_index(unseen),
        "cancers": {t: screened.unseen.c_index(unseen, t) for t in types},
    }


def _c_columns(judged: Found) -> dict[str, str]:
    value, error = judged["unseen"]
    above = [c[0] > 0.5 for c in judged["cancers"].values()]
    return {
        "C, sites": f"{judged['sites'][0]:.3f}",
        "C, unseen": f"{value:.3f} ({error:.3f})",
        "cancers above .5": f"{sum(above)} of {len(above)}",
    }


def _what_deletion_costs(deleted: Sequence[Found]) -> Part:
    """Show accuracy and error against the number of genes deleted."""
    lines = [
        "Genes deleted from the inputs of unseen patients, in the order of what the "
        "sites' sums say, and at random (mean of several draws). Accuracy of the "
        "cancer type; error (MSE, gene variances) of a fixed quarter of the genes, "
        "restored from the others. Orders: mean size of the integrated gradients over "
        "the types; attention; squared gradient of the restored genes; and, without "
        "any model, the variance of the types' means. Mean and SD over seeds; p: "
        "Wilcoxon over institutions against random, first the means over seeds.",
    ]
    numbers: dict[str, Any] = {}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    names = {"accuracy": "accuracy", "mse": "MSE (gene variances)"}
    for axes, (measure, label) in zip(
        figure.subplots(1, 2), names.items(), strict=True
    ):
        judged = [each[measure] for each in deleted]
        ways = [way for way in (*RANKINGS, RANDOM) if way in judged[0]]
        sizes = sorted(judged[0][RANDOM], key=int)
        nothing = [seed[NOTHING]["0"]["all"] for seed in judged]
        table: dict[str, dict[str, str]] = {}
        numbers[measure] = {NOTHING: nothing}
        for way in ways:
            values = {k: [seed[way][k]["all"] for seed in judged] for k in sizes}
            p = {k: _p_of_institutions(judged, way, k) for k in sizes}
            numbers[measure][way] = {k: {"seeds": values[k], "p": p[k]} for k in sizes}
            table[way] = {"0": spread(nothing)} | {
                k: spread(values[k])
                + ("" if way == RANDOM or math.isnan(p[k]) else f" (p {p[k]:.2g})")
                for k in sizes
            }
            axes.errorbar(
                [0, *map(int, sizes)],
                [np.mean(nothing), *(np.mean(values[k]) for k in sizes)],
                [_sd(nothing), *(_sd(values[k]) for k in sizes)],
                marker="o",
                markersize=3,
                capsize=2,
                label=way,
                color="black" if way == RANDOM else f"C{RANKINGS.index(way)}",
                linestyle="--" if way == RANDOM else "-",
            )
        lines += ["", *markdown(f"{label}, genes deleted", table)]
        axes.set(xlabel="genes deleted", ylabel=label)
        axes.legend(fontsize="small", frameon=False)
    return Part(
        section=Section(
            title="Deleting what the model looks at", lines=lines, figure="deletion"
        ),
        figure=figure,
        numbers=numbers,
    )


def _known_markers(
    ground: Ground, sites: Sequence[Found], console: Console
) -> list[Part]:
    """Show where known markers come among all genes, here and in another layer."""
    other = markers.other_layer(ground)
    why_not = f" Another layer: {other}." if isinstance(other, str) else ""
    here = markers.compare(
        _attributions(ground, sites),
        "Known markers",
        "markers",
        "Markers that pathology knows a cancer by, and where they come among all genes "
        "in their cancer (percentile, 100 is the top; chance 50), by the mean "
        "attribution over seeds' models and by the attention above the mean of the "
        f"types; beside them their mean expression in that cancer.{why_not}",
    )
    if isinstance(other, str):
        return [here]
    wanted = arms(other, other.seeds[0], (POOLED,))
    trained = [model for _, model in models(other, wanted, console)]
    found = _each(other, trained, console, "sites", partial(_typed, other))
    [cohort] = other.sites.values()
    there = markers.compare(
        _attributions(other, found),
        "Known markers in another layer",
        "markers-paired",
        f"The same in the tumours of `{exams.PAIRED}`, which measures "
        f"{len(other.genes):,} genes: {cohort.n_patients} patients of "
        f"{len(found[0]['types'])} cancer types, most of whom train above too, and "
        f"none of an unseen institution. A model of its own with "
        f"{other.study.linear_rank} factors, pooled, since few hospitals have "
        f"{other.study.minimum_cohort} of these patients of any cancer type; first "
        "seed, in sample.",
    )
    return [here, there]


def _attributions(ground: Ground, sites: Sequence[Found]) -> markers.Attributions:
    return markers.Attributions(
        genes=ground.genes.genes,
        types=sites[0]["types"],
        gradients=[np.asarray(site[GRADIENTS]) for site in sites],
        attention=_extra_attention(sites),
        expression=np.asarray(sites[0][VALUES]),
    )


def _extra_attention(sites: Sequence[Found]) -> Floats:
    """Return the attention of each type above the mean of the types, (C, V)."""
    raw = np.mean([site[ATTENTION] for site in sites], axis=0)
    extra: Floats = raw - np.mean(raw, axis=0)
    return extra


def _best_restored(sites: Sequence[Found]) -> list[int]:
    """Return the genes of least error, the best first."""
    error = np.mean([site["error"] for site in sites], axis=0)
    known = int((~np.isnan(error)).sum())
    return [int(g) for g in np.argsort(error)[: min(CONTEXTS, known)]]  # NaN last


def _orders(site: Found) -> dict[str, list[int]]:
    """Return the genes by each ranking, the first in it first."""
    importance = {
        GRADIENTS: np.abs(site[GRADIENTS]).mean(axis=0),
        ATTENTION: np.mean(site[ATTENTION], axis=0),
        RESTORING: np.asarray(site[RESTORING]),
        CONTRAST: np.var(site[VALUES], axis=0),
    }
    return {way: np.argsort(-_low(of)).tolist() for way, of in importance.items()}


def _low(values: Floats) -> Floats:
    """Return the values with those unknown below all others."""
    return np.where(np.isnan(values), -np.inf, values)


def _rank_correlation(one: Floats, other: Floats) -> float:
    return float(spearmanr(one, other, nan_policy="omit").statistic)


def _p_of_institutions(judged: Sequence[Found], way: str, size: str) -> float:
    """Return the p of a way against random genes, over means of the seeds."""
    if way == RANDOM:
        return math.nan
    one, other = (
        np.mean([seed[of][size]["institutions"] for seed in judged], axis=0)
        for of in (way, RANDOM)
    )
    return paired_p(one, other)


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _heat(
    figure: Figure,
    values: Floats,
    rows: Sequence[str],
    columns: Sequence[str] | NDArray[np.str_],
    label: str,
) -> None:
    """Draw numbers as colours, blue below 0 and red above."""
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    most = float(np.nanmax(np.abs(values), initial=1e-12))
    image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(columns)), list(columns), rotation=90, fontsize="small")
    axes.set_yticks(range(len(rows)), list(rows), fontsize="small")
    figure.colorbar(image, ax=axes, label=label)


def _draw_programmes(
    screened: Screened, order: NDArray[np.intp], judged: Mapping[int, Found]
) -> Figure:
    """Draw z by cancer type, and the C-index at the sites and on unseen patients."""
    figure = Figure(figsize=(9, 0.3 * len(order) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    types = sorted(screened.by_type)
    z = np.array([screened.by_type[t].z[order] for t in types]).T
    most = max(float(np.abs(z).max()), 1e-12)
    image = left.imshow(z, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    named = [f"programme {p + 1}" for p in order]
    left.set_xticks(range(len(types)), types, rotation=90, fontsize="small")
    left.set_yticks(range(len(order)), named, fontsize="small")
    figure.colorbar(image, ax=left, label="z at the sites")
    rows = np.arange(len(order))
    unseen = np.array([judged[int(p)]["unseen"] for p in order])
    right.plot([judged[int(p)]["sites"][0] for p in order], rows, "x", label="sites")
    right.errorbar(
        unseen[:, 0],
        rows,
        xerr=np.nan_to_num(unseen[:, 1]),
        fmt="o",
        capsize=2,
        label="unseen institutions",
    )
    right.axvline(0.5, color="grey", linestyle=":")
    right.set_yticks(rows, named, fontsize="small")
    right.set_ylim(len(order) - 0.5, -0.5)
    right.set_xlabel("C-index within cancer types")
    figure.legend(loc="outside upper right", ncols=2, fontsize="small")
    return figure
