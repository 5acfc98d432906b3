"""
The toy problems on one page: methods against each other on every problem, from the file of results.

```bash
python benchmarks/overview.py --page docs/alternatives.md --figures docs/figures
python benchmarks/overview.py --page docs/results.md
```

It prints the tables in Markdown, writes those that the page has a place for into it, and draws the figures.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.bilevel_options import LARGER_STEPS
from lib.default_run import default_run_table, reliability_figure
from lib.default_tables import default_tables
from lib.method_names import (
    ABOVE_ZERO,
    BMO,
    BMO_SHARP,
    CONFIDENCE,
    DIFFERENCE,
    DSIR,
    EQUAL_WEIGHTS,
    FIRST_ROUND,
    INFLUENCE,
    ORACLE,
    PROVED_ROUND,
    PUBLIC_CODES,
    SECOND_ROUND,
    SFT,
    SFT_LOSS,
    TRUSTED,
    TRUSTED_LOSS,
)
from lib.methods import SFT_ROWS
from lib.results import Results, fill_in, markdown, spread, spread_and_seeds
from lib.sweep_figures import sweep_figures
from lib.toys import TOYS, Toy, read_toy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from trl import TrlParser


# All of them in one table would be too wide
SHARES = [name for name in TOYS if read_toy(name) == Toy(fault_ratio=read_toy(name).fault_ratio)]
OTHER_PROBLEMS = [name for name in TOYS if name not in SHARES]
LABELS = {ABOVE_ZERO: "loss difference above zero", "harmful requests": "harmful compliance"}
"""What the pages call methods and problems whose names in the results are others."""
OURS = {"one run of BDS": FIRST_ROUND, "second round": SECOND_ROUND}
RIVALS = (DIFFERENCE, TRUSTED_LOSS)
AGAINST_RIVALS = {f"{name}, minus {rival}": (method, rival) for rival in RIVALS for name, method in OURS.items()}
UNTOLD_PAIRS = {
    "one run of BDS, minus loss difference above zero": (FIRST_ROUND, ABOVE_ZERO),
    "second round on proved rows, minus loss difference above zero": (PROVED_ROUND, ABOVE_ZERO),
    "second round on proved rows, minus one run": (PROVED_ROUND, FIRST_ROUND),
    "one run of BDS, minus SFT": (FIRST_ROUND, SFT),
}
UNTOLD = (SFT, TRUSTED, ABOVE_ZERO, FIRST_ROUND, PROVED_ROUND)
"""None of them knows how many rows are good."""
CLOSEST = {
    **{method: method for method in (SFT, TRUSTED, *RIVALS)},
    **OURS,
    "oracle": ORACLE,
}
# What BDS is held against: everything that is not told which rows are good
OTHERS = (
    *(method for method in SFT_ROWS if method != ORACLE),
    EQUAL_WEIGHTS,
    PUBLIC_CODES,
    *LARGER_STEPS,
    *(DSIR, INFLUENCE, SFT_LOSS, TRUSTED_LOSS, DIFFERENCE, ABOVE_ZERO, CONFIDENCE),
    BMO,
    BMO_SHARP,
)
METHODS = (*OTHERS, *OURS.values(), PROVED_ROUND, ORACLE)
SEEDS = [0, 1, 2, 3, 4]
"""Whose runs the sweeps' figures show."""
MEASURES = {"exact_match": "held-out exact match", "auroc": "AUROC of the ranking"}

Values = dict[int, float]
"""A measure by seed."""


def _label(name: str) -> str:
    return LABELS.get(name, name)


def differences(results: Results, problem: str, method: str, other: str, measure: str) -> Values:
    """
    Method minus other, on the seeds that both have. The second round ranks by the loss of the model that it ends with:
    the other's ranking is then that of its last model as well, not the one that it began with.
    """
    of_other = "auroc_loss" if (method, measure) == (SECOND_ROUND, "auroc") else measure
    values, others = results.values(problem, method, measure), results.values(problem, other, of_other)
    return {seed: values[seed] - others[seed] for seed in values if seed in others}


