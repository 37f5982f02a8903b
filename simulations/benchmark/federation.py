"""What federation contributes: against pooled, against alone, and where sites differ.

    arms -> models -> per-patient results, kept in files -> tables and one figure

An arm changes the study (how updates become one model) or the sites (small ones, other
panels, a foreign scale); all are judged on the same unseen patients, cells and panels.
N unseen patients, V genes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file, save_file

from fedgex.client.local_training import train_round
from fedgex.client.settings import SiteSettings
from fedgex.client.validation import load_cohort
from fedgex.common import predictions, statistics, tasks
from fedgex.common import scale as scales
from fedgex.common.codes import Code
from fedgex.common.cohort import Cohort, read_parquet
from fedgex.common.errors import DataError, Finding
from fedgex.common.harmonise import Patients
from fedgex.common.phases import take_part
from fedgex.common.scale import CONVERTIBLE, Scale
from fedgex.common.seeds import derive
from fedgex.common.statistics import GeneMoments
from fedgex.common.study import (
    CLASSIFICATION,
    PRETRAINING,
    SURVIVAL,
    Evaluation,
    LocalTraining,
    StrategyRule,
    Study,
)
from fedgex.common.survival_metrics import stratified_c_index
from fedgex.server import evaluation
from fedgex.simulations import in_process, references
from fedgex.simulations.benchmark.ground import (
    FEDERATED,
    POOLED,
    Arm,
    Ground,
    Model,
    arms,
    models,
)
from fedgex.simulations.benchmark.outcome import Outcome, Section, plain
from fedgex.simulations.benchmark.tables import markdown, paired_p, spread
from fedgex.simulations.comparisons import cached

Floats = NDArray[np.float32]
Judged = Mapping[str, Floats]
"""One number an unseen patient, shape (N,), by name: `squares/K` and `cells/K` (squared
error over hidden cells, and how many these are), `hit/P` (1 if the type was told, NaN
if the study does not know it), `risk`."""

ABOUT_NUMBERS = frozenset(
    {
        Code.NOT_A_NUMBER,
        Code.INFINITE,
        Code.NEGATIVE_EXPRESSION,
        Code.SCALE_IMPOSSIBLE,
        Code.SCALE_FAINT,
        Code.SCALE_NOT_CONVERTIBLE,
        Code.LIBRARY_SIZE_UNUSABLE,
        Code.COUNTS_PER_MILLION,
    }
)
"""Findings about the numbers in an expression file: their kind and their scale."""
RESTORED = Evaluation(rates=(0.5, 0.9), panels=(100,))
DROPPED_OUT = Evaluation(rates=(0.5,), panels=())
"""Low expression: there the network adds to the linear start in every study."""
SMALL_PANEL = 32
"""Genes of the small panel from which the cancer type is told."""
DRAWS = 3
"""Small panels drawn for each seed."""
MIN_EVENTS = 10
"""Fewer deaths of unseen patients than this, and no C-index is estimated."""
TEN = 10
"""Patients that are left at a site which is made small."""
PANEL_SHARE = 0.6
"""Of its genes that a site measures, where panels differ."""
PULL = 0.01
"""FedProx's weight of the proximal term."""
POOLED_WITHIN, PANELS_WITHIN = 1.02, 1.05
"""Goals: error of the federated model over that of the pooled one, and error with
different panels over that with full ones."""
QUICK_ALONE = 3
"""Sites that train alone with --quick, the largest."""
FOREIGN: dict[str, tuple[str, Scale]] = {
    "log10": ("log10(x + 1)", Scale.LOG10P1),
    "ln": ("ln(x + 1)", Scale.LN1P),
    "counts": ("whole numbers, not logarithms", Scale.LINEAR),
}
"""What a site may have exported by mistake, beside the scale that it names."""

AT_SERVER = ("gene means", "change of the model")
"""What the server looks at, before the first round and in each."""
NOT_ESTIMABLE = "not estimable"
ALONE = "alone, mean over sites"
AMONG = "federated among"
"""The federated model, told which cancers a site has."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One thing that is judged on unseen patients."""

    key: str
    name: str
    better: Literal["lower", "higher"]

    def against(self, one: float, other: float) -> float:
        """Return by what factor `one` is worse (above 1) or better than `other`."""
        worse, better = (one, other) if self.better == "lower" else (other, one)
        return worse / better if better else math.inf

    @property
    def of_types(self) -> bool:
        """Whether it tells how well cancer types are told."""
        return self.key.startswith("accuracy")

    def is_better(self, one: float, other: float) -> bool:
        """Return whether `one` is the better value."""
        return one < other if self.better == "lower" else one > other


MEASURES = (
    Measure(key="mse-0.5", name="MSE, 50 % hidden", better="lower"),
    Measure(key="mse-0.9", name="MSE, 90 % hidden", better="lower"),
    Measure(key="mse-panel-100", name="MSE from 100 genes", better="lower"),
    Measure(key="mse-mnar-0.5", name="MSE, 50 % dropped out", better="lower"),
    Measure(
        key=f"accuracy-{SMALL_PANEL}",
        name=f"accuracy, {SMALL_PANEL} genes",
        better="higher",
    ),
    Measure(key="accuracy", name="accuracy, all genes", better="higher"),
    Measure(key="c-index", name="C-index", better="higher"),
)
ERRORS = tuple(measure for measure in MEASURES if measure.better == "lower")

