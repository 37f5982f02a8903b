"""Attributions, gene programmes and known markers of the federated model.

    sites' patients -> attributions -> sums by cancer type -> genes of each type
                    -> gradients of restored genes         -> their context
                    -> scores of gene programmes -> Cox screen -> prognostic programmes
    unseen patients -> the same genes deleted; the same programmes' C-index

Seed by seed; N patients, V genes, P programmes, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import false_discovery_control, norm, spearmanr

from fedgex.common.errors import ConfigError
from fedgex.common.models.losses import eligible
from fedgex.common.study import CLASSIFICATION, SURVIVAL, Study
from fedgex.simulations import resumable
from fedgex.simulations.analysis import gene_programmes, marker_genes
from fedgex.simulations.analysis.gene_programmes import Screened
from fedgex.simulations.evaluation import attributions, figures, test_sets
from fedgex.simulations.evaluation.arms import FEDERATED, POOLED, Model, arms, models
from fedgex.simulations.evaluation.attributions import (
    ATTENTION,
    GRADIENTS,
    NOTHING,
    RANDOM,
    RANKINGS,
    VALUES,
    Floats,
    Found,
    descending,
)
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import MIN_EVENTS, Split
from fedgex.simulations.evaluation.table import (
    markdown,
    mean_over,
    mean_sd,
    nested,
    paired_p,
    tidy,
    where,
)
from fedgex.simulations.reporting.schema import plain

TOP = 10
"""Genes in the table of a cancer type."""
CONTEXTS, DRIVERS = 12, 5
"""Restored genes whose context is shown, and genes that drive each."""
SHOWN = 8
"""Programmes in the table, by the screen's |z|."""
FALSE_SHARE = 0.05
"""False discovery rate among the programmes called prognostic."""
DELETION = {"accuracy": "accuracy", "mse": "MSE (gene variances)"}
"""Metrics of the deletion of genes, with their labels."""

Part = tuple[dict[str, Any], dict[str, Any], Figure]
"""Fields of the page, numbers and figure."""


def run(split: Split, console: Console) -> Results:
    """Interpret the federated model of each seed.

    Raises
    ------
    ConfigError
        If the study lacks a phase or part that is interpreted.
    """
    _refuse_unfit(split.study)
    wanted = [a for s in split.seeds for a in arms(split, s, (FEDERATED,))]
    trained = [model for _, model in models(split, wanted, console)]
    each = partial(_each, split, trained, console)
    sites = each("sites", partial(attributions.at_sites, split))
    best = _best_restored(sites)
    of_best = resumable.digest(repr(best))[:8]
    contexts = each(f"contexts-{of_best}", partial(attributions.contexts, split, best))
    seeds = [model.study.seed for model in trained]
    rankings = dict(zip(seeds, map(attributions.orders, sites), strict=True))
    deleted = each("deletion", partial(attributions.deletions, split, rankings))
    parts = {
        "attribution": _genes_of_types(split, sites),
        "context": _context_of(split, best, contexts),
        "programmes": _prognostic(split, _screen(split, trained[0])),
        "deletion": _deletion(_tidy(seeds, deleted)),
        "markers": _markers(split.genes.genes, sites),
    }
    fields: dict[str, Any] = {
        "minimum_cohort": split.study.minimum_cohort,
        "permutations": marker_genes.PERMUTATIONS,
        "why_not": "",
        "markers_paired_table": None,
    }
    other = test_sets.other_layer(split)
    if isinstance(other, str):
        fields["why_not"] = f" Another layer: {other}."
    else:
        parts["markers-paired"] = _markers_of(other, console)
        [cohort] = other.sites.values()
        fields |= {
            "layer": test_sets.PAIRED,
            "layer_genes": len(other.genes),
            "layer_patients": cohort.n_patients,
            "layer_types": len(other.study.classification.classes),
            "layer_rank": other.study.linear_rank,
        }
    numbers: dict[str, Any] = {
        "seeds": seeds,
        "genes": split.genes.genes,
        "unseen_patients": split.unseen.n_patients,
        "unseen_institutions": len(set(split.institution)),
    }
    drawn = {}
    for name, (of_part, found, drawn[name]) in parts.items():
        fields |= {f"{name}_{key}".replace("-", "_"): v for key, v in of_part.items()}
        numbers[name] = found
    return Results(
        name="interpretation", numbers=plain(numbers), fields=fields, figures=drawn
    )


