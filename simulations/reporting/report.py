"""Write the report of a simulated federation: numbers as JSON, and one page to read.

The page needs nothing but itself: styles and charts are inline, and there are no
scripts. docs/report.md explains every key of the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fedgex.simulations.reporting import charts, headlines
from fedgex.simulations.reporting.charts import LABELS, SCHEMES
from fedgex.simulations.reporting.headlines import condition, count, duration
from fedgex.simulations.reporting.schema import (
    PublicCohort,
    Report,
    SurvivalScore,
    headline_key,
    plain,
)

DIGITS = 6
"""Significant digits of the numbers in report.json."""
BLANK = "—"
"""What a table shows where there is no number."""


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.html to `folder`, which is made if need be.

    The same report gives the same bytes. NaN and infinity become null.

    Raises
    ------
    ConfigError
        If the report does not follow its schema; nothing is written then.
    """
    numbers = plain(report, DIGITS)
    page = _page(Report.read(numbers, "report"))
    text = json.dumps(
        numbers, allow_nan=False, ensure_ascii=False, indent=1, sort_keys=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(text + "\n", "utf-8")
    (folder / "report.html").write_text(page, "utf-8")


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the headline results as about ten lines, each `Topic: sentence`.

    Raises
    ------
    ConfigError
        If the report does not follow its schema.
    """
    return headlines.headlines(Report.read(plain(report, DIGITS), "report"))


def _page(report: Report) -> str:
    sections = {
        "Headline results": _headline_section(report),
        "How the run was made": _making(report),
        "Training, round by round": _training(report),
        "Restoration of missing values": _restoration(report),
        "Restoration, gene by gene": _genes(report),
        "Survival": _survival(report),
        "Survival by predicted risk": _risk_groups(report),
        "Cancer type": _classification(report),
        "Cost": _cost(report),
    }
    template = resources.files("fedgex.simulations.reporting") / "report_template.html"
    return Template(template.read_text("utf-8")).substitute(
        title=escape(report.study.name),
        contents="\n".join(
            f'<a href="#section-{i}">{title}</a>'
            for i, title in enumerate(sections, start=1)
        ),
        sections="\n".join(
            f'<section>\n<h2 id="section-{i}">{title}</h2>\n{body}\n</section>'
            for i, (title, body) in enumerate(sections.items(), start=1)
        ),
    )


# Each section returns HTML; where the run holds nothing for it, a sentence saying why.


def _headline_section(report: Report) -> str:
    return _facts(
        {
            topic: sentence
            for line in headlines.headlines(report)
            for topic, _, sentence in [line.partition(": ")]
        }
    )


def _making(report: Report) -> str:
    study = report.study
    facts = {
        "Study": f"{study.name}, hash {study.hash}",
        "Seed": str(study.seed),
        "Expression scale": study.scale,
        "Model": f"{study.preset}, {study.parameters:,} parameters",
        "Vocabulary": f"{count(study.vocabulary.genes, 'gene')}, "
        f"hash {study.vocabulary.hash}",
        "Hold-out": f"{count(study.holdout.patients, 'patient')} from "
        + (", ".join(study.holdout.institutions) or "no named institution"),
        **_public(study.public),
        "Protection": " ".join(study.protections),
        "Rounds": headlines.phases(report.rounds),
        "Wall-clock time": duration(study.seconds),
        "Software": ", ".join(f"{k} {v}" for k, v in sorted(study.versions.items())),
    }
    command = f"<p>Command: <code>{escape(study.command)}</code></p>\n"
    notes = "".join(f"<p>Note: {escape(note)}</p>\n" for note in study.notes)
    sites = _table(
        "The hospitals.",
        "Loss: mean training loss of the last round that the hospital took part in.",
        ["hospital", "patients", "genes measured", "loss"],
        [
            [s.name, f"{s.patients:,}", f"{s.genes:,}", _number(s.train_loss)]
            for s in study.sites
        ],
    )
    return _facts(facts) + command + notes + sites


def _public(cohort: PublicCohort | None) -> dict[str, str]:
    if cohort is None:
        return {}
    patients = count(cohort.patients, "patient")
    return {"Public cohort": f"{patients} from {', '.join(cohort.institutions)}"}


def _training(report: Report) -> str:
    if not report.rounds:
        return _absent("the report holds no rounds, as when a finished model is judged")
    finals = "; ".join(
        f"{phase}: training loss {_number(losses[0])} in the first round, "
        f"{_number(losses[-1])} in the last"
        for phase in dict.fromkeys(r.phase for r in report.rounds)
        if (losses := [r.train_loss for r in report.rounds if r.phase == phase])
    )
    return _figure(
        "Training.",
        "Loss at the hospitals, mean over their updates: while they train, and judged "
        "without learning. It is the squared error of restored values in pretraining, "
        "cross-entropy in classification, the negative log-likelihood in survival. "
        "Where a phase was judged on the hold-out, its restoration "
        "error there: each round on a part of the hold-out, the last on all of it. "
        f"{_sentence(headlines.contributions(report.rounds))}",
        f"Line charts of loss and hold-out error against the round. {finals}.",
        charts.rounds(report.rounds),
    )


def _restoration(report: Report) -> str:
    scores = report.imputation
    judged = [scheme for scheme in SCHEMES if headlines.keys_of(scores, scheme)]
    if not judged:
        return _absent(
            "restoration was not judged; it needs a pretrained model and a hold-out"
        )
    verdicts = [
        f"{condition(scheme, key)}: {headlines.against_best(scores, scheme, key)}"
        for scheme in judged
        for key in [headline_key(headlines.keys_of(scores, scheme))]
    ]
    figure = _figure(
        "Error against what is missing.",
        "Mean squared error (MSE) on hidden values of the hold-out; lower is better. "
        "The variance of a gene is 1, so the gene mean is near 1 when values are "
        "missing at random.",
        f"Line charts of each method's error. {'; '.join(verdicts)}.",
        charts.imputation(scores),
    )
    return (
        figure
        + "".join(_error_table(report, scheme) for scheme in judged)
        + "".join(_measures_table(report, scheme) for scheme in judged[:1])
    )


def _error_table(report: Report, scheme: str) -> str:
    scores, keys = report.imputation, headlines.keys_of(report.imputation, scheme)
    best = {key: headlines.best_baseline(scores, scheme, key) for key in keys}
    rows = []
    for method in _methods(scores):
        row = [LABELS[method]]
        for key in keys:
            number = _number(headlines.mse(scores, method, scheme, key))
            winner = best[key]
            row.append(f"† {number}" if winner and winner[0] == method else number)
        rows.append(row)
    ratios = {
        key: model / winner[1]
        for key in keys
        if (model := headlines.mse(scores, "model", scheme, key)) is not None
        and (winner := best[key])
    }
    better = sum(ratio < 1 for ratio in ratios.values())
    what = "genes measured" if scheme == "panel" else "share missing"
    return _table(
        f"Mean squared error, {SCHEMES[scheme]}.",
        f"Columns: {what}. † best baseline. A ratio below 1 means that the federated "
        f"model is better: so in {better} of {count(len(ratios), 'column')}.",
        ["method", *(f"{float(k):.0%}" if scheme != "panel" else k for k in keys)],
        rows,
        ["model / best baseline", *(_number(ratios.get(key)) for key in keys)],
    )


def _measures_table(report: Report, scheme: str) -> str:
    scores = report.imputation
    key = headline_key(headlines.keys_of(scores, scheme))
    return _table(
        f"All measures, {condition(scheme, key)}.",
        "MSE in gene variances, MAE in gene standard deviations; correlations "
        "across patients, medians over the genes.",
        [
            "method",
            "MSE",
            "MAE",
            "Pearson r",
            "Spearman r",
            "genes with r > 0",
            "r > 0.5",
            "of",
        ],
        [
            [
                LABELS[method],
                *(_number(v) for v in (s.mse, s.mae, s.pearson, s.spearman)),
                *(
                    _integer(v)
                    for v in (s.genes_r_above_0, s.genes_r_above_half, s.genes_judged)
                ),
            ]
            for method in _methods(scores)
            if (s := scores[method].get(scheme, {}).get(key))
        ],
    )


def _genes(report: Report) -> str:
    genes = report.imputation_per_gene
    if genes is None:
        return _absent("the report holds no errors of single genes")
    known = [r for r in genes.model_r if r is not None]
    positive, half = sum(r > 0 for r in known), sum(r > 0.5 for r in known)
    verdict = _sentence(headlines.genes_won(genes))
    correlations = (
        f"The correlation is above 0 for {positive:,} and above 0.5 for {half:,} of "
        f"{count(len(known), 'gene')}."
    )
    return _figure(
        "Single genes.",
        "Left: each gene's error by the federated model against that by the Gaussian; "
        f"below the diagonal the model is better. {verdict} Right: {correlations}",
        f"Scatter plot of errors and histogram of correlations. {verdict} "
        f"{correlations}",
        charts.per_gene(genes),
    )


def _survival(report: Report) -> str:
    cohorts = report.survival
    if not cohorts:
        return _absent(
            "survival was not judged; it needs survival rounds in the study and "
            "cohorts with known deaths"
        )
    methods = [m for m in LABELS if any(m in of for of in cohorts.values())]
    figure = _figure(
        "Concordance of predicted risk and survival.",
        "Dots: C-index; lines: one standard deviation either way; dashed: chance. "
        "Pooled data is what one place with all patients would reach.",
        f"Dot plot of the C-index. {_sentence(headlines.survival_verdict(cohorts))}",
        charts.survival(cohorts),
    )
    reasons = [
        f"{cohort}, {LABELS[method]}: {score.reason}"
        for cohort, of_cohort in cohorts.items()
        for method, score in of_cohort.items()
        if score.c_index is None and score.reason
    ]
    table = _table(
        "C-index ± standard deviation.",
        "Patients and events: those on whom the methods are judged.",
        ["cohort", "patients", "events", *(LABELS[m] for m in methods)],
        [
            [
                cohort,
                _range(score.patients for score in of.values()),
                _range(score.events for score in of.values()),
                *(_concordance(of.get(m)) for m in methods),
            ]
            for cohort, of in cohorts.items()
        ],
    )
    return (
        figure
        + table
        + (_note(f"Not estimable: {'; '.join(reasons)}.") if reasons else "")
    )


def _risk_groups(report: Report) -> str:
    curves = report.kaplan_meier
    if not curves:
        return _absent("there are no curves, as risk was not predicted for any cohort")
    below = sum(
        km.logrank_p is not None and km.logrank_p < 0.05 for km in curves.values()
    )
    verdict = (
        f"Log-rank p is below 0.05 in {below} of {count(len(curves), 'cohort')}, "
        "not corrected for their number."
    )
    numbers = "; ".join(
        f"{c}: {charts.p_value(km.logrank_p)}" for c, km in curves.items()
    )
    return _figure(
        "Survival of patients with low and high predicted risk.",
        "Kaplan-Meier estimates for patients to whom the federated model gives a low "
        f"or a high risk, and log-rank tests. {verdict}",
        f"Kaplan-Meier curves in small multiples. {verdict} {numbers}.",
        charts.kaplan_meier(curves),
    )


def _classification(report: Report) -> str:
    scores = report.classification
    keys = sorted({key for of in scores.values() for key in of}, key=float)
    if not keys:
        return _absent(
            "classification was not judged; it needs classification rounds in the study"
        )
    figure = _figure(
        "Cancer type from panels of different size.",
        "Accuracy: share of patients whose cancer type is named correctly. Macro-F1: "
        "F1 of each type, averaged with equal weight.",
        "Line charts of accuracy and macro-F1 against the number of genes. "
        f"{_sentence(headlines.classification_verdict(scores))}",
        charts.classification(scores),
    )
    table = _table(
        "Accuracy / macro-F1.",
        "Columns: genes measured.",
        ["method", *keys],
        [
            [
                LABELS[method],
                *(
                    f"{_number(s.accuracy)} / {_number(s.macro_f1)}"
                    if (s := scores[method].get(key))
                    else BLANK
                    for key in keys
                ),
            ]
            for method in _methods(scores)
        ],
    )
    return figure + table


def _cost(report: Report) -> str:
    cost = report.cost
    values = {
        "training speed (samples / s)": _number(cost.samples_per_s, 1),
        "overhead of a round (s)": _number(cost.round_overhead_s, 1),
        "sent by hospitals (MB)": _megabytes(cost.bytes_up),
        "sent to hospitals (MB)": _megabytes(cost.bytes_down),
        "peak memory (MB)": _number(cost.peak_rss_mb, 0),
    }
    rows = [[name, value] for name, value in values.items() if value != BLANK]
    if not rows:
        return _absent("cost was not measured")
    return _table(
        "What the run cost.",
        "Traffic is that of the whole run, all hospitals together.",
        ["measure (unit)", "value"],
        rows,
    )


# ---- pieces of HTML; all text is escaped here ----


def _absent(reason: str) -> str:
    return f'<p class="absent">Left out: {escape(reason)}.</p>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "\n".join(
        f"<dt>{escape(topic)}</dt><dd>{escape(text)}</dd>"
        for topic, text in facts.items()
    )
    return f"<dl>\n{rows}\n</dl>\n"


def _figure(title: str, caption: str, alt: str, svg: str) -> str:
    return (
        f'<figure>\n<div role="img" aria-label="{escape(alt)}">\n{svg}</div>\n'
        f"<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>\n"
        "</figure>\n"
    )


def _table(
    title: str,
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    footer: Sequence[str] = (),
) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(_row(row) for row in rows)
    foot = f"<tfoot>{_row(footer)}</tfoot>\n" if footer else ""
    return (
        f'<div class="wide"><table>\n<caption><b>{escape(title)}</b> '
        f"{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n{foot}</table></div>\n"
    )


def _row(cells: Sequence[str]) -> str:
    rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{escape(cells[0])}</th>{rest}</tr>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _methods(scores: Mapping[str, object]) -> list[str]:
    return [method for method in LABELS if method in scores]


def _number(value: float | None, digits: int = 3) -> str:
    return BLANK if value is None else f"{value:,.{digits}f}"


def _integer(value: int | None) -> str:
    return BLANK if value is None else f"{value:,}"


def _megabytes(size: int | None) -> str:
    return _number(None if size is None else size / 1e6, 1)


def _concordance(score: SurvivalScore | None) -> str:
    if score is None:
        return BLANK
    if score.c_index is None:
        return "not estimable"
    spread = "" if score.sd is None else f" ± {score.sd:.3f}"
    return f"{score.c_index:.3f}{spread}"


def _range(counts: Iterable[int]) -> str:
    """Return the count that all share, or the least and the greatest."""
    distinct = sorted(set(counts))
    ends = dict.fromkeys((distinct[0], distinct[-1])) if distinct else ()
    return "-".join(f"{n:,}" for n in ends) or BLANK
