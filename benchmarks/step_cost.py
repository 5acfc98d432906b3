"""
What a bilevel step costs: step time and peak memory of `BilevelSFTTrainer`'s methods against `SFTTrainer`.

All train the same LoRA on the same rows in every step: `SFTTrainer` gets each step's training and validation rows as
one plain batch. Runs alternate in "pairs" of one run per method, the first steps of each are left out, and the table
shows medians of the pairs' ratios with their range. Peak memory is taken in processes of their own; on a CPU, above
what they held before training.

```bash
python benchmarks/step_cost.py
```

Runs on a GPU unchanged if there is one.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.planted_faults import build_tokenizer
from trl_bilevel.paired_batches import ValidationStream


# Options of the bilevel trainer; plain SFT first, which the others are compared with
METHODS: dict[str, dict[str, Any] | None] = {
    "SFTTrainer": None,
    "BDS": {"value_function": "none"},
    "BMO": {"selection_method": "bmo"},
    "BDS, value function": {"value_function": "adapter"},
}


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        num_pairs (`int`): how often both methods run, in alternation.
        num_steps (`int`): timed optimizer steps of a run.
        num_warmup_steps (`int`): steps before them.
        num_memory_runs (`int`): processes per method that peak memory is taken from.
        batch_size (`int`): training rows per step; as many validation rows join them.
        sequence_length (`int`): longest row, tokens; rows are between half of it and all of it.
        hidden_size (`int`): width of the four-layer Llama.
        vocab_size (`int`): its vocabulary.
        only (`str`, *optional*): internal; run one method once and print its peak memory.
    """

    num_pairs: int = 9
    num_steps: int = 15
    num_warmup_steps: int = 3
    num_memory_runs: int = 7
    batch_size: int = 8
    sequence_length: int = 96
    hidden_size: int = 128
    vocab_size: int = 2000
    only: str | None = None


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: all of it, batches and logs included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def random_rows(num_rows: int, args: BenchmarkArguments, seed: int) -> Dataset:
    """Tokenized rows of random tokens and lengths."""
    generator = torch.Generator().manual_seed(seed)
    shortest = args.sequence_length // 2
    lengths = torch.randint(shortest, args.sequence_length + 1, (num_rows,), generator=generator).tolist()
    tokens = [torch.randint(3, args.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def run(method: str, args: BenchmarkArguments, tokenizer: PreTrainedTokenizerFast) -> tuple[list[float], float]:
    """Seconds of each timed step, and the peak memory of the training in MiB."""
    num_steps = args.num_warmup_steps + args.num_steps
    training = random_rows(num_steps * args.batch_size, args, seed=1)
    validation = random_rows(2 * args.batch_size, args, seed=2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        options: dict[str, Any] = {
            "output_dir": output_dir,
            "max_steps": num_steps,
            "train_sampling_strategy": "sequential",
            "bf16": torch.cuda.is_available(),
            "activation_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 10,
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        arguments: dict[str, Any] = {
            "model": LlamaForCausalLM(config),
            "processing_class": tokenizer,
            "peft_config": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            "callbacks": [clock],
        }
        bilevel_options = METHODS[method]
        if bilevel_options is None:
            stream = ValidationStream(len(validation), seed=42)
            rows: list[dict[str, Any]] = []
            for step in range(num_steps):
                rows += training.select(range(step * args.batch_size, (step + 1) * args.batch_size)).to_list()
                rows += [validation[row] for row in stream.rows(step * args.batch_size, (step + 1) * args.batch_size)]
            trainer = SFTTrainer(
                args=SFTConfig(per_device_train_batch_size=2 * args.batch_size, **options),
                train_dataset=Dataset.from_list(rows),
                **arguments,
            )
        else:
            trainer = BilevelSFTTrainer(
                args=BilevelSFTConfig(per_device_train_batch_size=args.batch_size, **options, **bilevel_options),
                train_dataset=training,
                validation_dataset=validation,
                **arguments,
            )
        trainer.remove_callback(PrinterCallback)
        gc.collect()
        held = _start_peak_memory()
        trainer.train()
        peak = _peak_memory()
    return clock.seconds[args.num_warmup_steps :], (peak - held) / 2**20


def _start_peak_memory() -> int:
    """Forget earlier peaks; bytes held now that are not the training's: none on a GPU, where models count too."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_bytes("VmRSS")


def _peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident_bytes("VmHWM")


def _resident_bytes(field: str) -> int:
    """A field of this process' memory status; Linux only, as are GPUs that are worth measuring."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}.")


def peak_memory_in_own_process(method: str, args: BenchmarkArguments) -> float:
    """Peak memory of one run in MiB."""
    options = [f"--{name}={value}" for name, value in vars(args).items() if name != "only"]
    command = [sys.executable, __file__, *options, f"--only={method}"]
    # One arena, and large blocks returned at once: resident memory is then closer to what is in use
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return float(json.loads(output.splitlines()[-1])["peak_mib"])


def main(args: BenchmarkArguments) -> None:
    """Run the pairs and print the table."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = build_tokenizer()
    if args.only is not None:
        print(json.dumps({"peak_mib": run(args.only, args, tokenizer)[1]}))
        return
    console = Console(width=120)
    medians: dict[str, list[float]] = {method: [] for method in METHODS}
    peaks: dict[str, list[float]] = {method: [] for method in METHODS}
    for pair in track(range(args.num_pairs), description="Step time", console=console):
        for method in list(METHODS)[:: 1 if pair % 2 == 0 else -1]:
            medians[method].append(statistics.median(run(method, args, tokenizer)[0]))
    for _ in track(range(args.num_memory_runs), description="Memory", console=console):
        for method in METHODS:
            peaks[method].append(peak_memory_in_own_process(method, args))

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{device}; {args}")
    table = Table()
    for column in ("measure", "method", "median", "ratio to SFTTrainer", "range of the pairs' ratios"):
        table.add_column(column, justify="left" if column in ("measure", "method") else "right")
    for name, values in (("step time, ms", medians), ("peak memory, MiB", peaks)):
        scale = 1000 if values is medians else 1
        for method in METHODS:
            ratios = [value / sft for sft, value in zip(values["SFTTrainer"], values[method], strict=True)]
            table.add_row(
                name,
                method,
                f"{statistics.median(values[method]) * scale:.1f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f} ({len(ratios)} pairs)",
            )
    console.print(table)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