def _refuse_unfit(study: Study) -> None:
    lacking = [p for p in (CLASSIFICATION, SURVIVAL) if p not in study.phases]
    if not study.linear_rank:
        lacking.append("linear_rank")
    if lacking:
        raise ConfigError(
            f'the study "{study.name}" has no {", ".join(lacking)}; expected all that '
            "interpretation looks into. Choose a scenario such as release."
        )


def _each(
    split: Split,
    trained: Sequence[Model],
    console: Console,
    name: str,
    compute: Callable[[Model], Found],
) -> list[Found]:
    """Return the results of one computation on each model."""
    ending = "-quick.json" if split.quick else ".json"
    folder = split.folder / "interpretation"
    jobs = {folder / f"{m.study.hash[:12]}-{name}{ending}": m for m in trained}
    resumable.compute_all(
        compute,
        jobs,
        split.workers,
        console,
        lambda model: f"{name}, seed {model.study.seed}",
    )
    return [resumable.load(path) for path in jobs]


def _screen(split: Split, model: Model) -> Screened:
    linear = attributions.backbone_of(model).encoder.linear
    assert linear is not None
    study = split.study
    followed = {
        name: eligible(study, SURVIVAL, model.patients(cohort))
        for name, cohort in sorted(split.sites.items())
    }
    unseen = eligible(study, SURVIVAL, model.patients(split.unseen))
    found = gene_programmes.screen(linear, followed, unseen, study.minimum_cohort)
    if found is None:
        raise ConfigError(
            "no site has the minimum cohort of any cancer type with known follow-up; "
            "expected one or more, for programmes to be screened."
        )
    return found


# ---- genes of types, context of genes ----


def _genes_of_types(split: Split, sites: Sequence[Found]) -> Part:
    """Show the genes of each cancer type, by gradients and by attention."""
    genes, types = np.asarray(split.genes.genes), sites[0]["types"]
    seeds = [np.asarray(site[GRADIENTS]) for site in sites]  # each (C, V)
    mean, extra = np.mean(seeds, axis=0), _extra_attention(sites)
    raw = np.mean([site[ATTENTION] for site in sites], axis=0)
    shared, chosen = [], dict[int, None]()
    table: dict[str, dict[str, str]] = {}
    numbers: dict[str, Any] = {}
    for k, name in enumerate(types):
        tops = [set(descending(seed[k])[:TOP]) for seed in seeds]
        shared += [len(a & b) for a, b in combinations(tops, 2)]
        chosen |= dict.fromkeys(descending(mean[k])[:4].tolist())
        by = {GRADIENTS: mean[k], ATTENTION: extra[k]}
        order = {way: descending(of)[:TOP] for way, of in by.items()}
        row = {way: ", ".join(genes[top]) for way, top in order.items()}
        table[f"{name} ({sites[0]['patients'][k]})"] = row
        numbers[name] = {
            way: {genes[g]: by[way][g] for g in top} for way, top in order.items()
        }
    alike = [
        float(spearmanr(a, b, nan_policy="omit").statistic)
        for b, a in combinations(raw, 2)
    ]
    gaps = [site["gap"] for site in sites]
    fields = {
        "top": TOP,
        "table": markdown("cancer type", table),
        "gap": mean_sd([100 * gap for gap in gaps], 1),
        "shared": "",
        "alike": np.mean(alike) if alike else math.nan,
    }
    if shared:
        fields["shared"] = (
            f"Two seeds share {np.mean(shared):.1f} of the {TOP} genes of a type by "
            "integrated gradients. "
        )
    numbers |= {
        "unexplained": gaps,
        "shared_by_seeds": shared,
        "alike": alike,
        "mean_attribution": mean,
        "mean_attention": raw,
        "types": types,
    }
    shown, label = [*chosen], "added to the margin"
    figure = figures.heat_map(mean[:, shown], types, genes[shown], label, 0.3)
    return fields, numbers, figure


def _context_of(split: Split, best: Sequence[int], contexts: Sequence[Found]) -> Part:
    """Show which genes drive each restored gene."""
    genes = np.asarray(split.genes.genes)
    gradient = np.mean([each["gradient"] for each in contexts], axis=0)  # (genes, V)
    r = np.array([each["correlation"] for each in contexts])  # (seeds, genes)
    table, numbers, chosen = {}, {}, list[int]()
    for i, gene in enumerate(best):
        drivers = np.argsort(-np.abs(np.nan_to_num(gradient[i])))[:DRIVERS]
        chosen += [g for g in drivers[:3] if g not in chosen]
        moved = {genes[g]: gradient[i, g] for g in drivers}
        driven = ", ".join(f"{name} {by:+.2f}" for name, by in moved.items())
        table[genes[gene]] = {"r": mean_sd(list(r[:, i])), "driven by": driven}
        numbers[genes[gene]] = {"r": r[:, i], "drivers": moved}
    figure = figures.heat_map(
        gradient[:, chosen], genes[list(best)], genes[chosen], "gradient", 0.26
    )
    return {"n": len(best), "table": markdown("restored", table)}, numbers, figure


