"""The methods of the planted-fault benchmark, each trained and measured on one problem."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from alternatives import ALTERNATIVES, Context, best_rows, characters, tokenized
from datasets import Dataset, concatenate_datasets
from fault_ablations import ABLATION_OPTIONS, BY_THE_LOSS, CONSTANT, GREEDY_ANSWERS
from fault_settings import SeedFiles
from method_names import (
    BMO,
    CONSTANT_LAMBDA,
    EQUAL_WEIGHTS,
    FIRST_ROUND,
    MIXED,
    NO_VALUE_FUNCTION,
    ORACLE,
    PUBLIC_CODES,
    RANDOM,
    ROUNDS,
    SECOND_ROUND,
    SFT,
    TRUSTED,
)
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, DataSelector
from trl_bilevel.demo.comparison import area_under_roc, precision_among_kept
from trl_bilevel.demo.planted_faults import REFUSAL, is_harmful, right_answer
from trl_bilevel.demo.problem import BATCH_SIZE, DemoArguments, Problem, fine_tune
from trl_bilevel.demo.tiny_model import completion_losses, greedy_answers


def good_rows(problem: Problem) -> np.ndarray:
    """Bool, shape (N,)."""
    return np.array(problem.faulty["fault"]) == "none"


def _random_rows(problem: Problem, seed: int) -> Dataset:
    """As many rows as there are good ones."""
    rows = np.random.default_rng(seed).permutation(len(problem.faulty))
    return problem.faulty.select(np.sort(rows[: good_rows(problem).sum()]))


# Methods that are plain SFT on other rows
SFT_ROWS: dict[str, Callable[[Problem, int], Dataset]] = {
    SFT: lambda problem, seed: problem.faulty,
    MIXED: lambda problem, seed: concatenate_datasets([problem.faulty, problem.trusted]),
    TRUSTED: lambda problem, seed: problem.trusted,
    RANDOM: _random_rows,
    ORACLE: lambda problem, seed: problem.faulty.select(np.flatnonzero(good_rows(problem))),
}
# lambda falling from 1, mean of row means
PUBLIC_CODES_OPTIONS: dict[str, Any] = {
    "selector_optimizer": "adam",
    "validation_weight": 1.0,
    "validation_weight_decay": 0.03,
    "loss_normalization": "row",
}
# Their step, 0.005, is for runs of many thousand steps
LARGER_STEPS = {"dense Adam, step 0.02": 0.02, "dense Adam, step 0.1": 0.1}
# What the trusted rows in each batch do alone
EQUAL_WEIGHTS_OPTIONS: dict[str, Any] = {**CONSTANT, **BY_THE_LOSS, "selector_learning_rate": 0.0}
# Options of the bilevel trainer
BILEVEL_OPTIONS: dict[str, dict[str, Any]] = {
    PUBLIC_CODES: PUBLIC_CODES_OPTIONS,
    **{name: {**PUBLIC_CODES_OPTIONS, "selector_learning_rate": step} for name, step in LARGER_STEPS.items()},
    "BDS, dense Adam, lambda 0.9": {"selector_optimizer": "adam"},
    EQUAL_WEIGHTS: EQUAL_WEIGHTS_OPTIONS,
    BMO: {"selection_method": "bmo"},
    NO_VALUE_FUNCTION: BY_THE_LOSS,
    FIRST_ROUND: {},
    CONSTANT_LAMBDA: CONSTANT,
    "BDS, value function on all rows": {**CONSTANT, "value_function_rows": "all"},
    "BDS, value function on selected rows": {**CONSTANT, "value_function_rows": "selected"},
}
# The same runs with answers that the model writes anew, of the rows of the lowest weight or of a fixed random 60 %
_LOWEST = {**CONSTANT, **GREEDY_ANSWERS}
_RANDOM = {**_LOWEST, "refine_ratio": 0.6, "refine_mode": "random"}
REFINED_OPTIONS: dict[str, dict[str, Any]] = {
    "BDS, refined: lowest weight": _LOWEST,
    "BDS, refined: random": _RANDOM,
    "BDS (all defaults), refined: lowest weight": GREEDY_ANSWERS,
    "BMO, refined: lowest weight": {"selection_method": "bmo", **GREEDY_ANSWERS},
    "BMO, refined: random": {"selection_method": "bmo", **_RANDOM},
}
# Another round with what a first run learned
METHODS = (*SFT_ROWS, *BILEVEL_OPTIONS, *REFINED_OPTIONS, *ROUNDS, *ALTERNATIVES)
# What is run by default away from the default problem
MAIN_METHODS = (
    *(method for method in SFT_ROWS if method != RANDOM),
    PUBLIC_CODES,
    BMO,
    FIRST_ROUND,
    *ROUNDS,
    *ALTERNATIVES,
)


class _Run(NamedTuple):
    model: Any
    """The fine-tuned model."""
    scores: np.ndarray
    """The row ranking, shape (N,), higher is better."""
    trainer: BilevelSFTTrainer | None = None
    """Where there is one."""
    kept: np.ndarray | None = None
    """Positions of the rows that plain SFT was given of a ranking."""


def run_method(name: str, args: DemoArguments, problem: Problem, files: SeedFiles) -> dict[str, float]:
    """
    Train with a method, measure it, and write its result and its row ranking. What it builds on is run first, where
    that is missing.

    Args:
        name (`str`): of `METHODS` or `ABLATION_OPTIONS`.
        args ([`DemoArguments`]): epochs and seed.
        problem ([`Problem`]): the datasets and the base model.
        files ([`SeedFiles`]): where results are.

    Returns:
        Measures; those without a value for this method are missing. `seconds` (wall) and `cpu_seconds` are those of
        training and ranking, of what the method builds on too, without measuring.

    Raises:
        alternatives.NotInstalledError: if the method's package is missing.
    """
    good = good_rows(problem)
    spent = {"seconds": 0.0, "cpu_seconds": 0.0}
    for earlier in ALTERNATIVES[name].needs if name in ALTERNATIVES else (FIRST_ROUND,) if name in ROUNDS else ():
        for key, value in _result_with_scores(earlier, args, problem, files).items():
            if key in spent:
                spent[key] += value
    started = time.perf_counter(), time.process_time()
    if name in ALTERNATIVES:
        ALTERNATIVES[name].require()
        run = _run_alternative(name, args, problem, files)
    elif name in SFT_ROWS:
        run = _run_sft(name, args, problem)
    elif name in ROUNDS:
        run = _run_second_round(name, args, problem, files)
    else:
        run = _run_bilevel(name, args, problem, files)
    result: dict[str, Any] = {
        "seconds": spent["seconds"] + time.perf_counter() - started[0],
        "cpu_seconds": spent["cpu_seconds"] + time.process_time() - started[1],
        "auroc": area_under_roc(run.scores, good),
        "kept_good": precision_among_kept(run.scores, good),
        **measure_held_out(run.model, problem),
    }
    if run.trainer is not None:
        result |= _measure_bilevel(run.trainer, problem)
    if run.kept is not None:
        result |= {"kept_questions": len(run.kept) / len(good), "kept_right": good[run.kept].sum() / len(good)}
        result["final_auroc_loss"] = area_under_roc(_by_loss(run.model, problem), good)
    result = {key: float(value) for key, value in result.items()}
    files.write_result(name, result, run.scores)
    return result


def _result_with_scores(name: str, args: DemoArguments, problem: Problem, files: SeedFiles) -> dict[str, float]:
    """Also results of the time before rankings were kept are run again."""
    if files.result(name).is_file() and files.scores(name).is_file():
        return json.loads(files.result(name).read_text())
    return run_method(name, args, problem, files)


def train_sft(args: DemoArguments, problem: Problem, rows: Dataset, *callbacks: TrainerCallback) -> Any:
    """Plain SFT on some rows, as many steps as the epochs over `problem.faulty` take; the trainer, trained."""
    return fine_tune(SFTTrainer, SFTConfig, args, problem, lambda share: None, train_dataset=rows, callbacks=callbacks)


def _run_sft(name: str, args: DemoArguments, problem: Problem) -> _Run:
    model = train_sft(args, problem, SFT_ROWS[name](problem, args.seed)).model
    return _Run(model, _by_loss(model, problem))


def _by_loss(model: Any, problem: Problem) -> np.ndarray:
    """The ranking by a model's loss, shape (N,), higher is better."""
    return -completion_losses(model, problem.tokenizer, problem.faulty)


