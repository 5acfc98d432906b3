"""
Methods side by side on problems whose faults are known: real text with a pretrained model, and toys.

```bash
python benchmarks/compare.py --problems "pipeline faults" --formats messages --bad_shares 0.25
python benchmarks/compare.py --problems "70 % bad" --seeds 0 1
python benchmarks/compare.py --problems "30 % bad" "random answers, 30 % bad, 50 trusted rows" --methods SFT BMO
python benchmarks/compare.py --problems toys --train false
```

Results are written method by method: run it again to go on where it was stopped, or beside it with other `--problems`
or `--seeds`. They are kept in one file as well, which the tables are printed from; what it has is not run again.
Real text expects `--data_dir` with the published files that `docs/real_models.md` names; its model comes from a wheel
(`trl_bilevel/demo/pretrained_model.py`), or is any other with `--model`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from lib.beds import BAD_SHARES, BEDS, FORMATS, PIPELINE, Bed, all_beds, build_bed
from lib.bilevel_options import ABLATIONS
from lib.methods import METHODS, ON_BEDS, ON_DEFAULT_TOY, ON_TOYS, TOOLS, missing_package, run_method
from lib.results import Files, Results, collect, restore
from lib.tables import print_problem
from lib.toys import TOYS, Toy, build_toy, read_toy
from rich.console import Console
from trl import TrlParser
from trl.trainer import utils as trl_utils


ALL_TOYS = "toys"


@dataclass
class CompareArguments:
    """
    Options of the comparison.

    Args:
        problems (`list[str]`): real text, some of `BEDS`; toys, some of `TOYS` or of their parts together, as
            "harmful requests, 30 % bad"; `toys` for all of `TOYS`.
        formats (`list[str]`): some of `FORMATS`, of real text.
        bad_shares (`list[float]`): of pipeline faults.
        num_rows, num_trusted (`int`, *optional*): training and trusted rows; by default 200 and 60 of real text, and
            3,000 and what the name says of toys.
        num_epochs (`int`, *optional*): over the training rows; all methods take as many steps. By default 1 of real
            text and 4 of toys.
        num_held_out, num_base_steps (`int`): of toys, held-out rows and optimizer steps of the base model.
        methods (`list[str]`): some of `METHODS`; what they build on is run too. By default `ON_BEDS` on real text,
            `ON_TOYS` on toys and `ON_DEFAULT_TOY` on the default toy.
        ablations (`list[str]`): the runs of these options of `ABLATIONS` instead of methods; `all` for all of them.
        seeds (`list[int]`): of rows, faults, models and training.
        data_dir (`str`): folder of the published files.
        model (`str`, *optional*): name or folder of another model for real text.
        load_in_4bit (`bool`): quantize it.
        output_dir (`str`): folder of the results while they are made.
        results (`str`): JSON file that they are kept in: those that `output_dir` lacks are taken from it.
        train (`bool`): run what is missing; otherwise only print the tables.
    """

    problems: list[str] = field(default_factory=lambda: [PIPELINE])
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    bad_shares: list[float] = field(default_factory=lambda: list(BAD_SHARES))
    num_rows: int | None = None
    num_trusted: int | None = None
    num_epochs: int | None = None
    num_held_out: int = Toy().num_held_out
    num_base_steps: int = Toy().num_base_steps
    methods: list[str] = field(default_factory=list)
    ablations: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    data_dir: str = "../shared/data"
    model: str | None = None
    load_in_4bit: bool = False
    output_dir: str = "comparison"
    results: str = "docs/data/results.json"
    train: bool = True

    def __post_init__(self) -> None:
        known = {"formats": FORMATS, "methods": METHODS, "ablations": (*ABLATIONS, "all")}
        for name, choices in known.items():
            if unknown := sorted(set(getattr(self, name)) - set(choices)):
                raise ValueError(f"Unknown {name} {unknown}. Known are {list(choices)}.")
        if self.methods and self.ablations:
            raise ValueError("Set `ablations` or `methods`, not both.")
        if "all" in self.ablations:
            self.ablations = list(ABLATIONS)
        self.problems = [n for name in self.problems for n in (TOYS if name == ALL_TOYS else (name,))]
        beds = [problem for problem in self.chosen if isinstance(problem, Bed)]
        if beds and (tools := sorted(set(self.methods) & set(TOOLS))):
            raise ValueError(f"{tools} read rows of plain text: they are for toys, and not for {beds[0].name!r}.")

    @property
    def _sizes(self) -> dict[str, int]:
        sizes = {"num_rows": self.num_rows, "num_trusted": self.num_trusted, "num_epochs": self.num_epochs}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def chosen(self) -> list[Bed | Toy]:
        """The problems: toys, then real text, one for each name, format and, of pipeline faults, share of bad rows."""
        sizes = {**self._sizes, "num_held_out": self.num_held_out, "num_base_steps": self.num_base_steps}
        toys = [read_toy(name, **sizes) for name in self.problems if name not in BEDS]
        beds = [name for name in self.problems if name in BEDS]
        return [*toys, *all_beds(beds, self.formats, self.bad_shares, **self._sizes)]

    def methods_of(self, problem: Bed | Toy) -> list[str]:
        """What is run, in the order it is run in."""
        if self.ablations:
            chosen = {method for option in self.ablations for method in ABLATIONS[option].values()}
        else:
            default = ON_BEDS if isinstance(problem, Bed) else ON_DEFAULT_TOY if problem == Toy() else ON_TOYS
            chosen = set(self.methods or default)
        return [method for method in METHODS if method in chosen]


def main(args: CompareArguments) -> None:
    """Run what is missing and print the tables of each problem."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    console = Console(width=200)
    output_dir, results = Path(args.output_dir), Path(args.results)
    if results.is_file():
        restore(results, output_dir)
    if args.train:
        for seed in args.seeds:
            for chosen in args.chosen:
                _run_problem(console, args, chosen, seed)
        collect(output_dir, results)
    found = Results.read(results) if results.is_file() else Results({})
    for chosen in args.chosen:
        print_problem(console, found, str(chosen), args.seeds, args.methods_of(chosen))