def _best_restored(sites: Sequence[Found]) -> list[int]:
    """Return the genes of least error, the best first."""
    error = np.mean([site["error"] for site in sites], axis=0)
    known = int((~np.isnan(error)).sum())
    return [int(g) for g in np.argsort(error)[: min(CONTEXTS, known)]]  # NaN last


def _extra_attention(sites: Sequence[Found]) -> Floats:
    """Return the attention of each type above the mean of the types, (C, V)."""
    raw = np.mean([site[ATTENTION] for site in sites], axis=0)
    extra: Floats = raw - np.mean(raw, axis=0)
    return extra


# ---- prognostic programmes ----


def _prognostic(split: Split, screened: Screened) -> Part:
    """Show the prognostic programmes, evaluated on unseen patients."""
    genes, total, unseen = split.genes.genes, screened.total, screened.unseen
    loadings, z = screened.programmes.loadings, total.z
    q = false_discovery_control(2 * norm.sf(np.abs(z)))
    order = np.argsort(-np.abs(z), kind="stable")[:SHOWN]
    cancers = split.study.survival.cancer_types
    deaths = {t: unseen.event[unseen.cancer_type == t].sum() for t in cancers}
    types = [t for t in cancers if deaths[t] >= MIN_EVENTS]
    prognostic = [int(p) for p in np.flatnonzero(q < FALSE_SHARE)]
    scored = {
        p: _c_indices(screened, np.sign(z[p]) * np.eye(len(z))[p], types)
        for p in sorted({*order.tolist(), *prognostic})
    }
    steps = np.divide(
        total.score, total.information, out=np.zeros(len(z)), where=q < FALSE_SHARE
    )
    together = _c_indices(screened, steps, types) if prognostic else None
    strongest = {int(p): np.argsort(-np.abs(loadings[:, p])) for p in order}
    table: dict[str, dict[str, str]] = {}
    for p, of_genes in strongest.items():
        signs = {g: "" if loadings[g, p] > 0 else " (-)" for g in of_genes[:6]}
        named = ", ".join(f"{genes[g]}{sign}" for g, sign in signs.items())
        row = {"genes": named, "z": f"{z[p]:+.2f}", "q": f"{q[p]:.2g}"}
        table[str(p + 1)] = row | _c_columns(scored[p])
    if together is not None:
        label = f"the {len(prognostic)} with q < {FALSE_SHARE:g} together"
        table["all"] = {"genes": label} | _c_columns(together)
    absent = sorted(set(cancers) - set(types))
    fields = {
        "n": len(z),
        "min_events": MIN_EVENTS,
        "false_share": FALSE_SHARE,
        "table": markdown("programme", table),
        "prognostic": len(prognostic),
        "confirmed": sum(scored[p]["unseen"][0] > 0.5 for p in prognostic),
        "absent": ", ".join(absent) or "none",
    }
    numbers = {
        "z": z,
        "q": q,
        "z_by_type": {t: one.z for t, one in screened.by_type.items()},
        "c_index": {p + 1: one for p, one in scored.items()},
        "together": together,
        "genes": {
            p + 1: {genes[g]: loadings[g, p] for g in of_genes[:20]}
            for p, of_genes in strongest.items()
        },
    }
    figure = figures.programmes(
        {t: screened.by_type[t].z[order] for t in sorted(screened.by_type)},
        {f"programme {p + 1}": scored[int(p)] for p in order},
    )
    return fields, numbers, figure


def _c_indices(screened: Screened, weights: Floats, types: Sequence[str]) -> Found:
    """Return the C-index of weighted scores at the sites, unseen, and by cancer."""
    risk = screened.unseen.scores @ weights
    return {
        "sites": screened.at_sites.c_index(screened.at_sites.scores @ weights),
        "unseen": screened.unseen.c_index(risk),
        "cancers": {t: screened.unseen.c_index(risk, t) for t in types},
    }


def _c_columns(scored: Found) -> dict[str, str]:
    value, error = scored["unseen"]
    above = [c[0] > 0.5 for c in scored["cancers"].values()]
    return {
        "C, sites": f"{scored['sites'][0]:.3f}",
        "C, unseen": f"{value:.3f} ({error:.3f})",
        "cancers above .5": f"{sum(above)} of {len(above)}",
    }


