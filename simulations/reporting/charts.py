"""The charts of a report, each as inline SVG that follows the page's light and dark.

Colours leave here as CSS variables (`var(--blue, #0072b2)`), text as text in the page's
own font, backgrounds as nothing. A method looks the same in every chart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator

from fedgex.simulations.reporting.schema import (
    Classifications,
    Imputations,
    KaplanMeier,
    PerGene,
    Round,
    Survivals,
    headline_key,
)

# The palette of Okabe and Ito (2008), which every kind of colour vision distinguishes.
# The page redefines the variables for dark mode; these are the values of light mode.
COLOURS = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "vermillion": "#d55e00",
    "purple": "#cc79a7",
    "grey": "#8a929c",
    "ink": "#1b1f24",
    "muted": "#5f6873",
    "rule": "#dfe3e8",
}

METHODS = {
    "model": ("federated model", "blue", "o"),
    "federated": ("federated model", "blue", "o"),
    "alone": ("local model", "orange", "^"),
    "pooled": ("pooled data", "ink", "s"),
    "gaussian": ("Gaussian", "vermillion", "v"),
    "mixture": ("Gaussian mixture", "purple", "P"),
    "ppca": ("probabilistic PCA", "green", "D"),
    "knn": ("k nearest neighbours", "orange", "^"),
    "mean": ("gene mean", "grey", "s"),
    "cox_ridge": ("Cox ridge", "vermillion", "v"),
    "pca_cox": ("PCA + Cox", "green", "D"),
    "logistic": ("logistic regression", "vermillion", "v"),
}
"""Label, colour and marker of each method, in the order of legends and tables.

Methods of one part share a look: blue is the federation, ink the pooled ideal,
vermillion the strong linear reference, green the one through principal components."""
LABELS = {method: label for method, (label, _, _) in METHODS.items()}

SCHEMES = {
    "mcar": "missing at random",
    "panel": "entire genes missing",
    "mnar": "low expression missing",
}
"""Ways of hiding values, as the reader knows them."""

LOSS_UNITS = {
    "pretraining": "gene variances",
    "classification": "nats",
    "survival": "nats",
}

Look = dict[str, Any]
DAYS_PER_YEAR = 365.25
WIDTH = 7.2  # inches: two columns of a journal
DASHED = (0, (4, 2))
DOTTED = (0, (1, 1.5))

STYLE: dict[Any, Any] = dict(
    mpl.rc_params_from_file(
        Path(__file__).with_name("charts.mplstyle"), use_default_template=False
    )
)


@mpl.rc_context(STYLE)
def rounds(rounds: Sequence[Round]) -> str:
    """Draw the loss of each phase, and its hold-out error where there is one."""
    phases: dict[str, list[Round]] = {}
    for r in rounds:
        phases.setdefault(r.phase, []).append(r)
    judged = {p for p, of in phases.items() if any(r.holdout_mse for r in of)}
    figure, axes = _panels(len(phases) + len(judged), height=2.3)
    remaining = iter(axes)
    for phase, of_phase in phases.items():
        ax = next(remaining)
        ax.set_title(f"{phase}: loss at the hospitals")
        unit = LOSS_UNITS.get(phase)
        ax.set_ylabel(f"loss ({unit})" if unit else "loss")
        _draw_losses(ax, of_phase)
        if phase in judged:
            ax = next(remaining)
            ax.set_title(f"{phase}: hold-out error")
            ax.set_ylabel("MSE (gene variances)")
            _draw_holdout(ax, of_phase)
    for ax in axes:
        ax.set_xlabel("round")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if ax.lines:
            ax.legend()
    return _svg(figure, "rounds")


@mpl.rc_context(STYLE)
def imputation(scores: Imputations) -> str:
    """Draw each method's error against how much is missing, a panel a scheme."""
    figure, axes = _panels(3, height=2.6)
    for ax, (scheme, title) in zip(axes, SCHEMES.items(), strict=True):
        ax.set_title(title)
        for method in in_order(scores):
            of_scheme = scores[method].get(scheme, {})
            errors = {k: score.mse for k, score in of_scheme.items()}
            _draw_method(ax, method, errors, 1 if scheme == "panel" else 100)
        if scheme == "panel":
            _count_genes(ax, [of.get(scheme, {}) for of in scores.values()])
        else:
            ax.set_xlim(0, 100)
            ax.set_xlabel("values missing (%)")
    axes[0].set_ylabel("MSE (gene variances)")
    _legend_above(figure, axes)
    return _svg(figure, "imputation")