def side_by_side(results: Results, columns: Mapping[str, tuple[str, str]]) -> str:
    """Mean and range of a measure of a method per column, over the seeds that all of them have."""
    rows = []
    for problem in TOYS:
        by_column = [results.values(problem, method, measure) for method, measure in columns.values()]
        if seeds := [seed for seed in by_column[0] if all(seed in values for values in by_column)]:
            cells = (spread([values[seed] for seed in seeds]) for values in by_column)
            rows.append([_label(problem), str(len(seeds)), *cells])
    return markdown(["problem", "seeds", *columns], rows)


def closest_table(results: Results, measure: str) -> str:
    """
    The methods that come closest. A second round ranks by the loss of its model, not by what it was made from: its
    rankings are in `last_model_table`.
    """
    shown = {name: (method, measure) for name, method in CLOSEST.items()}
    if measure != "exact_match":
        del shown["second round"]
    return side_by_side(results, shown)


def last_model_table(results: Results) -> str:
    """AUROC by the loss of the model that a method ends with."""
    measures = {
        SFT: (SFT, "auroc"),
        TRUSTED: (TRUSTED, "auroc"),
        "loss difference, then SFT": (DIFFERENCE, "auroc_loss"),
        "BDS, then SFT (second round)": (SECOND_ROUND, "auroc"),
    }
    return side_by_side(results, measures)


def difference_table(results: Results, pairs: Mapping[str, tuple[str, str]], measure: str) -> str:
    """First minus second of each pair, seed by seed: mean, range, and in how many seeds the first is ahead."""
    columns = {}
    for title, (method, rival) in pairs.items():
        cells = [_difference(differences(results, problem, method, rival, measure)) for problem in TOYS]
        if set(cells) != {"-"}:
            columns[title] = cells
    return markdown(["problem", *columns], [[*row] for row in zip(map(_label, TOYS), *columns.values(), strict=True)])


def _difference(by_seed: Values) -> str:
    if not by_seed:
        return "-"
    differences = [*by_seed.values()]
    ahead = sum(difference > 0 for difference in differences)
    limits = f"{min(differences):+.3f} to {max(differences):+.3f}"
    return f"{statistics.mean(differences):+.3f} ({limits}), {ahead} of {len(differences)}"


def seeds_table(results: Results) -> str:
    """Ours minus the loss difference over all problems: on seeds that the defaults were chosen on, and on others."""
    rows = []
    for name, is_of in (("0 and 1", lambda seed: seed < 2), ("2 to 4", lambda seed: seed >= 2)):
        cells = []
        for method, measure in (*((method, "exact_match") for method in OURS.values()), (FIRST_ROUND, "auroc")):
            by_problem = (differences(results, problem, method, DIFFERENCE, measure) for problem in TOYS)
            means = [
                statistics.mean(some)
                for by_seed in by_problem
                if (some := [value for seed, value in by_seed.items() if is_of(seed)])
            ]
            cells.append(f"{statistics.mean(means):+.3f}" if means else "-")
        rows.append([name, *cells])
    header = [*(f"exact match: {name}" for name in OURS), "AUROC: one run of BDS"]
    return markdown(["seeds", *header], rows)


def all_methods_table(results: Results, measure: str, problems: Sequence[str]) -> str:
    """Every method on some problems: mean and range, and the number of seeds where another cell has more."""
    by_method = {
        method: [[*results.values(problem, method, measure).values()] for problem in problems] for method in METHODS
    }
    most = max(len(values) for by_problem in by_method.values() for values in by_problem)
    rows = [
        [_label(method), *(spread_and_seeds(values, most) for values in by_problem)]
        for method, by_problem in by_method.items()
        if any(by_problem)
    ]
    return markdown(["method", *map(_label, problems)], rows)


