"""Tables of a problem in the terminal, from its results."""

from rich.console import Console
from rich.table import Table

from lib.method_names import ORACLE, SFT
from lib.methods import METHODS, missing_package
from lib.results import Results, spread


COLUMNS = {
    "held_out_loss": "held-out loss, nats per token",
    "exact_match": "exact match",
    "of_the_way": "of the way from SFT to oracle",
    "complied": "complied",
    "refused": "harmful requests refused",
    "over_refused": "ordinary requests refused",
    "auroc": "AUROC",
    "kept_good": "precision at the number of good rows",
    "kept_ratio": "rows kept",
    "kept_precision": "good among them",
    "weight_p5": "weights: 5th percentile",
    "weight_p95": "95th",
    "good_weight": "on good rows",
}
"""Of the table that every problem has."""
MORE_TABLES = {
    "rankings of a run": {
        "effective_sample_ratio": "effective sample ratio",
        "proved_good": "rows that proved good",
        "auroc_score": "AUROC of a last pass over the rows",
        "auroc_loss": "of its losses alone",
        "unseen_auroc": "rows never trained on: AUROC of score()",
        "unseen_auroc_loss": "of the loss",
        "unseen_auroc_head": "of the amortized selector",
    },
    "answers written anew": {
        "refined": "rows refined",
        "refined_right": "right, of those that were wrong",
        "refined_spoiled": "good rows whose answer is wrong now",
        "proved_good": "questions kept",
        "proved_right": "kept with a right answer",
    },
    "cost": {
        "total_seconds": "seconds, with what it builds on",
        "time_ratio": "of SFT's",
        "cpu_ratio": "processor time, of SFT's",
    },
}
"""By title; a table has the methods that have its first measure, and is left out where there are none."""
ByMethod = dict[str, dict[int, dict[str, float]]]
"""Measures by method and seed."""


def read_problem(results: Results, problem: str, seeds: list[int]) -> ByMethod:
    """What is there of a problem, with the ratios to the same seed's SFT and oracle."""
    found: ByMethod = {}
    for method in METHODS:
        by_seed = {seed: dict(r) for seed, r in results.of_method(problem, method).items() if seed in seeds}
        if by_seed:
            found[method] = by_seed
    worst, best = found.get(SFT, {}), found.get(ORACLE, {})
    ratios = {"time_ratio": "total_seconds", "cpu_ratio": "total_cpu_seconds"}
    for by_seed in found.values():
        for seed, result in by_seed.items():
            ends = [run[seed]["exact_match"] for run in (worst, best) if "exact_match" in run.get(seed, {})]
            if len(ends) == 2 and ends[0] < ends[1]:
                result["of_the_way"] = (result["exact_match"] - ends[0]) / (ends[1] - ends[0])
            for ratio, seconds in ratios.items():
                if seconds in result and seconds in worst.get(seed, {}):
                    result[ratio] = result[seconds] / worst[seed][seconds]
    return found


def problem_table(found: ByMethod) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a problem's table: its methods' measures, and AUROC by kind of fault."""
    measured = {key: None for by_seed in found.values() for result in by_seed.values() for key in result}
    kinds = sorted(key for key in measured if key.startswith("auroc, "))
    columns = {key: label for key, label in COLUMNS.items() if key in measured}
    columns |= {kind: kind.removeprefix("auroc, ") for kind in kinds} if len(kinds) > 1 else {}
    return ["method", *columns.values()], [[method, *_cells(found[method], columns)] for method in found]


def _cells(by_seed: dict[int, dict[str, float]], columns: dict[str, str]) -> list[str]:
    return [spread([result.get(key) for result in by_seed.values()]) for key in columns]


def print_problem(console: Console, results: Results, problem: str, seeds: list[int], methods: list[str]) -> None:
    """All tables of a problem; a method whose package is missing says so."""
    found = read_problem(results, problem, seeds)
    missing = [method for method in methods if method not in found and missing_package(method)]
    if not found and not missing:
        console.print(f"{problem}: no results yet")
        return
    header, rows = problem_table(found)
    rows += [[method, *["not installed"] * (len(header) > 1)] for method in missing]
    _print(console, problem, header, rows)
    for title, columns in MORE_TABLES.items():
        first = next(iter(columns))
        shown = {method: by_seed for method, by_seed in found.items() if any(first in r for r in by_seed.values())}
        if shown:
            rows = [[method, *_cells(by_seed, columns)] for method, by_seed in shown.items()]
            _print(console, f"{problem}: {title}", ["method", *columns.values()], rows)


def _print(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for number, column in enumerate(header):
        table.add_column(column, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
