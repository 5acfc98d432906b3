"""
Ranking real text with a tiny model: GSM8K rows against rows of other tasks, and refused harmful requests against those
that are complied with.

- `weights`: GSM8K mixed with an Alpaca sample and safety instructions, rows of GSM8K's test set trusted, a model that
  starts from nothing. In a second run some GSM8K rows have another question's answer.
- `safety`: refusals and ordinary answers trusted, a mixture with answers that comply. The file of safety instructions
  holds safe answers only: those that comply are planted, a template with steps that say nothing.
- `tasks`: GSM8K among other tasks again, from a base model with LoRA as in `safety`.
- `answers`: GSM8K rows, some with another question's answer, from a base model with LoRA.

The last three compare all methods at equal steps, the tools of `alternatives.py` among them; those that are not
installed are left out. Results are written per method: run it again to go on. With `--results` they are kept in one
file as well, and with `--page` the tables of a page of the docs are written anew.
Expects a folder with `gsm8k_train.jsonl`, `gsm8k_test.jsonl` (columns `question`, `answer`), `alpaca_en_1k.json` and
`safety_instructions.json` (columns `instruction`, `input`, `output`).

```bash
python benchmarks/real_text.py --data_dir ../shared/data
python benchmarks/real_text.py --data_dir ../shared/data --settings safety tasks answers
python benchmarks/real_text.py --settings safety tasks answers --train false --results docs/data/real_text.json \
    --page docs/real_text.md
```
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import transformers
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from real_text_methods import METHODS, learn_weights, prepare, results_of, run_missing
from real_text_rows import PROBLEMS, load_rows, swap_answers
from result_files import collect, restore
from result_tables import fill_in, markdown, spread
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
        settings (`list[str]`): `weights`, `safety`, `tasks`, `answers`.
        seeds (`list[int]`): seeds of the model, of what is planted and of the training.
        num_gsm8k_rows (`int`): `weights`: rows of GSM8K's training set, the first ones.
        num_trusted_rows (`int`): `weights`: rows of GSM8K's test set that are trusted.
        corrupted_ratio (`float`): `weights`: share of GSM8K rows that get another question's answer in the second run.
        max_length (`int`): `weights`: tokens of a row.
        num_train_epochs (`int`): `weights`: epochs.
        comparison_max_length (`int`): all but `weights`: tokens of a row.
        comparison_epochs (`int`): all but `weights`: epochs over the training rows.
        output_dir (`str`): folder for their results.
        train (`bool`): run what is missing of these; otherwise only print the tables, which needs no data.
        results (`str`, *optional*): JSON file that their results are also kept in: those that `output_dir` lacks are
            taken from it, new ones are added at the end.
        page (`str`, *optional*): Markdown file whose tables of `settings` are written anew.
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
    train: bool = True
    results: str | None = None
    page: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.settings) - {"weights", *PROBLEMS}):
            raise ValueError(f"Unknown settings {unknown}. Known are {['weights', *PROBLEMS]}.")

    def folder(self, setting: str, seed: int) -> Path:
        """Of a setting's results of a seed."""
        sizes = f"{self.comparison_epochs} epochs of {self.comparison_max_length} tokens"
        return Path(self.output_dir) / f"{setting}, {sizes}" / f"seed{seed}"


_RESULT_NAMES = re.compile(rf"({'|'.join(PROBLEMS)}), \d+ epochs of \d+ tokens/seed\d+/[^/]+\.json")
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
    if args.results is not None and Path(args.results).is_file():
        restore(Path(args.results), Path(args.output_dir), _RESULT_NAMES)
    needs_rows = args.train or "weights" in args.settings
    rows = load_rows(Path(args.data_dir)) if needs_rows else {}
    tables = {}
    for setting in args.settings:
        if setting == "weights":
            _print_weights(console, args, rows)
            continue
        for seed in args.seeds if args.train else ():
            _compare(console, args, rows, setting, seed)
        title = f"{setting}: mean (range) of {len(args.seeds)} seeds, {args.comparison_epochs} epochs"
        _print_rows(console, title, *_comparison(args, setting))
        tables[setting] = markdown(*_comparison(args, setting, left_out=("seconds",)))
    if args.results is not None:
        collect(Path(args.output_dir), Path(args.results), _RESULT_NAMES)
    if args.page is not None:
        page = Path(args.page)
        page.write_text(fill_in(page.read_text(), tables))


def _compare(console: Console, args: BenchmarkArguments, rows: dict[str, Dataset], setting: str, seed: int) -> None:
    """Run every method; those of an earlier call are not run again."""
    folder = args.folder(setting, seed)
    folder.mkdir(parents=True, exist_ok=True)
    setup = prepare(PROBLEMS[setting](rows, seed), folder, args.comparison_max_length, args.comparison_epochs, seed)
    run_missing(setup, folder, lambda name: console.print(f"{setting}, seed {seed}: {name}"))


def _comparison(
    args: BenchmarkArguments, setting: str, left_out: tuple[str, ...] = ()
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every method's measures over the seeds."""
    by_method = {method: results_of(method, [args.folder(setting, seed) for seed in args.seeds]) for method in METHODS}
    measured = {key for results in by_method.values() for result in results for key in result}
    columns = {key: label for key, label in COLUMNS.items() if key in measured and key not in left_out}
    rows = []
    for method, results in by_method.items():
        cells = [spread([result.get(key) for result in results]) for key in columns]
        rows.append([method, *cells] if results else [method, "not installed", *cells[1:]])
    return ["method", *columns.values()], rows


def _print_rows(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for number, column in enumerate(header):
        table.add_column(column, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


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
        table.add_row(name, spread([*values]))
    console.print(table)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