def _run_problem(console: Console, args: CompareArguments, chosen: Bed | Toy, seed: int) -> None:
    folder = Path(args.output_dir) / str(chosen) / f"seed{seed}"
    methods = [name for name in args.methods_of(chosen) if not (folder / f"{name.replace('/', '-')}.json").is_file()]
    if not methods:
        return
    with _compact_head(isinstance(chosen, Bed) and not torch.cuda.is_available()):
        if isinstance(chosen, Bed):
            problem = build_bed(chosen, seed, Path(args.data_dir), args.model, **_model_options(args))
        else:
            problem = build_toy(chosen, seed, Path(args.output_dir))
        files = Files(Path(args.output_dir), problem)
        for method in methods:
            if package := missing_package(method):
                console.print(f"{method}: `{package}` is not installed")
            elif not files.result(method).is_file():  # another method may have needed it meanwhile
                result = run_method(method, problem, files)
                measures = json.dumps({key: round(value, 3) for key, value in result.items()})
                console.print(f"seed {seed}, {chosen}, {method}: {measures}")


def _model_options(args: CompareArguments) -> dict[str, Any]:
    if not args.load_in_4bit:
        return {}
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return {"model_init_kwargs": {"dtype": "bfloat16", "quantization_config": quantization}}


@contextmanager
def _compact_head(is_on: bool) -> Iterator[None]:
    """
    Inside the block, if it is on, on a CPU as on a GPU: TRL's head leaves out prompts and padding only where Triton
    is, and takes most of the time of a step on a CPU otherwise. The losses are the same, for all methods alike.
    """
    before = trl_utils._use_triton
    if is_on:
        trl_utils._use_triton = lambda device: True  # where the head asks; its kernel asks elsewhere
    try:
        yield
    finally:
        trl_utils._use_triton = before


if __name__ == "__main__":
    main(*TrlParser(CompareArguments).parse_args_and_config())