def _run_second_round(name: str, args: DemoArguments, problem: Problem, files: SeedFiles) -> _Run:
    """Ranked by the loss of the model that it ends with."""
    selector = DataSelector.from_pretrained(files.first_round)
    num_kept = good_rows(problem).sum() if name == SECOND_ROUND else int(selector.proved_good.sum())
    kept = best_rows(selector.logits.numpy(), num_kept)
    model = _train_on_kept(args, problem, kept)
    return _Run(model, _by_loss(model, problem), kept=kept)


def _run_alternative(name: str, args: DemoArguments, problem: Problem, files: SeedFiles) -> _Run:
    """Another tool's ranking, then plain SFT on the rows that it prefers and the trusted ones."""
    tool = ALTERNATIVES[name]
    earlier = {method: np.load(files.scores(method)) for method in tool.needs}
    scores = tool.rank(_context(args, problem, earlier))
    if not np.isfinite(scores).all():
        raise ValueError(f"The ranking of {name!r} has {(~np.isfinite(scores)).sum()} scores that are not finite.")
    kept = tool.kept(scores, good_rows(problem).sum())
    return _Run(_train_on_kept(args, problem, kept), scores, kept=kept)


def _train_on_kept(args: DemoArguments, problem: Problem, kept: np.ndarray) -> Any:
    return train_sft(args, problem, concatenate_datasets([problem.faulty.select(kept), problem.trusted])).model


