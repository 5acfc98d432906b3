"""
What a long run holds as it goes on: memory, open files, threads, step time and disk over thousands of steps.

A run of `BilevelSFTTrainer` on a tiny Llama with everything switched on that goes on for as long as the run does: the
value function, refinement with regular refreshes, evaluation, checkpoints of which the last two are kept, and logs.
`--plain` is the same run of `SFTTrainer`, to tell what is TRL's own.

```bash
python benchmarks/soak.py --plain True
python benchmarks/soak.py --figure docs/figures/soak.png
```

The table and the figure show what is in `output_dir`, both runs if there are two. A run that was killed goes on from
its last checkpoint when it is started again; slopes are taken inside a process, as a new one starts with other memory.
Allocators keep freed pages for a while: memory "in use" is what is left once glibc's and Arrow's gave them back. Needs
Linux with glibc.
"""

import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow
import torch
import transformers
from datasets import disable_progress_bars
from matplotlib.figure import Figure
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.planted_faults import build_dataset, build_tokenizer
from trl_bilevel.demo.tiny_model import build_model


matplotlib.use("Agg")

BILEVEL, PLAIN = "BilevelSFTTrainer", "SFTTrainer"
SAMPLES_FILE_NAME = "samples.jsonl"
# Field of a sample -> its name in the table
QUANTITIES = {
    "rss_anon_mib": "anonymous memory, MiB",
    "in_use_mib": "of it in use, MiB",
    "open_files": "open files",
    "threads": "threads",
    "step_ms": "step, ms on the clock",
    "step_cpu_ms": "step, ms of CPU time",
    "refresh_ms": "refresh, ms of CPU time",
    "evaluate_ms": "evaluation, ms of CPU time",
    "save_ms": "checkpoint, ms of CPU time",
    "disk_mib": "disk, MiB",
}
_TRIM_EVERY = 10  # samples
COLUMNS = ("", "first third", "middle third", "last third", "slope per 1,000 steps, second half")


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        output_dir (`str`): a folder for each run, with its checkpoints and samples.
        num_steps (`int`): optimizer steps.
        sample_every (`int`): steps between samples; step times are medians over as many.
        refresh_every (`int`): steps between refreshes of 5 % of the answers; the first is after as many.
        eval_every (`int`): steps between evaluations.
        save_every (`int`): steps between checkpoints.
        logging_steps (`int`): steps between logs, which transformers keeps in memory and in each checkpoint.
        num_train_rows (`int`): training rows.
        num_workers (`int`): data loading workers.
        plain (`bool`): run `SFTTrainer` instead.
        figure (`str`, *optional*): PNG file for the figure.
    """

    output_dir: str = "soak_output"
    num_steps: int = 4000
    sample_every: int = 20
    refresh_every: int = 50
    eval_every: int = 200
    save_every: int = 250
    logging_steps: int = 10
    num_train_rows: int = 2000
    num_workers: int = 0
    plain: bool = False
    figure: str | None = None


def _now() -> np.ndarray:
    """Seconds on the clock, and of CPU time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class Clock:
    """Measures the calls of a function."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.seconds: list[float] = []  # of CPU time of the calls since the last sample
        self.total = np.zeros(2)  # of all calls, as `_now`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = _now()
        result = self.function(*args, **kwargs)
        taken = _now() - start
        self.seconds.append(taken[1])
        self.total = self.total + taken
        return result


class Sampler(TrainerCallback):
    """
    Writes a line with what the process holds, every so many steps.

    Args:
        path (`pathlib.Path`): file of the samples, in the run's folder.
        every (`int`): steps.
        clocks (`dict[str, Clock]`): what happens between steps, which is no part of their time.
    """

    def __init__(self, path: Path, every: int, clocks: dict[str, Clock]):
        self.path = path
        self.every = every
        self.clocks = clocks
        self._libc = ctypes.CDLL(None)
        self._process = 1 + max((sample["process"] for sample in read_samples(path)), default=0)
        self._steps: list[np.ndarray] = []
        self._last = _now()  # end of the last step
        self._between = np.zeros(2)  # seconds of the clocks until then

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        between = sum((clock.total for clock in self.clocks.values()), np.zeros(2))
        self._steps.append(_now() - self._last - (between - self._between))
        if state.global_step % self.every == 0:
            self._write(state.global_step)
        self._last, self._between = _now(), between

    def _write(self, step: int) -> None:
        status = _process_status()
        step_ms, step_cpu_ms = 1000 * np.median(self._steps, axis=0)
        sample: dict[str, float | None] = {
            "process": self._process,
            "step": step,
            "rss_anon_mib": _mib(status["RssAnon"]),
            "in_use_mib": None,
            "open_files": len(os.listdir("/proc/self/fd")),
            "threads": int(status["Threads"]),
            "step_ms": step_ms,
            "step_cpu_ms": step_cpu_ms,
            "disk_mib": sum(path.stat().st_size for path in self.path.parent.rglob("*") if path.is_file()) / 2**20,
        }
        for name, clock in self.clocks.items():
            sample[f"{name}_ms"] = 1000 * statistics.median(clock.seconds) if clock.seconds else None
            clock.seconds.clear()
        self._steps.clear()
        if step % (_TRIM_EVERY * self.every) == 0:
            pyarrow.default_memory_pool().release_unused()
            self._libc.malloc_trim(0)
            sample["in_use_mib"] = _mib(_process_status()["RssAnon"])
        with self.path.open("a") as file:
            file.write(json.dumps(sample) + "\n")


def _process_status() -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())


def _mib(kilobytes: str) -> float:
    return int(kilobytes.split()[0]) / 2**10


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a run, without a line that a killed process left unfinished."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _forget_samples_after(path: Path, step: int) -> None:
    """Those of steps that are done again."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(sample) + "\n" for sample in read_samples(path) if sample["step"] <= step))
    os.replace(partial, path)


