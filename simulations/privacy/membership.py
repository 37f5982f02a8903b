"""Information about patients that a federation's model reveals, measured by attacks.

    sites -> half of each one's patients train (members), half do not (non-members)
    -> model -> losses -> membership attacks
    -> shadow models on other halves -> likelihood ratios
    model with canaries, inserted by coin flips -> least epsilon
    gradient of a first step -> patients recovered from it

All of it without privacy and, if the study has it, with. docs/audit.md explains the
numbers. N patients of all sites, M shadow models, V genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.dataset import to_patients
from fedgex.common.errors import ConfigError
from fedgex.common.models import tasks
from fedgex.common.models.gexbert import GexBert
from fedgex.common.models.masking import draw_hidden
from fedgex.common.privacy import accounting, attacks
from fedgex.common.privacy.audit_report import (
    AuditReport,
    CanaryTest,
    Interval,
    Inversion,
    Membership,
    Task,
    Training,
    Way,
)
from fedgex.common.seeds import derive, generator
from fedgex.common.study import PRETRAINING, Study
from fedgex.simulations.data.split import split
from fedgex.simulations.evaluation.table import markdown
from fedgex.simulations.privacy import shadow_models
from fedgex.simulations.privacy.shadow_models import Effort, Ground, Losses
from fedgex.simulations.scenario import Scenario, shortened
from fedgex.simulations.training import begin

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
DELTA = 1e-5
"""Of the canaries' bound where the study names none."""
QUICK = Effort(shadows=4, canaries=40, inverted=2, inversion_steps=60, rounds=2)
"""Of --quick: enough to see that it works, too little to believe."""


def audit(
    scenario: Scenario, data_dir: Path, out: Path, console: Console, effort: Effort
) -> AuditReport:
    """Audit a scenario; what was trained before in `out` is not trained again.

    Writes audit.json, audit.md and audit.png to `out`.

    Raises
    ------
    ConfigError
        If the data do not fit, the study has no pretraining, or no site has enough
        patients for two halves.
    """
    study = shortened(scenario.study, effort.rounds)
    if PRETRAINING not in study.phases:
        raise ConfigError(
            "the study has no pretraining, which the audit attacks; set "
            "pretraining.rounds to 1 or more."
        )
    out.mkdir(parents=True, exist_ok=True)
    parts = split(scenario, data_dir, out)
    ground, notes = shadow_models.read_ground(study, parts, out)
    jobs = list(shadow_models.jobs_of(ground, study, effort))
    losses = shadow_models.all_losses(
        ground, jobs, out / "models", scenario.run.workers, console
    )
    membership, curves = list[Membership](), dict[str, Curve]()
    canaries, inversions = list[CanaryTest](), list[Inversion]()
    rule = study.privacy.patient
    delta = DELTA if rule is None else rule.delta
    for training, own in shadow_models.trainings(study).items():
        for attack, scores in _membership(ground, training, own, losses, effort):
            membership.append(attack)
            curves[f"{_named(attack)}, {_HOW[training]}"] = attacks.curve(*scores)
        canaries.append(_canary_test(training, own, losses, ground, effort, delta))
        console.print(f"inverting gradients, {_HOW[training]}", highlight=False)
        inversions += _inversions(ground, training, own, effort)
    if effort.rounds is not None:
        notes.append(
            f"quick: at most {effort.rounds} rounds of each phase; no number here says "
            "anything of the study"
        )
    report = AuditReport(
        kind="simulation",
        study=study.name,
        study_hash=study.hash,
        membership=tuple(membership),
        canaries=tuple(canaries),
        inversions=tuple(inversions),
        notes=tuple(notes),
    )
    (out / "audit.json").write_text(report.to_json())
    (out / "audit.md").write_text("\n".join(table(report)) + "\n")
    _draw(curves, out / "audit.png")
    return report


def table(report: AuditReport) -> list[str]:
    """Return the results as lines of Markdown, one column for each model."""
    rows: dict[str, dict[str, str]] = {}

    def add(row: str, training: Training, cell: str) -> None:
        rows.setdefault(row, {})[_HOW[training]] = cell

    for each in report.membership:
        name = _named(each)
        counted = f"{each.members} members, {each.non_members} non-members"
        add(f"{name}: AUC ({counted})", each.training, _with_bounds(each.auc))
        for at in each.found:
            rate = at.true_positive_rate
            row = f"{name}: TPR at {at.false_positive_rate:.1%} FPR"
            add(row, each.training, at.note if rate is None else _with_bounds(rate))
    for test in report.canaries:
        guesses = f"{test.correct} of {test.guesses}"
        add(f"{test.canaries} canaries: right guesses", test.training, guesses)
        row = f"canaries: epsilon is at least (delta {test.delta:g})"
        add(row, test.training, f"{test.least_epsilon:.2f}")
        claimed = test.claimed_epsilon
        shown = "none" if claimed is None else f"{claimed:.2f}"
        add("claimed epsilon", test.training, shown)
    for one in report.inversions:
        row = f"gradient of {one.batch}: r, squared error (of the mean)"
        found = f"{one.correlation:.3f}, {one.mse:.3f} ({one.mse_of_mean:.3f})"
        add(row, one.training, found)
    intervals = f"In brackets: intervals of {report.confidence:.0%} confidence."
    lines = markdown("measure", rows).splitlines()
    return [*lines, "", intervals, *(f"Note: {note}." for note in report.notes)]


