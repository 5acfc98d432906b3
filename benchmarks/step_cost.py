"""
What a bilevel step costs: step time and peak memory of `BilevelSFTTrainer`'s methods against `SFTTrainer`.

All train the same adapter on the same rows: `SFTTrainer` gets the training and validation rows of each step as
one plain batch. "Two forwards" is a loop that does the step as the public codes of SEAL and BIPOST do: a forward pass
for either kind of rows, full logits, dense Adam on the weights of all rows. Runs alternate in "pairs" of one run per
method, the first steps of each are left out, and the tables show medians of the pairs' ratios with their range. Times
are per token, as packed batches do not hold equally many.

Peak memory, model included, is what the device's allocator says; on a CPU the most bytes that PyTorch's profiler saw
in tensors, which is exact where resident memory is noise. It is taken with Llama 3's vocabulary: TRL's head works
in tiles of it, and with a small one would take more than it does in use.

```bash
python benchmarks/step_cost.py
```

Runs on a GPU unchanged if there is one; there `--shape 8b` measures a Llama of 8B parameters with random weights,
quantized on the device, at sequence lengths of 512 to 4,096, and how often a step waits for the device.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_cost_runs import METHODS, PLAIN, TWO_FORWARDS, BenchmarkArguments, peak_memory, run
from transformers import PreTrainedTokenizerFast
from trl import TrlParser

from trl_bilevel.demo.planted_faults import build_tokenizer


VOCABULARY = 128_256  # of Llama 3


def in_own_process(method: str, setting: str, args: BenchmarkArguments, **changes: Any) -> dict[str, Any]:
    """One run in a process of its own, or what a file has of it."""
    if args.results is None:
        return _in_own_process(method, setting, args, **changes)
    path = Path(args.results)
    results = json.loads(path.read_text()) if path.is_file() else {}
    key = ", ".join([setting, method, *(f"{name} {value}" for name, value in sorted(changes.items()))])
    if key not in results:
        results[key] = _in_own_process(method, setting, args, **changes)
        path.write_text(json.dumps(results, indent=2))
    return results[key]


def _in_own_process(method: str, setting: str, args: BenchmarkArguments, **changes: Any) -> dict[str, Any]:
    values = {**vars(args), **changes, "results": None, "only": f"{setting}/{method}"}
    command = [sys.executable, __file__]
    for name, value in values.items():
        if isinstance(value, list):
            command += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            command += [f"--{name}={value}"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{output.stderr[-3000:]}")
    return json.loads(output.stdout.splitlines()[-1])


def peak_in_own_process(method: str, setting: str, args: BenchmarkArguments, **changes: Any) -> dict[str, Any]:
    """The same for the peak memory."""
    steps = {"num_warmup_steps": 0, "num_steps": args.num_memory_steps}
    return in_own_process(method, setting, args, peak=True, vocab_size=VOCABULARY, **steps, **changes)


def methods_of(setting: str) -> list[str]:
    """The public codes do not pack."""
    return [method for method in METHODS if method != TWO_FORWARDS or not setting.endswith("packed")]


def measure_settings(args: BenchmarkArguments, console: Console, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the table of step times and peak memory."""
    table = Table()
    for column in ("setting", "measure", "method", "median", f"ratio to {PLAIN}", "range of the ratios"):
        table.add_column(column, justify="left" if column in ("setting", "measure", "method") else "right")
    for setting in args.settings:
        methods = methods_of(setting)
        times: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for pair in track(range(args.num_pairs), description=f"{setting}: time", console=console):
            for method in methods[:: 1 if pair % 2 == 0 else -1]:
                times[method].append(run(method, setting, args, tokenizer))
        peaks: dict[str, list[dict[str, Any]]] = {}
        for method in track(methods, description=f"{setting}: memory", console=console):
            peaks[method] = [peak_in_own_process(method, setting, args)]
        for name, runs, key, scale in (
            ("ms per 1,000 tokens", times, "per_token", 1e6),
            ("peak memory, MiB", peaks, "peak_mib", 1),
        ):
            for method in methods if runs[PLAIN] else ():
                values = [result[key] for result in runs[method]]
                ratios = [value / plain[key] for value, plain in zip(values, runs[PLAIN], strict=True)]
                waits = times[method][0]["waits"] if times[method] else None
                table.add_row(
                    setting,
                    name,
                    method if waits is None else f"{method} ({waits:.1f} waits per step)",
                    f"{scale * statistics.median(values):.1f}",
                    f"{statistics.median(ratios):.3f}",
                    f"{min(ratios):.3f} to {max(ratios):.3f}",
                )
        table.add_section()
    console.print(table)


def measure_growth(args: BenchmarkArguments, console: Console) -> None:
    """Print and draw the cost as the number of rows grows, and the memory as sequences get longer."""
    methods = {
        "rows": [PLAIN, "BDS", "BDS, value function", TWO_FORWARDS],
        "tokens": [PLAIN, "BDS", "BDS, value function", TWO_FORWARDS],
    }
    setting = args.settings[0]
    series: dict[str, dict[str, list[float]]] = {axis: {name: [] for name in methods[axis]} for axis in methods}
    for size in track(args.num_rows, description="Number of rows", console=console):
        for method in methods["rows"]:
            changes = {"num_rows": [size], "sequence_length": 16}
            series["rows"][method].append(1000 * in_own_process(method, setting, args, **changes)["step"])
    for length in track(args.lengths, description="Sequence length", console=console):
        for method in methods["tokens"]:
            result = peak_in_own_process(method, setting, args, sequence_length=length)
            series["tokens"][method].append(result["peak_mib"])
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (name, sizes, unit) in zip(
        axes, (("rows", args.num_rows, "ms per step"), ("tokens", args.lengths, "peak memory, MiB")), strict=True
    ):
        table = Table(title=f"{setting}: {unit}")
        for column in (name, *map(str, sizes)):
            table.add_column(column, justify="right")
        for method, values in series[name].items():
            table.add_row(method, *(f"{value:.1f}" for value in values))
            axis.plot(sizes, values, marker="o", label=method)
        console.print(table)
        axis.set_xscale("log", base=10 if name == "rows" else 2)
        axis.set(xlabel={"rows": "training rows", "tokens": "longest row, tokens"}[name], ylabel=unit, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    if args.figure is not None:
        Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.figure, dpi=110)


def main(args: BenchmarkArguments) -> None:
    """Print the tables and draw the figures."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = build_tokenizer()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    if args.only is not None:
        setting, method = args.only.split("/")
        if args.peak:
            print(json.dumps({"peak_mib": peak_memory(method, setting, args, tokenizer)}))
        else:
            print(json.dumps(run(method, setting, args, tokenizer)))
        return
    console = Console(width=120)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{device}; {args}")
    measure_settings(args, console, tokenizer)
    args.num_rows, args.lengths = list(filter(None, args.num_rows)), list(filter(None, args.lengths))
    if args.num_rows or args.lengths:
        measure_growth(args, console)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
