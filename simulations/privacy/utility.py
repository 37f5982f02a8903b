"""What privacy costs in usefulness: one study with and without it, judged alike.

    split -> for each seed: the public cohort alone, each epsilon, and no privacy from
    the same start and from all that hospitals could share
    -> model -> measures on the hold-out -> mean and SD over the seeds

What the columns mean stands in docs/results/privacy.md. N patients, V genes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from fedgex.client.training.local_round import refuse_large_delta
from fedgex.common import federation
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import to_patients
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import ConfigError
from fedgex.common.privacy import accounting
from fedgex.common.study import (
    ROBUST,
    Privacy,
    PublicRule,
    StrategyRule,
    Study,
)
from fedgex.server.federation import public_cohort
from fedgex.simulations import resumable, training
from fedgex.simulations.data.split import HOLDOUT, PUBLIC, read_cohort, split
from fedgex.simulations.evaluation.table import markdown, mean_sd
from fedgex.simulations.privacy.effort import EPSILONS, SEEDS
from fedgex.simulations.privacy.measures import MEASURES, Measure, evaluate
from fedgex.simulations.scenario import Scenario, shortened

QUICK_ROUNDS = 2
"""Most rounds of a phase with --quick, which also takes one seed: enough to see that it
works, too little to believe."""
ALL_RANK = 128
"""Factors of the linear start where the hospitals share their own statistics."""

PUBLIC_ALONE = "public cohort alone"
SAME_START = "without privacy, same start"
ALL_OF_IT = "without privacy, all of it"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What one column of the table was trained under, and what came of it."""

    name: str
    epsilon: float | None
    """What all rounds may spend of a patient; None without privacy."""
    noise_multiplier: float | None
    values: Mapping[str, Sequence[float]]
    """Of each measure that the study can be judged by, one value a seed."""
    seconds: Sequence[float]
    """Wall time of each seed's training and judging."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found."""

    study: str
    study_hash: str
    delta: float
    seeds: Sequence[int]
    conditions: Sequence[Condition]
    notes: Sequence[str]

    def to_json(self) -> str:
        """Return all numbers, for scripts."""
        return json.dumps({"schema": 1} | dataclasses.asdict(self), indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What all models share."""

    sites: Mapping[str, Cohort]
    public: Cohort
    holdout: Cohort
    genes: Vocabulary


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A model to train and to judge: one condition, one seed."""

    condition: str
    study: Study

    @property
    def file(self) -> str:
        alone = "-public" if self.condition == PUBLIC_ALONE else ""
        return f"{self.study.hash[:16]}{alone}.json"


def utility(
    scenario: Scenario,
    data_dir: Path,
    out: Path,
    console: Console,
    *,
    epsilons: Sequence[float] = EPSILONS,
    seeds: int = SEEDS,
    quick: bool = False,
) -> Report:
    """Compare a scenario with and without privacy.

    Writes utility.json, utility.md and utility.png to `out`; what was trained there
    before is not trained again.

    Parameters
    ----------
    epsilons
        Each stands in for that of the study.
    seeds
        How many, from the study's own on.

    Raises
    ------
    ConfigError
        If the data do not fit, or the study has no patient-level privacy.
    DataError
        If the study's delta is too large for a hospital.
    """
    study = shortened(scenario.study, QUICK_ROUNDS if quick else None)
    rule = study.privacy.patient
    if rule is None:
        raise ConfigError(
            f'the study "{study.name}" has no privacy.patient, whose cost is asked; '
            "expected a scenario with it, such as private."
        )
    if not epsilons or min(epsilons) <= 0 or seeds < 1:
        raise ConfigError(
            f"epsilons {', '.join(f'{e:g}' for e in epsilons)} and {seeds} seeds; "
            "expected one epsilon or more, each above 0, and one seed or more."
        )
    out.mkdir(parents=True, exist_ok=True)
    parts = split(scenario, data_dir, out)
    sites = {name: read_cohort(out / "sites" / name, study) for name in parts.sites}
    for cohort in sites.values():
        refuse_large_delta(study, cohort.n_patients)
    known = read_cohort(out / PUBLIC, study)
    ground = _Ground(
        sites=sites,
        public=known,
        holdout=read_cohort(out / HOLDOUT, study),
        genes=training.vocabulary(study, sites, known),
    )
    numbers = [study.seed + k for k in range(1 if quick else seeds)]
    columns = {
        number: _conditions(
            study.model_copy(update={"seed": number}), epsilons, len(ground.genes)
        )
        for number in numbers
    }
    cells = [
        _Cell(condition=name, study=each)
        for column in columns.values()
        for name, each in column.items()
    ]
    found = _all(ground, cells, out / "cells", scenario.run.workers, console)
    notes = list(parts.notes)
    if quick:
        notes.append(
            f"quick: one seed, and at most {QUICK_ROUNDS} rounds of each phase; no "
            "number here says anything of the study"
        )
    report = Report(
        study=study.name,
        study_hash=study.hash,
        delta=rule.delta,
        seeds=numbers,
        conditions=list(_gathered(cells, found)),
        notes=notes,
    )
    (out / "utility.json").write_text(report.to_json())
    (out / "utility.md").write_text("\n".join(table(report)) + "\n")
    _draw(report, out / "utility.png")
    return report


def table(report: Report) -> list[str]:
    """Return what was found as lines of Markdown, one column for each condition."""
    plain = [
        condition
        for condition in report.conditions
        if condition.name in (SAME_START, ALL_OF_IT)
    ]
    rows = {
        measure.name: {
            each.name: mean_sd(each.values[measure.key])
            + (_beside(measure, each, plain) if each.epsilon is not None else "")
            for each in report.conditions
        }
        for measure in _measured(report)
    }
    seeds = "1 seed" if len(report.seeds) == 1 else f"{len(report.seeds)} seeds"
    noises = ", ".join(
        f"{each.noise_multiplier:.2f} at epsilon {each.epsilon:g}"
        for each in report.conditions
        if each.epsilon is not None
    )
    return [
        *markdown("measure", rows).splitlines(),
        "",
        f"Mean and SD over {seeds}; delta {report.delta:g}. In brackets, against "
        f'"{SAME_START}" and "{ALL_OF_IT}": an error\'s change in per cent, the '
        f"others' difference. Noise multipliers: {noises}.",
        *(f"Note: {note}." for note in report.notes),
    ]


# ---- conditions ----


def _conditions(
    study: Study, epsilons: Sequence[float], n_genes: int
) -> dict[str, Study]:
    """Return the study of each column, by the column's name."""
    plain = study.model_copy(update={"privacy": Privacy()})
    return {
        PUBLIC_ALONE: plain,
        **{f"epsilon {each:g}": _with_epsilon(study, each) for each in epsilons},
        SAME_START: plain,
        ALL_OF_IT: _all_shared(study, n_genes),
    }


def _with_epsilon(study: Study, epsilon: float) -> Study:
    assert study.privacy.patient is not None
    rule = study.privacy.patient.model_copy(
        update={"epsilon": epsilon, "noise_multiplier": None}
    )
    return study.model_copy(
        update={"privacy": study.privacy.model_copy(update={"patient": rule})}
    )


def _all_shared(study: Study, n_genes: int) -> Study:
    """Return the study that keeps nothing back: statistics of the hospitals' own."""
    weights = study.strategy.weights
    if study.strategy.name not in ROBUST:
        weights = "patients"
    strategy = study.strategy.model_dump() | {"weights": weights, "site_weights": {}}
    changes = {
        "privacy": Privacy(),
        "secure_aggregation": None,
        "public": PublicRule(),
        "cross_products": True,
        "linear_rank": min(ALL_RANK, n_genes - 1),
        "strategy": StrategyRule.model_validate(strategy),
    }
    return study.model_copy(update=changes)


# ---- models ----


def _all(
    ground: _Ground,
    cells: Sequence[_Cell],
    folder: Path,
    workers: int,
    console: Console,
) -> dict[str, dict[str, float]]:
    """Return what was found of every cell, computed if it is not there yet."""
    jobs = {folder / cell.file: cell for cell in cells}
    n_absent = sum(not path.exists() for path in jobs)
    console.print(f"{len(jobs)} models, {n_absent} to train", highlight=False)

    def named(cell: _Cell) -> str:
        return f"{cell.condition}, seed {cell.study.seed}"

    resumable.compute_all(partial(_judged, ground), jobs, workers, console, named)
    return {cell.file: resumable.load(path) for path, cell in jobs.items()}


def _judged(ground: _Ground, cell: _Cell) -> dict[str, float]:
    """Train one model; return its measures, and `seconds`."""
    started, study = time.monotonic(), cell.study
    known = ground.public if public_cohort.is_wanted(study) else None
    begun = training.begin(study, ground.genes, ground.sites, known)
    apart = None
    if known is not None:
        apart = to_patients(known, ground.genes, begun.standardisation)
    if cell.condition == PUBLIC_ALONE:
        whole = dict(begun.parameters)
        for phase in study.phases:
            whole = federation.begin_phase(study, phase, whole, apart)
    else:
        patients = {
            name: to_patients(cohort, ground.genes, begun.standardisation)
            for name, cohort in ground.sites.items()
        }
        whole = dict(training.train(begun, patients, public=apart).parameters)
    scale, holdout = begun.standardisation, ground.holdout
    values = evaluate(study, whole, scale, ground.genes, holdout, ground.public)
    return values | {"seconds": time.monotonic() - started}


# ---- output ----


def _gathered(
    cells: Sequence[_Cell], found: Mapping[str, Mapping[str, float]]
) -> Iterator[Condition]:
    """Yield each condition with the values of its seeds."""
    for name in dict.fromkeys(cell.condition for cell in cells):
        own = [cell for cell in cells if cell.condition == name]
        rule, study = own[0].study.privacy.patient, own[0].study
        yield Condition(
            name=name,
            epsilon=None if rule is None else rule.epsilon,
            noise_multiplier=None
            if rule is None
            else accounting.noise_multiplier(study),
            values={
                measure.key: [found[cell.file][measure.key] for cell in own]
                for measure in MEASURES
                if all(measure.key in found[cell.file] for cell in own)
            },
            seconds=[found[cell.file]["seconds"] for cell in own],
        )


def _measured(report: Report) -> list[Measure]:
    """Return the measures that every condition has."""
    return [
        measure
        for measure in MEASURES
        if all(measure.key in each.values for each in report.conditions)
    ]


def _beside(measure: Measure, each: Condition, plain: Sequence[Condition]) -> str:
    own = float(np.mean(each.values[measure.key]))
    said = []
    for other in plain:
        reference = float(np.mean(other.values[measure.key]))
        if measure.better == "lower":
            said.append(f"{100 * (own / reference - 1):+.1f} %")
        else:
            said.append(f"{own - reference:+.3f}")
    return f" ({', '.join(said)})"


def _draw(report: Report, path: Path) -> None:
    """Draw each measure against epsilon, with a line for each condition without."""
    private = [each for each in report.conditions if each.epsilon is not None]
    shown = _measured(report)
    styles = {PUBLIC_ALONE: ":", SAME_START: "--", ALL_OF_IT: "-"}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.subplots(2, 3, squeeze=False).flat
    for axes, measure in zip(grid, MEASURES, strict=True):
        if measure not in shown:
            axes.set_visible(False)
            continue
        values = [np.asarray(each.values[measure.key]) for each in private]
        axes.errorbar(
            [float(each.epsilon or 0) for each in private],
            [each.mean() for each in values],
            [each.std(ddof=1) if len(each) > 1 else 0 for each in values],
            marker="o",
            capsize=3,
            label="with privacy",
        )
        for each in report.conditions:
            if each.name in styles:
                axes.axhline(
                    float(np.mean(each.values[measure.key])),
                    color="grey",
                    linestyle=styles[each.name],
                    label=each.name,
                )
        axes.set(xscale="log", xlabel="epsilon", title=measure.name)
        axes.title.set_fontsize("small")
        axes.set_xticks(
            [float(each.epsilon or 0) for each in private],
            labels=[f"{each.epsilon:g}" for each in private],
        )
        axes.minorticks_off()
    if shown:
        handles, labels = next(
            a for a in figure.axes if a.get_visible()
        ).get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
