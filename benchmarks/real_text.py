"""
Ranking real text with a tiny model trained from nothing: GSM8K rows against rows of another task, and against rows of
their own task with another question's answer.

The training set is GSM8K's, mixed with an Alpaca sample and safety instructions; rows of GSM8K's test set are trusted.
Expects a folder with `gsm8k_train.jsonl`, `gsm8k_test.jsonl` (columns `question`, `answer`), `alpaca_en_1k.json` and
`safety_instructions.json` (columns `instruction`, `input`, `output`).

```bash
python benchmarks/real_text.py --data_dir ../shared/data
```
"""

import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.comparison import area_under_roc


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        data_dir (`str`): folder with the four files.
        num_seeds (`int`): seeds of the model, the corruption and the training.
        num_gsm8k_rows (`int`): rows of GSM8K's training set, the first ones.
        num_trusted_rows (`int`): rows of GSM8K's test set that are trusted.
        corrupted_ratio (`float`): share of GSM8K rows that get another question's answer in the second setting.
        max_length (`int`): tokens of a row.
        num_train_epochs (`int`): epochs.
    """

    data_dir: str = "../shared/data"
    num_seeds: int = 3
    num_gsm8k_rows: int = 3500
    num_trusted_rows: int = 300
    corrupted_ratio: float = 0.4
    max_length: int = 192
    num_train_epochs: int = 1


def load_rows(data_dir: Path) -> dict[str, Dataset]:
    """The four files as prompt-completion datasets."""

    def gsm8k(name: str) -> Dataset:
        rows = Dataset.from_json(str(data_dir / name))
        return rows.map(
            lambda row: {"prompt": row["question"] + "\n", "completion": row["answer"]},
            remove_columns=rows.column_names,
        )

    def instructions(name: str) -> Dataset:
        rows = Dataset.from_json(str(data_dir / name))
        return rows.map(
            lambda row: {"prompt": f"{row['instruction']} {row['input']}".strip() + "\n", "completion": row["output"]},
            remove_columns=rows.column_names,
        )

    return {
        "gsm8k_train": gsm8k("gsm8k_train.jsonl"),
        "gsm8k_test": gsm8k("gsm8k_test.jsonl"),
        "alpaca": instructions("alpaca_en_1k.json"),
        "safety": instructions("safety_instructions.json"),
    }


def swap_answers(rows: Dataset, ratio: float, seed: int) -> tuple[Dataset, np.ndarray]:
    """Give a share of the rows the answer of another of them; also returns which, bool of shape (N,)."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(rows))[: round(ratio * len(rows))]
    answers = np.array(rows["completion"], dtype=object)
    answers[chosen] = answers[np.roll(chosen, 1)]
    corrupted = np.zeros(len(rows), dtype=bool)
    corrupted[chosen] = True
    return Dataset.from_dict({"prompt": rows["prompt"][:], "completion": answers.tolist()}), corrupted


def train_tokenizer(rows: Dataset) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,000 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def learn_weights(training: Dataset, trusted: Dataset, args: BenchmarkArguments, seed: int) -> np.ndarray:
    """Weights of the training rows, shape (N,), from default options and a model of under a million parameters."""
    tokenizer = train_tokenizer(concatenate_datasets([training, trusted]))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with tempfile.TemporaryDirectory() as output_dir:
        options: dict[str, Any] = {
            "output_dir": output_dir,
            "seed": seed,
            "max_length": args.max_length,
            "num_train_epochs": args.num_train_epochs,
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 32,
            "per_device_validation_batch_size": 8,
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = BilevelSFTTrainer(
            model=LlamaForCausalLM(config),
            args=BilevelSFTConfig(**options),
            train_dataset=training,
            validation_dataset=trusted,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.data_selector.weights().numpy()


def main(args: BenchmarkArguments) -> None:
    """Train both settings with every seed and print the table."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    console = Console()
    rows = load_rows(Path(args.data_dir))
    rows["gsm8k_train"] = rows["gsm8k_train"].take(args.num_gsm8k_rows)
    off_task = concatenate_datasets([rows["alpaca"], rows["safety"]])
    is_on_task = np.arange(len(rows["gsm8k_train"]) + len(off_task)) < len(rows["gsm8k_train"])
    results: dict[str, list[float]] = {
        "GSM8K over other tasks": [],
        "GSM8K over other tasks, some GSM8K answers swapped": [],
        "right GSM8K rows over swapped ones": [],
    }
    for seed in track(range(args.num_seeds), description="Seeds", console=console):
        trusted = rows["gsm8k_test"].shuffle(seed=seed).select(range(args.num_trusted_rows))
        weights = learn_weights(concatenate_datasets([rows["gsm8k_train"], off_task]), trusted, args, seed)
        results["GSM8K over other tasks"].append(area_under_roc(weights, is_on_task))

        partly_wrong, corrupted = swap_answers(rows["gsm8k_train"], args.corrupted_ratio, seed)
        weights = learn_weights(concatenate_datasets([partly_wrong, off_task]), trusted, args, seed)
        results["GSM8K over other tasks, some GSM8K answers swapped"].append(area_under_roc(weights, is_on_task))
        results["right GSM8K rows over swapped ones"].append(area_under_roc(weights[is_on_task], ~corrupted))

    table = Table(title=f"AUROC of the learned weights, {args.num_seeds} seeds, {args}")
    table.add_column("rows")
    table.add_column("mean", justify="right")
    table.add_column("range", justify="right")
    for name, values in results.items():
        table.add_row(name, f"{statistics.mean(values):.3f}", f"{min(values):.3f} to {max(values):.3f}")
    console.print(table)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
