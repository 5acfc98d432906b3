"""The figures of a report: SVG in a data URI, so that a page needs no other file and prints sharply."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .weight_history import BIN_EDGES, WeightHistory


_COLORS = ("#2a78b5", "#d1495b", "#3a8f5c", "#8a5fb0")
_SIZE = (9.0, 2.9)  # inches
_MOST_POINTS = 1000  # of a curve: more could not be told apart, and would fill the page

Series = tuple[Sequence[float], Sequence[float]]
"""Steps, and values at those steps."""


def draw_curves(panels: Sequence[tuple[str, Mapping[str, Series]]]) -> str:
    """
    Curves over the optimizer steps in panels next to each other, as a data URI.

    Args:
        panels (`Sequence`): for each panel the label of its y-axis, and named series.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for color, (name, (steps, values)) in zip(_COLORS, curves.items()):
            stride = -(-len(steps) // _MOST_POINTS)
            shown = slice(None, None, max(stride, 1))
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps[shown], values[shown], label=name, color=color, marker=marker, markersize=3, linewidth=1.3)
        axes.set(xlabel="optimizer step", ylabel=label)
        shown_values = [value for _, values in curves.values() for value in values if np.isfinite(value)]
        if label.startswith("loss"):
            if shown_values and min(shown_values) > 0:  # the end, where losses are small, is what matters
                axes.set_yscale("log")
        elif all(0 <= value <= 1 for value in shown_values):
            axes.set_ylim(-0.03, 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize="small")
    return _data_uri(figure)


def draw_weights(history: WeightHistory, ratios: Series) -> str:
    """
    Spread of the weights, at every checkpoint if there are several, and effective sample ratio, as a data URI.

    Args:
        history ([`~trl_bilevel.weight_history.WeightHistory`]): at least one entry.
        ratios (`tuple`): effective sample ratios that were logged; those of the history if there are fewer.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    shares = history.counts / history.counts.sum(axis=1, keepdims=True)  # (E, bins)
    used = np.flatnonzero(shares.any(axis=0))
    bins = slice(max(used[0] - 1, 0), used[-1] + 2)
    edges = BIN_EDGES[bins.start : bins.stop + 1]
    if len(history.steps) == 1:
        left.stairs(shares[0, bins], edges, fill=True, color=_COLORS[0])
        left.set(xlabel="weight of a row (mean 1)", ylabel="share of the rows")
        left.xaxis.set_major_locator(MaxNLocator(nbins=6))
        left.xaxis.set_major_formatter(_weight_label)
        left.axvline(0, color="black", linewidth=0.8, linestyle="--")
        left.spines[["top", "right"]].set_visible(False)
    else:
        _draw_spread(figure, left, history, shares[:, bins], edges)
    steps, values = ratios if len(ratios[0]) > len(history.steps) else (history.steps, history.effective_sample_ratios)
    right.plot(steps, values, color=_COLORS[0], marker="o" if len(steps) < 30 else None, markersize=3)
    right.set(xlabel="optimizer step", ylabel="effective sample ratio", ylim=(0, 1.05))
    right.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    return _data_uri(figure)


def _draw_spread(figure: Figure, axes: Axes, history: WeightHistory, shares: np.ndarray, edges: np.ndarray) -> None:
    columns = np.arange(len(history.steps) + 1) - 0.5  # one for each entry, whatever the steps between them
    mesh = axes.pcolormesh(
        columns,
        edges,
        np.ma.masked_equal(shares.T, 0),
        norm=LogNorm(vmin=1 / history.counts[0].sum(), vmax=1),
        cmap="Blues",
        rasterized=True,
    )
    axes.set(xlabel="checkpoint at optimizer step", ylabel="weight of a row (mean 1)")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(_weight_label)
    ticks = np.unique(np.linspace(0, len(history.steps) - 1, 6).round().astype(int))
    axes.set_xticks(ticks, [f"{history.steps[tick]:,}" for tick in ticks])
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
    figure.colorbar(mesh, ax=axes, label="share of the rows")


def _weight_label(logarithm: float, _: float) -> str:
    """The outermost bins hold what is beyond them."""
    below = "≤" if logarithm <= BIN_EDGES[0] else "≥" if logarithm >= BIN_EDGES[-1] else ""
    return f"{below}{10**logarithm:.2g}"


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    # The same run gives the same file: ids from a fixed salt, and no date
    with matplotlib.rc_context({"svg.hashsalt": "trl-bilevel", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
