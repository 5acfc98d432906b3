"""
What refinement costs: a refresh beside one bare call of `generate` over the same prompts, and a whole run.

```bash
python benchmarks/refinement_speed.py
```

A refresh sorts the questions by length, generates in batches, computes the log-probabilities of the responses by the
training forward, judges and stores them. Pairs of both are measured one after the other; ratios are to the bare call.
A whole run is an epoch with `refine_ratio=0.1` and the schedule of the defaults, beside the same run without.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import TrlParser
from trl.trainer.utils import pad

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.planted_faults import build_tokenizer
from trl_bilevel.refined_responses import ResponseStore
from trl_bilevel.refinement import Candidates
from trl_bilevel.response_generation import ready_to_generate


@dataclass
class BenchmarkArguments:
    """
    Options of the benchmark.

    Args:
        num_pairs (`int`): measured pairs, after one that is not counted.
        num_questions (`int`): questions per refresh.
        max_new_tokens (`int`): tokens per response.
        refine_batch_size (`int`): questions per call of `generate` in a refresh.
        hidden_size (`int`): of a Llama of four layers with random weights.
        num_train_rows (`int`): rows of the whole run, with answers of `max_new_tokens` letters; 0 to leave it out.
        num_runs (`int`): pairs of whole runs.
        use_cpu (`bool`): whether to stay on the CPU where there is a GPU.
    """

    num_pairs: int = 7
    num_questions: int = 128
    max_new_tokens: int = 64
    refine_batch_size: int = 128
    hidden_size: int = 256
    num_train_rows: int = 512
    num_runs: int = 3
    use_cpu: bool = False


def _rows(num_rows: int, seed: int, answer_length: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    prompts = ["".join(rng.choice(letters, size=rng.integers(8, 96))) for _ in range(num_rows)]
    answers = [" ok" + "".join(rng.choice(letters, size=answer_length)) for _ in range(num_rows)]
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


def _config(args: "BenchmarkArguments", folder: str, refine_ratio: float, **options: Any) -> BilevelSFTConfig:
    if refine_ratio > 0:
        options |= {
            "refine_ratio": refine_ratio,
            "refine_max_new_tokens": args.max_new_tokens,
            "refine_batch_size": args.refine_batch_size,
            "refine_discard_flawed": False,  # none ends by itself
        }
    return BilevelSFTConfig(
        output_dir=folder,
        use_cpu=args.use_cpu or not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and not args.use_cpu,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )


def _model(args: "BenchmarkArguments", tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            # Nothing ends a response early, so that both write the same number of tokens
            eos_token_id=None,
            bos_token_id=None,
        )
    )


class Seconds(NamedTuple):
    """What one pair took."""

    bare: float
    generation: float
    likelihoods: float
    refresh: float


class _Clock:
    """Adds up the time of the calls of a function."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args)
        self.seconds += time.perf_counter() - start
        return result


def measure(args: BenchmarkArguments) -> list[Seconds]:
    """One bare generation and one refresh, for each pair."""
    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = BilevelSFTTrainer(
            _model(args, tokenizer),
            _config(args, folder, 1.0, per_device_train_batch_size=32, refine_temperature=1.0),
            train_dataset=_rows(args.num_questions, seed=0),
            validation_dataset=_rows(32, seed=1),
            processing_class=tokenizer,
        )
        refiner = trainer.refiner
        refiner.stop_ids, refiner.generator.stop_ids = [], []
        refiner.generator.generation_config.eos_token_id = None
        candidates = Candidates(refinable=np.ones(args.num_questions, dtype=bool), scores=np.zeros(args.num_questions))
        device = trainer.model.device
        prompts = [
            torch.tensor(refiner.reader.read(row).generation_ids, device=device) for row in range(args.num_questions)
        ]
        generation = refiner.generator.generate = _Clock(refiner.generator.generate)
        likelihoods = refiner.log_probs_of = _Clock(refiner.log_probs_of)
        pairs = []
        for pair in range(args.num_pairs + 1):
            start = _now()
            with ready_to_generate(trainer.model), trainer.accelerator.autocast():
                trainer.model.generate(
                    input_ids=pad(prompts, tokenizer.pad_token_id, padding_side="left"),
                    attention_mask=pad([torch.ones_like(prompt) for prompt in prompts], 0, padding_side="left"),
                    generation_config=refiner.generator.generation_config,
                )
            middle = _now()
            refiner.refresh(ResponseStore(f"{folder}/{pair:x}"), pair, candidates)
            stop = _now()
            pairs.append(Seconds(middle - start, generation.seconds, likelihoods.seconds, stop - middle))
            generation.seconds = likelihoods.seconds = 0.0
    return pairs[1:]


def _now() -> float:
    """Seconds, once the device has done what it was asked."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure_runs(args: BenchmarkArguments) -> list[float]:
    """Seconds of a whole run with refinement over those of the same run without, for each pair."""
    tokenizer = build_tokenizer()
    ratios = []
    for run in range(args.num_runs):
        seconds = {}
        for refine_ratio in (0.0, 0.1) if run % 2 == 0 else (0.1, 0.0):
            with tempfile.TemporaryDirectory() as folder:
                trainer = BilevelSFTTrainer(
                    _model(args, tokenizer),
                    _config(args, folder, refine_ratio, per_device_train_batch_size=8, num_train_epochs=1),
                    train_dataset=_rows(args.num_train_rows, 0, args.max_new_tokens),
                    validation_dataset=_rows(64, 1, args.max_new_tokens),
                    processing_class=tokenizer,
                )
                trainer.remove_callback(PrinterCallback)
                start = time.perf_counter()
                trainer.train()
                seconds[refine_ratio] = time.perf_counter() - start
        ratios.append(seconds[0.1] / seconds[0.0])
    return ratios


def main(args: BenchmarkArguments) -> None:
    """Measure and print the table."""
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))))
    pairs = measure(args)
    table = Table(title=f"{args.num_questions} questions, {args.max_new_tokens} tokens each, {len(pairs)} pairs")
    for column in ("", "median", "range"):
        table.add_column(column)
    for name, values, digits in (
        ("one call of generate, s", [pair.bare for pair in pairs], 2),
        ("refresh, s", [pair.refresh for pair in pairs], 2),
        ("ratio", [pair.refresh / pair.bare for pair in pairs], 3),
        ("generation alone, ratio", [pair.generation / pair.bare for pair in pairs], 3),
        ("likelihoods, ratio", [pair.likelihoods / pair.bare for pair in pairs], 3),
        (
            "all else, ratio",
            [(pair.refresh - pair.generation - pair.likelihoods) / pair.bare for pair in pairs],
            3,
        ),
    ):
        table.add_row(
            name,
            f"{statistics.median(values):.{digits}f}",
            f"{min(values):.{digits}f} to {max(values):.{digits}f}",
        )
    console = Console(width=100)
    console.print(table)
    if args.num_train_rows:
        ratios = measure_runs(args)
        console.print(
            f"A whole run with refinement takes {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
            f"{max(ratios):.3f}) times as long as one without: {args.num_train_rows} rows, {len(ratios)} pairs."
        )


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