Values = dict[str, float]
"""Value of each measure by its key; NaN where it cannot be told."""


def run(grounds: Callable[[int], Ground], console: Console) -> Outcome:
    """Compare the federation with pooled and alone, and with itself where sites differ.

    All seeds for federated and pooled; the first alone for all others.
    """
    bench = _Bench(grounds(0), console)
    both, alone = bench.central(), bench.alone()
    parts = [
        _central(bench, both, alone),
        _each_site(bench, both[FEDERATED][0], alone),
        _variants(bench),
        _small_sites(bench),
        _panels(bench),
        _foreign(bench),
    ]
    ratios = {name: _ratios(bench, values) for name, values in bench.drawn.items()}
    numbers = {key: value for _, part in parts for key, value in part.items()}
    return Outcome(
        name="federation",
        sections=[section for section, _ in parts]
        + [
            Section(
                title="All of it",
                lines=[
                    "Restoration error of each way to train, against the pooled "
                    "model's, first seed. The bar of a hospital alone is cut off."
                ],
                figure="ratios",
            )
        ],
        numbers=plain(numbers | {"error_against_pooled": ratios}),
        figures={"ratios": _draw(ratios)},
    )


# ---- training and judging ----


@dataclass(frozen=True)
class _Bench:
    """A ground, and what has been judged on it."""

    ground: Ground
    console: Console
    drawn: dict[str, Values] = dataclasses.field(default_factory=dict)
    """What the figure shows: values by the reader's name of an arm, in order."""

    @property
    def seed(self) -> int:
        """The first one."""
        return self.ground.seeds[0]

    @property
    def study(self) -> Study:
        """The study with the first seed."""
        return self.ground.seeded(self.seed)

    @cached_property
    def unseen(self) -> Patients:
        """Who judges, on the unit of the ground."""
        return self.ground.patients(self.ground.unseen)

    def among(self, types: set[str]) -> Judged:
        """Judge the federated model told which types are possible, first seed."""
        study = self.study
        possible = torch.tensor([c in types for c in study.classification.classes])
        return {
            name: _hits(chances.masked_fill(~possible, -1), self.target)
            for name, chances in self._chances.items()
        }

    @cached_property
    def target(self) -> torch.Tensor:
        """Class of each unseen patient, -1 if it is none of the study's, shape (N,)."""
        return self.unseen.type_index(self.study.classification.classes)

    @cached_property
    def _chances(self) -> dict[str, torch.Tensor]:
        """The federated model's probabilities (N, C), by name of the result."""
        if not _is_shared(self.study, CLASSIFICATION):
            return {}
        wanted = arms(self.ground, self.seed, (FEDERATED,))
        [(_, model)] = models(self.ground, wanted, self.console)
        return dict(_chances(model, self.unseen))

    def central(self) -> dict[str, list[Judged]]:
        """Judge federated and pooled, one result a seed."""
        wanted = [
            arm
            for seed in self.ground.seeds
            for arm in arms(self.ground, seed, (FEDERATED, POOLED))
        ]
        found: dict[str, list[Judged]] = {}
        for arm, judged in self.each(self.ground, wanted):
            found.setdefault(arm.name, []).append(judged)
        for name, results in found.items():
            self.drawn[name] = self.values(results[0])
        return found

    def alone(self) -> dict[str, Judged]:
        """Judge every site by itself, by the site's name."""
        sites = self.ground.sites
        largest = sorted(sites, key=lambda name: (-sites[name].n_patients, name))
        chosen = set(largest[:QUICK_ALONE] if self.ground.quick else largest)
        wanted = [
            arm
            for arm in arms(self.ground, self.seed, ("alone",), most_alone=None)
            if chosen & set(arm.sites)
        ]
        found = self.each(self.ground, wanted)
        return {next(iter(arm.sites)): judged for arm, judged in found}

    def variants(
        self, ground: Ground, ways: Mapping[str, tuple[str, Study]]
    ) -> dict[str, Values]:
        """Judge more federations with the first seed.

        Parameters
        ----------
        ground
            That of the benchmark, or one with other sites.
        ways
            By the arm's name: its name for the reader, by which the values are
            returned, and the study.
        """
        sites = dict(sorted(ground.sites.items()))
        wanted = [
            Arm(name=name, study=study, sites=sites)
            for name, (_, study) in ways.items()
        ]
        found = {
            ways[arm.name][0]: self.values(judged)
            for arm, judged in self.each(ground, wanted)
        }
        self.drawn.update(found)
        return found

    def values(self, judged: Judged, rows: NDArray[np.bool_] | None = None) -> Values:
        """Return the measures over all unseen patients, or over some; see `_values`."""
        return _values(self.study, self.unseen, judged, rows)

    def each(self, ground: Ground, wanted: Sequence[Arm]) -> list[tuple[Arm, Judged]]:
        """Train and judge arms of a ground; what is in a file is taken from there."""
        folder = self.ground.folder / "federation"
        folder.mkdir(exist_ok=True)
        files = [folder / self._file(arm) for arm in wanted]
        todo = [a for a, file in zip(wanted, files, strict=True) if not file.exists()]
        for arm, model in models(ground, todo, self.console):
            path = folder / self._file(arm)
            partial = path.with_suffix(".partial")
            save_file(dict(_judge(self.ground, model)), partial)
            partial.replace(path)
        return [(a, load_file(file)) for a, file in zip(wanted, files, strict=True)]

    def _file(self, arm: Arm) -> str:
        asked = "/".join(rule.model_dump_json() for rule in (RESTORED, DROPPED_OUT))
        asked += f"/{SMALL_PANEL}/{DRAWS}"
        key = f"{arm.study.hash}/{self.ground.unseen.n_patients}/{asked}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        return f"{arm.name}-{digest[:12]}.safetensors"


