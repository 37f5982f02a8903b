"""Figures of the method comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from fedgex.simulations.evaluation.table import mean_over, nested, sd, where
from fedgex.simulations.reporting.charts import COLOURS, STYLE

Floats = NDArray[np.float64]
Look = tuple[str, str]
"""Colour and marker."""
Names = Sequence[str] | NDArray[np.str_]
Points = Sequence[tuple[float, float]]
Runs = Mapping[Any, Sequence[float]]
"""A number a run, by number of genes."""

IMPUTERS = {
    "knn": ("orange", "^", ":"),
    "ppca-128": ("green", "D", ":"),
    "gaussian": ("vermillion", "v", "-"),
    "mixture": ("purple", "P", "-"),
    "local": ("grey", "s", "--"),
    "linear start": ("blue", "x", ":"),
    "pooled": ("ink", "s", "--"),
    "federated": ("blue", "o", "-"),
}
"""Colour, marker and line of each imputation method."""


def imputation_errors(mse: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw error against missing rate, and over the Gaussian's at every setting."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = {
        method: {setting: np.mean(of) for setting, of in by_setting.items()}
        for method, by_setting in nested(mse, "method", "setting").items()
    }
    settings = [*means["federated"]]
    at_random = [s for s in settings if s.startswith("mcar ")]
    rates = [float(s.split(" ")[1]) for s in at_random]
    for method, (colour, marker, line) in IMPUTERS.items():
        if method not in means:
            continue
        style = {"color": COLOURS[colour], "marker": marker, "label": labels[method]}
        errors = [means[method][s] for s in at_random]
        left.plot(rates, errors, linestyle=line, **style)
        ratios = [means[method][s] / means["gaussian"][s] for s in settings]
        right.plot(range(len(settings)), ratios, linestyle="none", **style)
    left.set_xlabel("share of cells missing completely at random")
    left.set_ylabel("mean squared error")
    right.axhline(1, color=COLOURS["rule"], zorder=0)
    right.set_xticks(
        range(len(settings)), settings, rotation=60, ha="right", fontsize=8
    )
    right.set_ylabel("error over the Gaussian's")
    right.set_ylim(None, min(2, right.get_ylim()[1]))
    lines = left.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4)
    return figure


def imputation_genes(results: pd.DataFrame) -> Figure:
    """Draw each gene's error by the federated model against the Gaussian's, and r."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    names = {"gene_mse": "mean squared error", "gene_pearson": "Pearson's r"}
    for axes, (key, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        found = mean_over(where(results, metric=key), "seed", "method")
        ours, gaussian = found["federated"], found["gaussian"]
        points = [*zip(gaussian, ours, strict=True)]
        _scatter(axes, points, s=7, alpha=0.5, linewidths=0)
        ends = np.nanmin(points), np.nanmax(points)
        axes.plot(ends, ends, color=COLOURS["grey"], linewidth=1)
        axes.set(xlabel=f"{name}, Gaussian", ylabel=f"{name}, federated model")
        axes.set_aspect("equal")
    return figure


def reliability(
    intervals: Mapping[str, Any],
    patterns: Mapping[str, str],
    heading: Callable[[str], str],
) -> Figure:
    """Draw the coverage of intervals against their nominal coverage."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    grid = figure.subplots(1, 3, sharey=True)
    for axes, (pattern, title) in zip(grid, patterns.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=COLOURS["grey"], linewidth=1)
        for setting, found in intervals.items():
            if setting.startswith(f"{pattern} "):
                held = np.mean(found["held"], axis=0)
                levels, label = found["levels"], heading(setting)
                axes.plot(levels, held, marker=".", linewidth=1, label=label)
        axes.set(xlabel="share that an interval should hold", aspect="equal")
        axes.set_title(title, fontsize="medium")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    grid[0].set_ylabel("share that it holds")
    return figure


@mpl.rc_context(STYLE)
def accuracies(
    panels: Sequence[tuple[str, Mapping[str, tuple[Look, Runs]]]],
    levels: Sequence[Mapping[str, float]] = ({}, {}),
    ncols: int = 4,
) -> Figure:
    """Draw accuracy, mean and SD, against the number of genes.

    Parameters
    ----------
    panels
        Title, and by label each line's look and the accuracies by number of genes.
    levels
        Horizontal lines of each panel, by label.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    grid, styles = figure.subplots(1, 2, sharey=True), ("-", ":", "--")
    for axes, (title, lines), of_panel in zip(grid, panels, levels, strict=True):
        sizes = sorted({size for _, runs in lines.values() for size in runs})
        for label, ((colour, marker), runs) in lines.items():
            above = 3 if colour == "blue" else 2
            look = {"color": COLOURS[colour], "marker": marker, "zorder": above}
            _runs(axes, runs, label=label, elinewidth=0.8, **look)
        for (label, level), style in zip(of_panel.items(), styles, strict=False):
            look = {"color": COLOURS["muted"], "linestyle": style, "linewidth": 0.8}
            axes.axhline(level, label=label, **look)
        axes.set(xscale="log", xlabel="genes measured", title=title)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
    grid[0].set_ylabel("accuracy, unseen institutions")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
    return figure


@mpl.rc_context(STYLE)
def confusions(
    shares: Mapping[str, Floats], rows: NDArray[np.intp], classes: Sequence[str]
) -> Figure:
    """Draw the share of each true class that is predicted as each, (C, C), by title.

    Parameters
    ----------
    rows
        Classes that have patients.
    """
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    grid = figure.subplots(1, 2)
    for axes, (title, of_all) in zip(grid, shares.items(), strict=True):
        of_rows = of_all[rows]
        axes.imshow(of_rows, vmin=0, vmax=1, cmap="Blues")
        for (row, column), share in np.ndenumerate(of_rows):
            if share >= 0.005:
                colour = "white" if share > 0.5 else COLOURS["ink"]
                text = f"{100 * share:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour)
        axes.grid(visible=False)
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(rows)), [classes[i] for i in rows])
        axes.set_xlabel("predicted")
        axes.set_title(title)
    grid[0].set_ylabel("true (% of its patients)")
    return figure


