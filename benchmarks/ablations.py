"""
Ablations: one option of the bilevel trainer at a time, the others as they are; a table and a figure each.

```bash
python benchmarks/compare.py --problems "70 % bad" --ablations all
python benchmarks/ablations.py --figures docs/figures/ablations
```

The first trains what the file of results lacks; the second prints and draws what is in it.
"""

import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from lib.bilevel_options import ABLATIONS
from lib.method_names import BMO, CONSTANT_LAMBDA, NO_VALUE_FUNCTION, REFINED
from lib.results import Results, spread
from lib.tables import ByMethod, read_problem
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from trl import TrlParser


MIN_SPAN = 0.12
"""Of a figure's vertical axes: six standard errors of an exact match on 500 rows."""
_MEASURES = {
    "exact_match": "held-out exact match",
    "auroc": "AUROC of the row ranking",
    "good_weight": "share of the weight on good rows",
}
_REFINED_MEASURES = {
    "exact_match": "held-out exact match",
    "proved_right": "questions kept with a right answer",
    "refined_right": "right, of those that were wrong",
}


# Printed, not drawn
_MORE = {"effective_sample_ratio": "effective sample ratio", "total_cpu_seconds": "processor seconds"}
_REFINED_MORE = {"refined_spoiled": "good rows whose answer is wrong now", "total_cpu_seconds": "processor seconds"}


def _is_refinement(option: str) -> bool:
    return option.startswith(("refine_", "num_refined", "importance_"))


def _measures(option: str) -> dict[str, str]:
    return _REFINED_MEASURES if _is_refinement(option) else _MEASURES


def print_ablation(console: Console, results: ByMethod, option: str) -> None:
    """A row per value of the option that was run."""
    measures = {**_measures(option), **(_REFINED_MORE if _is_refinement(option) else _MORE)}
    table = Table(title=f"{option}: mean (range) over the seeds")
    for column in (option, "seeds", *measures.values()):
        table.add_column(column)
    for value, method in ABLATIONS[option].items():
        if per_seed := results.get(method):
            cells = [spread([result.get(key) for result in per_seed.values()]) for key in measures]
            table.add_row(value, str(len(per_seed)), *cells)
    if table.row_count:
        console.print(table)


def plot_ablation(results: ByMethod, option: str, path: Path) -> bool:
    """
    One panel per measure: the mean of each value as a bar, blue for the run that the others differ from, and a dot per
    seed, joined across the values. Returns whether there was something to compare.
    """
    measures = _measures(option)
    points = {value: results[method] for value, method in ABLATIONS[option].items() if method in results}
    if len(points) < 2:
        return False
    values = {method: value for value, method in ABLATIONS[option].items()}
    reference = next(
        values[method] for method in (CONSTANT_LAMBDA, REFINED, NO_VALUE_FUNCTION, BMO) if method in values
    )
    figure = Figure(figsize=(3.4 * len(measures), 2.8), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(measures)), measures.items(), strict=True):
        _plot_panel(axes, points, key, reference)
        axes.set_title(label, fontsize=9)
    figure.suptitle(option, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    return True


def _plot_panel(axes: Axes, points: ByMethod, key: str, reference: str) -> None:
    drawn = []
    for at, (value, per_seed) in enumerate(points.items()):
        if values := [result[key] for result in per_seed.values() if key in result]:
            mean, color = statistics.mean(values), "C0" if value == reference else "C7"
            axes.plot([at - 0.3, at + 0.3], [mean, mean], color=color, lw=3)
            place = {"textcoords": "offset points", "xytext": (0, 4), "ha": "center"}
            axes.annotate(f"{mean:.3f}", (at, max(values)), fontsize=7, **place)
            drawn += values
    seeds = sorted({seed for per_seed in points.values() for seed in per_seed})
    for seed in seeds if len(seeds) > 1 else ():
        line = [(at, run[seed][key]) for at, run in enumerate(points.values()) if key in run.get(seed, {})]
        axes.plot([x for x, _ in line], [y for _, y in line], color="black", alpha=0.35, marker=".", lw=0.7)
    if drawn:  # never so narrow that chance looks like a difference
        middle, span = (max(drawn) + min(drawn)) / 2, max(1.3 * (max(drawn) - min(drawn)), MIN_SPAN)
        axes.set_ylim(middle - span / 2, middle + span / 2)
    axes.set_xticks(range(len(points)), [value.replace(", ", ",\n") for value in points], fontsize=8)
    axes.set_xlim(-0.6, len(points) - 0.4)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def file_name(option: str) -> str:
    """Of the option's figure."""
    return re.sub(r"\W+", "_", option) + ".png"


@dataclass
class AblationArguments:
    """
    What to read and what to draw.

    Args:
        results (`str`): JSON file of `compare.py`.
        problem (`str`): whose runs are shown.
        options (`list[str]`): of `ABLATIONS`, by default all.
        seeds (`list[int]`): whose runs are shown.
        figures (`str`, *optional*): folder for a figure per option.
    """

    results: str = "docs/data/results.json"
    problem: str = "70 % bad"
    options: list[str] = field(default_factory=lambda: list(ABLATIONS))
    seeds: list[int] = field(default_factory=lambda: [0])
    figures: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.options) - set(ABLATIONS)):
            raise ValueError(f"Unknown options {unknown}. Known are {list(ABLATIONS)}.")


def main(args: AblationArguments) -> None:
    """Print a table per option, and draw its figure where there is something to compare."""
    console = Console(width=190)
    results = read_problem(Results.read(Path(args.results)), args.problem, args.seeds)
    for option in args.options:
        print_ablation(console, results, option)
        if args.figures is not None:
            path = Path(args.figures) / file_name(option)
            if plot_ablation(results, option, path):
                console.print(f"Figure: {path}")


if __name__ == "__main__":
    main(*TrlParser(AblationArguments).parse_args_and_config())
