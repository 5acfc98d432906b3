"""The methods, each trained and measured on one [`~lib.problem.Problem`] at equal steps."""

import gc
import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from peft import PeftModel

from lib.alternatives import TOOLS
from lib.bilevel_options import ABLATION_OPTIONS, BILEVEL_OPTIONS, OPTIONS, REFINED_OPTIONS
from lib.bilevel_runs import measure_bilevel, run_bilevel, run_second_round
from lib.measures import measure_ranking
from lib.method_names import (
    ABOVE_ZERO,
    BASE,
    BMO,
    DEFAULT,
    EQUAL_WEIGHTS,
    FIRST_ROUND,
    MIXED,
    ORACLE,
    OWN_CUT,
    PUBLIC_CODES,
    RANDOM,
    ROUNDS,
    SFT,
    TRUSTED,
)
from lib.problem import Problem
from lib.rankings import OWN_CUTS, RANKINGS, run_ranking
from lib.results import Files
from lib.training import Run, base_model, train_sft
from trl_bilevel.demo.comparison import area_under_roc
from trl_bilevel.whole_files import write_whole


def _random_rows(problem: Problem) -> Dataset:
    """As many rows as there are good ones."""
    rows = np.random.default_rng(problem.seed).permutation(len(problem.training))
    return problem.training.select(np.sort(rows[: problem.good.sum()]))


SFT_ROWS: dict[str, Callable[[Problem], Dataset]] = {
    SFT: lambda problem: problem.training,
    MIXED: lambda problem: concatenate_datasets([problem.training, problem.trusted]),
    TRUSTED: lambda problem: problem.trusted,
    RANDOM: _random_rows,
    ORACLE: lambda problem: problem.training.select(np.flatnonzero(problem.good)),
}
"""Plain SFT, on these rows."""
METHODS = (
    BASE,
    *SFT_ROWS,
    FIRST_ROUND,
    *RANKINGS,
    *(name for name in BILEVEL_OPTIONS if name != FIRST_ROUND),
    *OWN_CUTS,
    *ROUNDS,
    *TOOLS,
    *REFINED_OPTIONS,
    *ABLATION_OPTIONS,
)
"""All of them, in the order they are run in: what others build on comes first."""
ON_BEDS = (BASE, SFT, TRUSTED, ORACLE, DEFAULT, FIRST_ROUND, *RANKINGS, EQUAL_WEIGHTS, PUBLIC_CODES, BMO, *OWN_CUTS)
"""What is run on real text by default."""
ON_TOYS = tuple(
    [
        name
        for name in METHODS
        if (name in SFT_ROWS and name != RANDOM)
        or name in (DEFAULT, FIRST_ROUND, PUBLIC_CODES, BMO, ABOVE_ZERO, *ROUNDS, *TOOLS)
        or (name in RANKINGS and BASE not in RANKINGS[name].needs)
    ]
)
"""What is run on toy problems by default."""
ON_DEFAULT_TOY = tuple(name for name in METHODS if name in (*ON_TOYS, RANDOM, *BILEVEL_OPTIONS, *REFINED_OPTIONS))
"""And on the default one."""


def needs(name: str) -> tuple[str, ...]:
    """The methods that one builds on."""
    if name in ROUNDS:
        return (FIRST_ROUND,)
    ranking = RANKINGS.get(name.removesuffix(OWN_CUT))
    return () if ranking is None else ranking.needs


def missing_package(name: str) -> str | None:
    """The module that a method needs and that is not installed."""
    package = TOOLS[name].package if name in TOOLS else None
    if name in OWN_CUTS:
        package = RANKINGS[name.removesuffix(OWN_CUT)].package
    return package if package is not None and importlib.util.find_spec(package) is None else None


def run_method(name: str, problem: Problem, files: Files) -> dict[str, float]:
    """
    Train with a method, measure it and write its result; what it builds on is run first where that is missing.

    Args:
        name (`str`): of [`METHODS`].
        problem ([`Problem`]): rows and base model.
        files ([`Files`]): where results are.

    Returns:
        Measures; those without a value for this method are missing. `seconds` and `cpu_seconds` (of the processor) are
        those of training, without what the method builds on; `total_seconds` and `total_cpu_seconds` those of training
        and ranking, with all that it builds on. Measuring is in none of them.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    total = np.zeros(2)
    for earlier in needs(name):
        known = _result_with_rows(earlier, problem, files)
        total += known.get("total_seconds", 0.0), known.get("total_cpu_seconds", 0.0)
    started = _clocks()
    run = _run(name, problem, files)
    total += _clocks() - started
    result = {**run.measures, **measure_ranking(run.ranking, problem.kinds)}
    if run.model is None:  # trained on the same rows by another ranking
        total += run.measures["seconds"], run.measures["cpu_seconds"]
    else:
        result |= problem.measure(run.model)
        if "kept_ratio" in result and not problem.good.all():
            result["auroc_loss"] = area_under_roc(-problem.losses(run.model, problem.training), problem.good)
    if run.trainer is not None:
        result |= measure_bilevel(name, run, problem)
    if name != BASE:
        result |= dict(zip(("total_seconds", "total_cpu_seconds"), total, strict=True))
    result = {key: float(value) for key, value in result.items()}
    write_whole(files.result(name), lambda partial: partial.write_text(json.dumps(result)))
    gc.collect()
    return result


def _clocks() -> np.ndarray:
    """Wall and processor, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def _result_with_rows(name: str, problem: Problem, files: Files) -> dict[str, float]:
    """Of a method that others build on: run again if it left its result alone, as one out of the file of all does."""
    left = files.first_round if name == FIRST_ROUND else files.losses(name)
    if left.is_file() and files.result(name).is_file():
        return json.loads(files.result(name).read_text())
    return run_method(name, problem, files)


def _run(name: str, problem: Problem, files: Files) -> Run:
    if name == BASE:
        model = base_model(problem)
        return Run(model, -_losses(name, model, problem, files), {})
    if name in SFT_ROWS:
        model, seconds = _train_sft(name, problem, files)
        return Run(model, -_losses(name, model, problem, files), seconds)
    if name in ROUNDS:
        return run_second_round(name, problem, files)
    if name in OPTIONS:
        return run_bilevel(name, problem, files)
    return run_ranking(name, problem, files)


def _train_sft(name: str, problem: Problem, files: Files) -> tuple[Any, dict[str, float]]:
    adapter = files.trusted_adapter
    if name == TRUSTED and (adapter / "seconds.json").is_file():
        seconds = json.loads((adapter / "seconds.json").read_text())
        return PeftModel.from_pretrained(base_model(problem), adapter), seconds
    trainer, seconds = train_sft(problem, files, SFT_ROWS[name](problem))
    if name == TRUSTED:
        trainer.model.save_pretrained(adapter)
        write_whole(adapter / "seconds.json", lambda partial: partial.write_text(json.dumps(seconds)))
    return trainer.model, seconds


def _losses(name: str, model: Any, problem: Problem, files: Files) -> np.ndarray:
    """Of the training rows, shape (N,); kept with those of the trusted ones for the rankings that build on them."""
    losses = problem.losses(model, problem.training)
    with files.losses(name).open("wb") as file:
        np.save(file, np.concatenate([losses, problem.losses(model, problem.trusted)]))
    return losses
