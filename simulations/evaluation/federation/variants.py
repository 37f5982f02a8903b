"""Federations that train otherwise, or whose sites differ.

Other strategies and paces, small sites, different panels, a foreign scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedgex.common.data import moments
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.scales import CONVERTIBLE
from fedgex.common.models import tasks
from fedgex.common.seeds import derive
from fedgex.common.study import PRETRAINING, LocalTraining, StrategyRule, Study
from fedgex.simulations import resumable
from fedgex.simulations.analysis import foreign_scale
from fedgex.simulations.data.split import panel
from fedgex.simulations.evaluation.arms import FEDERATED, initial_state
from fedgex.simulations.evaluation.federation.scores import (
    MEASURES,
    Bench,
    Part,
    Values,
    all_within,
    percent,
    table,
)
from fedgex.simulations.evaluation.protocol import Split
from fedgex.simulations.evaluation.table import markdown

TEN = 10
"""Patients left at a site that is made small."""
PANEL_SHARE = 0.6
"""Share of its genes that a site measures, where panels differ."""
PULL = 0.01
"""Weight of FedProx's proximal term."""
EQUAL = {"weights": "equal"}
PANELS_WITHIN = 1.05
"""Goal: error with different panels over that with full ones."""
AT_SERVER = ("gene means", "change of the model")
"""Quantities that the server compares, before the first round and in each."""

# ---- other ways to train together ----


def strategies(bench: Bench) -> Part:
    """Compare ways to make one model of the same updates, and to pace them."""
    study = bench.study
    found = bench.variants(ways_to_train(study, quick=bench.split.quick))
    pace = ", ".join(
        f"{phase.local_epochs} x {phase.rounds} ({name})"
        for name, phase in study.phases.items()
    )
    fields = {
        "ways": table(bench, found),
        "own_way": f"{study.strategy.name} with {pace}",
        "pull": PULL,
    }
    return fields, {"ways": found}


def ways_to_train(study: Study, *, quick: bool) -> dict[str, tuple[str, Study]]:
    """Return the studies that differ in how they train, by the arm's name."""
    ways = {"fedprox": ("FedProx", _by(study, name="fedprox", proximal_mu=PULL))}
    if quick:
        return ways
    return ways | {
        "fedadam": ("FedAdam", _by(study, name="fedadam")),
        "trimmed-mean": ("trimmed mean", _by(study, **EQUAL, name="trimmed-mean")),
        "few-local-steps": ("few local steps", _paced(study, _fewer)),
        "many-local-steps": ("many local steps", _paced(study, _more)),
    }


def _by(study: Study, **changes: Any) -> Study:
    """Return the study with another strategy, and no pull that this does not name."""
    values = study.strategy.model_dump() | {"proximal_mu": 0.0} | changes
    if values["weights"] != "fixed":
        values["site_weights"] = {}
    return study.model_copy(update={"strategy": StrategyRule.model_validate(values)})


def _paced(study: Study, change: Callable[[LocalTraining], tuple[int, int]]) -> Study:
    """Return the study with other epochs and rounds in every phase."""
    phases = {}
    for name, phase in study.phases.items():
        epochs, rounds = change(phase)
        update = {"local_epochs": epochs, "rounds": rounds}
        phases[name] = phase.model_copy(update=update)
    return study.model_copy(update=phases)


