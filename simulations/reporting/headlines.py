"""The results of a report in about ten sentences, for the terminal and the page.

They name the best method, also when it is not the federated model.
"""

from __future__ import annotations

from fedgex.simulations.reporting.charts import LABELS, SCHEMES, in_order
from fedgex.simulations.reporting.schema import (
    Classifications,
    Imputations,
    PerGene,
    Report,
    Round,
    Survivals,
    headline_key,
)


def headlines(report: Report) -> list[str]:
    """Return the lines, each `Topic: sentence`."""
    study, holdout = report.study, report.study.holdout
    patients = sum(site.patients for site in study.sites)
    lines = [
        f"Study: {study.name}, {count(len(study.sites), 'hospital')} with "
        f"{count(patients, 'patient')}; {count(study.vocabulary.genes, 'gene')}; "
        f"{study.preset} model of {study.parameters:,} parameters",
        f"Training: {phases(report.rounds)} in {duration(study.seconds)}",
        f"Updates: {contributions(report.rounds)}",
        f"Hold-out: {count(holdout.patients, 'patient')} from "
        f"{count(len(holdout.institutions), 'institution')}, none of which trains",
    ]
    restored = restoration(report.imputation)
    lines += [f"Restoration, {each}" for each in restored]
    if not restored:
        lines.append("Restoration: not judged in this run")
    if report.imputation_per_gene:
        lines.append(f"Genes: {genes_won(report.imputation_per_gene)}")
    lines.append(f"Survival: {survival_verdict(report.survival)}")
    lines.append(f"Classification: {classification_verdict(report.classification)}")
    return lines


def phases(rounds: tuple[Round, ...]) -> str:
    """Return how many rounds each phase had."""
    names = [r.phase for r in rounds]
    counts = [f"{count(names.count(p), 'round')} of {p}" for p in dict.fromkeys(names)]
    return ", ".join(counts) or "no rounds"


def contributions(rounds: tuple[Round, ...]) -> str:
    """Return whether hospitals were missing, how often, and when it was worst."""
    if not rounds:
        return "none, as there were no rounds"
    short = [r for r in rounds if r.sites_contributed < r.sites_total]
    if not short:
        return "every hospital contributed to every round"
    worst = min(short, key=lambda r: r.sites_contributed)
    return (
        f"some hospital was missing in {len(short)} of {count(len(rounds), 'round')}; "
        f"at worst {worst.sites_contributed} of {worst.sites_total} contributed "
        f"({worst.phase}, round {worst.round})"
    )


def condition(scheme: str, key: str) -> str:
    """Return what was hidden: "50% missing at random", "100 genes measured"."""
    if scheme == "panel":
        return count(int(float(key)), "gene") + " measured"
    share = f"{float(key):.0%}"
    return f"{share} missing" + (", low first" if scheme == "mnar" else " at random")


def restoration(imputation: Imputations) -> list[str]:
    """Compare the model with its best baseline, one sentence a scheme."""
    found = []
    for scheme, keys in schemes_of(imputation).items():
        key = headline_key(keys)
        model = mse(imputation, "model", scheme, key)
        best = best_baseline(imputation, scheme, key)
        if model is None:
            verdict = "the model was not judged"
        elif best is None:
            verdict = f"MSE {model:.3f}; no baseline was run"
        else:
            verdict = f"MSE {model:.3f}, best baseline {best[1]:.3f} "
            verdict += f"({LABELS[best[0]]}); {_verdict(model / best[1])}"
        found.append(f"{condition(scheme, key)}: {verdict}")
    return found


def best_baseline(
    imputation: Imputations, scheme: str, key: str
) -> tuple[str, float] | None:
    """Return the baseline with the least error, or None if none was run."""
    errors = [
        (method, error)
        for method in LABELS
        if method != "model"
        and (error := mse(imputation, method, scheme, key)) is not None
    ]
    return min(errors, key=lambda pair: pair[1], default=None)


def mse(imputation: Imputations, method: str, scheme: str, key: str) -> float | None:
    """Return one error, or None where it was not taken."""
    score = imputation.get(method, {}).get(scheme, {}).get(key)
    return score.mse if score else None


def schemes_of(imputation: Imputations) -> dict[str, list[str]]:
    """Return the rates or numbers of genes of each scheme that was judged, rising."""
    found = {
        scheme: {key for of in imputation.values() for key in of.get(scheme, {})}
        for scheme in SCHEMES
    }
    return {scheme: sorted(keys, key=float) for scheme, keys in found.items() if keys}


def genes_won(genes: PerGene) -> str:
    """Return on how many genes the model beats the Gaussian."""
    pairs = genes.pairs()
    won = sum(model < gaussian for model, gaussian in pairs)
    share = f" ({won / len(pairs):.0%})" if pairs else ""
    return (
        f"the model beats the Gaussian on {won:,} of {count(len(pairs), 'gene')}"
        f"{share}, {float(genes.rate):.0%} missing"
    )


def survival_verdict(cohorts: Survivals) -> str:
    """Return the mean C-index of each method over the cohorts where all have one."""
    if not cohorts:
        return "not judged in this run"
    methods = methods_of(cohorts)
    table = [
        {m: c for m in methods if m in of and (c := of[m].c_index) is not None}
        for of in cohorts.values()
    ]
    complete = [each for each in table if len(each) == len(methods)]
    if not complete:
        return f"no C-index by every method in any of {count(len(cohorts), 'cohort')}"
    means = ", ".join(
        f"{LABELS[m]} {sum(c[m] for c in complete) / len(complete):.3f}"
        for m in methods
    )
    verdict = f"mean C-index over {len(complete)} of {count(len(cohorts), 'cohort')}"
    verdict += f": {means}"
    if {"federated", "alone"} <= {*methods}:
        won = sum(c["federated"] > c["alone"] for c in complete)
        verdict += f"; federated above local in {won} of {len(complete)}"
    return verdict


def methods_of(cohorts: Survivals) -> list[str]:
    """Return the methods of any cohort."""
    return in_order(method for of in cohorts.values() for method in of)


def classification_verdict(scores: Classifications) -> str:
    """Return each method's accuracy at the fewest and the most genes."""
    keys = sizes_of(scores)
    if not keys:
        return "not judged in this run"
    return "; ".join(
        f"accuracy with {count(int(float(key)), 'gene')}: "
        + ", ".join(
            f"{LABELS[m]} {score.accuracy:.3f}"
            for m in LABELS
            if (score := scores.get(m, {}).get(key)) and score.accuracy is not None
        )
        for key in dict.fromkeys((keys[0], keys[-1]))
    )


def sizes_of(scores: Classifications) -> list[str]:
    """Return the numbers of genes, rising."""
    return sorted({key for of in scores.values() for key in of}, key=float)


def count(n: int, noun: str) -> str:
    """Return "1 hospital", "1,204 hospitals"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def duration(seconds: float) -> str:
    """Return 83 seconds as "1 min 23 s"; only seconds below a minute."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m} min"
    return f"{m} min {s} s" if m else f"{s} s"


def _verdict(ratio: float) -> str:
    if abs(ratio - 1) < 0.0005:
        return "ratio 1.000, level"
    better_or_worse = "better" if ratio < 1 else "worse"
    return f"ratio {ratio:.3f}, the model is {abs(ratio - 1):.1%} {better_or_worse}"
