"""
What a large training dataset costs besides the steps: seconds and memory of every stage, beside plain `SFTTrainer`.

```bash
OMP_NUM_THREADS=1 python benchmarks/large_dataset.py --num_rows 1000000 --tokenized True --output_dir large
```

Synthetic rows are written to Parquet; then a tiny model trains on them for some steps, map-style and as a stream.
Memory is anonymous memory (`RssAnon` of Linux): what is the process' own, and not a file that is mapped into it. Each
part runs in a process of its own, and the numbers are kept beside the rows, so that parts can be measured
one at a time with `--part`. `--tokenized` writes tokens, so that TRL has nothing to prepare and what is left is ours.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset, IterableDataset, load_dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.parquet_files import write_parquet
from trl_bilevel.streamed_selector import StreamedSelector


PARTS = ("sft", "map", "sft_stream", "stream", "selector")
_ROWS_PER_WRITE = 50_000


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        num_rows (`int`): training rows.
        tokenized (`bool`): write `input_ids` and `labels` instead of `prompt` and `completion`.
        num_steps (`int`): optimizer steps.
        output_dir (`str`): where the rows and the results go.
        part (`str`, *optional*): `"rows"`, which writes them, or one of `PARTS`. All of them, one after the other, if
            not given.
    """

    num_rows: int = 100_000
    tokenized: bool = False
    num_steps: int = 30
    output_dir: str = "large_dataset"
    part: str | None = None


class Stages:
    """Seconds and memory of stages that follow one another in this process."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block: seconds, and by how much anonymous memory grew at its peak, in MiB."""
        done = threading.Event()
        before, peak = anonymous_mib(), [0.0]

        def watch() -> None:
            while not done.wait(0.01):
                peak[0] = max(peak[0], anonymous_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            done.set()
            watcher.join()
        result = {"stage": name, "seconds": seconds, "mib": max(peak[0], anonymous_mib()) - before}
        self.results.append(result)
        print(f"{name}: {seconds:.1f} s, {result['mib']:.0f} MiB", flush=True)


def anonymous_mib() -> float:
    """Anonymous memory of this process now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def write_rows(path: Path, num_rows: int, tokenized: bool, seed: int = 0) -> None:
    """Write rows of about 30 bytes or tokens to a Parquet file, in pieces, with an id each."""
    rng = np.random.default_rng(seed)
    writer = None
    for start in range(0, num_rows, _ROWS_PER_WRITE):
        offset = seed * 10**8  # no row of one seed is like one of another
        numbers = range(offset + start, offset + min(start + _ROWS_PER_WRITE, num_rows))
        columns: dict[str, Any] = {"sample_id": [f"row-{number:09d}" for number in numbers]}
        if tokenized:
            tokens = rng.integers(2, 250, (len(numbers), 32))
            columns["input_ids"] = list(tokens)
            columns["labels"] = list(np.where(np.arange(32) < 16, -100, tokens))
        else:
            columns["prompt"] = [f"add {number} and {number % 97}:" for number in numbers]
            columns["completion"] = [f" {number + number % 97}" for number in numbers]
        table = pa.table(columns)
        writer = writer or pa.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 30 thousand parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def run_part(args: BenchmarkArguments, part: str, folder: Path) -> list[dict[str, Any]]:
    """Measure one part in this process."""
    stages = Stages()
    if part == "selector":
        with stages.stage("weights of all rows, as they come"):
            see_all_rows(args.num_rows)
        return stages.results
    options: dict[str, Any] = {
        "output_dir": str(folder / part),
        "max_steps": args.num_steps,
        "per_device_train_batch_size": 8,
        "max_length": None if args.tokenized else 64,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    cache = str(folder / f"cache-{part}")
    validation = load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train", cache_dir=cache)
    with stages.stage("load"):
        rows: Dataset | IterableDataset = load_dataset(
            "parquet",
            data_files=str(folder / "train.parquet"),
            split="train",
            streaming=part.endswith("stream"),
            cache_dir=cache,
        )
    trainer: SFTTrainer
    with stages.stage("build the trainer"):
        if part.startswith("sft"):
            config = SFTConfig(**options)
            trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        else:
            trainer = BilevelSFTTrainer(
                model,
                BilevelSFTConfig(**options),
                train_dataset=rows,
                validation_dataset=validation,
                processing_class=tokenizer,
            )
    with stages.stage(f"train for {args.num_steps} steps"):
        trainer.train()
    with stages.stage("save the model and the records"):
        trainer.save_model()
    if isinstance(trainer, BilevelSFTTrainer):
        with stages.stage("curate to Parquet"):
            write_parquet(trainer.curate(keep_ratio=0.7), folder / part / "curated.parquet")
    return stages.results


def see_all_rows(num_rows: int) -> None:
    """What a stream's selector does in an epoch over all rows."""
    selector = StreamedSelector()
    generator = torch.Generator().manual_seed(0)
    for start in range(0, num_rows, 1024):
        ids = [f"row-0-{number:09d}" for number in range(start, min(start + 1024, num_rows))]
        selector.consumed.add(ids)
        selector.update(selector.row_numbers(ids), torch.rand(len(ids), generator=generator))


def main(args: BenchmarkArguments) -> None:
    """Run the parts, each in a process of its own, and print the table."""
    folder = Path(args.output_dir) / f"{args.num_rows}{'-tokens' if args.tokenized else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if args.part is not None:
        if args.part == "rows":
            write_rows(folder / "validation.parquet", 256, args.tokenized, seed=1)
            write_rows(folder / "train.parquet", args.num_rows, args.tokenized)
            return
        results[args.part] = run_part(args, args.part, folder)
        file.write_text(json.dumps(results, indent=2))
        return
    for part in ("rows", *PARTS):
        if part not in results:
            command = [sys.executable, __file__, "--part", part, "--num_rows", str(args.num_rows)]
            command += ["--tokenized", str(args.tokenized), "--num_steps", str(args.num_steps)]
            subprocess.run([*command, "--output_dir", args.output_dir], check=True)
    results = json.loads(file.read_text())
    print_table(results, args)


def print_table(results: dict[str, list[dict[str, Any]]], args: BenchmarkArguments) -> None:
    """All stages of all parts."""
    table = Table(title=f"{args.num_rows:,} rows{' of tokens' if args.tokenized else ''}")
    for column in ("part", "stage", "seconds", "anonymous memory, MiB", "bytes a row"):
        table.add_column(column, justify="left" if column in ("part", "stage") else "right")
    for part in PARTS:
        for result in results[part]:
            per_row = result["mib"] * 2**20 / args.num_rows
            table.add_row(part, result["stage"], f"{result['seconds']:.1f}", f"{result['mib']:.0f}", f"{per_row:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