# ---- deletion of genes ----


def _tidy(seeds: Sequence[int], deleted: Sequence[Found]) -> pd.DataFrame:
    """Return tidy results: metric, way, size, seed, and institution or "all"."""
    return tidy(
        {
            "metric": metric,
            "way": way,
            "size": size,
            "seed": seed,
            "group": group,
            "value": value,
        }
        for seed, of_seed in zip(seeds, deleted, strict=True)
        for metric in DELETION
        for way in (NOTHING, *RANKINGS, RANDOM)
        for size, found in sorted(of_seed[metric].get(way, {}).items(), key=_size)
        for group, value in enumerate([found["all"], *found["institutions"]])
    )


def _size(found: tuple[str, Found]) -> int:
    return int(found[0])


def _deletion(results: pd.DataFrame) -> Part:
    """Show accuracy and error against the number of genes deleted."""
    fields, numbers, drawn = dict[str, Any](), dict[str, Any](), {}
    for metric, label in DELETION.items():
        here = where(results, metric=metric)
        by_seed = nested(where(here, group=0), "way", "size")
        by_group = mean_over(here[here["group"] > 0], "seed", "way", "size")
        nothing = by_seed.pop(NOTHING)["0"]
        numbers[metric] = {NOTHING: nothing}
        table: dict[str, dict[str, str]] = {}
        for way, of_way in by_seed.items():
            row = table[way] = {"0": mean_sd(nothing)}
            found = numbers[metric][way] = {}
            for size, of_seeds in of_way.items():
                p = math.nan
                if way != RANDOM:
                    p = paired_p(by_group[way][size], by_group[RANDOM][size])
                found[size] = {"seeds": of_seeds, "p": p}
                row[size] = mean_sd(of_seeds)
                row[size] += "" if math.isnan(p) else f" (p {p:.2g})"
        fields[metric] = markdown(f"{label}, genes deleted", table)
        drawn[label] = {way: {"0": nothing} | of for way, of in by_seed.items()}
    return fields, numbers, figures.deletions(drawn, [*RANKINGS], dashed=RANDOM)


# ---- known markers ----


def _markers(names: Sequence[str], sites: Sequence[Found]) -> Part:
    """Show the ranks of known markers among all genes in their cancer."""
    genes, types = list(names), list(sites[0]["types"])
    gradients = [np.asarray(site[GRADIENTS]) for site in sites]
    expression = np.asarray(sites[0][VALUES])
    known, absent = marker_genes.listed(genes, types)
    seeds = [marker_genes.percentiles(each) for each in gradients]
    mean = marker_genes.percentiles(np.mean(gradients, axis=0))
    extra = marker_genes.percentiles(_extra_attention(sites))
    places = [(types.index(c), genes.index(g)) for c, g, _ in known]
    table: dict[str, dict[str, str]] = {}
    numbers: dict[str, Any] = {}
    for (cancer, gene, source), at in zip(known, places, strict=True):
        level, by_seed, of_all = expression[at], [seed[at] for seed in seeds], extra[at]
        marker = {GRADIENTS: by_seed, ATTENTION: of_all}
        numbers[f"{gene}, {cancer}"] = {"expression": level} | marker
        table[f"{gene}, {cancer}"] = {
            "expression (SD)": f"{level:+.2f}",
            GRADIENTS: mean_sd(by_seed, 0),
            ATTENTION: f"{of_all:.0f}",
            "source": source,
        }
    reached, p_values = [], {}
    for way, ranked in ((GRADIENTS, mean), (ATTENTION, extra)) if known else ():
        percentile, p = marker_genes.permuted(ranked, places)
        reached.append(f"by {way} {percentile:.0f} (p {p:.2g})")
        p_values[way] = {"mean_percentile": percentile, "p": p}
    fields = {
        "table": markdown("marker", table),
        "reached": ", ".join(reached) or "-",
        "absent": ", ".join(absent) or "none",
    }
    ways = (GRADIENTS, mean), (ATTENTION, extra)
    ranks = {way: [of[at] for at in places] for way, of in ways}
    figure = figures.markers([f"{g}, {c}" for c, g, _ in known], ranks)
    found = {"markers": numbers, "test": p_values, "not_measured": absent}
    return fields, found, figure


def _markers_of(other: Split, console: Console) -> Part:
    """Train a model on the other layer and show the ranks of known markers."""
    wanted = arms(other, other.seeds[0], (POOLED,))
    trained = [model for _, model in models(other, wanted, console)]
    by_type = partial(attributions.by_type, other)
    return _markers(other.genes.genes, _each(other, trained, console, "sites", by_type))
