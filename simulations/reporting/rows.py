"""Rows of the tables of a report, as text; a dash where there is no number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedgex.simulations.reporting import headlines
from fedgex.simulations.reporting.charts import LABELS, in_order, p_value
from fedgex.simulations.reporting.headlines import count
from fedgex.simulations.reporting.schema import (
    Classifications,
    Cost,
    Imputations,
    KaplanMeier,
    PerGene,
    Round,
    StudyFacts,
    Survivals,
)

BLANK = "—"
Rows = list[list[str]]


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with its thousands apart."""
    return BLANK if value is None else f"{value:,.{digits}f}"


def sites(study: StudyFacts) -> Rows:
    """Return size, genes and loss of each hospital."""
    return [
        [s.name, f"{s.patients:,}", f"{s.genes:,}", number(s.train_loss)]
        for s in study.sites
    ]


def losses(rounds: Sequence[Round]) -> str:
    """Return the first and last training loss of each phase."""
    of_phase: dict[str, list[float | None]] = {}
    for each in rounds:
        of_phase.setdefault(each.phase, []).append(each.train_loss)
    return "; ".join(
        f"{phase}: training loss {number(of[0])} in the first round, {number(of[-1])} "
        "in the last"
        for phase, of in of_phase.items()
    )


def errors(
    scores: Imputations, scheme: str, keys: Sequence[str]
) -> tuple[Rows, list[float | None]]:
    """Return the errors, the best baseline marked, and the model's over the latter."""
    rows, ratios = [], list[float | None]()
    best = {key: headlines.best_baseline(scores, scheme, key) for key in keys}
    for method in in_order(scores):
        of_method = {key: headlines.mse(scores, method, scheme, key) for key in keys}
        marks = ["† " if (b := best[k]) and b[0] == method else "" for k in keys]
        cells = zip(marks, map(number, of_method.values()), strict=True)
        rows.append([LABELS[method], *map("".join, cells)])
    for key in keys:
        model, baseline = headlines.mse(scores, "model", scheme, key), best[key]
        if model is None or baseline is None:
            ratios.append(None)
        else:
            ratios.append(model / baseline[1])
    return rows, ratios


def measures(scores: Imputations, scheme: str, key: str) -> Rows:
    """Return all measures of each method at one setting."""
    return [
        [
            LABELS[method],
            *(number(v) for v in (s.mse, s.mae, s.pearson, s.spearman)),
            *(
                number(v, 0)
                for v in (s.genes_r_above_0, s.genes_r_above_half, s.genes_judged)
            ),
        ]
        for method in in_order(scores)
        if (s := scores[method].get(scheme, {}).get(key))
    ]


def correlations(genes: PerGene) -> str:
    """Return for how many genes the model's correlation is above 0 and above 0.5."""
    known = [r for r in genes.model_r if r is not None]
    return (
        f"The correlation is above 0 for {sum(r > 0 for r in known):,} and above 0.5 "
        f"for {sum(r > 0.5 for r in known):,} of {count(len(known), 'gene')}."
    )


def concordances(cohorts: Survivals) -> Rows:
    """Return patients, events and the C-indices of each cohort."""
    rows = []
    for cohort, of in cohorts.items():
        row = [cohort]
        for counts in (
            [s.patients for s in of.values()],
            [s.events for s in of.values()],
        ):
            ends = dict.fromkeys((min(counts), max(counts))) if counts else ()
            row.append("-".join(f"{n:,}" for n in ends) or BLANK)
        for method in headlines.methods_of(cohorts):
            score = of.get(method)
            if score is None or score.c_index is None:
                row.append(BLANK if score is None else "not estimable")
            else:
                sd = "" if score.sd is None else f" ± {score.sd:.3f}"
                row.append(f"{score.c_index:.3f}{sd}")
        rows.append(row)
    return rows


def reasons(cohorts: Survivals) -> list[str]:
    """Return why C-indices are not estimable."""
    return [
        f"{cohort}, {LABELS[method]}: {score.reason}"
        for cohort, of_cohort in cohorts.items()
        for method, score in of_cohort.items()
        if score.c_index is None and score.reason
    ]


def p_values(curves: Mapping[str, KaplanMeier]) -> str:
    """Return the p of each cohort's log-rank test."""
    return "; ".join(f"{c}: {p_value(km.logrank_p)}" for c, km in curves.items())


def classes(scores: Classifications, keys: Sequence[str]) -> Rows:
    """Return accuracy and macro-F1 of each method, by number of genes."""
    return [
        [
            LABELS[method],
            *(
                f"{number(s.accuracy)} / {number(s.macro_f1)}"
                if (s := scores[method].get(key))
                else BLANK
                for key in keys
            ),
        ]
        for method in in_order(scores)
    ]


def costs(cost: Cost) -> Rows:
    """Return the measures that were taken."""
    mb_up, mb_down = (
        None if size is None else size / 1e6
        for size in (cost.bytes_up, cost.bytes_down)
    )
    values = {
        "training speed (samples / s)": number(cost.samples_per_s, 1),
        "overhead of a round (s)": number(cost.round_overhead_s, 1),
        "sent by hospitals (MB)": number(mb_up, 1),
        "sent to hospitals (MB)": number(mb_down, 1),
        "peak memory (MB)": number(cost.peak_rss_mb, 0),
    }
    return [[name, value] for name, value in values.items() if value != BLANK]