def _judge(ground: Ground, model: Model) -> dict[str, Floats]:
    """Judge a model on the ground's unseen patients, in the ground's unit of error.

    Parameters
    ----------
    ground
        Its own genes are the model's, its own scale need not be.
    """
    study, whole = model.study, model.parameters
    patients = model.patients(ground.unseen)
    found: dict[str, Floats] = {}
    if PRETRAINING in study.phases:
        found |= _squares(ground, model, patients)
    if _is_shared(study, CLASSIFICATION):
        target = patients.type_index(study.classification.classes)
        for name, chances in _chances(model, patients):
            found[name] = _hits(chances, target)
    if _is_shared(study, SURVIVAL):
        found["risk"] = evaluation.predict_risk(study, whole, patients)
    return found


def _chances(model: Model, patients: Patients) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the probabilities of the classes (N, C) from each panel."""
    parts = model.study, len(model.genes), CLASSIFICATION, model.parameters
    modules = tasks.load(*parts)
    for name, panel in _seen(model).items():
        seen = torch.where(panel, patients.values, torch.nan)
        some = dataclasses.replace(patients, values=seen)
        yield f"hit/{name}", predictions.class_probabilities(modules, some)


def _hits(chances: torch.Tensor, target: torch.Tensor) -> Floats:
    """Return whether each patient's class was told, NaN where it is -1, shape (N,)."""
    told = (chances.argmax(dim=1) == target).float()
    hits: Floats = torch.where(target >= 0, told, torch.nan).numpy()
    return hits


def _squares(ground: Ground, model: Model, patients: Patients) -> dict[str, Floats]:
    """Return squared error and number of hidden cells of each patient and setting."""
    unit = ground.patients(ground.unseen)
    true, own = unit.values.numpy(), patients.values.numpy()
    imputer = evaluation.model_imputer(model.study, model.parameters, len(model.genes))
    found: dict[str, Floats] = {}
    seed = model.study.seed
    for pattern, key, hidden in (
        *evaluation.hidden_cells(unit, RESTORED, seed, ("mcar", "panel")),
        *evaluation.hidden_cells(unit, DROPPED_OUT, seed, ("mnar",)),
    ):
        gone = hidden.numpy()
        restored = imputer.impute(np.where(gone, np.float32(np.nan), own))
        in_unit = ground.standardisation.apply(model.standardisation.undo(restored))
        error = np.where(gone, np.square(in_unit - true), 0)
        squares = np.where(np.isnan(error), np.inf, error).sum(axis=1)  # it diverged
        name = key if pattern == "mcar" else f"{pattern}-{key}"
        found[f"squares/{name}"] = squares.astype(np.float32)
        found[f"cells/{name}"] = gone.sum(axis=1).astype(np.float32)
    return found


def _seen(model: Model) -> dict[str, torch.Tensor]:
    """Return the genes of all panels: all of them, and the draws of the small one."""
    genes = model.genes.genes
    panels = {"all": set(genes)}
    if len(genes) > SMALL_PANEL:
        for draw in range(DRAWS):
            seed = derive(model.study.seed, "panel", draw)
            drawn = references.panels(genes, [SMALL_PANEL], seed)[SMALL_PANEL]
            panels[f"{SMALL_PANEL}-{draw}"] = set(drawn)
    return {
        name: torch.tensor([gene in panel for gene in genes])
        for name, panel in panels.items()
    }


def _is_shared(study: Study, phase: str) -> bool:
    return phase in study.phases and f"{phase}.head" in tasks.travelling(study, phase)


def _values(
    study: Study, unseen: Patients, judged: Judged, rows: NDArray[np.bool_] | None
) -> Values:
    """Return the measures, NaN where one cannot be told.

    Over all patients the C-index is the mean over cancers of `MIN_EVENTS` deaths or
    more; over some it is that of pairs within a cancer type, if they have as many.

    Parameters
    ----------
    rows
        Patients who count, shape (N,); None: all.
    """
    chosen = np.ones(len(unseen), dtype=bool) if rows is None else rows
    found = dict.fromkeys((measure.key for measure in MEASURES), math.nan)
    for name in [n.removeprefix("cells/") for n in judged if n.startswith("cells/")]:
        cells = judged[f"cells/{name}"][chosen].sum()
        if cells:
            found[f"mse-{name}"] = float(
                judged[f"squares/{name}"][chosen].sum(dtype=np.float64) / cells
            )
    for key, prefix in (
        (f"accuracy-{SMALL_PANEL}", f"hit/{SMALL_PANEL}-"),
        ("accuracy", "hit/all"),
    ):
        hits = [judged[name][chosen] for name in judged if name.startswith(prefix)]
        known = np.concatenate(hits) if hits else np.empty(0)
        known = known[~np.isnan(known)]
        if known.size:
            found[key] = float(known.mean())
    if "risk" in judged:
        found["c-index"] = (
            _mean(_by_cancer(study, unseen, judged["risk"]).values())
            if rows is None
            else _within_types(study, unseen, judged["risk"], rows)
        )
    return found


