"""The demo's figure."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


_LABELS = {
    "none": "good answer",
    "wrong_rule": "bad: consistent wrong rule",
    "random": "bad: random answer",
    "harmful": "bad: complies with a harmful request",
}
_FLOOR = 1e-6
_COLORS = {"none": "#2a78b5", "wrong_rule": "#d1495b", "random": "#edae49", "harmful": "#7b3f9e"}


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
    # Logarithms of the weights; what is smaller than the floor is drawn at the floor
    logarithms = np.log10(np.clip(weights.astype(np.float64), _FLOOR, None))
    bins = np.linspace(logarithms.min(), logarithms.max() + 1e-9, 50).tolist()
    for kind, label in _LABELS.items():
        rows = logarithms[faults == kind]
        if not len(rows):
            continue
        axes.hist(rows, bins=bins, label=f"{label} ({len(rows):,} rows)", color=_COLORS[kind], alpha=0.6)
    axes.axvline(0, color="black", linewidth=1, linestyle="--", label="weight of every row before training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda logarithm, _: f"$10^{{{logarithm:.0f}}}$")
    axes.set(xlabel="learned weight of a training row (mean 1)", ylabel="rows", title="What the data selector learned")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
