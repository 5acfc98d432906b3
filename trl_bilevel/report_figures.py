"""The figures of a report: SVG in a data URI, so that a page needs no other file and prints sharply."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
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
        if all(0 <= value <= 1 for _, values in curves.values() for value in values):
            axes.set_ylim(-0.03, 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize="small")
    return _data_uri(figure)


def draw_weight_history(history: WeightHistory) -> str:
    """Spread of the weights and effective sample ratio at every checkpoint, as a data URI."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    shares = history.counts / history.counts.sum(axis=1, keepdims=True)  # (E, bins)
    used = np.flatnonzero(shares.any(axis=0))
    bins = slice(max(used[0] - 1, 0), used[-1] + 2)
    edges = BIN_EDGES[bins.start : bins.stop + 1]
    columns = np.arange(len(history.steps) + 1) - 0.5  # one for each entry, whatever the steps between them
    mesh = left.pcolormesh(
        columns,
        edges,
        np.ma.masked_equal(shares[:, bins].T, 0),
        norm=LogNorm(vmin=1 / history.counts[0].sum(), vmax=1),
        cmap="Blues",
        rasterized=True,
    )
    left.set(xlabel="checkpoint at optimizer step", ylabel="weight of a row (mean 1)")
    left.yaxis.set_major_locator(MaxNLocator(nbins=6))
    left.yaxis.set_major_formatter(lambda logarithm, _: f"{10**logarithm:.2g}")
    ticks = np.unique(np.linspace(0, len(history.steps) - 1, 6).round().astype(int))
    left.set_xticks(ticks, [f"{history.steps[tick]:,}" for tick in ticks])
    left.axhline(0, color="black", linewidth=0.8, linestyle="--")
    figure.colorbar(mesh, ax=left, label="share of the rows")
    marker = "o" if len(history.steps) < 30 else None
    right.plot(history.steps, history.effective_sample_ratios, color=_COLORS[0], marker=marker, markersize=3)
    right.set(xlabel="optimizer step", ylabel="effective sample ratio", ylim=(0, 1.05))
    right.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    return _data_uri(figure)


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    # The same run gives the same file: ids from a fixed salt, and no date
    with matplotlib.rc_context({"svg.hashsalt": "trl-bilevel", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