def error_ratios(
    ratios: Mapping[str, Mapping[str, float]],
    measures: Mapping[str, str],
    *,
    goal: float,
    ours: str,
    cut_off: str,
) -> Figure:
    """Draw by how much each arm's errors exceed the pooled model's.

    Parameters
    ----------
    ratios
        By arm and measure.
    measures
        Titles of the panels.
    cut_off
        Arm whose bars may leave the panel, so that the others are visible.
    """
    names, at = [*ratios], np.arange(len(ratios))
    figure = Figure(figsize=(13, 1.6 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(panels, measures.items(), strict=True):
        percent = [100 * (ratios[name][key] - 1) for name in names]
        colours = [COLOURS["blue" if name == ours else "grey"] for name in names]
        drawn = np.nan_to_num(percent, nan=0, posinf=0)
        others = [x for n, x in zip(names, drawn, strict=True) if n != cut_off]
        drawn = np.minimum(drawn, 1.5 * max([*others, 100 * (goal - 1)]))
        labels = [f"{x:+.1f}" if math.isfinite(x) else "-" for x in percent]
        bars = axes.barh(at, drawn, color=colours)
        axes.bar_label(bars, labels=labels, padding=2, fontsize=8)
        axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
        look = {"color": COLOURS["vermillion"], "linewidth": 0.8, "linestyle": "--"}
        axes.axvline(100 * (goal - 1), **look)
        axes.set(title=title, xlabel="error above the pooled model's (%)")
        axes.title.set_fontsize("small")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(at, labels=names)
    panels[0].invert_yaxis()
    return figure


def heat_map(
    values: Floats, rows: Names, columns: Names, label: str, row_height: float
) -> Figure:
    """Draw numbers as colours, blue below 0 and red above."""
    size = (0.24 * len(columns) + 2, row_height * len(rows) + 1.8)
    figure = Figure(figsize=size, layout="constrained")
    _heat(figure, figure.subplots(), values, rows, columns, label)
    return figure


def _heat(
    figure: Figure, axes: Axes, values: Floats, rows: Names, columns: Names, label: str
) -> None:
    most = max(float(np.nanmax(np.abs(values), initial=1e-12)), 1e-12)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(columns)), [*columns], rotation=90, fontsize="small")
    axes.set_yticks(range(len(rows)), [*rows], fontsize="small")
    figure.colorbar(image, ax=axes, label=label)