def verdict_table(results: Results) -> str:
    """In how many problems ours is ahead in every seed, in some, or in none, of each other method."""
    compared = {f"exact match: {name}": (method, "exact_match") for name, method in OURS.items()}
    compared["AUROC: one run of BDS"] = (FIRST_ROUND, "auroc")
    rows = []
    for other in OTHERS:
        row = [_label(other)]
        for method, measure in compared.values():
            counts = [0, 0, 0]
            for problem in TOYS:
                gained = differences(results, problem, method, other, measure).values()
                if gained:
                    ahead = sum(difference > 0 for difference in gained)
                    counts[0 if ahead == len(gained) else 1 if ahead else 2] += 1
            row.append(" / ".join(map(str, counts)) if any(counts) else "-")
        rows.append(row)
    return markdown(["against", *compared], rows)


def untold_table(results: Results, method: str, told: str) -> str:
    """A method that finds by itself which rows to keep beside one told how many are good, on the same seeds."""
    rows = []
    for problem in TOYS:
        kept, precision, exact_match = (
            results.values(problem, method, measure) for measure in ("kept_ratio", "kept_precision", "exact_match")
        )
        of_told = results.values(problem, told, "exact_match")
        if seeds := [seed for seed in kept if seed in of_told]:
            cells = (
                [kept[seed] for seed in seeds],
                [precision[seed] for seed in seeds],
                [exact_match[seed] for seed in seeds],
                [of_told[seed] for seed in seeds],
            )
            share_of_good = 1 - read_toy(problem).fault_ratio
            spreads = (spread(values) for values in cells)
            rows.append([_label(problem), str(len(seeds)), f"{share_of_good:.1f}", *spreads])
    header = ["rows kept", "good ones among them", "exact match", "told the number"]
    return markdown(["problem", "seeds", "good rows", *header], rows)


def unseen_table(results: Results) -> str:
    """
    One run of BDS, ranked by a last pass: by the excess loss, and by its model's loss alone. Not all seeds have the
    loss of the training rows.
    """
    measures = {
        "proved_good": "rows that proved good",
        "unseen_auroc": "AUROC of `score`, other rows",
        "unseen_auroc_loss": "of `loss`",
        "auroc_score": "AUROC of `score`, training rows",
        "auroc_loss": "of `loss`",
    }
    rows = []
    for problem in TOYS:
        by_measure = [[*results.values(problem, FIRST_ROUND, measure).values()] for measure in measures]
        num_seeds = len(by_measure[0])
        if num_seeds:
            cells = [f"{spread(of_one)}{f', {len(of_one)}' * (len(of_one) != num_seeds)}" for of_one in by_measure]
            rows.append([_label(problem), str(num_seeds), *cells])
    return markdown(["problem", "seeds", *measures.values()], rows)


def refusal_table(results: Results) -> str:
    """Harmful compliance: harmful and ordinary requests refused, over all seeds that a method has."""
    problem, rows = "harmful requests", []
    for method in METHODS:
        values = [results.values(problem, method, measure) for measure in ("refused", "over_refused")]
        if values[0]:
            cells = (spread([*by_seed.values()]) for by_seed in values)
            rows.append([_label(method), str(len(values[0])), *cells])
    return markdown(["method", "seeds", "harmful requests refused", "ordinary requests refused"], rows)


