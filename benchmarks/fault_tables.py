"""Tables and figures of the planted-fault benchmark."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from alternatives import ALTERNATIVES
from fault_settings import FAULT_RATIO, VALIDATION_SIZE, SeedFiles, Setting
from matplotlib.figure import Figure
from method_names import ORACLE, ROUNDS, SFT
from result_tables import spread
from rich.console import Console
from rich.table import Table


Results = dict[str, dict[int, dict[str, float]]]
"""Measures by method and seed."""

TABLES = {
    "Training": {
        "exact_match": "held-out exact match",
        "of_the_way": "share of the way from SFT to oracle",
        "auroc": "AUROC of the row ranking",
        "kept_good": "good rows among those kept",
        "time_ratio": "time, of SFT's",
    },
    "Harmful requests": {
        "exact_match": "held-out exact match",
        "refused": "harmful requests refused",
        "over_refused": "ordinary requests refused",
        "auroc": "AUROC of the row ranking",
    },
    "Weights and rankings": {
        "effective_sample_ratio": "effective sample ratio",
        "good_weight": "weight on good rows",
        "final_auroc": "AUROC of a last pass over the rows",
        "final_auroc_loss": "of its losses alone",
    },
    "Questions and answers": {
        "exact_match": "held-out exact match",
        "refined": "rows refined",
        "refined_right": "right, of those that were wrong",
        "refined_spoiled": "good rows whose answer is wrong now",
        "kept_questions": "questions kept",
        "kept_right": "kept with a right answer",
    },
    "Rows never trained on": {
        "unseen_auroc": "AUROC of score()",
        "unseen_auroc_loss": "AUROC of the loss",
        "unseen_auroc_head": "AUROC of the amortized selector",
    },
    "Cost": {
        "seconds": "seconds",
        "time_ratio": "time, of SFT's",
        "cpu_ratio": "processor time, of SFT's",
    },
}
SWEEP_MEASURES = {
    "exact_match": "held-out exact match",
    "auroc": "AUROC of the row ranking",
    "refused": "harmful requests refused",
    "over_refused": "ordinary requests refused",
}
_IN_EVERY_TABLE = ("exact_match", "auroc")  # these alone are no reason for a row
NOT_INSTALLED = "not installed"


def read_results(
    folder: Path, methods: list[str], seeds: list[int], num_train_epochs: int, setting: Setting
) -> Results:
    """What is there, with the ratios to the same seed's SFT and oracle."""
    results: Results = defaultdict(dict)
    for method in methods:
        for seed in seeds:
            path = SeedFiles(folder / f"seed{seed}", num_train_epochs, setting).result(method)
            if path.is_file():
                results[method][seed] = json.loads(path.read_text())
    for per_seed in results.values():
        for seed, result in per_seed.items():
            worst, best = results.get(SFT, {}).get(seed), results.get(ORACLE, {}).get(seed)
            if worst and best and best["exact_match"] > worst["exact_match"]:
                gap = best["exact_match"] - worst["exact_match"]
                result["of_the_way"] = (result["exact_match"] - worst["exact_match"]) / gap
            for ratio, seconds in (("time_ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
                if worst and seconds in worst and seconds in result:
                    result[ratio] = result[seconds] / worst[seconds]
    return dict(results)


def is_missing_package(method: str) -> bool:
    return method in ALTERNATIVES and not ALTERNATIVES[method].is_installed


def print_setting(console: Console, results: Results, methods: list[str], setting: Setting, epochs: int) -> None:
    """All tables of one setting; a method whose package is missing says so."""
    for title, columns in TABLES.items():
        table = Table(title=f"{title}. {setting}, {epochs} epochs: mean (range) over the seeds")
        table.add_column("method", no_wrap=True)
        table.add_column("seeds", justify="right")
        for column in columns.values():
            table.add_column(column)
        for method in methods:
            per_seed = results.get(method, {})
            cells = [spread([result.get(key) for result in per_seed.values()]) for key in columns]
            if any(key in result for result in per_seed.values() for key in columns if key not in _IN_EVERY_TABLE):
                table.add_row(method, str(len(per_seed)), *cells)
            elif title == "Training" and is_missing_package(method):
                table.add_row(method, "0", NOT_INSTALLED)
        if table.row_count:
            console.print(table)


Sweep = dict[float, Results]
"""Results by fault ratio or by number of trusted rows."""


def sweeps_of(results: dict[Setting, Results], family: str) -> dict[str, Sweep]:
    """The two axes of a family, each with what there is of it; those of one point only are left out."""
    axes: dict[str, Sweep] = {"share of bad rows": {}, "trusted rows": {}}
    for setting, of_setting in sorted(results.items()):
        if setting.family != family or not of_setting:
            continue
        if setting.validation_size == VALIDATION_SIZE:
            axes["share of bad rows"][setting.fault_ratio] = of_setting
        if setting.fault_ratio == FAULT_RATIO:
            axes["trusted rows"][setting.validation_size] = of_setting
    return {axis: sweep for axis, sweep in axes.items() if len(sweep) > 1}


def print_sweep(console: Console, sweep: Sweep, methods: list[str], family: str, axis: str) -> None:
    """A measure per table, a point per column; the number of seeds is in brackets."""
    for key, measure in SWEEP_MEASURES.items():
        table = Table(title=f"{measure}, {family} faults, by {axis}: mean (range) [seeds]")
        table.add_column("method", no_wrap=True)
        for point in sweep:
            table.add_column(f"{point:g}")
        for method in methods:
            values = [[r[key] for r in results.get(method, {}).values() if key in r] for results in sweep.values()]
            if any(values):
                table.add_row(method, *(f"{spread(cell)} [{len(cell)}]" if cell else "-" for cell in values))
            elif is_missing_package(method) and key == "exact_match":
                table.add_row(method, NOT_INSTALLED)
        if table.row_count:
            console.print(table)


def plot_sweep(sweep: Sweep, methods: list[str], family: str, axis: str, path: Path) -> None:
    """
    One panel per measure, one line per method: mean, and the range over the seeds as bars. A second round's ranking is
    that of its last model, not the one that it was made from as the others' are, and is not drawn.
    """
    measured = {key for results in sweep.values() for of in results.values() for r in of.values() for key in r}
    drawn = [key for key in SWEEP_MEASURES if key in measured]
    figure = Figure(figsize=(5.5 * len(drawn), 5.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for index, method in enumerate(methods):
            if key == "auroc" and method in ROUNDS:
                continue
            points = {
                at: values
                for at, results in sweep.items()
                if (values := [r[key] for r in results.get(method, {}).values() if key in r])
            }
            if points:
                means = [statistics.mean(values) for values in points.values()]
                below = [mean - min(values) for mean, values in zip(means, points.values(), strict=True)]
                above = [max(values) - mean for mean, values in zip(means, points.values(), strict=True)]
                style = {"color": f"C{index % 10}", "marker": "os^Dvp"[index // 10 % 6], "capsize": 3}
                axes.errorbar(list(points), means, yerr=[below, above], label=method, **style)
        if axis == "trusted rows":
            axes.set_xscale("log")
        axes.set_xticks(list(sweep), [f"{point:g}" for point in sweep])
        axes.minorticks_off()
        axes.set(xlabel=axis, ylabel=SWEEP_MEASURES[key])
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(drawn) - 1, frameon=False)
    figure.suptitle(f"{family} faults")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
