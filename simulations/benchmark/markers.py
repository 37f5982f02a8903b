"""Known markers: where they come among all genes in what a model attributes.

In the layer that the benchmark stands on, and in one that measures more genes, on which
a model is trained for this alone. V genes, C cancer types.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import rankdata

from fedgex.common.cohort import Cohort
from fedgex.common.scale import Scale, convert, floor
from fedgex.common.study import Survival
from fedgex.common.vocabulary import Vocabulary
from fedgex.simulations.benchmark import exams
from fedgex.simulations.benchmark.ground import POOLED, Ground
from fedgex.simulations.benchmark.outcome import Part, Section
from fedgex.simulations.benchmark.tables import markdown, spread

PERMUTATIONS = 10_000
"""Of the gene names."""
RANK = 100
"""Most factors of the model of the other layer, which has a fifth of the patients."""

GRADIENTS, ATTENTION = "integrated gradients", "attention"

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attributions:
    """What models attribute to each gene in each cancer type."""

    genes: Sequence[str]
    types: Sequence[str]
    gradients: Sequence[Floats]
    """Integrated gradients of each model, shape (C, V)."""
    attention: Floats
    """Mean over the models, above the mean of the types, shape (C, V)."""
    expression: Floats
    """Mean, standardised, shape (C, V)."""


def compare(found: Attributions, title: str, name: str, said: str) -> Part:
    """Show where known markers come among all genes in their cancer.

    Parameters
    ----------
    name
        Of the picture.
    said
        Begins the text.
    """
    genes, types = list(found.genes), list(found.types)
    known, absent = listed(genes, types)
    seeds = [percentiles(each) for each in found.gradients]
    mean = percentiles(np.mean(found.gradients, axis=0))
    extra = percentiles(found.attention)
    places = [(types.index(c), genes.index(g)) for c, g, _ in known]
    table, numbers = {}, dict[str, Any]()
    for (cancer, gene, source), at in zip(known, places, strict=True):
        table[f"{gene}, {cancer}"] = {
            "expression (SD)": f"{found.expression[at]:+.2f}",
            GRADIENTS: spread([seed[at] for seed in seeds], 0),
            ATTENTION: f"{extra[at]:.0f}",
            "source": source,
        }
        numbers[f"{gene}, {cancer}"] = {
            "expression": found.expression[at],
            GRADIENTS: [seed[at] for seed in seeds],
            ATTENTION: extra[at],
        }
    reached, p_values = [], {}
    if known:
        for way, ranked in ((GRADIENTS, mean), (ATTENTION, extra)):
            percentile, p = permuted(ranked, places)
            reached.append(f"by {way} {percentile:.0f} (p {p:.2g})")
            p_values[way] = {"mean_percentile": percentile, "p": p}
    lines = [
        said,
        "",
        *markdown("marker", table),
        "",
        f"Mean percentile: {', '.join(reached) or '-'}; p: {PERMUTATIONS:,} "
        "permutations of the gene names within each cancer. Not measured here: "
        + (", ".join(absent) or "none")
        + ".",
    ]
    figure = Figure(figsize=(7, 0.22 * len(known) + 1.4), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(known))
    for label, ranked, marker in ((GRADIENTS, mean, "o"), (ATTENTION, extra, "x")):
        axes.plot([ranked[at] for at in places], rows, marker, label=label)
    axes.axvline(50, color="grey", linestyle=":")
    axes.set_yticks(rows, [f"{g}, {c}" for c, g, _ in known], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlim=(-2, 102), xlabel="percentile among all genes of the cancer")
    axes.legend(fontsize="small")
    return Part(
        section=Section(title=title, lines=lines, figure=name),
        figure=figure,
        numbers={"markers": numbers, "test": p_values, "not_measured": absent},
    )


def listed(
    genes: Sequence[str], types: Sequence[str]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return cancer, gene and source of the markers measured, and the names of others.

    Cancers that the model does not know are left out.
    """
    own = resources.files("fedgex.simulations.benchmark") / "markers.toml"
    found = [
        (entry["cancer"], gene, entry["source"])
        for entry in tomllib.loads(own.read_text(encoding="utf-8"))["marker"]
        for gene in entry["genes"]
        if entry["cancer"] in types
    ]
    measured = [one for one in found if one[1] in genes]
    return measured, sorted({gene for _, gene, _ in found} - set(genes))


def permuted(ranked: Floats, places: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return the mean percentile at some places (C, V), and the p of one as high."""
    reached = float(np.mean([ranked[at] for at in places]))
    rng = np.random.default_rng(0)
    sums = np.zeros(PERMUTATIONS)
    for row in {k for k, _ in places}:
        n = sum(k == row for k, _ in places)
        known = ranked[row][~np.isnan(ranked[row])]
        for i in range(PERMUTATIONS):
            sums[i] += rng.choice(known, n, replace=False, shuffle=False).sum()
    as_high = int((sums / len(places) >= reached - 1e-9).sum())
    return reached, (1 + as_high) / (1 + PERMUTATIONS)


def percentiles(values: Floats) -> Floats:
    """Return the percentile of each gene in its row, 0 to 100, ties averaged."""
    ranks = np.array([rankdata(row, nan_policy="omit") for row in values])
    known = (~np.isnan(values)).sum(axis=1, keepdims=True)
    found: Floats = 100 * (ranks - 1) / np.maximum(known - 1, 1)
    return found


def other_layer(ground: Ground) -> Ground | str:
    """Return a ground of the paired layer's tumours, or why there is none.

    They are pooled, since few hospitals there have the minimum cohort of any cancer
    type, and learn to tell types apart alone. Nobody of the unseen institutions is
    among them.
    """
    if ground.quick:
        return "left out with --quick"
    layer = exams.paired(ground)
    if isinstance(layer, str):
        return layer
    held = {*ground.institution, *exams.apart(ground)}
    rows = (layer.tissue == exams.TUMOUR) & ~np.isin(layer.institution, sorted(held))
    names, counts = np.unique(layer.cancer_type[rows], return_counts=True)
    types = tuple(map(str, names[counts >= ground.study.minimum_cohort]))
    if len(types) < 2:
        return (
            f"{exams.PAIRED} has {len(types)} cancer types of "
            f"{ground.study.minimum_cohort} patients; expected two"
        )
    rows &= np.isin(layer.cancer_type, types)
    # Some of its files write NaN for a count of zero.
    found = layer.expression[rows].fillna(floor(Scale.LOG2P025))
    genes = Vocabulary(tuple(sorted(found.columns)))
    cohort = Cohort(
        patients=tuple(layer.patient[rows]),
        genes=genes.genes,
        expression=convert(
            found[list(genes.genes)].to_numpy(np.float32),
            Scale.LOG2P025,
            ground.study.scale,
        ),
        clinical=pd.DataFrame({"cancer_type": layer.cancer_type[rows]}),
    )
    study = ground.study
    folder = ground.folder / "paired"
    folder.mkdir(exist_ok=True)
    return dataclasses.replace(
        ground,
        study=study.model_copy(
            update={
                "linear_rank": min(study.linear_rank, RANK),
                "linear_types": types,
                "classification": study.classification.model_copy(
                    update={"classes": types}
                ),
                "survival": Survival(),
            }
        ),
        seeds=ground.seeds[:1],
        sites={POOLED: cohort},
        genes=genes,
        folder=folder,
        workers=1,
    )
