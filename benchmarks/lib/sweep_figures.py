"""Figures of a measure over the share of bad rows, and over the number of trusted rows, of toy problems."""

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from lib.method_names import DIFFERENCE, FIRST_ROUND, ORACLE, ROUNDS, SECOND_ROUND, SFT, TRUSTED, TRUSTED_LOSS
from lib.results import Results
from lib.tables import ByMethod, read_problem
from lib.toys import TOYS, Toy, read_toy


METHODS = (SFT, TRUSTED, DIFFERENCE, TRUSTED_LOSS, FIRST_ROUND, SECOND_ROUND, ORACLE)
MEASURES = {"exact_match": "held-out exact match", "auroc": "AUROC of the row ranking"}
AXES = {"share of bad rows": "fault_ratio", "trusted rows": "num_trusted"}
FILES = {"share of bad rows": "share_of_bad_rows.png", "trusted rows": "number_of_trusted_rows.png"}
Sweep = dict[float, ByMethod]
"""Results by what is on the horizontal axis."""


def sweep_of(results: Results, axis: str, seeds: list[int]) -> Sweep:
    """The toys that differ from the default one in that alone, with what there is of them."""
    sweep = {}
    for name in TOYS:
        toy = read_toy(name)
        at = toy._asdict()[AXES[axis]]
        if toy == Toy()._replace(**{AXES[axis]: at}) and (found := read_problem(results, name, seeds)):
            sweep[at] = found
    return dict(sorted(sweep.items()))


def plot_sweep(sweep: Sweep, axis: str, path: Path) -> None:
    """
    One panel per measure, one line per method: mean, and the range over the seeds as bars. A second round's ranking is
    that of its last model, not the one that it was made from as the others' are, and is not drawn.
    """
    figure = Figure(figsize=(5.5 * len(MEASURES), 5.5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for index, method in enumerate(METHODS):
            if key == "auroc" and method in ROUNDS:
                continue
            points = {
                at: values
                for at, found in sweep.items()
                if (values := [result[key] for result in found.get(method, {}).values() if key in result])
            }
            if points:
                means = [statistics.mean(values) for values in points.values()]
                below = [mean - min(values) for mean, values in zip(means, points.values(), strict=True)]
                above = [max(values) - mean for mean, values in zip(means, points.values(), strict=True)]
                style = {"color": f"C{index}", "marker": "o", "capsize": 3}
                axes.errorbar(list(points), means, yerr=[below, above], label=method, **style)
        if axis == "trusted rows":
            axes.set_xscale("log")
        axes.set_xticks(list(sweep), [f"{point:g}" for point in sweep])
        axes.minorticks_off()
        axes.set(xlabel=axis, ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(MEASURES) - 1, frameon=False)
    figure.suptitle("mixed faults")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def sweep_figures(results: Results, folder: Path, seeds: list[int]) -> None:
    """Both, where there is more than one point to draw."""
    for axis, name in FILES.items():
        sweep = sweep_of(results, axis, seeds)
        if len(sweep) > 1:
            plot_sweep(sweep, axis, folder / name)