def programmes(
    z: Mapping[str, Floats], scored: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Draw z by cancer type, and the C-index at the sites and on unseen patients.

    Parameters
    ----------
    z
        Of each programme, by cancer type.
    scored
        `sites` and `unseen`, each C-index and standard error, by programme.
    """
    figure = Figure(figsize=(9, 0.3 * len(scored) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    of_types = np.array([*z.values()]).T
    _heat(figure, left, of_types, [*scored], [*z], "z at the sites")
    rows = np.arange(len(scored))
    unseen = np.array([each["unseen"] for each in scored.values()])
    sites = [each["sites"][0] for each in scored.values()]
    right.plot(sites, rows, "x", label="sites")
    look = {"fmt": "o", "capsize": 2, "label": "unseen institutions"}
    right.errorbar(unseen[:, 0], rows, xerr=np.nan_to_num(unseen[:, 1]), **look)
    right.axvline(0.5, color="grey", linestyle=":")
    right.set_yticks(rows, [*scored], fontsize="small")
    right.set_ylim(len(scored) - 0.5, -0.5)
    right.set_xlabel("C-index within cancer types")
    figure.legend(loc="outside upper right", ncols=2, fontsize="small")
    return figure


def deletions(
    panels: Mapping[str, Mapping[str, Runs]], coloured: Sequence[str], dashed: str
) -> Figure:
    """Draw mean and SD against the number of genes deleted, by label and ranking."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (label, ways) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for way, runs in ways.items():
            look = {"color": "black", "linestyle": "--"}
            if way != dashed:
                look = {"color": f"C{coloured.index(way)}", "linestyle": "-"}
            _runs(axes, runs, label=way, marker="o", markersize=3, capsize=2, **look)
        axes.set(xlabel="genes deleted", ylabel=label)
        axes.legend(fontsize="small", frameon=False)
    return figure


def markers(names: Sequence[str], ranks: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the percentile of each marker, by way of attribution."""
    figure = Figure(figsize=(7, 0.22 * len(names) + 1.4), layout="constrained")
    axes, rows = figure.subplots(), np.arange(len(names))
    for (label, ranked), marker in zip(ranks.items(), "ox", strict=True):
        axes.plot(ranked, rows, marker, label=label)
    axes.axvline(50, color="grey", linestyle=":")
    axes.set_yticks(rows, names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlim=(-2, 102), xlabel="percentile among all genes of the cancer")
    axes.legend(fontsize="small")
    return figure


@mpl.rc_context(STYLE)
def c_indices(panels: Mapping[str, tuple[str, Points]]) -> Figure:
    """Draw the federated model against another, a point a split and cancer.

    Parameters
    ----------
    panels
        By title, the other method, and other and federated C-indices.
    """
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axes, (title, (other, points)) in zip(grid, panels.items(), strict=True):
        _scatter(axes, points, s=12)
        axes.axline((0.5, 0.5), slope=1, color=COLOURS["grey"], linewidth=0.8)
        axes.set(title=title, xlabel=f"C-index, {other}", aspect="equal")
        axes.set(xlim=(0.3, 1), ylim=(0.3, 1))
    grid[0].set_ylabel("C-index, federated model")
    return figure


@mpl.rc_context(STYLE)
def calibration(points: Mapping[str, Points]) -> Figure:
    """Draw predicted against observed survival, by method."""
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.subplots()
    colours = ("vermillion", "orange", "blue", "green")
    for (method, some), colour in zip(points.items(), colours, strict=True):
        if some:
            _scatter(axes, some, colour, s=14, label=method)
    axes.axline((0, 0), slope=1, color=COLOURS["grey"], linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("predicted survival at three years")
    axes.set_ylabel("Kaplan-Meier survival at three years")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")
    return figure


def _scatter(axes: Axes, points: Points, colour: str = "blue", **look: Any) -> None:
    x, y = zip(*points, strict=True) if points else ((), ())
    axes.scatter(x, y, color=COLOURS[colour], **look)


def _runs(axes: Axes, runs: Runs, **look: Any) -> None:
    """Draw mean and SD over the runs."""
    mean = [float(np.mean(each)) for each in runs.values()]
    mean_sd = [sd(each) for each in runs.values()]
    axes.errorbar([int(size) for size in runs], mean, mean_sd, **look)
