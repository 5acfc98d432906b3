"""The demo's figure."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


_LABELS = {"none": "good answer", "wrong_rule": "bad: consistent wrong rule", "random": "bad: random answer"}
_COLORS = {"none": "#2a78b5", "wrong_rule": "#d1495b", "random": "#edae49"}


def plot_weights(weights: np.ndarray, faults: np.ndarray, path: Path) -> None:
    """
    Draw how the learned weights spread over good and bad rows, and save it as a PNG.

    Args:
        weights (`numpy.ndarray`): shape (N,), mean 1, positive.
        faults (`numpy.ndarray`): kind of each row, shape (N,), of `planted_faults.FAULTS`.
        path (`pathlib.Path`): file to write.
    """
    # A canvas of its own: no window, and the caller's pyplot state stays as it is
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    smallest = max(weights.min(), 1e-4)
    bins = np.geomspace(smallest, max(weights.max(), 2 * smallest), 50).tolist()
    for kind, label in _LABELS.items():
        rows = np.clip(weights[faults == kind], smallest, None)
        axes.hist(rows, bins=bins, label=f"{label} ({len(rows):,} rows)", color=_COLORS[kind], alpha=0.6)
    axes.axvline(1, color="black", linewidth=1, linestyle="--", label="weight of every row before training")
    axes.set_xscale("log")
    axes.set(xlabel="learned weight of a training row (mean 1)", ylabel="rows", title="What the data selector learned")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
