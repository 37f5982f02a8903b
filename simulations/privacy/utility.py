"""The cost of privacy in usefulness: one study with and without it, judged alike.

    split -> for each seed: the public cohort only, each epsilon, and no privacy from
    the same start and from all that hospitals could share
    -> model -> measures on the hold-out -> mean and SD over the seeds

docs/results/privacy.md explains the columns. N patients, V genes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
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
from fedgex.common.study import ROBUST, Privacy, PublicRule, StrategyRule, Study
from fedgex.server.federation import public_cohort
from fedgex.simulations import resumable, training
from fedgex.simulations.data.split import HOLDOUT, PUBLIC, read_cohort, split
from fedgex.simulations.evaluation.protocol import Measure
from fedgex.simulations.evaluation.table import markdown, mean_sd, sd
from fedgex.simulations.privacy.effort import EPSILONS, SEEDS
from fedgex.simulations.privacy.measures import MEASURES, evaluate
from fedgex.simulations.scenario import Scenario, shortened

QUICK_ROUNDS = 2
"""Most rounds of a phase with --quick, which also takes one seed: enough to see that it
works, too little to believe."""
ALL_RANK = 128
"""Factors of the linear start where the hospitals share their own statistics."""

PUBLIC_ONLY = "public cohort only"
SAME_START = "without privacy, same start"
ALL_OF_IT = "without privacy, all of it"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Privacy and measures of one column of the table."""

    name: str
    epsilon: float | None
    """Budget of a patient over all rounds; None without privacy."""
    noise_multiplier: float | None
    values: Mapping[str, Sequence[float]]
    """Of each measure that the study can be judged by, one value a seed."""
    seconds: Sequence[float]
    """Wall time of each seed's training and judging."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of a comparison."""

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
    """Data that all models share."""

    sites: Mapping[str, Cohort]
    public: Cohort
    holdout: Cohort
    genes: Vocabulary


Cells = dict[str, list[Study]]
"""Studies of each condition, one a seed; a model is trained for each."""


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
    cells: Cells = {}
    for number in numbers:
        own = study.model_copy(update={"seed": number})
        for name, each in _conditions(own, epsilons, len(ground.genes)).items():
            cells.setdefault(name, []).append(each)
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
        conditions=[_condition(*each, found[each[0]]) for each in cells.items()],
        notes=notes,
    )
    (out / "utility.json").write_text(report.to_json())
    (out / "utility.md").write_text("\n".join(table(report)) + "\n")
    _draw(report, out / "utility.png")
    return report


def table(report: Report) -> list[str]:
    """Return the results as lines of Markdown, one column for each condition."""
    plain = [c for c in report.conditions if c.name in (SAME_START, ALL_OF_IT)]
    rows = {
        measure.name: {
            each.name: mean_sd(each.values[measure.key])
            + (_against(measure, each, plain) if each.epsilon is not None else "")
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
        PUBLIC_ONLY: plain,
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
    ground: _Ground, cells: Cells, folder: Path, workers: int, console: Console
) -> dict[str, list[dict[str, float]]]:
    """Return the measures of every cell, computed if they are not there yet."""
    jobs = {
        _path(folder, condition, study): (condition, study)
        for condition, studies in cells.items()
        for study in studies
    }
    n_absent = sum(not path.exists() for path in jobs)
    console.print(f"{len(jobs)} models, {n_absent} to train", highlight=False)

    def named(job: tuple[str, Study]) -> str:
        return f"{job[0]}, seed {job[1].seed}"

    resumable.compute_all(partial(_judged, ground), jobs, workers, console, named)
    return {
        name: [resumable.load(_path(folder, name, study)) for study in studies]
        for name, studies in cells.items()
    }


def _path(folder: Path, condition: str, study: Study) -> Path:
    public = "-public" if condition == PUBLIC_ONLY else ""
    return folder / f"{study.hash[:16]}{public}.json"


def _judged(ground: _Ground, job: tuple[str, Study]) -> dict[str, float]:
    """Train one model; return its measures, and `seconds`."""
    started, (condition, study) = time.monotonic(), job
    known = ground.public if public_cohort.is_wanted(study) else None
    begun = training.begin(study, ground.genes, ground.sites, known)
    apart = None
    if known is not None:
        apart = to_patients(known, ground.genes, begun.standardisation)
    if condition == PUBLIC_ONLY:
        trained = begun.parameters
        for phase in study.phases:
            trained = federation.begin_phase(study, phase, trained, apart)
    else:
        patients = {
            name: to_patients(cohort, ground.genes, begun.standardisation)
            for name, cohort in ground.sites.items()
        }
        trained = training.train(begun, patients, public=apart).parameters
    scale, holdout = begun.standardisation, ground.holdout
    values = evaluate(study, trained, scale, ground.genes, holdout, ground.public)
    return values | {"seconds": time.monotonic() - started}


# ---- output ----


def _condition(
    name: str, studies: Sequence[Study], found: Sequence[Mapping[str, float]]
) -> Condition:
    """Return a condition with the values of its seeds."""
    rule = studies[0].privacy.patient
    noise = None if rule is None else accounting.noise_multiplier(studies[0])
    return Condition(
        name=name,
        epsilon=None if rule is None else rule.epsilon,
        noise_multiplier=noise,
        values={
            measure.key: [each[measure.key] for each in found]
            for measure in MEASURES
            if all(measure.key in each for each in found)
        },
        seconds=[each["seconds"] for each in found],
    )


def _measured(report: Report) -> list[Measure]:
    """Return the measures that every condition has."""
    return [
        measure
        for measure in MEASURES
        if all(measure.key in each.values for each in report.conditions)
    ]


def _against(measure: Measure, each: Condition, plain: Sequence[Condition]) -> str:
    """Return the change against each condition without privacy."""
    own = float(np.mean(each.values[measure.key]))
    others = [float(np.mean(other.values[measure.key])) for other in plain]
    if measure.better == "lower":
        changes = [f"{100 * (own / other - 1):+.1f} %" for other in others]
    else:
        changes = [f"{own - other:+.3f}" for other in others]
    return f" ({', '.join(changes)})"


def _draw(report: Report, path: Path) -> None:
    """Draw each measure against epsilon, with a line for each condition without."""
    private = [each for each in report.conditions if each.epsilon is not None]
    epsilons = [float(each.epsilon or 0) for each in private]
    styles = {PUBLIC_ONLY: ":", SAME_START: "--", ALL_OF_IT: "-"}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid, shown = figure.subplots(2, 3, squeeze=False).flat, _measured(report)
    for axes, measure in zip(grid, MEASURES, strict=True):
        if measure not in shown:
            axes.set_visible(False)
            continue
        runs = [each.values[measure.key] for each in private]
        bars = [np.mean(each) for each in runs], [sd(each) for each in runs]
        axes.errorbar(epsilons, *bars, marker="o", capsize=3, label="with privacy")
        for each in report.conditions:
            if each.name in styles:
                look = {"color": "grey", "linestyle": styles[each.name]}
                level = float(np.mean(each.values[measure.key]))
                axes.axhline(level, label=each.name, **look)
        axes.set(xscale="log", xlabel="epsilon", title=measure.name)
        axes.title.set_fontsize("small")
        axes.set_xticks(epsilons, labels=[f"{each:g}" for each in epsilons])
        axes.minorticks_off()
    if shown:
        visible = next(axes for axes in figure.axes if axes.get_visible())
        legend = visible.get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