def _fewer(phase: LocalTraining) -> tuple[int, int]:
    epochs = max(1, phase.local_epochs // 2)
    return epochs, phase.rounds * phase.local_epochs // epochs


def _more(phase: LocalTraining) -> tuple[int, int]:
    return 2 * phase.local_epochs, max(1, phase.rounds // 2)


# ---- small sites ----


def small_sites(bench: Bench) -> Part:
    """Cut the smaller half of the sites to ten patients, or leave it out."""
    sites, seed = bench.split.sites, bench.study.seed
    ranked = sorted(sites, key=lambda s: (sites[s].n_patients, s))
    small = ranked[: len(ranked) // 2]
    large = {s: cohort for s, cohort in sites.items() if s not in small}
    cut = {s: _cut(sites[s], TEN, derive(seed, "ten", s)) for s in small}
    found: dict[str, Values] = {}
    for name, label, some in (
        ("small-and-large", "large sites and those of ten", large | cut),
        ("large-only", "large sites only", large),
    ):
        found |= bench.variants({name: (label, bench.study)}, some)
    fields = {
        "small_sites": table(bench, found),
        "n_small": len(small),
        "n_large": len(large),
        "ten": TEN,
    }
    return fields, {"small_sites": found, "sites_cut": len(small)}


def _cut(cohort: Cohort, n: int, seed: int) -> Cohort:
    """Return n random samples."""
    order = np.random.default_rng(seed).permutation(len(cohort.patients))
    return cohort.take(np.sort(order[:n]))


# ---- different panels ----


def panels(bench: Bench) -> Part:
    """Give each site a random share of its genes."""
    split, seed = bench.split, bench.study.seed
    sites = {
        site: some_genes(cohort, seed, site) for site, cohort in split.sites.items()
    }
    genes = bench.study.vocabulary.model_copy(update={"genes": split.genes.genes})
    study = bench.study.model_copy(update={"vocabulary": genes})
    own = study.strategy.per_gene
    ways = {}
    for per_gene in (own,) if split.quick else (own, not own):
        rule = study.strategy.model_copy(update={"per_gene": per_gene})
        ways[f"panels{'' if per_gene else '-not'}-per-gene"] = (
            f"different panels, {'' if per_gene else 'not '}per gene",
            study.model_copy(update={"strategy": rule}),
        )
    found = bench.variants(ways, sites)
    if not split.quick:
        fewer = {}
        for site, cohort in split.sites.items():
            n = round(PANEL_SHARE * len(cohort.patients))
            fewer[site] = _cut(cohort, n, derive(seed, "some", site))
        label = f"{PANEL_SHARE:.0%} of the patients, all genes"
        found |= bench.variants({"some-patients": (label, bench.study)}, fewer)
    own_way, full = next(iter(found.values())), bench.drawn[FEDERATED]
    against = {m.key: m.against(own_way[m.key], full[m.key]) for m in MEASURES}
    measured = [sum(g in c.genes for c in sites.values()) for g in split.genes.genes]
    worse = [f"{m.name} {percent(against[m.key])}" for m in MEASURES]
    fields = {
        "panels": table(bench, found),
        "panel_share": PANEL_SHARE,
        "genes": len(split.genes),
        "measured": (min(measured), max(measured)),
        "panels_worse": ", ".join(worse),
        "within_full": all_within(against, PANELS_WITHIN),
    }
    return fields, {"panels": found, "panels_against_full": against}


def some_genes(cohort: Cohort, seed: int, site: str) -> Cohort:
    """Return a site with its random share of genes, as for a scenario's panel_share."""
    kept = panel(seed, site, len(cohort.genes), PANEL_SHARE)
    return dataclasses.replace(
        cohort,
        genes=tuple(cohort.genes[i] for i in kept),
        expression=cohort.expression[:, kept],
    )


# ---- a foreign scale ----


def foreign(bench: Bench) -> Part:
    """Let the largest site name a scale that its numbers are not on."""
    split = bench.split
    declared = split.scenario.data.scale
    fields = dict.fromkeys(("foreign", "foreign_checks", "foreign_left_out"))
    if declared not in CONVERTIBLE:
        return fields | {"declared": declared, "foreign_left_out": ""}, {}
    site = max(split.sites, key=lambda s: (split.sites[s].n_patients, s))
    rows: dict[str, dict[str, str]] = {}
    found: dict[str, Values] = {}
    checks: dict[str, Any] = {}
    without = {name: c for name, c in split.sites.items() if name != site}
    if without:
        ways = {"without-largest": ("without the largest site", bench.study)}
        found |= bench.variants(ways, without)
    own = split.folder / "sites" / site
    for kind, mistake in foreign_scale.MISTAKES.items():
        if mistake.scale == declared:
            continue
        cohort, findings = foreign_scale.at_the_door(
            own, split.study, declared, mistake
        )
        row = dict.fromkeys(("check-data", *AT_SERVER), "-")
        row["check-data"] = foreign_scale.verdict(cohort, findings)
        checks[kind] = {
            "enters": cohort is not None,
            "findings": [f"{each.code} {each.severity}" for each in findings],
        }
        if cohort is not None:
            sites = without | {site: cohort}
            other = dataclasses.replace(split, sites=sites)
            level = moments.foreign_scales(other.moments).get(site)
            norm = _norm_ratio(bench, other, site, kind)
            checks[kind] |= {"level_ratio": level, "norm_ratio": norm}
            row |= _at_the_server(level, norm, bench.study)
            if not (split.quick and kind == "ln"):
                ways = _entered(bench, kind, mistake.description)
                found |= bench.variants(ways, sites)
        rows[f"{mistake.description}, named {declared}"] = row
    fields |= {
        "foreign_checks": markdown("what the site sends", rows),
        "foreign": table(bench, found),
        "declared": declared,
        "largest": split.sites[site].n_patients,
        "all_patients": sum(c.n_patients for c in split.sites.values()),
        "max_norm_ratio": bench.study.rounds.max_norm_ratio,
    }
    return fields, {"checks": checks, "foreign": found}


def _entered(bench: Bench, kind: str, description: str) -> dict[str, tuple[str, Study]]:
    """Return the federation with the foreign site, and log10 with defences too."""
    label, study = f"one site in {description}", bench.study
    ways = {f"foreign-{kind}": (label, study)}
    if kind == "log10" and not bench.split.quick:
        for name in ("trimmed-mean", "median"):
            defended = f"{label}, {name.replace('-', ' ')}"
            ways[f"foreign-{kind}-{name}"] = defended, _by(study, **EQUAL, name=name)
    return ways


def _at_the_server(
    level: float | None, norm_ratio: float, study: Study
) -> dict[str, str]:
    means, change = AT_SERVER
    row = {means: "like the others'"}
    if level is not None:
        row[means] = f"left out, {level:.2f} times the others'"
    if not math.isnan(norm_ratio):
        far = norm_ratio > study.rounds.max_norm_ratio
        verdict = "quarantined" if far else "accepted"
        row[change] = f"{norm_ratio:.2g} times the others', {verdict}"
    return row


def _norm_ratio(bench: Bench, split: Split, site: str, kind: str) -> float:
    """Return the norm of a site's first update over the median of the others'.

    As the server compares them in a round; NaN without pretraining, or with too few
    others.
    """
    study = _by(bench.study, update="delta")
    if PRETRAINING not in study.phases or len(split.sites) < 3:
        return math.nan

    def compute() -> dict[str, float]:
        scale = split.standardisation
        begun = initial_state(study, split.genes, scale, split.sites)
        patients = {name: split.patients(c) for name, c in split.sites.items()}
        incoming = tasks.download_state(study, PRETRAINING, begun)
        return foreign_scale.first_norms(study, incoming, patients)

    name = f"norms-{kind}-{bench.study.hash[:12]}.json"
    norms = resumable.cached(bench.split.folder / "federation" / name, compute)
    others = [norm for name, norm in norms.items() if name != site]
    return float(norms[site] / float(np.median(others)))


PARTS = (strategies, small_sites, panels, foreign)
"""Tables of the page in which federations differ, each with its fields and numbers."""
