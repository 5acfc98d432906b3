"""Ablations of the planted-fault benchmark: one option at a time, the others as they are; a figure each."""

import re
import statistics
from pathlib import Path
from typing import Any

from fault_tables import Results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from method_names import BMO, BMO_SHARP, CONSTANT_LAMBDA, FIRST_ROUND, NO_VALUE_FUNCTION
from result_tables import spread
from rich.console import Console
from rich.table import Table


# One option at a time: lambda must not follow what the option does to the rows
CONSTANT: dict[str, Any] = {"adaptive_validation_weight": False}
BY_THE_LOSS: dict[str, Any] = {"value_function": "none"}
# Answers that the model writes anew, greedily: in each of five refreshes those of the 30 % of the rows of the lowest
# weight
GREEDY_ANSWERS: dict[str, Any] = {"refine_ratio": 0.3, "refine_max_new_tokens": 16}
_REFINED = {**CONSTANT, **GREEDY_ANSWERS}
REFINED = "BDS, refined: lowest weight"

# Runs that differ from a method of the benchmark in one option. `batch_size` is that of training and trusted rows
ABLATION_OPTIONS: dict[str, dict[str, Any]] = {
    "lambda 0.5": {"validation_weight": 0.5},
    "lambda 0.7": {"validation_weight": 0.7},
    "lambda 1": {"validation_weight": 1.0},
    "adaptive lambda": {"adaptive_validation_weight": True},
    "lambda 1.0, 0.8, 0.6, 0.4": {"validation_weight": 1.0, "validation_weight_decay": 0.2},
    "lambda 1.0, 0.7, 0.4, 0.1": {"validation_weight": 1.0, "validation_weight_decay": 0.3},
    "step 1": {**CONSTANT, "selector_learning_rate": 1.0},
    "step 10": {**CONSTANT, "selector_learning_rate": 10.0},
    "prior 0.5": {**CONSTANT, "selector_prior": 0.5},
    "prior 0.05": {**CONSTANT, "selector_prior": 0.05},
    "softmax weights, step 1": {"selector_activation": "softmax", "selector_learning_rate": 1.0},
    "a quarter of each batch filtered": {**CONSTANT, "filter_ratio": 0.25},
    "half of each batch filtered": {**CONSTANT, "filter_ratio": 0.5},
    "batches of 16": {**CONSTANT, "batch_size": 16},
    "batches of 64": {**CONSTANT, "batch_size": 64},
    "8 trusted rows in a batch": {**CONSTANT, "per_device_validation_batch_size": 8},
    "64 trusted rows in a batch": {**CONSTANT, "per_device_validation_batch_size": 64},
    "loss: lambda 0.5": {**BY_THE_LOSS, "validation_weight": 0.5},
    "loss: lambda 1.0, 0.8, 0.6, 0.4": {**BY_THE_LOSS, "validation_weight": 1.0, "validation_weight_decay": 0.2},
    "loss: step 0.3": {**BY_THE_LOSS, "selector_learning_rate": 0.3},
    "loss: step 3": {**BY_THE_LOSS, "selector_learning_rate": 3.0},
    "loss: half of each batch filtered": {**BY_THE_LOSS, "filter_ratio": 0.5},
    "loss: sigmoid weights": {**BY_THE_LOSS, "selector_activation": "sigmoid"},
    "loss: dense Adam, step 0.02": {"selector_optimizer": "adam", "selector_learning_rate": 0.02},
    "loss: dense Adam, step 0.1": {"selector_optimizer": "adam", "selector_learning_rate": 0.1},
    "loss: dense Adam, step 0.3": {"selector_optimizer": "adam", "selector_learning_rate": 0.3},
    "BMO, temperature 0.1": {"selection_method": "bmo", "bmo_temperature": 0.1},
    BMO_SHARP: {"selection_method": "bmo", "bmo_temperature": 0.3},
    "refined: 10 %": {**_REFINED, "refine_ratio": 0.1},
    "refined: 60 %": {**_REFINED, "refine_ratio": 0.6},
    "refined: random 30 %": {**_REFINED, "refine_mode": "random"},
    "refined: temperature 0.5": {**_REFINED, "refine_temperature": 0.5},
    "refined: temperature 1": {**_REFINED, "refine_temperature": 1.0},
    "refined: 4 responses": {**_REFINED, "num_refined_responses": 4},
    "refined: 4 responses, temperature 0.5": {**_REFINED, "num_refined_responses": 4, "refine_temperature": 0.5},
    "refined: clip 1": {**_REFINED, "importance_ratio_clip": 1.0},
    "refined: clip 2": {**_REFINED, "importance_ratio_clip": 2.0},
    "refined: ratio per sequence": {**_REFINED, "importance_sampling_level": "sequence"},
    "BDS, refined: lowest weight, sure answers": {**_REFINED, "refine_min_probability": 0.95},
}

