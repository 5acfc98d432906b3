"""The default run on the toys: its table beside the alternatives, and how far its probabilities can be relied on."""

import statistics

from matplotlib.figure import Figure

from lib.method_names import ABOVE_ZERO, DEFAULT, DIFFERENCE, FIRST_ROUND, ORACLE, SFT, SFT_LOSS, TRUSTED, TRUSTED_LOSS
from lib.results import Results, markdown
from lib.toys import TOYS


_FEWEST_ROWS = 30  # for a point
SIMPLE = (SFT, SFT_LOSS, TRUSTED_LOSS, DIFFERENCE)
"""Losses that rank rows; the first by that of the model that was trained on all of them."""


def default_run_table(results: Results) -> str:
    """The default run, told nothing, beside the alternatives on the seeds that it has: means over them."""
    rows = []
    for problem in TOYS:
        of_default = results.values(problem, DEFAULT, "exact_match")

        def mean(method: str, measure: str) -> float:
            by_seed = results.values(problem, method, measure)  # noqa: B023
            return statistics.mean(by_seed[seed] for seed in of_default)  # noqa: B023

        if of_default:
            matches = (DEFAULT, FIRST_ROUND, SFT, TRUSTED, ABOVE_ZERO, DIFFERENCE, ORACLE)
            best = max(mean(method, "auroc") for method in SIMPLE)
            cells = [mean(method, "exact_match") for method in matches]
            cells += [mean(DEFAULT, "auroc"), best]
            cells += [mean(DEFAULT, measure) for measure in ("noise_rate", "dropped", "good_among_dropped")]
            rows.append([problem, str(len(of_default)), *(f"{cell:.3f}" for cell in cells)])
    heads = ["default", "learned weights", "SFT", "SFT, trusted rows", "difference above zero", "difference, told"]
    return markdown(
        [
            "problem",
            "seeds",
            *heads,
            "oracle",
            "AUROC",
            "best of four losses",
            "noise rate",
            "dropped",
            "good among them",
        ],
        rows,
    )


def reliability_figure(results: Results) -> Figure:
    """How many rows are good among those of about one probability, on all problems, for a line each."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for problem in TOYS:
        points = []
        for part in range(10):
            rows, good, believed = (
                sum(results.values(problem, DEFAULT, f"{name} {part}").values())
                for name in ("rows", "good", "believed")
            )
            if rows >= _FEWEST_ROWS:
                points.append((believed / rows, good / rows))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1, label=problem)
    axes.set(xlabel="probability that a row is good", ylabel="share of good rows", xlim=(0, 1), ylim=(0, 1))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
    return figure