_HOW: dict[Training, str] = {
    "plain": "without privacy",
    "private": "with privacy",
    "released": "model at hand",
}


# ---- attacks ----


def _membership(
    ground: Ground,
    training: Training,
    study: Study,
    losses: Mapping[str, Losses],
    effort: Effort,
) -> Iterator[tuple[Membership, Curve]]:
    """Yield each attack, and the scores of members and of non-members."""
    target = losses[shadow_models.name(study, shadow_models.TARGET)]
    members = ground.half("members")
    inside = np.array(shadow_models.shadows(ground, effort))
    names = [
        shadow_models.name(study, shadow_models.shadow(i)) for i in range(len(inside))
    ]
    for task in [each for each in get_args(Task) if each in target]:
        shadows = np.array([losses[name][task] for name in names])
        known = ~np.isnan(target[task])
        ratios = attacks.likelihood_ratios(
            attacks.fit_of(target[task][known], task),
            attacks.fit_of(shadows[:, known], task),
            inside[:, known],
        )
        chosen = members[known]
        by_way: dict[Way, NDArray[np.float64]] = {
            "loss": -target[task][known],
            "likelihood-ratio": ratios,
        }
        for name, scores in by_way.items():
            pair = scores[chosen], scores[~chosen]
            yield Membership.of(attacks.roc(*pair), training, name, task), pair


def _canary_test(
    training: Training,
    study: Study,
    losses: Mapping[str, Losses],
    ground: Ground,
    effort: Effort,
    delta: float,
) -> CanaryTest:
    found = losses[shadow_models.name(study, shadow_models.canaries(effort))]
    scores = found["canaries-start"] - found["canaries"]
    rule, claimed = study.privacy.patient, None
    bound = attacks.canary_bound(scores, shadow_models.coins(ground, effort), delta)
    if rule is not None:
        planned = accounting.planned(study)
        claimed = accounting.epsilon(planned, rule.delta, rule.accountant)
    return CanaryTest(
        training=training,
        canaries=bound.canaries,
        guesses=bound.guesses,
        correct=bound.correct,
        delta=delta,
        least_epsilon=bound.epsilon,
        claimed_epsilon=claimed,
    )


def _inversions(
    ground: Ground, training: Training, study: Study, effort: Effort
) -> Iterator[Inversion]:
    """Yield how well patients of the largest site are recovered, by size of batch."""
    members = {
        name: cohort.take(ground.of(name, ground.half("members")))
        for name, cohort in ground.sites.items()
    }
    begun = begin(study, ground.genes, members, ground.public)
    largest = max(members, key=lambda name: len(members[name].patients))
    patients = to_patients(members[largest], ground.genes, begun.standardisation)
    backbone = tasks.load_backbone(study, len(ground.genes), begun.parameters)
    some = patients.values[: effort.inverted]
    for batch in (2**k for k in range(effort.inverted.bit_length())):
        found = [
            _inverted(backbone, study, rows, effort, derive(ground.seed, batch, number))
            for number, rows in enumerate(some.split(batch))
            if len(rows) == batch
        ]
        yield Inversion(
            training=training,
            batch=batch,
            correlation=float(np.mean([each.correlation for each in found])),
            best_correlation=max(each.best_correlation for each in found),
            mse=float(np.mean([each.mse for each in found])),
            mse_of_mean=float(np.mean([each.mse_of_mean for each in found])),
        )


def _inverted(
    backbone: GexBert, study: Study, values: torch.Tensor, effort: Effort, seed: int
) -> attacks.Recovery:
    """Attack the gradient of one step on these patients (B, V), as it would leave."""
    measured = ~values.isnan()
    rng = generator(seed, "hidden")
    hidden = draw_hidden(values, measured, study.pretraining.masking, rng)
    rule = study.privacy.patient

    def gradient_of(x: torch.Tensor) -> list[torch.Tensor]:
        if rule is None:
            return attacks.gradient(backbone, x, measured, hidden)
        rows = zip(x.split(1), measured.split(1), hidden.split(1), strict=True)
        each = [attacks.gradient(backbone, *row) for row in rows]
        return attacks.clipped_mean(each, rule.clip)

    noise = 0.0
    if rule is not None:
        noise = accounting.noise_multiplier(study) * rule.clip / len(values)
    drawn = generator(seed, "noise")
    observed = [
        part.detach() + noise * torch.randn(part.shape, generator=drawn)
        for part in gradient_of(values.nan_to_num(0.0))
    ]
    start, shape = generator(seed, "start"), tuple(values.shape)
    recovered = attacks.invert(
        gradient_of, observed, shape, start, noise=noise, steps=effort.inversion_steps
    )
    return attacks.recovery(values, recovered)


# ---- output ----


def _named(attack: Membership) -> str:
    return f"{attack.attack} attack, {attack.task}"


def _with_bounds(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw the ROC curves on log axes, where a few certain finds are seen."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    least = 1e-3
    for name, rates in curves.items():
        axes.step(*np.maximum(rates, least), where="post", label=name)
    axes.plot([least, 1], [least, 1], color="grey", linestyle=":", label="guessing")
    axes.set(xscale="log", xlim=(least, 1), xlabel="non-members taken for members")
    axes.set(yscale="log", ylim=(least, 1), ylabel="members found")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
