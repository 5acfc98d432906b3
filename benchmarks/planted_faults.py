"""
The planted-fault benchmark: methods side by side at equal steps, over several seeds.

```bash
python benchmarks/planted_faults.py --output_dir planted_faults
```

Results are written as they come: run it again after an interruption, or in parallel with other `--seeds`, and it goes
on. `--methods` names a part of them, `--study` adds one changed option at a time; with `--train false` it prints the
tables of what is there.
"""

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from rich.console import Console
from rich.table import Table
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, DataSelector
from trl_bilevel.demo.comparison import area_under_roc, precision_among_kept
from trl_bilevel.demo.planted_faults import right_answer
from trl_bilevel.demo.problem import DemoArguments, Problem, build_problem, fine_tune
from trl_bilevel.demo.tiny_model import completion_losses, exact_match


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        output_dir (`str`): folder for base models and results.
        seeds (`list[int]`): seeds of data, models and training.
        methods (`list[str]`): names from `METHODS`; all by default.
        study (`bool`): also run the methods of `STUDY_OPTIONS`.
        num_train_epochs (`int`): epochs over the faulty rows.
        num_train_rows (`int`): faulty rows.
        num_base_steps (`int`): optimizer steps of the base model.
        train (`bool`): run what is missing; otherwise only print the table.
    """

    output_dir: str = "planted_faults"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    study: bool = False
    num_train_epochs: int = 4
    num_train_rows: int = 3000
    num_base_steps: int = 800
    train: bool = True


def _good(problem: Problem) -> np.ndarray:
    return np.array(problem.faulty["fault"]) == "none"


def _random_rows(problem: Problem, seed: int) -> Dataset:
    """As many rows as there are good ones."""
    rows = np.random.default_rng(seed).permutation(len(problem.faulty))
    return problem.faulty.select(np.sort(rows[: _good(problem).sum()]))


# Methods that are plain SFT on other rows
SFT_ROWS: dict[str, Callable[[Problem, int], Dataset]] = {
    "SFT": lambda problem, seed: problem.faulty,
    "SFT, trusted rows mixed in": lambda problem, seed: concatenate_datasets([problem.faulty, problem.trusted]),
    "SFT on the trusted rows": lambda problem, seed: problem.trusted,
    "SFT on random rows": _random_rows,
    "SFT on the good rows (oracle)": lambda problem, seed: problem.faulty.select(np.flatnonzero(_good(problem))),
}
_LOSS = {"value_function": "none"}
# Options of the bilevel trainer. The public codes: dense Adam, lambda falling from 1, mean of row means
BILEVEL_OPTIONS: dict[str, dict[str, Any]] = {
    "dense Adam, as the public codes": {
        "selector_optimizer": "adam",
        "validation_weight": 1.0,
        "validation_weight_decay": 0.03,
        "loss_normalization": "row",
    },
    "BDS, dense Adam, lambda 0.9": {"selector_optimizer": "adam"},
    "BMO": {"selection_method": "bmo"},
    "BDS, no value function": _LOSS,
    "BDS (all defaults)": {},
    "BDS, value function on all rows": {"value_function_rows": "all"},
    "BDS, value function on selected rows": {"value_function_rows": "selected"},
}
# The same runs with answers that the model writes anew, greedily: in each of five refreshes those of the 30 % of the
# rows of the lowest weight, or of a fixed random 60 %
_LOWEST = {"refine_ratio": 0.3, "refine_max_new_tokens": 16}
_RANDOM = {"refine_ratio": 0.6, "refine_max_new_tokens": 16, "refine_mode": "random"}
REFINED_OPTIONS: dict[str, dict[str, Any]] = {
    "BDS, refined: lowest weight": _LOWEST,
    "BDS, refined: random": _RANDOM,
    "BMO, refined: lowest weight": {"selection_method": "bmo", **_LOWEST},
    "BMO, refined: random": {"selection_method": "bmo", **_RANDOM},
}
# Another round with what a first run learned
FIRST_ROUND = "BDS (all defaults)"
ROUNDS = ("second round: SFT on trusted and kept rows", "second round: BDS, from the first's weights")
METHODS = (*SFT_ROWS, *BILEVEL_OPTIONS, *REFINED_OPTIONS, *ROUNDS)

# One change at a time, to BDS without a value function and to the defaults
STUDY_OPTIONS: dict[str, dict[str, Any]] = {
    "loss: lambda 0.5": {**_LOSS, "validation_weight": 0.5},
    "loss: lambda 1.0, 0.8, 0.6, 0.4": {**_LOSS, "validation_weight": 1.0, "validation_weight_decay": 0.2},
    "loss: step 0.3": {**_LOSS, "selector_learning_rate": 0.3},
    "loss: step 3": {**_LOSS, "selector_learning_rate": 3.0},
    "loss: half of each batch filtered": {**_LOSS, "filter_ratio": 0.5},
    "loss: sigmoid weights": {**_LOSS, "selector_activation": "sigmoid"},
    "BMO, temperature 0.3": {"selection_method": "bmo", "bmo_temperature": 0.3},
    "lambda 0.5": {"validation_weight": 0.5},
    "lambda 1.0, 0.8, 0.6, 0.4": {"validation_weight": 1.0, "validation_weight_decay": 0.2},
    "step 1": {"selector_learning_rate": 1.0},
    "step 10": {"selector_learning_rate": 10.0},
    "prior 0.5": {"selector_prior": 0.5},
    "prior 0.05": {"selector_prior": 0.05},
    "softmax weights, step 1": {"selector_activation": "softmax", "selector_learning_rate": 1.0},
    "half of each batch filtered": {"filter_ratio": 0.5},
    "BDS, refined: lowest weight, sure answers": {**_LOWEST, "refine_min_probability": 0.95},
}


def _kept_and_trusted(problem: Problem, first_round: DataSelector) -> Dataset:
    """The best rows of the first round, as many as there are good ones, and the trusted rows."""
    kept = first_round.logits.argsort(descending=True)[: _good(problem).sum()]
    return concatenate_datasets([problem.faulty.select(kept.sort().values.tolist()), problem.trusted])


def run_method(name: str, args: DemoArguments, problem: Problem) -> dict[str, float]:
    """Train with a method and measure it; keys without a value for it are missing."""
    first_round = Path(args.output_dir) / "first_round"
    good = _good(problem)
    unseen_good = np.array(problem.unseen["fault"]) == "none"
    result: dict[str, float] = {}
    if name in SFT_ROWS or name == ROUNDS[0]:
        if name == ROUNDS[0]:
            rows = _kept_and_trusted(problem, DataSelector.from_pretrained(first_round))
        else:
            rows = SFT_ROWS[name](problem, args.seed)
        trainer = fine_tune(SFTTrainer, SFTConfig, args, problem, lambda share: None, train_dataset=rows)
        scores = -completion_losses(trainer.model, problem.tokenizer, problem.faulty)
    else:
        trainer = fine_tune(
            BilevelSFTTrainer,
            BilevelSFTConfig,
            args,
            problem,
            lambda share: None,
            train_dataset=problem.faulty,
            validation_dataset=problem.trusted,
            data_selector=DataSelector.from_pretrained(first_round) if name == ROUNDS[1] else None,
            amortized_selector=name in ("BDS, no value function", FIRST_ROUND),
            **{**BILEVEL_OPTIONS, **REFINED_OPTIONS, **STUDY_OPTIONS, ROUNDS[1]: {}}[name],
        )
        if name == FIRST_ROUND:
            trainer.data_selector.save_pretrained(first_round)
        selector = trainer.data_selector
        scores = selector.logits.numpy()
        weights = selector.weights().numpy()
        result["effective_sample_ratio"] = selector.statistics().effective_sample_ratio
        result["good_weight"] = weights[good].sum() / weights.sum()
        result |= _measure_answers(trainer, good)
        unseen = trainer.score(problem.unseen, batch_size=250)
        result["unseen_auroc"] = area_under_roc(np.array(unseen["score"]), unseen_good)
        result["unseen_auroc_loss"] = area_under_roc(-np.array(unseen["loss"]), unseen_good)
        if "selector_score" in unseen.column_names:
            result["unseen_auroc_head"] = area_under_roc(np.array(unseen["selector_score"]), unseen_good)
        seen = trainer.score(problem.faulty, batch_size=250)
        result["final_auroc"] = area_under_roc(np.array(seen["score"]), good)
    result["auroc"] = area_under_roc(scores, good)
    result["kept_good"] = precision_among_kept(scores, good)
    result["exact_match"] = exact_match(trainer.model, problem.tokenizer, problem.held_out)
    if name == "SFT on the trusted rows":
        # The other ranking that needs no bilevel machinery: against the loss of the model trained on all rows
        sft = fine_tune(SFTTrainer, SFTConfig, args, problem, lambda share: None, train_dataset=problem.faulty)
        difference = completion_losses(sft.model, problem.tokenizer, problem.faulty) + scores
        result["auroc_difference"] = area_under_roc(difference, good)
    return {name: float(value) for name, value in result.items()}


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


def main(args: BenchmarkArguments) -> None:
    """Run what is missing, and print the table."""
    if args.study:
        args.methods = [*args.methods, *STUDY_OPTIONS]
    unknown = sorted(set(args.methods) - {*METHODS, *STUDY_OPTIONS})
    if unknown:
        raise ValueError(f"Unknown methods {unknown}. Known are {list(METHODS)}.")
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    console = Console(width=150)
    folder = Path(args.output_dir)
    for seed in args.seeds if args.train else ():
        demo_args = DemoArguments(
            output_dir=str(folder / f"seed{seed}"),
            seed=seed,
            num_train_rows=args.num_train_rows,
            num_train_epochs=args.num_train_epochs,
            num_base_steps=args.num_base_steps,
        )
        problem = build_problem(demo_args, folder / f"seed{seed}" / "base_model", lambda share: None)
        for method in args.methods:
            path = folder / f"seed{seed}" / f"{args.num_train_epochs} epochs, {method}.json"
            if not path.is_file():
                result = run_method(method, demo_args, problem)
                path.write_text(json.dumps(result))
                console.print(f"seed {seed}, {method}: {result}")
    _print_tables(console, args, folder)


def _print_tables(console: Console, args: BenchmarkArguments, folder: Path) -> None:
    results: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for method in args.methods:
        for seed in args.seeds:
            path = folder / f"seed{seed}" / f"{args.num_train_epochs} epochs, {method}.json"
            if path.is_file():
                results[method][seed] = json.loads(path.read_text())
    if "SFT" in results and "SFT on the good rows (oracle)" in results:
        worst, best = results["SFT"], results["SFT on the good rows (oracle)"]
        for per_seed in results.values():
            for seed, result in per_seed.items():
                if seed in worst and seed in best:
                    low, high = worst[seed]["exact_match"], best[seed]["exact_match"]
                    if high > low:
                        result["of_the_way"] = (result["exact_match"] - low) / (high - low)
    for title, columns in TABLES.items():
        table = Table(title=f"{title}: mean (range) over seeds {args.seeds}, {args.num_train_epochs} epochs")
        table.add_column("method", no_wrap=True)
        for column in columns.values():
            table.add_column(column)
        for method, per_seed in results.items():
            cells = [_spread([result.get(key) for result in per_seed.values()]) for key in columns]
            if any(cell != "-" for cell in cells):
                table.add_row(method, *cells)
        console.print(table)


TABLES = {
    "Training": {
        "exact_match": "held-out exact match",
        "of_the_way": "share of the way from SFT to oracle",
        "auroc": "AUROC of the row ranking",
        "kept_good": "good rows among those kept",
    },
    "Weights and rankings": {
        "effective_sample_ratio": "effective sample ratio",
        "good_weight": "weight on good rows",
        "final_auroc": "AUROC of a last pass over the rows",
        "auroc_difference": "AUROC, loss minus SFT's loss",
    },
    "Answers regenerated": {
        "exact_match": "held-out exact match",
        "refined": "rows refined",
        "refined_right": "right, of those that were wrong",
        "refined_spoiled": "good rows whose answer is wrong now",
        "kept_questions": "questions kept (weight above an unknown answer's)",
        "kept_right": "kept with a right answer",
    },
    "Rows never trained on": {
        "unseen_auroc": "AUROC of score()",
        "unseen_auroc_loss": "AUROC of the loss",
        "unseen_auroc_head": "AUROC of the amortized selector",
    },
}


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