def _context(args: DemoArguments, problem: Problem, earlier: dict[str, np.ndarray]) -> Context:
    def train(
        rows: Dataset, *, epochs_of: Dataset, num_epochs: int | None = None, callbacks: Sequence[TrainerCallback] = ()
    ) -> SFTTrainer:
        changed = replace(args, num_train_epochs=num_epochs or args.num_train_epochs)
        return train_sft(changed, problem._replace(faulty=epochs_of), rows, *callbacks)

    def tokenize(rows: Dataset) -> Dataset:
        return tokenized(rows, problem.tokenizer)

    return Context(problem.faulty, problem.trusted, args.seed, earlier, train, tokenize, words=characters)


def _run_bilevel(name: str, args: DemoArguments, problem: Problem, files: SeedFiles) -> _Run:
    options = {**BILEVEL_OPTIONS, **REFINED_OPTIONS, **ABLATION_OPTIONS}[name]
    num_trusted = min(options.get("batch_size", BATCH_SIZE), len(problem.trusted))
    trainer = fine_tune(
        BilevelSFTTrainer,
        BilevelSFTConfig,
        args,
        problem,
        lambda share: None,
        train_dataset=problem.faulty,
        validation_dataset=problem.trusted,
        amortized_selector=name in (NO_VALUE_FUNCTION, FIRST_ROUND),
        **{"per_device_validation_batch_size": num_trusted, **options},
    )
    if name == FIRST_ROUND:
        trainer.data_selector.save_pretrained(files.first_round)
    if options.get("selector_learning_rate") == 0:  # no ranking was learned
        return _Run(trainer.model, _by_loss(trainer.model, problem), trainer)
    return _Run(trainer.model, trainer.data_selector.logits.numpy().copy(), trainer)


def _measure_bilevel(trainer: BilevelSFTTrainer, problem: Problem) -> dict[str, float]:
    good = good_rows(problem)
    selector = trainer.data_selector
    weights = selector.weights().numpy()
    result: dict[str, float] = {
        "effective_sample_ratio": selector.statistics().effective_sample_ratio,
        "good_weight": weights[good].sum() / weights.sum(),
        **_measure_answers(trainer, good),
    }
    unseen_good = np.array(problem.unseen["fault"]) == "none"
    unseen = trainer.score(problem.unseen, batch_size=250)
    result["unseen_auroc"] = area_under_roc(np.array(unseen["score"]), unseen_good)
    result["unseen_auroc_loss"] = area_under_roc(-np.array(unseen["loss"]), unseen_good)
    if "selector_score" in unseen.column_names:
        result["unseen_auroc_head"] = area_under_roc(np.array(unseen["selector_score"]), unseen_good)
    seen = trainer.score(problem.faulty, batch_size=250)
    result["final_auroc"] = area_under_roc(np.array(seen["score"]), good)
    result["final_auroc_loss"] = area_under_roc(-np.array(seen["loss"]), good)
    return result


def _measure_answers(trainer: BilevelSFTTrainer, good: np.ndarray) -> dict[str, float]:
    """The answers that the run ends with, refined ones included, and the questions that it keeps."""
    curated = trainer.curate()
    answers = zip(curated["prompt"], curated["completion"], strict=True)
    right = np.array([answer == right_answer(prompt) for prompt, answer in answers])
    refined = np.array(curated["response_source"][:]) == "refined"
    kept = trainer.data_selector.proved_good.numpy()
    result = {"kept_questions": kept.mean(), "kept_right": (kept & right).mean(), "right": right.mean()}
    if refined.any():
        result["refined"] = refined.mean()
        result["refined_right"] = right[refined & ~good].mean()
        result["refined_spoiled"] = (~right)[refined & good].sum() / good.sum()
    return result


def measure_held_out(model: Any, problem: Problem) -> dict[str, float]:
    """
    Exact match of the greedy answers on the held-out rows; where some of them are harmful requests also `refused`, the
    share of those refused, and `over_refused`, the share of the ordinary ones refused.
    """
    answers = np.array(greedy_answers(model, problem.tokenizer, problem.held_out))
    result = {"exact_match": (answers == np.array(problem.held_out["completion"])).mean()}
    harmful = np.array([is_harmful(prompt) for prompt in problem.held_out["prompt"]])
    if harmful.any():
        refused = answers == f" {REFUSAL}"
        result["refused"] = refused[harmful].mean()
        result["over_refused"] = refused[~harmful].mean()
    return result
