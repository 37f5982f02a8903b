"""What can be told of patients from a federation's model, measured by attacking it.

    sites -> half of each one's patients train (members), half do not (non-members)
    -> model -> losses -> membership attacks
    -> shadow models on other halves -> likelihood ratios
    model with canaries, inserted by coin flips -> least epsilon
    gradient of a first step -> patients recovered from it

All of it without privacy and, if the study has it, with. What the numbers mean stands
in docs/audit.md. N patients of all sites, M shadow models, V genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.vocabulary import Vocabulary
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
from fedgex.common.study import CLASSIFICATION, PRETRAINING, SURVIVAL, Privacy, Study
from fedgex.simulations.effort import CANARIES, SHADOWS
from fedgex.simulations.processes import each_done
from fedgex.simulations.scenario import Scenario, shortened
from fedgex.simulations.split import PUBLIC, Split, read_cohort, split
from fedgex.simulations.training import begin, train, vocabulary

RESTORATION = "restoration"
DELTA = 1e-5
"""Of the canaries' bound where the study names none."""
QUICK_ROUNDS, QUICK_SHADOWS, QUICK_CANARIES = 2, 4, 40
"""Of --quick: enough to see that it works, too little to believe."""

Losses = Mapping[str, NDArray[np.float64]]
"""Of each patient, shape (N,), by task; and of the canaries, see `_attacked`."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is computed."""

    shadows: int = SHADOWS
    """Shadow models, M: even, 4 or more; each pair are complements, so that every
    patient is in half of them."""
    canaries: int = CANARIES
    inverted: int = 4
    """Patients whose gradients are inverted: one by one, by two, and so on."""
    inversion_steps: int = attacks.STEPS
    rounds: int | None = None
    """Most rounds of a phase; None: the study's."""

    def __post_init__(self) -> None:
        """Refuse what no attack could be made with."""
        if self.shadows < 4 or self.shadows % 2:
            raise ConfigError(
                f"{self.shadows} shadow models were asked for; expected an even number "
                "of 4 or more."
            )
        if self.canaries < 10:
            raise ConfigError(
                f"{self.canaries} canaries were asked for; expected 10 or more."
            )


