"""Federated against pooled and local models, and federations that differ.

    arms -> models -> scores per patient, cached -> tables and one figure

An arm changes the study (how updates become one model) or the sites; all are evaluated
on the same unseen patients, cells and panels. N unseen patients, V genes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fedgex.simulations.evaluation import figures
from fedgex.simulations.evaluation.arms import FEDERATED, LOCAL, POOLED
from fedgex.simulations.evaluation.federation import variants
from fedgex.simulations.evaluation.federation.scores import (
    DRAWS,
    ERRORS,
    MEASURES,
    TYPE_PANEL,
    Bench,
    Part,
    Scores,
    Values,
    all_within,
    c_index_by_cancer,
    percent,
    yes,
)
from fedgex.simulations.evaluation.page import Results
from fedgex.simulations.evaluation.protocol import MIN_EVENTS, Measure, Split
from fedgex.simulations.evaluation.table import markdown, mean_known, mean_sd, paired_p
from fedgex.simulations.reporting.schema import plain

POOLED_WITHIN = 1.02
"""Goal: error of the federated model over that of the pooled one."""
AGAINST = ("how much worse", "p", "within 2 %")
NOT_ESTIMABLE = "not estimable"
LOCAL_MEAN = "local, mean over sites"
AMONG = "federated among"
"""The federated model, restricted to the cancers of a site."""


def run(split: Split, console: Console) -> Results:
    """Compare the federation with pooled and local models, and where sites differ.

    All seeds for federated and pooled; the first for all others.
    """
    bench = Bench(split, console)
    both, local = bench.central(), bench.local()
    fields: dict[str, Any] = {
        "min_events": MIN_EVENTS,
        "type_panel": TYPE_PANEL,
        "draws": DRAWS,
        "patients": len(bench.unseen),
        "institutions": len(set(bench.split.institution)),
        "sites": len(bench.split.sites),
    }
    numbers: dict[str, Any] = {}
    for texts, found in (
        _central(bench, both, local),
        _each_site(bench, both[FEDERATED][0], local),
        *(part(bench) for part in variants.PARTS),
    ):
        fields |= texts
        numbers |= found
    pooled = bench.drawn[POOLED]
    ratios = {
        name: {m.key: values[m.key] / pooled[m.key] for m in ERRORS}
        for name, values in bench.drawn.items()
    }
    return Results(
        name="federation",
        numbers=plain(numbers | {"error_against_pooled": ratios}),
        fields=fields,
        figures={
            "ratios": figures.error_ratios(
                {name: of for name, of in ratios.items() if name != POOLED},
                {m.key: m.name for m in ERRORS},
                goal=POOLED_WITHIN,
                ours=FEDERATED,
                cut_off=LOCAL_MEAN,
            )
        },
    )


# ---- federated, pooled, local ----


def _central(
    bench: Bench, both: Mapping[str, Sequence[Scores]], local: Mapping[str, Scores]
) -> Part:
    """Compare with the pooled model, and with the mean over sites."""
    by_seed = {name: [*map(bench.values, results)] for name, results in both.items()}
    of_local = bench.drawn[LOCAL_MEAN] = _mean_local(bench, local)
    rows = {
        name: {m.name: mean_sd([v[m.key] for v in values]) for m in MEASURES}
        for name, values in [*by_seed.items(), (LOCAL_MEAN, [of_local])]
    }
    ratios, p_values, against = {}, {}, {}
    for m in MEASURES:
        federated, pooled = (
            mean_known(v[m.key] for v in by_seed[name]) for name in (FEDERATED, POOLED)
        )
        ratio = ratios[m.key] = m.against(federated, pooled)
        p = p_values[m.key] = _p(bench, m, both[FEDERATED], both[POOLED])
        row = against[m.name] = dict.fromkeys(AGAINST, "-")
        if not math.isnan(p):
            row["p"] = f"{p:.2g}"
        if not math.isnan(ratio):
            row["how much worse"] = percent(ratio)
            row["within 2 %"] = yes(ratio <= POOLED_WITHIN)
    fields = {
        "seeds": len(bench.split.seeds),
        "local": len(local),
        "central": markdown("trained", rows),
        "against_pooled": markdown("federated against pooled", against),
        "within_pooled": all_within(ratios, POOLED_WITHIN),
    }
    return fields, {
        "central": by_seed,
        "local_mean": of_local,
        "against_pooled": ratios,
        "p": p_values,
    }


def _mean_local(bench: Bench, local: Mapping[str, Scores]) -> Values:
    """Return the mean over sites, each where it has the data."""
    study = bench.study
    by_site = {site: bench.values(scores) for site, scores in local.items()}
    types = {site: _types(bench, site) for site in local}
    found = {}
    for m in MEASURES:
        able = [s for s in local if m in ERRORS or len(types[s]) > 1]
        found[m.key] = mean_known(by_site[site][m.key] for site in able)
    by_cancer: dict[str, list[float]] = {}
    for site, scores in local.items():
        if "risk" not in scores:
            continue
        of_site = c_index_by_cancer(study, bench.unseen, scores["risk"])
        for name in types[site] & of_site.keys():
            by_cancer.setdefault(name, []).append(of_site[name])
    found["c-index"] = mean_known(mean_known(each) for each in by_cancer.values())
    return found


def _types(bench: Bench, site: str) -> set[str]:
    """Return the cancer types of which a site has the minimum cohort."""
    own = bench.split.patients(bench.split.sites[site]).cancer_type
    least = bench.study.minimum_cohort
    return {name for name in own if name is not None and own.count(name) >= least}


def _p(
    bench: Bench, measure: Measure, one: Sequence[Scores], other: Sequence[Scores]
) -> float:
    """Return the p of two arms over institutions, NaN where these are not enough."""
    if measure.key == "c-index":
        return math.nan
    means: list[list[float]] = [[], []]
    for name in sorted(set(bench.split.institution)):
        rows = bench.split.institution == name
        for values, results in zip(means, (one, other), strict=True):
            known = (bench.values(scores, rows)[measure.key] for scores in results)
            values.append(mean_known(known))
    return paired_p(*means)


# ---- each site ----


def _each_site(bench: Bench, federated: Scores, local: Mapping[str, Scores]) -> Part:
    """Compare with each local model, on unseen patients of the site's cancers."""
    rows: dict[str, dict[str, str]] = {}
    numbers: dict[str, dict[str, Values]] = {}
    for site, scores in sorted(local.items()):
        types = _types(bench, site)
        same = np.array([name in types for name in bench.unseen.cancer_type])
        found = {
            FEDERATED: bench.values(federated, same),
            AMONG: bench.values({**federated, **bench.among(types)}, same),
            LOCAL: bench.values(scores, same),
        }
        known = _estimable(bench, types, found[LOCAL], same)
        row = rows[site] = {
            "patients": str(bench.split.sites[site].n_patients),
            "cancers": str(len(types)),
            "unseen patients": str(int(same.sum())),
        }
        for m in MEASURES:
            ways = [way for way in found if way != AMONG or m.of_types]
            cells = [f"{found[way][m.key]:.3f}" for way in ways]
            row[m.name] = " / ".join(cells) if m.key in known else NOT_ESTIMABLE
        numbers[site] = {
            name: {key: value for key, value in values.items() if key in known}
            for name, values in found.items()
        }
    tally = {m.name: _tally(m, numbers.values(), FEDERATED) for m in MEASURES}
    among = {
        f"{m.name}, restricted to the cancers": _tally(m, numbers.values(), AMONG)
        for m in MEASURES
        if m.of_types
    }
    same_question = [tally[m.name] for m in MEASURES if not m.of_types]
    able = sum(1 for each in numbers.values() if each[LOCAL])
    met, met_among = (
        yes(all(each["worse"] == 0 for each in those)) if able else "-"
        for those in (tally.values(), [*same_question, *among.values()])
    )
    both = tally | among
    counts = {name: {k: str(n) for k, n in each.items()} for name, each in both.items()}
    fields = {
        "each_site": markdown("site", rows),
        "not_estimable": NOT_ESTIMABLE,
        "tally": markdown("federated against local, sites", counts),
        "able": able,
        "compared": len(numbers),
        "met": met,
        "met_among": met_among,
    }
    return fields, {"sites": numbers, "sites_against_local": both}


def _tally(
    measure: Measure, sites: Iterable[Mapping[str, Values]], way: str
) -> dict[str, int]:
    """Count the sites at which the federated model is better than the site's own."""
    pairs = [
        (each[way][measure.key], each[LOCAL][measure.key])
        for each in sites
        if measure.key in each[LOCAL]
    ]
    return {
        "better": sum(measure.is_better(one, other) for one, other in pairs),
        "equal": sum(one == other for one, other in pairs),
        "worse": sum(measure.is_better(other, one) for one, other in pairs),
    }


def _estimable(
    bench: Bench, types: set[str], values: Values, rows: NDArray[np.bool_]
) -> set[str]:
    """Return the measures for which a site has unseen patients enough."""
    there = {n for n, kept in zip(bench.unseen.cancer_type, rows, strict=True) if kept}
    two, deaths = len(there & types) > 1, not math.isnan(values["c-index"])
    return {
        m.key
        for m in MEASURES
        if not math.isnan(values[m.key]) and (two if m.of_types else two or deaths)
    }