def _by_cancer(study: Study, unseen: Patients, risk: Floats) -> Values:
    """Return the C-index within each cancer that has deaths enough."""
    found = {}
    for name in study.survival.cancer_types:
        one = evaluation.judge_risk(unseen, name, risk)
        if one["events"] >= MIN_EVENTS and one["c_index"] is not None:
            found[name] = float(one["c_index"])
    return found


def _within_types(
    study: Study, unseen: Patients, risk: Floats, rows: NDArray[np.bool_]
) -> float:
    stratum = unseen.type_index(study.survival.cancer_types).numpy()
    duration, event = unseen.duration.numpy(), unseen.event.numpy()
    usable = rows & (stratum >= 0) & (duration > 0) & ~np.isnan(event)
    if event[usable].sum() < MIN_EVENTS:
        return math.nan
    return stratified_c_index(
        duration[usable], event[usable], risk[usable], stratum[usable]
    )


# ---- federated, pooled, alone ----


def _central(
    bench: _Bench, both: Mapping[str, Sequence[Judged]], alone: Mapping[str, Judged]
) -> tuple[Section, dict[str, Any]]:
    """Compare with the pooled model, and with the mean over sites."""
    by_seed = {
        name: [bench.values(judged) for judged in results]
        for name, results in both.items()
    }
    of_alone = _mean_alone(bench, alone)
    bench.drawn[ALONE] = of_alone
    rows = {
        name: {m.name: spread([v[m.key] for v in values]) for m in MEASURES}
        for name, values in by_seed.items()
    }
    rows[ALONE] = {m.name: spread([of_alone[m.key]]) for m in MEASURES}
    numbers: dict[str, Any] = {
        "central": by_seed,
        "alone_mean": of_alone,
        "against_pooled": {},
        "p": {},
    }
    lines = [
        *markdown("trained", rows),
        "",
        f"On {len(bench.unseen)} patients of {len(set(bench.ground.institution))} "
        f"institutions that no site has; mean and SD over {len(bench.ground.seeds)} "
        f"seeds, alone with the first, by {len(alone)} sites. Alone, accuracy is of "
        "sites that have the study's minimum of patients of two cancer types, and the "
        "C-index within a cancer of sites that have as many of it. The C-index is the "
        f"mean over cancers of {MIN_EVENTS} deaths or more; accuracy from "
        f"{SMALL_PANEL} genes is that over {DRAWS} random panels a seed.",
        "",
        "| federated against pooled | how much worse | p | within 2 % |",
        "|---|---|---|---|",
    ]
    federated, pooled = by_seed[FEDERATED], by_seed[POOLED]
    for m in MEASURES:
        ratio = m.against(*(_mean(v[m.key] for v in x) for x in (federated, pooled)))
        p = _p(bench, m, both[FEDERATED], both[POOLED])
        met = not ratio > POOLED_WITHIN
        numbers["against_pooled"][m.key], numbers["p"][m.key] = ratio, p
        lines.append(
            f"| {m.name} | {_percent(ratio)} | {_said_p(p)} | "
            f"{'-' if math.isnan(ratio) else _yes(met)} |"
        )
    lines += [
        "",
        "p: Wilcoxon's signed-rank test over the unseen institutions, of means over "
        "the seeds; - where there are fewer than five, and for the C-index, which no "
        "institution can tell by itself. Worse by 2 % is, for accuracy and C-index, a "
        "score of 1 / 1.02 of the pooled one.",
        f"Goal: federated within 2 % of the pooled error: {_all_errors(numbers)}.",
    ]
    return Section(title="Federated, pooled and alone", lines=lines), numbers


def _all_errors(numbers: Mapping[str, Any]) -> str:
    known = [numbers["against_pooled"][m.key] for m in ERRORS]
    known = [ratio for ratio in known if not math.isnan(ratio)]
    return _yes(all(ratio <= POOLED_WITHIN for ratio in known)) if known else "-"


def _mean_alone(bench: _Bench, alone: Mapping[str, Judged]) -> Values:
    """Return the mean over sites, each where it could learn the task."""
    study = bench.study
    by_site = {site: bench.values(judged) for site, judged in alone.items()}
    types = {site: _types(bench, site) for site in alone}
    found = {}
    for m in MEASURES:
        able = [s for s in alone if m in ERRORS or len(types[s]) > 1]
        found[m.key] = _mean(by_site[site][m.key] for site in able)
    by_cancer: dict[str, list[float]] = {}
    for site, judged in alone.items():
        if "risk" not in judged:
            continue
        scores = _by_cancer(study, bench.unseen, judged["risk"])
        for name in types[site] & scores.keys():
            by_cancer.setdefault(name, []).append(scores[name])
    found["c-index"] = _mean(_mean(each) for each in by_cancer.values())
    return found


