"""
The planted-fault benchmark: methods side by side at equal steps, over several seeds.

```bash
python benchmarks/planted_faults.py --output_dir planted_faults
```

Results are written as they come: run it again after an interruption, or in parallel with other `--seeds`, and it goes
on. `--methods` names a part of them, `--ablations` changes one option at a time instead; `--families`,
`--fault_ratios` and `--validation_sizes` change the problem, one axis at a time; `--all true` runs all eleven
problems of the docs. With `--train false` it prints the tables of what is there and draws the figures.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from fault_ablations import ABLATION_METHODS, ABLATION_OPTIONS, ABLATIONS, file_name, plot_ablation, print_ablation
from fault_methods import MAIN_METHODS, METHODS, run_method
from fault_settings import (
    FAULT_RATIO,
    PROBLEMS,
    RESULT_NAMES,
    VALIDATION_SIZE,
    SeedFiles,
    Setting,
    build_setting,
    sweep,
)
from fault_tables import is_missing_package, plot_sweep, print_setting, print_sweep, read_results, sweeps_of
from result_files import collect, restore
from rich.console import Console
from trl import TrlParser

from trl_bilevel.demo.problem import DemoArguments


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        output_dir (`str`): folder for base models, results and figures.
        seeds (`list[int]`): seeds of data, models and training.
        methods (`list[str]`): names from `METHODS`; by default all, and away from the default fault ratio and number
            of trusted rows those of `MAIN_METHODS`.
        ablations (`list[str]`): options of `ABLATIONS`, each changed by itself, and no other method; `all` for all of
            them.
        families (`list[str]`): what the bad answers are: `mixed`, `random`, `wrong_rule`, `harmful`.
        fault_ratios (`list[float]`): shares of bad rows, each with the default number of trusted rows.
        validation_sizes (`list[int]`): numbers of trusted rows, each with the default share of bad rows.
        all (`bool`): all of `PROBLEMS`, instead of what the three before say.
        num_train_epochs (`int`): epochs over the faulty rows.
        num_train_rows (`int`): faulty rows.
        num_held_out_rows (`int`): rows that the exact match is measured on.
        num_base_steps (`int`): optimizer steps of the base model.
        train (`bool`): run what is missing; otherwise only print the tables.
        results (`str`, *optional*): JSON file that results are also kept in: those that `output_dir` lacks are taken
            from it, new ones are added at the end.
    """

    output_dir: str = "planted_faults"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    methods: list[str] = field(default_factory=list)
    ablations: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=lambda: ["mixed"])
    fault_ratios: list[float] = field(default_factory=list)
    validation_sizes: list[int] = field(default_factory=list)
    all: bool = False
    num_train_epochs: int = 4
    num_train_rows: int = 3000
    num_held_out_rows: int = 500
    num_base_steps: int = 800
    train: bool = True
    results: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.methods) - {*METHODS, *ABLATION_OPTIONS}):
            raise ValueError(f"Unknown methods {unknown}. Known are {list(METHODS)}.")
        if unknown := sorted(set(self.ablations) - {*ABLATIONS, "all"}):
            raise ValueError(f"Unknown ablations {unknown}. Known are {list(ABLATIONS)}.")
        if self.ablations and self.methods:
            raise ValueError("Set `ablations` or `methods`, not both.")
        if "all" in self.ablations:
            self.ablations = list(ABLATIONS)
        if not self.fault_ratios and not self.validation_sizes:
            self.fault_ratios = [FAULT_RATIO]

    @property
    def settings(self) -> list[Setting]:
        if self.all:
            return [*PROBLEMS.values()]
        return sweep(self.families, self.fault_ratios, self.validation_sizes)

    def methods_of(self, setting: Setting) -> list[str]:
        """What is run in a setting."""
        if self.ablations:
            shown = {method for option in self.ablations for method in ABLATIONS[option].values()}
            return [method for method in ABLATION_METHODS if method in shown]
        is_default = (setting.fault_ratio, setting.validation_size) == (FAULT_RATIO, VALIDATION_SIZE)
        return self.methods or list(METHODS if is_default else MAIN_METHODS)


def main(args: BenchmarkArguments) -> None:
    """Run what is missing, print the tables and draw the sweeps."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    console = Console(width=190)
    if args.results is not None and Path(args.results).is_file():
        restore(Path(args.results), Path(args.output_dir), RESULT_NAMES)
    for seed in args.seeds if args.train else ():
        for setting in args.settings:
            _run_setting(console, args, seed, setting)
    if args.results is not None:
        collect(Path(args.output_dir), Path(args.results), RESULT_NAMES)
    _report(console, args)


def _run_setting(console: Console, args: BenchmarkArguments, seed: int, setting: Setting) -> None:
    files = SeedFiles(Path(args.output_dir) / f"seed{seed}", args.num_train_epochs, setting)
    missing = [method for method in args.methods_of(setting) if not files.result(method).is_file()]
    if not missing:
        return
    demo_args = DemoArguments(
        output_dir=str(files.folder),
        seed=seed,
        num_train_rows=args.num_train_rows,
        num_held_out_rows=args.num_held_out_rows,
        num_train_epochs=args.num_train_epochs,
        num_base_steps=args.num_base_steps,
    )
    problem = build_setting(demo_args, files)
    for method in missing:
        if is_missing_package(method):
            console.print(f"{method}: not installed")
        elif not files.result(method).is_file():  # another method may have needed it meanwhile
            result = run_method(method, demo_args, problem, files)
            console.print(f"seed {seed}, {setting}, {method}: {result}")


def _report(console: Console, args: BenchmarkArguments) -> None:
    folder = Path(args.output_dir)
    methods = args.methods or [*METHODS]
    if args.ablations:
        _report_ablations(console, args)
        return
    results = {
        setting: read_results(folder, methods, args.seeds, args.num_train_epochs, setting) for setting in args.settings
    }
    for setting, of_setting in results.items():
        print_setting(console, of_setting, args.methods_of(setting), setting, args.num_train_epochs)
    for family in args.families:
        for axis, points in sweeps_of(results, family).items():
            print_sweep(console, points, methods, family, axis)
            path = folder / "figures" / f"{family}, {axis}.png"
            plot_sweep(points, methods, family, axis, path)
            console.print(f"Figure: {path}")


def _report_ablations(console: Console, args: BenchmarkArguments) -> None:
    folder = Path(args.output_dir)
    for setting in args.settings:
        console.print(f"{setting}, {args.num_train_epochs} epochs")
        results = read_results(folder, list(ABLATION_METHODS), args.seeds, args.num_train_epochs, setting)
        for option in args.ablations:
            print_ablation(console, results, option)
            path = folder / "figures" / f"ablations{setting.suffix}" / file_name(option)
            if plot_ablation(results, option, path):
                console.print(f"Figure: {path}")


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