def robust_slope(steps: np.ndarray, values: np.ndarray, processes: np.ndarray) -> float:
    """
    Change per 1,000 steps: the median slope of all pairs of samples of the same process (Theil and Sen).

    Outliers do not move it, as long as they are fewer than 29 % of the samples.

    Args:
        steps (`numpy.ndarray`): optimizer step of each sample, shape (S,).
        values (`numpy.ndarray`): what was sampled, shape (S,).
        processes (`numpy.ndarray`): number of the process that each sample is of, shape (S,).

    Returns:
        `float`: NaN if no process has two samples.
    """
    first, second = np.triu_indices(len(steps), k=1)
    is_pair = (processes[first] == processes[second]) & (steps[first] != steps[second])
    first, second = first[is_pair], second[is_pair]
    if not len(first):
        return float("nan")
    return float(1000 * np.median((values[second] - values[first]) / (steps[second] - steps[first])))


def train(args: BenchmarkArguments) -> None:
    """Start the run, or go on with it."""
    folder = Path(args.output_dir) / (PLAIN if args.plain else BILEVEL)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(str(folder))
    step = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    samples = folder / SAMPLES_FILE_NAME
    _forget_samples_after(samples, step)
    if step >= args.num_steps:
        return
    trainer = _make_trainer(args, folder)
    trainer.remove_callback(PrinterCallback)
    clocks = {"evaluate": Clock(trainer.evaluate), "save": Clock(trainer._save_checkpoint)}
    trainer.evaluate, trainer._save_checkpoint = clocks["evaluate"], clocks["save"]
    if not args.plain:
        clocks["refresh"] = trainer.refiner.refresh = Clock(trainer.refiner.refresh)
    trainer.add_callback(Sampler(samples, args.sample_every, clocks))
    trainer.train(resume_from_checkpoint=checkpoint)


def _make_trainer(args: BenchmarkArguments, folder: Path) -> SFTTrainer:
    tokenizer = build_tokenizer()
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": args.num_steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": args.eval_every,
        "save_steps": args.save_every,
        "save_total_limit": 2,
        "logging_steps": args.logging_steps,
        "dataloader_num_workers": args.num_workers,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trusted = build_dataset(200, seed=2)
    datasets = {
        "train_dataset": build_dataset(args.num_train_rows, seed=0, fault_ratio=0.5, exclude=trusted["prompt"]),
        "eval_dataset": build_dataset(100, seed=1),
    }
    shared = {
        "model": build_model(tokenizer, seed=0),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    if args.plain:
        return SFTTrainer(args=SFTConfig(**options), **datasets, **shared)
    refinement = {
        "refine_ratio": 0.05,
        "refine_start_step": args.refresh_every,
        "refine_every_steps": args.refresh_every,
        "refine_max_new_tokens": 12,
        "refine_batch_size": 128,
        "refine_discard_flawed": False,
    }
    return BilevelSFTTrainer(
        args=BilevelSFTConfig(value_function="adapter", **options, **refinement),
        validation_dataset=trusted,
        **datasets,
        **shared,
    )


def make_table(name: str, samples: list[dict[str, Any]]) -> Table:
    """What was sampled in the first, middle and last third of the steps (medians), and its slope in the end."""
    table = Table(title=f"{name}, {samples[-1]['step']:,} steps", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    last_step = samples[-1]["step"]
    for quantity, label in QUANTITIES.items():
        taken = [sample for sample in samples if sample.get(quantity) is not None]
        if not taken:
            continue
        steps, values, processes = (
            np.array([sample[field] for sample in taken], dtype=np.float64) for field in ("step", quantity, "process")
        )
        third = np.ceil(3 * steps / last_step)  # 1, 2 or 3
        medians = [f"{np.median(values[third == part]):,.1f}" if (third == part).any() else "-" for part in (1, 2, 3)]
        settled = steps > last_step / 2
        slope = robust_slope(steps[settled], values[settled], processes[settled])
        table.add_row(label, *medians, "-" if np.isnan(slope) else f"{slope:+.2f}")
    return table


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw memory, open files and step time of the runs, and save them as a PNG."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    colors = {BILEVEL: "#2a78b5", PLAIN: "#8a8a8a"}
    for axes, quantity in zip(figure.subplots(1, 3), ("rss_anon_mib", "open_files", "step_cpu_ms"), strict=True):
        for name, samples in runs.items():
            steps = [sample["step"] for sample in samples]
            axes.plot(steps, [sample[quantity] for sample in samples], label=name, color=colors[name], linewidth=1.2)
            if quantity == "rss_anon_mib":
                taken = [(sample["step"], sample["in_use_mib"]) for sample in samples if sample["in_use_mib"]]
                axes.plot(*zip(*taken), label=f"{name}, in use", color=colors[name], linestyle=":", marker=".")
        axes.set(xlabel="optimizer step", ylabel=QUANTITIES[quantity])
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="lower right", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(args: BenchmarkArguments) -> None:
    """Run, print the tables and draw the figure."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))))
    train(args)
    console = Console(width=110)
    console.print(f"{torch.get_num_threads()} thread(s); {args}")
    runs = {name: read_samples(Path(args.output_dir) / name / SAMPLES_FILE_NAME) for name in (BILEVEL, PLAIN)}
    runs = {name: samples for name, samples in runs.items() if samples}
    for name, samples in runs.items():
        console.print(make_table(name, samples))
    if args.figure is not None:
        draw(runs, Path(args.figure))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