def _types(bench: _Bench, site: str) -> set[str]:
    """Return the cancer types of which a site has the minimum cohort."""
    own = bench.ground.patients(bench.ground.sites[site]).cancer_type
    least = bench.study.minimum_cohort
    return {name for name in own if name is not None and own.count(name) >= least}


def _p(
    bench: _Bench, measure: Measure, one: Sequence[Judged], other: Sequence[Judged]
) -> float:
    """Return the p of two arms over institutions, NaN for what these cannot tell."""
    if measure.key == "c-index":
        return math.nan
    names = sorted(set(bench.ground.institution))
    both = [
        [
            _mean(
                bench.values(judged, bench.ground.institution == name)[measure.key]
                for judged in results
            )
            for name in names
        ]
        for results in (one, other)
    ]
    return paired_p(both[0], both[1])


# ---- each site ----


def _each_site(
    bench: _Bench, federated: Judged, alone: Mapping[str, Judged]
) -> tuple[Section, dict[str, Any]]:
    """Compare with each site alone, on unseen patients of the cancers that it has."""
    rows: dict[str, dict[str, str]] = {}
    numbers: dict[str, Any] = {}
    for site, judged in sorted(alone.items()):
        types = _types(bench, site)
        same = np.array([name in types for name in bench.unseen.cancer_type])
        found = {
            FEDERATED: bench.values(federated, same),
            AMONG: bench.values({**federated, **bench.among(types)}, same),
            "alone": bench.values(judged, same),
        }
        told = _told(bench, types, found["alone"], same)
        rows[site] = {
            "patients": str(bench.ground.sites[site].n_patients),
            "cancers": str(len(types)),
            "unseen patients": str(int(same.sum())),
        } | {
            m.name: " / ".join(
                f"{values[m.key]:.3f}"
                for way, values in found.items()
                if way != AMONG or m.of_types
            )
            if m.key in told
            else NOT_ESTIMABLE
            for m in MEASURES
        }
        numbers[site] = {
            name: {key: value for key, value in values.items() if key in told}
            for name, values in found.items()
        }
    tally = {m.name: _tally(m, numbers.values(), FEDERATED) for m in MEASURES}
    told_cancers = {
        f"{m.name}, told the cancers": _tally(m, numbers.values(), AMONG)
        for m in MEASURES
        if m.of_types
    }
    same_question = [tally[m.name] for m in MEASURES if not m.of_types]
    able = sum(1 for each in numbers.values() if each["alone"])
    met, met_told = (
        _yes(all(each["worse"] == 0 for each in those)) if able else "-"
        for those in (tally.values(), [*same_question, *told_cancers.values()])
    )
    lines = [
        *markdown("site", rows),
        "",
        "Federated / alone, first seed, on the unseen patients of the cancers of which "
        "the site has the study's minimum of patients. Accuracy: federated / federated "
        "told these cancers (`fedgex-site predict classify --among`) / alone, which "
        "knows no others. "
        f'"{NOT_ESTIMABLE}": these patients have neither {MIN_EVENTS} deaths nor two '
        f"cancer types; accuracy needs two types, and the C-index {MIN_EVENTS} deaths. "
        "Here the C-index is over pairs within a cancer type.",
        "",
        *markdown(
            "federated against alone, sites",
            {
                name: {k: str(v) for k, v in each.items()}
                for name, each in (tally | told_cancers).items()
            },
        ),
        "",
        f"Goal: better than alone at every site that can tell ({able} of "
        f"{len(numbers)}), where a tie, as of two models that are always right, counts "
        f"as met: {met}; told the cancers: {met_told}.",
    ]
    return (
        Section(title="Each site", lines=lines),
        {"sites": numbers, "sites_against_alone": tally | told_cancers},
    )


def _tally(
    measure: Measure, sites: Iterable[Mapping[str, Values]], way: str
) -> dict[str, int]:
    """Count the sites at which the federated model is better than the site's own."""
    pairs = [
        (each[way][measure.key], each["alone"][measure.key])
        for each in sites
        if measure.key in each["alone"]
    ]
    return {
        "better": sum(measure.is_better(one, other) for one, other in pairs),
        "equal": sum(one == other for one, other in pairs),
        "worse": sum(measure.is_better(other, one) for one, other in pairs),
    }


def _told(
    bench: _Bench, types: set[str], values: Values, rows: NDArray[np.bool_]
) -> set[str]:
    """Return the measures that a site's unseen patients can tell."""
    there = {n for n, kept in zip(bench.unseen.cancer_type, rows, strict=True) if kept}
    two, deaths = len(there & types) > 1, not math.isnan(values["c-index"])
    return {
        m.key
        for m in MEASURES
        if not math.isnan(values[m.key]) and (two if m.of_types else two or deaths)
    }


# ---- other ways to train together ----


def _variants(bench: _Bench) -> tuple[Section, dict[str, Any]]:
    """Compare ways to make one model of the same updates, and to pace them."""
    study = bench.study
    found = bench.variants(bench.ground, ways_to_train(study, quick=bench.ground.quick))
    lines = [
        *_table(bench, found),
        "",
        f"First seed; the study's own way is {study.strategy.name} with "
        f"{_pace(study)}. Few and many local steps keep the epochs of a phase. FedProx "
        f"with mu {PULL:g}; FedAdam with the study's rates, which nobody tuned; the "
        "trimmed mean counts every site alike. Per-gene averaging changes nothing "
        "where all sites measure all genes; see different panels.",
    ]
    return Section(title="Ways to train together", lines=lines), {"ways": found}