# What is shown together: the value of the option, and the run
ABLATIONS: dict[str, dict[str, str]] = {
    "validation_weight": {"0.5": "lambda 0.5", "0.7": "lambda 0.7", "0.9": CONSTANT_LAMBDA, "1": "lambda 1"},
    "adaptive_validation_weight": {"False": CONSTANT_LAMBDA, "True": FIRST_ROUND},
    "validation_weight_decay": {
        "0.9 throughout": CONSTANT_LAMBDA,
        "1 to 0.4": "lambda 1.0, 0.8, 0.6, 0.4",
        "1 to 0.1": "lambda 1.0, 0.7, 0.4, 0.1",
    },
    "value_function_rows": {
        "none": NO_VALUE_FUNCTION,
        "selected": "BDS, value function on selected rows",
        "all": "BDS, value function on all rows",
        "rejected": CONSTANT_LAMBDA,
    },
    "selector_learning_rate": {"1": "step 1", "3": CONSTANT_LAMBDA, "10": "step 10"},
    "selector_optimizer, without value function": {
        "mirror_descent": NO_VALUE_FUNCTION,
        "adam": "BDS, dense Adam, lambda 0.9",
        "adam, step 0.02": "loss: dense Adam, step 0.02",
        "adam, step 0.1": "loss: dense Adam, step 0.1",
        "adam, step 0.3": "loss: dense Adam, step 0.3",
        "(BMO)": BMO,
    },
    "selector_activation": {"sigmoid": CONSTANT_LAMBDA, "softmax": "softmax weights, step 1"},
    "selector_prior": {"0.05": "prior 0.05", "0.2": CONSTANT_LAMBDA, "0.5": "prior 0.5"},
    "filter_ratio": {
        "0": CONSTANT_LAMBDA,
        "0.25": "a quarter of each batch filtered",
        "0.5": "half of each batch filtered",
    },
    "per_device_train_batch_size": {"16": "batches of 16", "32": CONSTANT_LAMBDA, "64": "batches of 64"},
    "per_device_validation_batch_size": {
        "8": "8 trusted rows in a batch",
        "32": CONSTANT_LAMBDA,
        "64": "64 trusted rows in a batch",
    },
    "refine_ratio": {"0": CONSTANT_LAMBDA, "0.1": "refined: 10 %", "0.3": REFINED, "0.6": "refined: 60 %"},
    "refine_mode": {
        "lowest_weight, 0.3": REFINED,
        "random, 0.3": "refined: random 30 %",
        "random, 0.6": "BDS, refined: random",
    },
    "num_refined_responses": {
        "1": REFINED,
        "4": "refined: 4 responses",
        "4, temperature 0.5": "refined: 4 responses, temperature 0.5",
    },
    "refine_temperature": {"0": REFINED, "0.5": "refined: temperature 0.5", "1": "refined: temperature 1"},
    "importance_ratio_clip": {"1": "refined: clip 1", "2": "refined: clip 2", "10": REFINED},
    "importance_sampling_level": {"token": REFINED, "sequence": "refined: ratio per sequence"},
    "refine_min_probability": {"0": REFINED, "0.95": "BDS, refined: lowest weight, sure answers"},
    "validation_weight, without value function": {
        "0.5": "loss: lambda 0.5",
        "0.9": NO_VALUE_FUNCTION,
        "1 to 0.4": "loss: lambda 1.0, 0.8, 0.6, 0.4",
    },
    "selector_learning_rate, without value function": {
        "0.3": "loss: step 0.3",
        "1": NO_VALUE_FUNCTION,
        "3": "loss: step 3",
    },
    "selector_activation, without value function": {
        "softmax": NO_VALUE_FUNCTION,
        "sigmoid": "loss: sigmoid weights",
    },
    "filter_ratio, without value function": {"0": NO_VALUE_FUNCTION, "0.5": "loss: half of each batch filtered"},
    "bmo_temperature": {"0.1": "BMO, temperature 0.1", "0.3": BMO_SHARP, "1": BMO},
}
ABLATION_METHODS = tuple(dict.fromkeys(method for points in ABLATIONS.values() for method in points.values()))

MIN_SPAN = 0.12
"""Of a figure's vertical axes: six standard errors of an exact match on 500 rows."""
_MEASURES = {
    "exact_match": "held-out exact match",
    "auroc": "AUROC of the row ranking",
    "good_weight": "share of the weight on good rows",
}
_REFINED_MEASURES = {
    "exact_match": "held-out exact match",
    "kept_right": "questions kept with a right answer",
    "refined_right": "right, of those that were wrong",
}


# Printed, not drawn
_MORE = {"effective_sample_ratio": "effective sample ratio", "cpu_seconds": "processor seconds"}
_REFINED_MORE = {"refined_spoiled": "good rows whose answer is wrong now", "cpu_seconds": "processor seconds"}


def _is_refinement(option: str) -> bool:
    return option.startswith(("refine_", "num_refined", "importance_"))


def _measures(option: str) -> dict[str, str]:
    return _REFINED_MEASURES if _is_refinement(option) else _MEASURES


def print_ablation(console: Console, results: Results, option: str) -> None:
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


def plot_ablation(results: Results, option: str, path: Path) -> bool:
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


def _plot_panel(axes: Axes, points: Results, key: str, reference: str) -> None:
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