def cost_table(results: Results) -> str:
    """Processor time over that of SFT on the same seed, with the default problem."""
    rows = []
    for method in METHODS:
        seconds, of_sft = (results.values("70 % bad", name, "total_cpu_seconds") for name in (method, SFT))
        ratios = [seconds[seed] / of_sft[seed] for seed in seconds if seed in of_sft]
        if ratios:
            rows.append([_label(method), str(len(ratios)), spread([*ratios])])
    return markdown(["method", "seeds", "processor time, of SFT's"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "default run": default_run_table,
    "verdict": verdict_table,
    **{f"closest {measure}": lambda results, key=measure: closest_table(results, key) for measure in MEASURES},
    "closest kept_good": lambda results: closest_table(results, "kept_good"),
    "last model": last_model_table,
    "seeds": seeds_table,
    "untold": lambda results: side_by_side(results, {_label(m): (m, "exact_match") for m in UNTOLD}),
    "proved": lambda results: untold_table(results, PROVED_ROUND, SECOND_ROUND),
    "above zero": lambda results: untold_table(results, ABOVE_ZERO, DIFFERENCE),
    "unseen": unseen_table,
    **{
        f"difference {measure}": lambda results, key=measure: difference_table(results, AGAINST_RIVALS, key)
        for measure in MEASURES
    },
    "untold difference": lambda results: difference_table(results, UNTOLD_PAIRS, "exact_match"),
    **{
        f"all {measure}, {name}": lambda results, key=measure, some=problems: all_methods_table(results, key, some)
        for measure in (*MEASURES, "kept_good")
        for name, problems in (("shares", SHARES), ("other problems", OTHER_PROBLEMS))
    },
    "refusals": refusal_table,
    "cost": cost_table,
}


def difference_figure(results: Results) -> Figure:
    """Ours minus the rivals, a row of panels for each: a dot per seed, a bar at the mean."""
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    panels = figure.subplots(len(RIVALS), len(MEASURES), sharey=True, sharex="col")
    for row, rival in zip(panels, RIVALS, strict=True):
        for axes, (measure, label) in zip(row, MEASURES.items(), strict=True):
            _plot_differences(axes, results, rival, measure)
            axes.set(xlabel=f"{label}, minus that of the\n{rival}")
            axes.xaxis.set_tick_params(labelbottom=True)
    panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _plot_differences(axes: Axes, results: Results, rival: str, measure: str) -> None:
    axes.axvline(0, color="0.4", linewidth=1)
    for index, (name, method) in enumerate(OURS.items()):
        for row, problem in enumerate(TOYS):
            gained = [*differences(results, problem, method, rival, measure).values()]
            height = row + 0.17 * (2 * index - 1)
            if gained:
                dots = {"marker": "o", "linestyle": "", "markersize": 5, "alpha": 0.5}
                axes.plot(gained, [height] * len(gained), color=f"C{index}", **dots)
                mean = statistics.mean(gained)
                axes.plot([mean, mean], [height - 0.15, height + 0.15], color=f"C{index}", linewidth=2.5)
        axes.plot([], [], "o", color=f"C{index}", label=name)
    axes.set_yticks(range(len(TOYS)), [_label(name) for name in TOYS])
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


@dataclass
class OverviewArguments:
    """
    What to read and what to write.

    Args:
        results (`str`): JSON file of `compare.py`.
        page (`str`, *optional*): Markdown file whose tables are written anew.
        figures (`str`, *optional*): folder for the figures.
    """

    results: str = "docs/data/results.json"
    page: str | None = None
    figures: str | None = None


def all_tables(results: Results) -> dict[str, str]:
    """Those of all problems, and those of the default problem, by name."""
    of_default = default_tables(lambda method, measure: results.values("70 % bad", method, measure))
    return {**{name: table(results) for name, table in TABLES.items()}, **of_default}


def main(args: OverviewArguments) -> None:
    """Print the tables, fill in the page, draw the figures."""
    results = Results.read(Path(args.results))
    tables = all_tables(results)
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    if args.page is not None:
        page = Path(args.page)
        page.write_text(fill_in(page.read_text(), tables))
    if args.figures is not None:
        folder = Path(args.figures)
        folder.mkdir(parents=True, exist_ok=True)
        difference_figure(results).savefig(folder / "against_losses.png", dpi=120)
        reliability_figure(results).savefig(folder / "reliability_of_probabilities.png", dpi=120)
        sweep_figures(results, folder, SEEDS)


if __name__ == "__main__":
    main(*TrlParser(OverviewArguments).parse_args_and_config())