def ways_to_train(study: Study, *, quick: bool) -> dict[str, tuple[str, Study]]:
    """Return the studies that differ in how they train, by the arm's name."""
    ways = {"fedprox": ("FedProx", _by(study, name="fedprox", proximal_mu=PULL))}
    if quick:
        return ways
    return ways | {
        "fedadam": ("FedAdam", _by(study, name="fedadam")),
        "trimmed-mean": (
            "trimmed mean",
            _by(study, name="trimmed-mean", weights="equal"),
        ),
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


def _pace(study: Study) -> str:
    return ", ".join(
        f"{phase.local_epochs} x {phase.rounds} ({name})"
        for name, phase in study.phases.items()
    )


# ---- small sites ----


def _small_sites(bench: _Bench) -> tuple[Section, dict[str, Any]]:
    """Cut the smaller half of the sites to ten patients; ask whether they help."""
    ground = bench.ground
    ranked = sorted(ground.sites, key=lambda s: (ground.sites[s].n_patients, s))
    small = ranked[: len(ranked) // 2]
    large = {s: cohort for s, cohort in ground.sites.items() if s not in small}
    cut = {s: _cut(ground.sites[s], TEN, derive(bench.seed, "ten", s)) for s in small}
    found: dict[str, Values] = {}
    for name, said, sites in (
        ("small-and-large", "large sites and those of ten", large | cut),
        ("large-only", "large sites only", large),
    ):
        other = dataclasses.replace(ground, sites=sites)
        found |= bench.variants(other, {name: (said, bench.study)})
    lines = [
        *_table(bench, found),
        "",
        f"The {len(small)} smallest of {len(ranked)} sites keep {TEN} patients each, "
        f"beside {len(large)} with all of theirs; first seed, and ratios to the pooled "
        "model of all patients. Whether the small ones help or harm is the "
        "difference of the last two rows.",
    ]
    return (
        Section(title="Sites of ten patients", lines=lines),
        {"small_sites": found, "sites_cut": len(small)},
    )


def _cut(cohort: Cohort, n: int, seed: int) -> Cohort:
    """Keep n random samples."""
    order = np.random.default_rng(seed).permutation(len(cohort.patients))
    return in_process.take(cohort, np.sort(order[:n]))


# ---- different panels ----


def _panels(bench: _Bench) -> tuple[Section, dict[str, Any]]:
    """Give each site a random share of its genes."""
    ground = bench.ground
    sites = {
        site: some_genes(cohort, bench.seed, site)
        for site, cohort in ground.sites.items()
    }
    genes = bench.study.vocabulary.model_copy(update={"genes": ground.genes.genes})
    study = bench.study.model_copy(update={"vocabulary": genes})
    other = dataclasses.replace(ground, sites=sites)
    own = study.strategy.per_gene
    ways = {}
    for per_gene in (own,) if ground.quick else (own, not own):
        rule = study.strategy.model_copy(update={"per_gene": per_gene})
        ways[f"panels{'' if per_gene else '-not'}-per-gene"] = (
            f"different panels, {'' if per_gene else 'not '}per gene",
            study.model_copy(update={"strategy": rule}),
        )
    found = bench.variants(other, ways)
    if not ground.quick:
        fewer = {
            site: _cut(
                cohort,
                round(PANEL_SHARE * len(cohort.patients)),
                derive(bench.seed, "some", site),
            )
            for site, cohort in ground.sites.items()
        }
        said = f"{PANEL_SHARE:.0%} of the patients, all genes"
        found |= bench.variants(
            dataclasses.replace(ground, sites=fewer),
            {"some-patients": (said, bench.study)},
        )
    own_way, full = next(iter(found.values())), bench.drawn[FEDERATED]
    against = {m.key: m.against(own_way[m.key], full[m.key]) for m in MEASURES}
    errors = [against[m.key] for m in ERRORS if not math.isnan(against[m.key])]
    measured = np.array(
        [sum(gene in c.genes for c in sites.values()) for gene in ground.genes.genes]
    )
    lines = [
        *_table(bench, found),
        "",
        f"Each site measures a random {PANEL_SHARE:.0%} of its genes; the study fixes "
        f"all {len(ground.genes)} genes, each of which {measured.min()} to "
        f"{measured.max()} of {len(sites)} sites measure, so that the model is judged "
        "on the same cells as with full panels. The scale of the genes comes from "
        "these sites too. First seed. Per gene: a gene's parameters are averaged over "
        "the sites that measured it alone. Beside them, as many measured values: a "
        "random part of the patients, with all genes.",
        "",
        "Against full panels, in the study's own way: "
        + ", ".join(f"{m.name} {_percent(against[m.key])}" for m in MEASURES)
        + " worse.",
        f"Goal: within 5 % of the error with full panels: "
        f"{_yes(all(e <= PANELS_WITHIN for e in errors)) if errors else '-'}.",
    ]
    return (
        Section(title="Different panels", lines=lines),
        {"panels": found, "panels_against_full": against},
    )


def some_genes(cohort: Cohort, seed: int, site: str) -> Cohort:
    """Keep the site's own random share of the genes, as a scenario's panel_share."""
    rng = np.random.default_rng([seed, *f"panel/{site}".encode()])
    n_genes = len(cohort.genes)
    n_kept = max(1, round(PANEL_SHARE * n_genes))
    kept = np.sort(rng.choice(n_genes, n_kept, replace=False))
    return dataclasses.replace(
        cohort,
        genes=tuple(cohort.genes[i] for i in kept),
        expression=cohort.expression[:, kept],
    )


# ---- a foreign scale ----


def _foreign(bench: _Bench) -> tuple[Section, dict[str, Any]]:
    """Let the largest site name a scale that its numbers are not on."""
    title = "A site with a foreign scale"
    ground = bench.ground
    declared = ground.scenario.data.scale
    if declared not in CONVERTIBLE:
        line = f"Left out: from the {declared} scale no formula leads to another."
        return Section(title=title, lines=[line]), {}
    site = max(ground.sites, key=lambda s: (ground.sites[s].n_patients, s))
    kinds = {k: v for k, v in FOREIGN.items() if v[1] != declared}
    rows: dict[str, dict[str, str]] = {}
    found: dict[str, Values] = {}
    checks: dict[str, Any] = {}
    without = {name: c for name, c in ground.sites.items() if name != site}
    if len(without) > 0:
        other = dataclasses.replace(ground, sites=without)
        ways = {"without-largest": ("without the largest site", bench.study)}
        found |= bench.variants(other, ways)
    for kind, (said, scale) in kinds.items():
        cohort, findings = at_the_door(ground, site, declared, scale, kind)
        verdict = _verdict(cohort, findings)
        row = dict.fromkeys(("check-data", *AT_SERVER), "-") | {"check-data": verdict}
        checks[kind] = {
            "enters": cohort is not None,
            "findings": [f"{each.code} {each.severity}" for each in findings],
        }
        if cohort is not None:
            other = dataclasses.replace(ground, sites=without | {site: cohort})
            level = statistics.foreign_scales(_moments(other)).get(site)
            norm = _norm_ratio(bench, other, site, kind)
            checks[kind] |= {"level_ratio": level, "norm_ratio": norm}
            row |= _at_the_server(level, norm, bench.study)
            if not (ground.quick and kind == "ln"):
                found |= _entered(bench, other, kind, said)
        rows[f"{said}, named {declared}"] = row
    lines = [
        *markdown("what the site sends", rows),
        "",
        f"The largest site, {ground.sites[site].n_patients} of "
        f"{sum(c.n_patients for c in ground.sites.values())} patients, names the scale "
        f"{declared} for numbers on another. What its own check-data says of the "
        "scale; what the server says of its gene means before the first round; and the "
        "norm of its change in that round, over the median of the others', which is "
        f"too much above {bench.study.rounds.max_norm_ratio:g}. Training below goes on "
        "with it all the same.",
        "",
        *_table(bench, found),
        "",
        "First seed, ratios to the pooled model of right scales. The foreign numbers "
        "enter the scale of the genes and, with a linear start, its cross-products "
        "too, which are sums: trimmed mean and median defend the trained parameters "
        "alone.",
    ]
    return Section(title=title, lines=lines), {"checks": checks, "foreign": found}


def _entered(bench: _Bench, ground: Ground, kind: str, said: str) -> dict[str, Values]:
    """Judge the federation with the foreign site, and log10 with defences too."""
    said = f"one site in {said}"
    ways = {f"foreign-{kind}": (said, bench.study)}
    if kind == "log10" and not bench.ground.quick:
        ways |= {
            f"foreign-{kind}-{defence}": (
                f"{said}, {defence.replace('-', ' ')}",
                _by(bench.study, name=defence, weights="equal"),
            )
            for defence in ("trimmed-mean", "median")
        }
    return bench.variants(ground, ways)


def at_the_door(
    ground: Ground, site: str, declared: Scale, scale: Scale, kind: str
) -> tuple[Cohort | None, list[Finding]]:
    """Check a site's files with numbers on another scale than they name.

    Returns
    -------
    tuple
        The cohort, None if it is refused; and the findings on the scale.
    """
    own = ground.folder / "sites" / site
    with tempfile.TemporaryDirectory(prefix="fedgex-") as temporary:
        folder = Path(temporary) / site
        shutil.copytree(own, folder)
        path = folder / "expression.parquet"
        table = read_parquet(path)
        values = scales.convert(table.to_numpy(), declared, scale)
        if kind == "counts":
            values = np.rint(values)
        pd.DataFrame(values, table.index, table.columns).to_parquet(path)
        settings = SiteSettings.load(folder / "site.toml")
        try:
            cohort, findings = load_cohort(
                settings, ground.study.scale, tuple(ground.study.phases)
            )
        except DataError as error:
            return None, _on_scale(error.findings)
    return cohort, _on_scale(findings)


def _on_scale(findings: Sequence[Finding]) -> list[Finding]:
    return [each for each in findings if each.code in ABOUT_NUMBERS]


def _verdict(cohort: Cohort | None, findings: Sequence[Finding]) -> str:
    said = "; ".join(f"{each.code}: {each.found}" for each in findings)
    if cohort is None:
        return f"refused ({said})"
    return f"enters with a warning ({said})" if said else "enters, nothing noticed"


def _at_the_server(
    level: float | None, norm_ratio: float, study: Study
) -> dict[str, str]:
    means, change = AT_SERVER
    row = {
        means: "like the others'"
        if level is None
        else f"left out, {level:.2f} times the others'"
    }
    if not math.isnan(norm_ratio):
        far = norm_ratio > study.rounds.max_norm_ratio
        row[change] = (
            f"{norm_ratio:.2g} times the others', "
            f"{'quarantined' if far else 'accepted'}"
        )
    return row


def _moments(ground: Ground) -> dict[str, GeneMoments]:
    """Return what each site tells of its genes, on the study's scale."""
    return {
        site: GeneMoments.of(
            ground.standardisation.undo(ground.patients(cohort).values.numpy())
        ).suppressed(ground.study.minimum_cohort)
        for site, cohort in ground.sites.items()
    }


def _norm_ratio(bench: _Bench, ground: Ground, site: str, kind: str) -> float:
    """Return how much a site's first update changes the model, over the median other's.

    As the server compares them in a round; NaN without pretraining, or with too few
    others.
    """
    study = _by(bench.study, update="delta")
    if PRETRAINING not in study.phases or len(ground.sites) < 3:
        return math.nan
    path = bench.ground.folder / "federation"
    path = path / f"norms-{kind}-{bench.study.hash[:12]}.json"
    norms: dict[str, float] = cached(path, lambda: dict(_norms(ground, study)))
    return norms[site] / float(np.median([n for s, n in norms.items() if s != site]))


def _norms(ground: Ground, study: Study) -> Iterator[tuple[str, float]]:
    """Yield each site's Euclidean norm of its change in the first round."""
    scale = ground.standardisation
    begun = in_process.start(study, ground.genes, ground.sites, None, scale)
    incoming = tasks.sent(study, PRETRAINING, begun.parameters)
    for site, cohort in sorted(ground.sites.items()):
        patients = take_part(study, PRETRAINING, ground.patients(cohort))
        if len(patients) < study.minimum_cohort:
            continue
        with tempfile.TemporaryDirectory(prefix="fedgex-") as state:
            changed = train_round(
                study,
                PRETRAINING,
                1,
                patients,
                incoming,
                site=site,
                floor=study.minimum_cohort,
                state_dir=Path(state),
            ).update
        squares = [np.square(a.astype(np.float64)).sum() for a in changed.values()]
        yield site, math.sqrt(sum(squares))


# ---- output ----


def _table(bench: _Bench, found: Mapping[str, Values]) -> list[str]:
    """Return lines with pooled and federated above, and errors over the pooled ones."""
    pooled = bench.drawn[POOLED]
    rows = {}
    for name, values in {
        POOLED: pooled,
        FEDERATED: bench.drawn[FEDERATED],
        **found,
    }.items():
        rows[name] = {
            m.name: spread([values[m.key]])
            + (
                f" (x {values[m.key] / pooled[m.key]:.3f})"
                if m in ERRORS and name != POOLED
                else ""
            )
            for m in MEASURES
        }
    return markdown("trained", rows)


def _ratios(bench: _Bench, values: Values) -> Values:
    pooled = bench.drawn[POOLED]
    return {m.key: values[m.key] / pooled[m.key] for m in ERRORS}


def _draw(ratios: Mapping[str, Values]) -> Figure:
    """Draw by how much each way's restoration errors are above the pooled model's."""
    names = [name for name in ratios if name != POOLED]
    figure = Figure(figsize=(13, 1.6 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(ERRORS), sharey=True, squeeze=False)[0]
    at = np.arange(len(names))
    goal = 100 * (POOLED_WITHIN - 1)
    for axes, measure in zip(panels, ERRORS, strict=True):
        percent = [100 * (ratios[name][measure.key] - 1) for name in names]
        colours = ["#0072b2" if name == FEDERATED else "#8a929c" for name in names]
        drawn = np.nan_to_num(percent, nan=0, posinf=0)
        together = [x for n, x in zip(names, drawn, strict=True) if n != ALONE]
        drawn = np.minimum(drawn, 1.5 * max([*together, goal]))  # so that all are seen
        bars = axes.barh(at, drawn, color=colours)
        labels = [f"{x:+.1f}" if math.isfinite(x) else "-" for x in percent]
        axes.bar_label(bars, labels=labels, padding=2, fontsize=8)
        axes.axvline(0, color="#1b1f24", linewidth=0.8)
        axes.axvline(goal, color="#d55e00", linewidth=0.8, linestyle="--")
        axes.set(title=measure.name, xlabel="error above the pooled model's (%)")
        axes.title.set_fontsize("small")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(at, labels=names)
    panels[0].invert_yaxis()
    return figure


def _mean(values: Iterable[float]) -> float:
    """Return the mean of what is known, NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _percent(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{100 * (ratio - 1):+.1f} %"


def _said_p(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.2g}"


def _yes(met: bool) -> str:
    return "yes" if met else "no"
