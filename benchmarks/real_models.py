"""
The paper's two settings on real models, methods side by side at equal steps (arXiv 2511.21056).

Not run on a real model yet: the tests run it on tiny stand-ins, with files in place of the Hub's datasets.

One GPU and access to the Hub are enough. Results are written per method and seed, so that an interrupted call goes on
where it stopped.

```bash
python benchmarks/real_models.py --setting quality --output_dir quality
python benchmarks/real_models.py --setting safety --output_dir safety

# Llama 3 with QLoRA, on one GPU of 24 GB with the judge quantized as well. Its adapter is in bf16, in which steps of
# 5e-6 are lost in rounding.
python benchmarks/real_models.py --setting safety --output_dir safety-llama \
    --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --load_in_4bit --use_bnb_nested_quant \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 16 --optim paged_adamw_8bit \
    --learning_rate 1e-4 --judge_load_in_4bit

# RedOrca and BlueOrca themselves, as files of the SEAL repository; read whole, as the harmful rows may be at the end
python benchmarks/real_models.py --setting safety --output_dir redorca --streaming false \
    --train_dataset_name RedOrca/train.jsonl --trusted_dataset_name BlueOrca/train.jsonl --harmful_dataset_name ""
```

`docs/real_models.md` says what is measured.
"""

import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from judge import ChatModel, LocalJudge, judge_tokenizer, win_rate
from real_model_methods import METHODS, SFT, check_model, run_missing, with_needs
from real_model_settings import (
    BenchmarkArguments,
    RealModelConfig,
    SeedFiles,
    check_same_settings,
    write_json,
)
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig
from trl import ModelConfig, TrlParser


COLUMNS = {
    "validation_loss": "validation loss",
    "held_out_loss": "held-out loss",
    "win_rate": "win rate over SFT",
    "ties": "ties",
    "consistent": "same verdict in both orders",
    "effective_sample_ratio": "effective sample ratio",
    "harmful_kept": "harmful rows kept",
    "harmful_refined": "of these answered anew",
    "auroc": "AUROC of the row ranking",
    "refined": "rows refined",
    "empty_answers": "empty answers",
    "seconds": "seconds",
}


def main(args: BenchmarkArguments, model_args: ModelConfig) -> None:
    """Run what is missing, judge what is not judged, and print the table."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    console = Console(width=190)
    methods = with_needs(args.methods or list(METHODS))
    check_model(args, model_args)
    check_same_settings(args, model_args)
    files = {seed: SeedFiles(Path(args.output_dir) / f"seed{seed}") for seed in args.seeds}
    if args.judge_model and _not_judged(args, methods, list(files.values())):
        judge_tokenizer(args.judge_model)  # now, not only when everything is trained
    for seed, of_seed in files.items():
        run_missing(args, model_args, of_seed, seed, console)
    if args.judge_model:
        judge_missing(args, methods, list(files.values()), console)
    print_results(console, args, methods, list(files.values()))


def judge_missing(
    args: BenchmarkArguments,
    methods: list[str],
    files: list[SeedFiles],
    console: Console,
    judge: ChatModel | None = None,
) -> None:
    """
    Win rates over plain SFT's answers, where they are missing.

    Args:
        args ([`BenchmarkArguments`]): names the judge.
        methods (`list[str]`): whose answers.
        files (`list[SeedFiles]`): of each seed.
        console (`Console`): for progress.
        judge (`Callable`, *optional*): instead of the model that `args` name, which is loaded only if it is needed.
    """
    missing = _not_judged(args, methods, files)
    if not missing:
        return
    judge = judge or load_judge(args, console)
    for of_seed, method in missing:
        console.print(f"{of_seed.folder.name}: judging {method}")
        baseline, compared = (json.loads(of_seed.answers(name).read_text()) for name in (SFT, method))
        if baseline["questions"] != compared["questions"]:
            raise ValueError(f"{of_seed.folder} has answers to different questions. Remove it, and run it again.")
        found = win_rate(judge, baseline["questions"], compared["answers"], baseline["answers"])
        write_json(of_seed.judged(method, args), found._asdict())
    del judge
    gc.collect()


def _not_judged(args: BenchmarkArguments, methods: list[str], files: list[SeedFiles]) -> list[tuple[SeedFiles, str]]:
    pairs = [(of_seed, method) for of_seed in files for method in methods if method != SFT]
    return [(of_seed, method) for of_seed, method in pairs if not of_seed.judged(method, args).is_file()]


def load_judge(args: BenchmarkArguments, console: Console) -> LocalJudge:
    options: dict[str, Any] = {"dtype": "float32" if args.use_cpu else "bfloat16"}
    if args.judge_load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if not args.use_cpu:
        options["device_map"] = "auto"
    return LocalJudge(
        args.judge_model,
        batch_size=args.judge_batch_size,
        max_new_tokens=args.judge_max_new_tokens,
        console=console,
        **options,
    )


def read_results(args: BenchmarkArguments, methods: list[str], files: list[SeedFiles]) -> dict[str, list[dict]]:
    """Measures of each method, one entry per seed that is there."""
    results: dict[str, list[dict]] = {}
    for method in methods:
        for of_seed in files:
            if of_seed.result(method).is_file():
                result = json.loads(of_seed.result(method).read_text())
                judged = of_seed.judged(method, args)
                result |= json.loads(judged.read_text()) if args.judge_model and judged.is_file() else {}
                results.setdefault(method, []).append(result)
    return results


def print_results(console: Console, args: BenchmarkArguments, methods: list[str], files: list[SeedFiles]) -> None:
    results = read_results(args, methods, files)
    unparsed = [result["unparsed"] for of_method in results.values() for result in of_method if "unparsed" in result]
    firsts = [result["first_preferred"] for of in results.values() for result in of if "first_preferred" in result]
    table = Table(title=f"{args.setting}, {args.total_steps} steps: mean (range) of {len(files)} seeds")
    table.add_column("method", no_wrap=True)
    measured = {key for of_method in results.values() for result in of_method for key in result}
    columns = [key for key in COLUMNS if key in measured]
    for key in columns:
        table.add_column(COLUMNS[key])
    for method, of_method in results.items():
        table.add_row(method, *(_spread([result[key] for result in of_method if key in result]) for key in columns))
    console.print(table)
    if unparsed:
        console.print(
            f"The judge gave no verdict in {statistics.mean(unparsed):.1%} of its replies, which count as ties; where "
            f"it decided it preferred the answer shown first in {statistics.mean(firsts):.1%}."
        )


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main(*TrlParser((BenchmarkArguments, RealModelConfig)).parse_args_and_config())