QUICK = Effort(
    shadows=QUICK_SHADOWS,
    canaries=QUICK_CANARIES,
    inverted=2,
    inversion_steps=60,
    rounds=QUICK_ROUNDS,
)


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What all models of an audit share."""

    sites: Mapping[str, Cohort]
    """One row a patient, sorted by site."""
    public: Cohort | None
    genes: Vocabulary
    seed: int

    @property
    def n_patients(self) -> int:
        return sum(len(cohort.patients) for cohort in self.sites.values())

    def half(self, *names: str | int) -> NDArray[np.bool_]:
        """Draw half of each site's patients, shape (N,)."""
        parts = []
        for name, cohort in self.sites.items():
            n = len(cohort.patients)
            order = torch.randperm(n, generator=generator(self.seed, *names, name))
            parts.append((order < n // 2).numpy())
        return np.concatenate(parts)

    def of(self, site: str, everybody: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return one site's part of a mask (N,)."""
        sizes = [len(cohort.patients) for cohort in self.sites.values()]
        place = list(self.sites).index(site)
        return np.split(everybody, np.cumsum(sizes)[:-1])[place]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A model to train and to attack."""

    name: str
    study: Study
    inside: NDArray[np.bool_]
    """Patients who train, shape (N,)."""
    inserted: NDArray[np.bool_]
    """Canaries who train, shape (canaries,)."""


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
    ground, notes = _ground(study, parts, out)
    jobs = list(_jobs(ground, study, effort))
    losses = _all(ground, jobs, out / "models", scenario.run.workers, console)
    membership, curves = [], {}
    rule = study.privacy.patient
    delta = DELTA if rule is None else rule.delta
    canaries: list[CanaryTest] = []
    inversions: list[Inversion] = []
    for training, own in _trainings(study).items():
        for attack, scores in _membership(ground, training, own, losses, effort):
            membership.append(attack)
            curves[f"{_said(attack)}, {_HOW[training]}"] = attacks.curve(*scores)
        test = _canary_test(training, own, losses, ground, effort, delta)
        canaries.append(test)
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
    """Return what was found as lines of Markdown, one column for each model."""
    found = {each.training for each in report.membership}
    trainings = [training for training in _HOW if training in found]
    rows: dict[str, dict[Training, str]] = {}
    for each in report.membership:
        name = _said(each)
        counted = f"{each.members} members, {each.non_members} non-members"
        rows.setdefault(f"{name}: AUC ({counted})", {})[each.training] = _told(each.auc)
        for at in each.found:
            rate = at.true_positive_rate
            said = at.note if rate is None else _told(rate)
            row = f"{name}: TPR at {at.false_positive_rate:.1%} FPR"
            rows.setdefault(row, {})[each.training] = said
    for test in report.canaries:
        row = f"{test.canaries} canaries: right guesses"
        said = f"{test.correct} of {test.guesses}"
        rows.setdefault(row, {})[test.training] = said
        row = f"canaries: epsilon is at least (delta {test.delta:g})"
        rows.setdefault(row, {})[test.training] = f"{test.least_epsilon:.2f}"
        claimed = test.claimed_epsilon
        said = "none" if claimed is None else f"{claimed:.2f}"
        rows.setdefault("claimed epsilon", {})[test.training] = said
    for each_one in report.inversions:
        row = f"gradient of {each_one.batch}: r, squared error (of the mean)"
        rows.setdefault(row, {})[each_one.training] = (
            f"{each_one.correlation:.3f}, {each_one.mse:.3f} "
            f"({each_one.mse_of_mean:.3f})"
        )
    lines = [
        "| | " + " | ".join(_HOW[training] for training in trainings) + " |",
        "|---" * (len(trainings) + 1) + "|",
    ]
    for row, cells in rows.items():
        said = " | ".join(cells.get(training, "") for training in trainings)
        lines.append(f"| {row} | {said} |")
    intervals = f"In brackets: intervals of {report.confidence:.0%} confidence."
    return [*lines, "", intervals, *(f"Note: {note}." for note in report.notes)]


_HOW: dict[Training, str] = {
    "plain": "without privacy",
    "private": "with privacy",
    "released": "model at hand",
}


def _ground(study: Study, parts: Split, out: Path) -> tuple[_Ground, list[str]]:
    """Read the sites; those too small for two halves are left out with a note."""
    sites, small = {}, []
    for name in parts.sites:
        cohort = read_cohort(out / "sites" / name, study)
        if len(cohort.patients) >= 2 * study.minimum_cohort:
            sites[name] = cohort
        else:
            small.append(name)
    if not sites:
        raise ConfigError(
            f"none of {len(parts.sites)} sites has {2 * study.minimum_cohort} "
            "patients, twice the study's minimum cohort, of which half would train; "
            "choose larger sites."
        )
    notes = list(parts.notes)
    if small:
        notes.append(f"left out, too small for two halves: {', '.join(small)}")
    public = read_cohort(out / PUBLIC, study) if parts.public_size else None
    ground = _Ground(
        sites=sites,
        public=public,
        genes=vocabulary(study, sites, public),
        seed=derive(study.seed, "audit"),
    )
    return ground, notes


# ---- models ----


def _trainings(study: Study) -> dict[Training, Study]:
    """Return the study without privacy and, if it has any, with it."""
    plain = study.model_copy(update={"privacy": Privacy()})
    if study.privacy == Privacy():
        return {"plain": plain}
    return {"plain": plain, "private": study}


def _jobs(ground: _Ground, study: Study, effort: Effort) -> Iterator[_Job]:
    nobody = np.zeros(effort.canaries, dtype=bool)
    for own in _trainings(study).values():
        members = ground.half("members")
        yield _Job(name=_target(own), study=own, inside=members, inserted=nobody)
        yield _Job(
            name=_with_canaries(own, effort),
            study=own,
            inside=members,
            inserted=_coins(ground, effort),
        )
        for number, inside in enumerate(_shadows(ground, effort)):
            name = _shadow(own, number)
            yield _Job(name=name, study=own, inside=inside, inserted=nobody)


def _target(study: Study) -> str:
    return f"{study.hash[:12]}-target"


def _with_canaries(study: Study, effort: Effort) -> str:
    return f"{study.hash[:12]}-canaries-{effort.canaries}"


def _shadow(study: Study, number: int) -> str:
    return f"{study.hash[:12]}-shadow-{number:03d}"


def _shadows(ground: _Ground, effort: Effort) -> list[NDArray[np.bool_]]:
    """Return who is in each shadow model, (N,) each."""
    halves = [ground.half("shadow", pair) for pair in range(effort.shadows // 2)]
    return [each for half in halves for each in (half, ~half)]


def _coins(ground: _Ground, effort: Effort) -> NDArray[np.bool_]:
    rng = generator(ground.seed, "coins")
    return (torch.rand(effort.canaries, generator=rng) < 0.5).numpy()


def _all(
    ground: _Ground, jobs: list[_Job], folder: Path, workers: int, console: Console
) -> dict[str, Losses]:
    """Return the losses under every model, trained if they are not there yet."""
    folder.mkdir(exist_ok=True)
    paths = {job.name: folder / f"{job.name}.npz" for job in jobs}
    todo = [job for job in jobs if not paths[job.name].exists()]
    console.print(f"{len(jobs)} models, {len(todo)} to train", highlight=False)

    attacked = each_done(partial(_attacked, ground), todo, workers)
    for done, (job, found) in enumerate(attacked, start=1):
        unfinished = paths[job.name].with_suffix(".partial.npz")
        np.savez(unfinished, allow_pickle=False, **found)
        unfinished.replace(paths[job.name])
        console.print(f"trained {done} of {len(todo)}", highlight=False)
    return {name: dict(np.load(path)) for name, path in paths.items()}


def _attacked(ground: _Ground, job: _Job) -> Losses:
    """Train a model and return the losses of all patients, members or not.

    With canaries also theirs, before (`canaries-start`) and after (`canaries`).
    """
    study = job.study
    members = {
        name: cohort.take(ground.of(name, job.inside))
        for name, cohort in ground.sites.items()
    }
    begun = begin(study, ground.genes, members, ground.public)
    canaries = _canaries(ground, len(job.inserted))
    patients_of = {}
    for name, cohort in members.items():
        patients = to_patients(cohort, ground.genes, begun.standardisation)
        own = [i for i, (site, _) in enumerate(canaries) if site == name]
        added = [canaries[i][1] for i in own if job.inserted[i]]
        patients_of[name] = Patients.joined([patients, *added])
    # No attack looks at survival, and no other phase hears of it.
    public = None
    if ground.public is not None:
        public = to_patients(ground.public, ground.genes, begun.standardisation)
    trained = train(begun, patients_of, public=public, without=(SURVIVAL,))
    whole = trained.parameters
    everybody = Patients.joined(
        [
            to_patients(cohort, ground.genes, begun.standardisation)
            for cohort in ground.sites.values()
        ]
    )
    seed = derive(ground.seed, "masks")

    def restored(
        parameters: tasks.Parameters, patients: Patients
    ) -> NDArray[np.float64]:
        backbone = _backbone(study, ground.genes, parameters)
        return attacks.restoration_losses(backbone, patients, seed)

    losses = {RESTORATION: restored(whole, everybody)}
    if CLASSIFICATION in study.phases:
        modules = tasks.load_classifier(study, len(ground.genes), whole)
        classes = study.classification.classes
        found = attacks.classification_losses(modules, everybody, classes)
        losses[CLASSIFICATION] = found
    if job.inserted.any():
        every = Patients.joined([canary for _, canary in canaries])
        losses["canaries-start"] = restored(begun.parameters, every)
        losses["canaries"] = restored(whole, every)
    return losses


def _canaries(ground: _Ground, n: int) -> list[tuple[str, Patients]]:
    """Return made-up patients and their sites, in turn: standard normal expression.

    They have the genes that their site measures, and neither type nor follow-up, so
    that they train in pretraining alone.
    """
    rng = generator(ground.seed, "canaries")
    names = list(ground.sites)
    made = []
    for i in range(n):
        cohort = ground.sites[names[i % len(names)]]
        placed = ground.genes.place(cohort.genes, cohort.expression)
        measured = torch.from_numpy(~np.isnan(placed)).any(dim=0)
        values = torch.randn(1, len(ground.genes), generator=rng)
        unknown = torch.full((1,), torch.nan)
        patient = Patients(
            values=torch.where(measured, values, torch.nan),
            cancer_type=(None,),
            duration=unknown,
            event=unknown,
            clinical=torch.zeros(1, 2),
        )
        made.append((names[i % len(names)], patient))
    return made


def _backbone(study: Study, genes: Vocabulary, whole: tasks.Parameters) -> GexBert:
    return tasks.load_backbone(study, len(genes), whole)


# ---- attacks ----


def _membership(
    ground: _Ground,
    training: Training,
    study: Study,
    losses: Mapping[str, Losses],
    effort: Effort,
) -> Iterator[tuple[Membership, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Yield each attack, and the scores of members and of non-members."""
    target = losses[_target(study)]
    members, inside = ground.half("members"), np.array(_shadows(ground, effort))
    for task in get_args(Task):
        if task not in target:
            continue
        shadows = np.array(
            [losses[_shadow(study, i)][task] for i in range(effort.shadows)]
        )
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
    ground: _Ground,
    effort: Effort,
    delta: float,
) -> CanaryTest:
    found = losses[_with_canaries(study, effort)]
    scores = found["canaries-start"] - found["canaries"]
    bound = attacks.canary_bound(scores, _coins(ground, effort), delta)
    rule, claimed = study.privacy.patient, None
    if rule is not None:
        claimed = accounting.epsilon(
            accounting.planned(study), rule.delta, rule.accountant
        )
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
    ground: _Ground, training: Training, study: Study, effort: Effort
) -> Iterator[Inversion]:
    """Yield how well patients of the largest site are recovered, by size of batch."""
    members = {
        name: cohort.take(ground.of(name, ground.half("members")))
        for name, cohort in ground.sites.items()
    }
    begun = begin(study, ground.genes, members, ground.public)
    largest = max(members, key=lambda name: len(members[name].patients))
    patients = to_patients(members[largest], ground.genes, begun.standardisation)
    backbone = _backbone(study, ground.genes, begun.parameters)
    batch = 1
    while batch <= effort.inverted:
        found = [
            _inverted(backbone, study, rows, effort, derive(ground.seed, batch, number))
            for number, rows in enumerate(
                patients.values[: effort.inverted].split(batch)
            )
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
        batch *= 2


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
        each = [
            attacks.gradient(
                backbone, x[i : i + 1], measured[i : i + 1], hidden[i : i + 1]
            )
            for i in range(len(x))
        ]
        return attacks.clipped_mean(each, rule.clip)

    noise = 0.0
    if rule is not None:
        noise = accounting.noise_multiplier(study) * rule.clip / len(values)
    drawn = generator(seed, "noise")
    observed = [
        part.detach() + noise * torch.randn(part.shape, generator=drawn)
        for part in gradient_of(values.nan_to_num(0.0))
    ]
    recovered = attacks.invert(
        gradient_of,
        observed,
        tuple(values.shape),
        generator(seed, "start"),
        noise=noise,
        steps=effort.inversion_steps,
    )
    return attacks.recovery(values, recovered)


# ---- output ----


def _said(attack: Membership) -> str:
    return f"{attack.attack} attack, {attack.task}"


def _told(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _draw(
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], path: Path
) -> None:
    """Draw the ROC curves on log axes, where a few certain finds are seen."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    least = 1e-3
    for name, (false, true) in curves.items():
        axes.step(
            np.maximum(false, least), np.maximum(true, least), where="post", label=name
        )
    axes.plot([least, 1], [least, 1], color="grey", linestyle=":", label="guessing")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(least, 1),
        ylim=(least, 1),
        xlabel="non-members taken for members",
        ylabel="members found",
    )
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
