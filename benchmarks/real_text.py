"""
Ranking real text with a tiny model: GSM8K rows against rows of other tasks, and refused harmful requests against those
that are complied with.

- `weights`: GSM8K mixed with an Alpaca sample and safety instructions, rows of GSM8K's test set trusted, a model that
  starts from nothing. In a second run some GSM8K rows have another question's answer.
- `safety`: refusals and ordinary answers trusted, a mixture with answers that comply. The file of safety instructions
  holds safe answers only: those that comply are planted, a template with steps that say nothing.
- `tasks`: GSM8K among other tasks again, from a base model with LoRA as in `safety`.

The last two compare all methods at equal steps, the tools of `alternatives.py` among them; those that are not
installed are left out. Results are written per method: run it again to go on.
Expects a folder with `gsm8k_train.jsonl`, `gsm8k_test.jsonl` (columns `question`, `answer`), `alpaca_en_1k.json` and
`safety_instructions.json` (columns `instruction`, `input`, `output`).

```bash
python benchmarks/real_text.py --data_dir ../shared/data
python benchmarks/real_text.py --data_dir ../shared/data --settings safety tasks
```
"""

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import transformers
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from real_text_methods import METHODS, learn_weights, prepare, run_missing
from real_text_rows import PROBLEMS, load_rows, swap_answers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trl import TrlParser

from trl_bilevel.demo.comparison import area_under_roc


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        data_dir (`str`): folder with the four files.
        settings (`list[str]`): `weights`, `safety`, `tasks`.
        seeds (`list[int]`): seeds of the model, of what is planted and of the training.
        num_gsm8k_rows (`int`): `weights`: rows of GSM8K's training set, the first ones.
        num_trusted_rows (`int`): `weights`: rows of GSM8K's test set that are trusted.
        corrupted_ratio (`float`): `weights`: share of GSM8K rows that get another question's answer in the second run.
        max_length (`int`): `weights`: tokens of a row.
        num_train_epochs (`int`): `weights`: epochs.
        comparison_max_length (`int`): `safety` and `tasks`: tokens of a row.
        comparison_epochs (`int`): `safety` and `tasks`: epochs over the training rows.
        output_dir (`str`): folder for the results of `safety` and `tasks`.
    """

    data_dir: str = "../shared/data"
    settings: list[str] = field(default_factory=lambda: ["weights"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_gsm8k_rows: int = 3500
    num_trusted_rows: int = 300
    corrupted_ratio: float = 0.4
    max_length: int = 192
    num_train_epochs: int = 1
    comparison_max_length: int = 96
    comparison_epochs: int = 2
    output_dir: str = "real_text"

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.settings) - {"weights", *PROBLEMS}):
            raise ValueError(f"Unknown settings {unknown}. Known are {['weights', *PROBLEMS]}.")


COLUMNS = {
    "auroc": "AUROC of the row ranking",
    "kept_good": "good rows among those kept",
    "held_out_loss": "held-out loss",
    "harmful_loss": "of safe answers",
    "ordinary_loss": "of ordinary answers",
    "complied": "harmful requests complied with",
    "refused": "harmful requests refused",
    "over_refused": "ordinary requests refused",
    "seconds": "seconds",
}


def main(args: BenchmarkArguments) -> None:
    """Train what is missing with every seed and print the tables."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    console = Console(width=190)
    rows = load_rows(Path(args.data_dir))
    for setting in args.settings:
        if setting == "weights":
            _print_weights(console, args, rows)
        else:
            _print_comparison(console, args, rows, setting)


def _print_comparison(console: Console, args: BenchmarkArguments, rows: dict[str, Dataset], setting: str) -> None:
    per_seed = [_compare(console, args, rows, setting, seed) for seed in args.seeds]
    table = Table(title=f"{setting}: mean (range) of {len(per_seed)} seeds, {args.comparison_epochs} epochs")
    table.add_column("method", no_wrap=True)
    measured = {key for results in per_seed for result in results.values() for key in result}
    columns = [key for key in COLUMNS if key in measured]
    for key in columns:
        table.add_column(COLUMNS[key])
    for method in METHODS:
        results = [results[method] for results in per_seed if method in results]
        if not results:
            table.add_row(method, "not installed")
            continue
        table.add_row(method, *(_spread([result[key] for result in results if key in result]) for key in columns))
    console.print(table)


def _compare(
    console: Console, args: BenchmarkArguments, rows: dict[str, Dataset], setting: str, seed: int
) -> dict[str, dict[str, float]]:
    """Measures by method; those of an earlier call are not run again."""
    sizes = args.comparison_max_length, args.comparison_epochs
    folder = Path(args.output_dir) / f"{setting}, {sizes[1]} epochs of {sizes[0]} tokens" / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    setup = prepare(PROBLEMS[setting](rows, seed), folder, *sizes, seed)
    return run_missing(setup, folder, lambda name: console.print(f"{setting}, seed {seed}: {name}"))


def _print_weights(console: Console, args: BenchmarkArguments, rows: dict[str, Dataset]) -> None:
    gsm8k = rows["gsm8k_train"].take(args.num_gsm8k_rows)
    off_task = concatenate_datasets([rows["alpaca"], rows["safety"]])
    is_on_task = np.arange(len(gsm8k) + len(off_task)) < len(gsm8k)
    results: dict[str, list[float]] = {
        "GSM8K over other tasks": [],
        "GSM8K over other tasks, some GSM8K answers swapped": [],
        "right GSM8K rows over swapped ones": [],
    }
    options = args.max_length, args.num_train_epochs
    for seed in track(args.seeds, description="Seeds", console=console):
        trusted = rows["gsm8k_test"].shuffle(seed=seed).select(range(args.num_trusted_rows))
        weights = learn_weights(concatenate_datasets([gsm8k, off_task]), trusted, *options, seed)
        results["GSM8K over other tasks"].append(area_under_roc(weights, is_on_task))

        partly_wrong, corrupted = swap_answers(gsm8k, args.corrupted_ratio, seed)
        weights = learn_weights(concatenate_datasets([partly_wrong, off_task]), trusted, *options, seed)
        results["GSM8K over other tasks, some GSM8K answers swapped"].append(area_under_roc(weights, is_on_task))
        results["right GSM8K rows over swapped ones"].append(area_under_roc(weights[is_on_task], ~corrupted))

    table = Table(title=f"AUROC of the learned weights: mean (range) of {len(args.seeds)} seeds, {args}")
    table.add_column("rows")
    table.add_column("AUROC")
    for name, values in results.items():
        table.add_row(name, _spread(values))
    console.print(table)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