@mpl.rc_context(STYLE)
def per_gene(genes: PerGene) -> str:
    """Draw the model's error against the Gaussian's, and the model's correlations."""
    figure = _figure(WIDTH, 3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    pairs = genes.pairs()
    top = 1.05 * max((value for pair in pairs for value in pair), default=1)
    left.plot((0, top), (0, top), color=COLOURS["muted"], linewidth=0.8)
    blue = COLOURS["blue"]
    model, gaussian = zip(*pairs, strict=True) if pairs else ((), ())
    left.plot(gaussian, model, "o", markersize=2, alpha=0.5, color=blue)
    for x, y, side, text in (
        (0.04, 0.93, "left", "Gaussian better"),
        (0.97, 0.05, "right", "model better"),
    ):
        left.text(x, y, text, ha=side, color=COLOURS["muted"], transform=left.transAxes)
    left.set(xlim=(0, top), ylim=(0, top), aspect="equal")
    left.set_title("error of each gene")
    left.set_xlabel("Gaussian, MSE (gene variances)")
    left.set_ylabel("model, MSE (gene variances)")

    correlations = [r for r in genes.model_r if r is not None]
    lowest = math.floor(20 * min([0, *correlations])) / 20
    bins = [b / 20 for b in range(round(20 * lowest), 21)]
    right.hist(correlations, bins=bins, rwidth=0.9, color=blue)
    right.set_xlim(lowest, 1)
    right.set_title("correlation of each gene, model")
    right.set_xlabel("restored against true values (Pearson r)")
    right.set_ylabel("number of genes")
    return _svg(figure, "per-gene")


@mpl.rc_context(STYLE)
def survival(scores: Survivals) -> str:
    """Draw a dot for each method and cohort, with one standard deviation either way."""
    methods = in_order(method for of in scores.values() for method in of)
    row_height = 0.16 + 0.085 * len(methods)
    figure = _figure(WIDTH, 0.8 + row_height * len(scores))
    ax = figure.subplots()
    ax.grid(visible=False)
    ax.axvline(0.5, color=COLOURS["muted"], linewidth=0.8, linestyle=DASHED)
    for i, method in enumerate(methods):
        label, colour, marker = METHODS[method]
        shift = (i - (len(methods) - 1) / 2) / (len(methods) + 1.5)
        dots = [
            (score.c_index, row + shift, score.sd or 0.0)
            for row, of_cohort in enumerate(scores.values())
            if (score := of_cohort.get(method)) and score.c_index is not None
        ]
        x, y, sd = zip(*dots, strict=True) if dots else ((), (), ())
        ax.errorbar(
            x,
            y,
            xerr=sd or None,
            linestyle="none",
            elinewidth=0.8,
            marker=marker,
            markersize=4.8,
            color=COLOURS[colour],
            label=label,
        )
    for row in range(1, len(scores)):
        ax.axhline(row - 0.5, color=COLOURS["rule"], linewidth=0.6)
    ax.set_ylim(len(scores) - 0.5, -0.5)
    ax.set_yticks(range(len(scores)), list(scores))
    ax.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("C-index (0.5 is chance, 1 is a perfect order)")
    _legend_above(figure, [ax])
    return _svg(figure, "survival")


@mpl.rc_context(STYLE)
def kaplan_meier(curves: Mapping[str, KaplanMeier]) -> str:
    """Draw survival of low and high predicted risk, a panel a cohort."""
    figure, axes = _panels(len(curves), height=2.2)
    for ax, (cohort, km) in zip(axes, curves.items(), strict=True):
        for group, colour, label in ((km.low, "grey", "low"), (km.high, "ink", "high")):
            years = [0, *(day / DAYS_PER_YEAR for day in group.days)]
            look: Look = {"color": COLOURS[colour], "label": f"{label} predicted risk"}
            ax.step(years, [1, *group.survival], where="post", **look)
        ax.set_title(cohort, pad=17)
        sizes = f"low n = {km.low.patients}, high n = {km.high.patients}, "
        place, muted = ax.transAxes, COLOURS["muted"]
        sizes += p_value(km.logrank_p)
        ax.text(0, 1.04, sizes, fontsize=7.2, color=muted, transform=place)
        ax.set(xlim=(0, None), ylim=(0, 1.02))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.set_xlabel("time (years)")
    figure.supylabel("share surviving", fontsize=STYLE["font.size"])
    _legend_above(figure, axes)
    return _svg(figure, "kaplan-meier")


@mpl.rc_context(STYLE)
def classification(scores: Classifications) -> str:
    """Draw accuracy and macro-F1 against the number of genes measured."""
    figure, axes = _panels(2, height=2.6)
    for ax, measure in zip(axes, ("accuracy", "macro_f1"), strict=True):
        for method in in_order(scores):
            shares = {k: getattr(s, measure) for k, s in scores[method].items()}
            _draw_method(ax, method, shares, 1)
        _count_genes(ax, list(scores.values()))
    axes[0].set_title("accuracy")
    axes[0].set_ylabel("share of patients")
    axes[1].set_title("macro-F1")
    axes[1].set_ylabel("F1, mean of the types")
    _legend_above(figure, axes)
    return _svg(figure, "classification")


def p_value(p: float | None) -> str:
    """Return a p-value as journals print it."""
    if p is None:
        return "p not estimable"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def in_order(methods: Iterable[str]) -> list[str]:
    """Return methods, each once, in the order of legends and tables."""
    present = set(methods)
    return [method for method in METHODS if method in present]


def _panels(n: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of `n` panels, up to three in a row."""
    columns = 2 if n in (2, 4) else min(n, 3)
    rows = math.ceil(n / columns)
    figure = _figure(WIDTH * 0.6 if n == 1 else WIDTH, height * rows)
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[n:]:
        ax.remove()
    return figure, axes[:n]


def _figure(width: float, height: float) -> Figure:
    """Return a figure that makes room for labels and sets panels well apart, inches."""
    spacing = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.07, hspace=0.09)
    return Figure(figsize=(width, height), layout=spacing)


def _draw_losses(ax: Axes, rounds: Sequence[Round]) -> None:
    for label, style, losses in (
        ("while training", "-", {r.round: r.train_loss for r in rounds}),
        ("judged", DASHED, {r.round: r.judged_loss for r in rounds}),
    ):
        if any(loss is not None for loss in losses.values()):
            look: Look = {"color": COLOURS["blue"], "linestyle": style, "label": label}
            ax.plot(*_coordinates(losses), **look)


def _draw_holdout(ax: Axes, rounds: Sequence[Round]) -> None:
    for scheme, style, label in (
        ("mcar", "-", "{:.0%} missing at random"),
        ("panel", DASHED, "{:.0f} genes measured"),
        ("mnar", DOTTED, "{:.0%} missing, low first"),
    ):
        errors = {
            r.round: of_round
            for r in rounds
            if (of_round := (r.holdout_mse or {}).get(scheme))
        }
        if errors:
            key = headline_key(key for of_round in errors.values() for key in of_round)
            points = _coordinates({r: of.get(key) for r, of in errors.items()})
            look: Look = {"color": COLOURS["blue"], "linestyle": style}
            ax.plot(*points, label=label.format(float(key)), **look)


def _draw_method(
    ax: Axes, method: str, values: Mapping[str, float | None], factor: float
) -> None:
    """Draw one method's line, with `factor` on the numbers that the keys name."""
    label, colour, marker = METHODS[method]
    points = _coordinates({float(k) * factor: value for k, value in values.items()})
    look: Look = {"color": COLOURS[colour], "marker": marker, "label": label}
    on_top = 3 if colour == "blue" else 2  # the subject of the report
    ax.plot(*points, zorder=on_top, **look)


def _coordinates(
    values: Mapping[int, float | None] | Mapping[float, float | None],
) -> tuple[list[float], list[float]]:
    """Return x rising and y, with a gap (NaN) where a value is missing."""
    points = sorted((x, math.nan if y is None else y) for x, y in values.items())
    return [x for x, _ in points], [y for _, y in points]


def _count_genes(ax: Axes, tables: Sequence[Mapping[str, object]]) -> None:
    """Make x a logarithmic count of genes, with a tick at each number used."""
    numbers = sorted({int(key) for table in tables for key in table})
    ax.set_xlabel("genes measured")
    if numbers:
        ax.set_xscale("log")
        ax.set_xticks(numbers, [str(n) for n in numbers])
        ax.xaxis.set_minor_locator(NullLocator())


def _legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """Give all panels one legend, with each label once."""
    handles: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = 5 if len(handles) <= 5 else math.ceil(len(handles) / 2)
    names, lines = list(handles), list(handles.values())
    figure.legend(lines, names, loc="outside upper left", ncols=columns)


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as an `svg` element that can stand with others in a page."""
    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]*)"', text)
    assert view_box, "matplotlib writes a viewBox"
    # No XML declaration, doctype or namespaces: HTML knows what an svg is. No style
    # sheet: it would apply to the entire page.
    body = re.sub(r"\A.*?<svg\b[^>]*>", "", text, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)  # unique in page
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    for colour, value in COLOURS.items():
        body = body.replace(value, f"var(--{colour}, {value})")
    width = float(view_box[1].split()[2])
    return (
        f'<svg viewBox="{view_box[1]}" style="max-width: {width / 520:.0%}" '
        f'aria-hidden="true">{body}'
    )
